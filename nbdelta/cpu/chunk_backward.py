"""Gradients of the chunked gated delta rule: blocks of 16 tokens, from the last to the first.

With the names of `chunk`, dS the gradient of the state at the end of a block, M and P the triangles
``M_ij = e^(G_i - G_j) k_i.k_j`` and E the errors, so that U = beta E (docs/design.md derives it):

    dU = (K e^(G_last - G)) dS + P^T dO - M^T Y      Y = beta dU, from the last row up
    dV = Y          dbeta_i = dU_i.E_i
    dQ = scale e^G dO S^T + dP K                     dP_ij = scale e^(G_i - G_j) dO_i.U_j
    dK = -e^G Y S^T + e^(G_last - G) U dS^T + (dM + dM^T) K + dP^T Q
    dM_ij = -e^(G_i - G_j) Y_i.U_j
    dS <- e^G_last dS + (scale Q e^G)^T dO - (K e^G)^T Y

The gradient of a gate is the sum of everything that is multiplied with its decay: the pairs of
tokens before and after it, what later tokens read of the state, what earlier ones leave in it, and
the state itself. No sum of it is a difference, so it is as exact at -1000 as at 0.

The states at the start of every chunk of 128 tokens come from the forward pass, and U with them;
the states of a chunk's blocks are made anew. dbeta is made of U = beta E; where U was not kept or
beta is close to 0, E is made anew as well. One item of work is one sequence, one key head and its
value heads, whose gradients of q and k are added up in the order of the heads.
"""

from functools import cache

import numpy as np

from nbdelta.arrays import view
from nbdelta.cpu._backward_blocks import (
    backward_block,
    finish_block,
    prepare_block,
)
from nbdelta.cpu._backward_gates import (
    BACKWARD_LENGTH,
    DA_LOG,
    DA_LOG_SUM,
    DBETA,
    DDT_BIAS,
    DDT_BIAS_SUM,
    DG,
    DH0,
    DHT,
    DKEY,
    DO,
    DQ,
    store_sums,
)
from nbdelta.cpu._backward_scratch import CHUNK, work_layout, work_layout_of
from nbdelta.cpu._backward_states import forward_block
from nbdelta.cpu._call import (
    CHECKPOINT_STARTS,
    CHECKPOINTS,
    H0,
    HV,
    ITEMS,
    NEXT,
    SCRATCH,
    SCRATCH_STEP,
    H,
    K,
    N,
    V,
    array_at,
    at,
    checkpoint_starts,
    describe,
    put_array,
    sequence,
    value_head,
)
from nbdelta.cpu._chunk_scratch import layout, layout_of
from nbdelta.cpu._descriptor import claim, read_int64
from nbdelta.cpu._jit import kernel, njit
from nbdelta.cpu._kept_rows import kept_rows
from nbdelta.cpu._kept_rows import room_for_rows as room_for_rows
from nbdelta.cpu._memory import (
    copy_strips,
    is_plain,
    load,
    load_columns,
    put,
    real_of,
    store_columns,
    zero_rows,
)
from nbdelta.cpu._simd import itemsize, padded
from nbdelta.cpu._team import run, thread_count
from nbdelta.cpu._vector_unit import W

# what a token of a value head takes, in flops of a matrix product: of every number of a
# state, as the products here run at half their speed, and besides
STATE_FLOPS, TOKEN_FLOPS = 48, 20000


@njit()
def _load_state(REAL, desc, x, n, hv, target, step):
    """Bring a state into strips `step` bytes apart, zeros if there is none."""
    row = W * itemsize(REAL)
    if x[0] and is_plain(REAL, x[1], x[5], desc[V]) and desc[K] % W == 0:
        source = at(x, n, hv, 0)
        copy_strips(REAL, source, x[4], row, target, row, step, desc[K], desc[V] // W)
        return
    for s in range(padded(REAL, desc[V]) // W):
        if x[0]:
            source, width = at(x, n, hv, 0) + s * W * x[5], min(W, desc[V] - s * W)
            load_columns(REAL, x[1], source, x[4], x[5], desc[K], width, target, row)
        else:
            zero_rows(REAL, target, padded(REAL, desc[K]))
        target += step


@njit()
def _store_state(REAL, desc, x, n, hv, source, step):
    """Write a state from strips `step` bytes apart."""
    row = W * itemsize(REAL)
    for s in range(padded(REAL, desc[V]) // W):
        target, width = at(x, n, hv, 0) + s * W * x[5], min(W, desc[V] - s * W)
        store_columns(REAL, x[1], source, row, desc[K], width, target, x[4], x[5])
        source += step


@cache
def _backward_kernel(REAL, PER_CHANNEL):
    prepare, forward = prepare_block(PER_CHANNEL), forward_block(PER_CHANNEL)
    backward, finish = backward_block(PER_CHANNEL), finish_block(PER_CHANNEL)

    @njit()
    def chunk_of_tokens(REAL, desc, w, b, seq, hk, bos, start, end, several):
        """Gradients of the tokens of a chunk."""
        size, KP, VP, r = (
            itemsize(REAL), padded(REAL, desc[K]), padded(REAL, desc[V]), desc[HV] // desc[H],
        )  # fmt: skip
        row = W * size
        tokens = KP * row
        blocks = (end - start + W - 1) // W
        for i in range(blocks):
            t, m = start + i * W, layout_of(w.blocks + i * w.block_step, size, KP, VP, 0, False)
            dq, dk = w.dq + i * tokens, w.dk + i * tokens
            pairs = w.pairs + i * 2 * W * row
            prepare(REAL, desc, m, b, t, min(W, end - t), hk, dq, dk, pairs)
        for j in range(r):
            hv = value_head(desc, hk, j)
            dstate, drate = w.dstates + j * w.dstate_step, w.drate + j * w.drate_step
            if start == bos:
                _load_state(REAL, desc, array_at(desc, H0), seq, hv, w.states, w.strip_step)
            else:
                kept = read_int64(desc[CHECKPOINT_STARTS] + 8 * seq) + (start - bos) // CHUNK - 1
                states = array_at(desc, CHECKPOINTS)
                _load_state(REAL, desc, states, kept, hv, w.states, w.strip_step)
            for i in range(blocks):
                t, m = start + i * W, layout_of(w.blocks + i * w.block_step, size, KP, VP, 0, False)
                state, beta = w.states + i * w.state_step, w.beta + 2 * i * row
                n, more = min(W, end - t), i + 1 < blocks
                # a sequence of one token may have gone another way
                kept = kept_rows(REAL, desc, b, t, hv) if several else 0
                forward(REAL, desc, m, w, b, t, n, hv, kept, beta, beta + row, state, more)
            for i in range(blocks - 1, -1, -1):
                t, m = start + i * W, layout_of(w.blocks + i * w.block_step, size, KP, VP, 0, False)
                state, beta = w.states + i * w.state_step, w.beta + 2 * i * row
                dq, dk = w.dq + i * tokens, w.dk + i * tokens
                n, pairs = min(W, end - t), w.pairs + i * 2 * W * row
                backward(
                    REAL, desc, m, w, b, t, n, hk, hv, beta, beta + row, state, dstate, dq, dk,
                    pairs, drate,
                )  # fmt: skip
                if j + 1 == r:
                    finish(REAL, desc, m, w, b, t, n, hk, dq, dk, pairs)

    @kernel(REAL, PER_CHANNEL)
    def backward_kernel(desc, worker):
        r, KP, VP = desc[HV] // desc[H], padded(REAL, desc[K]), padded(REAL, desc[V])
        size = itemsize(REAL)
        row, dh0 = W * size, array_at(desc, DH0)
        w = work_layout_of(
            desc[SCRATCH] + worker * desc[SCRATCH_STEP], size, KP, VP, r, PER_CHANNEL,
            layout_of(0, size, KP, VP, 0, False).end + row,
        )  # fmt: skip
        while True:
            item = claim(desc, NEXT)
            if item >= desc[ITEMS]:
                break
            hk, seq = item % desc[H], item // desc[H]
            b, bos, eos = sequence(desc, seq)
            for j in range(r):
                hv, dstate = value_head(desc, hk, j), w.dstates + j * w.dstate_step
                _load_state(REAL, desc, array_at(desc, DHT), seq, hv, dstate, KP * row)
                zero_rows(REAL, w.drate + j * w.drate_step, 1 + KP // W)
            for i in range((eos - bos + CHUNK - 1) // CHUNK - 1, -1, -1):
                start, several = bos + i * CHUNK, eos - bos > 1
                end = min(start + CHUNK, eos)
                chunk_of_tokens(REAL, desc, w, b, seq, hk, bos, start, end, several)
            for j in range(r):
                hv, dstate = value_head(desc, hk, j), w.dstates + j * w.dstate_step
                if dh0[0]:
                    _store_state(REAL, desc, dh0, seq, hv, dstate, KP * row)
                if desc[DA_LOG]:
                    n = desc[K] if PER_CHANNEL else 1
                    store_sums(REAL, desc, seq, hv, w.drate + j * w.drate_step, n)

    return backward_kernel


@cache
def _sum_kernel(PER_CHANNEL):
    @kernel(PER_CHANNEL)
    def sum_kernel(desc, worker):
        """Add up the sequences' shares in the gradients of A_log and dt_bias, in their order."""
        shares, bias_shares = array_at(desc, DA_LOG), array_at(desc, DDT_BIAS)
        dA, dbias = array_at(desc, DA_LOG_SUM), array_at(desc, DDT_BIAS_SUM)
        for hv in range(desc[HV]):
            if dA[0]:
                total = 0.0
                for seq in range(desc[N]):
                    total += load(np.float64, at(shares, seq, hv, 0))
                put(np.float64, dA[1], dA[0] + hv * dA[2], total)
            if dbias[0]:
                total = 0.0
                for c in range(desc[K] if PER_CHANNEL else 1):
                    if dbias[3]:
                        total = 0.0
                    for seq in range(desc[N]):
                        total += load(np.float64, at(bias_shares, seq, hv, c))
                    put(np.float64, dbias[1], dbias[0] + hv * dbias[2] + c * dbias[3], total)

    return sum_kernel


def chunk_gated_delta_rule_bwd(gradients):
    """Fill the gradients of a problem.

    Parameters
    ----------
    gradients : Gradients
        A checked call, with what the forward pass kept.
    """
    grads, p = gradients, gradients.problem
    REAL = real_of(p.q.dtype)
    desc = np.zeros(BACKWARD_LENGTH, np.int64)
    desc[:NEXT] = describe(p)[:NEXT]
    starts = checkpoint_starts(p)
    desc[CHECKPOINT_STARTS] = starts.ctypes.data
    per_head = p.K if p.per_channel else 1
    shares, bias_shares = np.empty((p.N, p.HV, 1)), np.empty((p.N, p.HV, per_head))
    arrays = {
        DO: grads.do, DHT: grads.dht, DQ: grads.dq, DKEY: grads.dk, DG: grads.dg,
        DBETA: grads.dbeta, DH0: grads.dh0, DA_LOG_SUM: grads.dA_log, DDT_BIAS_SUM: grads.ddt_bias,
    }  # fmt: skip
    if grads.dA_log is not None or grads.ddt_bias is not None:
        arrays[DA_LOG], arrays[DDT_BIAS] = view(shares, "shares"), view(bias_shares, "shares")
    for index, array in arrays.items():
        put_array(desc, index, array)
    KP, VP, size = -(-p.K // W) * W, -(-p.V // W) * W, np.dtype(REAL).itemsize
    block_step = layout(0, size, KP, VP, 0, False).end + W * size
    scratch = work_layout(0, size, KP, VP, p.HV // p.H, p.per_channel, block_step).end
    items = p.N * p.H
    flops = (STATE_FLOPS * KP * VP + TOKEN_FLOPS) * p.HV * p.B * p.T // max(1, items)
    run(_backward_kernel(REAL, p.per_channel), desc, items, scratch, thread_count(), flops=flops)
    if desc[DA_LOG]:
        _sum_kernel(p.per_channel)(desc.ctypes.data, 0)
