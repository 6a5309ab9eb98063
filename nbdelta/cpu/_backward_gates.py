"""Gradients of gates and betas, and where a backward call keeps its arrays."""

from nbdelta.cpu._backward_gate_tiles import (
    bounded_gate_gradient,
    channel_states,
    pairs_backward,
    pairs_forward,
    sigmoid_gradient,
    softplus_gate_gradient,
)
from nbdelta.cpu._backward_tiles import row_sums
from nbdelta.cpu._call import (
    BETA,
    BETA_FACTOR,
    BOUND,
    NEXT,
    RAW_GATE,
    SIGMOID_BETA,
    G,
    K,
    O,
    array_at,
    at,
    real,
)
from nbdelta.cpu._jit import njit
from nbdelta.cpu._memory import get, load, load_row, put, save, store_row, transpose_tile, zero_rows
from nbdelta.cpu._simd import itemsize, padded
from nbdelta.cpu._tiles import LAST
from nbdelta.cpu._vector_unit import W
from nbdelta.cpu.gate import gate_factor

# the arrays of a backward call, behind the one counter that it uses: not at the end of a forward
# call's descriptor, whose length depends on the number of threads, which a cached kernel outlives;
# dV is where o was
DO, DHT, DQ, DKEY, DG, DBETA, DH0 = range(NEXT + 8, NEXT + 64, 8)
# the sequences' shares in the gradients of A_log and dt_bias, and those gradients
DA_LOG, DDT_BIAS, DA_LOG_SUM, DDT_BIAS_SUM = range(NEXT + 64, NEXT + 96, 8)
BACKWARD_LENGTH = NEXT + 96
DV = O


@njit()
def store_dbeta(REAL, desc, b, t, n, hv, w):
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
def token_gates(REAL, m, w):
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
def channel_pairs(REAL, desc, m, w, n, dq, dk):
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
            REAL, m.k + i, m.q + i, m.decays + i, step, w.reads_q + tile, w.reads_k + tile,
            w.writes + tile, w.kept + tile, dq + tile, dk + tile, w.dg + i, step,
        )  # fmt: skip
        zero_rows(REAL, w.back, W)
        for t in range(n):
            at_token, own, now = i + t * step, tile + t * row, w.running + t * square
            pairs_forward(
                REAL, m.k + at_token, m.decays + at_token, t, now - square, now, w.wp + t * size,
                w.wa + t * size, dq + own, dk + own,
            )  # fmt: skip
        for t in range(n - 1, -1, -1):
            at_token, own, now = i + t * step, tile + t * row, w.running + t * square
            pairs_backward(
                REAL, m.k + at_token, m.q + at_token, m.decays + at_token, t, now, w.back,
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
def store_token_gates(REAL, desc, m, w, b, t, n, hv, drate):
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
def store_channel_gates(REAL, desc, m, w, b, t, n, hv, drate):
    g, dg, KP = array_at(desc, G), array_at(desc, DG), padded(REAL, desc[K])
    step, factor = KP * itemsize(REAL), gate_factor(desc, hv)
    for i in range(n):
        rows = w.dg + i * step
        if desc[RAW_GATE]:
            load_row(REAL, g[1], at(g, b, t + i, hv), g[5], desc[K], m.g)
            _raw_gate_gradient(REAL, desc, factor, m.g, m.bias, KP // W, rows, drate)
        store_row(REAL, dg[1], rows, desc[K], at(dg, b, t + i, hv), dg[5])


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
