"""Tiles of a block with a gate per channel: running products, one exp per token and channel."""

from functools import cache

from nbdelta.cpu._simd import tile
from nbdelta.cpu._tiles import KEY_GATE, QUERY_GATE, store_square
from nbdelta.cpu._vector_unit import W


def _store_block(e, squares, block, out, step, token, channel):
    """Store a block of token rows as columns, or for squares as rounded rows `step` bytes apart."""
    if not squares:
        store_square(e, e.transpose(block), out, token, channel)
        return
    for i, x in enumerate(block):
        e.store_halves(e.halves(x), out + step * (token + i), channel * 2)


@tile
def decay_rows(e, g, g_step, n, out, out_step):
    """e^g of 16 token rows of n channels, row after row as in `inverse_norms`.

    In a loop of its own, or what stays in registers for a panel leaves too few of them for it.
    """

    def row(_, carried):
        g, out = carried

        def body(offset, carried):
            e.store(e.exp(e.load(g + offset, 0, e.lanes)), out + offset)
            return carried

        e.loop(n * e.size, [], body, e.lanes * e.size)
        return [g + g_step, out + out_step]

    e.loop(W, [g, out], row)


@cache
def prefix_columns(squares):
    @tile
    def prefix_columns(e, x, decays, step, out, out_step, total):
        """16 tokens by 16 channels: x e^G as columns (squares: rounded rows), and e^G of the last
        token.
        """
        for channel in range(0, W, e.lanes):
            at = channel * e.size
            prefix = e.splat(1.0, e.lanes)
            for token in range(0, W, e.lanes):
                block = []
                for t in range(token, token + e.lanes):
                    prefix = prefix * e.load(decays + step * t, at, e.lanes)
                    block.append(e.load(x + step * t, at, e.lanes) * prefix)
                _store_block(e, squares, block, out, out_step, token, channel)
            e.store(prefix, total, at)

    return prefix_columns


@cache
def suffix_rows(squares):
    @tile
    def suffix_rows(e, k, decays, step, out):
        """out[token][channel] = k e^(G_last - G) for 16 tokens by 16 channels.

        For squares out[channel] is a row of 32 halves, the tokens twice.
        """
        for channel in range(0, W, e.lanes):
            at = channel * e.size
            suffix, rows = e.splat(1.0, e.lanes), []
            for t in reversed(range(W)):
                rows.insert(0, e.load(k + step * t, at, e.lanes) * suffix)
                suffix = suffix * e.load(decays + step * t, at, e.lanes)
            if not squares:
                for t, x in enumerate(rows):
                    e.store(x, out, t * e.row + at)
                continue
            for t in range(0, W, e.lanes):
                for c, x in enumerate(e.transpose(rows[t : t + e.lanes])):
                    halves = e.halves(x)
                    for place in (t, W + t):
                        e.store_halves(halves, out, (channel + c) * e.row + 2 * place)

    return suffix_rows


# ---- pairs of tokens: a register of sums for each, over the channels lane by lane ----

# registers of channels: as many as fit beside the running sums
SOME = 4


def _after_keys(e):
    """Bytes from the sums of k.k to those of q.k, of two tokens each."""
    return 2 * W * e.lanes * e.size


def _pair_sums(vectors_of):
    """Make the tile that adds the pair sums of two tokens over ``vectors_of(e)`` registers."""

    @tile
    def pair_sums(e, k, q, decay, step, n, first, second, own):
        """Add the products of k_i and q_i with k_j e^(G_i - G_j) to the sums of tokens j and j + 1.

        Those of j begin at `first` with i = j + 1, those of j + 1 at `second`, where n tokens
        follow; q_j k_j is added to `own`. The products of k_j and the decays run along in
        registers; both tokens share what is loaded of the others.
        """
        width = e.lanes * e.size
        at = [v * width for v in range(vectors_of(e))]

        def load(rows):
            return [e.load(rows, offset, e.lanes) for offset in at]

        def add(rows, targets):
            totals = [e.load(out, 0, e.lanes) for out, _ in targets]
            for v, offset in enumerate(at):
                y = e.load(rows, offset, e.lanes)
                totals = [e.fma(x[v], y, total) for total, (_, x) in zip(totals, targets)]
            for total, (out, _) in zip(totals, targets):
                e.store(total, out)

        def pass_on(running, rows):
            decays = load(rows)
            return [[x * y for x, y in zip(own, decays)] for own in running]

        early = load(k)
        add(q, [(own, early)])
        (early,) = pass_on([early], decay + step)
        late = load(k + step)
        add(k + step, [(first, early)])
        add(q + step, [(first + _after_keys(e), early), (own + width, late)])

        def body(offset, carried):
            *running, out = carried
            token = step * 2 + offset
            running = pass_on([running[: len(at)], running[len(at) :]], decay + token)
            for rows, behind in ((k, 0), (q, _after_keys(e))):
                places = first + width + behind + out, second + behind + out
                add(rows + token, list(zip(places, running)))
            return [*running[0], *running[1], out + width]

        e.loop(n * step, [*early, *late, e.integer(0)], body, step, maybe_empty=True)

    return pair_sums


some_pair_sums = _pair_sums(lambda e: SOME)
few_pair_sums = _pair_sums(lambda e: W // e.lanes)


@tile
def clear_sums(e, sums, n):
    """Set n registers to zero."""

    def body(offset, carried):
        e.store(e.splat(0.0, e.lanes), sums + offset)
        return carried

    e.loop(n * (e.lanes * e.size), [], body, e.lanes * e.size)


def _sums(e, sums, slot):
    width = e.lanes * e.size
    return e.sum_lanes([e.load(sums, i * width, e.lanes) for i in range(slot, slot + e.lanes)])


@tile
def finish_pairs(e, sums, gates, token, a, p):
    """Rows j of A and P for j = `token`, in the first half of the block, and j = 15 - `token`.

    Register s of the sums has token i = s + 1 for the one, and i = s + 16 - `token` for the other,
    which has as many pairs as the one leaves registers. What is written beyond these is in lanes
    up to i = j, here or in the next row.
    """
    for behind, gate, out in ((0, KEY_GATE, a), (_after_keys(e), QUERY_GATE, p)):
        for slot in range(0, W, e.lanes):
            total = _sums(e, sums + behind, slot)
            rows = [(token, 1), (W - 1 - token, W - token)]
            for j, i in rows if slot < W // 2 else rows[:1]:
                at = (i + slot) * e.size
                factors = e.load(gates + gate * e.row + at, 0, e.lanes)
                e.store(total * factors, out + j * e.row + at)


@tile
def finish_own(e, sums, gates, p):
    """The diagonal of P."""
    for slot in range(0, W, e.lanes):
        at = slot * e.size
        factors = e.load(gates, QUERY_GATE * e.row + at, e.lanes)
        e.store(_sums(e, sums, slot) * factors, sums, at)
    for j in range(W):
        e.store(e.scalar(sums, j * e.size), p, j * (e.row + e.size))
