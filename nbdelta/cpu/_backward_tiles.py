"""Operations on tiles for the backward pass; layouts as in `_tiles`.

Gradients of k and q are collected as *columns* where the gate is one per token, and where it is
one per channel as *rows*, both in tiles of 16 x 16, so that one is the other with every tile
transposed.
"""

from functools import cache

from nbdelta.cpu._simd import tile
from nbdelta.cpu._tiles import DECAY, SUFFIX, fma_panel, store_square
from nbdelta.cpu._vector_unit import W


def fma_channels(e, acc, columns, rows, channels):
    """acc[c] += columns[channel c][t] * rows[t][:] over 16 tokens t."""
    rounds = min(4, e.mr)

    def body(offset, carried):
        *acc, x = carried
        for t in range(rounds):
            row = e.load(rows + offset, t * e.row)
            acc = [e.fma(e.bcast(x, c * e.row + t * e.size), row, y) for c, y in zip(channels, acc)]
        return [*acc, x + rounds * e.size]

    *acc, _ = e.loop(W * e.row, [*acc, columns], body, rounds * e.row)
    return acc


# ---- through the triangular system, in reverse ----


@tile
def solve_transposed(e, keys, at, pt, dstate, do, y, n, first, gates, beta, errors, dbeta):
    """Rows first.. of dU = e^(G_last - G) K dS + P^T dO - M^T Y and of Y = beta dU.

    `at` and `pt` hold -M and P with the reading token as the row. Added to dbeta[i] is dU_i E_i,
    lane by lane.
    """
    lane = first * e.size
    acc = fma_panel(e, [e.splat(0.0)] * e.mr, keys + lane, [dstate], n)
    acc = [x * e.bcast(gates + lane, SUFFIX * e.row + i * e.size) for i, x in enumerate(acc)]
    if e.mr < W:
        # the tokens behind this tile
        behind, rest = (first + e.mr) * e.row, (first + (e.mr - W)) * -1
        acc = fma_panel(e, acc, pt + behind + lane, [do + behind], rest, maybe_empty=True)
        acc = fma_panel(e, acc, at + behind + lane, [y + behind], rest, maybe_empty=True)
    own = first * e.row
    for i in range(e.mr):
        x = e.load(do + own, i * e.row)
        for j in range(i + 1):
            place = i * e.row + j * e.size
            acc[j] = e.fma(e.bcast(pt + own + lane, place), x, acc[j])
    for i in reversed(range(e.mr)):
        place = own + i * e.row
        e.store(e.fma(acc[i], e.load(errors + place), e.load(dbeta + place)), dbeta + place)
        x = acc[i] * e.bcast(beta + lane, i * e.size)
        e.store(x, y + place)
        for j in range(i):
            factor = e.bcast(at + own + lane, i * e.row + j * e.size)
            acc[j] = e.fma(factor, x, acc[j])


def _squares(e):
    """Tokens and channels where the register squares of a tile of 16 x 16 begin."""
    return [(t, c) for c in range(0, W, e.lanes) for t in range(0, W, e.lanes)]


@tile
def spread(e, x, factor, scaled, columns):
    """16 rows, each times a factor of its own, and as they are as columns."""
    for token, channel in _squares(e):
        tokens, at = range(token, token + e.lanes), channel * e.size
        rows = [e.load(x, t * e.row + at, e.lanes) for t in tokens]
        for t, value in zip(tokens, rows):
            e.store(value * e.bcast(factor, t * e.size, e.lanes), scaled, t * e.row + at)
        store_square(e, e.transpose(rows), columns, token, channel)


@tile
def transpose_into(e, x, out):
    """A tile of 16 x 16 transposed."""
    for token, channel in _squares(e):
        rows = [x + t * e.row for t in range(token, token + e.lanes)]
        square = e.load_transposed(rows, channel * e.size)
        store_square(e, square, out, token, channel)


@tile
def add_rows(e, x, y, out):
    for i in range(W):
        e.store(e.load(x, i * e.row) + e.load(y, i * e.row), out, i * e.row)


@tile
def pair_weights(e, gates, kk, qk, u_do, u_y, scale, wp, wa, dg):
    """Gradients of P and M times their decay, from the products of U with dO and Y.

    For a writing token j (row) and a reading token i (lane), ``wp[j][i] = scale e^(G_i - G_j)
    u_j.do_i`` for i >= j, ``wa[j][i] = -e^(G_i - G_j) u_j.y_i`` for i > j, and 0 elsewhere.
    dg[t] is the sum of what passes through the gate of token t, all pairs with j < t <= i: no
    difference of sums, so that it is exact where the gate is strong.
    """
    zero, query_scale = e.splat(0.0), e.splat(scale)

    def from_lane(x, first):
        return e.shuffle(x, zero, [i if i >= first else W for i in range(W)])

    decay = e.splat(1.0)
    for j in reversed(range(W)):
        if j + 1 < W:
            decay = decay * e.bcast(gates, DECAY * e.row + (j + 1) * e.size)
        decay = e.set_lane(decay, j, 1.0)
        e.store(decay, wp, j * e.row)
    passing = zero
    for j in range(W):
        decay = e.load(wp, j * e.row)
        write = from_lane(e.load(u_do, j * e.row) * decay * query_scale, j)
        erase = from_lane(e.load(u_y, j * e.row) * decay * -1.0, j + 1)
        e.store(write, wp, j * e.row)
        e.store(erase, wa, j * e.row)
        e.store(e.total(from_lane(passing, j)), dg, j * e.size)
        passing = passing + write * e.load(qk, j * e.row) + erase * e.load(kk, j * e.row)


# ---- gradients of q, k and the state: five more state products ----


@cache
def state_product(per_channel):
    """Make the products of the state with dO and Y, and of its gradient with U."""

    @tile
    def state_product(e, strips, strip_step, end, panel, gate, columns, target, total):
        """Columns of dq or dk for some channels: what a token reads of the state or writes to it.

        The sum over the value columns v of strips[c][v] * panel[v][:], times the row `gate`; the
        strips end after `end` bytes. With one gate per token it is added to `target`, and its
        product with `columns`, summed over channels, to the row `total`. With a gate per channel
        it is stored.
        """

        def body(offset, carried):
            *acc, x = carried
            for v in range(W):
                row = e.load(x, v * e.row)
                acc = [
                    e.fma(e.bcast(strips + offset, c * e.row + v * e.size), row, y)
                    for c, y in enumerate(acc)
                ]
            return [*acc, x + W * e.row]

        *acc, _ = e.loop(end, [*[e.splat(0.0)] * e.mr, panel], body, strip_step)
        factor = e.load(gate)
        acc = [x * factor for x in acc]
        if not per_channel:
            through = e.load(total)
            for c, x in enumerate(acc):
                through = e.fma(e.load(columns, c * e.row), x, through)
            e.store(through, total)
            acc = [x + e.load(target, c * e.row) for c, x in enumerate(acc)]
        for c, x in enumerate(acc):
            e.store(x, target, c * e.row)

    return state_product


@tile
def pair_products(e, queries, keys, wp, wpt, wa, dq, dk):
    """Add what goes through P and M to columns of dq and dk, for some channels.

    `wp` and `wa` are those of `pair_weights`, wpt is wp transposed, and wa has its own transpose
    added to it.
    """
    channels = range(e.mr)
    for target, products in ((dq, [(keys, wp)]), (dk, [(keys, wa), (queries, wpt)])):
        acc = [e.load(target, c * e.row) for c in channels]
        for panel, rows in products:
            acc = fma_channels(e, acc, panel, rows, channels)
        for c, x in enumerate(acc):
            e.store(x, target, c * e.row)


@cache
def state_gradient(per_channel):
    """Make the step of the state's gradient."""

    @tile
    def state_gradient(e, queries, keys, dstate, state, do, y, decay, kept):
        """16 rows of dS <- e^G_last dS + Q^T dO + K^T Y, the rows of dO and Y with their factors.

        The products of S with the old dS are what passes through every gate. They are added to the
        rows of `kept`, all to the first one with one gate per token.
        """
        total = e.splat(0.0)
        for i in range(W, 2 * W):
            e.prefetch(state + i * e.row)
            e.prefetch(dstate + i * e.row)
        for first in range(0, W, e.mr):
            channels = range(first, first + e.mr)
            acc = []
            for i in channels:
                x = e.load(dstate, i * e.row)
                own = e.load(kept, i * e.row) if per_channel else total
                total = e.fma(x, e.load(state, i * e.row), own)
                if per_channel:
                    e.store(total, kept, i * e.row)
                acc.append(e.bcast(decay, i * e.size) * x)
            acc = fma_channels(e, acc, queries, do, channels)
            acc = fma_channels(e, acc, keys, y, channels)
            for i, x in zip(channels, acc):
                e.store(x, dstate, i * e.row)
        if not per_channel:
            e.store(e.load(kept) + total, kept)

    return state_gradient


@tile
def row_sums(e, x, factor, out):
    """out[i] = factor[i] times the sum of row i of 16."""
    for first in range(0, W, e.lanes):
        total = e.splat(0.0, e.lanes)
        for part in range(0, W, e.lanes):
            rows = range(first, first + e.lanes)
            total = total + e.sum_lanes(
                [e.load(x, i * e.row + part * e.size, e.lanes) for i in rows]
            )
        e.store(total * e.load(factor, first * e.size, e.lanes), out, first * e.size)
