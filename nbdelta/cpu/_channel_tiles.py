"""Tiles of a block with a gate per channel: running products, one exp per token and channel."""

from functools import cache

from nbdelta.cpu._simd import tile
from nbdelta.cpu._tiles import store_columns
from nbdelta.cpu._vector_unit import W


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
