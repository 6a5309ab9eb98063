"""Tiles of the backward pass that make the states of a chunk once more, and move rows."""

from nbdelta.cpu._backward_tiles import fma_channels
from nbdelta.cpu._simd import tile
from nbdelta.cpu._tiles import KEY_GATE, SUFFIX, fma_panel
from nbdelta.cpu._vector_unit import W

# ---- between the caller's arrays and the strips ----


@tile
def stream_rows(e, x, out, step, n):
    """Write n rows of 16 numbers to whole lines, past the caches: nobody reads them soon."""

    def body(offset, target):
        e.store(e.load(x + offset), target[0], streaming=True)
        return [target[0] + step]

    e.loop(n * e.row, [out], body, e.row)


# ---- the states of a chunk once more ----

# what lies behind the state in a strip: U, e^(G_last - G) U, and E with U = beta E
U_ROWS, SUFFIX_ROWS, ERROR_ROWS, ROWS_BEHIND = 0, W, 2 * W, 3 * W


@tile
def solve_errors(e, keys, a, state, u, n, first, gates, v, v_step, beta):
    """Rows first.. of E = V - e^G K S - M U and of U = beta E; `a` holds -M."""
    v, at = v + v_step * first, first * e.size
    acc = fma_panel(e, [e.splat(0.0)] * e.mr, keys + at, [state], n)
    for i in range(e.mr):
        gate = e.bcast(gates + at, KEY_GATE * e.row + i * e.size)
        acc[i] = e.fma(acc[i], gate, e.load(v + v_step * i))
    if e.mr < W:
        acc = fma_panel(e, acc, a + at, [u], first, maybe_empty=True)
    triangle, u = a + first * e.row + at, u + first * e.row
    for j in range(e.mr):
        x = acc[j] * e.bcast(beta + at, j * e.size)
        e.store(acc[j], u, (ERROR_ROWS + j) * e.row)
        e.store(x, u, (U_ROWS + j) * e.row)
        suffix = e.bcast(gates + at, SUFFIX * e.row + j * e.size)
        e.store(x * suffix, u, (SUFFIX_ROWS + j) * e.row)
        for i in range(j + 1, e.mr):
            acc[i] = e.fma(e.bcast(triangle, j * e.row + i * e.size), x, acc[i])


@tile
def spread_rows(e, rows, n, gates, u):
    """N rows of U as `solve_errors` leaves them, with U in place of E, and zeros after them."""
    suffix, width = gates + SUFFIX * e.row, W * e.row

    def body(offset, carried):
        x, at = e.load(rows + offset), u + offset
        e.store(x, at, U_ROWS * e.row)
        e.store(x * e.bcast(suffix + offset // W), at, SUFFIX_ROWS * e.row)
        e.store(x, at, ERROR_ROWS * e.row)
        return carried

    e.loop(n * e.row, [], body, e.row)

    def clear(offset, carried):
        for first in (U_ROWS, SUFFIX_ROWS, ERROR_ROWS):
            e.store(e.splat(0.0), u + n * e.row + offset, first * e.row)
        return carried

    e.loop(width - n * e.row, [], clear, e.row, maybe_empty=True)


@tile
def reciprocal(e, x, out):
    """1 / x of 16 numbers."""
    e.store(1.0 / e.load(x), out)


@tile
def advance(e, keys, rows, u, decay, out):
    """16 rows of e^G_last S + K^T U, where K or U has the factor e^(G_last - G)."""
    for first in range(0, W, e.mr):
        channels = range(first, first + e.mr)
        acc = [e.bcast(decay, i * e.size) * e.load(rows, i * e.row) for i in channels]
        acc = fma_channels(e, acc, keys, u, channels)
        for i, x in zip(channels, acc):
            e.store(x, out, i * e.row)
