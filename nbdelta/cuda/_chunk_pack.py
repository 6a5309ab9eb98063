"""Copies of q, k or v of any dtype and strides: the padded planes that the chunk kernels read."""

import numpy as np
from numba import cuda

from nbdelta.arrays import empty
from nbdelta.cuda._call import put_array
from nbdelta.cuda._jit import kernel, specialised
from nbdelta.cuda._memory import fields, reader
from nbdelta.cuda._memory_tiles import make_store_pair
from nbdelta.cuda._tile_functions import f32, int32, uint64

X, SIZES, OUT, STEP, LENGTH = 0, 6, 11, 12, 13
THREADS = 256
ZERO = f32(0)

array_at, sizes_at = fields(6), fields(5)


@specialised
def pack_kernel(dtype, kind, planes):
    """The kernel, for any grid: a thread has two neighbouring numbers at a time."""
    read = reader(dtype, f32)
    store_pair = make_store_pair(kind, planes)

    @kernel(THREADS)
    def chunkpack_kernel(desc):
        x = array_at(desc, X)
        B, T, H, D, padded = sizes_at(desc, SIZES)
        pairs = padded // 2
        total = B * T * H * pairs
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        while i < total:
            row, c = i // pairs, 2 * int32(i % pairs)
            h, t, b = row % H, row // H % T, row // H // T
            source = x[0] + b * x[2] + t * x[3] + h * x[4] + c * x[5]
            first, second = ZERO, ZERO
            if c < D:
                first = read(source)
            if c + 1 < D:
                second = read(source + x[5])
            store_pair(first, second, uint64(desc[OUT] + 4 * i), uint64(4 * total))
            i += desc[STEP]

    return chunkpack_kernel


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
    B, T, H, _ = x.shape
    out = empty(x, (planes, B, T, H, padded), "bfloat16" if kind == "bf16" else "float16")
    desc = np.zeros(LENGTH, np.int64)
    put_array(desc, X, x)
    desc[SIZES:OUT] = *x.shape, padded
    blocks = min(-(-B * T * H * padded // 2 // THREADS), 8 * processors)
    desc[OUT], desc[STEP] = out.address, blocks * THREADS
    pack_kernel(x.dtype, kind, planes).launch((blocks, 1, 1), desc, place)
    return out.seen_as(out.shape[1:], out.strides[1:]), out.strides[0]
