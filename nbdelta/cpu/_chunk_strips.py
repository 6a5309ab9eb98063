"""U, O and the new state of a value head of the chunked kernel, in strips of 16 columns."""

from functools import cache

from nbdelta.cpu._call import KEY, VALUE, G, K, O, Q, V, array_at, at, lines
from nbdelta.cpu._channel_tiles import suffix_rows
from nbdelta.cpu._chunk_scratch import strip_rows_of
from nbdelta.cpu._jit import njit
from nbdelta.cpu._kept_rows import keep_rows, kept_rows
from nbdelta.cpu._matrix_unit import (
    DOTS,
    FLOATS,
    SQUARES,
    add_products,
    half_rows,
    multiply_rows,
    multiply_two,
    split_words,
)
from nbdelta.cpu._memory import copy_rows, fetch_rows, is_plain, load_tokens, store_tokens
from nbdelta.cpu._simd import itemsize, padded
from nbdelta.cpu._strip_tiles import output, solve, tile_rows_of, update
from nbdelta.cpu._tiles import KEY_GATE, QUERY_GATE, SUFFIX, pair_rows
from nbdelta.cpu._vector_unit import LINE, W, side_by_side

SIDE = side_by_side()


@cache
def value_strips(PER_CHANNEL, unit):
    return _by_squares(PER_CHANNEL) if unit == SQUARES else _by_panels(PER_CHANNEL, unit)


@njit()
def _output_rows(REAL, o, b, t, n, hv, width, staged):
    """Address and step of 16 rows for the output: the caller's own where they serve."""
    if n == W and is_plain(REAL, o[1], o[5], width):
        return at(o, b, t, hv), o[3]
    return staged, padded(REAL, width) * itemsize(REAL)


@njit()
def _store_output(REAL, o, rows, step, b, t, n, hv, left, right):
    """Write columns left.. to the caller's array."""
    source, target = rows + left * itemsize(REAL), at(o, b, t, hv) + left * o[5]
    store_tokens(REAL, o[1], source, step, n, right - left, target, o[3], o[5])


@njit()
def _ahead(v, o, k, q, g, b, following, s):
    """What the block of a value head that comes next needs of the caller's arrays for strip s."""
    t, hk, hv = following
    column = s * W
    return (
        lines(v, b, t, hv, column), lines(o, b, t, hv, column), lines(k, b, t, hk, column),
        lines(q, b, t, hk, column), lines(g, b, t, hv, column),
    )  # fmt: skip


@cache
def _products(PER_CHANNEL, unit, side):
    first_product, second_product = solve(PER_CHANNEL, unit, side), output(unit, side)
    few_of_first, few_of_second = solve(PER_CHANNEL, unit, side, True), output(unit, side, True)
    third_product = update(PER_CHANNEL, unit, side)
    tile, few_tile = tile_rows_of(side), tile_rows_of(side, True)
    PAIRS, DOTS_IN_UPDATE = unit != FLOATS, unit == DOTS and not PER_CHANNEL

    @njit()
    def products(REAL, desc, m, b, n, following, first, last, strips, v_step, o_rows, o_step, kept):
        """`side` strips after the other, which stay in the first cache for the three products."""
        size, KP = itemsize(REAL), padded(REAL, desc[K])
        row, MR, few = W * size, tile(REAL), few_tile(REAL)
        # the last tokens of a sequence go a few at a time, but for words, which come in pairs
        whole, tokens = n // MR * MR, (n + few - 1) // few * few
        q, k, v, g, o = (
            array_at(desc, Q), array_at(desc, KEY), array_at(desc, VALUE), array_at(desc, G),
            array_at(desc, O),
        )  # fmt: skip
        key_gate, query_gate = m.gates + KEY_GATE * row, m.gates + QUERY_GATE * row
        suffix = m.gates + SUFFIX * row
        keys, queries, updates, update_step = m.keys, m.queries, m.keys, row
        if PER_CHANNEL:
            updates = m.updates
        if PAIRS:
            keys, queries, whole, tokens = m.key_words, m.query_words, W, W
        if DOTS_IN_UPDATE:
            updates, update_step = m.update_words, row // 2
        step = strip_rows_of(KP, unit) * row
        for s in range(first, last, side):
            strip, i = strips + (s - first) * step, s * row
            u = strip + KP * row
            states, words = strip, u + 2 * W * row
            new_u = u if PER_CHANNEL else u + W * row
            if PAIRS:
                states = words
            v_next, o_next, k_next, q_next, g_next = _ahead(v, o, k, q, g, b, following, s)
            for j in range(0, whole, MR):
                first_product(
                    REAL, keys, m.a, states, u, step, KP, j, key_gate, m.v + i, v_step, m.beta,
                    suffix, v_next[0], v_next[1], k_next[0], k_next[1], g_next[0], g_next[1],
                )  # fmt: skip
            for j in range(whole, tokens, few):
                few_of_first(
                    REAL, keys, m.a, states, u, step, KP, j, key_gate, m.v + i, v_step, m.beta,
                    suffix, v_next[0], v_next[1], k_next[0], k_next[1], g_next[0], g_next[1],
                )  # fmt: skip
            if kept:
                for j in range(side):
                    keep_rows(REAL, u + j * step, n, kept + n * (i + j * row))
            for j in range(0, whole, MR):
                second_product(
                    REAL, queries, m.p, states, u, step, KP, j, query_gate, o_rows + i, o_step,
                    o_next[0], o_next[1], q_next[0], q_next[1],
                )  # fmt: skip
            for j in range(whole, tokens, few):
                few_of_second(
                    REAL, queries, m.p, states, u, step, KP, j, query_gate, o_rows + i, o_step,
                    o_next[0], o_next[1], q_next[0], q_next[1],
                )  # fmt: skip
            if DOTS_IN_UPDATE:
                u_words = words + KP // 2 * row
                for j in range(side):
                    pair_rows(REAL, new_u + j * step, W, u_words + j * step)
                new_u = u_words
            for c in range(0, KP, W):
                third_product(
                    REAL, updates + c * update_step, tokens, strip + c * row, new_u, step,
                    m.decay + c * size, words + c // 2 * row,
                )  # fmt: skip

    return products


@cache
def _by_panels(PER_CHANNEL, unit):
    products, products_of_one = _products(PER_CHANNEL, unit, SIDE), _products(PER_CHANNEL, unit, 1)

    @njit()
    def value_strips(REAL, desc, m, b, t, n, hv, following, first, last, strips, waits):
        """`SIDE` strips at a time, and those that are left one by one."""
        width, v, o = desc[V], array_at(desc, VALUE), array_at(desc, O)
        load_tokens(REAL, v[1], at(v, b, t, hv), v[3], v[5], n, width, m.v)
        v_step = padded(REAL, width) * itemsize(REAL)
        o_rows, o_step = _output_rows(REAL, o, b, t, n, hv, width, m.o)
        kept, rest = kept_rows(REAL, desc, b, t, hv), last - (last - first) % SIDE
        products(REAL, desc, m, b, n, following, first, rest, strips, v_step, o_rows, o_step, kept)
        if rest < last:
            strip = strip_rows_of(padded(REAL, desc[K]), unit) * W * itemsize(REAL)
            own = strips + (rest - first) * strip
            products_of_one(
                REAL, desc, m, b, n, following, rest, last, own, v_step, o_rows, o_step, kept
            )  # fmt: skip
        if o_rows == m.o:
            left, right = first * W, min(width, last * W)
            _store_output(REAL, o, o_rows, o_step, b, t, n, hv, left, right)

    return value_strips


@njit()
def _waiting(KP, strips, strip, n, size):
    """Addresses of the keys and decays of an update that waits, behind n strips."""
    keys = strips + n * strip
    return keys, keys + KP * W * size


@njit()
def _update(REAL, m, KP, strip, keys, decay):
    """Bring a strip up to date, and leave it as words too."""
    multiply_rows(REAL, keys, KP, strip + (KP + 2 * W) * W * itemsize(REAL), m.changes)
    add_products(REAL, strip, KP, decay, m.changes, m.state_words)


@njit()
def finish_updates(REAL, m, KP, n, strips):
    """Make the update that waits in each of a head's n strips."""
    strip = strip_rows_of(KP, SQUARES) * W * itemsize(REAL)
    keys, decay = _waiting(KP, strips, strip, n, itemsize(REAL))
    for s in range(n):
        _update(REAL, m, KP, strips + s * strip, keys, decay)


@cache
def _keep_update(PER_CHANNEL):
    suffix_tile, twice = suffix_rows(True), half_rows(2)

    @njit()
    def keep_update(REAL, m, KP, keys, decay):
        """What this block adds to the state, as rows of channels for the matrix unit."""
        if PER_CHANNEL:
            for c in range(0, KP, W):
                i = c * itemsize(REAL)
                rows = keys + c * W * itemsize(REAL)
                suffix_tile(REAL, m.k + i, m.decays + i, KP * itemsize(REAL), rows)
        else:
            twice(REAL, m.column_words, KP // 2, keys)
        copy_rows(REAL, m.decay, W * itemsize(REAL), decay, W * itemsize(REAL), KP // W)

    return keep_update


@njit()
def _fetch(REAL, x, b, t, h, s, odd):
    """Bring the lines of strip s of 16 tokens, or where they hold two strips those of both.

    The latter with the even or the odd one of the two, so that two arrays take turns.
    """
    first, step = lines(x, b, t, h, s * W)
    if step != x[3] or abs(x[5]) * W > LINE // 2:
        fetch_rows(REAL, first, step)
    elif s % 2 == odd:
        fetch_rows(REAL, first - odd * W * x[5], step)


@cache
def _by_squares(PER_CHANNEL):
    first_product, second_product = solve(PER_CHANNEL, SQUARES, 1), output(SQUARES, 1)
    tile = tile_rows_of(1)
    words_of, keep_update = split_words(PER_CHANNEL), _keep_update(PER_CHANNEL)

    @njit()
    def value_strips(REAL, desc, m, b, t, n, hv, following, first, last, strips, waits):
        """Two rounds over the strips, as the matrix unit is quick but late with each result.

        The update with a block waits until the keys of the next one are known: so each strip comes
        into the first cache once a block, to be updated and multiplied.
        """
        size, KP, width = itemsize(REAL), padded(REAL, desc[K]), desc[V]
        row, MR = W * size, tile(REAL)
        q, k, v, g, o = (
            array_at(desc, Q), array_at(desc, KEY), array_at(desc, VALUE), array_at(desc, G),
            array_at(desc, O),
        )  # fmt: skip
        load_tokens(REAL, v[1], at(v, b, t, hv), v[3], v[5], n, width, m.v)
        v_step = padded(REAL, width) * size
        o_rows, o_step = _output_rows(REAL, o, b, t, n, hv, width, m.o)
        key_gate, query_gate = m.gates + KEY_GATE * row, m.gates + QUERY_GATE * row
        suffix, strip_size = m.gates + SUFFIX * row, strip_rows_of(KP, SQUARES) * row
        keys, decay = _waiting(KP, strips, strip_size, last - first, size)
        t_next, hk_next, hv_next = following
        for s in range(last - first):
            strip, reads = strips + s * strip_size, m.products + s * 2 * W * row
            _fetch(REAL, k, b, t_next, hk_next, first + s, 0)
            _fetch(REAL, q, b, t_next, hk_next, first + s, 1)
            if PER_CHANNEL:
                _fetch(REAL, g, b, t_next, hv_next, first + s, 0)
            if waits:
                _update(REAL, m, KP, strip, keys, decay)
            else:
                pair_rows(REAL, strip, KP, m.state_words)
            multiply_two(
                REAL, m.key_words, m.query_words, 2 * KP, m.state_words, KP, reads, reads + W * row
            )
        keep_update(REAL, m, KP, keys, decay)
        for s in range(last - first):
            u, reads = strips + s * strip_size + KP * row, m.products + s * 2 * W * row
            i, u_words = first + s, u + 2 * W * row
            _fetch(REAL, v, b, t_next, hv_next, i, 0)
            _fetch(REAL, o, b, t_next, hv_next, i, 1)
            for j in range(0, W, MR):
                first_product(
                    REAL, reads, m.a, 0, u, 0, KP, j, key_gate, m.v + i * row, v_step, m.beta,
                    suffix, 0, 0, 0, 0, 0, 0,
                )  # fmt: skip
            for j in range(0, W, MR):
                second_product(
                    REAL, reads + W * row, m.p, 0, u, 0, KP, j, query_gate, o_rows + i * row,
                    o_step, 0, 0, 0, 0,
                )  # fmt: skip
            if not PER_CHANNEL:
                u += W * row
            words_of(REAL, u, u_words)
        if o_rows == m.o:
            left, right = first * W, min(width, last * W)
            _store_output(REAL, o, o_rows, o_step, b, t, n, hv, left, right)

    return value_strips
