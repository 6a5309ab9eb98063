"""Operations on tiles of 16 tokens or 16 channels, one vector emitter function each.

Layouts, with ``row`` the bytes of 16 numbers:

- *columns*: channel-major panel ``[K][16 tokens]``, 16 tokens of a channel in one row;
- *rows*: ``[K / 16][16 tokens][16 channels]``, tiles of token rows;
- *strip*: 16 columns of the state, ``[K][16]``, with the rows of ``U`` of the block right behind.

A panel of 16 more rows behind ``K`` holds the lower triangle that meets those rows of ``U``: one
loop over the panel and the strip together is ``[K-part | triangle] [S; U]``.
"""

from functools import cache

from nbdelta.cpu._simd import tile
from nbdelta.cpu._vector_unit import W


def fetch_lines(e, ahead, i, n, strips=1):
    """Bring line i of each of `ahead` into the cache: address, step, whether it will be written.

    They have n rows of one or two strips. Arrays of NumPy lie across lines: behind the lines in
    which a row of a strip begins comes the one in which the last strip's ends. (Of tokens that lie
    side by side two strips have more rows than that. The others are left: with steps of a power of
    two all of them would meet in one set of the first cache.)
    """
    if ahead:
        parts = 2 * strips
        line, place = i % n, i // n % parts * ((strips * e.row - 1) // (parts - 1))
    for address, step, write in ahead:
        e.prefetch(address + step * line + place, write)


def fma_panel(e, acc, panel, strips, n, maybe_empty=False, ahead=(), pairs=False):
    """acc[i][x] += panel[s][i] * strips[x][s][:] for s < n, a multiple of the rows of a tile.

    `acc` has the vectors of a row one behind the other, one for each strip. With `pairs`, n rows
    are n / 2 rows of words, see `pair_rows`. One line of each of `ahead` is brought into the cache
    a round, see `fetch_lines`, so that the misses of the next block are spread over the arithmetic
    of this one.
    """
    side = len(strips)
    rows = len(acc) // side
    unroll = min(4, rows)

    def body(offset, acc):
        fetch_lines(e, ahead, offset // (unroll * e.row), rows, side)
        acc, a = list(acc), panel + offset
        for u in range(unroll):
            read = e.load_words if pairs else e.load
            x = [read(strip + offset, u * e.row) for strip in strips]
            for i in range(rows):
                place, own = u * e.row + i * e.size, slice(i * side, (i + 1) * side)
                if pairs:
                    acc[own] = [e.dot(a, place, *xy) for xy in zip(x, acc[own])]
                else:
                    factor = e.bcast(a, place)
                    acc[own] = [e.fma(factor, *xy) for xy in zip(x, acc[own])]
        return acc

    width = n * (e.row // 2 if pairs else e.row)
    return e.loop(width, acc, body, unroll * e.row, maybe_empty)


# ---- rows of tokens to panels ----


def store_square(e, rows, columns, token, channel):
    """Store a square of channel rows into a panel."""
    for c, x in enumerate(rows):
        e.store(x, columns, (channel + c) * e.row + token * e.size)


TOGETHER = 4  # rows


@tile
def inverse_norms(e, x, x_step, n, eps, out, copies, copy_step):
    """out[i] = 1 / sqrt(sum over n channels of x_i^2 + eps) for 16 token rows, which are copied.

    A few rows at a time, whose sums hide each other's latency: a step that is a power of two brings
    the same channel of 16 tokens into one set of the cache, which does not hold as many lines.
    """
    together = range(min(TOGETHER, e.lanes))
    for token in range(0, W, e.lanes):
        sums = []
        for t in range(token, token + e.lanes, len(together)):

            def body(offset, totals, rows=x + x_step * t, copies=copies + copy_step * t):
                rows, copies = rows + offset, copies + offset
                new = []
                for i, total in zip(together, totals):
                    x = e.load(rows + x_step * i, 0, e.lanes)
                    e.store(x, copies + copy_step * i)
                    new.append(e.fma(x, x, total))
                return new

            zeros = [e.splat(0.0, e.lanes)] * len(together)
            sums += e.loop(n * e.size, zeros, body, e.lanes * e.size)
        total = e.sum_lanes(sums) + e.splat(eps, e.lanes)
        e.store(1.0 / e.sqrt(total), out, token * e.size)


@tile
def normalise(e, rows, n, norm):
    """Multiply 16 token rows of n channels, one behind the other, with `norm` per token."""

    def row(i, carried):
        factor = e.bcast(norm + i * e.size)

        def body(offset, carried):
            x = carried[0] + offset
            e.store(e.load(x) * factor, x)
            return carried

        e.loop(n * e.size, carried, body, e.row)
        return [carried[0] + n * e.size]

    e.loop(W, [rows], row)


@tile
def pack_columns(e, x, x_step, norm, columns):
    """16 tokens by 16 channels, times `norm` per token, as columns."""
    for channel in range(0, W, e.lanes):
        for token in range(0, W, e.lanes):
            rows = [x + x_step * t for t in range(token, token + e.lanes)]
            factors = e.load(norm, token * e.size, e.lanes)
            square = [y * factors for y in e.load_transposed(rows, channel * e.size)]
            store_square(e, square, columns, token, channel)


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
        acc = fma_panel(e, acc, a + first * e.size, [b], n, pairs=pairs)
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
