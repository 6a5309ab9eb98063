"""Second kernel of the chunked rule: the state goes from chunk to chunk.

A block of threads per sequence, value head and slice of the columns of V. S^T stays in registers: a
warp has 16 columns of V and all of K, and what it accumulates is, rounded, the left operand of its
next product, so nothing is handed around in the chain

    X^T = S^T K^T
    R^T = beta V^T - beta e^G X^T
    U^T = R^T T^T
    S^T = e^G_last S^T + (e^(G_last - G) U^T) K

(With a gate per channel e^G is in the tiles, and e^G_last is one factor per channel.) Where K is
too long for the registers of a warp, two have half of it each: X^T is the sum of what they make,
and from there on to U^T both do the same. Beside every chain another warp works a chunk behind it,

    O^T = scale e^G S^T Q^T + U^T P^T

with S^T and U^T left to it in shared memory; it also fetches the tiles of the chunks to come.
"""

from numba import cuda

from nbdelta.cuda._call import (
    CHECKPOINTS,
    H0,
    HT,
    HV,
    INTERVAL,
    KEY,
    ROOM,
    VALUE,
    K,
    O,
    Q,
    V,
    array_at,
    at,
    divided,
    first_checkpoint,
    sequence,
)
from nbdelta.cuda._chunk_form import (
    KEY_PLANE,
    PER_SEGMENT,
    RECORDS,
    SEGMENT,
    TILES,
    VALUE_PLANE,
    chunk_span,
    column_lane,
    first_chunk,
    is_ours,
    make_load_rows,
    make_load_values,
    own_key_head,
    row_lane,
)
from nbdelta.cuda._jit import device, kernel, specialised
from nbdelta.cuda._memory_tiles import make_state, make_store_elements, make_store_output
from nbdelta.cuda._ptx import (
    commit_copies,
    copy_async,
    shared_address,
    uniform,
    wait_for_all_but_last_copies,
    wait_for_copies,
)
from nbdelta.cuda._tile_functions import f32, int32, u32, uint32, uint64
from nbdelta.cuda._tiles import (
    make_add,
    make_columns,
    make_operand,
    make_residual,
    make_scale,
    make_stash,
    make_times_rows,
    make_times_triangle,
    make_update,
    make_values,
    make_zeros,
)


class Layout:
    """Offsets in shared memory: stages of key and of query tiles, then what chains leave."""

    def __init__(self, form, columns, stages):
        planes = form.planes if form.per_channel else form.inputs
        tile = planes * form.plane_bytes
        # a stage of keys: K, the K of the update, V, T and vectors
        self.update = tile if form.per_channel else 0
        self.values = self.update + tile
        self.value_plane = form.tokens * 2 * columns
        self.keys_record = self.values + form.inputs * self.value_plane
        self.keys = _aligned(self.keys_record + form.key_record)
        # a stage of queries: Q, P and a vector
        self.queries_record = tile
        self.queries = _aligned(tile + form.query_record)
        # S and U of a warp: operands, packed if a plane is enough
        size = 2 if form.planes == 1 else 4
        self.stash_update = 16 * form.K * size
        self.stash = self.stash_update + 16 * form.tokens * size
        self.all_queries = stages * self.keys
        self.all_stashes = self.all_queries + stages * self.queries
        self.end = self.all_stashes + 2 * (columns // 16) * self.stash


def _aligned(x):
    return -(-x // 128) * 128


def _make_chain(form, columns, layout):
    """The state of 16 columns after a chunk; S and U are left for the output."""
    kind, tokens, planes, inputs = form.kind, form.tokens, form.planes, form.inputs
    width, shares, per_channel = form.share, form.shares, form.per_channel
    pitch, vector, triangle_bytes = 2 * form.K, form.vector, planes * form.triangle_plane
    tile_planes = planes if per_channel else inputs
    T = layout.keys_record
    BETA, LAST = T + triangle_bytes, T + form.key_record - form.last
    UPDATE, VALUES, U = layout.update, layout.values, layout.stash_update
    zeros = make_zeros(tokens // 2)
    state_operand, operand = make_operand(kind, planes, width), make_operand(kind, planes, tokens)
    register, size = (u32, 2) if planes == 1 else (f32, 4)
    put_state, _ = make_stash(width * size // 8, register)
    put_update, _ = make_stash(tokens * size // 8, register)
    put_sum, get_sum = make_stash(tokens // 2, f32)
    add = make_add(tokens // 2)
    STASH = 16 * width * size  # of a share of a state
    times_keys = make_times_rows(kind, tokens, width, planes, tile_planes, pitch)
    update = make_update(kind, tokens, width, planes, tile_planes, per_channel, pitch)
    times_triangle = make_times_triangle(kind, tokens, planes)
    residual = make_residual(tokens // 2)
    of_tokens = make_columns(tokens // 4)
    scale_tokens = make_scale(tokens // 2)
    values = make_values(kind, inputs, tokens, 2 * columns, layout.value_plane)

    @device
    def advance(s, keys, value, lane, stash, share):
        """`value`: offset of the lane's row of V; `share`: which one of the state S is."""
        a, columns = state_operand(s), uint32(2 * width * share)
        x = times_keys(zeros(), a, keys + columns + row_lane(lane, pitch))
        if shares > 1:
            # where the other one's state will be, which comes after it has read this
            put_sum(stash + (1 - share) * STASH, x)
            cuda.syncthreads()
            x = add(x, get_sum(stash + share * STASH))
        put_state(stash + share * STASH, a)
        own = uint32(keys + 8 * (lane & 3))
        beta = of_tokens(own + BETA)
        if per_channel:
            gated = beta
        else:
            gated = of_tokens(own + BETA + vector)
        x = residual(values(keys + VALUES + value), x, beta, gated)
        u = times_triangle(zeros(), operand(x), keys + T + 16 * lane)
        if shares == 1 or share == 0:
            put_update(stash + U, operand(u))
        if per_channel:
            decays = uint32(own + LAST + 2 * columns)
        else:
            u = scale_tokens(u, of_tokens(own + BETA + 2 * vector))
            decays = uint32(keys + LAST)
        return update(s, operand(u), keys + UPDATE + columns + column_lane(lane, pitch), decays)

    return advance


def _make_output(form, layout):
    """O^T of 16 columns of a chunk."""
    kind, width, tokens, planes, per_channel = (
        form.kind, form.K, form.tokens, form.planes, form.per_channel,
    )  # fmt: skip
    pitch, triangle_bytes = 2 * width, planes * form.triangle_plane
    P, U = layout.queries_record, layout.stash_update
    zeros = make_zeros(tokens // 2)
    register, size = (u32, 2) if planes == 1 else (f32, 4)
    _, get_update = make_stash(tokens * size // 8, register)
    tile_planes = planes if per_channel else form.inputs
    times_queries = make_times_rows(kind, tokens, width, planes, tile_planes, pitch, stashed=True)
    times_triangle = make_times_triangle(kind, tokens, planes)
    of_tokens, scale_tokens = make_columns(tokens // 4), make_scale(tokens // 2)

    @device
    def output(queries, lane, stash):
        x = times_queries(zeros(), stash, queries + row_lane(lane, pitch))
        if not per_channel:
            x = scale_tokens(x, of_tokens(queries + P + triangle_bytes + 8 * (lane & 3)))
        return times_triangle(x, get_update(stash + U), queries + P + 16 * lane)

    return output


def _make_fetch(form, columns, layout):
    """Copying the tiles of a chunk, keys and queries apart; by `threads` threads."""
    width, tokens, inputs, per_channel = form.K, form.tokens, form.inputs, form.per_channel
    threads = 2 * columns
    pitch, plane_bytes, tile_bytes = 2 * width, form.plane_bytes, form.tile
    planes = form.planes if per_channel else inputs
    UPDATE, VALUES, value_plane = layout.update, layout.values, layout.value_plane
    keys_record, queries_record = layout.keys_record, layout.queries_record
    key_record, query_record, record_bytes = form.key_record, form.query_record, form.record
    load_rows = make_load_rows(tokens, width, threads)
    _, load_values = make_load_values(tokens, columns, threads)

    @device
    def copy(target, source, n, t):
        for i in range(16 * t, n, 16 * threads):
            copy_async(uint32(target + i), source + uint64(i), 16)

    @device
    def fetch_keys(desc, target, number, b, first, count, hk, hv, v0, t):
        units = int32((desc[K] + 7) // 8)
        for p in range(planes):
            own = uint32(target + p * plane_bytes)
            if per_channel:
                tile = (
                    uint64(desc[TILES]) + number * uint64(3 * tile_bytes) + uint64(p * plane_bytes)
                )
                load_rows(own, tile, pitch, t, count, width // 8)
                load_rows(own + UPDATE, tile + uint64(2 * tile_bytes), pitch, t, count, width // 8)
            else:
                k = array_at(desc, KEY)
                load_rows(own, at(k, b, first, hk) + p * desc[KEY_PLANE], k[3], t, count, units)
        v = array_at(desc, VALUE)
        units = int32((desc[V] - v0 + 7) // 8)
        for p in range(inputs):
            source = at(v, b, first, hv) + 2 * v0 + p * desc[VALUE_PLANE]
            load_values(target + VALUES + p * value_plane, source, v[3], t, count, units)
        record = uint64(desc[RECORDS]) + number * uint64(record_bytes)
        copy(uint32(target + keys_record), record, key_record, t)

    @device
    def fetch_queries(desc, target, number, b, first, count, hk, t):
        units = int32((desc[K] + 7) // 8)
        for p in range(planes):
            own = uint32(target + p * plane_bytes)
            if per_channel:
                tile = uint64(desc[TILES]) + number * uint64(3 * tile_bytes)
                tile += uint64(tile_bytes + p * plane_bytes)
                load_rows(own, tile, pitch, t, count, width // 8)
            else:
                q = array_at(desc, Q)
                load_rows(own, at(q, b, first, hk) + p * desc[KEY_PLANE], q[3], t, count, units)
        record = uint64(desc[RECORDS]) + number * uint64(record_bytes) + uint64(key_record)
        copy(uint32(target + queries_record), record, query_record, t)

    return fetch_keys, fetch_queries


@specialised
def scan_kernel(form, columns, stages, state_dtype, out_dtype, out_rows):
    """The kernel, for a grid of sequences x value heads x slices of `columns` columns.

    `stages`: of key tiles, and of query tiles, in shared memory; `out_rows`: whether 16 columns of
    o are 32 aligned bytes.
    """
    width, tokens, shares = form.share, form.tokens, form.shares
    warps = columns // 16
    threads = 32 * warps  # that put out; chains have `shares` times as many
    layout = Layout(form, columns, stages)
    KEYS, QUERIES, STASH = layout.keys, layout.queries, layout.stash
    ALL_QUERIES, ALL_STASHES = layout.all_queries, layout.all_stashes
    advance, output = _make_chain(form, columns, layout), _make_output(form, layout)
    fetch_keys, fetch_queries = _make_fetch(form, columns, layout)
    place, _ = make_load_values(tokens, columns, threads)
    zeros_state = make_zeros(width // 2)
    load_state, store_state = make_state(state_dtype, width)
    if out_rows:
        store_output = make_store_output(form.kind, tokens)
    else:
        store_output = make_store_elements(out_dtype, tokens)

    @kernel((shares + 1) * threads)
    def chunk_scan_kernel(desc):
        base = shared_address(cuda.shared.array(0, u32))
        t = uint32(cuda.threadIdx.x)
        lane, warp = uint32(t & 31), uniform(t >> 5)
        g, c = lane >> 2, lane & 3
        value_heads = uint32(desc[HV])
        slices = uint32(uint32(desc[V] + columns - 1) // columns)
        block, part = divided(uint32(cuda.blockIdx.x), slices)
        v0 = int32(part * columns)
        seq, hv = divided(block, value_heads)
        hk = own_key_head(desc, hv)
        b, bos, eos = sequence(desc, seq)
        length = int32(eos - bos)
        if not is_ours(desc, length):
            return
        first = first_chunk(desc, seq)
        full, rest = divided(uint32(length), uint32(desc[SEGMENT]))
        rest = uint32(rest + tokens - 1)
        chunks = int32(full * uint32(desc[PER_SEGMENT]) + rest // tokens)

        # Both roles meet once per chunk, `chunks` + 1 times in all. In turn i chains work on
        # chunk i and the others put out chunk i - 1, so that everything has at least two places:
        # what is written in a turn is read in the next one, or was last read in the turn before.
        # (Chains of several warps have to meet within a turn, and all do.)
        if warp < shares * warps:
            share = uint32(0)
            if shares > 1:
                share, warp = divided(warp, uint32(warps))
            column, channel = int32(v0 + 16 * warp + g), uint32(width * share + 2 * c)
            row = (lane & 7) + ((lane >> 4) << 3)
            value = place(row, 2 * warp + ((lane >> 3) & 1))
            k_left, v_left = int32(desc[K]) - int32(channel), int32(desc[V]) - column
            kept = array_at(desc, CHECKPOINTS)
            interval, slot = uint32(desc[INTERVAL]), uint32(0)
            if kept[0] != 0:
                slot = uint32(first_checkpoint(desc, seq) - 1)
            s = zeros_state()
            h0 = array_at(desc, H0)
            if h0[0] != 0:
                s = load_state(
                    at(h0, seq, hv, channel) + column * h0[5], h0[4], h0[5], k_left, v_left
                )
            for i in range(chunks):
                cuda.syncthreads()
                stash = uint32(base + ALL_STASHES + ((i & 1) * warps + warp) * STASH + 16 * lane)
                s = advance(s, uint32(base + i % stages * KEYS), value, lane, stash, share)
                if kept[0] != 0:
                    start, count = chunk_span(desc, i, length, tokens)
                    nth, over = divided(uint32(start + count), interval)
                    number = uint32(slot + nth)
                    if over == 0 and number < uint32(desc[ROOM]):
                        own = at(kept, number, hv, channel)
                        own += column * kept[5]
                        store_state(s, own, kept[4], kept[5], k_left, v_left)
            cuda.syncthreads()
            ht = array_at(desc, HT)
            if ht[0] != 0:
                own = at(ht, seq, hv, channel) + column * ht[5]
                store_state(s, own, ht[4], ht[5], k_left, v_left)
        else:
            warp = uint32(warp - shares * warps)
            t = uint32(t - shares * threads)
            column = int32(v0 + 16 * warp)
            o = array_at(desc, O)
            for i in range(1 - stages, chunks + 1):
                if i >= 0:
                    # in flight: what was asked for in the last stages - 1 turns
                    if stages == 3:
                        wait_for_all_but_last_copies()
                    else:
                        wait_for_copies()
                    cuda.syncthreads()
                m = i + stages - 1
                if m < chunks:
                    start, count = chunk_span(desc, m, length, tokens)
                    number = uint64(first + m) * uint64(value_heads) + uint64(hv)
                    target = uint32(base + m % stages * KEYS)
                    fetch_keys(desc, target, number, b, bos + start, count, hk, hv, v0, t)
                m = i + stages - 2
                if 0 <= m < chunks:
                    start, count = chunk_span(desc, m, length, tokens)
                    number = uint64(first + m) * uint64(value_heads) + uint64(hv)
                    target = uint32(base + ALL_QUERIES + m % stages * QUERIES)
                    fetch_queries(desc, target, number, b, bos + start, count, hk, t)
                commit_copies()
                if shares > 1 and 0 <= i < chunks:
                    cuda.syncthreads()
                m = i - 1
                if m >= 0:
                    start, count = chunk_span(desc, m, length, tokens)
                    stash = uint32(
                        base + ALL_STASHES + ((m & 1) * warps + warp) * STASH + 16 * lane
                    )
                    x = output(uint32(base + ALL_QUERIES + m % stages * QUERIES), lane, stash)
                    if out_rows:
                        own = at(o, b, bos + start + g, hv) + 2 * column
                        if column < desc[V]:
                            store_output(x, own, o[3], count - int32(g), lane)
                    else:
                        own = at(o, b, bos + start + 2 * c, hv) + (column + g) * o[5]
                        v_left = int32(desc[V]) - int32(column + g)
                        store_output(x, own, o[3], o[5], count - int32(2 * c), v_left)

    return chunk_scan_kernel
