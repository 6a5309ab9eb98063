"""Blocked lower triangular solves, the inverse of I + A included.

Both kernels keep the negative of the matrix in shared memory, so that every step is a sum of
products. A thread has 4 rows and up to 4 columns of a tile in registers, some apart, so that
neighbouring threads read neighbouring words.
"""

import math

import numpy as np
from numba import cuda, types

from nbdelta.arrays import empty
from nbdelta.cuda._call import put_array
from nbdelta.cuda._jit import device, kernel, place_of, specialised
from nbdelta.cuda._memory import DTYPES, fields, reader, real_of, writer
from nbdelta.cuda._shared import element, set_element
from nbdelta.cuda.chunk_cumsum import chunk_at, chunk_slots, merged

THREADS = 64
# rows that a block of threads inverts: one matrix of 64, two of 32, four of 16
SLAB = 64
# side of a diagonal block that is solved by substitution, and its rows in shared memory
BC, BC_PITCH = 16, 17
# side of a tile of `solve_triangular`
SIDE = 32
# numbers added to a row in shared memory: 4 rows of 8 columns, or a column, are in banks apart
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
def _add_product(acc, n, a, a_row, step, b, b_column, pitch, columns, end):
    """acc[r, c] += sum over m < n of a[a_row + step r pitch + m] b[b_column + m pitch + 8 c].

    From `end` on row 0 of a is zero, row r step later: there it is not touched, as b may be NaN.
    """
    for m in range(n):
        for r in range(4):
            if m < end + step * r:
                factor = element(a, a_row + step * r * pitch + m)
                for c in range(4):
                    if c < columns:
                        acc[r, c] += factor * element(b, b_column + m * pitch + 8 * c)


@device
def _merge(s_a, acc, n, BT, tid, zero):
    """Inverses of n x n on the diagonal to such of 2n x 2n: X21 = X22 (-A21 X11)."""
    step, columns, pitch = n // 4, n // 8, BT + PAD
    tx, ty = tid & 7, tid >> 3 & (step - 1)
    # while there are two pairs, each has half of the threads
    top = tid & SLAB // 2 if n < SLAB // 2 else 0
    left = top & (BT - 1)
    low_row = (top + n + ty) * pitch + left
    upper, lower = top * pitch + left + tx, (top + n) * pitch + left + tx
    _clear(acc, zero)
    _add_product(acc, n, s_a, low_row, step, s_a, upper, pitch, columns, n)
    cuda.syncthreads()
    for r in range(4):
        for c in range(4):
            if c < columns:
                set_element(s_a, low_row + step * r * pitch + tx + 8 * c, acc[r, c])
    cuda.syncthreads()
    _clear(acc, zero)
    _add_product(acc, n, s_a, low_row + n, step, s_a, lower, pitch, columns, ty + 1)
    cuda.syncthreads()
    for r in range(4):
        for c in range(4):
            if c < columns:
                set_element(s_a, low_row + step * r * pitch + tx + 8 * c, acc[r, c])
    cuda.syncthreads()


@specialised
def _tril_kernel(DTYPE, BT):
    REAL = real_of(DTYPE)
    get, put = reader(DTYPE, REAL), writer(DTYPE, REAL)
    MATRICES, PITCH, LOG = SLAB // BT, BT + PAD, BT.bit_length() - 1
    SIZE, BC_SIZE, STEP = SLAB * PITCH, SLAB * BC_PITCH, THREADS // BT
    # about as many as there is shared memory for
    BLOCKS = 10 if REAL == types.float32 else 8 if BT < 64 else 4

    @kernel(THREADS, BLOCKS)
    def tril_kernel(desc):
        s_a = cuda.shared.array(SIZE, REAL)
        s_x = cuda.shared.array(BC_SIZE, REAL)
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

        # a thread copies one column of every matrix, from its own row on
        c, above = tid & (BT - 1), tid >> LOG
        source = a[0] + b * a[2] + h * a[4] + c * a[5]
        target = ai[0] + b * ai[2] + h * ai[4] + c * ai[5]
        for m in range(MATRICES):
            n, row = s_n[m], above
            address, place = source + (s_first[m] + row) * a[3], (m * BT + row) * PITCH + c
            while row < BT:
                set_element(s_a, place, -get(address) if c < row < n else REAL(0))
                row, address, place = row + STEP, address + STEP * a[3], place + STEP * PITCH
        cuda.syncthreads()

        # a thread has one column of the inverse of a diagonal block
        top, j = tid & -BC, tid & (BC - 1)
        corner, column = top * PITCH + (top & (BT - 1)), top * BC_PITCH + j
        for i in range(BC):
            x = REAL(1) if i == j else REAL(0)
            m = 0
            while m < i:
                x += element(s_a, corner + i * PITCH + m) * element(s_x, column + m * BC_PITCH)
                m += 1
            # zero where zero times NaN came in
            set_element(s_x, column + i * BC_PITCH, x if j <= i else REAL(0))
        cuda.syncthreads()
        for i in range(BC):
            set_element(s_a, corner + i * PITCH + j, element(s_x, column + i * BC_PITCH))
        cuda.syncthreads()
        if BT > 16:
            _merge(s_a, acc, 16, BT, tid, REAL(0))
        if BT > 32:
            _merge(s_a, acc, 32, BT, tid, REAL(0))

        for m in range(MATRICES):
            n, row = s_n[m], above
            address, place = target + (s_first[m] + row) * ai[3], (m * BT + row) * PITCH + c
            while row < n:
                put(address, element(s_a, place))
                row, address, place = row + STEP, address + STEP * ai[3], place + STEP * PITCH

    return tril_kernel


@device
def _matrix(view, i, j, k):
    """Address of a matrix, strides of its rows and columns."""
    return view[0] + i * view[3] + j * view[4] + k * view[5], view[1], view[2]


@specialised
def _triangular_kernel(DTYPE):
    REAL = real_of(DTYPE)
    get, put = reader(DTYPE, REAL), writer(DTYPE, REAL)
    # earlier rows of x are read again, and not as rounded as the result
    ROUNDED = DTYPE not in ("float32", "float64")
    get_x, put_x = reader(str(REAL), REAL), writer(str(REAL), REAL)
    PITCH = SIDE + PAD
    SIZE = SIDE * PITCH

    @kernel(THREADS, 6)
    def triangular_kernel(desc):
        s_l = cuda.shared.array(SIZE, REAL)
        s_x = cuda.shared.array(SIZE, REAL)
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
        # in tiles of registers a thread has a row and a column, in copies a column and a row
        tx, ty = tid & 7, tid >> 3
        lane, half = tid & 31, tid >> 5
        right += left * b_column
        x, out = x + (left + lane) * x_column, out + (left + lane) * out_column

        for top in range(0, desc[ROWS], SIDE):
            n = min(SIDE, desc[ROWS] - top)
            for r in range(4):
                for c in range(4):
                    row, column = ty + 8 * r, tx + 8 * c
                    acc[r, c] = REAL(0)
                    if row < n and column < width:
                        acc[r, c] = get(right + (top + row) * b_row + column * b_column)
            for m in range(0, top, SIDE):
                for i in range(SIDE // 2):
                    row = 2 * i + half
                    l, known = REAL(0), REAL(0)
                    if row < n:
                        l = -get(matrix + (top + row) * l_row + (m + lane) * l_column)
                    if lane < width:
                        known = get_x(x + (m + row) * x_row)
                    set_element(s_l, row * PITCH + lane, l)
                    set_element(s_x, row * PITCH + lane, known)
                cuda.syncthreads()
                _add_product(acc, SIDE, s_l, ty * PITCH, 8, s_x, tx, PITCH, 4, SIDE)
                cuda.syncthreads()

            for i in range(SIDE // 2):
                row = 2 * i + half
                address = matrix + (top + row) * l_row + (top + lane) * l_column
                if lane < row < n:
                    set_element(s_l, row * PITCH + lane, -get(address))
                if lane == row < n:
                    inverse = REAL(1) if desc[UNIT_DIAGONAL] else REAL(1) / get(address)
                    set_element(s_inverse, row, inverse)
            for r in range(4):
                for c in range(4):
                    set_element(s_x, (ty + 8 * r) * PITCH + tx + 8 * c, acc[r, c])
            cuda.syncthreads()
            if tid < SIDE:
                for row in range(n):
                    total = element(s_x, row * PITCH + tid)
                    m = 0
                    while m < row:
                        total += element(s_l, row * PITCH + m) * element(s_x, m * PITCH + tid)
                        m += 1
                    set_element(s_x, row * PITCH + tid, total * element(s_inverse, row))
            cuda.syncthreads()
            for i in range(SIDE // 2):
                row = 2 * i + half
                if row < n and lane < width:
                    solution = element(s_x, row * PITCH + lane)
                    put(out + (top + row) * out_row, solution)
                    if ROUNDED:
                        put_x(x + (top + row) * x_row, solution)
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
    x = out if out.dtype == str(real_of(out.dtype)) else empty(out, out.shape, "float32")
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
