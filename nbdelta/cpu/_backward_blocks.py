"""What the backward kernel does with a block of 16 tokens."""

from functools import cache

from nbdelta.cpu import _chunk_panels as panels
from nbdelta.cpu._backward_tiles import (
    ERROR_ROWS,
    SUFFIX_ROWS,
    add_rows,
    advance,
    bounded_gate_gradient,
    channel_states,
    norm_gradient,
    pair_weights,
    pairs_backward,
    pairs_forward,
    row_sums,
    scale_rows,
    sigmoid_gradient,
    softplus_gate_gradient,
    solve_errors,
    solve_transposed,
    state_gradient,
    state_products,
    transpose_into,
)
from nbdelta.cpu._call import (
    BETA,
    BETA_FACTOR,
    BOUND,
    EPS,
    KEY,
    NEXT,
    RAW_GATE,
    SCALE,
    SIGMOID_BETA,
    VALUE,
    G,
    K,
    O,
    Q,
    V,
    array_at,
    at,
    real,
)
from nbdelta.cpu._chunk_panels import load_beta, norms, token_rows
from nbdelta.cpu._jit import njit
from nbdelta.cpu._memory import (
    copy_rows,
    fill_row,
    get,
    is_plain,
    load,
    load_row,
    put,
    save,
    store_row,
    transpose_tile,
    zero_rows,
)
from nbdelta.cpu._simd import W, itemsize, padded, rows_of_tile
from nbdelta.cpu._tiles import DECAY, KEY_GATE, LAST, QUERY_GATE, SUFFIX, gram, pack_columns
from nbdelta.cpu.gate import gate_factor

# the arrays of a backward call, behind the one counter that it uses: not at the end of a forward
# call's descriptor, whose length depends on the number of threads, which a cached kernel outlives;
# dV is where o was
DO, DHT, DQ, DKEY, DG, DBETA, DH0 = range(NEXT + 8, NEXT + 64, 8)
# the sequences' shares in the gradients of A_log and dt_bias, and those gradients
DA_LOG, DDT_BIAS, DA_LOG_SUM, DDT_BIAS_SUM = range(NEXT + 64, NEXT + 96, 8)
BACKWARD_LENGTH = NEXT + 96
DV = O

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
        norms(REAL, desc, k_rows, k_step, KP, m.k_norm)
        norms(REAL, desc, q_rows, q_step, KP, m.q_norm)
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
        _store_dbeta(REAL, desc, b, t, n, hv, w)
        if PER_CHANNEL:
            _channel_pairs(REAL, desc, m, w, n, dq, dk)
            _store_channel_gates(REAL, desc, m, w, b, t, n, hv, drate)
        else:
            _token_gates(REAL, m, w)
            _store_token_gates(REAL, desc, m, w, b, t, n, hv, drate)

    return backward_block


@njit()
def _store_dbeta(REAL, desc, b, t, n, hv, w):
    dbeta, size = array_at(desc, DBETA), itemsize(REAL)
    if not dbeta[0]:
        return
    if desc[SIGMOID_BETA]:
        beta = array_at(desc, BETA)
        for i in range(n):
            save(REAL, w.row + i * size, get(REAL, beta[1], at(beta, b, t + i, hv)))
        _clear_row(REAL, n, w.row)
        sigmoid_gradient(REAL, w.row, REAL(real(desc, BETA_FACTOR)), w.dbeta)
    for i in range(n):
        put(REAL, dbeta[1], at(dbeta, b, t + i, hv), load(REAL, w.dbeta + i * size))


@njit()
def _clear_row(REAL, n, x):
    for i in range(n, W):
        save(REAL, x + i * itemsize(REAL), REAL(0))


@njit()
def _token_gates(REAL, m, w):
    """Add what goes through the state to the gradients of 16 gates."""
    size, row = itemsize(REAL), W * itemsize(REAL)
    passing = REAL(0)
    for i in range(W):
        passing += load(REAL, w.kept + i * size)
    passing *= load(REAL, m.gates + LAST * row)
    for i in range(W):
        save(REAL, w.dg + i * size, load(REAL, w.dg + i * size) + passing)
        passing += load(REAL, w.writes_row + i * size)
    reads = REAL(0)
    for i in range(W - 1, -1, -1):
        reads += load(REAL, w.reads_row + i * size)
        save(REAL, w.dg + i * size, load(REAL, w.dg + i * size) + reads)


@njit()
def _channel_pairs(REAL, desc, m, w, n, dq, dk):
    """What goes through P, M and the state, channel by channel."""
    size, KP = itemsize(REAL), padded(REAL, desc[K])
    row, step = W * size, KP * size
    square = W * row
    for c in range(0, KP, W):
        i, tile = c * size, c * row
        row_sums(REAL, w.kept + tile, m.decay + i, w.kept + tile)
        for x in (w.reads_q, w.reads_k, w.writes):
            transpose_tile(REAL, x + tile, row)
        channel_states(
            REAL, m.x + i, m.y + i, m.z + i, step, w.reads_q + tile, w.reads_k + tile,
            w.writes + tile, w.kept + tile, dq + tile, dk + tile, w.dg + i, step,
        )  # fmt: skip
        zero_rows(REAL, w.back, W)
        for t in range(n):
            at_token, own, now = i + t * step, tile + t * row, w.running + t * square
            pairs_forward(
                REAL, m.x + at_token, m.z + at_token, t, now - square, now, w.wp + t * size,
                w.wa + t * size, dq + own, dk + own,
            )  # fmt: skip
        for t in range(n - 1, -1, -1):
            at_token, own, now = i + t * step, tile + t * row, w.running + t * square
            pairs_backward(
                REAL, m.x + at_token, m.y + at_token, m.z + at_token, t, now, w.back,
                w.wp + t * size, w.wa + t * size, dk + own, w.dg + at_token,
            )  # fmt: skip


@njit()
def _raw_gate_gradient(REAL, desc, factor, x, bias, n, dg, drate):
    """Turn n rows of 16 gradients of log decays into those of raw gates."""
    row, bound = W * itemsize(REAL), real(desc, BOUND)
    for i in range(0, n * row, row):
        dbias = drate + row + i
        if bound == 0.0:
            softplus_gate_gradient(REAL, x + i, bias + i, REAL(-factor), dg + i, drate, dbias)
        else:
            bounded_gate_gradient(
                REAL, x + i, bias + i, REAL(factor), REAL(bound), dg + i, drate, dbias
            )


@njit()
def _store_token_gates(REAL, desc, m, w, b, t, n, hv, drate):
    g, dg, size = array_at(desc, G), array_at(desc, DG), itemsize(REAL)
    if not dg[0]:
        return
    if desc[RAW_GATE]:
        for i in range(n):
            save(REAL, w.row + i * size, get(REAL, g[1], at(g, b, t + i, hv)))
        _clear_row(REAL, n, w.row)
        _clear_row(REAL, n, w.dg)
        factor = gate_factor(desc, hv)
        _raw_gate_gradient(REAL, desc, factor, w.row, m.bias, 1, w.dg, drate)
    for i in range(n):
        put(REAL, dg[1], at(dg, b, t + i, hv), load(REAL, w.dg + i * size))


@njit()
def _store_channel_gates(REAL, desc, m, w, b, t, n, hv, drate):
    g, dg, KP = array_at(desc, G), array_at(desc, DG), padded(REAL, desc[K])
    step, factor = KP * itemsize(REAL), gate_factor(desc, hv)
    for i in range(n):
        rows = w.dg + i * step
        if desc[RAW_GATE]:
            load_row(REAL, g[1], at(g, b, t + i, hv), g[5], desc[K], m.g)
            _raw_gate_gradient(REAL, desc, factor, m.g, m.bias, KP // W, rows, drate)
        store_row(REAL, dg[1], rows, desc[K], at(dg, b, t + i, hv), dg[5])


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


@njit()
def store_sums(REAL, desc, seq, hv, drate, n):
    """Write a sequence's share in the gradients of A_log and dt_bias of a value head."""
    size = itemsize(REAL)
    dA, dbias, rate = array_at(desc, DA_LOG), array_at(desc, DDT_BIAS), REAL(0)
    for i in range(W):
        rate += load(REAL, drate + i * size)
    put(REAL, dA[1], at(dA, seq, hv, 0), rate)
    bias = drate + W * size
    if n == 1:
        total = REAL(0)
        for i in range(W):
            total += load(REAL, bias + i * size)
        save(REAL, bias, total)
    store_row(REAL, dbias[1], bias, n, at(dbias, seq, hv, 0), dbias[4])
