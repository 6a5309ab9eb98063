"""Operations on tiles of 16 tokens or 16 channels, one vector emitter function each.

Layouts, with ``row`` the bytes of 16 numbers:

- *columns*: channel-major panel ``[K][16 tokens]``, 16 tokens of a channel in one row;
- *rows*: ``[K / 16][16 tokens][16 channels]``, tiles of token rows;
- *strip*: 16 columns of the state, ``[K][16]``, with the rows of ``U`` of the block right behind.

A panel of 16 more rows behind ``K`` holds the lower triangle that meets those rows of ``U``: one
loop over the panel and the strip together is ``[K-part | triangle] [S; U]``.
"""

from nbdelta.cpu._simd import REAL, W, tile


def fma_panel(e, acc, panel, strip, n, maybe_empty=False, fetch=None):
    """acc[i] += panel[s][i] * strip[s][:] for s < n; n is a multiple of the tile's rows.

    `fetch` is an address and a step: one line a round is brought into the cache, so that the misses
    of the next block are spread over the arithmetic of this one.
    """
    unroll = min(e.mr, 8)
    m = len(acc)

    def body(offset, carried):
        acc = carried[:m]
        if fetch:
            e.prefetch(carried[m])
        for u in range(unroll):
            x = e.load(strip + offset, u * e.row)
            a = panel + offset
            acc = [e.fma(e.bcast(a, u * e.row + i * e.size), x, acc[i]) for i in range(m)]
        return [*acc, carried[m] + fetch[1]] if fetch else acc

    carried = [*acc, fetch[0]] if fetch else acc
    return e.loop(n * e.row, carried, body, unroll * e.row, maybe_empty)[:m]


# ---- rows of tokens to panels ----


def store_columns(e, block, columns, token, channel):
    """Store a square of token rows transposed into a panel."""
    for c, x in enumerate(e.transpose(block)):
        e.store(x, columns, (channel + c) * e.row + token * e.size)


@tile
def inverse_norms(e, x, x_step, n, eps, out):
    """out[i] = 1 / sqrt(sum over n channels of x_i^2 + eps) for 16 token rows."""
    for token in range(0, W, e.lanes):
        starts = [x + x_step * (token + i) for i in range(e.lanes)]

        def body(offset, acc, starts=starts):
            rows = [e.load(start + offset, 0, e.lanes) for start in starts]
            return [e.fma(x, x, a) for x, a in zip(rows, acc)]

        acc = e.loop(n * e.size, [e.splat(0.0, e.lanes)] * e.lanes, body, e.lanes * e.size)
        total = e.sum_lanes(acc) + e.splat(eps, e.lanes)
        e.store(1.0 / e.sqrt(total), out, token * e.size)


@tile
def pack_columns(e, x, x_step, norm, columns):
    """16 tokens by 16 channels, times `norm` per token, as columns."""
    for channel in range(0, W, e.lanes):
        for token in range(0, W, e.lanes):
            block = [
                e.load(x + x_step * t, channel * e.size, e.lanes)
                * e.bcast(norm, t * e.size, e.lanes)
                for t in range(token, token + e.lanes)
            ]
            store_columns(e, block, columns, token, channel)


@tile
def pack_columns_and_rows(e, x, x_step, norm, columns, rows):
    """As `pack_columns`, and the same tile as rows."""
    for channel in range(0, W, e.lanes):
        for token in range(0, W, e.lanes):
            block = []
            for t in range(token, token + e.lanes):
                value = e.load(x + x_step * t, channel * e.size, e.lanes)
                value = value * e.bcast(norm, t * e.size, e.lanes)
                e.store(value, rows, t * e.row + channel * e.size)
                block.append(value)
            store_columns(e, block, columns, token, channel)


@tile
def gram(e, a, b, first, n, out):
    """out[j][:] = sum over channels of a[channel][j] * b[channel][:], MR rows j from `first`."""
    acc = fma_panel(e, [e.splat(0.0)] * e.mr, a + first * e.size, b, n)
    for i in range(e.mr):
        e.store(acc[i], out + first * e.row, i * e.row)


# ---- gates: every decay is a product of factors e^g, at most 1 for g <= 0 ----


@tile
def softplus_gate(e, x, bias, factor, out):
    """Out = factor * softplus(x + bias), with factor = -exp(A_log)."""
    e.store(e.softplus(e.load(x) + e.load(bias)) * e.splat(factor), out)


@tile
def bounded_gate(e, x, bias, factor, lower_bound, out):
    """Out = lower_bound * sigmoid(factor * (x + bias)), with factor = exp(A_log)."""
    e.store(e.sigmoid((e.load(x) + e.load(bias)) * e.splat(factor)) * e.splat(lower_bound), out)


@tile
def sigmoid_row(e, x, factor, out):
    e.store(e.sigmoid(e.load(x)) * e.splat(factor), out)


# rows of what gate_products stores
NEG_BETA, KEY_GATE, QUERY_GATE, SUFFIX, DECAY, PREFIX = range(6)


@tile
def gate_products(e, g, beta, scale, out):
    """From 16 log gates and betas: -beta, -beta e^G, scale e^G, e^(G_last - G), e^g, e^G."""
    decay = e.exp(e.load(g))
    prefix, suffix = decay, e.shift(decay, -1, 1.0)
    for by in (1, 2, 4, 8):
        prefix = prefix * e.shift(prefix, by, 1.0)
        suffix = suffix * e.shift(suffix, -by, 1.0)
    neg_beta = e.load(beta) * -1.0
    for i, x in enumerate(
        (neg_beta, neg_beta * prefix, e.splat(scale) * prefix, suffix, decay, prefix)
    ):
        e.store(x, out, i * e.row)


@tile
def scale_columns(e, x, gate, n, out):
    """out[channel][token] = x[channel][token] * gate[token] for n channels."""
    factor = e.load(gate)

    def body(offset, carried):
        e.store(e.load(x + offset) * factor, out + offset)
        return carried

    e.loop(n * e.row, [], body, e.row)


@tile
def scale_rows(e, x, gate, n, out):
    """out[token][channel] = x[token][channel] * gate[token] for n tiles of rows."""

    def body(offset, carried):
        for t in range(W):
            factor = e.bcast(gate, t * e.size)
            e.store(e.load(x + offset, t * e.row) * factor, out + offset, t * e.row)
        return carried

    e.loop(n * W * e.row, [], body, W * e.row)


@tile
def decay_pairs(e, kk, qk, gates, scale, a, p):
    """a[j][i] = -beta_i e^(G_i - G_j) kk[j][i] and p[j][i] = scale e^(G_i - G_j) qk[j][i] for i >=
    j.

    Lanes i < j hold anything and are never read. Lane j is set, not added: a NaN of a later
    token's gate must not reach it.
    """
    neg_beta, query_scale = e.load(gates, NEG_BETA * e.row), e.splat(scale)
    pair = e.splat(1.0)
    for j in reversed(range(W)):
        if j + 1 < W:
            pair = pair * e.bcast(gates, DECAY * e.row + (j + 1) * e.size)
        pair = e.set_lane(pair, j, 1.0)
        e.store(e.load(kk, j * e.row) * (pair * neg_beta), a, j * e.row)
        e.store(e.load(qk, j * e.row) * (pair * query_scale), p, j * e.row)


# ---- the same for a gate per channel: running products, one exp per token and channel ----


@tile
def key_panels(e, k, k_step, norm, g, g_step, neg_beta, step, k_rows, decay_rows, columns, total):
    """16 tokens by 16 channels: normalised k and e^g as token rows `step` bytes apart, the panel
    -beta k e^G as columns, and e^G of the last token.
    """
    for channel in range(0, W, e.lanes):
        at = channel * e.size
        prefix = e.splat(1.0, e.lanes)
        for token in range(0, W, e.lanes):
            block = []
            for t in range(token, token + e.lanes):
                decay = e.exp(e.load(g + g_step * t, at, e.lanes))
                e.store(decay, decay_rows + step * t, at)
                key = e.load(k + k_step * t, at, e.lanes) * e.bcast(norm, t * e.size, e.lanes)
                e.store(key, k_rows + step * t, at)
                prefix = prefix * decay
                block.append(key * e.bcast(neg_beta, t * e.size, e.lanes) * prefix)
            store_columns(e, block, columns, token, channel)
        e.store(prefix, total, at)


@tile
def query_panels(e, q, q_step, norm, decay_rows, scale, step, q_rows, columns):
    """16 tokens by 16 channels: normalised q as token rows and the panel scale q e^G as columns."""
    for channel in range(0, W, e.lanes):
        at = channel * e.size
        prefix = e.splat(scale, e.lanes)
        for token in range(0, W, e.lanes):
            block = []
            for t in range(token, token + e.lanes):
                query = e.load(q + q_step * t, at, e.lanes) * e.bcast(norm, t * e.size, e.lanes)
                e.store(query, q_rows + step * t, at)
                prefix = prefix * e.load(decay_rows + step * t, at, e.lanes)
                block.append(query * prefix)
            store_columns(e, block, columns, token, channel)


@tile
def suffix_rows(e, k_rows, decay_rows, step, out):
    """out[token][channel] = k e^(G_last - G) for 16 tokens by 16 channels."""
    for channel in range(0, W, e.lanes):
        at = channel * e.size
        suffix = e.splat(1.0, e.lanes)
        for t in reversed(range(W)):
            e.store(e.load(k_rows + step * t, at, e.lanes) * suffix, out, t * e.row + at)
            suffix = suffix * e.load(decay_rows + step * t, at, e.lanes)


MANY = 8  # registers of channels that fit beside the running sums


def _pair_sums(vectors_of):
    """Make the tile that adds the pair sums of one token over ``vectors_of(e)`` registers."""

    @tile
    def pair_sums(e, k, q, decay, step, n, kk, qk):
        """Add to row 0 of `qk` the products q_j k_j and to rows 1 to n of `kk` and `qk` the
        products of k_i and q_i with k_j e^(G_i - G_j), lane by lane, for the n tokens i after
        token j.

        The product of k_j and the decays runs along in registers.
        """
        width = e.lanes * e.size
        at = [v * width for v in range(vectors_of(e))]

        def add(out, running, rows):
            total = e.load(out, 0, e.lanes)
            for x, offset in zip(running, at):
                total = e.fma(x, e.load(rows, offset, e.lanes), total)
            e.store(total, out)

        running = [e.load(k, offset, e.lanes) for offset in at]
        add(qk, running, q)

        def body(offset, carried):
            *running, out = carried
            decays, keys, queries = decay + step + offset, k + step + offset, q + step + offset
            running = [x * e.load(decays, o, e.lanes) for x, o in zip(running, at)]
            out = out + width
            add(kk + out, running, keys)
            add(qk + out, running, queries)
            return [*running, out]

        e.loop(n * step, [*running, e.integer(0)], body, step)

    return pair_sums


many_pair_sums = _pair_sums(lambda e: MANY)
few_pair_sums = _pair_sums(lambda e: W // e.lanes)


@tile
def clear_pairs(e, n, kk, qk):
    """Set n registers of pair sums to zero."""

    def body(offset, carried):
        e.store(e.splat(0.0, e.lanes), kk + offset)
        e.store(e.splat(0.0, e.lanes), qk + offset)
        return carried

    e.loop(n * (e.lanes * e.size), [], body, e.lanes * e.size)


@tile
def finish_pairs(e, kk, qk, neg_beta, scale, a, p):
    """a[i] = -beta_i times the lane sum of kk[i], p[i] = scale times the lane sum of qk[i]."""
    width = e.lanes * e.size
    for token in range(0, W, e.lanes):
        rows = range(token, token + e.lanes)
        keys = e.sum_lanes([e.load(kk, i * width, e.lanes) for i in rows])
        queries = e.sum_lanes([e.load(qk, i * width, e.lanes) for i in rows])
        at = token * e.size
        e.store(keys * e.load(neg_beta, at, e.lanes), a, at)
        e.store(queries * e.splat(scale, e.lanes), p, at)


# ---- the three state products, `MR` rows of 16 columns at a time ----


@tile
def solve(e, panel, strip, n, first, v, v_step, beta, ahead, ahead_step):
    """Rows first.. of U = (I + A)^-1 (beta V - beta e^G K S), stored behind the n rows of the
    strip.

    The panel holds [-beta e^G K | -A]: earlier rows of U are part of the loop, the triangle of
    this tile is solved in registers.
    """
    v, panel = v + first * v_step, panel + first * e.size
    acc = [e.load(v + v_step * i) * e.bcast(beta + first * e.size, i * e.size) for i in range(e.mr)]
    n = n + first
    acc = fma_panel(e, acc, panel, strip, n, maybe_empty=True, fetch=(ahead, ahead_step))
    triangle, u = panel + n * e.row, strip + n * e.row
    for j in range(e.mr):
        e.store(acc[j], u, j * e.row)
        for i in range(j + 1, e.mr):
            acc[i] = e.fma(e.bcast(triangle, j * e.row + i * e.size), acc[j], acc[i])


@tile
def output(e, panel, strip, n, first, o, o_step):
    """Rows first.. of O = scale e^G Q S + P U, with the panel [scale e^G Q | P]."""
    panel = panel + first * e.size
    n = n + first
    acc = fma_panel(e, [e.splat(0.0)] * e.mr, panel, strip, n)
    triangle, u = panel + n * e.row, strip + n * e.row
    for j in range(e.mr):
        x = e.load(u, j * e.row)
        for i in range(j, e.mr):
            acc[i] = e.fma(e.bcast(triangle, j * e.row + i * e.size), x, acc[i])
    o = o + first * o_step
    for i in range(e.mr):
        e.store(acc[i], o + o_step * i)


@tile
def update(e, k_rows, strip, u, decay):
    """16 rows of S = e^G_last S + (K e^(G_last - G))^T U."""
    for first in range(0, W, e.mr):
        rows = range(first, first + e.mr)
        acc = [e.bcast(decay, i * e.size) * e.load(strip, i * e.row) for i in rows]
        for t in range(W):
            x = e.load(u, t * e.row)
            acc = [e.fma(e.bcast(k_rows, t * e.row + i * e.size), x, a) for i, a in zip(rows, acc)]
        for i, a in zip(rows, acc):
            e.store(a, strip, i * e.row)


# ---- one token ----


@tile
def inverse_norm(e, x, n, eps) -> REAL:
    """1 / sqrt(sum of n squares + eps)."""

    def body(offset, acc):
        value = e.load(x + offset)
        return [e.fma(value, value, acc[0])]

    (squares,) = e.loop(n * e.size, [e.splat(0.0)], body, e.row)
    return 1.0 / e.sqrt(e.total(squares) + eps)


@tile
def scale_row(e, x, factor, n):
    """X *= factor for n numbers in place."""

    def body(offset, carried):
        e.store(e.load(x + offset) * e.splat(factor), x + offset)
        return carried

    e.loop(n * e.size, [], body, e.row)


@tile
def token_rows(e, k, q, g, g_step, n, out) -> REAL:
    """Rows of n channels e^g k, e^g q and e^g one behind the other at `out`; return q.k."""
    width = n * e.size

    def body(offset, carried):
        key, query = e.load(k + offset), e.load(q + offset)
        decay = e.exp(e.load(g + offset * g_step))
        e.store(key * decay, out + offset)
        e.store(query * decay, out + width + offset)
        e.store(decay, out + width * 2 + offset)
        return [e.fma(key, query, carried[0])]

    (products,) = e.loop(width, [e.splat(0.0)], body, e.row)
    return e.total(products)


def _step(vectors):
    @tile
    def step(
        e,
        source,
        source_step,
        target,
        target_step,
        ahead,
        k,
        gated,
        n,
        width,
        v,
        beta,
        scale,
        qk,
        o,
    ):
        """One token for `vectors` * 16 columns of the state.

        First pass down the rows: S^T e^g k and S^T e^g q. Second pass up again, where the rows
        read last are still in the cache: S = e^g S + k d^T. The output needs no third pass: o =
        q^T S is S_old^T e^g q + (q.k) d. The columns `ahead` bytes further are fetched as well.
        """
        columns = range(vectors)
        query, decay = gated + width, gated + width * 2

        def read(offset, carried):
            *acc, row = carried
            key_i, query_i = e.bcast(gated + offset), e.bcast(query + offset)
            for line in range(0, vectors * e.row, 64):
                e.prefetch(row + ahead + line)
            for c in columns:
                s = e.load(row, c * e.row)
                acc[2 * c] = e.fma(s, key_i, acc[2 * c])
                acc[2 * c + 1] = e.fma(s, query_i, acc[2 * c + 1])
            return [*acc, row + source_step]

        zeros = [e.splat(0.0)] * (2 * vectors)
        *acc, end = e.loop(n * e.size, [*zeros, source], read, e.size)
        d = []
        for c in columns:
            d.append((e.load(v, c * e.row) - acc[2 * c]) * e.splat(beta))
            result = e.fma(d[c], e.splat(qk), acc[2 * c + 1]) * e.splat(scale)
            e.store(result, o, c * e.row)

        def write(offset, carried):
            row, out = carried[0] - source_step, carried[1] - target_step
            i = (n - 1) * e.size - offset
            key_i, decay_i = e.bcast(k + i), e.bcast(decay + i)
            for c in columns:
                s = e.load(row, c * e.row) * decay_i
                e.store(e.fma(key_i, d[c], s), out, c * e.row)
            return [row, out]

        e.loop(n * e.size, [end, target + target_step * n], write, e.size)

    return step


step_16 = _step(1)
step_32 = _step(2)


# ---- cumulative sums ----


@tile
def sum_columns(e, x, x_step, n, scale, out, out_step):
    """Running sums over n rows of 16 columns, times `scale`."""

    def body(_, carried):
        total, source, target = carried
        total = total + e.load(source)
        e.store(total * e.splat(scale), target)
        return [total, source + x_step, target + out_step]

    e.loop(n, [e.splat(0.0), x, out], body)
