"""Token-by-token gated delta rule: the decode step, with the state in registers from its one load
to its one store.

Per token and value head:

    S = e^g S;   d = beta (v - S^T k);   S = S + k d^T;   o = scale S^T q

A block has 32 columns of V (16 of float64) of one value head of one sequence. Both products with
the state are taken in one pass, before the update: S^T k and S^T q of the decayed state, and then
o = scale (S^T q + (q . k) d).
"""

from array import array
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, float64, int32, int64, uint32

from nbdelta.cuda._call import (
    A_LOG,
    ACCEPTED,
    BETA,
    BETA_FACTOR,
    CHECKPOINTS,
    CU_SEQLENS,
    DT_BIAS,
    EPS,
    EXTRA,
    H0,
    HT,
    INTERVAL,
    KEY,
    L2NORM,
    LENGTH,
    MAX_LENGTH,
    MIN_LENGTH,
    POOL,
    RAW_GATE,
    ROOM,
    SCALE,
    SIGMOID_BETA,
    SLOTS,
    STATE_INDICES,
    VALUE,
    G,
    K,
    O,
    Q,
    V,
    array_at,
    at,
    describe,
    first_checkpoint,
    key_head,
    sequence,
)
from nbdelta.cuda._jit import SIMULATOR, Kernel, current_place, device, kernel, specialised
from nbdelta.cuda._math import exp, gate_functions, sqrt
from nbdelta.cuda._memory import (
    read_index,
    read_real,
    reader,
    real_field,
    real_of,
    writer,
)
from nbdelta.cuda._state import PARTS, THREADS, WARP, form_of, loader, storer, zeros
from nbdelta.cuda._step import RECORD, dots, keep_record, update, warp_sum

PADDED = -1
# along z, in a launch: the device's limit
MOST_BLOCKS = 65535
# descriptor field of this kernel: the first sequence
FIRST = EXTRA
WARPS = THREADS // WARP


@device
def _slot(desc, n, i):
    """Slot number i of a sequence, or PADDED where there is none in the pool."""
    indices = array_at(desc, STATE_INDICES)
    slot = read_index(indices[1], indices[0] + n * indices[2] + i * indices[3])
    return slot if 0 <= slot < desc[POOL] else int64(PADDED)


@device
def _first_slot(desc, n):
    """Where a sequence's state comes from: its number, its slot, or PADDED."""
    if desc[STATE_INDICES] == 0:
        return n
    accepted = array_at(desc, ACCEPTED)
    if accepted[0] == 0:
        return _slot(desc, n, 0)
    i = read_index(accepted[1], accepted[0] + n * accepted[2])
    return _slot(desc, n, i - 1) if 1 <= i <= desc[SLOTS] else int64(PADDED)


@specialised
def _recurrent_kernel(REAL, DTYPE, STATE, form, VECTORS, MASKED, PER_CHANNEL, WIDE):
    """Kernel for one layout of the state.

    `form` says which numbers of the state a thread holds; `VECTORS` whether it reads, and whether
    it writes, 16 bytes at once; `MASKED` whether there are rows or columns past the end. `WIDE`: g,
    beta, A_log or dt_bias is float64.
    """
    get, put, get_side = reader(DTYPE, REAL), writer(DTYPE, REAL), read_real(REAL, WIDE)
    real, (sigmoid, log_decay) = real_field(REAL), gate_functions(REAL)
    no_state = zeros(form, REAL)
    load = loader(form, REAL, STATE, VECTORS[0], MASKED)
    store = storer(form, REAL, STATE, VECTORS[1], MASKED)
    sum_1, sum_3 = warp_sum(REAL, 1), warp_sum(REAL, 3)
    keep, multiply, step = keep_record(form, REAL), dots(form, REAL), update(form, REAL)
    ROWS, COLUMNS = form.rows, form.columns
    LANES, VECTOR, ALONG_K = form.lanes, form.vector, form.along_k
    RECORDS, SUMS, NORMS = 2 * ROWS * RECORD, 2 * PARTS * COLUMNS, 2 * 3 * WARPS
    ZERO, ONE = REAL(0), REAL(1)
    # blocks that the registers last for
    BLOCKS = (3 if form.count > 32 or REAL == float64 else 4) - (not all(VECTORS))

    @kernel(THREADS, BLOCKS)
    def recurrent_kernel(desc):
        t = int32(cuda.threadIdx.x)
        lane, warp = t % WARP, t // WARP
        first = int32(cuda.blockIdx.x * COLUMNS)  # column of the block
        hv, n = int64(cuda.blockIdx.y), int64(cuda.blockIdx.z + desc[FIRST])
        hk = int64(key_head(desc, hv))
        b, bos, eos = sequence(desc, n)
        if eos - bos < desc[MIN_LENGTH] or eos - bos > desc[MAX_LENGTH]:
            return
        q, k, v, g = (
            array_at(desc, Q),
            array_at(desc, KEY),
            array_at(desc, VALUE),
            array_at(desc, G),
        )
        betas, o = array_at(desc, BETA), array_at(desc, O)
        h0, ht, checkpoints = array_at(desc, H0), array_at(desc, HT), array_at(desc, CHECKPOINTS)
        # a column of V is the business of a thread of the first warp
        column = int64(first + t)
        has_column = t < COLUMNS and column < desc[V]
        slot = _first_slot(desc, n)
        if slot == PADDED:
            if has_column:
                for i in range(bos, eos):
                    put(at(o, b, i, hv) + column * o[5], ZERO)
            return

        if SIMULATOR:
            records = cuda.shared.array(RECORDS, REAL)
            sums = cuda.shared.array(SUMS, REAL)
            deltas = cuda.shared.array(COLUMNS, REAL)
            norms = cuda.shared.array(NORMS, REAL)
        else:
            records = cuda.shared.array(RECORDS, REAL, 16)
            sums = cuda.shared.array(SUMS, REAL, 16)
            deltas = cuda.shared.array(COLUMNS, REAL, 16)
            norms = cuda.shared.array(NORMS, REAL, 16)
        if ALONG_K:
            row, own, part = t % LANES * VECTOR, t // LANES, t % LANES // (LANES // PARTS)
        else:
            row, own, part = t // LANES, t % LANES * VECTOR, warp
        if h0[0] != 0:
            source = h0[0] + slot * h0[2] + hv * h0[3]
            state = load(source, h0[4], h0[5], row, first + own, desc[K], desc[V])
        else:
            state = no_state()

        rate, bias_at, bias_step, bias_code = ONE, int64(0), int64(0), int64(0)
        if desc[RAW_GATE]:
            a_log, dt_bias = array_at(desc, A_LOG), array_at(desc, DT_BIAS)
            if a_log[0] != 0:
                rate = exp(get_side(a_log[1], a_log[0] + hv * a_log[2]))
            if dt_bias[0] != 0:
                bias_at, bias_step = dt_bias[0] + hv * dt_bias[2], dt_bias[3]
                bias_code = dt_bias[1]
        speculative = desc[ACCEPTED] != 0

        for i in range(bos, eos):
            # every other token has the other half, so that no warp overtakes the last step
            turn = int32((i - bos) & 1)
            half = int32(turn * (ROWS * RECORD))
            decay = ONE
            if PER_CHANNEL:
                g_at = at(g, b, i, hv)
            elif g[0] != 0:
                bias = ZERO
                if bias_at != 0:
                    bias = get_side(bias_code, bias_at)
                decay = exp(log_decay(desc, get_side(g[1], at(g, b, i, hv)), rate, bias))
            v_i, beta = ZERO, ONE
            if has_column:
                v_i = get(at(v, b, i, hv) + column * v[5])
                if betas[0] != 0:
                    beta = get_side(betas[1], at(betas, b, i, hv))
                    if desc[SIGMOID_BETA]:
                        beta = sigmoid(beta) * real(desc[BETA_FACTOR])
            k_at, q_at = at(k, b, i, hk), at(q, b, i, hk)
            kk, qq, kq = ZERO, ZERO, ZERO
            for c in range(t, ROWS, THREADS):
                k_c, q_c = ZERO, ZERO
                if c < desc[K]:
                    k_c, q_c = get(k_at + c * k[5]), get(q_at + c * q[5])
                    if PER_CHANNEL:
                        bias = ZERO
                        if bias_at != 0:
                            bias = get_side(bias_code, bias_at + c * bias_step)
                        decay = exp(log_decay(desc, get_side(g[1], g_at + c * g[5]), rate, bias))
                keep(records, half, c, (decay * k_c, decay * q_c, k_c, decay))
                kk += k_c * k_c
                qq += q_c * q_c
                kq += k_c * q_c
            if desc[L2NORM]:
                kk, qq, kq = sum_3((kk, qq, kq))
            else:
                kq = sum_1((kq,))[0]
            # (indices without a sign: Numba has code for those below 0)
            if lane == 0:
                place = uint32((turn * WARPS + warp) * 3)
                norms[place] = kk
                norms[uint32(place + 1)] = qq
                norms[uint32(place + 2)] = kq
            cuda.syncthreads()

            multiply(state, records, half, row, sums, part, own, lane)
            cuda.syncthreads()

            if t < COLUMNS:
                kk, qq, kq = ZERO, ZERO, ZERO
                for w in range(WARPS):
                    place = uint32((turn * WARPS + w) * 3)
                    kk += norms[place]
                    qq += norms[uint32(place + 1)]
                    kq += norms[uint32(place + 2)]
                s_k, s_q = ZERO, ZERO
                for w in range(PARTS):
                    s_k += sums[uint32(w * COLUMNS + t)]
                    s_q += sums[uint32((PARTS + w) * COLUMNS + t)]
                k_factor, q_factor = ONE, real(desc[SCALE])
                if desc[L2NORM]:
                    # the records hold k and q as they came
                    k_factor = ONE / sqrt(kk + real(desc[EPS]))
                    q_factor = q_factor / sqrt(qq + real(desc[EPS]))
                d = beta * (v_i - s_k * k_factor) * k_factor
                deltas[uint32(t)] = d
                if has_column:
                    put(at(o, b, i, hv) + column * o[5], q_factor * (s_q + kq * d))
            cuda.syncthreads()

            state = step(state, records, half, row, deltas, own)
            done = i - bos + 1
            if speculative and done <= desc[SLOTS]:
                kept = _slot(desc, n, done - 1)
                if kept != PADDED:
                    target = ht[0] + kept * ht[2] + hv * ht[3]
                    store(state, target, ht[4], ht[5], row, first + own, desc[K], desc[V])
            if desc[INTERVAL] != 0 and done % desc[INTERVAL] == 0:
                kept = first_checkpoint(desc, n) + done // desc[INTERVAL] - 1
                target = checkpoints[0] + kept * checkpoints[2] + hv * checkpoints[3]
                if kept < desc[ROOM]:
                    store(
                        *(state, target, checkpoints[4], checkpoints[5]),
                        *(row, first + own, desc[K], desc[V]),
                    )
        if ht[0] != 0 and not speculative:
            target = ht[0] + slot * ht[2] + hv * ht[3]
            store(state, target, ht[4], ht[5], row, first + own, desc[K], desc[V])

    return recurrent_kernel


def _in_vectors(view, along_k):
    """Whether the states of a view can be read or written 16 bytes at once."""
    if view is None:
        return True
    last, other = (2, 3) if along_k else (3, 2)
    outer = (view.address, *view.strides[:2], view.strides[other])
    return (
        view.strides[last] == view.itemsize
        and not view.shape[last] * view.itemsize % 16
        and not any(x % 16 for x in outer)
    )


class Job(NamedTuple):
    """A call but for its arrays, as `nbdelta.repeat` keeps it."""

    kernel: Kernel
    desc: Any  # array of int64, whose places in `PLACES` are for the addresses
    blocks: tuple[int, int]  # slices of V, value heads
    sequences: int
    place: Any  # function: device and current stream
    others: Any  # function: the kernel for states that are not at multiples of 16 bytes


# of the arrays in a descriptor, as `nbdelta.structure.Arrays` orders them, and of the final state
PLACES = Q, KEY, VALUE, G, BETA, H0, A_LOG, DT_BIAS, O, CU_SEQLENS, STATE_INDICES, ACCEPTED, HT


def job_of(problem, min_length=0, max_length=None):
    """Return the job of a problem, with the addresses of the problem's arrays."""
    p = problem
    REAL = real_of(p.q.dtype)
    desc = describe(p, np.float64 if REAL == float64 else np.float32, min_length, max_length)
    states = [x for x in (p.final_state, p.checkpoints, p.initial_state) if x is not None]
    dtype = states[0].dtype if states else "float32"
    along_k = bool(states) and states[0].strides[2] == states[0].itemsize != states[0].strides[3]
    form = form_of(p.K, dtype, along_k)
    vectors = (
        _in_vectors(p.initial_state, along_k),
        _in_vectors(p.final_state, along_k) and _in_vectors(p.checkpoints, along_k),
    )
    masked = bool(p.K % form.rows or p.V % form.columns)
    sides = (p.g, p.beta, p.A_log, p.dt_bias)
    wide = REAL == float64 or any(x is not None and x.dtype == "float64" for x in sides)

    given, per_channel = p.q.dtype, p.per_channel

    def kernel_for(*vectors):
        return _recurrent_kernel(REAL, given, dtype, form, vectors, masked, per_channel, wide)

    blocks = -(-p.V // form.columns), p.HV
    place = partial(current_place, p.q.kind, p.q.device)
    return Job(kernel_for(*vectors), array("q", desc.tobytes()), blocks, p.N, place, kernel_for)


def start(job, desc):
    """Run a job with a descriptor that is complete."""
    kernel = job.kernel
    if (desc[H0] | desc[HT]) & 15:
        kernel = job.others(False, False)
    for first in range(0, job.sequences, MOST_BLOCKS):
        desc[FIRST] = first
        blocks = (*job.blocks, min(job.sequences - first, MOST_BLOCKS))
        kernel.launch(blocks, np.frombuffer(desc, np.int64), job.place())


def fused_recurrent_gated_delta_rule(problem, max_length=None):
    """Fill the outputs of a problem token by token.

    Parameters
    ----------
    problem : Problem
        A checked call with its outputs.
    max_length : int, optional
        Longer sequences are left alone.

    Raises
    ------
    ValueError
        When K is more than 256.
    """
    token_by_token(problem, 0, max_length)


def token_by_token(problem, min_length, max_length):
    """Do the same for sequences of at least `min_length` and at most `max_length` tokens."""
    job = job_of(problem, min_length, max_length)
    start(job, job.desc)


def specialisations():
    """Name, kernel, descriptor length and dynamic shared memory of some that stand for all."""
    for width, dtype, state, along_k, vectors, gate in (
        *[(128, "bfloat16", "float32", False, True, gate) for gate in ("GDA", "KDA")],
        *[(128, "bfloat16", "bfloat16", along_k, True, "KDA") for along_k in (False, True)],
        (96, "float16", "float16", True, True, "GDA"),
        (100, "float32", "float32", False, False, "KDA"),
        (256, "bfloat16", "float32", False, True, "GDA"),
        (256, "float32", "float32", True, True, "GDA"),
        (250, "float32", "float32", False, False, "KDA"),
        (256, "bfloat16", "bfloat16", False, True, "KDA"),
        (256, "float64", "float64", False, True, "GDA"),
        (250, "float64", "float64", True, False, "KDA"),
    ):
        REAL, form = real_of(dtype), form_of(width, state, along_k)
        masked = width != form.rows or not vectors
        options = (vectors, vectors), masked, gate == "KDA", REAL == float64
        name = f"recurrent {gate} {dtype}, state {state}, K {width}"
        name += (" along K" if along_k else "") + ("" if vectors else ", strided")
        yield name, _recurrent_kernel(REAL, dtype, state, form, *options), LENGTH, 0
