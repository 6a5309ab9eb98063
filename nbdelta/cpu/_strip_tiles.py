"""The three products of a block and a strip of the state, rows of a register tile at a time."""

from functools import cache

from nbdelta.cpu._matrix_unit import DOTS, FLOATS, SQUARES
from nbdelta.cpu._simd import constant_of, tile
from nbdelta.cpu._tiles import fma_panel
from nbdelta.cpu._vector_unit import W, tile_rows

FEW = 4  # rows of the tiles for the end of a sequence: as many as hide a multiply-add's latency


def state_product(e, rows, unit, panel, first, strip, n, ahead):
    """Rows first.. of the product of a panel and the state; of `SQUARES` it is there already."""
    ahead = [(x + step * first, step, write) for x, step, write in ahead]
    if unit != SQUARES:
        acc = [e.splat(0.0)] * rows
        panel = panel + first * e.size
        return fma_panel(e, acc, panel, strip, n, ahead=ahead, pairs=unit == DOTS)
    for address, step, write in ahead:
        for i in range(rows):
            e.prefetch(address + step * i, write)
    return [e.load(panel + first * e.row, i * e.row) for i in range(rows)]


def _few_rows(size):
    return min(FEW, tile_rows(size))


few_rows = constant_of(_few_rows)


@cache
def solve(per_channel, unit, few=False):
    """Make the first product; the panel and the state are words unless the unit is `FLOATS`."""

    @tile
    def solve(
        e, keys, a, states, u, n, first, gate, v, v_step, beta, suffix,
        v_next, v_next_step, k_next, k_step, g_next, g_step,
    ):  # fmt: skip
        """Rows first.. of U = (I + A)^-1 (beta V - beta e^G K S).

        `gate` is what the product with the panel `keys` is multiplied with, `a` holds -A. Products
        with earlier rows of U are a loop, the triangle of this tile is solved in registers. The
        rows e^(G_last - G) U are stored behind U when the gate is one per token.
        """
        v, at, rows = v + v_step * first, first * e.size, _few_rows(e.size) if few else e.mr
        ahead = [(v_next, v_next_step, False), (k_next, k_step, False)]
        if per_channel:
            ahead.append((g_next, g_step, False))
        acc = state_product(e, rows, unit, keys, first, states, n, ahead)
        for i in range(rows):
            x = e.load(v + v_step * i) * e.bcast(beta + at, i * e.size)
            acc[i] = e.fma(acc[i], e.bcast(gate + at, i * e.size), x)
        if rows < W:
            acc = fma_panel(e, acc, a + at, u, first, maybe_empty=True)
        triangle, u = a + first * e.row + at, u + first * e.row
        for j in range(rows):
            e.store(acc[j], u, j * e.row)
            if not per_channel:
                e.store(acc[j] * e.bcast(suffix + at, j * e.size), u, (W + j) * e.row)
            for i in range(j + 1, rows):
                acc[i] = e.fma(e.bcast(triangle, j * e.row + i * e.size), acc[j], acc[i])

    return solve


@cache
def output(unit, few=False):
    """Make the second product."""

    @tile
    def output(
        e, queries, p, states, u, n, first, gate, o, o_step, o_next, o_next_step, q_next, q_step
    ):
        """Rows first.. of O = scale e^G Q S + P U; `gate` is what Q S is multiplied with."""
        at, rows = first * e.size, _few_rows(e.size) if few else e.mr
        ahead = (o_next, o_next_step, True), (q_next, q_step, False)
        acc = state_product(e, rows, unit, queries, first, states, n, ahead)
        acc = [x * e.bcast(gate + at, i * e.size) for i, x in enumerate(acc)]
        if rows < W:
            acc = fma_panel(e, acc, p + at, u, first, maybe_empty=True)
        triangle, u = p + first * e.row + at, u + first * e.row
        for j in range(rows):
            x = e.load(u, j * e.row)
            for i in range(j, rows):
                acc[i] = e.fma(e.bcast(triangle, j * e.row + i * e.size), x, acc[i])
        o = o + o_step * first
        for i in range(rows):
            e.store(acc[i], o + o_step * i)

    return output


@cache
def update(per_channel, unit):
    """Make the third product, of all units but `SQUARES`.

    The panel has tokens as its rows, and with one gate per token channels. With `DOTS` the rows of
    the state are stored as words too; the product is one of words if k is in the panel as it is.
    With a gate per channel k and U both would be rounded for every token that is added to the
    state, more than it can bear where nothing decays.
    """
    pairs = unit != FLOATS
    dots = pairs and not per_channel
    token_step, channel_step = (W, 1) if per_channel else (1, W // 2 if dots else W)

    @tile
    def update(e, keys, n, rows, u, decay, words):
        """16 rows of S = e^G_last S + K^T U over n tokens, where K or U has the factor e^(G_last -
        G); n is a multiple of the tile's rows.
        """
        rounds = min(4, e.mr)
        for first in range(0, W, e.mr):
            channels = range(first, first + e.mr)

            def body(offset, carried, channels=channels):
                *acc, key = carried
                for t in range(rounds):
                    at = [(t * token_step + i * channel_step) * e.size for i in channels]
                    if dots:
                        x = e.load_words(u + offset, t * e.row)
                        acc = [e.dot(key, place, x, y) for place, y in zip(at, acc)]
                    else:
                        x = e.load(u + offset, t * e.row)
                        acc = [e.fma(e.bcast(key, place), x, y) for place, y in zip(at, acc)]
                return [*acc, key + rounds * token_step * e.size]

            acc = [e.bcast(decay, i * e.size) * e.load(rows, i * e.row) for i in channels]
            width = n * (e.row // 2 if dots else e.row)
            *acc, _ = e.loop(width, [*acc, keys], body, rounds * e.row)
            for i, x in zip(channels, acc):
                e.store(x, rows, i * e.row)
        if pairs:
            for i in range(0, W, 2):
                low, high = (e.load(rows, j * e.row) for j in (i, i + 1))
                e.store(e.pair(low, high), words, i // 2 * e.row)

    return update
