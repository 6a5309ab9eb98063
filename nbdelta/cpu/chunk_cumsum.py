"""Inclusive cumulative sums inside chunks, along any axis of any array.

One item of work is one chunk of one line bundle: all other axes but the one with the smallest
stride are listed as addresses by the host, so the kernel sees two axes, whatever the array has.
"""

from functools import cache
from itertools import pairwise

import numpy as np

from nbdelta.cpu._call import ITEMS, LENGTH, NEXT, SCALE, G, N, O, T, V, array_at, put_float, real
from nbdelta.cpu._jit import SOURCES, kernel
from nbdelta.cpu._memory import DTYPES, get, put
from nbdelta.cpu._simd import W, claim, read_int64
from nbdelta.cpu._team import run, thread_count
from nbdelta.cpu._tiles import sum_columns

# descriptor fields of this kernel: tables of addresses and of chunk bounds, their lengths in N and
# T
LINES, BOUNDS, REVERSE = 88, 89, 90


def chunk_bounds(length, chunk_size, cu_seqlens=None):
    """First and end token of every chunk, ``[NT, 2]``; chunks start anew with each sequence."""
    ends = np.array([0, length]) if cu_seqlens is None else cu_seqlens
    starts = [np.arange(bos, eos, chunk_size) for bos, eos in pairwise(ends)]
    stops = [np.minimum(first + chunk_size, eos) for first, eos in zip(starts, ends[1:])]
    empty = np.zeros(0, np.int64)
    bounds = np.stack([np.concatenate([empty, *starts]), np.concatenate([empty, *stops])], axis=1)
    return np.ascontiguousarray(bounds, np.int64)


def addresses(view, axes):
    """Address of every index over `axes`, in C order."""
    result = np.full(1, view.address, np.int64)
    for axis in axes:
        steps = np.arange(view.shape[axis], dtype=np.int64) * view.strides[axis]
        result = (result[:, None] + steps).ravel()
    return result


@cache
def _cumsum_kernel(REAL):
    SIZE = np.dtype(REAL).itemsize
    OWN = DTYPES.index(np.dtype(REAL).name)
    STAMP = SOURCES

    @kernel
    def cumsum_kernel(desc, worker):
        stamp = STAMP  # noqa: F841 (a part of the cache key, see SOURCES)
        x, out = array_at(desc, G), array_at(desc, O)
        x_step, x_inner, out_step, out_inner = x[2], x[3], out[2], out[3]
        chunks, inner, scale = desc[T], desc[V], REAL(real(desc, SCALE))
        plain = x[1] == OWN and out[1] == OWN and x_inner == SIZE and out_inner == SIZE
        while True:
            item = claim(desc, NEXT)
            if item >= desc[ITEMS]:
                break
            line = desc[LINES] + item // chunks * 16
            bound = desc[BOUNDS] + item % chunks * 16
            first, n = read_int64(bound), read_int64(bound + 8) - read_int64(bound)
            a, b = x_step, out_step
            if desc[REVERSE]:
                first, a, b = first + n - 1, -x_step, -out_step
            source = read_int64(line) + first * x_step
            target = read_int64(line + 8) + first * out_step
            done = 0
            if plain:
                while done + W <= inner:
                    i = done * SIZE
                    sum_columns(REAL, source + i, a, n, scale, target + i, b)
                    done += W
            for i in range(done, inner):
                total = REAL(0)
                for t in range(n):
                    total += get(REAL, x[1], source + t * a + i * x_inner)
                    put(REAL, out[1], target + t * b + i * out_inner, total * scale)

    return cumsum_kernel


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
    cu_seqlens : int64 array, shape ``[N + 1]``, or None
        Boundaries along the axis at which chunks start anew.
    """
    REAL = np.float64 if out.dtype == "float64" else np.float32
    others = [i for i in range(len(x.shape)) if i != axis]
    # lanes run along the axis with the smallest stride
    inner = min(others, key=lambda i: abs(x.strides[i]), default=None)
    outer = [i for i in others if i != inner]
    lines = np.stack([addresses(x, outer), addresses(out, outer)], axis=1)
    bounds = chunk_bounds(x.shape[axis], chunk_size, cu_seqlens)
    desc = np.zeros(LENGTH, np.int64)
    for index, view in ((G, x), (O, out)):
        desc[index + 1] = DTYPES.index(view.dtype)
        desc[index + 2] = view.strides[axis]
        desc[index + 3] = 0 if inner is None else view.strides[inner]
    desc[LINES], desc[BOUNDS] = lines.ctypes.data, bounds.ctypes.data
    desc[N], desc[T], desc[V] = len(lines), len(bounds), 1 if inner is None else x.shape[inner]
    desc[REVERSE] = reverse
    put_float(desc, SCALE, scale)
    run(_cumsum_kernel(REAL), desc, len(lines) * len(bounds), 0, thread_count())
