"""Vector code that computes: arithmetic, lanes, and functions of the vectors."""

import math
from fractions import Fraction

from llvmlite import ir
from numba.core import cgutils

from nbdelta.cpu._llvm import F64, I32, I64, Value, constant, mask_of, shape_of
from nbdelta.cpu._vector_unit import BITS, SCALES

_LN2 = Fraction("0.693147180559945309417232121458176568")


class Numbers:
    """The part of `nbdelta.cpu._simd.Emitter` that works on values in registers."""

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
        return Value(self, self.b.shuffle_vector(a.ir, b.ir, mask_of(indices)))

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
        """e^x to about 1 ulp, inf for large x, NaN for NaN; exactly 0 for -inf and all that is less
        than 1.5 times the smallest normal number.

        ``x = n ln 2 + r`` with ``|r| <= ln 2 / 2``: twice a Taylor polynomial of e^r, times
        2^(n - 1), as 2^128 is no number but e^88.5 is. Adding a large number rounds to an integer
        without a conversion, which would be undefined for NaN. The lowest bits of that sum are the
        exponent of 2^(n - 1), those of the number 0 for the least n. AVX-512 has an instruction
        for a product with 2^n, whatever n is.
        """
        double, lanes = self.real == F64, x.ir.type.count
        scales = SCALES and BITS == 512 and lanes == self.lanes
        low, high, degree = (-708.3, 710.0, 13) if double else (-87.2, 89.0, 7)
        mantissa, bias = (52, 1023) if double else (23, 127)
        magic, factor = 1.5 * 2.0**mantissa + bias - 1, 2
        if scales:
            low, factor = -746.0 if double else -105.0, 1
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
        p = self.like(x, factor / math.factorial(degree))
        for i in reversed(range(degree)):
            p = self.fma(p, r, self.like(x, factor / math.factorial(i)))
        if scales:
            return self._scale(p, n)
        whole = I64 if double else I32
        power = self.b.bitcast(shifted.ir, shape_of(whole, lanes))
        power = self.b.shl(power, constant(whole, lanes, mantissa))
        return p * Value(self, self.b.bitcast(power, x.ir.type))

    def _scale(self, x, n):
        """Return x 2^n for whole numbers n, by AVX-512's instruction for it."""
        kind, lanes = x.ir.type, x.ir.type.count
        mask = ir.IntType(lanes)
        function = ir.FunctionType(kind, [kind, kind, kind, mask, I32])
        suffix = "pd" if self.real == F64 else "ps"
        name = f"llvm.x86.avx512.mask.scalef.{suffix}.512"
        function = cgutils.get_or_insert_function(self.b.module, function, name)
        every, rounding = ir.Constant(mask, -1), ir.Constant(I32, 4)  # the mode in force
        return Value(self, self.b.call(function, [x.ir, n.ir, x.ir, every, rounding]))

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

    def transpose(self, rows, last=None):
        """Transpose a square of register vectors by log2(n) rounds of two-input shuffles.

        Only squares of `last` numbers are, if it is given.
        """
        rows, n, step = list(rows), len(rows), 1
        while step < (last or n):
            low, high = _pairing(n, step)
            for i in range(n):
                if not i & step:
                    a, b = rows[i], rows[i + step]
                    rows[i], rows[i + step] = self.shuffle(a, b, low), self.shuffle(a, b, high)
            step *= 2
        return rows

    def load_transposed(self, rows, offset=0):
        """Load a square and transpose it: lane r of result i is number i of the row at ``rows[r]``.

        Rows are read four numbers at a time to where the last rounds would bring them.
        """
        n = len(rows)
        if n <= 4:
            return self.transpose([self.load(row, offset, n) for row in rows])
        squares = []
        for first in range(0, n, 4):
            for i in range(4):
                parts = [self.load(row, offset + first * self.size, 4) for row in rows[i::4]]
                squares.append(self.join(parts))
        return self.transpose(squares, last=4)

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


def _pairing(n, step):
    """Lanes of a pair of vectors (a, b) that go to the two outputs of one round of a transpose."""
    low = [j if not j & step else n + j - step for j in range(n)]
    high = [j + step if not j & step else n + j for j in range(n)]
    return low, high
