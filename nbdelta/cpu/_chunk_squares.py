"""The chunked kernel on a matrix unit: each product over all strips, as each result comes late.

The update with a block waits until the keys of the next one are known: so each strip comes into the
first cache once a block, to be updated and multiplied.
"""

from functools import cache

from nbdelta.cpu._call import KEY, VALUE, G, K, O, Q, V, array_at, at, lines
from nbdelta.cpu._channel_tiles import suffix_rows
from nbdelta.cpu._chunk_scratch import strip_rows_of
from nbdelta.cpu._chunk_strips import output_rows, store_output
from nbdelta.cpu._jit import njit
from nbdelta.cpu._matrix_unit import (
    SQUARES,
    add_products,
    half_rows,
    multiply_rows,
    multiply_two,
    split_words,
)
from nbdelta.cpu._memory import copy_rows, fetch_rows, load_tokens
from nbdelta.cpu._simd import itemsize, padded, rows_of_tile
from nbdelta.cpu._strip_tiles import output_reads, solve_reads
from nbdelta.cpu._tiles import KEY_GATE, QUERY_GATE, SUFFIX, pair_rows
from nbdelta.cpu._vector_unit import LINE, W


@njit()
def _waiting(KP, strips, strip, n, size):
    """Addresses of the keys and decays of an update that waits, behind n strips."""
    keys = strips + n * strip
    return keys, keys + KP * W * size


@njit()
def _update(REAL, m, KP, strip, keys, decay):
    """Bring a strip up to date, and leave it as words too."""
    multiply_rows(REAL, keys, KP, strip + KP * W * itemsize(REAL), m.changes)
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
def value_strips(PER_CHANNEL):
    first_product, keep_update = solve_reads(PER_CHANNEL), _keep_update(PER_CHANNEL)

    @njit()
    def value_strips(REAL, desc, m, b, t, n, hv, following, first, last, strips, waits):
        """Two rounds over the strips: their updates and products, then U and O."""
        size, KP, width = itemsize(REAL), padded(REAL, desc[K]), desc[V]
        row, MR = W * size, rows_of_tile(REAL)
        q, k, v, g, o = (
            array_at(desc, Q), array_at(desc, KEY), array_at(desc, VALUE), array_at(desc, G),
            array_at(desc, O),
        )  # fmt: skip
        load_tokens(REAL, v[1], at(v, b, t, hv), v[3], v[5], n, width, m.v)
        v_step = padded(REAL, width) * size
        o_rows, o_step = output_rows(REAL, o, b, t, n, hv, width, m.o)
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
            u_words, reads = strips + s * strip_size + KP * row, m.products + s * 2 * W * row
            i = first + s
            _fetch(REAL, v, b, t_next, hv_next, i, 0)
            _fetch(REAL, o, b, t_next, hv_next, i, 1)
            for j in range(0, W, MR):
                first_product(
                    REAL, reads, m.a, m.u, j, key_gate, m.v + i * row, v_step, m.beta, suffix,
                )  # fmt: skip
            for j in range(0, W, MR):
                output_reads(
                    REAL, reads + W * row, m.p, m.u, j, query_gate, o_rows + i * row, o_step,
                )  # fmt: skip
            split_words(REAL, m.u if PER_CHANNEL else m.u + W * row, u_words)
        if o_rows == m.o:
            left, right = first * W, min(width, last * W)
            store_output(REAL, o, o_rows, o_step, b, t, n, hv, left, right)

    return value_strips
