"""Chunked gated delta rule: blocks of 16 tokens against a state that stays in the cache.

Per block and value head, with G the cumulative log gate inside the block (docs/design.md derives
it):

    U = (I + A)^-1 (beta V - beta e^G K S)     A_ij = beta_i e^(G_i - G_j) k_i.k_j    i > j
    O = scale (e^G Q S + P U)                  P_ij = e^(G_i - G_j) q_i.k_j           i >= j
    S = e^G_last S + (K e^(G_last - G))^T U

with one gate per token (GDA) or one per token and channel (KDA, where k_i.k_j is a sum with a
decay in every term). One item of work is one sequence, one key head and its value heads: k and q
are packed, and for GDA multiplied with each other, once for all of them. Row i of every product
only reads rows up to i.
"""

from functools import cache

import numpy as np

from nbdelta.cpu import _chunk_panels as panels
from nbdelta.cpu._call import (
    CHECKPOINT_STARTS,
    CHECKPOINTS,
    H0,
    HT,
    HV,
    INTERVAL,
    ITEMS,
    KEY,
    MAX_LENGTH,
    MIN_LENGTH,
    NEXT,
    PARTS,
    SCRATCH,
    SCRATCH_STEP,
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
    sequence,
    value_head,
)
from nbdelta.cpu._chunk_panels import load_beta, norms, token_rows
from nbdelta.cpu._chunk_scratch import layout, layout_of, strip_rows, strip_rows_of
from nbdelta.cpu._jit import kernel, njit
from nbdelta.cpu._memory import (
    is_plain,
    load_columns,
    real_of,
    store_columns,
    store_row,
    zero_rows,
)
from nbdelta.cpu._simd import (
    DOTS_BFLOAT16,
    W,
    claim,
    itemsize,
    padded,
    read_int64,
    rows_of_tile,
    whole_tiles,
)
from nbdelta.cpu._team import run, thread_count
from nbdelta.cpu._tiles import (
    KEY_GATE,
    QUERY_GATE,
    SUFFIX,
    fetch,
    output,
    pair_rows,
    solve,
    update,
)


@cache
def _load_states(PAIRS):
    @njit()
    def load_states(REAL, desc, h0, slot, hk, first, last, strips):
        """Bring columns first.. of a key head's states into strips."""
        k, v, row, KP = desc[K], desc[V], W * itemsize(REAL), padded(REAL, desc[K])
        target = strips
        for j in range(desc[HV] // desc[H]):
            for s in range(first, last):
                if h0[0]:
                    source = at(h0, slot, value_head(desc, hk, j), 0) + s * W * h0[5]
                    width = min(W, v - s * W)
                    load_columns(REAL, h0[1], source, h0[4], h0[5], k, width, target, row)
                else:
                    zero_rows(REAL, target, KP)
                if PAIRS:
                    pair_rows(REAL, target, KP, target + (KP + 2 * W) * row)
                target += strip_rows_of(KP, PAIRS) * row

    return load_states


@njit()
def _store_states(REAL, desc, ht, slot, hk, first, last, strips, step):
    """Write columns first.. of a key head's states from strips `step` bytes apart."""
    k, v, row = desc[K], desc[V], W * itemsize(REAL)
    source = strips
    for j in range(desc[HV] // desc[H]):
        for s in range(first, last):
            target = at(ht, slot, value_head(desc, hk, j), 0) + s * W * ht[5]
            width = min(W, v - s * W)
            store_columns(REAL, ht[1], source, row, k, width, target, ht[4], ht[5])
            source += step


@cache
def _value_strips(PER_CHANNEL, PAIRS):
    first_product, second_product = solve(PER_CHANNEL, PAIRS), output(PAIRS)
    third_product = update(PER_CHANNEL, PAIRS)
    DOTS_IN_UPDATE = PAIRS and not PER_CHANNEL

    @njit()
    def value_strips(REAL, desc, m, b, t, n, hk, hv, first, last, strips):
        """U, O and the new state of a value head, one strip of 16 columns after the other."""
        size, KP, width = itemsize(REAL), padded(REAL, desc[K]), desc[V]
        row, MR = W * size, rows_of_tile(REAL)
        tokens = whole_tiles(REAL, n)
        q, k, v, g, o = (
            array_at(desc, Q), array_at(desc, KEY), array_at(desc, VALUE), array_at(desc, G),
            array_at(desc, O),
        )  # fmt: skip
        v_rows, v_step = token_rows(REAL, v, b, t, n, hv, width, m.v)
        direct = n == W and is_plain(REAL, o[1], o[5], width)
        o_rows, o_step = m.o, padded(REAL, width) * size
        if direct:
            o_rows, o_step = at(o, b, t, hv), o[3]
        key_gate, query_gate = m.gates + KEY_GATE * row, m.gates + QUERY_GATE * row
        suffix = m.gates + SUFFIX * row
        keys, queries, updates, update_step = m.keys, m.queries, m.keys, row
        if PER_CHANNEL:
            updates = m.updates
        if PAIRS:
            keys, queries, tokens = m.key_words, m.query_words, W
        if DOTS_IN_UPDATE:
            updates, update_step = m.update_words, row // 2
        for s in range(first, last):
            strip, i = strips + (s - first) * strip_rows_of(KP, PAIRS) * row, s * row
            u = strip + KP * row
            states, words = strip, u + 2 * W * row
            new_u = u if PER_CHANNEL else u + W * row
            if PAIRS:
                states = words
            # what the next block needs of the caller's arrays, some lines between two products
            v_next = at(v, b, t + W, hv) + s * W * v[5]
            o_next = at(o, b, t + W, hv) + s * W * o[5]
            t_next = t + W + 2 * (s - first)
            k_next, q_next, g_next = (
                at(k, b, t_next, hk),
                at(q, b, t_next, hk),
                at(g, b, t_next, hv),
            )
            for j in range(0, tokens, MR):
                first_product(
                    REAL, keys, m.a, states, u, KP, j, key_gate, v_rows + i, v_step, m.beta, suffix,
                    v_next, v[3],
                )  # fmt: skip
            for j in range(0, tokens, MR):
                second_product(
                    REAL, queries, m.p, states, u, KP, j, query_gate, o_rows + i, o_step, o_next,
                    o[3],
                )  # fmt: skip
            if DOTS_IN_UPDATE:
                u_words = words + KP // 2 * row
                pair_rows(REAL, new_u, W, u_words)
                new_u = u_words
            for c in range(0, KP, W):
                fetch(REAL, k_next + c * k[5], k[3])
                fetch(REAL, q_next + c * q[5], q[3])
                if PER_CHANNEL:
                    fetch(REAL, g_next + c * g[5], g[3])
                third_product(
                    REAL, updates + c * update_step, tokens, strip + c * row, new_u,
                    m.decay + c * size, words + c // 2 * row,
                )  # fmt: skip
        if not direct:
            left, right = first * W, min(width, last * W)
            for c in range(n):
                target = at(o, b, t + c, hv) + left * o[5]
                store_row(REAL, o[1], o_rows + c * o_step + left * size, right - left, target, o[5])

    return value_strips


@cache
def _chunk_kernel(REAL, PER_CHANNEL, PAIRS):
    load_states, value_strips = _load_states(PAIRS), _value_strips(PER_CHANNEL, PAIRS)
    key_head, head_gates = panels.key_head(PAIRS), panels.head_gates(PAIRS)
    channel_gates = panels.channel_gates(PAIRS)

    @kernel(REAL, PER_CHANNEL, PAIRS)
    def chunk_kernel(desc, worker):
        q, k, h0, ht = (
            array_at(desc, Q), array_at(desc, KEY), array_at(desc, H0), array_at(desc, HT),
        )  # fmt: skip
        r, interval, parts = desc[HV] // desc[H], desc[INTERVAL], desc[PARTS]
        KP, VP = padded(REAL, desc[K]), padded(REAL, desc[V])
        per_part = (VP // W + parts - 1) // parts
        strips = desc[SCRATCH] + worker * desc[SCRATCH_STEP]
        m = layout_of(
            strips, itemsize(REAL), KP, VP, r * per_part * strip_rows_of(KP, PAIRS), PAIRS
        )
        strip = strip_rows_of(KP, PAIRS) * W * itemsize(REAL)
        while True:
            item = claim(desc, NEXT)
            if item >= desc[ITEMS]:
                break
            part, hk, seq = item % parts, item // parts % desc[H], item // parts // desc[H]
            b, bos, eos = sequence(desc, seq)
            if eos - bos < desc[MIN_LENGTH] or eos - bos > desc[MAX_LENGTH]:
                continue
            first, last = part * per_part, min((part + 1) * per_part, VP // W)
            load_states(REAL, desc, h0, seq, hk, first, last, strips)
            t = bos
            while t < eos:
                n = min(W, eos - t)
                if interval:
                    n = min(n, interval - (t - bos) % interval)
                k_rows, k_step = token_rows(REAL, k, b, t, n, hk, desc[K], m.k)
                q_rows, q_step = token_rows(REAL, q, b, t, n, hk, desc[K], m.q)
                norms(REAL, desc, k_rows, k_step, KP, m.k_norm)
                norms(REAL, desc, q_rows, q_step, KP, m.q_norm)
                if not PER_CHANNEL:
                    key_head(REAL, desc, m, k_rows, k_step, q_rows, q_step)
                for j in range(r):
                    hv = value_head(desc, hk, j)
                    load_beta(REAL, desc, b, t, n, hv, m.beta)
                    if PER_CHANNEL:
                        channel_gates(REAL, desc, m, b, t, n, hv, k_rows, k_step, q_rows, q_step)
                    else:
                        head_gates(REAL, desc, m, b, t, n, hv)
                    own = strips + j * (last - first) * strip
                    value_strips(REAL, desc, m, b, t, n, hk, hv, first, last, own)
                t += n
                if interval and (t - bos) % interval == 0:
                    slot = read_int64(desc[CHECKPOINT_STARTS] + 8 * seq) + (t - bos) // interval - 1
                    kept = array_at(desc, CHECKPOINTS)
                    _store_states(REAL, desc, kept, slot, hk, first, last, strips, strip)
            if ht[0]:
                _store_states(REAL, desc, ht, seq, hk, first, last, strips, strip)

    return chunk_kernel


def multiplies_halves(dtype):
    """Whether q, k and v of a dtype are multiplied in 16 bits unless `precision` forbids it."""
    return DOTS_BFLOAT16 and dtype == "bfloat16"


def chunk_gated_delta_rule(problem, min_length=0):
    """Fill the outputs of a problem by the chunked algorithm.

    Parameters
    ----------
    problem : Problem
        A checked call with its outputs.
    min_length : int
        Sequences with fewer tokens are left alone.
    """
    p = problem
    REAL = real_of(p.q.dtype)
    desc = describe(p, min_length=min_length)
    if p.checkpoint_interval:
        starts = checkpoint_starts(p)
        desc[CHECKPOINT_STARTS] = starts.ctypes.data
    KP, VP = -(-p.K // W) * W, -(-p.V // W) * W
    threads, items = thread_count(), p.N * p.H
    # too few heads for the threads: every strip of the value axis can go its own way
    parts = min(VP // W, -(-threads // items)) if items else 1
    strips = -(-(VP // W) // parts)
    parts = -(-(VP // W) // strips)
    desc[PARTS] = parts
    pairs = multiplies_halves(p.q.dtype) and p.precision != "highest"
    rows = p.HV // p.H * strips * strip_rows(KP, pairs)
    scratch = layout(0, np.dtype(REAL).itemsize, KP, VP, rows, pairs).end
    items *= parts
    flops = 6 * KP * VP * p.HV * p.B * p.T // max(1, items)
    run(_chunk_kernel(REAL, p.per_channel, pairs), desc, items, scratch, threads, flops=flops)
