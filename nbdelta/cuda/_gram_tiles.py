"""Products of tokens of a chunk with each other: 16 x 16 blocks of k k and q k, and their decay.

The blocks of k k come transposed: rows are the earlier tokens, columns the later ones.
"""

from functools import cache

from nbdelta.cuda._ptx import tile
from nbdelta.cuda._tile_functions import registers, u32
from nbdelta.cuda._tiles import column_steps, difference, join, multiply_tile, split


@cache
def make_gram(kind, channels, inputs, plane_bytes):
    """Products of 16 rows with 16 rows: k_j k_i (transposed) and q_i k_j; some channels a call.

    The addresses of rows j of K and of rows i of K and Q are by `column_lane`.
    """

    @tile(registers(16), registers(16), u32, u32, u32)
    def gram(e, acc, kj, ki, qi):
        steps = [column_steps(e, x, channels // 16) for x in (kj, ki, qi)]
        for step in zip(*steps):
            j, i, q = (
                [e.ldmatrix(at, offset + p * plane_bytes) for p in range(inputs)]
                for at, offset in step
            )
            acc = multiply_tile(e, kind, acc[:8], j, i) + multiply_tile(e, kind, acc[8:], q, j)
        return acc

    return gram


def load_fragments(e, inputs, plane_bytes, address):
    return [e.ldmatrix(address, p * plane_bytes) for p in range(inputs)]


def gate_fragment(e, parts, pitch, lo, address):
    """G under a 16 x 16 fragment: for each of its registers two numbers (of two parts)."""
    out = []
    for i in range(4):
        offset = i % 2 * 8 * pitch + i // 2 * 32
        values = [e.load_shared(2, True, address, offset + p * lo) for p in range(parts)]
        out.append([[v[x] for v in values] for x in range(2)])
    return out


def scaled(e, kind, planes, x, factors):
    """Planes of a fragment times one factor per element."""
    values = join(e, kind, x)
    factors = [f for pair in factors for f in pair]
    return split(e, kind, planes, [e.mul(v, f) for v, f in zip(values, factors)])


@cache
def make_channel_gram(form):
    """`gram` of different row blocks with a decay per channel; 16 channels a call.

    The decay from row j to row i > j is split at row n, the first one of the block of i: both
    parts are at most 1, and no later row has a say in it.
    """
    kind, planes, inputs, parts = form.kind, form.planes, form.inputs, form.parts
    pitch, lo, plane_bytes = form.gate_pitch, form.gate_part, form.plane_bytes

    @tile(registers(16), registers(16), u32, u32, u32, u32, u32, u32)
    def channel_gram(e, acc, kj, ki, qi, gj, gi, gn):
        anchor = gate_fragment(e, parts, 0, lo, gn)
        before = gate_fragment(e, parts, pitch, lo, gj)
        after = gate_fragment(e, parts, pitch, lo, gi)
        before = [
            [e.ex2(difference(e, n[x], g[x])) for x in range(2)] for g, n in zip(before, anchor)
        ]
        after = [
            [e.ex2(difference(e, g[x], n[x])) for x in range(2)] for g, n in zip(after, anchor)
        ]
        j = scaled(e, kind, planes, load_fragments(e, inputs, plane_bytes, kj), before)
        i = scaled(e, kind, planes, load_fragments(e, inputs, plane_bytes, ki), after)
        q = scaled(e, kind, planes, load_fragments(e, inputs, plane_bytes, qi), after)
        return multiply_tile(e, kind, acc[:8], j, i) + multiply_tile(e, kind, acc[8:], q, j)

    return channel_gram


LEVELS = (8, 4, 2, 1)


@cache
def make_diagonal_gram(form):
    """`gram` of a row block with itself with a decay per channel; 16 channels a call.

    Halving: rows i in the upper and j in the lower half of 16, 8, 4, 2 rows. Each level is a full
    product of its own, with the decay split at the first row of the upper half; level after
    level the wanted pairs are picked from it in the end (`pick`). Registers: q k of equal rows,
    then for each level k k (transposed) and q k.
    """
    kind, planes, inputs, parts = form.kind, form.planes, form.inputs, form.parts
    pitch, lo, plane_bytes = form.gate_pitch, form.gate_part, form.plane_bytes

    @tile(registers(72), registers(72), u32, u32, u32, u32, u32)
    def diagonal_gram(e, acc, k, q, gates, base, g):
        """`gates`: G of the lane's row; `base`: G of row 0 of the block; g: the lane's row."""
        k = load_fragments(e, inputs, plane_bytes, k)
        q = load_fragments(e, inputs, plane_bytes, q)
        out = multiply_tile(e, kind, acc[:8], q, k)
        own = gate_fragment(e, parts, pitch, lo, gates)
        for n, bit in enumerate(LEVELS):
            # the anchor of row r: its bits above `bit`, then `bit`
            row = e.bits_and(g, e.u32(7 & ~(2 * bit - 1)))
            anchor = e.iadd(base, e.imul(row, e.u32(pitch)))
            upper = [e.u32(0), e.u32(1 << 31)]  # rows g are the lower half of 16, g + 8 the upper
            if bit == 8:
                at = gate_fragment(e, parts, 0, lo, e.iadd(base, e.u32(8 * pitch)))
            else:
                at = gate_fragment(e, parts, pitch, lo, e.iadd(anchor, e.u32(bit * pitch)))
                sign = e.bits_and(e.imul(g, e.u32((1 << 31) // bit)), e.u32(1 << 31))
                upper = [sign, sign]
            factors = []
            for i in range(4):
                pair = []
                for x in range(2):
                    d = difference(e, at[i][x], own[i][x])
                    pair.append(e.ex2(e.flip(d, upper[i % 2])))
                factors.append(pair)
            a = scaled(e, kind, planes, k, factors)
            b = scaled(e, kind, planes, q, factors)
            o = 8 + 16 * n
            out += multiply_tile(e, kind, acc[o : o + 8], a, a)
            out += multiply_tile(e, kind, acc[o + 8 : o + 16], b, a)
        return out

    return diagonal_gram


@tile(registers(16), registers(72), u32)
def pick(e, x, lane):
    """K k (transposed) and q k of a row block out of the levels."""
    g = e.shr(lane, 2)
    c = e.bits_and(lane, e.u32(3))
    out = []
    for i in range(16):
        row = e.iadd(g, e.u32(i // 2 % 2 * 8))
        column = e.iadd(e.iadd(c, c), e.u32(i % 2 + i % 8 // 4 * 8))
        apart = e.xor(row, column)
        y = x[i % 8] if i >= 8 else e.f32(0.0)
        for n, bit in reversed(list(enumerate(LEVELS))):
            level = x[8 + 16 * n + i]
            y = e.select(e.less(e.u32(bit - 1), apart), level, y)
        out.append(y)
    return out


@cache
def make_finish(later, parts):
    """Factors of a gram tile, and zeros where the column must not see the row.

    `later`: columns are the later tokens (strictly), else rows are. `parts`: of G, whose decay is
    applied; 0: it already is.
    """

    @tile(
        registers(8), registers(8), registers(2), registers(4), registers(2 * max(parts, 1)),
        registers(4 * max(parts, 1)), u32, u32,
    )  # fmt: skip
    def finish(e, x, of_rows, of_columns, g_rows, g_columns, row, column):
        out = []
        for i in range(8):
            r, c = i // 2 % 2, i % 2 + i // 4 * 2
            y = e.mul(e.mul(x[i], of_rows[r]), of_columns[c])
            if parts:
                a = [g_rows[2 * p + r] for p in range(parts)]
                b = [g_columns[4 * p + c] for p in range(parts)]
                y = e.mul(y, e.ex2(difference(e, b, a) if later else difference(e, a, b)))
            i_row = e.iadd(row, e.u32(8 * r))
            i_column = e.iadd(column, e.u32(c % 2 + c // 2 * 8))
            if later:
                seen = e.less(i_row, i_column)
            else:
                seen = e.less(i_column, e.iadd(i_row, e.u32(1)))
            out.append(e.select(seen, y, e.f32(0.0)))
        return out

    return finish
