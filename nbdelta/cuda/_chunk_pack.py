"""Copies of q, k or v of any dtype and strides: the padded planes that the chunk kernels read."""

import numpy as np
from numba import cuda, int64

from nbdelta.arrays import empty
from nbdelta.cuda._call import put_array
from nbdelta.cuda._jit import kernel, specialised
from nbdelta.cuda._memory import ITEMSIZE, fields, reader
from nbdelta.cuda._memory_tiles import make_store_planes
from nbdelta.cuda._shared import element, set_element
from nbdelta.cuda._tile_functions import f32, int32, uint32, uint64

X, SIZES, OUT, STEPS, LENGTH = 0, 6, 11, 12, 17
THREADS = 256
MANY = 4  # numbers that are one access where they lie side by side
# of a block that turns them; rows in shared memory begin in different banks
TOKENS, CHANNELS, PITCH = 64, 32, 65
SQUARE = CHANNELS * PITCH
READ, WRITTEN = THREADS // TOKENS, 2 * THREADS // CHANNELS  # at once: channels, tokens
ZERO = f32(0)

array_at, sizes_at = fields(6), fields(5)


@specialised
def pack_kernel(dtype, kind, planes, wide):
    """The kernel, for any grid: a thread has some neighbouring numbers at a time.

    Four, where x has them `wide`, in one access; otherwise two.
    """
    n = MANY if wide else 2
    read, store = reader(dtype, f32, n if wide else 1), make_store_planes(kind, planes, n)

    @kernel(THREADS)
    def chunkpack_kernel(desc):
        x = array_at(desc, X)
        B, T, H, D, groups = sizes_at(desc, SIZES)
        step, next_c, next_h, next_t, next_b = sizes_at(desc, STEPS)
        total = B * T * H * groups
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        row, c = i // groups, int32(i % groups)
        h, t, b = int32(row % H), int32(row // H % T), int32(row // H // T)
        while i < total:
            source = x[0] + b * x[2] + t * x[3] + h * x[4] + n * c * x[5]
            target, plane = uint64(desc[OUT] + 2 * n * i), uint64(2 * n * total)
            if wide:
                four = (ZERO, ZERO, ZERO, ZERO)
                if n * c < D:
                    four = read(source)
                store(four[0], four[1], four[2], four[3], target, plane)
            else:
                first, second = ZERO, ZERO
                if n * c < D:
                    first = read(source)
                if n * c + 1 < D:
                    second = read(source + x[5])
                store(first, second, target, plane)
            # no division: sizes are known where the grid is chosen
            i += step
            c, h, t, b = int32(c + next_c), int32(h + next_h), int32(t + next_t), int32(b + next_b)
            if c >= groups:
                c, h = int32(c - groups), int32(h + 1)
            if h >= H:
                h, t = int32(h - H), int32(t + 1)
            if t >= T:
                t, b = int32(t - T), int32(b + 1)

    return chunkpack_kernel


@specialised
def turn_kernel(dtype, kind, planes):
    """The kernel for tokens that lie side by side, as behind the short convolution of a model.

    A block reads `TOKENS` of some channels and writes them the other way round, by way of shared
    memory, so that both sides are whole sectors. For a grid of blocks x heads x sequences.
    """
    read, store = reader(dtype, f32), make_store_planes(kind, planes, 2)

    @kernel(THREADS)
    def chunkturn_kernel(desc):
        s_x = cuda.shared.array(SQUARE, f32)
        x = array_at(desc, X)
        B, T, H, D, padded = sizes_at(desc, SIZES)
        tid, block = cuda.threadIdx.x, uint32(cuda.blockIdx.x)
        # divided in 32 bits, which a grid has
        parts = uint32((padded + CHANNELS - 1) // CHANNELS)
        lots = uint32((T + TOKENS - 1) // TOKENS)
        channel, block = int64(block % parts) * CHANNELS, uint32(block // parts)
        token, block = int64(block % lots) * TOKENS, uint32(block // lots)
        h, b = int64(block % uint32(H)), int64(block // uint32(H))
        # a warp reads tokens of a channel, and writes channels of two tokens
        t, c = tid % TOKENS, tid // TOKENS
        source = x[0] + b * x[2] + (token + t) * x[3] + h * x[4] + (channel + c) * x[5]
        step, own = READ * x[5], int32(c * PITCH + t)
        left = int32(min(D - channel, CHANNELS) - c) if token + t < T else int32(0)
        for i in range(CHANNELS // READ):
            value = ZERO
            if i * READ < left:
                value = read(source)
            set_element(s_x, own + i * READ * PITCH, value)
            source += step
        cuda.syncthreads()
        c, t = tid % (CHANNELS // 2) * 2, tid // (CHANNELS // 2)
        target = desc[OUT] + 2 * (((b * T + token + t) * H + h) * padded + channel + c)
        step, plane = 2 * WRITTEN * H * padded, uint64(2 * B * T * H * padded)
        own = int32(c * PITCH + t)
        left = int32(min(T - token, TOKENS) - t) if channel + c < padded else int32(0)
        for i in range(TOKENS // WRITTEN):
            if i * WRITTEN < left:
                first = element(s_x, own + i * WRITTEN)
                store(first, element(s_x, own + i * WRITTEN + PITCH), uint64(target), plane)
            target += step

    return chunkturn_kernel


def _has_tokens_side_by_side(x):
    return x.strides[1] == ITEMSIZE[x.dtype] != x.strides[3]


def _launch(x, out, kind, planes, place, processors):
    """Choose a kernel for the layout of x and start it."""
    B, T, H, D = x.shape
    padded, size, (*steps, own) = out.shape[-1], ITEMSIZE[x.dtype], x.strides
    desc = np.zeros(LENGTH, np.int64)
    put_array(desc, X, x)
    desc[SIZES:OUT], desc[OUT] = (B, T, H, D, padded), out.address
    if _has_tokens_side_by_side(x):
        blocks = -(-padded // CHANNELS) * -(-T // TOKENS) * H * B
        turn_kernel(x.dtype, kind, planes).launch((blocks, 1, 1), desc, place)
        return
    wide = own == size and D % MANY == 0
    wide = wide and all(n % (MANY * size) == 0 for n in (x.address, *steps))
    groups = padded // (MANY if wide else 2)
    blocks = min(-(-B * T * H * groups // THREADS), 8 * processors)
    step = blocks * THREADS
    rows, tokens = step // groups, step // groups // max(1, H)
    desc[SIZES + 4] = groups
    desc[STEPS:] = step, step % groups, rows % max(1, H), tokens % max(1, T), tokens // max(1, T)
    pack_kernel(x.dtype, kind, planes, wide).launch((blocks, 1, 1), desc, place)


def pack(x, kind, planes, padded, place, processors):
    """Copy an array ``[B, T, H, D]`` for the chunk kernels.

    Parameters
    ----------
    x : View
        q, k or v.
    kind : str
        ``"bf16"`` or ``"f16"``.
    planes : int
        16-bit numbers whose sum a number becomes.
    padded : int
        At least D, a multiple of 8; zeros follow the numbers.
    place : tuple
        Where to run, as in `Kernel.launch`.
    processors : int
        Multiprocessors of the device.

    Returns
    -------
    View
        The first plane, ``[B, T, H, padded]``; its owner is all of them.
    int
        Bytes from one plane to the next.
    """
    out = empty(x, (planes, *x.shape[:3], padded), "bfloat16" if kind == "bf16" else "float16")
    _launch(x, out, kind, planes, place, processors)
    return out.seen_as(out.shape[1:], out.strides[1:]), out.strides[0]


def with_channels_side_by_side(x, place):
    """Return x, or a copy of it if the tokens lie side by side, and numbers have 16 bits.

    For kernels that read channels of a token together, a number at a time.
    """
    kind = {"bfloat16": "bf16", "float16": "f16"}.get(x.dtype)
    if kind is None or not _has_tokens_side_by_side(x):
        return x
    return pack(x, kind, 1, x.shape[-1] + x.shape[-1] % 2, place, 1)[0]
