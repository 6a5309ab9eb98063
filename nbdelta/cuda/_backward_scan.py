"""The two kernels of the backward pass that carry a state from block to block of 16 tokens.

One makes the errors E of a chunk from the state at its start, the other one takes dS from the end
of a sequence to its start and leaves dU and dV = Y = beta dU:

    E_i = V_i - e^G_i K_i S - sum over j < i of M_ij U_j                    U = beta E
    dU_j = e^(G_n - G_j) K_j dS + sum over i of P_ij dO_i - sum over i > j of M_ij Y_i
"""

from numba import cuda

from nbdelta.cuda._backward_blocks import make_block, make_solve, make_staging
from nbdelta.cuda._backward_call import (
    BLOCK,
    BLOCKS,
    DERRORS,
    DH0,
    DHT,
    DO,
    DSTATES,
    ERRORS,
    chunk_of,
    state_at,
)
from nbdelta.cuda._backward_state import (
    BETA,
    COLUMNS,
    PITCH,
    RIGHT,
    THREADS,
    WARPS,
    M,
    P,
    U,
    X,
    make_products,
    places_of,
)
from nbdelta.cuda._call import HV, VALUE, O, V, array_at, at, sequence
from nbdelta.cuda._chunk_form import first_chunk
from nbdelta.cuda._jit import device, kernel, specialised
from nbdelta.cuda._memory import ITEMSIZE, reader, real_of, writer
from nbdelta.cuda._shared import element, set_element
from nbdelta.cuda._tile_functions import int32


@device
def _share(desc):
    """What a block of threads works on and its first column of V; where a thread is in it."""
    tid = cuda.threadIdx.x
    slices = (desc[V] + COLUMNS - 1) // COLUMNS
    left = cuda.blockIdx.x % slices * COLUMNS
    return cuda.blockIdx.x // slices, left, tid, tid & 31, tid >> 5


@specialised
def errors_kernel(dtype, gate, KP, wide):
    """The kernel, for a grid of chunks x value heads x slices of V.

    `gate`: per "head", per "channel", or None; `wide`: whether a state may be float64.
    """
    REAL = real_of(dtype)
    get, put = reader(dtype, REAL), writer(str(REAL), REAL)
    size = ITEMSIZE[str(REAL)]
    get_state, _, _, read_state, sum_of_parts, write_state, pass_block = make_products(dtype, KP)
    substitute, _, get_row, get_column = make_solve(REAL)
    load_keys, _, pair_weight, beta_of = make_block(dtype, gate, KP)
    bring, _ = make_staging(dtype, KP, wide)
    _, PRE, SUFFIX, _, _ = places_of(dtype, KP)
    zero = REAL(0)

    @kernel(THREADS)
    def backward_errors_kernel(desc):
        s = cuda.shared.array(0, REAL)
        rest, left, tid, lane, warp = _share(desc)
        slot, hv = rest // desc[HV], rest % desc[HV]
        seq, b, start, count, index = chunk_of(desc, slot)
        if count <= 0:
            return
        v, out = array_at(desc, VALUE), array_at(desc, ERRORS)
        column = left + lane
        there = column < desc[V]
        source = v[0] + min(column, desc[V] - 1) * v[5]
        states, number = state_at(desc, seq, index)
        bring(desc, s, states, number, hv, left, tid)
        cuda.syncthreads()
        state = get_state(s, tid)
        for block in range((count + BLOCK - 1) // BLOCK):
            first, n = start + BLOCK * block, min(BLOCK, count - BLOCK * block)
            cuda.syncthreads()
            if tid < KP:
                load_keys(desc, s, b, first, n, hv, tid)
            # the rows are columns of M, from the diagonal down
            row, below = tid >> 4, (tid >> 4) + (tid & 15) + 1
            set_element(s, M + tid, -pair_weight(desc, 0, b, first, n, hv, below, row))
            if tid < BLOCK:
                set_element(s, BETA + tid, beta_of(desc, b, first, n, hv, tid))
            for i in range(warp, BLOCK, WARPS):
                x = get(source + at(v, b, first + min(i, n - 1), hv) - v[0])
                set_element(s, RIGHT + i * PITCH + lane, x if there and i < n else zero)
            cuda.syncthreads()
            read_state(s, state, PRE, tid)
            cuda.syncthreads()
            for i in range(warp, BLOCK, WARPS):
                place = i * PITCH + lane
                set_element(s, X + place, element(s, RIGHT + place) - sum_of_parts(s, place))
            cuda.syncthreads()
            if warp == 0:
                x = get_column(s, X + lane)
                for i in range(BLOCK):
                    u = element(s, BETA + i) * x[0]
                    set_element(s, X + i * PITCH + lane, x[0])
                    set_element(s, U + i * PITCH + lane, u)
                    x = substitute(x, get_row(s, M + i * BLOCK), u)
            cuda.syncthreads()
            for i in range(warp, n, WARPS):
                if there:
                    put(
                        at(out, b, first + i, hv) + column * size,
                        element(s, X + i * PITCH + lane),
                    )
            state = write_state(s, pass_block(s, state, tid), SUFFIX, U, tid)

    return backward_errors_kernel


@specialised
def scan_kernel(dtype, gate, do_dtype, KP, wide):
    """The kernel, for a grid of sequences x value heads x slices of V.

    `gate`: per "head", per "channel", or None; `do_dtype`: of the gradient of o, None without one;
    `wide`: whether a state may be float64.
    """
    REAL = real_of(dtype)
    get, put = reader(do_dtype or dtype, REAL), writer(str(REAL), REAL)
    put_value = writer(dtype, REAL)
    size = ITEMSIZE[str(REAL)]
    get_state, put_state, _, read_state, sum_of_parts, write_state, pass_block = make_products(
        dtype, KP
    )
    substitute, add_later, get_row, get_column = make_solve(REAL)
    load_keys, load_queries, pair_weight, beta_of = make_block(dtype, gate, KP)
    bring, take = make_staging(dtype, KP, wide)
    _, PRE, SUFFIX, QUERIES, _ = places_of(dtype, KP)
    # threads of their own for the queries where there are enough
    FIRST_QUERY = KP % THREADS
    LAST = BLOCK - 1
    zero = REAL(0)

    @kernel(THREADS)
    def backward_scan_kernel(desc):
        s = cuda.shared.array(0, REAL)
        rest, left, tid, lane, warp = _share(desc)
        seq, hv = rest // desc[HV], rest % desc[HV]
        b, bos, eos = sequence(desc, seq)
        do, dv, derrors = array_at(desc, DO), array_at(desc, O), array_at(desc, DERRORS)
        column = left + lane
        there = column < desc[V]
        source = min(column, desc[V] - 1) * do[5]
        bring(desc, s, array_at(desc, DHT), seq, hv, left, tid)
        cuda.syncthreads()
        state = get_state(s, tid)
        blocks = (eos - bos + BLOCK - 1) // BLOCK
        for block in range(blocks - 1, -1, -1):
            first = bos + BLOCK * block
            n = min(BLOCK, eos - first)
            cuda.syncthreads()
            if block == blocks - 1 or block % BLOCKS == BLOCKS - 1:
                put_state(s, tid, state)
                cuda.syncthreads()
                slot = first_chunk(desc, seq) + block // BLOCKS
                take(desc, s, array_at(desc, DSTATES), slot, hv, left, tid)
                cuda.syncthreads()
            if tid < KP:
                load_keys(desc, s, b, first, n, hv, tid)
            if FIRST_QUERY <= tid < FIRST_QUERY + KP:
                load_queries(desc, s, b, first, n, hv, tid - FIRST_QUERY)
            # the rows are rows of M, the last one first, from the diagonal to the left
            row, j = LAST - (tid >> 4), LAST - 1 - (tid >> 4) - (tid & 15)
            set_element(s, M + tid, -pair_weight(desc, 0, b, first, n, hv, row, j))
            # and those of P are columns
            set_element(s, P + tid, pair_weight(desc, 1, b, first, n, hv, tid & 15, tid >> 4))
            if tid < BLOCK:
                set_element(s, BETA + tid, beta_of(desc, b, first, n, hv, tid))
            for i in range(warp, BLOCK, WARPS):
                x = zero
                if do_dtype is not None:
                    x = get(at(do, b, first + min(i, n - 1), hv) + source)
                set_element(s, RIGHT + i * PITCH + lane, x if there and i < n else zero)
            cuda.syncthreads()
            read_state(s, state, SUFFIX, tid)
            cuda.syncthreads()
            outputs = get_column(s, RIGHT + lane)
            for j in range(warp, BLOCK, WARPS):
                x = sum_of_parts(s, j * PITCH + lane)
                x = add_later(x, get_row(s, P + j * BLOCK), outputs, int32(j))
                # the last row first
                set_element(s, X + (LAST - j) * PITCH + lane, x)
            cuda.syncthreads()
            if warp == 0:
                x = get_column(s, X + lane)
                for i in range(BLOCK):
                    y = element(s, BETA + LAST - i) * x[0]
                    set_element(s, X + i * PITCH + lane, x[0])
                    set_element(s, U + (LAST - i) * PITCH + lane, -y)
                    x = substitute(x, get_row(s, M + i * BLOCK), y)
            state = write_state(s, pass_block(s, state, tid), QUERIES, RIGHT, tid)
            cuda.syncthreads()
            for i in range(warp, n, WARPS):
                if there:
                    du = element(s, X + (LAST - i) * PITCH + lane)
                    put(at(derrors, b, first + i, hv) + column * size, du)
                    dv_i = -element(s, U + i * PITCH + lane)
                    put_value(at(dv, b, first + i, hv) + column * dv[5], dv_i)
            state = write_state(s, state, PRE, U, tid)
        dh0 = array_at(desc, DH0)
        if dh0[0] != 0:
            cuda.syncthreads()
            put_state(s, tid, state)
            cuda.syncthreads()
            take(desc, s, dh0, seq, hv, left, tid)

    return backward_scan_kernel
