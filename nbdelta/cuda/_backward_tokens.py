"""Operations on rows of numbers, mostly the 16 that the tokens of a block have of a channel."""

from functools import cache

from nbdelta.cuda._backward_call import BLOCK
from nbdelta.cuda._jit import device
from nbdelta.cuda._math import exp
from nbdelta.cuda._ptx import tile
from nbdelta.cuda._tile_functions import registers


@cache
def make_dot(REAL, n):
    """The sum of n products, in their order."""
    row = registers(n, REAL)

    @tile(REAL, row, row)
    def dot(e, a, b):
        total = e.mul(a[0], b[0])
        for x, y in zip(a[1:], b[1:]):
            total = e.fma(x, y, total)
        return total

    return dot


@cache
def make_tokens(REAL):
    """Products of the decays, and what is multiplied with them."""
    row = registers(BLOCK, REAL)

    @tile(row, row)
    def prefixes(e, d):
        """Products of the decays up to each token."""
        out = d[:1]
        for x in d[1:]:
            out.append(e.mul(out[-1], x))
        return out

    @tile(row, row)
    def suffixes(e, d):
        """Products of the decays after each token."""
        out = [e.real(REAL, 1.0)]
        for x in d[:0:-1]:
            out.append(e.mul(out[-1], x))
        return out[::-1]

    @tile(row, row, row)
    def products(e, a, b):
        return [e.mul(x, y) for x, y in zip(a, b)]

    @tile(row, row, REAL)
    def scale(e, a, x):
        return [e.mul(y, x) for y in a]

    @tile(row)
    def ones(e):
        return [e.real(REAL, 1.0)] * BLOCK

    return prefixes, suffixes, products, scale, ones


@device
def exp_of(x):
    return (
        exp(x[0]), exp(x[1]), exp(x[2]), exp(x[3]), exp(x[4]), exp(x[5]), exp(x[6]), exp(x[7]),
        exp(x[8]), exp(x[9]), exp(x[10]), exp(x[11]), exp(x[12]), exp(x[13]), exp(x[14]),
        exp(x[15]),
    )  # fmt: skip
