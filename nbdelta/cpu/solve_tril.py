"""Blocked lower triangular solves, the inverse of I + A included.

With D the diagonal, ``x = D^-1 b - (D^-1 L) x`` row by row. Blocks of 16 rows: earlier rows of x
enter by a product, the 16 x 16 diagonal block is solved by substitution in registers. The same
tile does both here and in the chunked prefill. An inverse is the solve against the identity, block
column by block column, without the zero blocks.
"""

from functools import cache, lru_cache

import numpy as np

from nbdelta.cpu._call import (
    LENGTH,
    PARTS,
    SCRATCH,
    SCRATCH_STEP,
    G,
    K,
    O,
    V,
    array_at,
    next_item,
)
from nbdelta.cpu._cumsum_blocks import chunk_bounds, offsets
from nbdelta.cpu._descriptor import read_int64
from nbdelta.cpu._jit import kernel, njit
from nbdelta.cpu._memory import (
    DTYPES,
    fill_row,
    get,
    is_plain,
    load_tokens,
    real_of,
    save,
    store_row,
    zero_rows,
)
from nbdelta.cpu._simd import itemsize
from nbdelta.cpu._solve_tiles import invert, solve
from nbdelta.cpu._team import BATCH_FLOPS, run, thread_count
from nbdelta.cpu._tiles import pack_columns
from nbdelta.cpu._vector_unit import W, tile_rows

# descriptor fields of this kernel: table of (address of L, of b or 0, of x, rows) for every matrix
MATRICES, UNIT_DIAGONAL = 88, 89
# products and sums below which the work is not shared, and no thread is woken for it
SERIAL_FLOPS, BRIEF_FLOPS = 1 << 21, 1 << 24
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
def _diagonal(REAL, code, source, step, n, unit, inverse, negative):
    """1 / D and -1 / D for the n rows of a block; padding rows are those of the identity."""
    SIZE = itemsize(REAL)
    fill_row(REAL, REAL(1), inverse)
    if not unit:
        for i in range(n):
            save(REAL, inverse + i * SIZE, get(REAL, code, source + i * step))
    invert(REAL, inverse, inverse, negative)


@njit()
def _is_tile(REAL, x, rows, width):
    """Whether 16 x 16 numbers serve where they lie."""
    return rows == W and width == W and is_plain(REAL, x[1], x[3], width)


@cache
def _solve_kernel(REAL):
    SIZE = np.dtype(REAL).itemsize
    ROW = W * SIZE
    MR = tile_rows(SIZE)

    @kernel(REAL)
    def solve_kernel(desc, worker):
        matrix, b, out = array_at(desc, G), array_at(desc, B_FIELD), array_at(desc, O)
        columns, parts, unit = desc[V], desc[PARTS], desc[UNIT_DIAGONAL]
        strips = (columns + W - 1) // W
        per_part = (strips + parts - 1) // parts
        panel = desc[SCRATCH] + worker * desc[SCRATCH_STEP]
        staged, right, inverse, negative, x, _ = _layout(panel, SIZE, desc[K], per_part)
        while True:
            item = next_item(desc, worker)
            if item < 0:
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
                    REAL, matrix[1], block + i * matrix[3], matrix[2] + matrix[3], rows, unit,
                    inverse, negative,
                )  # fmt: skip
                for c in range(0, i + W, W):
                    place, step = block + c * matrix[3], matrix[2]
                    width = min(W, n - c)
                    if not _is_tile(REAL, matrix, rows, width):
                        load_tokens(
                            REAL, matrix[1], place, matrix[2], matrix[3], rows, width, staged
                        )  # fmt: skip
                        place, step = staged, ROW
                    pack_columns(REAL, place, step, negative, panel + c * ROW)
                for s in range(first, last):
                    width = min(W, columns - s * W)
                    strip = x + (s - first) * strip_step
                    result, known = target + i * out[2] + s * W * out[3], 0
                    place, step = b_source + i * b[2] + s * W * b[3], b[2]
                    if not b_source:
                        # columns of the identity: rows above their block are zero
                        place, step, known = right, ROW, min(s * W, i)
                        zero_rows(REAL, right, W)
                        if i == s * W:
                            for j in range(rows):
                                save(REAL, right + j * (ROW + SIZE), REAL(1))
                    elif not _is_tile(REAL, b, rows, width):
                        load_tokens(REAL, b[1], place, b[2], b[3], rows, width, right)
                        place, step = right, ROW
                    direct = _is_tile(REAL, out, rows, width)
                    solved, solved_step = (result, out[2]) if direct else (right, ROW)
                    if b_source or i >= s * W:
                        for j in range(0, W, MR):
                            solve(
                                REAL, panel + known * ROW, strip + known * ROW, i - known, j,
                                place, step, inverse, solved, solved_step,
                            )  # fmt: skip
                    else:
                        for j in range(W):
                            fill_row(REAL, REAL(0), solved + j * solved_step)
                    if not direct:
                        for j in range(rows):
                            store_row(
                                REAL, out[1], right + j * ROW, width, result + j * out[2], out[3]
                            )  # fmt: skip

    return solve_kernel


def _run(matrix, b, out, axes, table, rows, columns, unit_diagonal):
    """Start the kernel; `axes` are the row and column axis of each view."""
    if len(table) == 0 or columns == 0:
        return
    REAL = real_of(matrix.dtype)
    desc = np.zeros(LENGTH, np.int64)
    for index, view in ((G, matrix), (B_FIELD, b), (O, out)):
        desc[index + 1 : index + 4] = (
            DTYPES.index(view.dtype), view.strides[axes[0]], view.strides[axes[1]],
        )  # fmt: skip
    desc[MATRICES], desc[UNIT_DIAGONAL] = table.ctypes.data, unit_diagonal
    desc[K], desc[V] = rows, columns
    flops = len(table) * rows * rows * columns
    threads, strips = thread_count() if flops >= SERIAL_FLOPS else 1, -(-columns // W)
    # columns go their own way where threads are more than matrices, or these are large
    long = min(strips // 8, rows * rows * columns // BATCH_FLOPS)
    parts = min(strips, max(-(-threads // len(table)), long))
    per_part = -(-strips // parts)
    parts = -(-strips // per_part)
    desc[PARTS] = parts
    scratch = layout(0, np.dtype(REAL).itemsize, rows, per_part)[-1]
    brief, items = flops < BRIEF_FLOPS, len(table) * parts
    # a small matrix takes twice as long as its flops
    flops = 2 * flops // items
    run(_solve_kernel(REAL), desc, items, scratch, threads, brief, flops=flops, shares=True)


def _chunks(shape, strides, out_strides, cu_seqlens=None):
    """Table of the chunks of ``[B, T, H, BT]``, with offsets for addresses.

    Heads vary fastest: they usually lie side by side, in the same pages of memory.
    """
    B, T, H, BT = shape
    bounds = chunk_bounds(T, BT, cu_seqlens)
    table = np.zeros((B, len(bounds), H, 4), np.int64)
    for column, s in ((0, strides), (2, out_strides)):
        heads = offsets((B, H), (s[0], s[2])).reshape(B, 1, H)
        table[..., column] = heads + bounds[:, :1] * s[1]
    table[..., 3] = bounds[:, 1:] - bounds[:, :1]
    return table.reshape(-1, 4)


def _matrices(batch, *strides):
    """Table of the matrices of a batch, with offsets for addresses, and no rows."""
    columns = [offsets(batch, s) for s in strides]
    return np.stack([*columns, np.zeros_like(columns[0])], axis=1)


_kept_chunks, _kept_matrices = lru_cache(maxsize=16)(_chunks), lru_cache(maxsize=16)(_matrices)


def solve_tril(A, out, cu_seqlens):
    """Fill `out` with ``(I + A)^-1`` of every chunk; both are ``[B, T, H, BT]``.

    A thread's scratch is 16 rows of A, the columns of one inverse and two tiles of 16 x 16: 26 KB
    for chunks of 64, twice that in float64.
    """
    layouts = A.shape, A.strides, out.strides
    table = _kept_chunks(*layouts) if cu_seqlens is None else _chunks(*layouts, cu_seqlens)
    table = table + np.array((A.address, 0, out.address, 0))
    BT = A.shape[-1]
    _run(A, A, out, (1, 3), table, BT, BT, True)


def solve_triangular(L, b, out, unit_diagonal):
    """Fill `out` with the solutions of ``L x = b``; leading axes have one shape.

    A thread's scratch is the columns of one x that it solves for, 16 rows of L and two tiles of
    16 x 16.
    """
    *batch, n, m = b.shape
    table = _kept_matrices(tuple(batch), *(x.strides[:-2] for x in (L, b, out)))
    table = table + np.array((L.address, b.address, out.address, n))
    _run(L, b, out, (-2, -1), table, n, m, unit_diagonal)
