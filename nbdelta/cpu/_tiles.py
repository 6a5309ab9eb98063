"""Operations on tiles of 16 tokens or 16 channels, one vector emitter function each.

Layouts, with ``row`` the bytes of 16 numbers:

- *columns*: channel-major panel ``[K][16 tokens]``, 16 tokens of a channel in one row;
- *rows*: ``[K / 16][16 tokens][16 channels]``, tiles of token rows;
- *strip*: 16 columns of the state, ``[K][16]``, with the rows of ``U`` of the block right behind.

A panel of 16 more rows behind ``K`` holds the lower triangle that meets those rows of ``U``: one
loop over the panel and the strip together is ``[K-part | triangle] [S; U]``.
"""

from functools import cache

from nbdelta.cpu._matrix_unit import DOTS, FLOATS, SQUARES
from nbdelta.cpu._simd import constant_of, tile
from nbdelta.cpu._vector_unit import W, tile_rows


def fetch_lines(e, ahead, i, n):
    """Bring line i of each of `ahead` into the cache: address, step, whether it will be written.

    There are n of them. Arrays of NumPy lie across lines: past the first n come their ends.
    """
    if ahead:
        line, end = i % n, i // n % 2 * (e.row - 1)
    for address, step, write in ahead:
        e.prefetch(address + step * line + end, write)


def fma_panel(e, acc, panel, strip, n, maybe_empty=False, ahead=(), pairs=False):
    """acc[i] += panel[s][i] * strip[s][:] for s < n, a multiple of the rows of a tile.

    With `pairs`, n rows of both are n / 2 rows of words, see `pair_rows`. One line of each
    of `ahead` is brought into the cache a round, see `fetch_lines`, so that the misses of the next
    block are spread over the arithmetic of this one.
    """
    unroll = min(4, e.mr)

    def body(offset, acc):
        fetch_lines(e, ahead, offset // (unroll * e.row), len(acc))
        a = panel + offset
        for u in range(unroll):
            at = [u * e.row + i * e.size for i in range(len(acc))]
            if pairs:
                x = e.load_words(strip + offset, u * e.row)
                acc = [e.dot(a, place, x, y) for place, y in zip(at, acc)]
            else:
                x = e.load(strip + offset, u * e.row)
                acc = [e.fma(e.bcast(a, place), x, y) for place, y in zip(at, acc)]
        return acc

    width = n * (e.row // 2 if pairs else e.row)
    return e.loop(width, acc, body, unroll * e.row, maybe_empty)


# ---- rows of tokens to panels ----


def store_columns(e, block, columns, token, channel):
    """Store a square of token rows transposed into a panel."""
    for c, x in enumerate(e.transpose(block)):
        e.store(x, columns, (channel + c) * e.row + token * e.size)


@tile
def inverse_norms(e, x, x_step, n, eps, out, copies, copy_step):
    """out[i] = 1 / sqrt(sum over n channels of x_i^2 + eps) for 16 token rows, which are copied.

    Row after row: a step that is a power of two brings the same channel of 16 tokens into one set
    of the cache, which does not hold as many lines.
    """
    for token in range(0, W, e.lanes):
        sums = []
        for t in range(token, token + e.lanes):

            def body(offset, acc, row=x + x_step * t, copy=copies + copy_step * t):
                x = e.load(row + offset, 0, e.lanes)
                e.store(x, copy + offset)
                return [e.fma(x, x, acc[0])]

            sums += e.loop(n * e.size, [e.splat(0.0, e.lanes)], body, e.lanes * e.size)
        total = e.sum_lanes(sums) + e.splat(eps, e.lanes)
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
def pair_rows(e, rows, n, out):
    """Round n rows to bfloat16 and join rows 2 i and 2 i + 1: n / 2 rows of words."""

    def body(offset, target):
        low, high = e.load(rows + offset), e.load(rows + offset, e.row)
        e.store(e.pair(low, high), target[0])
        return [target[0] + e.row]

    e.loop(n * e.row, [out], body, 2 * e.row)


@tile
def round_rows(e, rows, n, out):
    """N rows of 16 numbers in bfloat16: neighbours are the halves of a word."""

    def body(offset, target):
        e.store_halves(e.halves(e.load(rows + offset)), target[0])
        return [target[0] + e.row // 2]

    e.loop(n * e.row, [out], body, e.row)


@cache
def gram(pairs):
    """Make the product of two panels, with `pairs` of two panels of words."""

    @tile
    def gram(e, a, b, first, n, out):
        """Rows j from `first`, out[j][:] = sum over n channels of a[channel][j] * b[channel][:]."""
        acc = [e.splat(0.0)] * e.mr
        acc = fma_panel(e, acc, a + first * e.size, b, n, pairs=pairs)
        for i in range(e.mr):
            e.store(acc[i], out + first * e.row, i * e.row)

    return gram


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
KEY_GATE, QUERY_GATE, SUFFIX, DECAY, LAST = range(5)


@tile
def gate_products(e, g, beta, scale, out):
    """From 16 log gates and betas: -beta e^G, scale e^G, e^(G_last - G), e^g, e^G_last."""
    decay = e.exp(e.load(g))
    prefix, suffix = decay, e.shift(decay, -1, 1.0)
    for by in (1, 2, 4, 8):
        prefix = prefix * e.shift(prefix, by, 1.0)
        suffix = suffix * e.shift(suffix, -by, 1.0)
    key_gate, last = e.load(beta) * -1.0 * prefix, e.shuffle(prefix, prefix, [W - 1] * W)
    for i, x in enumerate((key_gate, e.splat(scale) * prefix, suffix, decay, last)):
        e.store(x, out, i * e.row)


@tile
def apply_norms(e, k_norm, q_norm, kk, qk):
    """Norms of raw panels, for the products of their tokens."""
    keys, queries = e.load(k_norm), e.load(q_norm)
    for j in range(W):
        norm = e.bcast(k_norm, j * e.size)
        e.store(e.load(kk, j * e.row) * (norm * keys), kk, j * e.row)
        e.store(e.load(qk, j * e.row) * (norm * queries), qk, j * e.row)


@tile
def multiply_row(e, x, factors):
    e.store(e.load(x) * e.load(factors), x)


@tile
def decay_pairs(e, kk, qk, gates, beta, scale, a, p):
    """a[j][i] = -beta_i e^(G_i - G_j) kk[j][i] and p[j][i] = scale e^(G_i - G_j) qk[j][i] for i >=
    j.

    Lanes i < j hold anything and are never read. Lane j is set, not added: a NaN of a later
    token's gate must not reach it.
    """
    neg_beta, query_scale = e.load(beta) * -1.0, e.splat(scale)
    pair = e.splat(1.0)
    for j in reversed(range(W)):
        if j + 1 < W:
            pair = pair * e.bcast(gates, DECAY * e.row + (j + 1) * e.size)
        pair = e.set_lane(pair, j, 1.0)
        e.store(e.load(kk, j * e.row) * (pair * neg_beta), a, j * e.row)
        e.store(e.load(qk, j * e.row) * (pair * query_scale), p, j * e.row)


# ---- the same for a gate per channel: running products, one exp per token and channel ----


def _store_block(e, squares, block, out, step, token, channel):
    """Store a block of token rows as columns, or for squares as rounded rows `step` bytes apart."""
    if not squares:
        store_columns(e, block, out, token, channel)
        return
    for i, x in enumerate(block):
        e.store_halves(e.halves(x), out + step * (token + i), channel * 2)


@cache
def key_panels(squares):
    @tile
    def key_panels(e, k, k_step, norm, g, g_step, step, k_rows, decay_rows, out, out_step, total):
        """16 tokens by 16 channels: normalised k and e^g as token rows `step` bytes apart, k e^G as
        columns (squares: rounded rows), and e^G of the last token.
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
                    block.append(key * prefix)
                _store_block(e, squares, block, out, out_step, token, channel)
            e.store(prefix, total, at)

    return key_panels


@cache
def query_panels(squares):
    @tile
    def query_panels(e, q, q_step, norm, decay_rows, step, q_rows, out, out_step):
        """16 tokens by 16 channels: normalised q as token rows, and q e^G as `key_panels` has k."""
        for channel in range(0, W, e.lanes):
            at = channel * e.size
            prefix = e.splat(1.0, e.lanes)
            for token in range(0, W, e.lanes):
                block = []
                for t in range(token, token + e.lanes):
                    norms = e.bcast(norm, t * e.size, e.lanes)
                    query = e.load(q + q_step * t, at, e.lanes) * norms
                    e.store(query, q_rows + step * t, at)
                    prefix = prefix * e.load(decay_rows + step * t, at, e.lanes)
                    block.append(query * prefix)
                _store_block(e, squares, block, out, out_step, token, channel)

    return query_panels


@cache
def suffix_rows(squares):
    @tile
    def suffix_rows(e, k_rows, decay_rows, step, out):
        """out[token][channel] = k e^(G_last - G) for 16 tokens by 16 channels.

        For squares out[channel] is a row of 32 halves: the tokens, and what rounding took of them.
        """
        for channel in range(0, W, e.lanes):
            at = channel * e.size
            suffix, rows = e.splat(1.0, e.lanes), []
            for t in reversed(range(W)):
                rows.insert(0, e.load(k_rows + step * t, at, e.lanes) * suffix)
                suffix = suffix * e.load(decay_rows + step * t, at, e.lanes)
            if not squares:
                for t, x in enumerate(rows):
                    e.store(x, out, t * e.row + at)
                continue
            for t in range(0, W, e.lanes):
                for c, x in enumerate(e.transpose(rows[t : t + e.lanes])):
                    halves = e.halves(x)
                    e.store_halves(halves, out, (channel + c) * e.row + 2 * t)
                    rest = e.halves(x - e.from_halves(halves))
                    e.store_halves(rest, out, (channel + c) * e.row + 2 * (W + t))

    return suffix_rows


# registers of channels: as many as fit beside the running sums, and half of them
MANY, SOME = 8, 4


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

        e.loop(n * step, [*running, e.integer(0)], body, step, maybe_empty=True)

    return pair_sums


many_pair_sums, some_pair_sums = _pair_sums(lambda e: MANY), _pair_sums(lambda e: SOME)
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
def finish_pairs(e, kk, qk, beta, scale, a, p):
    """a[i] = -beta_i times the lane sum of kk[i], p[i] = scale times the lane sum of qk[i]."""
    width = e.lanes * e.size
    for token in range(0, W, e.lanes):
        rows = range(token, token + e.lanes)
        keys = e.sum_lanes([e.load(kk, i * width, e.lanes) for i in rows])
        queries = e.sum_lanes([e.load(qk, i * width, e.lanes) for i in rows])
        at = token * e.size
        e.store(keys * e.load(beta, at, e.lanes) * -1.0, a, at)
        e.store(queries * e.splat(scale, e.lanes), p, at)


# ---- the three state products, `MR` rows of 16 columns at a time ----


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
