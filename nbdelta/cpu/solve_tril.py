"""Blocked lower triangular solves, the inverse of I + A included.

With D the diagonal, ``x = D^-1 b - (D^-1 L) x`` row by row. Blocks of 16 rows: earlier rows of x
enter by a product, the 16 x 16 diagonal block is solved by substitution in registers. The same
tile does both here and in the chunked prefill. An inverse is the solve against the identity, block
column by block column, without the zero blocks.
"""

from functools import cache, lru_cache
from typing import Any, NamedTuple

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
    store_tokens,
    zero_rows,
)
from nbdelta.cpu._simd import itemsize
from nbdelta.cpu._solve_tiles import invert, scale_rows, solve
from nbdelta.cpu._team import BATCH_FLOPS, run, thread_count
from nbdelta.cpu._vector_unit import W, side_by_side

# descriptor fields of this kernel: table of the places of every matrix in L, b and x and its rows
MATRICES, UNIT_DIAGONAL = 88, 89
# products and sums below which the work is not shared, and no thread is woken for it
SERIAL_FLOPS, BRIEF_FLOPS = 1 << 21, 1 << 24
B_FIELD = 0  # the right-hand side is the descriptor's first array; address 0: the identity


def layout(base, SIZE, n, strips):
    """Addresses of staged rows of L, its squares, rows of b, two factors and strips; their end."""
    row = W * SIZE
    rows = (n + W - 1) // W * W
    squares = base + rows * row
    right = squares + rows * row
    inverse = right + strips * W * row
    negative = inverse + row
    strip = negative + row
    return base, squares, right, inverse, negative, strip, strip + strips * rows * row


_layout = njit()(layout)


@njit()
def _left_rows(REAL, matrix, source, i, n, unit, staged, inverse, negative, squares):
    """1 / D of rows i.. of L, and -D^-1 L up to their diagonal."""
    SIZE = itemsize(REAL)
    code, row_step, step = matrix[1], matrix[2], matrix[3]
    place, rows, width = source + i * row_step, min(W, n - i), min(i + W, n)
    # padding rows are those of the identity
    fill_row(REAL, REAL(1), inverse)
    if not unit:
        for j in range(rows):
            save(REAL, inverse + j * SIZE, get(REAL, code, place + j * row_step + (i + j) * step))
    invert(REAL, inverse, inverse, negative)
    if rows < W or not is_plain(REAL, code, step, width):
        load_tokens(REAL, code, place, row_step, step, rows, width, staged)
        place, row_step = staged, (i + W) * SIZE
    scale_rows(REAL, place, row_step, i + W, negative, squares)


@njit()
def _identity_rows(REAL, i, first, last, right):
    """Rows i.. of the identity, in its strips first.. to last."""
    SIZE = itemsize(REAL)
    zero_rows(REAL, right, (last - first) * W)
    if first * W <= i < last * W:
        for j in range(W):
            save(REAL, right + j * (last - first) * W * SIZE + (i - first * W + j) * SIZE, REAL(1))


@cache
def _solve_kernel(REAL):
    SIZE, SIDE = np.dtype(REAL).itemsize, side_by_side()
    ROW = W * SIZE
    several, one = solve(SIDE), solve(1)

    @kernel(REAL)
    def solve_kernel(desc, worker):
        matrix, b, out = array_at(desc, G), array_at(desc, B_FIELD), array_at(desc, O)
        columns, parts, unit = desc[V], desc[PARTS], desc[UNIT_DIAGONAL]
        strips = (columns + W - 1) // W
        per_part = (strips + parts - 1) // parts
        base = desc[SCRATCH] + worker * desc[SCRATCH_STEP]
        staged, squares, right, inverse, negative, x, _ = _layout(base, SIZE, desc[K], per_part)
        while True:
            item = next_item(desc, worker)
            if item < 0:
                break
            entry = desc[MATRICES] + item // parts * 32
            source, b_source = matrix[0] + read_int64(entry), b[0] + read_int64(entry + 8)
            target, n = out[0] + read_int64(entry + 16), read_int64(entry + 24)
            strip_step = (n + W - 1) // W * W * ROW
            first = item % parts * per_part
            last = min(first + per_part, strips)
            left, width = first * W, min(columns, last * W) - first * W
            right_step = (last - first) * ROW
            for i in range(0, n, W):
                rows = min(W, n - i)
                _left_rows(REAL, matrix, source, i, n, unit, staged, inverse, negative, squares)
                # all of a row at once, as memory gives what follows sooner than what is apart
                if b[0]:
                    place = b_source + i * b[2] + left * b[3]
                    load_tokens(REAL, b[1], place, b[2], b[3], rows, width, right)
                else:
                    _identity_rows(REAL, i, first, last, right)
                place = target + i * out[2] + left * out[3]
                solved, solved_step = place, out[2]
                if rows < W or not is_plain(REAL, out[1], out[3], width):
                    solved, solved_step = right, right_step
                s = first
                while s < last:
                    strip, at = x + (s - first) * strip_step, (s - first) * ROW
                    if b[0] and s + SIDE <= last:
                        several(
                            REAL, squares, strip, strip_step, i, right + at, right_step, inverse,
                            solved + at, solved_step,
                        )  # fmt: skip
                        s += SIDE
                        continue
                    # columns of the identity: rows above their block are zero, whatever L holds
                    known = 0 if b[0] else min(s * W, i)
                    if b[0] or s * W <= i:
                        one(
                            REAL, squares + known * ROW, strip + known * ROW, strip_step, i - known,
                            right + at, right_step, inverse, solved + at, solved_step,
                        )  # fmt: skip
                    else:
                        for j in range(W):
                            fill_row(REAL, REAL(0), solved + at + j * solved_step)
                    s += 1
                if solved == right:
                    store_tokens(
                        REAL, out[1], right, right_step, rows, width, place, out[2], out[3]
                    )

    return solve_kernel


class _Plan(NamedTuple):
    """A call but for its addresses and its diagonal."""

    kernel: Any
    desc: np.ndarray
    table: np.ndarray  # of matrices, kept alive
    items: int
    scratch: int
    threads: int
    brief: bool
    flops: int  # of an item


def _plan(dtype, table, steps, rows, columns, threads):
    """Plan for the matrices of a table; `steps` are the row and column strides of L, b and out."""
    REAL, flops = real_of(dtype), len(table) * rows * rows * columns
    threads, strips = threads if flops >= SERIAL_FLOPS else 1, -(-columns // W)
    # columns go their own way where threads are more than matrices, or these are large
    long = min(strips // 8, rows * rows * columns // BATCH_FLOPS)
    parts = max(1, min(strips, max(-(-threads // max(1, len(table))), long)))
    per_part = -(-strips // parts)
    parts = -(-strips // per_part) if strips else 0
    desc = np.zeros(LENGTH, np.int64)
    for index, step in zip((G, B_FIELD, O), steps):
        desc[index + 1 : index + 4] = DTYPES.index(dtype), *step
    desc[MATRICES], desc[PARTS], desc[K], desc[V] = table.ctypes.data, parts, rows, columns
    scratch = layout(0, np.dtype(REAL).itemsize, rows, per_part)[-1]
    items = len(table) * parts
    # a small matrix takes twice as long as its flops, and in new pages as long again
    return _Plan(
        _solve_kernel(REAL), desc, table, items, scratch, threads, flops < BRIEF_FLOPS,
        4 * flops // max(1, items),
    )  # fmt: skip


def _plan_of_chunks(dtype, shape, strides, out_strides, cu_seqlens, threads):
    """Plan for the chunks of ``[B, T, H, BT]``.

    Heads vary fastest: they usually lie side by side, in the same pages of memory.
    """
    B, T, H, BT = shape
    bounds = chunk_bounds(T, BT, cu_seqlens)
    table = np.zeros((B, len(bounds), H, 4), np.int64)
    for column, s in ((0, strides), (2, out_strides)):
        heads = offsets((B, H), (s[0], s[2])).reshape(B, 1, H)
        table[..., column] = heads + bounds[:, :1] * s[1]
    table[..., 3] = bounds[:, 1:] - bounds[:, :1]
    steps = [(s[1], s[3]) for s in (strides, strides, out_strides)]
    return _plan(dtype, table.reshape(-1, 4), steps, BT, BT, threads)


def _plan_of_matrices(dtype, shape, strides, threads):
    """Plan for right-hand sides of a shape; the strides are those of L, b and out."""
    *batch, n, m = shape
    columns = [offsets(tuple(batch), s[:-2]) for s in strides]
    table = np.stack([*columns, np.full_like(columns[0], n)], axis=1)
    return _plan(dtype, table, [s[-2:] for s in strides], n, m, threads)


_kept_plan_of_chunks = lru_cache(maxsize=16)(_plan_of_chunks)
_kept_plan_of_matrices = lru_cache(maxsize=16)(_plan_of_matrices)


def _start(plan, left, right, out, unit_diagonal):
    """Run a plan with the addresses of L, of b or 0 for the identity, and of the results."""
    if plan.items:
        desc = plan.desc.copy()
        desc[G], desc[B_FIELD], desc[O], desc[UNIT_DIAGONAL] = left, right, out, unit_diagonal
        run(
            plan.kernel, desc, plan.items, plan.scratch, plan.threads, plan.brief,
            flops=plan.flops, shares=True,
        )  # fmt: skip


def solve_tril(A, out, cu_seqlens):
    """Fill `out` with ``(I + A)^-1`` of every chunk; both are ``[B, T, H, BT]``.

    A thread's scratch is the columns of one inverse and three times 16 rows: 29 KB for chunks of
    64, twice that in float64.
    """
    make = _kept_plan_of_chunks if cu_seqlens is None else _plan_of_chunks
    plan = make(A.dtype, A.shape, A.strides, out.strides, cu_seqlens, thread_count())
    _start(plan, A.address, 0, out.address, True)


def solve_triangular(L, b, out, unit_diagonal):
    """Fill `out` with the solutions of ``L x = b``; leading axes have one shape.

    A thread's scratch is the columns of one x that it solves for, 16 rows of b, and 16 of L twice.
    """
    strides = L.strides, b.strides, out.strides
    plan = _kept_plan_of_matrices(L.dtype, b.shape, strides, thread_count())
    _start(plan, L.address, b.address, out.address, unit_diagonal)
