"""The inverse of a diagonal block, by substitution."""

from nbdelta.cuda._ptx import tile
from nbdelta.cuda._tile_functions import registers, u32, void

PITCH = 80  # bytes of a row of an inverse, 16 float32 and a gap against bank conflicts


@tile(void, u32, u32, u32)
def invert(e, a, d, lane):
    """(I + A)^-1 of a strictly lower 16 x 16 tile, given transposed in fragments at `a`.

    Lane c solves for column c by forward substitution; the rows go to `d`.
    """
    column = e.bits_and(lane, e.u32(15))
    x, minus = [], []
    for i in range(0, 16, 2):
        rows = []
        for r in range(2):
            hit = e.less(e.xor(column, e.u32(i + r)), e.u32(1))
            rows.append(e.select(hit, e.f32(1.0), e.f32(0.0)))
        for j in range(min(8, i + 1)):
            # A[i][j], A[i + 1][j], A[i][j + 8], A[i + 1][j + 8]
            block = e.load_shared(4, True, a, i // 8 * 512 + (4 * j + i % 8 // 2) * 16)
            for half in range(2):
                for r in range(2):
                    if j + 8 * half < i:
                        rows[r] = e.fma(block[2 * half + r], minus[j + 8 * half], rows[r])
            if j == i % 8:
                last = block[1 + i // 8 * 2]  # A[i + 1][i]
        x.append(rows[0])
        minus.append(e.neg(rows[0]))
        x.append(e.fma(last, minus[-1], rows[1]))
        minus.append(e.neg(x[-1]))
    e.store_column(e.less(lane, e.u32(16)), e.iadd(d, e.imul(column, e.u32(4))), PITCH, x)


@tile(registers(8), u32)
def inverse(e, d):
    """An inverse as a tile: address + PITCH g + 8 c."""
    pairs = [e.load_shared(2, True, d, 8 * (i % 2) * PITCH + 32 * (i // 2)) for i in range(4)]
    return [x for p in pairs for x in p]


@tile(registers(8), u32)
def inverse_transposed(e, d):
    """Its transpose: address + 2 PITCH c + 4 g."""
    at = [(8 * (i // 4) + i % 2) * PITCH + 32 * (i // 2 % 2) for i in range(8)]
    return [e.load_shared(1, True, d, o)[0] for o in at]
