"""First kernel of the chunked rule: what a chunk needs of its own tokens, all chunks at once.

A block of threads per chunk and value head, a warp per 16 rows. With G the cumulative log gate in
the chunk (docs/design.md),

    A_ij = beta_i e^(G_i - G_j) k_i.k_j   (i > j),   T = (I + A)^-1
    P_ij = scale e^(G_i - G_j) q_i.k_j    (i >= j)

and the factors that the scan applies, or, where the gate has a channel axis, the tiles
e^G K, scale e^G Q and e^(G_last - G) K themselves. Norms of q and k are factors too.
"""

from numba import cuda

from nbdelta.cuda._call import (
    A_LOG,
    BETA,
    BETA_FACTOR,
    DT_BIAS,
    EPS,
    HV,
    KEY,
    L2NORM,
    SCALE,
    SIGMOID_BETA,
    G,
    K,
    Q,
    array_at,
    at,
    divided,
    sequence,
)
from nbdelta.cuda._chunk_form import (
    KEY_PLANE,
    RECORDS,
    TILES,
    chunk_span,
    column_lane,
    first_chunk,
    is_ours,
    make_load_rows,
    own_key_head,
    sequence_of_chunk,
)
from nbdelta.cuda._chunk_gates import (
    LOG2E,
    ONE,
    ZERO,
    make_channel_gates,
    make_token_gates,
    real,
    sigmoid,
)
from nbdelta.cuda._gram_tiles import (
    make_channel_gram,
    make_diagonal_gram,
    make_finish,
    make_gram,
    pick,
)
from nbdelta.cuda._jit import device, kernel, specialised
from nbdelta.cuda._memory import read_real
from nbdelta.cuda._memory_tiles import make_decayed, make_square_sum, make_store_block
from nbdelta.cuda._ptx import (
    commit_copies,
    ex2,
    load_shared,
    rsqrt,
    shared_address,
    store_global,
    store_shared,
    sync_warp,
    uniform,
    wait_for_copies,
)
from nbdelta.cuda._solve_tiles import PITCH, inverse, inverse_transposed, invert
from nbdelta.cuda._tile_functions import f32, int32, u32, uint32, uint64
from nbdelta.cuda._tiles import (
    BLOCK,
    make_block_product,
    make_columns,
    make_negated,
    make_stash,
    make_zeros,
)

SQUARE = 1024  # bytes of a 16 x 16 block of float32 in fragments
put_square, get_square = make_stash(8, f32)
columns4 = make_columns(4)
negated = make_negated(8)
zeros8, zeros16, zeros72 = make_zeros(8), make_zeros(16), make_zeros(72)


def layout(form):
    """Offsets in shared memory of A, the inverses, the vectors, the gates; the end."""
    a = 2 * form.inputs * form.plane_bytes
    d = a + SQUARE * form.blocks
    vectors = d + form.tokens * PITCH
    gates = vectors + 6 * form.vector
    return a, d, vectors, gates, gates + form.per_channel * form.parts * form.gate_part


def _make_grams(form):
    """16 x 16 products k k (transposed) and q k of row block w with a block j that is not later."""
    width, per_channel = form.K, form.per_channel
    pitch, queries = 2 * width, form.inputs * form.plane_bytes
    GATES, gate_pitch = layout(form)[3], form.gate_pitch
    channels = min(width, 128)  # of a call: with more there are not enough registers
    gram = make_gram(form.kind, channels, form.inputs, form.plane_bytes)
    channel_gram, diagonal_gram = make_channel_gram(form), make_diagonal_gram(form)

    @device
    def step(row, s):
        """Address 16 s channels further along a swizzled row."""
        return uint32((row ^ ((s & 3) << 5)) + (s >> 2) * 128)

    @device
    def grams(base, w, j, lane):
        ki = uint32(base + column_lane(lane, pitch) + 16 * w * pitch)
        kj = uint32(base + column_lane(lane, pitch) + 16 * j * pitch)
        qi = uint32(ki + queries)
        x = zeros16()
        if not per_channel:
            for i in range(width // channels):
                o = uint32(2 * channels * i)
                x = gram(x, uint32(kj + o), uint32(ki + o), uint32(qi + o))
            return x
        g = uint32(lane >> 2)
        gates = uint32(base + GATES + 8 * (lane & 3))
        first = uint32(gates + 16 * w * gate_pitch)
        gi = uint32(first + g * gate_pitch)
        gj = uint32(gates + (16 * j + g) * gate_pitch)
        if w == j:
            levels = zeros72()
            for i in range(width // 16):
                s, o = uint32(i), uint32(64 * i)
                levels = diagonal_gram(
                    levels, step(ki, s), step(qi, s), uint32(gi + o), uint32(first + o), g
                )
            x = pick(levels, lane)
        else:
            for i in range(width // 16):
                s, o = uint32(i), uint32(64 * i)
                x = channel_gram(
                    x, step(kj, s), step(ki, s), step(qi, s),
                    uint32(gj + o), uint32(gi + o), uint32(first + o),
                )  # fmt: skip
        return x

    return grams


def _make_triangles(form):
    """Row block w of A, transposed and in fragments, to shared memory, and of P to memory."""
    A, _, SUM, _, _ = layout(form)
    SUM_LOW, _, OF_A, OF_P, OF_K = (SUM + i * form.vector for i in range(1, 6))
    parts = 0 if form.per_channel else form.parts
    grams = _make_grams(form)
    finish_a, finish_p = make_finish(True, parts), make_finish(False, parts)
    store_block = make_store_block(form.kind, form.planes, form.triangle_plane)

    @device
    def row_pair(address):
        return load_shared(address), load_shared(uint32(address + 32))

    @device
    def gates(base, of_rows, of_columns):
        """G of the rows and columns of a tile, where it is not in the products yet."""
        if parts == 0:
            return (ZERO, ZERO), (ZERO, ZERO, ZERO, ZERO)
        rows, columns = row_pair(uint32(base + SUM + of_rows)), columns4(base + SUM + of_columns)
        if parts == 1:
            return rows, columns
        rows_low = row_pair(uint32(base + SUM_LOW + of_rows))
        return rows + rows_low, columns + columns4(base + SUM_LOW + of_columns)

    @device
    def triangles(base, w, lane, record):
        g, c = lane >> 2, lane & 3
        for j in range(w + 1):
            x = grams(base, w, j, lane)
            block = w * (w + 1) // 2 + j
            row, column = uint32(16 * j + g), uint32(16 * w + 2 * c)
            rows, columns = gates(base, 4 * row, 4 * column)
            of_rows = row_pair(uint32(base + OF_K + 4 * row))
            of_columns = columns4(base + OF_A + 4 * column)
            a = finish_a(x[:8], of_rows, of_columns, rows, columns, row, column)
            put_square(base + A + SQUARE * block + 16 * lane, a)
            row, column = uint32(16 * w + g), uint32(16 * j + 2 * c)
            rows, columns = gates(base, 4 * row, 4 * column)
            of_rows = row_pair(uint32(base + OF_P + 4 * row))
            of_columns = columns4(base + OF_K + 4 * column)
            p = finish_p(x[8:], of_rows, of_columns, rows, columns, row, column)
            store_block(record + uint64(BLOCK * block + 16 * lane), p)

    return triangles


def _make_solve(form):
    """Row block i of T, from the diagonal to the left. With D the inverses of diagonal blocks,

    T_ij = -(sum over l of T_il A_lj) D_j,   j < l <= i.
    """
    A, D = layout(form)[:2]
    store_block = make_store_block(form.kind, form.planes, form.triangle_plane)
    # T is rounded to the planes of the form only in the end
    block_product = make_block_product(max(form.planes, 2))

    @device
    def solve(base, i, lane, stash, record):
        g, c = lane >> 2, lane & 3
        blocks = record + uint64(BLOCK * (i * (i + 1) // 2) + 16 * lane)
        own = uint32(stash + 16 * lane)
        t = inverse(base + D + 16 * PITCH * i + PITCH * g + 8 * c)
        store_block(blocks + uint64(BLOCK * i), t)
        put_square(own + SQUARE * i, t)
        for m in range(i):
            j = i - 1 - m
            x = zeros8()
            for l in range(j + 1, i + 1):
                a = get_square(base + A + SQUARE * (l * (l + 1) // 2 + j) + 16 * lane)
                x = block_product(x, get_square(own + SQUARE * l), a)
            d = inverse_transposed(base + D + 16 * PITCH * j + 2 * PITCH * c + 4 * g)
            t = negated(block_product(zeros8(), x, d))
            store_block(blocks + uint64(BLOCK * j), t)
            put_square(own + SQUARE * j, t)

    return solve


def _make_factors(form):
    """What the scan multiplies with, per token."""
    SUM = layout(form)[2]
    vector, per_channel = form.vector, form.per_channel
    SUM_LOW, OWN_BETA, OF_A, OF_P, OF_K = (SUM + i * vector for i in range(1, 6))
    of_keys = form.planes * form.triangle_plane
    of_queries = form.key_record + of_keys
    of_last = form.key_record - form.last

    @device
    def factors(base, i, record):
        at = uint32(base + 4 * i)
        out = record + uint64(of_keys + 4 * i)
        store_global(out, load_shared(uint32(at + OWN_BETA)))
        if not per_channel:
            last = uint32(base + vector - 4)
            start = ex2(load_shared(uint32(at + SUM)))
            rest = load_shared(uint32(last + SUM)) - load_shared(uint32(at + SUM))
            rest += load_shared(uint32(last + SUM_LOW)) - load_shared(uint32(at + SUM_LOW))
            store_global(out + uint64(vector), start * load_shared(uint32(at + OF_A)))
            store_global(out + uint64(2 * vector), ex2(rest) * load_shared(uint32(at + OF_K)))
            out = record + uint64(of_queries + 4 * i)
            store_global(out, start * load_shared(uint32(at + OF_P)))
            if i < 4:
                out = record + uint64(of_last + 4 * i)
                store_global(out, ex2(load_shared(uint32(last + SUM))))

    return factors


def _make_scaled_tiles(form):
    """The scaled tiles to memory, and the decay of the state."""
    _, _, SUM, GATES, _ = layout(form)
    OF_P, OF_K = SUM + 4 * form.vector, SUM + 5 * form.vector
    width, threads, tokens = form.K, 2 * form.tokens, form.tokens
    pitch, queries = 2 * width, form.inputs * form.plane_bytes
    gate_pitch, tile_bytes, plane_bytes = form.gate_pitch, form.tile, form.plane_bytes
    of_last = form.key_record - form.last
    fours = width // 4  # a thread has four channels
    decayed = make_decayed(form)

    @device
    def scaled_tiles(base, t, count, record, tiles):
        last = uint32(base + GATES + (tokens - 1) * gate_pitch)
        for turn in range(tokens * fours // threads):
            x = uint32(t + threads * turn)
            r, u = uint32(x // fours), uint32(x % fours)
            if int32(r) < count:
                unit = uint32(((u % 16 // 2) ^ (r & 7)) << 4)
                k = uint32(base + r * pitch + u // 16 * 128 + unit + (u & 1) * 8)
                g = uint32(base + GATES + r * gate_pitch + 16 * u)
                of_k = load_shared(uint32(base + OF_K + 4 * r))
                of_q = load_shared(uint32(base + OF_P + 4 * r))
                out = tiles + uint64(uint32(r * pitch + 8 * u))
                decayed(k, k + queries, g, last + 16 * u, of_k, of_q, out, tile_bytes, plane_bytes)
        for c in range(t, width, threads):
            decay = ex2(load_shared(uint32(last + 4 * c)))
            store_global(record + uint64(of_last + 4 * c), decay)

    return scaled_tiles


@specialised
def intra_kernel(form, gate_dtype, wide):
    """The kernel, for a grid of chunks x value heads.

    `gate_dtype`: of g, None without one; `wide`: whether beta, A_log or dt_bias may be float64.
    """
    width, tokens, inputs, per_channel = form.K, form.tokens, form.inputs, form.per_channel
    rows, threads = tokens // 16, 2 * tokens
    A, D, SUM, GATES, _ = layout(form)
    pitch, plane_bytes, vector = 2 * width, form.plane_bytes, form.vector
    queries = inputs * plane_bytes
    OWN_BETA, OF_A, OF_P, OF_K = (SUM + i * vector for i in range(2, 6))
    key_record, record_bytes, tiles_bytes = form.key_record, form.record, 3 * form.tile
    load_rows = make_load_rows(tokens, width, threads)
    read = read_real(f32, wide)
    token_gates = make_token_gates(form, gate_dtype)
    channel_gates = make_channel_gates(form, gate_dtype, read)
    square_sum = make_square_sum(form.kind, width, inputs, plane_bytes)
    triangles, solve = _make_triangles(form), _make_solve(form)
    factors, scaled_tiles = _make_factors(form), _make_scaled_tiles(form)

    @kernel(threads, 3 if tokens == 64 and not per_channel else 2)
    def chunk_intra_kernel(desc):
        base = shared_address(cuda.shared.array(0, u32))
        t = uint32(cuda.threadIdx.x)
        lane, w = uint32(t & 31), uniform(t >> 5)
        value_heads, channels = uint32(desc[HV]), int32(desc[K])
        chunk, hv = divided(uint32(cuda.blockIdx.x), value_heads)
        hk = own_key_head(desc, hv)
        seq = sequence_of_chunk(desc, chunk)
        b, bos, eos = sequence(desc, seq)
        length = int32(eos - bos)
        start, count = chunk_span(desc, chunk - first_chunk(desc, seq), length, tokens)
        # a number before the first sequence (whose boundaries may start late) has a negative start
        if uint32(start) >= uint32(length) or not is_ours(desc, length):
            return
        first = bos + start

        k, q, units = array_at(desc, KEY), array_at(desc, Q), (channels + 7) // 8
        for p in range(inputs):
            target, plane = uint32(base + p * plane_bytes), p * desc[KEY_PLANE]
            load_rows(target, at(k, b, first, hk) + plane, k[3], t, count, units)
            load_rows(target + queries, at(q, b, first, hk) + plane, q[3], t, count, units)
        commit_copies()
        g, A_log, dt_bias = array_at(desc, G), array_at(desc, A_LOG), array_at(desc, DT_BIAS)
        rate = ONE
        if A_log[0] != 0:
            rate = ex2(read(A_log[1], A_log[0] + hv * A_log[2]) * LOG2E)
        own_g = at(g, b, first, hv)
        own_bias = dt_bias[0] + hv * dt_bias[2]
        if per_channel:
            target = uint32(base + GATES)
            bias = (own_bias, dt_bias[1])
            channel_gates(
                desc, target, t, count, channels, own_g, g[3], g[5], rate, bias, dt_bias[3]
            )
        elif w == 0:
            bias = ZERO
            if dt_bias[0] != 0:
                bias = read(dt_bias[1], own_bias)
            token_gates(desc, uint32(base + SUM), lane, count, own_g, g[3], rate, bias)
        wait_for_copies()
        cuda.syncthreads()

        # half of the threads have a row of K, the others one of Q
        has_key = t < tokens
        i = uint32(t if has_key else t - tokens)
        norm = ONE
        if desc[L2NORM]:
            row = uint32(base + i * pitch + (0 if has_key else queries))
            norm = rsqrt(square_sum(row, i) + real(desc[EPS]))
        own = uint32(base + 4 * i)
        if has_key:
            x = ZERO
            if int32(i) < count:
                x = ONE
                beta = array_at(desc, BETA)
                if beta[0] != 0:
                    x = read(beta[1], at(beta, b, first + i, hv))
                if desc[SIGMOID_BETA]:
                    x = real(desc[BETA_FACTOR]) * sigmoid(x)
            store_shared(uint32(own + OWN_BETA), x)
            store_shared(uint32(own + OF_A), x * norm)
            store_shared(uint32(own + OF_K), norm)
        else:
            store_shared(uint32(own + OF_P), real(desc[SCALE]) * norm)
        cuda.syncthreads()

        number = uint64(chunk) * uint64(value_heads) + uint64(hv)
        record = uint64(desc[RECORDS]) + number * uint64(record_bytes)
        triangles(base, w, lane, record + uint64(key_record))
        # the diagonal block of A is the warp's own
        sync_warp()
        invert(base + A + SQUARE * (w * (w + 3) // 2), base + D + 16 * PITCH * w, lane)
        if per_channel:
            scaled_tiles(base, t, count, record, uint64(desc[TILES]) + number * uint64(tiles_bytes))
        if has_key:
            factors(base, i, record)
        # All of A and D is there for everybody; K and Q were read for the last time, and their
        # place serves the warps for blocks of T that nobody else sees.
        cuda.syncthreads()
        solve(base, int32(rows - 1 - w), lane, uint32(base + SQUARE * rows * w), record)

    return chunk_intra_kernel
