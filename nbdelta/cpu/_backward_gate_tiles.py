"""Tiles of the backward pass for gates: those per channel, and what was done to the inputs."""

from nbdelta.cpu._simd import tile
from nbdelta.cpu._vector_unit import W

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
    """Turn gradients of 16 normalised rows x, in tiles of 16 channels, into those of the rows."""
    for t in range(W):
        source, target = x + x_step * t, dx + t * e.row

        def add(offset, carried, source=source):
            total, row = carried
            return [e.fma(e.load(source + offset), e.load(row), total), row + W * e.row]

        total, _ = e.loop(n * e.size, [e.splat(0.0), target], add, e.row)
        along, factor = e.splat(e.total(total)) * -1.0, e.bcast(norm, t * e.size)

        def turn(offset, carried, source=source, factor=factor, along=along):
            row = carried[0]
            e.store(e.fma(along, e.load(source + offset), e.load(row)) * factor, row)
            return [row + W * e.row]

        e.loop(n * e.size, [target], turn, e.row)


@tile
def norm_gradient_of_columns(e, x, norm, n, dx):
    """The same for columns of n channels."""
    rounds = 4

    def add(offset, totals):
        at = [offset + i * e.row for i in range(rounds)]
        return [e.fma(e.load(x + i), e.load(dx + i), total) for i, total in zip(at, totals)]

    a, b, c, d = e.loop(n * e.row, [e.splat(0.0)] * rounds, add, rounds * e.row)
    along, factor = ((a + b) + (c + d)) * -1.0, e.load(norm)

    def turn(offset, carried):
        e.store(e.fma(along, e.load(x + offset), e.load(dx + offset)) * factor, dx + offset)
        return carried

    e.loop(n * e.row, [], turn, e.row)


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
