"""What the backward kernel does with a block of 16 tokens."""

from functools import cache

from nbdelta.cpu import _chunk_panels as panels
from nbdelta.cpu._backward_gate_tiles import norm_gradient
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
from nbdelta.cpu._backward_tiles import (
    ERROR_ROWS,
    SUFFIX_ROWS,
    add_rows,
    advance,
    pair_weights,
    row_sums,
    scale_rows,
    solve_errors,
    solve_transposed,
    state_gradient,
    state_products,
    transpose_into,
)
from nbdelta.cpu._call import EPS, KEY, SCALE, VALUE, K, Q, V, array_at, at, real
from nbdelta.cpu._chunk_panels import load_beta, norms, token_rows
from nbdelta.cpu._jit import njit
from nbdelta.cpu._memory import (
    copy_rows,
    fill_row,
    is_plain,
    save,
    store_row,
    transpose_tile,
    zero_rows,
)
from nbdelta.cpu._simd import itemsize, padded, rows_of_tile
from nbdelta.cpu._tiles import DECAY, KEY_GATE, QUERY_GATE, SUFFIX, gram, pack_columns
from nbdelta.cpu._vector_unit import W

_gram = gram(False)


@cache
def prepare_block(PER_CHANNEL):
    key_head = panels.key_head(False)

    @njit()
    def prepare_block(REAL, desc, m, b, t, n, hk, dq, dk):
        """What the value heads of a key head share."""
        q, k, KP = array_at(desc, Q), array_at(desc, KEY), padded(REAL, desc[K])
        k_rows, k_step = token_rows(REAL, k, b, t, n, hk, desc[K], m.k)
        q_rows, q_step = token_rows(REAL, q, b, t, n, hk, desc[K], m.q)
        norms(REAL, desc, k_rows, k_step, KP, m.k_norm, m.k)
        norms(REAL, desc, q_rows, q_step, KP, m.q_norm, m.q)
        if not PER_CHANNEL:
            key_head(REAL, desc, m, k_rows, k_step, q_rows, q_step)
        zero_rows(REAL, dq, KP)
        zero_rows(REAL, dk, KP)

    return prepare_block


@njit()
def _clear_pairs(REAL, n, x):
    """Tokens after the end of a sequence are in no pair."""
    size = itemsize(REAL)
    for j in range(W):
        for i in range(n if j < n else 0, W):
            save(REAL, x + (j * W + i) * size, REAL(0))


@cache
def forward_block(PER_CHANNEL):
    head_gates, channel_gates = panels.head_gates(False), panels.channel_gates(False)

    @njit()
    def forward_block(REAL, desc, m, w, b, t, n, hk, hv, beta, state, has_next):
        """Gates, triangles, E and U of a value head, and the state at the start of the next block.

        The forward kernel's panels are made without beta, which gives -M in place of -A.
        """
        size, KP, VP = itemsize(REAL), padded(REAL, desc[K]), padded(REAL, desc[V])
        row = W * size
        load_beta(REAL, desc, b, t, n, hv, beta)
        fill_row(REAL, REAL(1), m.beta)
        if PER_CHANNEL:
            q, k = array_at(desc, Q), array_at(desc, KEY)
            k_rows, k_step = token_rows(REAL, k, b, t, n, hk, desc[K], m.k)
            q_rows, q_step = token_rows(REAL, q, b, t, n, hk, desc[K], m.q)
            channel_gates(REAL, desc, m, b, t, n, hv, k_rows, k_step, q_rows, q_step)
            if n < W:
                _clear_pairs(REAL, n, m.a)
                _clear_pairs(REAL, n, m.p)
            # k e^(G_last - G) as columns, and no other factors
            for c in range(0, KP, W):
                transpose_tile(REAL, m.updates + c * row, row)
            fill_row(REAL, REAL(1), m.gates + SUFFIX * row)
            fill_row(REAL, REAL(1), m.gates + DECAY * row)
        else:
            head_gates(REAL, desc, m, b, t, n, hv)
        updates = m.updates if PER_CHANNEL else m.keys
        v_rows, v_step = token_rows(REAL, array_at(desc, VALUE), b, t, n, hv, desc[V], m.v)
        for s in range(VP // W):
            strip = state + s * w.strip_step
            u = strip + KP * row
            for first in range(0, W, rows_of_tile(REAL)):
                solve_errors(
                    REAL, m.keys, m.a, strip, u, KP, first, m.gates, v_rows + s * row, v_step, beta
                )
            if has_next:
                for c in range(0, KP, W):
                    advance(
                        REAL, updates + c * row, strip + c * row, u + SUFFIX_ROWS * row,
                        m.decay + c * size, strip + w.state_step + c * row,
                    )  # fmt: skip

    return forward_block


@njit()
def _store_tile(REAL, x, b, t, n, h, first, width, tile):
    """Write n token rows of 16 numbers as columns first.. of ``x[b, t:, h]``."""
    row, target = W * itemsize(REAL), at(x, b, t, h) + first * x[5]
    if is_plain(REAL, x[1], x[5], width):
        copy_rows(REAL, tile, row, target, x[3], n)
    else:
        for i in range(n):
            own = target + i * x[3]
            store_row(REAL, x[1], tile + i * row, min(W, width - first), own, x[5])


@njit()
def _solve_strips(REAL, desc, m, w, b, t, n, hv, updates, beta, state, dstate):
    """Y = dV of every strip, and dO, Y and U as the products after this want them."""
    KP, VP, row = padded(REAL, desc[K]), padded(REAL, desc[V]), W * itemsize(REAL)
    do, dv = array_at(desc, DO), array_at(desc, DV)
    MR, width = rows_of_tile(REAL), desc[V]
    do_rows, do_step = w.do, padded(REAL, width) * itemsize(REAL)
    if do[0]:
        do_rows, do_step = token_rows(REAL, do, b, t, n, hv, width, w.do)
    else:
        zero_rows(REAL, w.do, VP)
    transpose_into(REAL, m.a, w.at)
    transpose_into(REAL, m.p, w.pt)
    zero_rows(REAL, w.dbeta, W)
    for s in range(VP // W):
        strip, tile = state + s * w.strip_step, s * W * row
        u = strip + KP * row
        scale_rows(REAL, do_rows + s * row, do_step, w.ones, w.do_tile)
        scale_rows(REAL, w.do_tile, row, m.gates + QUERY_GATE * row, w.do_rows + tile)
        pack_columns(REAL, w.do_tile, row, w.ones, w.do_columns + tile)
        pack_columns(REAL, u, row, w.ones, w.u_columns + tile)
        for first in range(W - MR, -1, -MR):
            solve_transposed(
                REAL, updates, w.at, w.pt, dstate + s * KP * row, w.do_tile, w.y_tile, KP, first,
                m.gates, beta, u + ERROR_ROWS * row, w.dbeta,
            )  # fmt: skip
        scale_rows(REAL, w.y_tile, row, m.gates + KEY_GATE * row, w.y_rows + tile)
        pack_columns(REAL, w.y_tile, row, w.ones, w.y_columns + tile)
        _store_tile(REAL, dv, b, t, n, hv, s * W, width, w.y_tile)


@cache
def backward_block(PER_CHANNEL):
    products, step_back = state_products(PER_CHANNEL), state_gradient(PER_CHANNEL)

    @njit()
    def backward_block(REAL, desc, m, w, b, t, n, hv, beta, state, dstate, dq, dk, drate):
        """Gradients of a block of a value head; dS is taken from its end to its start."""
        size, KP, VP = itemsize(REAL), padded(REAL, desc[K]), padded(REAL, desc[V])
        row, MR = W * size, rows_of_tile(REAL)
        updates = m.updates if PER_CHANNEL else m.keys
        fill_row(REAL, REAL(1), w.ones)
        _solve_strips(REAL, desc, m, w, b, t, n, hv, updates, beta, state, dstate)
        for first in range(0, W, MR):
            _gram(REAL, w.u_columns, w.do_columns, first, VP, w.u_do)
            _gram(REAL, w.u_columns, w.y_columns, first, VP, w.u_y)
        scale = REAL(real(desc, SCALE))
        pair_weights(REAL, m.gates, m.kk, m.qk, w.u_do, w.u_y, scale, w.wp, w.wa, w.dg)
        transpose_into(REAL, w.wp, w.wpt)
        read_q, read_k, written = dq, dk, dk
        if PER_CHANNEL:
            read_q, read_k, written = w.reads_q, w.reads_k, w.writes
        else:
            transpose_into(REAL, w.wa, w.at)
            add_rows(REAL, w.wa, w.at, w.wa)
            zero_rows(REAL, w.reads_row, 1)
            zero_rows(REAL, w.writes_row, 1)
        strips, step = VP // W, w.strip_step
        for c in range(0, KP, MR):
            i = c * row
            products(
                REAL, state + i, step, strips * step, dstate + i, KP * row, strips * KP * row,
                w.do_columns, w.y_columns, w.u_columns, m.gates, m.queries + i, m.keys + i, w.wp,
                w.wpt, w.wa, read_q + i, read_k + i, written + i, w.reads_row, w.writes_row,
            )  # fmt: skip
        # one row of sums for every channel, or for all of them
        kept_step = row if PER_CHANNEL else 0
        zero_rows(REAL, w.kept, KP)
        for s in range(strips):
            tile = s * W * row
            for c in range(0, KP, W):
                i = c * row
                step_back(
                    REAL, m.queries + i, m.keys + i, dstate + s * KP * row + i,
                    state + s * step + i, w.do_rows + tile, w.y_rows + tile, m.decay + c * size,
                    w.kept + c * kept_step,
                )  # fmt: skip
        row_sums(REAL, w.dbeta, w.ones, w.dbeta)
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
    def finish_block(REAL, desc, m, b, t, n, hk, dq, dk):
        """Store the gradients of q and k, through their norms."""
        KP, row = padded(REAL, desc[K]), W * itemsize(REAL)
        if not PER_CHANNEL:
            for c in range(0, KP, W):
                transpose_tile(REAL, dq + c * row, row)
                transpose_tile(REAL, dk + c * row, row)
        if real(desc, EPS) >= 0:
            q, k = array_at(desc, Q), array_at(desc, KEY)
            k_rows, k_step = token_rows(REAL, k, b, t, n, hk, desc[K], m.k)
            q_rows, q_step = token_rows(REAL, q, b, t, n, hk, desc[K], m.q)
            norm_gradient(REAL, k_rows, k_step, m.k_norm, KP, dk)
            norm_gradient(REAL, q_rows, q_step, m.q_norm, KP, dq)
        for c in range(0, KP, W):
            _store_tile(REAL, array_at(desc, DQ), b, t, n, hk, c, desc[K], dq + c * row)
            _store_tile(REAL, array_at(desc, DKEY), b, t, n, hk, c, desc[K], dk + c * row)

    return finish_block
