"""Inclusive cumulative sums inside chunks, along any axis of any array.

A thread sums one line of one chunk, in order: the sums have the same bits in every layout. Where
the lines lie across the memory, neighbouring threads read neighbouring numbers. Where they lie
along it, a warp carries tiles of 32 lines and 32 numbers through shared memory.
"""

import math

import numpy as np
from numba import cuda, types

from nbdelta.cuda._call import put_array, put_float
from nbdelta.cuda._jit import device, kernel, place_of, specialised
from nbdelta.cuda._memory import (
    fields,
    read_index,
    reader,
    real_field,
    real_of,
    writer,
)
from nbdelta.cuda._shared import element, set_element

THREADS = 128
TILE, PITCH = 32, 33
# numbers that a thread reads ahead of its writes
AHEAD = 8
# up to here the lines are so short that staging them gains nothing
SHORT = 8

# descriptor: addresses, byte strides along the axis, sizes, options
X, OUT, X_STEP, OUT_STEP, T, CHUNK, SLOTS, LINES, SCALE, REVERSE = range(10)
# boundaries of packed sequences (an array of `put_array`) and the number of sequences
CU_SEQLENS, N = 10, 16
# the other axes, fastest first: two sizes, three byte strides of x, three of out
SIZES, X_STRIDES, OUT_STRIDES = 17, 19, 22
LENGTH = 25

_three, _two = fields(3), fields(2)


@device
def chunk_at(cu, n, length, size, slot):
    """First token of a chunk and its number of tokens.

    Without boundaries `slot` is the chunk's number. With n sequences between boundaries, the chunks
    of one have the slots from ``bos // size`` and its own number on: ``length // size + n`` slots
    are enough, and some are empty. So is what boundaries on the device have out of range.
    """
    if cu[0] == 0:
        first = slot * size
        return first, min(size, length - first)
    low, high = 0, n
    while high - low > 1:
        middle = (low + high) >> 1
        # bos // size + middle <= slot, without the division
        if read_index(cu[1], cu[0] + middle * cu[2]) < (slot - middle + 1) * size:
            low = middle
        else:
            high = middle
    bos = read_index(cu[1], cu[0] + low * cu[2])
    eos = read_index(cu[1], cu[0] + (low + 1) * cu[2])
    first = bos + (slot - bos // size - low) * size
    if bos < 0 or first < bos or eos > length:
        return 0, 0
    return first, max(0, min(size, eos - first))


def chunk_slots(length, size, cu_seqlens=None):
    """Number of slots of `chunk_at` among which all chunks are."""
    if cu_seqlens is None:
        return -(-length // size)
    n = cu_seqlens.shape[0] - 1
    return length // size + n if n > 0 else 0


@device
def _line_of(desc, item):
    """Addresses of the first number of one line in one chunk, and how many there are."""
    if item >= desc[LINES] * desc[SLOTS]:
        return desc[X], desc[OUT], 0
    slot, line = item // desc[LINES], item % desc[LINES]
    sizes, x, out = _two(desc, SIZES), _three(desc, X_STRIDES), _three(desc, OUT_STRIDES)
    rest, i = line // sizes[0], line % sizes[0]
    k, j = rest // sizes[1], rest % sizes[1]
    cu = _three(desc, CU_SEQLENS)
    first, n = chunk_at(cu, desc[N], desc[T], desc[CHUNK], slot)
    if desc[REVERSE]:
        first += n - 1
    source = desc[X] + i * x[0] + j * x[1] + k * x[2] + first * desc[X_STEP]
    target = desc[OUT] + i * out[0] + j * out[1] + k * out[2] + first * desc[OUT_STEP]
    return source, target, n


@specialised
def _cumsum_kernel(DTYPE, OUT_DTYPE, STAGED):
    REAL = real_of(OUT_DTYPE)
    get, put, real = reader(DTYPE, REAL), writer(OUT_DTYPE, REAL), real_field(REAL)
    SIZE = THREADS * PITCH

    @kernel(THREADS)
    def cumsum_kernel(desc):
        tid = cuda.threadIdx.x
        source, target, n = _line_of(desc, cuda.blockIdx.x * THREADS + tid)
        x_step, out_step = desc[X_STEP], desc[OUT_STEP]
        if desc[REVERSE]:
            x_step, out_step = -x_step, -out_step
        scale, total = real(desc[SCALE]), REAL(0)
        if STAGED:
            s_tile = cuda.shared.array(SIZE, REAL)
            s_source = cuda.shared.array(THREADS, types.int64)
            s_target = cuda.shared.array(THREADS, types.int64)
            s_n = cuda.shared.array(THREADS, types.int64)
            s_source[tid], s_target[tid], s_n[tid] = source, target, n
            cuda.syncthreads()
            lane, warp, own = tid & 31, tid & -32, tid * PITCH
            first = 0
            while first < desc[CHUNK]:
                t = first + lane
                for i in range(TILE):
                    if t < element(s_n, warp + i):
                        x = get(element(s_source, warp + i) + t * x_step)
                        set_element(s_tile, (warp + i) * PITCH + lane, x)
                cuda.syncthreads()
                for i in range(TILE):
                    if first + i < n:
                        total += element(s_tile, own + i)
                        set_element(s_tile, own + i, total * scale)
                cuda.syncthreads()
                # the next tile's numbers go where the same thread reads these
                for i in range(TILE):
                    if t < element(s_n, warp + i):
                        x = element(s_tile, (warp + i) * PITCH + lane)
                        put(element(s_target, warp + i) + t * out_step, x)
                first += TILE
        else:
            r_x = cuda.local.array(AHEAD, REAL)
            first = 0
            while first < n:
                for i in range(AHEAD):
                    if first + i < n:
                        r_x[i] = get(source + i * x_step)
                for i in range(AHEAD):
                    if first + i < n:
                        total += r_x[i]
                        put(target + i * out_step, total * scale)
                first += AHEAD
                source, target = source + AHEAD * x_step, target + AHEAD * out_step

    return cumsum_kernel


def specialisations():
    """Name, kernel, descriptor length and dynamic shared memory of all that is ever launched."""
    dtypes = [(d, "float32") for d in ("float32", "float64", "float16", "bfloat16")]
    for dtype, out in (*dtypes, ("float64", "float64")):
        for staged in (False, True):
            name = f"cumsum {dtype} to {out}{', staged' if staged else ''}"
            yield name, _cumsum_kernel(dtype, out, staged), LENGTH, 0


def merged(axes):
    """Axes ``(size, byte strides...)``, fastest first, in as few as the layouts allow."""
    result = []
    for size, *strides in sorted(axes, key=lambda axis: abs(axis[1])):
        if result and strides == [result[-1][0] * step for step in result[-1][1:]]:
            result[-1] = (size * result[-1][0], *result[-1][1:])
        elif size != 1:
            result.append((size, *strides))
    return result


def chunk_local_cumsum(x, out, chunk_size, axis, reverse, scale, cu_seqlens):
    """Fill `out` with the cumulative sums of `x` along `axis`, anew in every chunk.

    Parameters
    ----------
    x, out : View
        Arrays of one shape.
    chunk_size, axis : int
        Length of a chunk; the axis to sum along, not negative.
    reverse : bool
        Sum from the end of the chunk.
    scale : float
        Factor of the result.
    cu_seqlens : View, shape ``[N + 1]``, or None
        Boundaries along the axis at which chunks start anew, on the device of `x`.
    """
    if 0 in x.shape:
        return
    length, step = x.shape[axis], abs(x.strides[axis])
    size = min(chunk_size, length)
    axes = list(zip(x.shape, x.strides, out.strides))
    others = merged(axes[:axis] + axes[axis + 1 :])
    staged = size > SHORT and all(step < abs(stride) for _, stride, _ in others)
    others += [(1, 0, 0)] * (3 - len(others))
    desc = np.zeros(LENGTH, np.int64)
    desc[X_STEP], desc[OUT_STEP] = x.strides[axis], out.strides[axis]
    desc[T], desc[CHUNK], desc[SLOTS] = length, size, chunk_slots(length, size, cu_seqlens)
    sizes, x_strides, out_strides = zip(*others[:3])
    desc[SIZES : SIZES + 2] = sizes[:2]
    desc[X_STRIDES : X_STRIDES + 3], desc[OUT_STRIDES : OUT_STRIDES + 3] = x_strides, out_strides
    desc[LINES] = math.prod(sizes)
    desc[REVERSE] = reverse
    put_float(desc, SCALE, scale, np.dtype(out.dtype))
    if cu_seqlens is not None:
        put_array(desc, CU_SEQLENS, cu_seqlens)
        desc[N] = cu_seqlens.shape[0] - 1
    run = _cumsum_kernel(x.dtype, out.dtype, staged)
    blocks = -(-int(desc[LINES] * desc[SLOTS]) // THREADS)
    # a launch for each index over axes beyond the third that cannot be merged: nobody has them
    for index in np.ndindex(*[n for n, _, _ in others[3:]]):
        desc[X] = x.address + sum(i * stride for i, (_, stride, _) in zip(index, others[3:]))
        desc[OUT] = out.address + sum(i * stride for i, (_, _, stride) in zip(index, others[3:]))
        run.launch((blocks, 1, 1), desc, place_of(x))
