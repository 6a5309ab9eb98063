"""The three products of a block and strips of the state, rows of a register tile at a time.

A tile has the same rows of `side` strips, which lie `step` bytes apart: an element of a panel is
loaded once for all of them. Its vectors are in one list, those of a row one behind the other.
"""

from functools import cache

from nbdelta.cpu._matrix_unit import DOTS, FLOATS
from nbdelta.cpu._simd import constant_of, tile
from nbdelta.cpu._tiles import fma_panel
from nbdelta.cpu._vector_unit import W, tile_rows

FEW = 4  # rows of the tiles for the end of a sequence: as many as hide a multiply-add's latency


def _rows_of(side, few=False):
    return lambda size: min(FEW, tile_rows(size, side)) if few else tile_rows(size, side)


@cache
def tile_rows_of(side, few=False):
    """Make a kernel function of REAL: rows of a tile, with `few` at the end of a sequence."""
    return constant_of(_rows_of(side, few))


def _each(strips, address, step):
    return [address + step * s for s in range(strips)]


def _rows(values, side):
    """Return the vectors of each row."""
    return [values[i : i + side] for i in range(0, len(values), side)]


def _state_product(e, rows, unit, panel, first, strips, n, ahead):
    """Rows first.. of the product of a panel and the state."""
    ahead = [(x + step * first, step, write) for x, step, write in ahead]
    acc = [e.splat(0.0)] * (rows * len(strips))
    panel += first * e.size
    return fma_panel(e, acc, panel, strips, n, ahead=ahead, pairs=unit == DOTS)


def _add_values(e, acc, side, gate, v, v_step, beta):
    """Make ``beta V + gate * acc``."""
    for i, row in enumerate(_rows(acc, side)):
        factor, key_gate = e.bcast(beta, i * e.size), e.bcast(gate, i * e.size)
        for s, x in enumerate(row):
            value = e.load(v + v_step * i, s * e.row) * factor
            acc[i * side + s] = e.fma(x, key_gate, value)
    return acc


def _times_gate(e, acc, side, gate):
    return [x * e.bcast(gate, i // side * e.size) for i, x in enumerate(acc)]


def _solve_triangle(e, acc, triangle, us, suffix):
    """Solve for the rows of a tile, and store them to `us`, times `suffix` 16 rows behind."""
    acc = _rows(acc, len(us))
    for j, own in enumerate(acc):
        for u, x in zip(us, own):
            e.store(x, u, j * e.row)
        if suffix is not None:
            factor = e.bcast(suffix, j * e.size)
            for u, x in zip(us, own):
                e.store(x * factor, u, (W + j) * e.row)
        for i in range(j + 1, len(acc)):
            factor = e.bcast(triangle, j * e.row + i * e.size)
            acc[i] = [e.fma(factor, x, y) for x, y in zip(own, acc[i])]


def _multiply_triangle(e, acc, triangle, us, o, o_step):
    """Add the products with the rows of U of this tile, and store the sums to `o`."""
    acc = _rows(acc, len(us))
    for j in range(len(acc)):
        x = [e.load(u, j * e.row) for u in us]
        for i in range(j, len(acc)):
            factor = e.bcast(triangle, j * e.row + i * e.size)
            acc[i] = [e.fma(factor, *xy) for xy in zip(x, acc[i])]
    for i, row in enumerate(acc):
        for s, x in enumerate(row):
            e.store(x, o + o_step * i, s * e.row)


@cache
def solve(per_channel, unit, side, few=False):
    """Make the first product; the panel and the state are words unless the unit is `FLOATS`."""
    rows_of = _rows_of(side, few)

    @tile
    def solve(
        e, keys, a, states, u, step, n, first, gate, v, v_step, beta, suffix,
        v_next, v_next_step, k_next, k_step, g_next, g_step,
    ):  # fmt: skip
        """Rows first.. of U = (I + A)^-1 (beta V - beta e^G K S).

        `gate` is what the product with the panel `keys` is multiplied with, `a` holds -A. Products
        with earlier rows of U are a loop, the triangle of this tile is solved in registers. The
        rows e^(G_last - G) U are stored behind U when the gate is one per token.
        """
        at, rows = first * e.size, rows_of(e.size)
        ahead = [(v_next, v_next_step, False), (k_next, k_step, False)]
        if per_channel:
            ahead.append((g_next, g_step, False))
        states, us = _each(side, states, step), _each(side, u, step)
        acc = _state_product(e, rows, unit, keys, first, states, n, ahead)
        acc = _add_values(e, acc, side, gate + at, v + v_step * first, v_step, beta + at)
        if rows < W:
            acc = fma_panel(e, acc, a + at, us, first, maybe_empty=True)
        own = [u + first * e.row for u in us]
        factors = None if per_channel else suffix + at
        _solve_triangle(e, acc, a + first * e.row + at, own, factors)

    return solve


@cache
def output(unit, side, few=False):
    """Make the second product."""
    rows_of = _rows_of(side, few)

    @tile
    def output(
        e, queries, p, states, u, step, n, first, gate, o, o_step, o_next, o_next_step, q_next,
        q_step,
    ):  # fmt: skip
        """Rows first.. of O = scale e^G Q S + P U; `gate` is what Q S is multiplied with."""
        at, rows = first * e.size, rows_of(e.size)
        ahead = (o_next, o_next_step, True), (q_next, q_step, False)
        states, us = _each(side, states, step), _each(side, u, step)
        acc = _state_product(e, rows, unit, queries, first, states, n, ahead)
        acc = _times_gate(e, acc, side, gate + at)
        if rows < W:
            acc = fma_panel(e, acc, p + at, us, first, maybe_empty=True)
        own = [u + first * e.row for u in us]
        _multiply_triangle(e, acc, p + first * e.row + at, own, o + o_step * first, o_step)

    return output


# ---- with products of the state that a matrix unit has made ----


@cache
def solve_reads(per_channel):
    """Make the first product behind K S."""

    @tile
    def solve_reads(e, reads, a, u, first, gate, v, v_step, beta, suffix):
        """Rows first.. of U, as `solve` leaves them."""
        at = first * e.size
        acc = [e.load(reads + first * e.row, i * e.row) for i in range(e.mr)]
        acc = _add_values(e, acc, 1, gate + at, v + v_step * first, v_step, beta + at)
        if e.mr < W:
            acc = fma_panel(e, acc, a + at, [u], first, maybe_empty=True)
        factors = None if per_channel else suffix + at
        _solve_triangle(e, acc, a + first * e.row + at, [u + first * e.row], factors)

    return solve_reads


@tile
def output_reads(e, reads, p, u, first, gate, o, o_step):
    """Rows first.. of O, the second product behind Q S."""
    at = first * e.size
    acc = [e.load(reads + first * e.row, i * e.row) for i in range(e.mr)]
    acc = _times_gate(e, acc, 1, gate + at)
    if e.mr < W:
        acc = fma_panel(e, acc, p + at, [u], first, maybe_empty=True)
    own = [u + first * e.row]
    _multiply_triangle(e, acc, p + first * e.row + at, own, o + o_step * first, o_step)


@cache
def update(per_channel, unit, side):
    """Make the third product.

    The panel has tokens as its rows, and with one gate per token channels. With `DOTS` the rows of
    the state are stored as words too; the product is one of words if k is in the panel as it is.
    With a gate per channel k and U both would be rounded for every token that is added to the
    state, more than it can bear where nothing decays.
    """
    pairs = unit != FLOATS
    dots = pairs and not per_channel
    token_step, channel_step = (W, 1) if per_channel else (1, W // 2 if dots else W)

    @tile
    def update(e, keys, n, rows, u, step, decay, words):
        """16 rows of S = e^G_last S + K^T U over n tokens, where K or U has the factor e^(G_last -
        G); n is a multiple of the tile's rows.
        """
        mr = tile_rows(e.size, side)
        rounds = min(4, mr)
        us, states = _each(side, u, step), _each(side, rows, step)
        for first in range(0, W, mr):
            channels = range(first, first + mr)

            def body(offset, carried, channels=channels):
                *acc, key = carried
                for t in range(rounds):
                    read = e.load_words if dots else e.load
                    x = [read(u + offset, t * e.row) for u in us]
                    for i, c in enumerate(channels):
                        place = (t * token_step + c * channel_step) * e.size
                        own = slice(i * side, (i + 1) * side)
                        if dots:
                            acc[own] = [e.dot(key, place, *xy) for xy in zip(x, acc[own])]
                        else:
                            factor = e.bcast(key, place)
                            acc[own] = [e.fma(factor, *xy) for xy in zip(x, acc[own])]
                return [*acc, key + rounds * token_step * e.size]

            acc = []
            for c in channels:
                factor = e.bcast(decay, c * e.size)
                acc += [factor * e.load(state, c * e.row) for state in states]
            width = n * (e.row // 2 if dots else e.row)
            *acc, _ = e.loop(width, [*acc, keys], body, rounds * e.row)
            for c, row in zip(channels, _rows(acc, side)):
                for state, x in zip(states, row):
                    e.store(x, state, c * e.row)
        if pairs:
            for state, out in zip(states, _each(side, words, step)):
                for i in range(0, W, 2):
                    low, high = (e.load(state, j * e.row) for j in (i, i + 1))
                    e.store(e.pair(low, high), out, i // 2 * e.row)

    return update
