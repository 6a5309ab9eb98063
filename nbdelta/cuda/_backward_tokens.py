"""Operations on rows of numbers, mostly the 16 that the tokens of a block have of a channel."""

from functools import cache

from nbdelta.cuda._backward_call import BLOCK
from nbdelta.cuda._ptx import tile
from nbdelta.cuda._tile_functions import f32, i32, registers


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


@tile(registers(BLOCK), f32)
def spread(e, x):
    """What the first 16 lanes have, for each of the 32."""
    return [e.from_lane(x, i) for i in range(BLOCK)]


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

    @tile(row, row, i32)
    def ones_after(e, d, count):
        """The first `count` of the decays, then ones."""
        return [e.select(e.less(e.u32(i), count), x, e.real(REAL, 1.0)) for i, x in enumerate(d)]

    return prefixes, suffixes, products, scale, ones, ones_after
