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

from nbdelta.cuda._ptx import tile
from nbdelta.cuda._tile_functions import f32, registers, u32, void

BLOCK = 512  # bytes of a 16 x 16 fragment of 16-bit numbers


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


def multiply(e, kind, acc, a, b, rest=None):
    """``acc + a b`` for planes of operands, without the pairs below their precision.

    `rest`: a list that takes what all but the pair of first planes add, as a sum of its own.
    """
    n = max(len(a), len(b))
    pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if i + j < n]
    for i, j in sorted(pairs, key=sum, reverse=True):  # small terms first
        if rest is not None and i + j:
            rest[:] = e.mma(kind, rest, a[i], b[j])
        else:
            acc = e.mma(kind, acc, a[i], b[j])
    return acc


def halves(planes):
    """A left operand of 16 rows as right operands, eight columns each."""
    return [[[p[h], p[h + 2]] for p in planes] for h in range(2)]


def multiply_tile(e, kind, acc, a, b):
    """16 x 16 ``acc + a b``, the planes of b given as those of its transpose.

    Tensor cores cut off what is below the last bit of a sum, always towards zero. Where the result
    is to be as exact as float32, in three planes, a product has a sum of its own.
    """
    out = []
    for h, columns in enumerate(halves(b)):
        part = acc[4 * h : 4 * h + 4]
        if max(len(a), len(b)) < 3:
            out += multiply(e, kind, part, a, columns)
        else:
            total = multiply(e, kind, [e.f32(0.0)] * 4, a, columns)
            out += [e.add(*x) for x in zip(part, total)]
    return out


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
def make_zeros(n, type=f32):
    @tile(registers(n, type))
    def zeros(e):
        return [e.real(type, 0.0)] * n

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
def make_scale(n):
    """A tile times a number per column."""

    @tile(registers(n), registers(n), registers(n // 2))
    def scale(e, x, s):
        return [e.mul(x[i], s[i // 4 * 2 + i % 2]) for i in range(n)]

    return scale


@cache
def make_add(n):
    """The sum of two tiles."""

    @tile(registers(n), registers(n), registers(n))
    def add(e, x, y):
        return [e.add(*pair) for pair in zip(x, y)]

    return add


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


def difference(e, a, b):
    """A - b of numbers of one or two parts."""
    parts = [e.sub(x, y) for x, y in zip(a, b)]
    return parts[0] if len(parts) == 1 else e.add(*parts)


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
def make_times_rows(kind, tokens, K, planes, inputs, pitch, stashed=False):
    """``acc + a X^T``, X the rows of a tile (address by `row_lane`), a in registers or a stash.

    `pitch`: bytes of a row, which may have more than K columns.

    In three planes the small products have a sum of their own, so that the large one is cut off
    once for six. (A sum for every 16 channels, as in `multiply_tile`, would need more registers.)
    """
    operand_of, type_of_a = left_operand, operand(planes, K)
    if stashed:
        operand_of, type_of_a = stashed_operand, u32

    @tile(registers(tokens // 2), registers(tokens // 2), type_of_a, u32)
    def times_rows(e, acc, a, address):
        rest = [[e.f32(0.0)] * 4 if planes == 3 else None for _ in range(tokens // 8)]
        for s, (at, offset) in enumerate(column_steps(e, address, K // 16)):
            left = operand_of(e, kind, planes, a, s)
            for t in range(tokens // 16):
                o = 8 * t
                right = [
                    e.ldmatrix(at, (p * tokens + 16 * t) * pitch + offset) for p in range(inputs)
                ]
                for h in range(2):
                    columns = [r[2 * h : 2 * h + 2] for r in right]
                    acc[o : o + 4] = multiply(e, kind, acc[o : o + 4], left, columns, rest[o // 4])
                    o += 4
        if planes == 3:
            acc = [e.add(*x) for x in zip(acc, [x for part in rest for x in part])]
        return acc

    return times_rows


@cache
def make_update(kind, tokens, K, planes, inputs, per_channel, pitch):
    """``decay state + a X``, X the rows of a tile, `pitch` bytes each: address by `column_lane`.

    `decays`: address of the one decay, or + 8 c of those of the columns.

    Tensor cores cut off what is below the last bit of a sum, always towards zero, so a state that
    goes through every product of a long sequence would fade. Where it is to be as exact as float32,
    the products of a chunk have a sum of their own, and the small ones another one, so that blocks
    after the first do not cut off the large products six times each.
    """
    blocks, apart = range(tokens // 16), planes == 3
    # (for which a chunk of 32 tokens with a decay for each of 128 channels leaves no registers)
    small_apart = apart and not (per_channel and K == 128 and tokens > 16)

    @tile(registers(K // 2), registers(K // 2), operand(planes, tokens), u32, u32)
    def update(e, state, a, address, decays):
        left = [left_operand(e, kind, planes, a, t) for t in blocks]
        decay = [] if per_channel else 2 * e.load_shared(1, True, decays)
        for s, (at, offset) in enumerate(column_steps(e, address, K // 16)):
            rows = [[(p * tokens + 16 * t) * pitch for p in range(inputs)] for t in blocks]
            right = [[e.ldmatrix(at, r + offset, trans=True) for r in block] for block in rows]
            for h in range(2):
                o = 8 * s + 4 * h
                if per_channel:
                    decay = e.load_shared(2, True, decays, 8 * o)
                decayed = [e.mul(x, decay[i % 2]) for i, x in enumerate(state[o : o + 4])]
                total = [e.f32(0.0)] * 4 if apart else decayed
                rest = [e.f32(0.0)] * 4 if small_apart else None
                for t in blocks:
                    columns = [r[2 * h : 2 * h + 2] for r in right[t]]
                    total = multiply(e, kind, total, left[t], columns, rest)
                if small_apart:
                    total = [e.add(*x) for x in zip(total, rest)]
                state[o : o + 4] = [e.add(*x) for x in zip(decayed, total)] if apart else total
        return state

    return update


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
