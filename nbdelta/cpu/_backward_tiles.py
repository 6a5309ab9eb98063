"""Operations on tiles for the backward pass; layouts as in `_tiles`.

Gradients of k and q are collected as *columns* where the gate is one per token, and where it is
one per channel as *rows*, both in tiles of 16 x 16, so that one is the other with every tile
transposed.
"""

from functools import cache

from nbdelta.cpu._simd import W, tile
from nbdelta.cpu._tiles import DECAY, KEY_GATE, QUERY_GATE, SUFFIX, fma_panel


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


# ---- the states of a chunk once more ----

# what lies behind the state in a strip: U, e^(G_last - G) U, and E with U = beta E
U_ROWS, SUFFIX_ROWS, ERROR_ROWS, ROWS_BEHIND = 0, W, 2 * W, 3 * W


@tile
def solve_errors(e, keys, a, state, u, n, first, gates, v, v_step, beta):
    """Rows first.. of E = V - e^G K S - M U and of U = beta E; `a` holds -M."""
    v, at = v + v_step * first, first * e.size
    acc = fma_panel(e, [e.splat(0.0)] * e.mr, keys + at, state, n)
    for i in range(e.mr):
        gate = e.bcast(gates + at, KEY_GATE * e.row + i * e.size)
        acc[i] = e.fma(acc[i], gate, e.load(v + v_step * i))
    if e.mr < W:
        acc = fma_panel(e, acc, a + at, u, first, maybe_empty=True)
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
def advance(e, keys, rows, u, decay, out):
    """16 rows of e^G_last S + K^T U, where K or U has the factor e^(G_last - G)."""
    for first in range(0, W, e.mr):
        channels = range(first, first + e.mr)
        acc = [e.bcast(decay, i * e.size) * e.load(rows, i * e.row) for i in channels]
        acc = fma_channels(e, acc, keys, u, channels)
        for i, x in zip(channels, acc):
            e.store(x, out, i * e.row)


# ---- through the triangular system, in reverse ----


@tile
def solve_transposed(e, keys, at, pt, dstate, do, y, n, first, gates, beta, errors, dbeta):
    """Rows first.. of dU = e^(G_last - G) K dS + P^T dO - M^T Y and of Y = beta dU.

    `at` and `pt` hold -M and P with the reading token as the row. Added to dbeta[i] is dU_i E_i,
    lane by lane.
    """
    lane = first * e.size
    acc = fma_panel(e, [e.splat(0.0)] * e.mr, keys + lane, dstate, n)
    acc = [x * e.bcast(gates + lane, SUFFIX * e.row + i * e.size) for i, x in enumerate(acc)]
    if e.mr < W:
        # the tokens behind this tile
        behind, rest = (first + e.mr) * e.row, (first + (e.mr - W)) * -1
        acc = fma_panel(e, acc, pt + behind + lane, do + behind, rest, maybe_empty=True)
        acc = fma_panel(e, acc, at + behind + lane, y + behind, rest, maybe_empty=True)
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


@tile
def scale_rows(e, x, x_step, factor, out):
    """16 rows, each times a factor of its own, one behind the other."""
    for t in range(W):
        e.store(e.load(x + x_step * t) * e.bcast(factor, t * e.size), out, t * e.row)


@tile
def transpose_into(e, x, out):
    """A tile of 16 x 16 transposed."""
    for i in range(0, W, e.lanes):
        for j in range(0, W, e.lanes):
            rows = [e.load(x, (i + r) * e.row + j * e.size, e.lanes) for r in range(e.lanes)]
            for r, value in enumerate(e.transpose(rows)):
                e.store(value, out, (j + r) * e.row + i * e.size)


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


def _through_strips(e, strips, strip_step, end, panel):
    """acc[c][:] = sum over the value columns v of strips[c][v] * panel[v][:], for a tile's
    channels; the strips end after `end` bytes.
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
    return acc


@cache
def state_products(per_channel):
    """Make the products of the state with dO and Y, and of its gradient with U."""

    @tile
    def state_products(
        e, state, state_step, end, dstate, dstate_step, dend, do, y, u, gates, queries, keys,
        wp, wpt, wa, dq, dk, written, reads, writes,
    ):  # fmt: skip
        """Columns of dq and dk for some channels: what a token reads of the state and writes to it.

        `do`, `y` and `u` are panels with the value columns as rows. With one gate per token what
        goes through P and M is there too, it is all added to dq and dk, and the sums over channels
        of q.dq + k.dk and of k.dk through the state are added to `reads` and `writes`. With a gate
        per channel the three products go to dq, dk and `written`.
        """
        channels = range(e.mr)

        def finish(acc, gate, total, columns, more, target):
            factor = e.load(gates, gate * e.row)
            acc = [x * factor for x in acc]
            if not per_channel:
                through = e.load(total)
                for c, x in enumerate(acc):
                    through = e.fma(e.load(columns, c * e.row), x, through)
                e.store(through, total)
                for panel, rows in more:
                    acc = fma_channels(e, acc, panel, rows, channels)
                acc = [x + e.load(target, c * e.row) for c, x in enumerate(acc)]
            for c, x in enumerate(acc):
                e.store(x, target, c * e.row)

        acc = _through_strips(e, state, state_step, end, do)
        finish(acc, QUERY_GATE, reads, queries, [(keys, wp)], dq)
        acc = _through_strips(e, state, state_step, end, y)
        finish(acc, KEY_GATE, reads, keys, [(keys, wa), (queries, wpt)], dk)
        acc = _through_strips(e, dstate, dstate_step, dend, u)
        finish(acc, SUFFIX, writes, keys, [], written)

    return state_products


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


# ---- a gate per channel: every product of a pair of tokens runs along by itself ----


@tile
def channel_states(e, k, q, decay, step, reads_q, reads_k, writes, kept, dq, dk, dg, dg_step):
    """What goes through the state, for 16 tokens by 16 channels.

    The tiles `reads_q`, `reads_k` and `writes` come without their e^G and e^(G_last - G); `kept`
    has what passes through all gates. The gradients of q and k are added to, that of the gate is
    set.
    """
    for channel in range(0, W, e.lanes):
        at = channel * e.size

        def load(x, t, step=e.row, at=at):
            return e.load(x + t * step if isinstance(step, int) else x + step * t, at, e.lanes)

        def add(value, x, t, at=at, load=load):
            e.store(load(x, t) + value, x, t * e.row + at)

        prefix = e.splat(1.0, e.lanes)
        for t in range(W):
            prefix = prefix * load(decay, t, step)
            a, b = prefix * load(reads_q, t), prefix * load(reads_k, t)
            add(a, dq, t)
            add(b, dk, t)
            through = a * load(q, t, step) + b * load(k, t, step)
            e.store(through, dg + dg_step * t, at)
        suffix, reads = e.splat(1.0, e.lanes), e.splat(0.0, e.lanes)
        for t in reversed(range(W)):
            x = suffix * load(writes, t)
            add(x, dk, t)
            e.store(x * load(k, t, step), writes, t * e.row + at)
            suffix = suffix * load(decay, t, step)
            reads = reads + load(dg, t, dg_step)
            e.store(reads, dg + dg_step * t, at)
        passing = e.load(kept, at, e.lanes)
        for t in range(W):
            e.store(load(dg, t, dg_step) + passing, dg + dg_step * t, at)
            passing = passing + load(writes, t)


@tile
def pairs_forward(e, k, decay, token, before, now, wp, wa, dq, dk):
    """Let the products k_j e^(G_i - G_j) of the `token` earlier tokens j run on to token i.

    Rows of 16 channels: `before` has those of the token before, `now` gets those of this one, its
    own k last. Added to dq and dk is what token i reads of them.
    """
    factor = e.load(decay)

    def body(offset, carried):
        a, b, write, erase = carried
        x = e.load(before + offset) * factor
        e.store(x, now + offset)
        a, b = e.fma(e.bcast(write), x, a), e.fma(e.bcast(erase), x, b)
        return [a, b, write + e.row, erase + e.row]

    carried = [e.load(dq), e.load(dk), wp, wa]
    a, b, write, _ = e.loop(token * e.row, carried, body, e.row, maybe_empty=True)
    own = e.load(k)
    e.store(own, now + token * e.row)
    e.store(e.fma(e.bcast(write), own, a), dq)
    e.store(b, dk)


@tile
def pairs_backward(e, k, q, decay, token, now, back, wp, wa, dk, dg):
    """The gradients of the running products of token i, in the rows of `back`, from the last token
    to the first one.
    """
    key, query, factor = e.load(k), e.load(q), e.load(decay)

    def body(offset, carried):
        gate, write, erase = carried
        x = e.fma(e.bcast(write), query, e.load(back + offset))
        x = e.fma(e.bcast(erase), key, x)
        e.store(x * factor, back + offset)
        return [e.fma(x, e.load(now + offset), gate), write + e.row, erase + e.row]

    carried = [e.load(dg), wp, wa]
    gate, write, _ = e.loop(token * e.row, carried, body, e.row, maybe_empty=True)
    e.store(gate, dg)
    x = e.fma(e.bcast(write), query, e.load(back + token * e.row))
    e.store(e.load(dk) + x, dk)


# ---- back through what was done to the inputs ----


@tile
def norm_gradient(e, x, x_step, norm, n, dx):
    """Turn gradients of 16 normalised rows, in tiles of 16 channels, into those of the rows."""
    for t in range(W):
        source, target = x + x_step * t, dx + t * e.row
        factor = e.bcast(norm, t * e.size)

        def add(offset, carried, source=source):
            total, row = carried
            return [e.fma(e.load(source + offset), e.load(row), total), row + W * e.row]

        total, _ = e.loop(n * e.size, [e.splat(0.0), target], add, e.row)
        along = e.splat(e.total(total)) * factor * factor * factor * -1.0

        def turn(offset, carried, source=source, factor=factor, along=along):
            row = carried[0]
            e.store(e.fma(along, e.load(source + offset), factor * e.load(row)), row)
            return [row + W * e.row]

        e.loop(n * e.size, [target], turn, e.row)


def _finish_gate(e, dg, slope, by_rate, drate, dbias):
    grad = e.load(dg)
    # an infinite gate that nothing passes through: 0, not 0 times infinity
    by_rate = e.select(grad, "==", 0.0, 0.0, grad * by_rate)
    e.store(e.load(drate) + by_rate, drate)
    grad = grad * slope
    e.store(e.load(dbias) + grad, dbias)
    e.store(grad, dg)


@tile
def softplus_gate_gradient(e, x, bias, factor, dg, drate, dbias):
    """Turn a row of gradients of ``factor * softplus(x + bias)`` into that of x, and add those of
    log(-factor) and bias.
    """
    x = e.load(x) + e.load(bias)
    slope, by_rate = e.sigmoid(x) * e.splat(factor), e.softplus(x) * e.splat(factor)
    _finish_gate(e, dg, slope, by_rate, drate, dbias)


@tile
def bounded_gate_gradient(e, x, bias, factor, lower_bound, dg, drate, dbias):
    """The same for ``lower_bound * sigmoid(factor * (x + bias))`` and log(factor)."""
    x = (e.load(x) + e.load(bias)) * e.splat(factor)
    by_rate = e.sigmoid(x) * e.sigmoid(x * -1.0) * e.splat(lower_bound)
    slope, by_rate = by_rate * e.splat(factor), by_rate * x
    _finish_gate(e, dg, slope, by_rate, drate, dbias)


@tile
def sigmoid_gradient(e, x, factor, dx):
    """Turn a row of gradients of ``factor * sigmoid(x)`` into that of x."""
    x = e.load(x)
    e.store(e.load(dx) * e.sigmoid(x) * e.sigmoid(x * -1.0) * e.splat(factor), dx)
