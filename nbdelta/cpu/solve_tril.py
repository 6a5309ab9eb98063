"""Blocked lower triangular solves, the inverse of I + A included.

With D the diagonal, ``x = D^-1 b - (D^-1 L) x`` row by row. Blocks of 16 rows: earlier rows of x
enter by a product, the 16 x 16 diagonal block is solved by substitution in registers. The same
tile does both here and in the chunked prefill. An inverse is the solve against the identity, block
column by block column, without the zero blocks.
"""

from functools import cache

import numpy as np

from nbdelta.cpu._call import (
    ITEMS,
    LENGTH,
    NEXT,
    PARTS,
    SCRATCH,
    SCRATCH_STEP,
    G,
    K,
    O,
    V,
    array_at,
)
from nbdelta.cpu._jit import kernel, njit
from nbdelta.cpu._memory import (
    DTYPES,
    fill_row,
    get,
    load_tokens,
    real_of,
    save,
    store_row,
    zero_rows,
)
from nbdelta.cpu._simd import W, claim, itemsize, read_int64, tile_rows
from nbdelta.cpu._solve_tiles import solve
from nbdelta.cpu._team import run, thread_count
from nbdelta.cpu._tiles import pack_columns
from nbdelta.cpu.chunk_cumsum import addresses, chunk_bounds

# descriptor fields of this kernel: table of (address of L, of b or 0, of x, rows) for every matrix
MATRICES, UNIT_DIAGONAL = 88, 89
B_FIELD = 0  # the right-hand side's dtype and strides stand in the descriptor's first array


def layout(base, SIZE, n, strips):
    """Addresses of staged rows, right-hand side, two factors and strips, and their end."""
    row = W * SIZE
    rows = (n + W - 1) // W * W
    staged = base + rows * row
    right = staged + W * row
    inverse = right + W * row
    negative = inverse + row
    strip = negative + row
    return staged, right, inverse, negative, strip, strip + strips * rows * row


_layout = njit()(layout)


@njit()
def _diagonal(REAL, code, source, row_step, step, n, unit, inverse, negative):
    """1 / D and -1 / D for the n rows of a block; padding rows are those of the identity."""
    SIZE = itemsize(REAL)
    for i in range(W):
        factor = REAL(1)
        if i < n and not unit:
            factor = REAL(1) / get(REAL, code, source + i * (row_step + step))
        save(REAL, inverse + i * SIZE, factor)
        save(REAL, negative + i * SIZE, -factor)


@cache
def _solve_kernel(REAL):
    SIZE = np.dtype(REAL).itemsize
    ROW = W * SIZE
    MR = tile_rows(SIZE)

    @kernel(REAL)
    def solve_kernel(desc, worker):
        matrix, b, out = array_at(desc, G), array_at(desc, B_FIELD), array_at(desc, O)
        columns, parts = desc[V], desc[PARTS]
        strips = (columns + W - 1) // W
        per_part = (strips + parts - 1) // parts
        panel = desc[SCRATCH] + worker * desc[SCRATCH_STEP]
        staged, right, inverse, negative, x, _ = _layout(panel, SIZE, desc[K], per_part)
        while True:
            item = claim(desc, NEXT)
            if item >= desc[ITEMS]:
                break
            entry = desc[MATRICES] + item // parts * 32
            source, b_source = read_int64(entry), read_int64(entry + 8)
            target, n = read_int64(entry + 16), read_int64(entry + 24)
            strip_step = (n + W - 1) // W * W * ROW
            first = item % parts * per_part
            last = min(first + per_part, strips)
            for i in range(0, n, W):
                rows = min(W, n - i)
                block = source + i * matrix[2]
                _diagonal(
                    REAL, matrix[1], block + i * matrix[3], matrix[2], matrix[3], rows,
                    desc[UNIT_DIAGONAL], inverse, negative,
                )  # fmt: skip
                for c in range(0, i + W, W):
                    width = min(W, n - c)
                    load_tokens(
                        REAL, matrix[1], block + c * matrix[3], matrix[2], matrix[3], rows,
                        width, staged,
                    )  # fmt: skip
                    pack_columns(REAL, staged, ROW, negative, panel + c * ROW)
                for s in range(first, last):
                    width = min(W, columns - s * W)
                    strip = x + (s - first) * strip_step
                    if b_source:
                        load_tokens(
                            REAL, b[1], b_source + i * b[2] + s * W * b[3], b[2], b[3], rows,
                            width, right,
                        )  # fmt: skip
                    else:
                        zero_rows(REAL, right, W)
                        if i == s * W:
                            for j in range(rows):
                                save(REAL, right + j * (ROW + SIZE), REAL(1))
                    if b_source or i >= s * W:
                        for j in range(0, W, MR):
                            solve(REAL, panel, strip, i, j, right, ROW, inverse)
                    else:
                        for j in range(W):
                            fill_row(REAL, REAL(0), strip + (i + j) * ROW)
                    for j in range(rows):
                        store_row(
                            REAL, out[1], strip + (i + j) * ROW, width,
                            target + (i + j) * out[2] + s * W * out[3], out[3],
                        )  # fmt: skip

    return solve_kernel


def _run(matrix, b, out, axes, table, rows, columns, unit_diagonal):
    """Start the kernel; `axes` are the row and column axis of each view."""
    REAL = real_of(matrix.dtype)
    desc = np.zeros(LENGTH, np.int64)
    for index, view in ((G, matrix), (B_FIELD, b), (O, out)):
        desc[index + 1] = DTYPES.index(view.dtype)
        desc[index + 2], desc[index + 3] = view.strides[axes[0]], view.strides[axes[1]]
    desc[MATRICES], desc[UNIT_DIAGONAL] = table.ctypes.data, unit_diagonal
    desc[K], desc[V] = rows, columns
    threads, strips = thread_count(), -(-columns // W)
    parts = min(strips, -(-threads // len(table))) if len(table) else 1
    per_part = -(-strips // max(parts, 1))
    parts = -(-strips // max(per_part, 1))
    desc[PARTS] = parts
    scratch = layout(0, np.dtype(REAL).itemsize, rows, per_part)[-1]
    run(_solve_kernel(REAL), desc, len(table) * parts, scratch, threads)


def solve_tril(A, out, cu_seqlens):
    """Fill `out` with ``(I + A)^-1`` of every chunk; both are ``[B, T, H, BT]``."""
    B, T, H, BT = A.shape
    bounds = chunk_bounds(T, BT, cu_seqlens)
    starts, rows = bounds[:, 0], bounds[:, 1] - bounds[:, 0]

    def places(view):
        heads = addresses(view, (0, 2))
        return (heads[:, None] + starts * view.strides[1]).ravel()

    table = np.zeros((B * H * len(bounds), 4), np.int64)
    table[:, 0], table[:, 2] = places(A), places(out)
    table[:, 3] = np.tile(rows, B * H)
    _run(A, A, out, (1, 3), table, BT, BT, True)


def solve_triangular(L, b, out, unit_diagonal):
    """Fill `out` with the solutions of ``L x = b``; leading axes have one shape."""
    batch = range(len(b.shape) - 2)
    n, m = b.shape[-2:]
    table = np.stack(
        [
            *(addresses(view, batch) for view in (L, b, out)),
        ],
        axis=1,
    )
    table = np.concatenate([table, np.full((len(table), 1), n, np.int64)], axis=1)
    _run(L, b, out, (-2, -1), np.ascontiguousarray(table), n, m, unit_diagonal)
