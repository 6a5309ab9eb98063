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

from nbdelta.cpu._call import (
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
    PARTS,
    RAW_GATE,
    SCALE,
    SCRATCH,
    SCRATCH_STEP,
    SIGMOID_BETA,
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
    load_tokens,
    real_of,
    save,
    store_columns,
    store_row,
    zero_rows,
)
from nbdelta.cpu._simd import W, claim, native_lanes, read_int64, tile_rows
from nbdelta.cpu._team import run, thread_count
from nbdelta.cpu._tiles import (
    KEY_GATE,
    MANY,
    NEG_BETA,
    PREFIX,
    QUERY_GATE,
    SUFFIX,
    clear_pairs,
    decay_pairs,
    few_pair_sums,
    finish_pairs,
    gate_products,
    gram,
    inverse_norms,
    key_panels,
    many_pair_sums,
    output,
    pack_columns,
    pack_columns_and_rows,
    query_panels,
    scale_columns,
    scale_rows,
    sigmoid_row,
    solve,
    suffix_rows,
    update,
)
from nbdelta.cpu.gate import apply_gate, gate_factor, load_bias


def layout(base, SIZE, KP, VP, strips):
    """Addresses of a worker's buffers from `base` on, and their end, for padded head sizes.

    Compiled into the kernel and called as it is by the host. In this order: state strips; panels
    of k and q with their triangles; rows of k that meet U; three buffers of [16][K] (k, q and k
    rows, or k, q and decay rows); two of 16 x 16 (products); staged k, q, g, v, o; e^G_last per
    channel; gates and the like.
    """
    row = W * SIZE
    panel, tokens, values = (KP + W) * row, KP * row, VP * row
    key_panel = base + strips * panel
    query_panel = key_panel + panel
    updates = query_panel + panel
    x = updates + tokens
    y, z = x + tokens, x + 2 * tokens
    kk = z + tokens
    qk = kk + W * row
    k = qk + W * row
    q, g = k + tokens, k + 2 * tokens
    v = g + tokens
    o = v + values
    decay = o + values
    bias = decay + KP * SIZE
    gates = bias + KP * SIZE
    small = gates + 6 * row
    return (
        key_panel, query_panel, updates, x, y, z, kk, qk, k, q, g, v, o, decay, bias, gates, small,
        small + 4 * row,
    )  # fmt: skip


_layout = njit()(layout)


@njit()
def _load_16(REAL, SIZE, x, b, t, n, hv, default, target):
    """N numbers of ``x[b, t:, hv]`` and zeros, or `default` where x is not given."""
    for i in range(W):
        value = REAL(0)
        if i < n:
            value = REAL(default)
            if x[0]:
                value = get(REAL, x[1], at(x, b, t + i, hv))
        save(REAL, target + i * SIZE, value)


@njit()
def _load_beta(REAL, SIZE, desc, b, t, n, hv, target):
    _load_16(REAL, SIZE, array_at(desc, BETA), b, t, n, hv, 1.0, target)
    if desc[SIGMOID_BETA]:
        sigmoid_row(REAL, target, REAL(real(desc, BETA_FACTOR)), target)
        _clear_after(REAL, SIZE, n, target)


@njit()
def _clear_after(REAL, SIZE, n, target):
    """Padding tokens have gate 0 and beta 0: they change nothing."""
    for i in range(n, W):
        save(REAL, target + i * SIZE, REAL(0))


@njit()
def _load_token_gates(REAL, SIZE, desc, b, t, n, hv, factor, bias, target):
    """16 log decays of a value head with one gate per token."""
    _load_16(REAL, SIZE, array_at(desc, G), b, t, n, hv, 0.0, target)
    if desc[RAW_GATE]:
        apply_gate(REAL, SIZE, desc, factor, bias, target, 1)
        _clear_after(REAL, SIZE, n, target)


@njit()
def _token_rows(REAL, SIZE, x, b, t, n, h, width, staged):
    """Address and step of 16 padded token rows: the caller's own where they serve, else a copy."""
    source = at(x, b, t, h)
    if n == W and is_plain(SIZE, x[1], x[5], width):
        return source, x[3]
    load_tokens(REAL, SIZE, x[1], source, x[3], x[5], n, width, staged)
    return staged, (width + W - 1) // W * W * SIZE


@njit()
def _norms(REAL, SIZE, desc, x, step, KP, out):
    """Factors that normalise 16 rows, or ones."""
    eps = real(desc, EPS)
    if eps < 0:
        fill_row(REAL, REAL(1), out)
    else:
        inverse_norms(REAL, x, step, KP, REAL(eps), out)


@njit()
def _products(REAL, MR, columns, others, KP, out):
    for first in range(0, W, MR):
        gram(REAL, columns, others, first, KP, out)


@njit()
def _pairs(REAL, SIZE, LANES, KP, k_rows, q_rows, decay_rows, kk, qk, neg_beta, scale, a, p):
    """Triangles A and P of a block whose decay differs by channel."""
    row, step, many = W * SIZE, KP * SIZE, MANY * LANES
    for j in range(W):
        at = j * step
        clear_pairs(REAL, W - j, kk + j * LANES * SIZE, qk + j * LANES * SIZE)
        done = 0
        while done < KP:
            c = at + done * SIZE
            i = j * LANES * SIZE
            args = (k_rows + c, q_rows + c, decay_rows + c, step, W - 1 - j, kk + i, qk + i)
            if done + many <= KP:
                many_pair_sums(REAL, *args)
                done += many
            else:
                few_pair_sums(REAL, *args)
                done += W
        finish_pairs(REAL, kk, qk, neg_beta, scale, a + j * row, p + j * row)


@njit()
def _load_states(REAL, SIZE, desc, h0, slot, hk, first, last, strips):
    """Bring columns first.. of a key head's states into strips."""
    r, k, v = desc[HV] // desc[H], desc[K], desc[V]
    panel = ((k + W - 1) // W * W + W) * W * SIZE
    target = strips
    for j in range(r):
        for s in range(first, last):
            if h0[0]:
                source = at(h0, slot, value_head(desc, hk, j), 0) + s * W * h0[5]
                n = min(W, v - s * W)
                load_columns(REAL, SIZE, h0[1], source, h0[4], h0[5], k, n, target, W * SIZE)
            else:
                zero_rows(REAL, SIZE, target, panel // (W * SIZE) - W)
            target += panel


@njit()
def _store_states(REAL, SIZE, desc, ht, slot, hk, first, last, strips):
    r, k, v = desc[HV] // desc[H], desc[K], desc[V]
    panel = ((k + W - 1) // W * W + W) * W * SIZE
    source = strips
    for j in range(r):
        for s in range(first, last):
            target = at(ht, slot, value_head(desc, hk, j), 0) + s * W * ht[5]
            n = min(W, v - s * W)
            store_columns(REAL, SIZE, ht[1], source, W * SIZE, k, n, target, ht[4], ht[5])
            source += panel


@njit()
def _state_products(
    REAL, SIZE, MR, KP, keys, queries, updates, decay, beta, v, v_step, o, o_step, strip
):
    """U, O and the new state for one strip of 16 columns."""
    for first in range(0, W, MR):
        solve(REAL, keys, strip, KP, first, v, v_step, beta)
    for first in range(0, W, MR):
        output(REAL, queries, strip, KP, first, o, o_step)
    row, u = W * SIZE, strip + KP * W * SIZE
    for c in range(0, KP, W):
        update(REAL, updates + c * row, strip + c * row, u, decay + c * SIZE)


@cache
def _chunk_kernel(REAL, PER_CHANNEL):
    SIZE = np.dtype(REAL).itemsize
    ROW = W * SIZE
    MR = tile_rows(SIZE)
    LANES = native_lanes(SIZE)
    KEY_SOURCES = SOURCES

    @kernel
    def chunk_kernel(desc, worker):
        stamp = KEY_SOURCES  # noqa: F841 (see SOURCES)
        q, k, v, g = (
            array_at(desc, Q),
            array_at(desc, KEY),
            array_at(desc, VALUE),
            array_at(desc, G),
        )
        h0, ht, o = array_at(desc, H0), array_at(desc, HT), array_at(desc, O)
        checkpoints = array_at(desc, CHECKPOINTS)
        interval, parts = desc[INTERVAL], desc[PARTS]
        r = desc[HV] // desc[H]
        KP, VP = (desc[K] + W - 1) // W * W, (desc[V] + W - 1) // W * W
        scale = REAL(real(desc, SCALE))
        base = desc[SCRATCH] + worker * desc[SCRATCH_STEP]
        panel = (KP + W) * ROW
        per_part = (VP // W + parts - 1) // parts
        strips = base
        (
            keys, queries, updates, x, y, z, kk, qk, staged_k, staged_q, staged_g, staged_v,
            staged_o, decay, bias, gates, small, _,
        ) = _layout(base, SIZE, KP, VP, r * per_part)  # fmt: skip
        beta, log_gates, k_norm, q_norm = small, small + ROW, small + 2 * ROW, small + 3 * ROW

        while True:
            item = claim(desc, NEXT)
            if item >= desc[ITEMS]:
                break
            part = item % parts
            hk = item // parts % desc[H]
            seq = item // parts // desc[H]
            b, bos, eos = sequence(desc, seq)
            if eos - bos < desc[MIN_LENGTH] or eos - bos > desc[MAX_LENGTH]:
                continue
            first, last = part * per_part, min((part + 1) * per_part, VP // W)
            _load_states(REAL, SIZE, desc, h0, seq, hk, first, last, strips)
            t = bos
            while t < eos:
                n = min(W, eos - t)
                if interval:
                    n = min(n, interval - (t - bos) % interval)
                k_rows, k_step = _token_rows(REAL, SIZE, k, b, t, n, hk, desc[K], staged_k)
                q_rows, q_step = _token_rows(REAL, SIZE, q, b, t, n, hk, desc[K], staged_q)
                _norms(REAL, SIZE, desc, k_rows, k_step, KP, k_norm)
                _norms(REAL, SIZE, desc, q_rows, q_step, KP, q_norm)
                if not PER_CHANNEL:
                    for c in range(0, KP, W):
                        i, tile = c * SIZE, c * ROW
                        pack_columns_and_rows(REAL, k_rows + i, k_step, k_norm, x + tile, z + tile)
                        pack_columns(REAL, q_rows + i, q_step, q_norm, y + tile)
                    _products(REAL, MR, x, x, KP, kk)
                    _products(REAL, MR, x, y, KP, qk)
                for j in range(r):
                    hv = value_head(desc, hk, j)
                    _load_beta(REAL, SIZE, desc, b, t, n, hv, beta)
                    factor = gate_factor(desc, hv)
                    if PER_CHANNEL:
                        g_rows, g_step = staged_g, KP * SIZE
                        if desc[RAW_GATE]:
                            load_tokens(
                                REAL, SIZE, g[1], at(g, b, t, hv), g[3], g[5], n, desc[K], staged_g
                            )
                            load_bias(REAL, SIZE, desc, hv, desc[K], bias)
                            for i in range(n):
                                apply_gate(
                                    REAL, SIZE, desc, factor, bias, g_rows + i * g_step, KP // W
                                )
                        else:
                            g_rows, g_step = _token_rows(
                                REAL, SIZE, g, b, t, n, hv, desc[K], staged_g
                            )
                        neg_beta = gates + NEG_BETA * ROW
                        for i in range(W):
                            save(REAL, neg_beta + i * SIZE, -load(REAL, beta + i * SIZE))
                        for c in range(0, KP, W):
                            i, tile = c * SIZE, c * ROW
                            key_panels(
                                REAL, k_rows + i, k_step, k_norm, g_rows + i, g_step, neg_beta,
                                KP * SIZE, x + i, z + i, keys + tile, decay + i,
                            )  # fmt: skip
                            query_panels(
                                REAL, q_rows + i, q_step, q_norm, z + i, scale, KP * SIZE, y + i,
                                queries + tile,
                            )  # fmt: skip
                            suffix_rows(REAL, x + i, z + i, KP * SIZE, updates + tile)
                        _pairs(
                            REAL, SIZE, LANES, KP, x, y, z, kk, qk, neg_beta, scale, keys + KP *
                            ROW, queries + KP * ROW,
                        )  # fmt: skip
                    else:
                        load_bias(REAL, SIZE, desc, hv, W, bias)
                        _load_token_gates(REAL, SIZE, desc, b, t, n, hv, factor, bias, log_gates)
                        gate_products(REAL, log_gates, beta, scale, gates)
                        scale_columns(REAL, x, gates + KEY_GATE * ROW, KP, keys)
                        scale_columns(REAL, y, gates + QUERY_GATE * ROW, KP, queries)
                        decay_pairs(REAL, kk, qk, gates, scale, keys + KP * ROW, queries + KP * ROW)
                        scale_rows(REAL, z, gates + SUFFIX * ROW, KP // W, updates)
                        total = load(REAL, gates + PREFIX * ROW + (W - 1) * SIZE)
                        for c in range(0, KP, W):
                            fill_row(REAL, total, decay + c * SIZE)
                    v_rows, v_step = _token_rows(REAL, SIZE, v, b, t, n, hv, desc[V], staged_v)
                    o_rows, o_step = staged_o, VP * SIZE
                    direct = n == W and is_plain(SIZE, o[1], o[5], desc[V])
                    if direct:
                        o_rows, o_step = at(o, b, t, hv), o[3]
                    for s in range(first, last):
                        i = s * ROW
                        _state_products(
                            REAL, SIZE, MR, KP, keys, queries, updates, decay, beta, v_rows + i,
                            v_step, o_rows + i, o_step, strips + (j * (last - first) + s - first) *
                            panel,
                        )  # fmt: skip
                    if not direct:
                        i, width = first * W, min(desc[V], last * W) - first * W
                        for c in range(n):
                            store_row(
                                REAL, SIZE, o[1], o_rows + c * o_step + i * SIZE, width,
                                at(o, b, t + c, hv) + i * o[5], o[5],
                            )  # fmt: skip
                t += n
                if interval and (t - bos) % interval == 0:
                    slot = read_int64(desc[CHECKPOINT_STARTS] + 8 * seq) + (t - bos) // interval - 1
                    _store_states(REAL, SIZE, desc, checkpoints, slot, hk, first, last, strips)
            if ht[0]:
                _store_states(REAL, SIZE, desc, ht, seq, hk, first, last, strips)

    return chunk_kernel


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
    scratch = layout(0, np.dtype(REAL).itemsize, KP, VP, p.HV // p.H * strips)[-1]
    run(_chunk_kernel(REAL, p.per_channel), desc, items * parts, scratch, threads)
