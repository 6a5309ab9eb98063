"""U, O and the new state of a value head of the chunked kernel, in strips of 16 columns."""

from functools import cache

from nbdelta.cpu._call import KEY, VALUE, G, K, O, Q, V, array_at, at, lines
from nbdelta.cpu._chunk_scratch import strip_rows_of
from nbdelta.cpu._jit import njit
from nbdelta.cpu._kept_rows import keep_rows, kept_rows
from nbdelta.cpu._matrix_unit import DOTS, FLOATS
from nbdelta.cpu._memory import is_plain, load_tokens, store_tokens
from nbdelta.cpu._simd import itemsize, padded
from nbdelta.cpu._strip_tiles import output, solve, tile_rows_of, update
from nbdelta.cpu._tiles import KEY_GATE, QUERY_GATE, SUFFIX, pair_rows
from nbdelta.cpu._vector_unit import W, side_by_side

SIDE = side_by_side()


@njit()
def output_rows(REAL, o, b, t, n, hv, width, staged):
    """Address and step of 16 rows for the output: the caller's own where they serve."""
    if n == W and is_plain(REAL, o[1], o[5], width):
        return at(o, b, t, hv), o[3]
    return staged, padded(REAL, width) * itemsize(REAL)


@njit()
def store_output(REAL, o, rows, step, b, t, n, hv, left, right):
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
def value_strips(PER_CHANNEL, unit):
    products, products_of_one = _products(PER_CHANNEL, unit, SIDE), _products(PER_CHANNEL, unit, 1)

    @njit()
    def value_strips(REAL, desc, m, b, t, n, hv, following, first, last, strips, waits):
        """`SIDE` strips at a time, and those that are left one by one."""
        width, v, o = desc[V], array_at(desc, VALUE), array_at(desc, O)
        load_tokens(REAL, v[1], at(v, b, t, hv), v[3], v[5], n, width, m.v)
        v_step = padded(REAL, width) * itemsize(REAL)
        o_rows, o_step = output_rows(REAL, o, b, t, n, hv, width, m.o)
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
            store_output(REAL, o, o_rows, o_step, b, t, n, hv, left, right)

    return value_strips
