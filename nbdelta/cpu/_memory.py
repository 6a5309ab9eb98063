"""Rows and tiles between the caller's arrays and the kernels' scratch.

Kernels compute in one dtype on padded, contiguous rows of 16 numbers. Arrays come in any of four
dtypes and with any strides. A row that already is as the kernels want it is used where it lies;
the others are converted here, a row at a time, so that dtype and layout never multiply the number
of compilations.
"""

import numpy as np

from nbdelta.cpu._jit import njit
from nbdelta.cpu._simd import INT, REAL, constant_of, itemsize, tile
from nbdelta.cpu._vector_unit import W

DTYPES = ("float32", "float64", "float16", "bfloat16")
FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = range(4)


SIZES = (4, 8, 2, 2)


@tile
def get(e, code, address) -> REAL:
    """Return the number of dtype `code` at an address."""
    return e.choose(code, lambda i: e.load_as(DTYPES[i], address, 1), len(DTYPES))


@tile
def put(e, code, address, value):
    """Round to dtype `code` and write."""
    e.choose(code, lambda i: e.store_as(DTYPES[i], value, address, 1), len(DTYPES))


@tile
def _get_rows(e, code, source, source_step, target, target_step, n, width):
    """Bring n >= 1 rows of `width` >= 16 numbers, one behind the other, padded with zeros."""

    def convert(i):
        def row(_, rows):
            source, target = rows

            def move(x, carried):
                e.store(e.load_as(DTYPES[i], source + x * SIZES[i], W), target + x * e.size)
                return carried

            def move_last(_, carried):
                # 16 of which some are there already
                e.store(e.splat(0.0), target + width // W * e.row)
                return move(width - W, carried)

            e.loop(width // W * W, [], move, W)
            e.loop(width % W, [], move_last, W, maybe_empty=True)
            return [source + source_step, target + target_step]

        e.loop(n, [source, target], row)

    e.choose(code, convert, len(DTYPES))


@tile
def _put_rows(e, code, source, source_step, target, target_step, n, width):
    """Round n >= 1 rows of `width` >= 16 numbers, and write them."""

    def convert(i):
        def row(_, rows):
            source, target = rows

            def move(x, carried):
                row = e.load(source + x * e.size)
                e.store_as(DTYPES[i], row, target + x * SIZES[i], W)
                return carried

            e.loop(width // W * W, [], move, W)
            e.loop(width % W, [], lambda _, carried: move(width - W, carried), W, maybe_empty=True)
            return [source + source_step, target + target_step]

        e.loop(n, [source, target], row)

    e.choose(code, convert, len(DTYPES))


@tile
def element_size(e, code) -> INT:
    """Bytes of a number of a dtype code."""
    return e.choose(code, lambda i: e.integer(SIZES[i]), len(DTYPES))


@tile
def load(e, address) -> REAL:
    """Number of the compute dtype at an address."""
    return e.scalar(address)


@tile
def save(e, address, value):
    """Write a number of the compute dtype."""
    e.store(value, address)


@tile
def fill_row(e, value, target):
    """16 times the same number."""
    e.store(e.splat(value), target)


@tile
def copy_rows(e, source, source_step, target, target_step, n):
    """N >= 1 rows of 16 numbers."""

    def body(_, rows):
        e.store(e.load(rows[0]), rows[1])
        return [rows[0] + source_step, rows[1] + target_step]

    e.loop(n, [source, target], body)


@tile
def copy_strips(e, source, source_step, source_strip, target, target_step, target_strip, n, strips):
    """N rows of `strips` times 16 numbers; a row and its parts are a step and a strip apart."""

    def row(_, rows):
        def part(_, parts):
            e.store(e.load(parts[0]), parts[1])
            return [parts[0] + source_strip, parts[1] + target_strip]

        e.loop(strips, rows, part)
        return [rows[0] + source_step, rows[1] + target_step]

    e.loop(n, [source, target], row)


@tile
def fetch_rows(e, address, step):
    """Bring 16 lines into the cache, so that misses run beside arithmetic."""
    for t in range(W):
        e.prefetch(address + step * t)


@tile
def transpose_tile(e, x, step):
    """Transpose 16 rows of 16 numbers, `step` bytes apart, where they lie."""

    def block(i, j):
        return e.load_transposed([x + step * (i + r) for r in range(e.lanes)], j * e.size)

    def store(rows, i, j):
        for r, value in enumerate(rows):
            e.store(value, x + step * (i + r), j * e.size)

    for i in range(0, W, e.lanes):
        store(block(i, i), i, i)
        for j in range(i + e.lanes, W, e.lanes):
            above, below = block(i, j), block(j, i)
            store(above, j, i)
            store(below, i, j)


@tile
def _gather_16(e, source, step, target):
    """16 numbers of the compute dtype, `step` bytes apart."""
    for i in range(W):
        e.store(e.scalar(source + step * i), target, i * e.size)


@njit()
def load_row(REAL, code, source, step, n, target):
    """Bring n numbers of a dtype, `step` bytes apart, into a row padded with zeros."""
    if step == element_size(REAL, code) and n >= W:
        _get_rows(REAL, code, source, 0, target, 0, 1, n)
        return
    SIZE, done = itemsize(REAL), 0
    if code == own_code(REAL):
        while done + W <= n:
            _gather_16(REAL, source + done * step, step, target + done * SIZE)
            done += W
    for i in range(done, n):
        save(REAL, target + i * SIZE, get(REAL, code, source + i * step))
    for i in range(n, (n + W - 1) // W * W):
        save(REAL, target + i * SIZE, REAL(0))


@njit()
def store_row(REAL, code, source, n, target, step):
    """Write a row's n numbers as dtype `code`, `step` bytes apart."""
    if step == element_size(REAL, code) and n >= W:
        _put_rows(REAL, code, source, 0, target, 0, 1, n)
        return
    for i in range(n):
        put(REAL, code, target + i * step, load(REAL, source + i * itemsize(REAL)))


@njit()
def store_tokens(REAL, code, source, source_step, n, width, target, token_step, step):
    """Write n >= 1 token rows of `width` numbers as dtype `code`."""
    if width >= W and step == element_size(REAL, code):
        _put_rows(REAL, code, source, source_step, target, token_step, n, width)
    else:
        for t in range(n):
            store_row(REAL, code, source + t * source_step, width, target + t * token_step, step)


@tile
def zero_rows(e, target, n):
    """Write n rows of 16 zeros, one behind the other."""

    def body(offset, carried):
        e.store(e.splat(0.0), target + offset)
        return carried

    e.loop(n * e.row, [], body, e.row, maybe_empty=True)


@njit()
def load_tokens(REAL, code, source, token_step, step, n, width, target):
    """Bring n <= 16 token rows of `width` numbers as 16 padded rows, zeros after the last token."""
    SIZE = itemsize(REAL)
    row = (width + W - 1) // W * W * SIZE
    if width >= W and step == element_size(REAL, code):
        _get_rows(REAL, code, source, token_step, target, row, n, width)
    elif n == W and width % W == 0 and token_step == element_size(REAL, code):
        # tokens lie side by side, as after the short convolution of a model: 16 x 16 at a time
        for c in range(0, width, W):
            tile = target + c * SIZE
            _get_rows(REAL, code, source + c * step, step, tile, row, W, W)
            transpose_tile(REAL, tile, row)
    else:
        for t in range(n):
            load_row(REAL, code, source + t * token_step, step, width, target + t * row)
    zero_rows(REAL, target + n * row, (W - n) * row // (W * SIZE))


@njit()
def load_columns(REAL, code, source, row_step, step, K, n, target, target_step):
    """Bring n <= 16 columns of a state [K, V] into rows of 16 numbers, padded with zeros."""
    SIZE = itemsize(REAL)
    if code == own_code(REAL) and step == SIZE and n == W:
        copy_rows(REAL, source, row_step, target, target_step, K)
    else:
        for i in range(K):
            load_row(REAL, code, source + i * row_step, step, n, target + i * target_step)
    for i in range(K, (K + W - 1) // W * W):
        fill_row(REAL, REAL(0), target + i * target_step)


@njit()
def store_columns(REAL, code, source, source_step, K, n, target, row_step, step):
    """Write K rows of n <= 16 columns to a state [K, V]."""
    SIZE = itemsize(REAL)
    if code == own_code(REAL) and step == SIZE and n == W:
        copy_rows(REAL, source, source_step, target, row_step, K)
    else:
        for i in range(K):
            store_row(REAL, code, source + i * source_step, n, target + i * row_step, step)


own_code = constant_of(lambda size: FLOAT64 if size == 8 else FLOAT32)


@njit()
def is_plain(REAL, code, step, width):
    """Say whether rows serve where they lie: compute dtype, contiguous, whole tiles."""
    SIZE = itemsize(REAL)
    return code == own_code(REAL) and step == SIZE and width % W == 0


def real_of(dtype):
    """Return the dtype that arrays of `dtype` are computed in."""
    return np.float64 if dtype == "float64" else np.float32
