"""A small emitter of vector code: the only file that knows LLVM.

`tile` turns a Python function ``f(e, *args)`` into a function that kernels call as ``f(REAL,
*args)``, where ``REAL`` is ``np.float32`` or ``np.float64``. While Numba compiles the kernel,
``f`` runs once with an `Emitter` and writes vector instructions: Python loops in it are unrolled
code, `Emitter.loop` is a loop. Integer arguments are byte addresses and counts, float arguments
are of type ``REAL``.

Addresses instead of arrays keep slicing, bounds and array structs out of the inner loops, and one
compilation serves every array layout.
"""

import inspect
import math
from fractions import Fraction

import numba
import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

# lanes of a tile = tokens of a block = columns of a state strip, for every dtype and machine
W = 16

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
HALF, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()


_LN2 = Fraction("0.693147180559945309417232121458176568")

_AVX512_NAMES = ("avx512", "icelake", "sapphirerapids", "graniterapids", "znver4", "znver5")
_AVX2_NAMES = ("haswell", "broadwell", "skylake", "znver1", "znver2", "znver3", "x86-64-v3")


def features():
    """Instruction sets that Numba compiles for, each with a plus or a minus."""
    named = numba.config.CPU_FEATURES
    if named is None:
        named = binding.get_host_cpu_features().flatten()
    return set(named.split(","))


_ARM = binding.get_default_triple().startswith(("aarch64", "arm64"))
# without instructions for it LLVM would call a library function that a process may not have
_CONVERTS_HALF = _ARM or "+f16c" in features()


def vector_unit():
    """Bits and number of the vector registers that Numba compiles for.

    Numba takes the features of this machine, or ``NUMBA_CPU_FEATURES``. ``NUMBA_CPU_NAME`` can only
    narrow them: ``haswell`` gives the AVX2 shape of every tile on a machine with AVX-512.
    """
    name, has = numba.config.CPU_NAME, features()
    wide_name = not name or any(part in name for part in _AVX512_NAMES)
    avx2_name = wide_name or any(part in name for part in _AVX2_NAMES)
    if "+avx512f" in has and wide_name:
        return 512, 32
    if "+avx2" in has and avx2_name:
        return 256, 16
    return 128, 32 if _ARM else 16


BITS, REGISTERS = vector_unit()


# products of bfloat16 pairs, summed in float32, in one instruction
DOTS_BFLOAT16 = BITS == 512 and "+avx512bf16" in features()
if DOTS_BFLOAT16:
    # inline assembly without a parser for it ends the process
    binding.initialize_native_asmparser()


def native_lanes(itemsize):
    """Lanes of one vector register."""
    return BITS // (8 * itemsize)


def tile_rows(itemsize):
    """Rows of a register tile (``MR``): its accumulators take half of the registers."""
    return max(1, REGISTERS // 2 * native_lanes(itemsize) // W)


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


class Emitter:
    """Writes code for one dtype: `size`, `row`: bytes of a number, a row; `lanes` a register."""

    def __init__(self, builder, real):
        self.b = builder
        self.real = F64 if real == types.float64 else F32
        self.size = 8 if real == types.float64 else 4
        self.row = W * self.size
        self.lanes = native_lanes(self.size)
        self.mr = tile_rows(self.size)

    def argument(self, kind, value):
        """Return an argument of a tile as its function takes it."""
        if isinstance(kind, types.NumberClass):
            return "bfloat16" if kind.dtype == types.uint16 else kind.dtype.name
        return Value(self, value)

    # ---- constants ----

    def like(self, value, x):
        """Return the number `x` as a constant of the type of `value`."""
        if isinstance(x, Value):
            return x
        kind = value.ir.type
        if isinstance(kind, ir.VectorType):
            return Value(self, ir.Constant(kind, [float(x)] * kind.count))
        return Value(self, ir.Constant(kind, x))

    def integer(self, x):
        return x if isinstance(x, Value) else Value(self, ir.Constant(I64, x))

    def splat(self, x, lanes=W):
        """Return a vector with `x`, a number or a float of the code, in every lane."""
        kind = ir.VectorType(self.real, lanes)
        if not isinstance(x, Value):
            return Value(self, ir.Constant(kind, [float(x)] * lanes))
        zero = ir.Constant(kind, ir.Undefined)
        v = self.b.insert_element(zero, x.ir, ir.Constant(I32, 0))
        return Value(self, self.b.shuffle_vector(v, zero, _indices([0] * lanes)))

    # ---- memory ----

    def _pointer(self, address, offset, kind):
        pointer = self.b.inttoptr(address.ir, I8.as_pointer())
        if isinstance(offset, Value) or offset:
            pointer = self.b.gep(pointer, [self.integer(offset).ir])
        return self.b.bitcast(pointer, kind.as_pointer())

    def _load(self, address, offset, kind):
        value = self.b.load(self._pointer(address, offset, kind))
        value.align = 1  # arrays of the caller may be misaligned, and it costs nothing
        return value

    def load(self, address, offset=0, lanes=W):
        return Value(self, self._load(address, offset, ir.VectorType(self.real, lanes)))

    def scalar(self, address, offset=0):
        return Value(self, self._load(address, offset, self.real))

    def bcast(self, address, offset=0, lanes=W):
        return self.splat(self.scalar(address, offset), lanes)

    def store(self, value, address, offset=0, streaming=False):
        """Write, `streaming` to a multiple of 64 bytes past the caches."""
        store = self.b.store(value.ir, self._pointer(address, offset, value.ir.type))
        store.align = 64 if streaming else 1
        if streaming:
            store.set_metadata("nontemporal", self.b.module.add_metadata([ir.Constant(I32, 1)]))

    def instruction(self, text, *addresses):
        """Write an instruction that LLVM has no function for; ``$0``, ``$1`` are the addresses."""
        kind = ir.FunctionType(ir.VoidType(), [I64] * len(addresses))
        constraints = ",".join(["r"] * len(addresses) + ["~{memory}"])
        assembly = ir.InlineAsm(kind, text, constraints, side_effect=True)
        self.b.call(assembly, [self.integer(a).ir for a in addresses])

    def prefetch(self, address, write=False):
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        function = cgutils.get_or_insert_function(self.b.module, kind, "llvm.prefetch.p0")
        pointer = self.b.inttoptr(address.ir, I8.as_pointer())
        self.b.call(function, [pointer, *(ir.Constant(I32, x) for x in (int(write), 3, 1))])

    # ---- dtypes in memory: "float32" "float64" "float16" "bfloat16" ----

    def load_as(self, dtype, address, lanes):
        """Load `lanes` numbers of `dtype` (1: a scalar) and convert them."""
        if dtype == "bfloat16":
            bits = self.b.zext(self._load(address, 0, _shape(I16, lanes)), _shape(I32, lanes))
            bits = self.b.shl(bits, _constant(I32, lanes, 16))
            return self._convert(self.b.bitcast(bits, _shape(F32, lanes)), lanes)
        if dtype == "float16" and not _CONVERTS_HALF:
            bits = self.b.zext(self._load(address, 0, _shape(I16, lanes)), _shape(I32, lanes))
            return self._convert(self._from_half_bits(bits, lanes), lanes)
        return self._convert(self._load(address, 0, _shape(_STORED[dtype], lanes)), lanes)

    def store_as(self, dtype, value, address, lanes):
        """Round `value` to `dtype`, to nearest even, and store it."""
        by_bits = dtype == "bfloat16" or (dtype == "float16" and not _CONVERTS_HALF)
        x = _resize(self.b, value.ir, _shape(F32 if by_bits else _STORED[dtype], lanes))
        if by_bits:
            x = (self._bfloat16_bits if dtype == "bfloat16" else self._half_bits)(x, lanes)
        self.b.store(x, self._pointer(address, 0, x.type)).align = 1

    def _convert(self, x, lanes):
        return Value(self, _resize(self.b, x, _shape(self.real, lanes)))

    def _bfloat16_bits(self, x, lanes):
        b = self.b
        bits = b.bitcast(x, _shape(I32, lanes))

        def number(n):
            return _constant(I32, lanes, n)

        odd = b.and_(b.lshr(bits, number(16)), number(1))
        rounded = b.lshr(b.add(b.add(bits, odd), number(0x7FFF)), number(16))
        # rounding could carry a NaN into infinity or zero: keep its sign and make it quiet
        nan = b.or_(b.lshr(bits, number(16)), number(0x40))
        return b.trunc(b.select(b.fcmp_unordered("uno", x, x), nan, rounded), _shape(I16, lanes))

    def _from_half_bits(self, bits, lanes):
        """float32 of the bits of a float16: scaling by 2^112 moves the exponent, denormals too."""
        b = self.b

        def number(n):
            return _constant(I32, lanes, n)

        sign = b.shl(b.and_(bits, number(0x8000)), number(16))
        bits = b.shl(b.and_(bits, number(0x7FFF)), number(13))
        scale = _constant(F32, lanes, 2.0**112)
        scaled = b.bitcast(b.fmul(b.bitcast(bits, scale.type), scale), bits.type)
        special = b.icmp_unsigned(">=", bits, number(0x7C00 << 13))
        scaled = b.select(special, b.or_(bits, number(0x7F800000)), scaled)
        return b.bitcast(b.or_(scaled, sign), scale.type)

    def _half_bits(self, x, lanes):
        """Bits of the float16 nearest to a float32."""
        b = self.b

        def number(n):
            return _constant(I32, lanes, n)

        bits = b.bitcast(x, _shape(I32, lanes))
        sign = b.lshr(b.and_(bits, number(0x80000000)), number(16))
        bits = b.and_(bits, number(0x7FFFFFFF))
        # adding 1/2 shifts a number below 2^-14 to the place of a float16 denormal, and rounds
        half = _constant(F32, lanes, 0.5)
        small = b.bitcast(b.fadd(b.bitcast(bits, half.type), half), bits.type)
        small = b.sub(small, number(126 << 23))
        odd = b.and_(b.lshr(bits, number(13)), number(1))
        normal = b.sub(b.add(b.add(bits, number(0xFFF)), odd), number(112 << 23))
        normal = b.lshr(normal, number(13))
        large = b.icmp_unsigned(">", bits, number(0x7F800000))
        large = b.select(large, number(0x7E00), number(0x7C00))
        result = b.select(b.icmp_unsigned("<", bits, number(113 << 23)), small, normal)
        result = b.select(b.icmp_unsigned(">=", bits, number(143 << 23)), large, result)
        return b.trunc(b.or_(result, sign), _shape(I16, lanes))

    # ---- pairs of bfloat16 in the halves of 32-bit words ----

    def load_pairs(self, address):
        """16 numbers of bfloat16 as 8 with even and 8 with odd index: one instruction for each."""
        words = self._load(address, 0, _shape(I32, 8))
        halves = self._low_half(words, 8), self._high_half(words, 8)
        return [Value(self, self.b.bitcast(x, _shape(F32, 8))) for x in halves]

    def store_pairs(self, values, address):
        """Round 8 numbers with even and 8 with odd index to bfloat16 and store them.

        A NaN must be one of `load_pairs` or of `plain_nan`: the bits that are cut off are zeros.
        """
        b = self.b
        even, odd = (b.bitcast(x.ir, _shape(I32, 8)) for x in values)
        kind = _shape(I16, 16)
        kept = b.or_(b.lshr(even, _constant(I32, 8, 16)), self._high_half(odd, 8))
        cut = b.or_(b.and_(even, _constant(I32, 8, 0xFFFF)), self._low_half(odd, 8))
        kept, cut = b.bitcast(kept, kind), b.bitcast(cut, kind)
        # up if what is cut off is more than a half, or a half and the kept part is odd
        less = ir.FunctionType(kind, [kind, kind])
        less = cgutils.get_or_insert_function(b.module, less, "llvm.usub.sat.v16i16")
        cut = b.call(less, [cut, b.and_(b.not_(kept), _constant(I16, 16, 1))])
        words = b.add(kept, b.lshr(cut, _constant(I16, 16, 15)))
        b.store(words, self._pointer(address, 0, kind)).align = 1

    def load_words(self, address, offset=0):
        return Value(self, self._load(address, offset, ir.VectorType(I32, W)))

    def halves(self, x):
        """Round a vector to bfloat16, to nearest."""
        lanes = x.ir.type.count
        if DOTS_BFLOAT16:
            # for such an instruction of its own LLVM 15 calls a function that is nowhere
            kind = ir.FunctionType(ir.VectorType(I16, lanes), [x.ir.type])
            return self.b.call(ir.InlineAsm(kind, "vcvtneps2bf16 $1, $0", "=v,v"), [x.ir])
        return self._bfloat16_bits(x.ir, lanes)

    def store_halves(self, halves, address, offset=0):
        self.b.store(halves, self._pointer(address, offset, halves.type)).align = 1

    def from_halves(self, halves):
        lanes = halves.type.count
        bits = self.b.zext(halves, ir.VectorType(I32, lanes))
        bits = self.b.shl(bits, _constant(I32, lanes, 16))
        return Value(self, self.b.bitcast(bits, ir.VectorType(F32, lanes)))

    def pair(self, low, high):
        """Round two vectors to bfloat16, to nearest, and join them lane by lane."""
        lanes = low.ir.type.count
        mixed = [i + by for i in range(lanes) for by in (0, lanes)]
        mixed = self.b.shuffle_vector(self.halves(low), self.halves(high), _indices(mixed))
        return Value(self, self.b.bitcast(mixed, ir.VectorType(I32, lanes)))

    def halves_of(self, words):
        """The two numbers of each word, as two vectors."""
        kind = ir.VectorType(F32, words.ir.type.count)
        bits = self._low_half(words.ir, kind.count), self._high_half(words.ir, kind.count)
        return [Value(self, self.b.bitcast(x, kind)) for x in bits]

    def dot(self, address, offset, words, acc):
        """Add the two products of one word in memory with each of the words to `acc`."""
        if DOTS_BFLOAT16:
            # as an instruction of LLVM the broadcast would stay one of its own
            vector = acc.ir.type
            kind = ir.FunctionType(vector, [vector, words.ir.type, I64])
            text = f"vdpbf16ps {offset}($3){{1to16}}, $2, $0"
            asm = ir.InlineAsm(kind, text, "=v,0,v,r,~{memory}", side_effect=True)
            return Value(self, self.b.call(asm, [acc.ir, words.ir, address.ir]))
        word = self._load(address, offset, I32)
        for half in (self._low_half, self._high_half):
            a = self.splat(Value(self, self.b.bitcast(half(word, 1), F32)))
            b = Value(self, self.b.bitcast(half(words.ir, W), ir.VectorType(F32, W)))
            acc = self.fma(a, b, acc)
        return acc

    def _low_half(self, word, lanes):
        return self.b.shl(word, _constant(I32, lanes, 16))

    def _high_half(self, word, lanes):
        return self.b.and_(word, _constant(I32, lanes, 0xFFFF0000))

    # ---- arithmetic ----

    def _intrinsic(self, name, *args):
        kind = args[0].ir.type
        suffix = "f64" if self.real == F64 else "f32"
        if isinstance(kind, ir.VectorType):
            suffix = f"v{kind.count}{suffix}"
        function = ir.FunctionType(kind, [kind] * len(args))
        function = cgutils.get_or_insert_function(self.b.module, function, f"llvm.{name}.{suffix}")
        return Value(self, self.b.call(function, [a.ir for a in args]))

    def fma(self, a, b, c):
        """Return ``a * b + c`` with one rounding."""
        return self._intrinsic("fma", a, b, c)

    def sqrt(self, x):
        return self._intrinsic("sqrt", x)

    def abs(self, x):
        return self._intrinsic("fabs", x)

    def select(self, a, less_than, b, then, other):
        """Return ``then if a < b else other``, lane by lane; a NaN compares false."""
        whole = isinstance(a.ir.type, ir.IntType)
        compare = self.b.icmp_signed if whole else self.b.fcmp_ordered
        mask = compare(less_than, a.ir, self.like(a, b).ir)
        return Value(self, self.b.select(mask, self.like(a, then).ir, self.like(a, other).ir))

    def plain_nan(self, x):
        """Replace every NaN by one whose lower bits are zeros."""
        nan = self.b.fcmp_unordered("uno", x.ir, x.ir)
        return Value(self, self.b.select(nan, self.like(x, math.nan).ir, x.ir))

    def shuffle(self, a, b, indices):
        return Value(self, self.b.shuffle_vector(a.ir, b.ir, _indices(indices)))

    def join(self, parts):
        """Return vectors one behind the other as one."""
        while len(parts) > 1:
            n = range(2 * parts[0].ir.type.count)
            parts = [self.shuffle(a, b, n) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    def split(self, x, n):
        """Return a vector as n parts."""
        lanes = x.ir.type.count // n
        if n == 1:
            return [x]
        return [self.shuffle(x, x, range(i * lanes, (i + 1) * lanes)) for i in range(n)]

    def set_lane(self, x, lane, number):
        """Replace one lane, whatever it holds, NaN too."""
        n = x.ir.type.count
        return self.shuffle(x, self.splat(number, n), [n if i == lane else i for i in range(n)])

    def shift(self, x, by, fill):
        """Move lane ``i - by`` to lane ``i``; `fill` where there is none."""
        n = x.ir.type.count
        sources = [i - by if 0 <= i - by < n else n for i in range(n)]
        return self.shuffle(x, self.splat(fill, n), sources)

    def exp(self, x):
        """e^x to about 1 ulp: exactly 0 for -inf and large negative x, inf for large x, NaN for
        NaN.

        ``x = n ln 2 + r`` with ``|r| <= ln 2 / 2``: a Taylor polynomial of e^r, times 2^n in two
        steps so that results below the normal range come out right. Adding a large number rounds
        to an integer without a conversion, which would be undefined for NaN.
        """
        double = self.real == F64
        low, high, degree = (-746.0, 710.0, 13) if double else (-105.0, 89.0, 7)
        magic, bias, mantissa = (1.5 * 2.0**52, 1023, 52) if double else (1.5 * 2.0**23, 127, 23)
        # n times the high part is exact
        ln2_high = Fraction(
            math.floor(_LN2 * 2 ** (32 if double else 15)), 2 ** (32 if double else 15)
        )
        x = self.select(x, "<", low, low, x)
        x = self.select(x, ">", high, high, x)
        shifted = self.fma(x, self.like(x, 1 / math.log(2)), self.like(x, magic))
        n = shifted - magic
        r = self.fma(n, self.like(x, -float(ln2_high)), x)
        r = self.fma(n, self.like(x, -float(_LN2 - ln2_high)), r)
        p = self.like(x, 1 / math.factorial(degree))
        for i in reversed(range(degree)):
            p = self.fma(p, r, self.like(x, 1 / math.factorial(i)))
        whole = I64 if double else I32
        lanes = x.ir.type.count
        origin = int(np.array(magic, np.float64 if double else np.float32).view(f"i{self.size}"))
        bits = self.b.bitcast(shifted.ir, _shape(whole, lanes))
        bits = self.b.sub(bits, _constant(whole, lanes, origin))
        first = self.b.ashr(bits, _constant(whole, lanes, 1))
        for part in (first, self.b.sub(bits, first)):
            power = self.b.add(part, _constant(whole, lanes, bias))
            power = self.b.shl(power, _constant(whole, lanes, mantissa))
            p = p * Value(self, self.b.bitcast(power, x.ir.type))
        return p

    def softplus(self, x):
        """log(1 + e^x) = max(x, 0) + log1p(y) with y = e^-|x|, to a few ulp however small it is.

        ``log1p(y) = 2 artanh(s)`` with ``s = y / (2 + y) <= 1/3``, whose series ends early.
        """
        y = self.exp(self.abs(x) * -1.0)
        s = y / (y + 2.0)
        square = s * s
        terms = 17 if self.real == F64 else 8
        p = self.like(x, 1 / (2 * terms + 1))
        for i in reversed(range(terms)):
            p = self.fma(p, square, self.like(x, 1 / (2 * i + 1)))
        return self.fma(s * 2.0, p, self.select(x, "<", 0.0, 0.0, x))

    def sigmoid(self, x):
        return 1.0 / (self.exp(x * -1.0) + 1.0)

    def transpose(self, rows):
        """Transpose a square of register vectors by log2(n) rounds of two-input shuffles."""
        rows, n, step = list(rows), len(rows), 1
        while step < n:
            low, high = _pairing(n, step)
            for i in range(n):
                if not i & step:
                    a, b = rows[i], rows[i + step]
                    rows[i], rows[i + step] = self.shuffle(a, b, low), self.shuffle(a, b, high)
            step *= 2
        return rows

    def sum_lanes(self, rows):
        """Lane i of the result is the sum over the lanes of ``rows[i]``, in a fixed order."""
        n, step = len(rows), 1
        while step < n:
            low, high = _pairing(n, step)
            rows = [
                self.shuffle(rows[i], rows[i + step], low)
                + self.shuffle(rows[i], rows[i + step], high)
                if not i % (2 * step)
                else None
                for i in range(n)
            ]
            step *= 2
        return rows[0]

    def total(self, x):
        """Sum of the lanes of a vector, as a float."""
        while x.ir.type.count > 1:
            n = x.ir.type.count
            halves = list(range(n // 2)), list(range(n // 2, n))
            x = self.shuffle(x, x, halves[0]) + self.shuffle(x, x, halves[1])
        return Value(self, self.b.extract_element(x.ir, ir.Constant(I32, 0)))

    # ---- control ----

    def loop(self, n, carried, body, step=1, maybe_empty=False):
        """Emit ``for i in range(0, n, step): carried = body(i, carried)`` and return the last
        values.

        n is at least 1 unless `maybe_empty` says that this has to be looked at.
        """
        b = self.b
        end = self.integer(n).ir
        before = b.block
        head, done = b.append_basic_block("loop"), b.append_basic_block("done")
        if maybe_empty:
            b.cbranch(b.icmp_signed("<", ir.Constant(I64, 0), end), head, done)
        else:
            b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        i.add_incoming(ir.Constant(I64, 0), before)
        phis = [b.phi(value.ir.type) for value in carried]
        for phi, value in zip(phis, carried):
            phi.add_incoming(value.ir, before)
        results = body(Value(self, i), [Value(self, phi) for phi in phis])
        following = b.add(i, self.integer(step).ir, flags=("nsw", "nuw"))
        last = b.block
        i.add_incoming(following, last)
        for phi, value in zip(phis, results):
            phi.add_incoming(value.ir, last)
        b.cbranch(b.icmp_signed("<", following, end), head, done)
        b.position_at_end(done)
        if not maybe_empty:
            return results
        merged = []
        for value, result in zip(carried, results):
            phi = b.phi(value.ir.type)
            phi.add_incoming(value.ir, before)
            phi.add_incoming(result.ir, last)
            merged.append(Value(self, phi))
        return merged

    def choose(self, number, emit, n):
        """Run ``emit(i)`` for the i < n that equals `number`, and return its value if it has one.

        A number out of range runs the last one.
        """
        b = self.b
        cases = [b.append_basic_block(f"case{i}") for i in range(n)]
        done = b.append_basic_block("done")
        switch = b.switch(number.ir, cases[-1])
        results = []
        for i, case in enumerate(cases):
            switch.add_case(ir.Constant(I64, i), case)
            b.position_at_end(case)
            results.append((emit(i), b.block))
            b.branch(done)
        b.position_at_end(done)
        if results[0][0] is None:
            return None
        phi = b.phi(results[0][0].ir.type)
        for value, block in results:
            phi.add_incoming(value.ir, block)
        return Value(self, phi)


_STORED = {"float16": HALF, "float32": F32, "float64": F64}


def size_of(dtype):
    """Bytes of a number in memory."""
    return 2 if dtype == "bfloat16" else _bits(_STORED[dtype]) // 8


def _shape(kind, lanes):
    return kind if lanes == 1 else ir.VectorType(kind, lanes)


def _constant(kind, lanes, x):
    return (
        ir.Constant(kind, x) if lanes == 1 else ir.Constant(ir.VectorType(kind, lanes), [x] * lanes)
    )


def _indices(indices):
    return ir.Constant(ir.VectorType(I32, len(indices)), list(indices))


def _bits(kind):
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    return {HALF: 16, F32: 32, F64: 64}[element]


def _resize(builder, x, kind):
    """Convert between float types of different width."""
    have, want = _bits(x.type), _bits(kind)
    if have == want:
        return x
    if {have, want} == {16, 64}:
        # by way of float32: processors convert to half precision from there only
        single = ir.VectorType(F32, kind.count) if isinstance(kind, ir.VectorType) else F32
        x = _resize(builder, x, single)
    return builder.fpext(x, kind) if have < want else builder.fptrunc(x, kind)


def _pairing(n, step):
    """Lanes of a pair of vectors (a, b) that go to the two outputs of one round of a transpose."""
    low = [j if not j & step else n + j - step for j in range(n)]
    high = [j + step if not j & step else n + j for j in range(n)]
    return low, high


# annotations of what a tile returns, if anything
REAL = "a float of the code"
INT = "an integer"


def tile(function):
    """Make a kernel function ``f(REAL, *args)`` of an emitter function ``f(e, *args)``.

    The emitter function returns nothing, or what its annotation says, ``-> REAL`` or ``-> INT``.
    An argument that is a NumPy type, as ``np.float16``, arrives as its name; ``np.uint16`` stands
    for bfloat16.
    """
    names = list(inspect.signature(function).parameters)[1:]
    returns = function.__annotations__.get("return")

    def typing(real, args):
        real = real.dtype
        signature = [
            a
            if isinstance(a, types.NumberClass)
            else real
            if isinstance(a, types.Float)
            else types.int64
            for a in args
        ]
        result = {REAL: real, INT: types.int64}.get(returns, types.void)

        def codegen(context, builder, signature, values):
            e = Emitter(builder, real)
            value = function(e, *map(e.argument, signature.args[1:], values[1:]))
            return value.ir if returns else context.get_dummy_value()

        return result(types.NumberClass(real), *signature), codegen

    # intrinsic wants a function with as many named arguments as the call has
    arguments = ", ".join(names)
    source = (
        f"def {function.__name__}(typingctx, real, {arguments}):\n"
        f"    return typing(real, [{arguments}])\n"
    )
    namespace = {"typing": typing}
    exec(compile(source, f"<tile {function.__name__}>", "exec"), namespace)
    made = namespace[function.__name__]
    made.__module__, made.__doc__ = function.__module__, function.__doc__
    return intrinsic(made)


def _entry(context, builder, signature, args):
    """Pointer to ``desc[index]``."""
    return builder.gep(args[0], [args[1]])


@intrinsic
def claim(typingctx, desc, index):
    """Add 1 to ``desc[index]`` as one step among all threads; return the value before."""

    def codegen(context, builder, signature, args):
        pointer = _entry(context, builder, signature, args)
        return builder.atomic_rmw("add", pointer, ir.Constant(I64, 1), "seq_cst")

    return types.int64(desc, types.int64), codegen


@intrinsic
def read_array(typingctx, desc, index):
    """Return six entries of a descriptor from an index on: an array's address, code, strides."""

    def codegen(context, builder, signature, args):
        first = _entry(context, builder, signature, args)
        values = [builder.load(builder.gep(first, [ir.Constant(I64, i)])) for i in range(6)]
        return context.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(types.int64, 6)(desc, types.int64), codegen


@intrinsic
def read_float(typingctx, desc, index):
    """Return the entry of a descriptor that holds the bits of a float64."""

    def codegen(context, builder, signature, args):
        pointer = _entry(context, builder, signature, args)
        return builder.load(builder.bitcast(pointer, F64.as_pointer()))

    return types.float64(desc, types.int64), codegen


@intrinsic
def finish_stores(typingctx):
    """Make what was written past the caches visible to other threads."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def read_int64(typingctx, address):
    """Return the int64 at an address."""

    def codegen(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[0], I64.as_pointer()))

    return types.int64(types.int64), codegen


def constant_of(function):
    """Make a kernel function of REAL that is ``function(bytes of REAL)``, known while compiling."""

    def typing(typingctx, real):
        size = real.dtype.bitwidth // 8

        def codegen(context, builder, signature, args):
            return ir.Constant(I64, function(size))

        return types.int64(real), codegen

    return intrinsic(typing)


itemsize = constant_of(lambda size: size)
rows_of_tile = constant_of(tile_rows)
lanes_of = constant_of(native_lanes)


def _rounded_up(multiple_of):
    """Make a kernel function ``f(REAL, n)``: n rounded up to ``multiple_of(bytes of REAL)``."""

    def typing(typingctx, real, n):
        multiple = multiple_of(8 if real.dtype == types.float64 else 4)

        def codegen(context, builder, signature, args):
            last = ir.Constant(I64, multiple - 1)
            return builder.and_(builder.add(args[1], last), ir.Constant(I64, -multiple))

        return types.int64(real, types.int64), codegen

    return intrinsic(typing)


padded = _rounded_up(lambda size: W)
whole_tiles = _rounded_up(tile_rows)
