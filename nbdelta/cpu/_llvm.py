"""Types of LLVM, and values while they are computed."""

from llvmlite import ir

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
HALF, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()


class Value:
    """An integer, a float or a vector of floats while it is computed."""

    __slots__ = ("e", "ir")

    def __init__(self, e, value):
        self.e, self.ir = e, value

    def _apply(self, op, other, swap=False):
        other = self.e.like(self, other)
        a, b = (other, self) if swap else (self, other)
        floating = not isinstance(self.ir.type, ir.IntType)
        return Value(self.e, getattr(self.e.b, "f" + op if floating else op)(a.ir, b.ir))

    def __add__(self, other):
        return self._apply("add", other)

    def __sub__(self, other):
        return self._apply("sub", other)

    def __rsub__(self, other):
        return self._apply("sub", other, swap=True)

    def __mul__(self, other):
        return self._apply("mul", other)

    def __floordiv__(self, other):
        """Quotient of a number that is not negative."""
        return self._apply("udiv", other)

    def __mod__(self, other):
        return self._apply("urem", other)

    def __rtruediv__(self, other):
        return self._apply("div", other, swap=True)

    def __truediv__(self, other):
        return self._apply("div", other)

    __radd__, __rmul__ = __add__, __mul__


STORED = {"float16": HALF, "float32": F32, "float64": F64}


def size_of(dtype):
    """Bytes of a number in memory."""
    return 2 if dtype == "bfloat16" else bits_of(STORED[dtype]) // 8


def shape_of(kind, lanes):
    return kind if lanes == 1 else ir.VectorType(kind, lanes)


def constant(kind, lanes, x):
    return (
        ir.Constant(kind, x) if lanes == 1 else ir.Constant(ir.VectorType(kind, lanes), [x] * lanes)
    )


def mask_of(indices):
    return ir.Constant(ir.VectorType(I32, len(indices)), list(indices))


def bits_of(kind):
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    return {HALF: 16, F32: 32, F64: 64}[element]


def resize(builder, x, kind):
    """Convert between float types of different width."""
    have, want = bits_of(x.type), bits_of(kind)
    if have == want:
        return x
    if {have, want} == {16, 64}:
        # by way of float32: processors convert to half precision from there only
        single = ir.VectorType(F32, kind.count) if isinstance(kind, ir.VectorType) else F32
        x = resize(builder, x, single)
    return builder.fpext(x, kind) if have < want else builder.fptrunc(x, kind)
