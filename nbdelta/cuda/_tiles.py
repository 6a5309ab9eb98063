"""Tiles of a warp: what the chunk kernels are written in.

A 16 x 8n tile of float32 numbers lies in the 4n accumulators of a tensor-core product, eight
columns after the other: registers 0, 1 hold row g, 2, 3 row g + 8, columns 2c and 2c + 1, where
g = lane // 4 and c = lane % 4. Rounded in pairs it is, without moving anything, the left operand
of the next product, and the right operand of a product with its transpose.

Numbers are multiplied in 16 bits. One that needs more is a sum of *planes*: the number rounded,
the rest rounded, and so on. Two planes of bfloat16 hold 16 bits, three hold a float32.

Tiles in shared memory lie in rows of 16-byte units, unit u of row r at u ^ (r % 8), so that eight
rows of a column are in different banks. Tiles that one lane writes and the same lane of another
warp reads lie lane by lane ("fragments"), 16 bytes each.
"""

from functools import cache

from nbdelta.cuda._ptx import f32, i32, registers, tile, u32, u64, void

BLOCK = 512  # bytes of a 16 x 16 fragment of 16-bit numbers
PITCH = 80  # bytes of a row of an inverse, 16 float32 and a gap against bank conflicts


def triangle(i, j):
    """Index of block (i, j) of a lower triangle."""
    return i * (i + 1) // 2 + j


# -- emitted pieces


def split(e, kind, planes, x):
    """Planes of a 16 x 16 tile: lists of four registers, a left operand each."""
    out = [[] for _ in range(planes)]
    for i in range(0, len(x), 2):
        low, high = x[i : i + 2]
        for plane in out:
            plane.append(e.pack(kind, low, high))
            if plane is not out[-1]:
                rounded = e.unpack(kind, plane[-1])
                low, high = e.sub(low, rounded[0]), e.sub(high, rounded[1])
    return out


def join(e, kind, planes):
    """The numbers of a list of planes."""
    out = [x for r in planes[0] for x in e.unpack(kind, r)]
    for plane in planes[1:]:
        out = [e.add(x, y) for x, y in zip(out, [x for r in plane for x in e.unpack(kind, r)])]
    return out


def multiply(e, kind, acc, a, b):
    """``acc + a b`` for planes of operands, without the pairs below their precision."""
    n = max(len(a), len(b))
    pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if i + j < n]
    for i, j in sorted(pairs, key=sum, reverse=True):  # small terms first
        acc = e.mma(kind, acc, a[i], b[j])
    return acc


def halves(planes):
    """A left operand of 16 rows as right operands, eight columns each."""
    return [[[p[h], p[h + 2]] for p in planes] for h in range(2)]


def multiply_tile(e, kind, acc, a, b):
    """16 x 16 ``acc + a b``, the planes of b given as those of its transpose."""
    for h, columns in enumerate(halves(b)):
        acc[4 * h : 4 * h + 4] = multiply(e, kind, acc[4 * h : 4 * h + 4], a, columns)
    return acc


def left_operand(e, kind, planes, a, s):
    """Columns 16 s to 16 s + 15 of a tile: packed registers or float32."""
    if planes == 1:
        return [a[4 * s : 4 * s + 4]]
    return split(e, kind, planes, a[8 * s : 8 * s + 8])


def operand(planes, columns):
    """Type of a left operand: packed if one plane is enough."""
    n = columns // 16
    return registers(4 * n, u32) if planes == 1 else registers(8 * n)


def column_steps(e, address, n):
    """Addresses and offsets of 16-column steps along swizzled rows."""
    at = [e.xor(address, e.u32(s << 5)) for s in range(min(n, 4))]
    return [(at[s % 4], s // 4 * 128) for s in range(n)]


# -- registers


@cache
def make_zeros(n):
    @tile(registers(n))
    def zeros(e):
        return [e.f32(0.0)] * n

    return zeros


@cache
def make_operand(kind, planes, columns):
    """The float32 tile as what products take as left operand."""

    @tile(operand(planes, columns), registers(columns // 2))
    def to_operand(e, x):
        return split(e, kind, 1, x)[0] if planes == 1 else x

    return to_operand


@cache
def make_negated(n):
    """The tile with its signs changed."""

    @tile(registers(n), registers(n))
    def negated(e, x):
        return [e.neg(y) for y in x]

    return negated


@cache
def make_scale(n, columns):
    """A tile times a number, or times one per column."""

    @tile(registers(n), registers(n), registers(n // 2) if columns else f32)
    def scale(e, x, s):
        if columns:
            return [e.mul(x[i], s[i // 4 * 2 + i % 2]) for i in range(n)]
        return [e.mul(y, s) for y in x]

    return scale


@cache
def make_residual(n):
    """``b v - w x`` with b and w per column."""

    @tile(registers(n), registers(n), registers(n), registers(n // 2), registers(n // 2))
    def residual(e, v, x, b, w):
        column = [i // 4 * 2 + i % 2 for i in range(n)]
        return [e.fma(e.neg(w[j]), x[i], e.mul(b[j], v[i])) for i, j in enumerate(column)]

    return residual


def exact_sum(e, x, y):
    """The sum of two numbers of two floats each."""
    s = e.add(x[0], y[0])
    y0 = e.sub(s, x[0])
    rest = e.add(e.sub(x[0], e.sub(s, y0)), e.sub(y[0], y0))
    low = e.add(rest, e.add(x[1], y[1]))
    high = e.add(s, low)
    return [high, e.sub(low, e.sub(high, s))]


add_exactly = tile(registers(2), registers(2), registers(2))(exact_sum)


# -- shared memory


@cache
def make_stash(n, type):
    """Registers to and from fragments: address of the stash + 16 lane."""

    @tile(void, u32, registers(n, type))
    def put(e, address, x):
        for i in range(0, n, 4):
            e.store_shared(address, x[i : i + 4], 128 * i)

    @tile(registers(n, type), u32)
    def get(e, address):
        return [x for i in range(0, n, 4) for x in e.load_shared(4, type == f32, address, 128 * i)]

    return put, get


@cache
def make_columns(n):
    """Two neighbouring numbers of every eight: a lane's columns, address + 8 c."""

    @tile(registers(n), u32)
    def columns(e, address):
        return [x for i in range(n // 2) for x in e.load_shared(2, True, address, 32 * i)]

    return columns


@cache
def make_values(kind, planes, tokens, pitch, plane_bytes):
    """16 columns of V, transposed, from its rows."""

    @tile(registers(tokens // 2), u32)
    def values(e, address):
        out = []
        for t in range(tokens // 16):
            offsets = [p * plane_bytes + t * 16 * pitch for p in range(planes)]
            out += join(e, kind, [e.ldmatrix(address, o, trans=True) for o in offsets])
        return out

    return values


# -- products


def stashed_operand(e, kind, planes, stash, s):
    """Columns 16 s to 16 s + 15 of a stash: address + 16 lane."""
    if planes == 1:
        return [e.load_shared(4, False, stash, 512 * s)]
    a = [x for i in range(2) for x in e.load_shared(4, True, stash, 1024 * s + 512 * i)]
    return split(e, kind, planes, a)


@cache
def make_times_rows(kind, tokens, K, planes, inputs, stashed=False):
    """``acc + a X^T``, X the rows of a tile (address by `row_lane`), a in registers or a stash."""
    pitch = 2 * K
    operand_of, type_of_a = left_operand, operand(planes, K)
    if stashed:
        operand_of, type_of_a = stashed_operand, u32

    @tile(registers(tokens // 2), registers(tokens // 2), type_of_a, u32)
    def times_rows(e, acc, a, address):
        for s, (at, offset) in enumerate(column_steps(e, address, K // 16)):
            left = operand_of(e, kind, planes, a, s)
            for t in range(tokens // 16):
                o = 8 * t
                right = [
                    e.ldmatrix(at, (p * tokens + 16 * t) * pitch + offset) for p in range(inputs)
                ]
                for h in range(2):
                    columns = [r[2 * h : 2 * h + 2] for r in right]
                    acc[o : o + 4] = multiply(e, kind, acc[o : o + 4], left, columns)
                    o += 4
        return acc

    return times_rows


@cache
def make_times_tile(kind, tokens, K, planes, inputs):
    """``acc + a X``, X the rows of a tile: address by `column_lane`."""
    pitch = 2 * K

    @tile(registers(K // 2), registers(K // 2), operand(planes, tokens), u32)
    def times_tile(e, acc, a, address):
        steps = column_steps(e, address, K // 16)
        for t in range(tokens // 16):
            left = left_operand(e, kind, planes, a, t)
            for s, (at, offset) in enumerate(steps):
                o = 8 * s
                right = [
                    e.ldmatrix(at, (p * tokens + 16 * t) * pitch + offset, trans=True)
                    for p in range(inputs)
                ]
                for h in range(2):
                    columns = [r[2 * h : 2 * h + 2] for r in right]
                    acc[o : o + 4] = multiply(e, kind, acc[o : o + 4], left, columns)
                    o += 4
        return acc

    return times_tile


@cache
def make_times_triangle(kind, tokens, planes):
    """``acc + a X^T``, X lower triangular in fragments: address + 16 lane."""
    n = tokens // 16
    plane_bytes = triangle(n, 0) * BLOCK

    @tile(registers(tokens // 2), registers(tokens // 2), operand(planes, tokens), u32)
    def times_triangle(e, acc, a, address):
        left = [left_operand(e, kind, planes, a, s) for s in range(n)]
        for t in range(n):
            for s in range(t + 1):
                right = [
                    e.load_shared(4, False, address, p * plane_bytes + triangle(t, s) * BLOCK)
                    for p in range(planes)
                ]
                o = 8 * t
                acc[o : o + 8] = multiply_tile(e, kind, acc[o : o + 8], left[s], right)
        return acc

    return times_triangle


@cache
def make_block_product(planes):
    """``acc + a b`` for float32 16 x 16 tiles, b given as its transpose."""

    @tile(registers(8), registers(8), registers(8), registers(8))
    def block_product(e, acc, a, b):
        return multiply_tile(
            e, "bf16", acc, split(e, "bf16", planes, a), split(e, "bf16", planes, b)
        )

    return block_product


# -- the triangles of a chunk


@cache
def make_gram(kind, K, inputs, plane_bytes):
    """Products of 16 rows with 16 rows: k_j k_i (transposed) and q_i k_j.

    The addresses of rows j of K and of rows i of K and Q are by `column_lane`.
    """

    @tile(registers(16), u32, u32, u32)
    def gram(e, kj, ki, qi):
        acc = [e.f32(0.0)] * 16
        steps = [column_steps(e, x, K // 16) for x in (kj, ki, qi)]
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


def difference(e, a, b):
    """A - b of numbers of one or two parts."""
    parts = [e.sub(x, y) for x, y in zip(a, b)]
    return parts[0] if len(parts) == 1 else e.add(*parts)


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


@cache
def make_store_block(kind, planes, plane_bytes):
    """A 16 x 16 tile to memory as fragments of 16-bit planes, a right operand each."""

    @tile(void, u64, registers(8))
    def store_block(e, address, x):
        for p, plane in enumerate(split(e, kind, planes, x)):
            e.store_global(address, plane, p * plane_bytes)

    return store_block


# -- states and outputs


@cache
def make_state(dtype, K):
    """The transposed state of 16 columns to and from memory.

    `address` is that of the lane's first element, (k, v) = (2 c, g); `dk`, `dv` the byte strides;
    `k`, `v` how many channels and columns there are from that element on.
    """
    places = [(8 * (i // 4) + i % 2, 8 * (i // 2 % 2)) for i in range(K // 2)]

    def elements(e, address, dk, dv, k, v):
        for i, j in places:
            inside = e.both(e.less(e.u32(i), k), e.less(e.u32(j), v))
            at = e.iadd(address, e.imul(dk, e.u64(i)))
            yield inside, e.iadd(at, e.imul(dv, e.u64(j))) if j else at

    @tile(registers(K // 2), u64, u64, u64, i32, i32)
    def load_state(e, *where):
        return [e.load_real_if(inside, dtype, at) for inside, at in elements(e, *where)]

    @tile(void, registers(K // 2), u64, u64, u64, i32, i32)
    def store_state(e, x, *where):
        for y, (inside, at) in zip(x, elements(e, *where)):
            e.store_real_if(inside, dtype, at, y)

    return load_state, store_state


@cache
def make_store_output(kind, tokens):
    """O^T of 16 columns to rows of 16-bit numbers, 32 aligned bytes a token.

    `address`: of row g; `step`: bytes between tokens; `left`: tokens there are from row g on.
    """

    @tile(void, registers(tokens // 2), u64, u64, i32, u32)
    def store_output(e, x, address, step, left, lane):
        odd = e.less(e.u32(0), e.bits_and(lane, e.u32(1)))
        # Transposed, lane (g, c) has of token g the columns 2 c, 2 c + 1 and the same of the other
        # eight. Two neighbours swap, so that either has four columns in a row.
        place = e.iadd(e.shl(e.bits_and(lane, e.u32(1)), 4), e.shl(e.bits_and(lane, e.u32(2)), 2))
        address = e.iadd(address, e.wide(place))
        for t in range(tokens // 8):
            a, b = (e.transpose(e.pack(kind, *x[4 * t + i : 4 * t + i + 2])) for i in (0, 2))
            other = e.shuffle_xor(e.select(odd, a, b), 1)
            pair = [e.select(odd, other, a), e.select(odd, b, other)]
            at = e.iadd(address, e.imul(step, e.u64(8 * t)))
            e.store_global_if(e.less(e.u32(8 * t), left), at, pair)

    return store_output


@cache
def make_store_elements(dtype, tokens):
    """O^T of 16 columns to memory of any strides, element by element.

    `address`: of the lane's first element, (token, v) = (2 c, g); `left` and `v`: how many tokens
    and columns there are from that element on.
    """

    @tile(void, registers(tokens // 2), u64, u64, u64, i32, i32)
    def store_output(e, x, address, dt, dv, left, v):
        for i, y in enumerate(x):
            t, j = 8 * (i // 4) + i % 2, 8 * (i // 2 % 2)
            inside = e.both(e.less(e.u32(t), left), e.less(e.u32(j), v))
            at = e.iadd(e.iadd(address, e.imul(dt, e.u64(t))), e.imul(dv, e.u64(j)))
            e.store_real_if(inside, dtype, at, y)

    return store_output


# -- by threads, not by warps


@cache
def make_square_sum(kind, K, inputs, plane_bytes):
    """Sum of squares of a row of a swizzled tile: the row's address and its number."""

    @tile(f32, u32, u32)
    def square_sum(e, address, row):
        swizzle = e.imul(e.bits_and(row, e.u32(7)), e.u32(16))
        total = e.f32(0.0)
        for u in range(K // 8):
            at = e.iadd(address, e.xor(swizzle, e.u32(u % 8 * 16)))
            planes = [
                e.load_shared(4, False, at, u // 8 * 128 + p * plane_bytes) for p in range(inputs)
            ]
            for x in join(e, kind, planes):
                total = e.fma(x, x, total)
        return total

    return square_sum


@cache
def make_load_column(dtype, n):
    """`n` numbers, `step` bytes apart, all under way at once; zeros after the first `left`."""

    @tile(registers(n), u64, u64, i32)
    def load_column(e, address, step, left):
        out = []
        for i in range(n):
            out.append(e.load_real_if(e.less(e.u32(i), left), dtype, address))
            address = e.iadd(address, step)
        return out

    return load_column


@cache
def make_gate_sums(form, n, unit, lowest):
    """Prefix sums of a column of gates, times `unit` and at least `lowest`, to shared memory.

    `total`: the sum so far, in two parts; returns the next one. After the first `left` numbers it
    stays.
    """
    pitch, part, parts = form.gate_pitch, form.gate_part, form.parts

    @tile(registers(2), registers(2), registers(n), u32, i32)
    def gate_sums(e, total, x, address, left):
        for i, y in enumerate(x):
            y = e.max(e.mul(y, e.f32(unit)), e.f32(lowest))
            y = e.select(e.less(e.u32(i), left), y, e.f32(0.0))
            if parts == 1:
                total = [e.add(total[0], y), total[1]]
            else:
                total = exact_sum(e, total, [y, e.f32(0.0)])
                e.store_shared(address, [total[1]], i * pitch + part)
            e.store_shared(address, [total[0]], i * pitch)
        return total

    return gate_sums


@cache
def make_decayed(form):
    """Four channels of a token of e^G K, scale e^G Q, e^(G_last - G) K to memory.

    `k`, `q`: addresses in the tiles; `g`, `last`: of G; `out`: of the first tile in memory, `lot`
    bytes a tile, a plane `plane` bytes.
    """
    kind, planes, inputs, parts = form.kind, form.planes, form.inputs, form.parts

    @tile(void, u32, u32, u32, u32, f32, f32, u64, u64, u64)
    def decayed(e, k, q, g, last, of_k, of_q, out, lot, plane):
        def row(at):
            return join(
                e, kind, [e.load_shared(2, False, at, p * form.plane_bytes) for p in range(inputs)]
            )

        k, q = row(k), row(q)
        g, last = (
            list(zip(*[e.load_shared(4, True, at, p * form.gate_part) for p in range(parts)]))
            for at in (g, last)
        )
        start = [e.ex2(x[0]) for x in g]
        end = [e.ex2(difference(e, y, x)) for x, y in zip(g, last)]
        for factor, x, decay in ((of_k, k, start), (of_q, q, start), (of_k, k, end)):
            x = [e.mul(e.mul(factor, y), d) for y, d in zip(x, decay)]
            at = out
            for p in split(e, kind, planes, x):
                e.store_global(at, p)
                at = e.iadd(at, plane)
            out = e.iadd(out, lot)

    return decayed


@cache
def make_store_pair(kind, planes):
    """Two numbers as planes of 16 bits, `plane` bytes apart."""

    @tile(void, f32, f32, u64, u64)
    def store_pair(e, x, y, address, plane):
        for p in split(e, kind, planes, [x, y]):
            e.store_global(address, p)
            address = e.iadd(address, plane)

    return store_pair
