"""Blocked lower triangular solves, the inverse of I + A included.

Both kernels keep the negative of the matrix in shared memory, so that every step is a sum of
products. A thread has 4 rows and up to 4 columns of a tile in registers, some apart, so that
neighbouring threads read neighbouring words.
"""

import math
from functools import cache

import numpy as np
from numba import cuda, types

from nbdelta.arrays import empty
from nbdelta.cuda._call import put_array
from nbdelta.cuda._jit import device, kernel, place_of
from nbdelta.cuda._memory import DTYPES, fields, reader, real_of, writer
from nbdelta.cuda.chunk_cumsum import chunk_at, chunk_slots, merged

THREADS = 64
# rows that a block of threads inverts: one matrix of 64, two of 32, four of 16
SLAB = 64
# sides of a diagonal block that is solved by substitution, and its rows in shared memory
BC, BC_PITCH = 16, 17
# sides of a tile of `solve_triangular`, and its rows in shared memory
SIDE = 32
# numbers added to a row in shared memory: then rows of 8 numbers, and columns, are in banks apart
PAD = 8

# descriptor of solve_tril: A and the result, boundaries of packed sequences (N of them), sizes
SOURCE, AI, CU_SEQLENS, N, B, T, H, SLOTS = 0, 6, 12, 18, 19, 20, 21, 22
TRIL_LENGTH = 23
# descriptor of solve_triangular: addresses, strides of rows and columns, and of three axes of
# matrices; sizes of two of these axes, and of the matrices
MATRIX, RIGHT, X, OUT, SIZES, ROWS, COLUMNS, UNIT_DIAGONAL = 0, 6, 12, 18, 24, 26, 27, 28
TRIANGULAR_LENGTH = 29

_six, _three, _two = fields(6), fields(3), fields(2)


@device
def _clear(acc, zero):
    for r in range(4):
        for c in range(4):
            acc[r, c] = zero


@device
def _add_product(acc, columns, n, a, i, j, b, k, l, ty, step, lower):
    """acc[r, c] += a[i + r', j:j + n] b[k:k + n, l + 8 c] of row r' = ty + step r.

    With `lower` a row of a ends at the diagonal: what is right of it may be zero times NaN.
    """
    for m in range(n):
        for r in range(4):
            if not lower or m <= ty + step * r:
                factor = a[i + ty + step * r, j + m]
                for c in range(4):
                    if c < columns:
                        acc[r, c] += factor * b[k + m, l + 8 * c]


@device
def _merge(s_a, acc, n, BT, tid, zero):
    """Inverses of n x n on the diagonal to such of 2n x 2n: X21 = X22 (-A21 X11)."""
    # both halves of the threads have a pair of their own while there are two
    top = tid & SLAB // 2 if n < SLAB // 2 else 0
    low, left = top + n, top & (BT - 1)
    step, columns = n // 4, n // 8
    tx, ty = tid & 7, tid >> 3 & (step - 1)
    for first in (True, False):
        _clear(acc, zero)
        if first:
            _add_product(acc, columns, n, s_a, low, left, s_a, top, left + tx, ty, step, False)
        else:
            _add_product(acc, columns, n, s_a, low, left + n, s_a, low, left + tx, ty, step, True)
        cuda.syncthreads()
        for r in range(4):
            for c in range(4):
                if c < columns:
                    s_a[low + ty + step * r, left + tx + 8 * c] = acc[r, c]
        cuda.syncthreads()


@cache
def _tril_kernel(DTYPE, BT):
    REAL = real_of(DTYPE)
    get, put = reader(DTYPE, REAL), writer(DTYPE, REAL)
    MATRICES, PITCH, LOG = SLAB // BT, BT + PAD, BT.bit_length() - 1

    @kernel(THREADS, 8)
    def tril_kernel(desc):
        s_a = cuda.shared.array((SLAB, PITCH), REAL)
        s_x = cuda.shared.array((SLAB, BC_PITCH), REAL)
        s_first = cuda.shared.array(MATRICES, types.int64)
        s_n = cuda.shared.array(MATRICES, types.int64)
        acc = cuda.local.array((4, 4), REAL)
        tid = cuda.threadIdx.x
        a, ai = _six(desc, SOURCE), _six(desc, AI)
        rest, h = cuda.blockIdx.x // desc[H], cuda.blockIdx.x % desc[H]
        slabs = (desc[SLOTS] + MATRICES - 1) // MATRICES
        b, slab = rest // slabs, rest % slabs
        if tid < MATRICES:
            slot = slab * MATRICES + tid
            first, n = chunk_at(_three(desc, CU_SEQLENS), desc[N], desc[T], BT, slot)
            s_first[tid], s_n[tid] = first, n if slot < desc[SLOTS] else 0
        cuda.syncthreads()

        source, target = a[0] + b * a[2] + h * a[4], ai[0] + b * ai[2] + h * ai[4]
        c, above = tid & (BT - 1), tid >> LOG
        for i in range(0, SLAB, MATRICES):
            row = i + above
            m, r = row >> LOG, row & (BT - 1)
            x = REAL(0)
            if c < r < s_n[m]:
                x = -get(source + (s_first[m] + r) * a[3] + c * a[5])
            s_a[row, c] = x
        cuda.syncthreads()

        # one column of the inverse of a diagonal block
        top, j = tid & -BC, tid & (BC - 1)
        left = top & (BT - 1)
        for i in range(BC):
            x = REAL(1) if i == j else REAL(0)
            for m in range(i):
                x += s_a[top + i, left + m] * s_x[top + m, j]
            # zero where zero times NaN came in
            s_x[top + i, j] = x if j <= i else REAL(0)
        cuda.syncthreads()
        for i in range(BC):
            s_a[top + i, left + j] = s_x[top + i, j]
        cuda.syncthreads()
        if BT > 16:
            _merge(s_a, acc, 16, BT, tid, REAL(0))
        if BT > 32:
            _merge(s_a, acc, 32, BT, tid, REAL(0))

        for i in range(0, SLAB, MATRICES):
            row = i + above
            m, r = row >> LOG, row & (BT - 1)
            if r < s_n[m]:
                put(target + (s_first[m] + r) * ai[3] + c * ai[5], s_a[row, c])

    return tril_kernel


@device
def _matrix(view, i, j, k):
    """Address of a matrix, strides of its rows and columns."""
    return view[0] + i * view[3] + j * view[4] + k * view[5], view[1], view[2]


@cache
def _triangular_kernel(DTYPE):
    REAL = real_of(DTYPE)
    get, put = reader(DTYPE, REAL), writer(DTYPE, REAL)
    # earlier rows of x are read again, and not as rounded as the result
    ROUNDED = DTYPE not in ("float32", "float64")
    get_x, put_x = reader(str(REAL), REAL), writer(str(REAL), REAL)
    PITCH = SIDE + PAD

    @kernel(THREADS, 8)
    def triangular_kernel(desc):
        s_l = cuda.shared.array((SIDE, PITCH), REAL)
        s_x = cuda.shared.array((SIDE, PITCH), REAL)
        s_inverse = cuda.shared.array(SIDE, REAL)
        acc = cuda.local.array((4, 4), REAL)
        tid = cuda.threadIdx.x
        strips = (desc[COLUMNS] + SIDE - 1) // SIDE
        rest, left = cuda.blockIdx.x // strips, cuda.blockIdx.x % strips * SIDE
        sizes = _two(desc, SIZES)
        rest, i = rest // sizes[0], rest % sizes[0]
        k, j = rest // sizes[1], rest % sizes[1]
        matrix, l_row, l_column = _matrix(_six(desc, MATRIX), i, j, k)
        right, b_row, b_column = _matrix(_six(desc, RIGHT), i, j, k)
        x, x_row, x_column = _matrix(_six(desc, X), i, j, k)
        out, out_row, out_column = _matrix(_six(desc, OUT), i, j, k)
        width = min(SIDE, desc[COLUMNS] - left)
        right, x, out = right + left * b_column, x + left * x_column, out + left * out_column
        tx, ty = tid & 7, tid >> 3
        lane, half = tid & 31, tid >> 5

        for top in range(0, desc[ROWS], SIDE):
            n = min(SIDE, desc[ROWS] - top)
            for r in range(4):
                for c in range(4):
                    row, column = ty + 8 * r, tx + 8 * c
                    acc[r, c] = REAL(0)
                    if row < n and column < width:
                        acc[r, c] = get(right + (top + row) * b_row + column * b_column)
            for m in range(0, top, SIDE):
                for row in range(half, SIDE, 2):
                    s_l[row, lane] = s_x[row, lane] = REAL(0)
                    if row < n:
                        at = matrix + (top + row) * l_row + (m + lane) * l_column
                        s_l[row, lane] = -get(at)
                    if lane < width:
                        s_x[row, lane] = get_x(x + (m + row) * x_row + lane * x_column)
                cuda.syncthreads()
                _add_product(acc, 4, SIDE, s_l, 0, 0, s_x, 0, tx, ty, 8, False)
                cuda.syncthreads()

            for row in range(half, n, 2):
                at = matrix + (top + row) * l_row + (top + lane) * l_column
                if lane < row:
                    s_l[row, lane] = -get(at)
                if lane == row:
                    s_inverse[row] = REAL(1) if desc[UNIT_DIAGONAL] else REAL(1) / get(at)
            for r in range(4):
                for c in range(4):
                    s_x[ty + 8 * r, tx + 8 * c] = acc[r, c]
            cuda.syncthreads()
            if tid < SIDE:
                for row in range(n):
                    total = s_x[row, tid]
                    for m in range(row):
                        total += s_l[row, m] * s_x[m, tid]
                    s_x[row, tid] = total * s_inverse[row]
            cuda.syncthreads()
            if lane < width:
                for row in range(half, n, 2):
                    put(out + (top + row) * out_row + lane * out_column, s_x[row, lane])
                    if ROUNDED:
                        put_x(x + (top + row) * x_row + lane * x_column, s_x[row, lane])
            cuda.syncthreads()

    return triangular_kernel


def specialisations():
    """Name, kernel, descriptor length and dynamic shared memory of all that is ever launched."""
    for dtype in DTYPES[:4]:
        for BT in (16, 32, 64):
            yield f"tril {dtype}, BT {BT}", _tril_kernel(dtype, BT), TRIL_LENGTH, 0
        yield f"triangular {dtype}", _triangular_kernel(dtype), TRIANGULAR_LENGTH, 0


def solve_tril(A, out, cu_seqlens):
    """Fill `out` with ``(I + A)^-1`` of every chunk; both are ``[B, T, H, BT]``."""
    desc = np.zeros(TRIL_LENGTH, np.int64)
    put_array(desc, SOURCE, A)
    put_array(desc, AI, out)
    desc[B], desc[T], desc[H], BT = A.shape
    if cu_seqlens is not None:
        put_array(desc, CU_SEQLENS, cu_seqlens)
        desc[N] = cu_seqlens.shape[0] - 1
    desc[SLOTS] = slots = chunk_slots(A.shape[1], BT, cu_seqlens)
    blocks = A.shape[0] * A.shape[2] * -(-slots * BT // SLAB)
    _tril_kernel(A.dtype, BT).launch((blocks, 1, 1), desc, place_of(A))


def solve_triangular(L, b, out, unit_diagonal):
    """Fill `out` with the solutions of ``L x = b``; leading axes have one shape."""
    n, m = b.shape[-2:]
    x = out if str(real_of(out.dtype)) == out.dtype else empty(out, out.shape, "float32")
    views = L, b, x, out
    axes = merged(list(zip(b.shape[:-2], *(view.strides[:-2] for view in views))))
    axes += [(1, 0, 0, 0, 0)] * (3 - len(axes))
    desc = np.zeros(TRIANGULAR_LENGTH, np.int64)
    desc[SIZES : SIZES + 2] = axes[0][0], axes[1][0]
    desc[ROWS], desc[COLUMNS], desc[UNIT_DIAGONAL] = n, m, unit_diagonal
    for i, view in enumerate(views):
        strides = [axis[1 + i] for axis in axes[:3]]
        desc[6 * i + 1 : 6 * i + 6] = *view.strides[-2:], *strides
    blocks = -(-m // SIDE) * math.prod([axis[0] for axis in axes[:3]])
    run = _triangular_kernel(b.dtype)
    # a launch for each index over axes beyond the third that cannot be merged: nobody has them
    for index in np.ndindex(*[axis[0] for axis in axes[3:]]):
        for i, view in enumerate(views):
            steps = [axis[1 + i] for axis in axes[3:]]
            desc[6 * i] = view.address + sum(j * step for j, step in zip(index, steps))
        run.launch((blocks, 1, 1), desc, place_of(b))
