"""Tiles, rows and columns to and from memory, rounded and scaled on the way."""

from functools import cache

from nbdelta.cuda._ptx import tile
from nbdelta.cuda._tile_functions import f32, i32, registers, u32, u64, void
from nbdelta.cuda._tiles import difference, exact_sum, join, split


@cache
def make_store_block(kind, planes, plane_bytes):
    """A 16 x 16 tile to memory as fragments of 16-bit planes, a right operand each."""

    @tile(void, u64, registers(8))
    def store_block(e, address, x):
        for p, plane in enumerate(split(e, kind, planes, x)):
            e.store_global(address, plane, p * plane_bytes)

    return store_block


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
def make_store_planes(kind, planes, n):
    """N numbers, at most 8, as planes of 16 bits, `plane` bytes apart."""

    @tile(void, *[f32] * n, u64, u64)
    def store_planes(e, *arguments):
        *x, address, plane = arguments
        for words in split(e, kind, planes, x):
            e.store_global(address, words)
            address = e.iadd(address, plane)

    return store_planes
