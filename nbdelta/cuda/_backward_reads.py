"""The products of tokens with the states at both ends of their chunk, all chunks at once.

    scale dO S^T      -Y S^T      U dS^T

and, beside the last one, S . dS of every channel. On tensor cores but for float64, in as many
planes of bfloat16 as the scan has (see ``_backward_state.py``). A tile in shared memory has 32
columns of V, in rows of 64 bytes whose 16-byte units are placed so that eight rows of a unit are in
different banks.
"""

from functools import cache

from numba import cuda, int64

from nbdelta.cuda._backward_call import (
    CHUNK,
    DERRORS,
    DO,
    DSTATES,
    ERRORS,
    FACTORS,
    KEPT,
    READS_K,
    READS_Q,
    WRITES,
    chunk_of,
    state_at,
)
from nbdelta.cuda._backward_products import PITCH, make_outer
from nbdelta.cuda._backward_state import planes_of
from nbdelta.cuda._call import HV, SCALE, K, V, array_at, at
from nbdelta.cuda._jit import device, kernel, specialised
from nbdelta.cuda._memory import (
    ITEMSIZE,
    block_writer,
    read_real,
    reader,
    real_field,
    real_of,
    writer,
)
from nbdelta.cuda._memory_tiles import make_store_elements
from nbdelta.cuda._ptx import shared_address, shuffle_xor, tile
from nbdelta.cuda._shared import element, set_element, shared_reader
from nbdelta.cuda._step import warp_sum
from nbdelta.cuda._tile_functions import f32, int32, registers, u32, uint32, uint64, void
from nbdelta.cuda._tiles import make_zeros, multiply, split

SLICE = 16
# of the kernel on tensor cores: threads, columns at once, and bytes of them in a row
THREADS, WARPS = 256, 8
COLUMNS, ROW = 32, 64


def reads_bytes(dtype, KP):
    """Bytes of dynamic shared memory."""
    if planes_of(dtype):
        return planes_of(dtype) * (CHUNK + KP) * ROW + 4 * KP
    return SLICE * (PITCH + KP + 4) * 8


@specialised
def reads_kernel(dtype, do_dtype, KP, wide):
    """The kernel, for a grid of chunks x value heads x the three products with a state.

    `wide`: whether an initial state may be float64.
    """
    return (_by_warps if planes_of(dtype) else _by_threads)(dtype, do_dtype, KP, wide)


@cache
def _make_row(dtype, do_dtype):
    REAL = real_of(dtype)
    get, get_real = reader(do_dtype or dtype, REAL), reader(str(REAL), REAL)
    real, size, zero = real_field(REAL), ITEMSIZE[str(REAL)], REAL(0)

    @device
    def number_of_row(desc, which, b, token, hv, column):
        """Of scale dO, -Y or U."""
        if which == 0:
            do = array_at(desc, DO)
            if do_dtype is None:
                return zero
            return real(desc[SCALE]) * get(at(do, b, token, hv) + column * do[5])
        rows = array_at(desc, ERRORS)
        if which == 1:
            rows = array_at(desc, DERRORS)
        beta = get_real(at(array_at(desc, FACTORS), b, token, hv) + 2 * size)
        return (-beta if which == 1 else beta) * get_real(at(rows, b, token, hv) + column * size)

    return number_of_row


@cache
def _make_tiles(KP, planes):
    """A pair of numbers to a tile; 16 tokens times half of the channels, 32 columns at once."""
    kind = "bf16"

    @tile(void, u32, f32, f32, u32)
    def store_pair(e, address, x, y, plane_bytes):
        for (pair,) in split(e, kind, planes, [x, y]):
            e.store_shared(address, [pair])
            address = e.iadd(address, plane_bytes)

    @tile(registers(KP // 4), registers(KP // 4), u32, u32)
    def multiply_slice(e, acc, rows, state):
        for k in range(COLUMNS // 16):
            at, other = (e.xor(x, e.u32(32 * k)) for x in (rows, state))
            left = [e.ldmatrix(at, p * CHUNK * ROW) for p in range(planes)]
            for n in range(KP // 32):
                right = [e.ldmatrix(other, (p * KP + 16 * n) * ROW) for p in range(planes)]
                for h in range(2):
                    o, columns = 8 * n + 4 * h, [r[2 * h : 2 * h + 2] for r in right]
                    acc[o : o + 4] = multiply(e, kind, acc[o : o + 4], left, columns)
        return acc

    return store_pair, multiply_slice, make_zeros(KP // 4)


def _by_warps(dtype, do_dtype, KP, wide):
    """The kernel on tensor cores: a warp has 16 tokens and half of the channels."""
    REAL, planes = real_of(dtype), planes_of(dtype)
    number_of_row, get_state = _make_row(dtype, do_dtype), read_real(REAL, wide)
    store_pair, multiply_slice, zeros = _make_tiles(KP, planes)
    put, total_of, zero = writer(str(REAL), REAL), warp_sum(REAL, 2), REAL(0)
    store = make_store_elements("float32", KP // 2)
    STATE = planes * CHUNK * ROW
    SUMS = (STATE + planes * KP * ROW) // 4

    @device
    def unit(row, i):
        """Offset of a 16-byte unit in a tile."""
        return 64 * row + ((i ^ (row >> 1 & 3)) << 4)

    @device
    def put_rows(address, row, lane, x, y, plane_bytes):
        """A lane's column of two rows: neighbours swap, and either has two columns of one."""
        odd = lane & 1
        other = shuffle_xor(x if odd else y, 1)
        place = unit(row + odd, lane >> 3) + ((lane >> 1 & 3) << 2)
        low, high = other if odd else x, y if odd else other
        store_pair(uint32(address + place), low, high, uint32(plane_bytes))

    @kernel(THREADS, None)
    def backward_reads_kernel(desc):
        s = cuda.shared.array(0, REAL)
        base = shared_address(s)
        tid = cuda.threadIdx.x
        lane, warp = tid & 31, tid >> 5
        rest, which = cuda.blockIdx.x // 3, cuda.blockIdx.x % 3
        slot, hv = rest // desc[HV], rest % desc[HV]
        seq, b, first, count, index = chunk_of(desc, slot)
        if count <= 0:
            return
        states, number = state_at(desc, seq, index)
        others, other = array_at(desc, DSTATES), int64(slot)
        if which == 2:
            states, number, others, other = others, other, states, number
        token, half = 16 * (warp & 3), (warp >> 2) * (KP // 2)
        rows = uint32(base + unit(token + (lane & 15), lane >> 4))
        row = half + (lane & 7) + (lane >> 4 << 3)
        columns = uint32(base + STATE + unit(row, lane >> 3 & 1))
        acc = zeros()
        for left in range(0, desc[V], COLUMNS):
            there, column = left + lane < desc[V], min(left + lane, desc[V] - 1)
            cuda.syncthreads()
            for t in range(2 * warp, CHUNK, 2 * WARPS):
                x, y = zero, zero
                if there and t < count:
                    x = number_of_row(desc, which, b, first + t, hv, column)
                if there and t + 1 < count:
                    y = number_of_row(desc, which, b, first + t + 1, hv, column)
                put_rows(base, t, lane, x, y, CHUNK * ROW)
            for c in range(2 * warp, KP, 2 * WARPS):
                x, y, p, q = zero, zero, zero, zero
                if states[0] != 0 and there:
                    if c < desc[K]:
                        x = get_state(states[1], at(states, number, hv, c) + column * states[5])
                    if c + 1 < desc[K]:
                        y = get_state(states[1], at(states, number, hv, c + 1) + column * states[5])
                put_rows(base + STATE, c, lane, x, y, KP * ROW)
                if which == 2:
                    if others[0] != 0 and there:
                        own = at(others, other, hv, c) + column * others[5]
                        if c < desc[K]:
                            p = x * get_state(others[1], own)
                        if c + 1 < desc[K]:
                            q = y * get_state(others[1], own + others[4])
                    p, q = total_of((p, q))
                    if lane == 0:
                        if left > 0:
                            p, q = p + element(s, SUMS + c), q + element(s, SUMS + c + 1)
                        set_element(s, SUMS + c, p)
                        set_element(s, SUMS + c + 1, q)
            cuda.syncthreads()
            acc = multiply_slice(acc, rows, columns)
        if which == 2 and tid < desc[K]:
            put(at(array_at(desc, KEPT), slot, hv, 0) + tid * 4, element(s, SUMS + tid))
        out = array_at(desc, READS_Q)
        if which == 1:
            out = array_at(desc, READS_K)
        elif which == 2:
            out = array_at(desc, WRITES)
        token, c = token + (lane >> 2), half + 2 * (lane & 3)
        target = uint64(at(out, b, first + token, hv) + 4 * c)
        store(acc, target, uint64(4), uint64(out[3]), int32(desc[K] - c), int32(count - token))

    return backward_reads_kernel


def _by_threads(dtype, do_dtype, KP, wide):
    """The kernel that multiplies and adds, in slices of 16 columns."""
    REAL = real_of(dtype)
    number_of_row, get_state = _make_row(dtype, do_dtype), read_real(REAL, wide)
    put = writer(str(REAL), REAL)
    size = ITEMSIZE[str(REAL)]
    TOKENS = 16  # by four channels, of a thread
    outer, zeros = make_outer(REAL, TOKENS, 4)
    four, some = (shared_reader(REAL, tuple(range(0, n, 4)), 4) for n in (4, TOKENS))
    put_rows = block_writer(REAL, TOKENS, 4)
    STATE, PITCH_STATE = SLICE * PITCH, KP + 4
    threads = KP
    STEP = threads // SLICE
    zero = REAL(0)

    @kernel(threads, None)
    def backward_reads_kernel(desc):
        s = cuda.shared.array(0, REAL)
        tid = cuda.threadIdx.x
        rest, which = cuda.blockIdx.x // 3, cuda.blockIdx.x % 3
        slot, hv = rest // desc[HV], rest % desc[HV]
        seq, b, first, count, index = chunk_of(desc, slot)
        if count <= 0:
            return
        states, number = state_at(desc, seq, index)
        others, other = array_at(desc, DSTATES), int64(slot)
        if which == 2:
            states, number, others, other = others, other, states, number
        acc, kept = zeros(), zero
        v, across = tid & (SLICE - 1), tid >> 4
        i, j = TOKENS * (tid // (KP // 4)), 4 * (tid % (KP // 4))
        for left in range(0, desc[V], SLICE):
            column = min(left + v, desc[V] - 1)
            for m in range(CHUNK // STEP):
                t = across + m * STEP
                x = number_of_row(desc, which, b, first + min(t, count - 1), hv, column)
                set_element(s, v * PITCH + t, x if t < count and left + v < desc[V] else zero)
            for m in range(KP // STEP):
                c, x = across + m * STEP, zero
                if states[0] != 0 and left + v < desc[V] and c < desc[K]:
                    x = get_state(states[1], at(states, number, hv, c) + column * states[5])
                set_element(s, STATE + v * PITCH_STATE + c, x)
            cuda.syncthreads()
            for u in range(SLICE):
                acc = outer(acc, some(s, u * PITCH + i), four(s, STATE + u * PITCH_STATE + j))
            if which == 2 and tid < desc[K] and others[0] != 0:
                for u in range(min(SLICE, desc[V] - left)):
                    x = get_state(others[1], at(others, other, hv, tid) + (left + u) * others[5])
                    kept += x * element(s, STATE + u * PITCH_STATE + tid)
            cuda.syncthreads()
        if which == 2 and tid < desc[K]:
            put(at(array_at(desc, KEPT), slot, hv, 0) + tid * size, kept)
        out = array_at(desc, READS_Q)
        if which == 1:
            out = array_at(desc, READS_K)
        elif which == 2:
            out = array_at(desc, WRITES)
        put_rows(at(out, b, first + i, hv) + j * size, out[3], size, count - i, desc[K] - j, acc)

    return backward_reads_kernel
