"""Token-by-token gated delta rule: the decode step, in place where the state already is as it
should be.

Per token and value head:

    S = e^g S;   d = beta (v - S^T k);   S = S + k d^T;   o = scale S^T q

One item of work is one sequence and one value head. A state in the compute dtype whose value axis
is contiguous and a multiple of 16 long is read and written where it lies, once each. So is one of
another form (see `form_of`) by a step of one token. Any other one is brought into scratch for the
tokens of the call.
"""

from array import array
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from nbdelta.cpu._call import (
    A_LOG,
    ACCEPTED,
    BETA,
    BETA_FACTOR,
    CHECKPOINT_STARTS,
    CHECKPOINTS,
    CU_SEQLENS,
    DT_BIAS,
    EPS,
    H0,
    HT,
    HV,
    INTERVAL,
    KEY,
    MAX_LENGTH,
    MIN_LENGTH,
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
    T,
    V,
    array_at,
    at,
    checkpoint_starts,
    describe,
    ends_share,
    next_item,
    real,
    sequence,
    value_head,
)
from nbdelta.cpu._descriptor import read_int64
from nbdelta.cpu._jit import kernel, njit
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
from nbdelta.cpu._simd import itemsize
from nbdelta.cpu._step import step, step_v_first
from nbdelta.cpu._step_tiles import channel_gates, dot_row, head_gate, inverse_norm, scale_row
from nbdelta.cpu._team import BATCH_FLOPS, run, thread_count
from nbdelta.cpu._tiles import sigmoid_row
from nbdelta.cpu._vector_unit import LINE, W
from nbdelta.cpu.gate import apply_gate, gate_factor, load_bias

PADDED = -1
# state bytes below which starting other threads takes longer than the work
SERIAL_BYTES = 1 << 18
# and those that take one thread about as long as it takes another one to wake up
BRIEF_BYTES = 1 << 22
# of a thread between two looks at what Python has to say: about 0.2 s; and of a token, whose state
# may be small, at the least
BATCH_BYTES, TOKEN_BYTES = 1 << 31, 1 << 11


def layout(base, SIZE, KP, VP):
    """Addresses of a worker's buffers from `base` on, and their end.

    In this order: the state; k, q, g; e^g k, e^g q, e^g; bias; v, o; sums S^T k, S^T q, which begin
    somewhere in a line; the place of a single number.
    """
    k = base + KP * VP * SIZE
    q, g, gated = k + KP * SIZE, k + 2 * KP * SIZE, k + 3 * KP * SIZE
    bias = gated + 3 * KP * SIZE
    v = bias + KP * SIZE
    o, sums = v + VP * SIZE, v + 2 * VP * SIZE
    number = sums + 2 * VP * SIZE + LINE
    return k, q, g, gated, bias, v, o, sums, number, number + W * SIZE


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
def _load_vector(REAL, x, b, t, h, n, eps, target):
    """K or q of a token, normalised."""
    load_row(REAL, x[1], at(x, b, t, h), x[5], n, target)
    if eps >= 0:
        n = (n + W - 1) // W * W
        scale_row(REAL, target, inverse_norm(REAL, target, n, REAL(eps)), n)


@njit()
def _load_beta(REAL, desc, b, t, hv, number):
    betas = array_at(desc, BETA)
    beta = get(REAL, betas[1], at(betas, b, t, hv)) if betas[0] else REAL(1)
    if desc[SIGMOID_BETA]:
        fill_row(REAL, beta, number)
        sigmoid_row(REAL, number, REAL(real(desc, BETA_FACTOR)), number)
        beta = load(REAL, number)
    return beta


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


@njit()
def _channel_gates(REAL, desc, factor, bias, b, t, hv, k, q, g_row, gated):
    """Rows e^g k, e^g q and e^g from a gate per channel."""
    g, n = array_at(desc, G), desc[K]
    load_row(REAL, g[1], at(g, b, t, hv), g[5], n, g_row)
    n = (n + W - 1) // W
    if desc[RAW_GATE]:
        apply_gate(REAL, desc, factor, bias, g_row, n)
    channel_gates(REAL, k, q, g_row, n * W, gated)


@njit()
def _head_gate(REAL, desc, factor, bias, b, t, hv, k, q, g_row, gated):
    """Rows e^g k, e^g q and e^g from one gate for all channels."""
    g = array_at(desc, G)
    fill_row(REAL, get(REAL, g[1], at(g, b, t, hv)) if g[0] else REAL(0), g_row)
    if desc[RAW_GATE]:
        apply_gate(REAL, desc, factor, bias, g_row, 1)
    head_gate(REAL, k, q, g_row, (desc[K] + W - 1) // W * W, gated)


@cache
def _recurrent_kernel(REAL, PER_CHANNEL, STATE, V_FIRST):
    SIZE = np.dtype(REAL).itemsize
    # whether a step of one token works on states that `is_plain` does not know
    OTHER = V_FIRST or STATE is not REAL

    @kernel(REAL, PER_CHANNEL, STATE, V_FIRST)
    def recurrent_kernel(desc, worker):
        q, k, v = array_at(desc, Q), array_at(desc, KEY), array_at(desc, VALUE)
        h0, ht, o = array_at(desc, H0), array_at(desc, HT), array_at(desc, O)
        checkpoints = array_at(desc, CHECKPOINTS)
        interval, speculative = desc[INTERVAL], desc[ACCEPTED] != 0
        nk, nv = desc[K], desc[V]
        KP, VP = (nk + W - 1) // W * W, (nv + W - 1) // W * W
        scale, eps = REAL(real(desc, SCALE)), real(desc, EPS)
        state = desc[SCRATCH] + worker * desc[SCRATCH_STEP]
        k_row, q_row, g_row, gated, bias, v_row, o_row, sums, number, _ = _layout(
            state, SIZE, KP, VP
        )
        r = desc[HV] // desc[H]
        from_input = h0[0] != 0 and is_plain(REAL, h0[1], h0[5], nv)
        to_output = ht[0] != 0 and is_plain(REAL, ht[1], ht[5], nv)
        # the key head whose k and q lie in scratch, for the next value head of a single token
        loaded, qk = -1, REAL(0)

        while True:
            item = next_item(desc, worker)
            if item < 0:
                break
            alone = ends_share(desc, item)
            j, hk, seq = item % r, item // r % desc[H], item // desc[HV]
            hv = value_head(desc, hk, j)
            b, bos, eos = sequence(desc, seq)
            if eos - bos < desc[MIN_LENGTH] or eos - bos > desc[MAX_LENGTH]:
                continue
            if desc[STATE_INDICES] and (item + 1) % desc[HV] == 0:
                alone = True
            slot = _first_slot(desc, seq)
            if slot == PADDED:
                _zero_output(REAL, o, b, bos, eos, hv, nv, o_row)
                continue
            in_its_form = OTHER and eos - bos == 1 and not speculative and not interval
            # the state before token t is at `source`; the one after it goes to `target`
            target, target_step = state, VP * SIZE
            if in_its_form or (to_output and not speculative):
                target, target_step = at(ht, slot, hv, 0), ht[4]
            if in_its_form or from_input:
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
                key_head = (b * desc[T] + t) * desc[H] + hk
                if loaded != key_head:
                    loaded = key_head
                    _load_vector(REAL, k, b, t, hk, nk, eps, k_row)
                    _load_vector(REAL, q, b, t, hk, nk, eps, q_row)
                    qk = dot_row(REAL, k_row, q_row, KP)
                load_row(REAL, v[1], at(v, b, t, hv), v[5], nv, v_row)
                if PER_CHANNEL:
                    _channel_gates(REAL, desc, factor, bias, b, t, hv, k_row, q_row, g_row, gated)
                else:
                    _head_gate(REAL, desc, factor, bias, b, t, hv, k_row, q_row, g_row, gated)
                beta = _load_beta(REAL, desc, b, t, hv, number)
                if OTHER:
                    if in_its_form:
                        args = (
                            nk, nv, 1, alone, k_row, gated, v_row, beta, scale, qk, sums, o_row,
                        )  # fmt: skip
                        if V_FIRST:
                            step_v_first(REAL, STATE, source, h0[5], target, ht[5], *args)
                        else:
                            step(REAL, STATE, source, h0[4], target, ht[4], *args)
                        store_row(REAL, o[1], o_row, nv, at(o, b, t, hv), o[5])
                        continue
                if speculative:
                    kept = _slot(desc, seq, t - bos)
                    target, target_step = state, VP * SIZE
                    if to_output and kept != PADDED:
                        target, target_step = at(ht, kept, hv, 0), ht[4]
                # scratch is in the cache
                far = int(source != state)
                step(
                    REAL, REAL, source, source_step, target, target_step, nk, VP, far,
                    alone, k_row, gated, v_row, beta, scale, qk, sums, o_row,
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
            if ht[0] and not speculative and not in_its_form and source != at(ht, slot, hv, 0):
                place = at(ht, slot, hv, 0)
                _store_state(REAL, source, source_step, nk, nv, ht, place)

    return recurrent_kernel


_STATES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def form_of(problem):
    """Type of the numbers of the states, and whether keys are contiguous in them.

    A step of one token works in place on states of this form. Those in the compute dtype with
    contiguous values, the most common ones, have none of the others' code in their kernel.
    """
    p, REAL = problem, real_of(problem.q.dtype)
    h0, ht = p.initial_state, p.final_state
    if h0 is not None and ht is not None and REAL is np.float32 and p.K % W == p.V % W == 0:
        for v_first, axis in ((False, 3), (True, 2)):
            if h0.strides[axis] == ht.strides[axis] == h0.itemsize:
                return _STATES[h0.dtype], v_first
    return REAL, False


class Job(NamedTuple):
    """A call but for its addresses."""

    kernel: Any
    desc: Any  # array of int64, whose places in `PLACES` are for the addresses
    items: int
    scratch: int  # bytes of a worker
    size: int  # bytes of states that the call goes through
    work: int  # those that take as long as the call
    checkpoint_starts: Any  # kept alive


# of the arrays in a descriptor, as `nbdelta.structure.Arrays` orders them, and of the final state
PLACES = Q, KEY, VALUE, G, BETA, H0, A_LOG, DT_BIAS, O, CU_SEQLENS, STATE_INDICES, ACCEPTED, HT


def job_of(problem, max_length=None):
    """Return the job of a problem, with the addresses of the problem's arrays."""
    p, REAL = problem, real_of(problem.q.dtype)
    SIZE = np.dtype(REAL).itemsize
    desc, starts = describe(p, max_length=max_length), None
    if p.checkpoint_interval:
        starts = checkpoint_starts(p)
        desc[CHECKPOINT_STARTS] = starts.ctypes.data
    kernel = _recurrent_kernel(REAL, p.per_channel, *form_of(p))
    scratch = layout(0, SIZE, -(-p.K // W) * W, -(-p.V // W) * W)[-1]
    tokens, state = p.B * p.T * p.HV, p.K * p.V * SIZE
    size, work = tokens * state, tokens * max(state, TOKEN_BYTES)
    return Job(kernel, array("q", desc.tobytes()), p.N * p.HV, scratch, size, work, starts)


def start(job, desc):
    """Run a job with a descriptor that is complete."""
    threads = thread_count() if job.size >= SERIAL_BYTES else 1
    brief, flops = job.size < BRIEF_BYTES, 0
    if job.work > BATCH_BYTES:
        flops = BATCH_FLOPS * job.work // (BATCH_BYTES * job.items)
    run(
        job.kernel, desc, job.items, job.scratch, threads, brief, desc.buffer_info()[0], flops,
        shares=True,
    )  # fmt: skip


def fused_recurrent_gated_delta_rule(problem, max_length=None):
    """Fill the outputs of a problem token by token.

    Parameters
    ----------
    problem : Problem
        A checked call with its outputs.
    max_length : int, optional
        Longer sequences are left alone.
    """
    job = job_of(problem, max_length)
    start(job, job.desc)
