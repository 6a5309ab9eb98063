"""Inclusive cumulative sums inside chunks, along any axis of any array.

The host cuts an array into blocks: some steps along the axis, of as many neighbouring lanes as
there are along another one. Where the lanes lie side by side in memory, the kernel goes down a
block row by row, with the totals in the cache. Where the steps lie side by side, it transposes 16
lanes of 16 steps in registers. Either way every total is summed in the order of its steps, so that
the layout does not change a bit.
"""

import math
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np

from nbdelta.arrays import ITEMSIZE
from nbdelta.cpu._call import (
    ITEMS,
    LENGTH,
    NEXT,
    SCALE,
    SCRATCH,
    SCRATCH_STEP,
    G,
    O,
    array_at,
    put_float,
    real,
)
from nbdelta.cpu._cumsum_blocks import ROW, cut
from nbdelta.cpu._cumsum_tiles import (
    add_row,
    add_square,
    add_square_reversed,
    add_steps,
    stream_rows,
)
from nbdelta.cpu._descriptor import claim, finish_stores, read_int64
from nbdelta.cpu._jit import kernel, njit
from nbdelta.cpu._memory import (
    DTYPES,
    copy_rows,
    element_size,
    load,
    load_row,
    load_tokens,
    own_code,
    save,
    store_row,
    transpose_tile,
    zero_rows,
)
from nbdelta.cpu._simd import itemsize
from nbdelta.cpu._team import run, thread_count
from nbdelta.cpu._vector_unit import W

# descriptor fields of this kernel: table of (address of x, of the result, steps, lanes) of every
# block; lanes of a unit of work, units of a block, of all blocks, of an item; lanes of x that lie
# side by side; whether steps do, whether short ones follow each other without gaps, whether to go
# backwards, and whether the result is large
BLOCKS, WIDTH, PER_BLOCK, UNITS, PER_ITEM, PIECE, ALONG, DENSE, STREAMING, REVERSE = range(88, 98)

# bytes of a result that does not pass through the caches, unless it is written in shorter runs
LARGE, LONG_RUN = 1 << 23, 1 << 11
# bytes below which the work is not shared, and numbers below which no thread is woken for it
SERIAL_BYTES, BRIEF = 1 << 18, 1 << 20
# numbers of an item of work at the most, but for one unit; what one of them costs at the worst, in
# flops of a matrix product
NUMBERS, FLOPS = 1 << 18, 240


@njit()
def _stream(REAL, source, target, n):
    """Write n numbers past the caches, but for the parts of lines at both ends."""
    SIZE = itemsize(REAL)
    head = min(-target % 64 // SIZE, n)
    lines = (n - head) // W
    tail = head + lines * W
    for i in range(head):
        save(REAL, target + i * SIZE, load(REAL, source + i * SIZE))
    if lines:
        stream_rows(REAL, source + head * SIZE, target + head * SIZE, lines)
    for i in range(tail, n):
        save(REAL, target + i * SIZE, load(REAL, source + i * SIZE))


@njit()
def _load_pieces(REAL, desc, x, source, width, target):
    """Bring the numbers of one step, which lie in pieces of the same length, into a row."""
    piece = min(desc[PIECE], width)
    for i in range(0, width, piece):
        place = source + i // piece * x[4]
        load_row(REAL, x[1], place, x[3], piece, target + i * itemsize(REAL))


@njit()
def _down_rows(REAL, desc, x, out, source, target, n, width, totals):
    """Step by step, `width` lanes at a time."""
    SIZE = itemsize(REAL)
    x_step, x_lane, out_step, out_lane = x[2], x[3], out[2], out[3]
    x_direct = x[1] == own_code(REAL) and x_lane == SIZE and width <= desc[PIECE]
    out_direct = out[1] == own_code(REAL) and out_lane == SIZE
    streaming = desc[STREAMING] and out_direct and width * SIZE >= LONG_RUN
    tiles = width // W * W
    left, rest = tiles * SIZE, width - tiles
    staged, scale = totals + ROW * SIZE, REAL(real(desc, SCALE))
    # of a small block the next one is fetched, of a large one the next row
    ahead = n * x_step
    if desc[REVERSE]:
        source, target = source + (n - 1) * x_step, target + (n - 1) * out_step
        x_step, out_step = -x_step, -out_step
    if n * width > 2 * ROW:
        ahead = x_step
    zero_rows(REAL, totals, (width + W - 1) // W)
    for _ in range(n):
        row, result = source, target
        if not x_direct:
            _load_pieces(REAL, desc, x, source, width, staged)
            row = staged
        elif rest:
            load_row(REAL, x[1], source + left, x_lane, rest, staged + left)
        if streaming or not out_direct:
            result = staged
        if tiles:
            add_row(REAL, row, ahead, totals, scale, result, tiles)
        if rest:
            add_row(REAL, staged + left, 0, totals + left, scale, staged + left, W)
        if streaming:
            _stream(REAL, staged, target, width)
        elif not out_direct:
            store_row(REAL, out[1], staged, width, target, out_lane)
        elif rest:
            store_row(REAL, out[1], staged + left, rest, target + left, out_lane)
        source, target = source + x_step, target + out_step


@njit()
def _dense_rows(REAL, desc, x, out, source, target, n, width, totals):
    """Step by step, of a few lanes that are no multiple of 16, without gaps between the steps.

    Whole vectors of such steps reach into the next ones, so this works on copies: one as dense as
    x, one with steps on vector boundaries. Going back to a dense one, every step overwrites what
    the one before it wrote too much.
    """
    SIZE, columns = itemsize(REAL), (width + W - 1) // W
    row, step, scale = W * SIZE, width * SIZE, REAL(real(desc, SCALE))
    dense, wide, wide_step = totals + columns * row, totals + ROW * SIZE, columns * row
    streaming = desc[STREAMING] and out[1] == own_code(REAL)
    zero_rows(REAL, totals, columns)
    most = (ROW - 2 * columns * W) // (columns * W)
    for done in range(0, n, most):
        steps = min(most, n - done)
        first = n - done - steps if desc[REVERSE] else done
        load_row(REAL, x[1], source + first * x[2], x[3], steps * width, dense)
        begin, forward = 0, 1
        if desc[REVERSE]:
            begin, forward = steps - 1, -1
        for i in range(0, columns * row, row):
            add_steps(
                REAL, dense + begin * step + i, forward * step, totals + i, scale,
                wide + begin * wide_step + i, forward * wide_step, steps,
            )  # fmt: skip
        for i in range(steps):
            copy_rows(REAL, wide + i * wide_step, row, dense + i * step, row, columns)
        if streaming:
            _stream(REAL, dense, target + first * out[2], steps * width)
        else:
            store_row(REAL, out[1], dense, steps * width, target + first * out[2], out[3])


@njit()
def _along_rows(REAL, desc, x, out, source, target, n, width, totals, lanes):
    """16 steps of up to 16 lanes at a time; to `lanes`, one after the other, if it is given."""
    SIZE = itemsize(REAL)
    row = W * SIZE
    x_step, x_lane, out_step, out_lane = x[2], x[3], out[2], out[3]
    x_direct = x[1] == own_code(REAL) and x_step == SIZE and width == W
    out_direct = out[1] == own_code(REAL) and out_step == SIZE and width == W
    staged, scale = totals + row, REAL(real(desc, SCALE))
    zero_rows(REAL, totals, 1)
    for i in range(0, n, W):
        t = (n - 1) // W * W - i if desc[REVERSE] else i
        steps = min(W, n - t)
        square, square_step = source + t * x_step, x_lane
        if not x_direct or steps < W:
            load_tokens(REAL, x[1], square, x_lane, x_step, width, steps, staged)
            square, square_step = staged, row
        # of the lanes after the next 16, in the order of memory where they follow each other: a
        # processor goes on by itself with lines that come one behind the other
        ahead, ahead_step = square + x_lane * (2 * W), x_lane
        if x_lane == n * SIZE:
            ahead, ahead_step = source + x_lane * (2 * W) + i * row, row
        place = target + t * out_step
        result, result_step = place, out_lane
        if lanes:
            result = lanes + t * SIZE
        elif not out_direct or steps < W:
            result, result_step = staged, row
        if desc[REVERSE]:
            add_square_reversed(
                REAL, square, square_step, ahead, ahead_step, totals, scale, result, result_step
            )  # fmt: skip
        else:
            add_square(
                REAL, square, square_step, ahead, ahead_step, totals, scale, result, result_step
            )  # fmt: skip
        if result == staged:
            length, count, step, run = steps, width, out_lane, out_step
            if out_lane == element_size(REAL, out[1]) and width == W:
                transpose_tile(REAL, staged, row)
                length, count, step, run = W, steps, out_step, out_lane
            for s in range(count):
                store_row(REAL, out[1], staged + s * row, length, place + s * step, run)


@cache
def _cumsum_kernel(REAL):
    SIZE = np.dtype(REAL).itemsize

    @kernel(REAL)
    def cumsum_kernel(desc, worker):
        x, out = array_at(desc, G), array_at(desc, O)
        totals = desc[SCRATCH] + worker * desc[SCRATCH_STEP]
        blocks = desc[UNITS] // desc[PER_BLOCK]
        while True:
            item = claim(desc, NEXT)
            if item >= desc[ITEMS]:
                break
            first = item * desc[PER_ITEM]
            for unit in range(first, min(first + desc[PER_ITEM], desc[UNITS])):
                block, lane = unit // desc[PER_BLOCK], unit % desc[PER_BLOCK] * desc[WIDTH]
                if desc[ALONG]:
                    block, lane = unit % blocks, unit // blocks * desc[WIDTH]
                block = desc[BLOCKS] + block * 32
                n, width = read_int64(block + 16), min(desc[WIDTH], read_int64(block + 24) - lane)
                if width <= 0:
                    continue
                source, target = x[0] + read_int64(block), out[0] + read_int64(block + 8)
                source += lane // desc[PIECE] * x[4] + lane % desc[PIECE] * x[3]
                target += lane * out[3]
                if desc[DENSE]:
                    _dense_rows(REAL, desc, x, out, source, target, n, width, totals)
                    continue
                if not desc[ALONG]:
                    _down_rows(REAL, desc, x, out, source, target, n, width, totals)
                    continue
                # lanes that follow each other without gaps are collected and streamed
                staged = 0
                if desc[STREAMING] and width % W == 0 and n % W == 0 and n * width <= ROW:
                    if out[1] == own_code(REAL) and out[2] == SIZE and out[3] == n * SIZE:
                        staged = totals + ROW * SIZE
                for i in range(0, width, W):
                    _along_rows(
                        REAL, desc, x, out, source + i * x[3], target + i * out[3], n,
                        min(W, width - i), totals, staged + i * n * SIZE if staged else 0,
                    )  # fmt: skip
                if staged:
                    _stream(REAL, staged, target, n * width)
        if desc[STREAMING]:
            finish_stores()

    return cumsum_kernel


class _Plan(NamedTuple):
    """A call but for its addresses, direction and scale."""

    desc: np.ndarray
    blocks: np.ndarray  # kept alive
    items: int
    threads: int


def _plan(shape, strides, out_strides, dtypes, chunk_size, axis, cu_seqlens, threads):
    blocks, step, lane, piece = cut(shape, strides, out_strides, chunk_size, axis, cu_seqlens)
    lanes, along = lane.size * piece.size, step.distance <= lane.distance
    size = math.prod(shape) * ITEMSIZE[dtypes[1]]
    threads = threads if size >= SERIAL_BYTES else 1
    # rows as long as can be, or lanes as many, and enough pieces of work
    tile = W if along else lane.size if piece.size > 1 else 8 * W
    most = ROW // min(chunk_size, ROW) if along else min(ROW, lanes * len(blocks) // (8 * threads))
    width = max(tile, most // tile * tile)
    per_block = -(-lanes // width)
    units = len(blocks) * per_block
    numbers = max(1, math.prod(shape) // units)
    per_item = max(1, min(units // (32 * threads), NUMBERS // numbers))
    desc = np.zeros(LENGTH, np.int64)
    desc[G + 1 : G + 5] = DTYPES.index(dtypes[0]), step.x, lane.x, piece.x
    desc[O + 1 : O + 4] = DTYPES.index(dtypes[1]), step.out, lane.out
    desc[WIDTH : ALONG + 1] = width, per_block, units, per_item, lane.size, along
    lane_bytes = [ITEMSIZE[dtype] for dtype in dtypes]
    dense = (lane.x, lane.out, step.x, step.out) == (*lane_bytes, *(lanes * b for b in lane_bytes))
    desc[DENSE] = dense and lanes % W and lanes < 8 * W
    desc[STREAMING], desc[BLOCKS] = size >= LARGE, blocks.ctypes.data
    return _Plan(desc, blocks, -(-units // per_item), threads)


_kept_plan = lru_cache(maxsize=16)(_plan)


def chunk_local_cumsum(x, out, chunk_size, axis, reverse, scale, cu_seqlens):
    """Fill `out` with the cumulative sums of `x` along `axis`, anew in every chunk.

    A thread's scratch is 16 KB, twice that in float64.

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
    if 0 in x.shape:
        return
    REAL = np.float64 if out.dtype == "float64" else np.float32
    plan = (_kept_plan if cu_seqlens is None else _plan)(
        x.shape, x.strides, out.strides, (x.dtype, out.dtype), chunk_size, axis, cu_seqlens,
        thread_count(),
    )  # fmt: skip
    desc = plan.desc.copy()
    desc[G], desc[O], desc[REVERSE] = x.address, out.address, reverse
    put_float(desc, SCALE, scale)
    size = math.prod(x.shape)
    scratch, flops = 2 * ROW * np.dtype(REAL).itemsize, FLOPS * size // plan.items
    run(_cumsum_kernel(REAL), desc, plan.items, scratch, plan.threads, size < BRIEF, flops=flops)
