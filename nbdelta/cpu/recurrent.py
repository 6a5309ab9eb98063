"""Token-by-token gated delta rule: the decode step, in place where the state already is as it
should be.

Per token and value head:

    S = e^g S;   d = beta (v - S^T k);   S = S + k d^T;   o = scale S^T q

One item of work is one sequence and one value head. A state in the compute dtype whose value axis
is contiguous and a multiple of 16 long is read and written where it lies, once each; any other one
is brought into scratch for the tokens of the call.
"""

from functools import cache

import numpy as np

from nbdelta.cpu._call import (
    ACCEPTED,
    BETA,
    BETA_FACTOR,
    CHECKPOINT_STARTS,
    CHECKPOINTS,
    EPS,
    H0,
    HT,
    HV,
    INTERVAL,
    ITEMS,
    KEY,
    MAX_LENGTH,
    MIN_LENGTH,
    NEXT,
    RAW_GATE,
    SCALE,
    SCRATCH,
    SCRATCH_STEP,
    SIGMOID_BETA,
    SLOTS,
    STATE_INDICES,
    VALUE,
    G,
    H,
    K,
    O,
    Q,
    V,
    array_at,
    at,
    checkpoint_starts,
    describe,
    real,
    sequence,
    value_head,
)
from nbdelta.cpu._jit import SOURCES, kernel, njit
from nbdelta.cpu._memory import (
    fill_row,
    get,
    is_plain,
    load,
    load_columns,
    load_row,
    real_of,
    store_columns,
    store_row,
    zero_rows,
)
from nbdelta.cpu._simd import W, claim, itemsize, read_int64
from nbdelta.cpu._team import run, thread_count
from nbdelta.cpu._tiles import inverse_norm, scale_row, sigmoid_row, step_16, step_32, token_rows
from nbdelta.cpu.gate import apply_gate, gate_factor, load_bias

PADDED = -1
# state bytes below which starting other threads takes longer than the work
SERIAL_BYTES = 1 << 20


def layout(base, SIZE, KP, VP):
    """Addresses of a worker's buffers from `base` on, and their end.

    In this order: the state; k, q, g; e^g k, e^g q, e^g; bias; v, o; the place of a single number.
    """
    k = base + KP * VP * SIZE
    q, g, gated = k + KP * SIZE, k + 2 * KP * SIZE, k + 3 * KP * SIZE
    bias = gated + 3 * KP * SIZE
    v = bias + KP * SIZE
    o = v + VP * SIZE
    number = o + VP * SIZE
    return k, q, g, gated, bias, v, o, number, number + W * SIZE


_layout = njit()(layout)


@njit()
def _load_state(REAL, x, source, K, V, target):
    """State [K, V] as padded rows."""
    SIZE = itemsize(REAL)
    VP = (V + W - 1) // W * W
    for c in range(0, V, W):
        load_columns(
            REAL, x[1], source + c * x[5], x[4], x[5], K, min(W, V - c), target + c * SIZE,
            VP * SIZE,
        )  # fmt: skip


@njit()
def _store_state(REAL, source, source_step, K, V, x, target):
    SIZE = itemsize(REAL)
    for c in range(0, V, W):
        store_columns(
            REAL, x[1], source + c * SIZE, source_step, K, min(W, V - c), target + c * x[5],
            x[4], x[5],
        )  # fmt: skip


@njit()
def _load_vector(REAL, desc, x, b, t, h, n, eps, target):
    """K or q of a token, normalised."""
    load_row(REAL, x[1], at(x, b, t, h), x[5], n, target)
    if eps >= 0:
        n = (n + W - 1) // W * W
        scale_row(REAL, target, inverse_norm(REAL, target, n, REAL(eps)), n)


@njit()
def _step(REAL, source, source_step, target, target_step, k, gated, K, V, v, beta, scale, qk, o):
    """One token for all columns of a state; source and target may be the same."""
    SIZE = itemsize(REAL)
    width = (K + W - 1) // W * W * SIZE
    done = 0
    while done < V:
        c = done * SIZE
        wide = V - done > W
        done += 2 * W if wide else W
        # the next columns, and after the last ones the first of the next head
        ahead = 2 * W * SIZE if done < V else K * source_step - c
        args = (
            source + c, source_step, target + c, target_step, ahead, k, gated, K, width, v + c,
            beta, scale, qk, o + c,
        )  # fmt: skip
        if wide:
            step_32(REAL, *args)
        else:
            step_16(REAL, *args)


@njit()
def _slot(desc, seq, i):
    return read_int64(desc[STATE_INDICES] + 8 * (seq * desc[SLOTS] + i))


@njit()
def _first_slot(desc, seq):
    """Where a sequence's state comes from: its number, its slot, or PADDED."""
    if not desc[STATE_INDICES]:
        return seq
    return _slot(desc, seq, read_int64(desc[ACCEPTED] + 8 * seq) - 1 if desc[ACCEPTED] else 0)


@njit()
def _zero_output(REAL, o, b, bos, eos, hv, V, row):
    zero_rows(REAL, row, (V + W - 1) // W)
    for t in range(bos, eos):
        store_row(REAL, o[1], row, V, at(o, b, t, hv), o[5])


@cache
def _recurrent_kernel(REAL, PER_CHANNEL):
    SIZE = np.dtype(REAL).itemsize
    STAMP = SOURCES

    @kernel
    def recurrent_kernel(desc, worker):
        stamp = STAMP  # noqa: F841 (a part of the cache key, see SOURCES)
        q, k, v, g = (
            array_at(desc, Q),
            array_at(desc, KEY),
            array_at(desc, VALUE),
            array_at(desc, G),
        )
        h0, ht, o = array_at(desc, H0), array_at(desc, HT), array_at(desc, O)
        checkpoints, betas = array_at(desc, CHECKPOINTS), array_at(desc, BETA)
        interval, speculative = desc[INTERVAL], desc[ACCEPTED] != 0
        nk, nv = desc[K], desc[V]
        KP, VP = (nk + W - 1) // W * W, (nv + W - 1) // W * W
        scale, eps = REAL(real(desc, SCALE)), real(desc, EPS)
        state = desc[SCRATCH] + worker * desc[SCRATCH_STEP]
        k_row, q_row, g_row, gated, bias, v_row, o_row, number, _ = _layout(state, SIZE, KP, VP)
        r = desc[HV] // desc[H]
        from_input = h0[0] != 0 and is_plain(REAL, h0[1], h0[5], nv)
        to_output = ht[0] != 0 and is_plain(REAL, ht[1], ht[5], nv)

        while True:
            item = claim(desc, NEXT)
            if item >= desc[ITEMS]:
                break
            j, hk, seq = item % r, item // r % desc[H], item // desc[HV]
            hv = value_head(desc, hk, j)
            b, bos, eos = sequence(desc, seq)
            if eos - bos < desc[MIN_LENGTH] or eos - bos > desc[MAX_LENGTH]:
                continue
            slot = _first_slot(desc, seq)
            if slot == PADDED:
                _zero_output(REAL, o, b, bos, eos, hv, nv, o_row)
                continue
            # the state before token t is at `source`; the one after it goes to `target`
            target, target_step = state, VP * SIZE
            if to_output and not speculative:
                target, target_step = at(ht, slot, hv, 0), ht[4]
            if from_input:
                source, source_step = at(h0, slot, hv, 0), h0[4]
            else:
                source, source_step = state, VP * SIZE
                if h0[0]:
                    _load_state(REAL, h0, at(h0, slot, hv, 0), nk, nv, state)
                else:
                    zero_rows(REAL, state, KP * VP // W)
            factor = gate_factor(desc, hv)
            if desc[RAW_GATE]:
                load_bias(REAL, desc, hv, nk if PER_CHANNEL else 1, bias)
            for t in range(bos, eos):
                _load_vector(REAL, desc, k, b, t, hk, nk, eps, k_row)
                _load_vector(REAL, desc, q, b, t, hk, nk, eps, q_row)
                load_row(REAL, v[1], at(v, b, t, hv), v[5], nv, v_row)
                if PER_CHANNEL:
                    load_row(REAL, g[1], at(g, b, t, hv), g[5], nk, g_row)
                else:
                    decay = get(REAL, g[1], at(g, b, t, hv)) if g[0] else REAL(0)
                    fill_row(REAL, decay, g_row)
                if desc[RAW_GATE]:
                    rows = KP // W if PER_CHANNEL else 1
                    apply_gate(REAL, desc, factor, bias, g_row, rows)
                beta = get(REAL, betas[1], at(betas, b, t, hv)) if betas[0] else REAL(1)
                if desc[SIGMOID_BETA]:
                    fill_row(REAL, beta, number)
                    sigmoid_row(REAL, number, REAL(real(desc, BETA_FACTOR)), number)
                    beta = load(REAL, number)
                qk = token_rows(REAL, k_row, q_row, g_row, 1 if PER_CHANNEL else 0, KP, gated)
                if speculative:
                    kept = _slot(desc, seq, t - bos)
                    target, target_step = state, VP * SIZE
                    if to_output and kept != PADDED:
                        target, target_step = at(ht, kept, hv, 0), ht[4]
                _step(
                    REAL, source, source_step, target, target_step, k_row, gated, nk, nv,
                    v_row, beta, scale, qk, o_row,
                )  # fmt: skip
                source, source_step = target, target_step
                store_row(REAL, o[1], o_row, nv, at(o, b, t, hv), o[5])
                if speculative and not to_output and kept != PADDED:
                    _store_state(REAL, source, source_step, nk, nv, ht, at(ht, kept, hv, 0))
                done = t + 1 - bos
                if interval and done % interval == 0:
                    kept = read_int64(desc[CHECKPOINT_STARTS] + 8 * seq) + done // interval - 1
                    place = at(checkpoints, kept, hv, 0)
                    _store_state(REAL, source, source_step, nk, nv, checkpoints, place)
            if ht[0] and not speculative and source != at(ht, slot, hv, 0):
                place = at(ht, slot, hv, 0)
                _store_state(REAL, source, source_step, nk, nv, ht, place)

    return recurrent_kernel


def fused_recurrent_gated_delta_rule(problem, max_length=None):
    """Fill the outputs of a problem token by token.

    Parameters
    ----------
    problem : Problem
        A checked call with its outputs.
    max_length : int, optional
        Longer sequences are left alone.
    """
    p = problem
    REAL = real_of(p.q.dtype)
    SIZE = np.dtype(REAL).itemsize
    desc = describe(p, max_length=max_length)
    if p.checkpoint_interval:
        starts = checkpoint_starts(p)
        desc[CHECKPOINT_STARTS] = starts.ctypes.data
    KP, VP = -(-p.K // W) * W, -(-p.V // W) * W
    threads = thread_count()
    if p.B * p.T * p.HV * p.K * p.V * SIZE < SERIAL_BYTES:
        threads = 1
    scratch = layout(0, SIZE, KP, VP)[-1]
    run(_recurrent_kernel(REAL, p.per_channel), desc, p.N * p.HV, scratch, threads)
