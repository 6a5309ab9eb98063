"""What the backward kernel does with a block of 16 tokens."""

from functools import cache

from nbdelta.cpu import _chunk_panels as panels
from nbdelta.cpu._backward_gate_tiles import norm_gradient, norm_gradient_of_columns
from nbdelta.cpu._backward_gates import (
    DKEY,
    DO,
    DQ,
    DV,
    channel_pairs,
    store_channel_gates,
    store_dbeta,
    store_token_gates,
    token_gates,
)
from nbdelta.cpu._backward_state_tiles import (
    ERROR_ROWS,
    stream_rows,
)
from nbdelta.cpu._backward_tiles import (
    add_rows,
    pair_products,
    pair_weights,
    row_sums,
    solve_transposed,
    spread,
    state_gradient,
    state_product,
    transpose_into,
)
from nbdelta.cpu._call import EPS, KEY, SCALE, K, Q, V, array_at, at, lines, real
from nbdelta.cpu._chunk_panels import stage_rows, token_rows
from nbdelta.cpu._jit import njit
from nbdelta.cpu._memory import (
    copy_rows,
    fetch_rows,
    fill_row,
    is_plain,
    store_row,
    transpose_tile,
    zero_rows,
)
from nbdelta.cpu._simd import itemsize, padded, rows_of_tile
from nbdelta.cpu._tiles import KEY_GATE, QUERY_GATE, SUFFIX, gram
from nbdelta.cpu._vector_unit import LINE, W

_gram = gram(False)


@njit()
def _fetch_tokens(REAL, x, b, t, h, width):
    """Bring the token rows of a block that comes soon into the cache."""
    for c in range(0, width, W):
        first, step = lines(x, b, t, h, c)
        fetch_rows(REAL, first, step)


@cache
def prepare_block(PER_CHANNEL):
    key_head = panels.key_head(PER_CHANNEL, False)

    @njit()
    def prepare_block(REAL, desc, m, b, t, n, hk, dq, dk, pairs):
        """What the value heads of a key head share."""
        q, k, KP = array_at(desc, Q), array_at(desc, KEY), padded(REAL, desc[K])
        stage_rows(REAL, desc, k, b, t, n, hk, KP, m.k, m.k_norm)
        stage_rows(REAL, desc, q, b, t, n, hk, KP, m.q, m.q_norm)
        _fetch_tokens(REAL, k, b, t + W, hk, desc[K])
        _fetch_tokens(REAL, q, b, t + W, hk, desc[K])
        key_head(REAL, desc, m)
        zero_rows(REAL, dq, KP)
        zero_rows(REAL, dk, KP)
        zero_rows(REAL, pairs, 2 * W)

    return prepare_block


@njit()
def _store_tile(REAL, x, b, t, n, h, first, width, tile):
    """Write n token rows of 16 numbers as columns first.. of ``x[b, t:, h]``."""
    row, target = W * itemsize(REAL), at(x, b, t, h) + first * x[5]
    if is_plain(REAL, x[1], x[5], width):
        if (target | x[3]) % LINE == 0:
            stream_rows(REAL, tile, target, x[3], n)
        else:
            copy_rows(REAL, tile, row, target, x[3], n)
    else:
        for i in range(n):
            own = target + i * x[3]
            store_row(REAL, x[1], tile + i * row, min(W, width - first), own, x[5])


@cache
def _back_through_strips(PER_CHANNEL):
    step_back = state_gradient(PER_CHANNEL)

    @njit()
    def back_through_strips(REAL, desc, m, w, b, t, n, hv, beta, state, dstate):
        """Y = dV, and dS at the start of the block, strip by strip.

        A strip of dS is in the first cache for both; dO and Y are left as columns.
        """
        size, KP, VP = itemsize(REAL), padded(REAL, desc[K]), padded(REAL, desc[V])
        row, MR, width = W * size, rows_of_tile(REAL), desc[V]
        do, dv = array_at(desc, DO), array_at(desc, DV)
        updates = m.updates if PER_CHANNEL else m.keys
        do_rows, do_step = w.do, VP * size
        if do[0]:
            do_rows, do_step = token_rows(REAL, do, b, t, n, hv, width, w.do)
        else:
            zero_rows(REAL, w.do, VP)
        transpose_into(REAL, m.a, w.at)
        transpose_into(REAL, m.p, w.pt)
        zero_rows(REAL, w.dbeta, W)
        # one row of sums for every channel, or for all of them
        kept_step = row if PER_CHANNEL else 0
        zero_rows(REAL, w.kept, KP)
        for s in range(VP // W):
            strip, dstrip, tile = state + s * w.strip_step, dstate + s * KP * row, s * W * row
            # not further ahead: rows of tokens lie in few sets of the second cache
            do_next, step = lines(do, b, t, hv, (s + 1) * W)
            fetch_rows(REAL, do_next, step)
            copy_rows(REAL, do_rows + s * row, do_step, w.do_tile, row, W)
            spread(
                REAL, w.do_tile, m.gates + QUERY_GATE * row, w.do_rows, w.do_columns + tile
            )  # fmt: skip
            for first in range(W - MR, -1, -MR):
                solve_transposed(
                    REAL, updates, w.at, w.pt, dstrip, w.do_tile, w.y_tile, KP, first, m.gates,
                    beta, strip + (KP + ERROR_ROWS) * row, w.dbeta,
                )  # fmt: skip
            spread(REAL, w.y_tile, m.gates + KEY_GATE * row, w.y_rows, w.y_columns + tile)
            _store_tile(REAL, dv, b, t, n, hv, s * W, width, w.y_tile)
            for c in range(0, KP, W):
                i = c * row
                step_back(
                    REAL, m.queries + i, m.keys + i, dstrip + i, strip + i, w.do_rows, w.y_rows,
                    m.decay + c * size, w.kept + c * kept_step,
                )  # fmt: skip

    return back_through_strips


@cache
def backward_block(PER_CHANNEL):
    product, back_through_strips = state_product(PER_CHANNEL), _back_through_strips(PER_CHANNEL)

    @njit()
    def backward_block(
        REAL, desc, m, w, b, t, n, hk, hv, beta, per_beta, state, dstate, dq, dk, pairs, drate
    ):
        """Gradients of a block of a value head; dS is taken from its end to its start."""
        size, KP, VP = itemsize(REAL), padded(REAL, desc[K]), padded(REAL, desc[V])
        row, MR = W * size, rows_of_tile(REAL)
        strips, step = VP // W, w.strip_step
        fill_row(REAL, REAL(1), w.ones)
        read_q, read_k, written = dq, dk, dk
        if PER_CHANNEL:
            read_q, read_k, written = w.reads_q, w.reads_k, w.writes
        else:
            zero_rows(REAL, w.reads_row, 1)
            zero_rows(REAL, w.writes_row, 1)
        for s in range(strips):
            u = state + s * step + KP * row
            transpose_into(REAL, u, w.u_columns + s * W * row)
        for c in range(0, KP * row, MR * row):
            product(
                REAL, dstate + c, KP * row, strips * KP * row, w.u_columns, m.gates + SUFFIX * row,
                m.keys + c, written + c, w.writes_row,
            )  # fmt: skip
        back_through_strips(REAL, desc, m, w, b, t, n, hv, beta, state, dstate)
        for first in range(0, W, MR):
            _gram(REAL, w.u_columns, w.do_columns, first, VP, w.u_do)
            _gram(REAL, w.u_columns, w.y_columns, first, VP, w.u_y)
        scale = REAL(real(desc, SCALE))
        pair_weights(REAL, m.gates, m.kk, m.qk, w.u_do, w.u_y, scale, w.wp, w.wa, w.dg)
        if not PER_CHANNEL:
            # the value heads' k and q are the same: one product for all of them
            add_rows(REAL, pairs, w.wp, pairs)
            add_rows(REAL, pairs + W * row, w.wa, pairs + W * row)
        for c in range(0, KP, MR):
            i = c * row
            product(
                REAL, state + i, step, strips * step, w.do_columns, m.gates + QUERY_GATE * row,
                m.queries + i, read_q + i, w.reads_row,
            )  # fmt: skip
            product(
                REAL, state + i, step, strips * step, w.y_columns, m.gates + KEY_GATE * row,
                m.keys + i, read_k + i, w.reads_row,
            )  # fmt: skip
        row_sums(REAL, w.dbeta, per_beta, w.dbeta)
        store_dbeta(REAL, desc, b, t, n, hv, w)
        if PER_CHANNEL:
            channel_pairs(REAL, desc, m, w, n, dq, dk)
            store_channel_gates(REAL, desc, m, w, b, t, n, hv, drate)
        else:
            token_gates(REAL, m, w)
            store_token_gates(REAL, desc, m, w, b, t, n, hv, drate)

    return backward_block


@cache
def finish_block(PER_CHANNEL):
    @njit()
    def finish_block(REAL, desc, m, w, b, t, n, hk, dq, dk, wp):
        """Store the gradients of q and k, through their norms."""
        KP, row = padded(REAL, desc[K]), W * itemsize(REAL)
        if not PER_CHANNEL:
            wa = wp + W * row
            transpose_into(REAL, wp, w.wpt)
            transpose_into(REAL, wa, w.at)
            add_rows(REAL, wa, w.at, wa)
            for c in range(0, KP * row, rows_of_tile(REAL) * row):
                pair_products(
                    REAL, m.queries + c, m.keys + c, wp, w.wpt, wa, dq + c, dk + c
                )  # fmt: skip
        if real(desc, EPS) >= 0:
            if PER_CHANNEL:
                norm_gradient(REAL, m.k, KP * itemsize(REAL), m.k_norm, KP, dk)
                norm_gradient(REAL, m.q, KP * itemsize(REAL), m.q_norm, KP, dq)
            else:
                norm_gradient_of_columns(REAL, m.keys, m.k_norm, KP, dk)
                norm_gradient_of_columns(REAL, m.queries, m.q_norm, KP, dq)
        for c in range(0, KP, W):
            tiles = dq + c * row, dk + c * row
            if not PER_CHANNEL:
                transpose_tile(REAL, tiles[0], row)
                transpose_tile(REAL, tiles[1], row)
            _store_tile(REAL, array_at(desc, DQ), b, t, n, hk, c, desc[K], tiles[0])
            _store_tile(REAL, array_at(desc, DKEY), b, t, n, hk, c, desc[K], tiles[1])

    return finish_block
