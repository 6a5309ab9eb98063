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
from typing import NamedTuple

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
from nbdelta.cpu._jit import kernel, njit
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
from nbdelta.cpu._simd import DOTS_BFLOAT16, W, claim, itemsize, lanes_of, read_int64, rows_of_tile
from nbdelta.cpu._team import run, thread_count
from nbdelta.cpu._tiles import (
    KEY_GATE,
    LAST,
    MANY,
    QUERY_GATE,
    SUFFIX,
    apply_norms,
    clear_pairs,
    decay_pairs,
    fetch,
    few_pair_sums,
    finish_pairs,
    gate_products,
    gram,
    inverse_norms,
    key_panels,
    many_pair_sums,
    multiply_row,
    output,
    pack_columns,
    pair_rows,
    pair_tokens,
    query_panels,
    sigmoid_row,
    solve,
    suffix_rows,
    update,
)
from nbdelta.cpu.gate import apply_gate, gate_factor, load_bias


class Scratch(NamedTuple):
    """Addresses of a worker's buffers. The strips come first, from the start of its memory on."""

    keys: int  # panels k and q; KDA: k e^G and q e^G
    queries: int
    key_words: int  # the panels of the three products as words
    query_words: int
    update_words: int
    updates: int  # KDA: k e^(G_last - G) as rows
    x: int  # KDA: k, q and e^g token by token
    y: int
    z: int
    a: int  # -A and P of the block
    p: int
    kk: int  # products k.k and q.k of the block
    qk: int
    k: int  # staged rows of the arrays that do not serve where they lie
    q: int
    g: int
    v: int
    o: int
    decay: int  # e^G_last, one per channel
    bias: int  # dt_bias of the head
    gates: int  # five rows, see gate_products
    ones: int
    beta: int
    log_decay: int
    k_norm: int
    q_norm: int
    end: int


def strip_rows(KP, pairs):
    """Rows of a strip: the state, U, e^(G_last - G) U, and the state and the last U as words."""
    rows = KP + 2 * W
    return rows + (KP + W) // 2 if pairs else rows


_strip_rows = njit()(strip_rows)


def layout(start, size, KP, VP, rows, pairs):
    """Carve a worker's memory: padded head sizes, `rows` rows of strips, `size` bytes a number.

    Compiled into the kernel, and called as it is by the host, which wants to know the end.
    """
    row = W * size
    tokens, values, channels, square = KP * row, VP * row, KP * size, W * row
    keys = start + rows * row
    key_words = keys + 2 * tokens
    half = tokens // 2 if pairs else 0
    updates = key_words + 3 * half
    x = updates + tokens
    a = x + 3 * tokens
    k = a + 4 * square
    v = k + 3 * tokens
    decay = v + 2 * values
    gates = decay + 2 * channels
    beta = gates + 6 * row
    return Scratch(
        keys, keys + tokens, key_words, key_words + half, key_words + 2 * half, updates, x,
        x + tokens, x + 2 * tokens, a, a + square, a + 2 * square, a + 3 * square, k, k + tokens,
        k + 2 * tokens, v, v + values, decay, decay + channels, gates, gates + 5 * row, beta,
        beta + row, beta + 2 * row, beta + 3 * row, beta + 4 * row,
    )  # fmt: skip


_layout = njit()(layout)


@njit()
def _padded(n):
    return (n + W - 1) // W * W


@njit()
def _whole_tiles(REAL, n):
    """Rows of a block that are worked on: the last block of a sequence may be short."""
    MR = rows_of_tile(REAL)
    return (n + MR - 1) // MR * MR


@njit()
def _load_16(REAL, x, b, t, n, hv, default, target):
    """N numbers of ``x[b, t:, hv]`` and zeros, or `default` where x is not given."""
    for i in range(W):
        value = REAL(0)
        if i < n:
            value = REAL(default)
            if x[0]:
                value = get(REAL, x[1], at(x, b, t + i, hv))
        save(REAL, target + i * itemsize(REAL), value)


@njit()
def _load_beta(REAL, desc, b, t, n, hv, target):
    _load_16(REAL, array_at(desc, BETA), b, t, n, hv, 1.0, target)
    if desc[SIGMOID_BETA]:
        sigmoid_row(REAL, target, REAL(real(desc, BETA_FACTOR)), target)
        _clear_after(REAL, n, target)


@njit()
def _clear_after(REAL, n, target):
    """Padding tokens have gate 0 and beta 0: they change nothing."""
    for i in range(n, W):
        save(REAL, target + i * itemsize(REAL), REAL(0))


@njit()
def _load_token_gates(REAL, desc, b, t, n, hv, m):
    """16 log decays of a value head with one gate per token."""
    _load_16(REAL, array_at(desc, G), b, t, n, hv, 0.0, m.log_decay)
    if desc[RAW_GATE]:
        load_bias(REAL, desc, hv, 1, m.bias)
        apply_gate(REAL, desc, gate_factor(desc, hv), m.bias, m.log_decay, 1)
        _clear_after(REAL, n, m.log_decay)


@njit()
def _token_rows(REAL, x, b, t, n, h, width, staged):
    """Address and step of 16 padded token rows: the caller's own where they serve, else a copy."""
    source = at(x, b, t, h)
    if n == W and is_plain(REAL, x[1], x[5], width):
        return source, x[3]
    load_tokens(REAL, x[1], source, x[3], x[5], n, width, staged)
    return staged, _padded(width) * itemsize(REAL)


@njit()
def _norms(REAL, desc, x, step, KP, out):
    """Factors that normalise 16 rows, or ones."""
    eps = real(desc, EPS)
    if eps < 0:
        fill_row(REAL, REAL(1), out)
    else:
        inverse_norms(REAL, x, step, KP, REAL(eps), out)


@njit()
def _pairs(REAL, KP, n, m, scale):
    """Triangles A and P of a block whose decay differs by channel, token j after token j."""
    size, lanes = itemsize(REAL), lanes_of(REAL)
    row, step, register = W * size, KP * size, lanes * size
    for j in range(n):
        kk, qk = m.kk + j * register, m.qk + j * register
        clear_pairs(REAL, n - j, kk, qk)
        done, later = 0, n - 1 - j
        while done < KP:
            i = j * step + done * size
            if done + MANY * lanes <= KP:
                many_pair_sums(REAL, m.x + i, m.y + i, m.z + i, step, later, kk, qk)
                done += MANY * lanes
            else:
                few_pair_sums(REAL, m.x + i, m.y + i, m.z + i, step, later, kk, qk)
                done += W
        finish_pairs(REAL, m.kk, m.qk, m.beta, scale, m.a + j * row, m.p + j * row)


@cache
def _load_states(PAIRS):
    @njit()
    def load_states(REAL, desc, h0, slot, hk, first, last, strips):
        """Bring columns first.. of a key head's states into strips."""
        k, v, row, KP = desc[K], desc[V], W * itemsize(REAL), _padded(desc[K])
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
                target += _strip_rows(KP, PAIRS) * row

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
def _head_gates(PAIRS):
    @njit()
    def head_gates(REAL, desc, m, b, t, n, hv):
        """Gates and triangles of a value head with one gate per token."""
        row = W * itemsize(REAL)
        _load_token_gates(REAL, desc, b, t, n, hv, m)
        scale = REAL(real(desc, SCALE))
        gate_products(REAL, m.log_decay, m.beta, scale, m.gates)
        decay_pairs(REAL, m.kk, m.qk, m.gates, m.beta, scale, m.a, m.p)
        if PAIRS:
            # the words hold k and q as they are
            multiply_row(REAL, m.gates + KEY_GATE * row, m.k_norm)
            multiply_row(REAL, m.gates + QUERY_GATE * row, m.q_norm)
            multiply_row(REAL, m.gates + SUFFIX * row, m.k_norm)
        last = load(REAL, m.gates + LAST * row)
        for c in range(0, _padded(desc[K]), W):
            fill_row(REAL, last, m.decay + c * itemsize(REAL))

    return head_gates


@cache
def _channel_gates(PAIRS):
    @njit()
    def channel_gates(REAL, desc, m, b, t, n, hv, k_rows, k_step, q_rows, q_step):
        """Panels of a value head with one gate per token and channel."""
        size, KP, g = itemsize(REAL), _padded(desc[K]), array_at(desc, G)
        row, step = W * size, KP * size
        if desc[RAW_GATE]:
            g_rows, g_step = m.g, step
            load_tokens(REAL, g[1], at(g, b, t, hv), g[3], g[5], n, desc[K], m.g)
            load_bias(REAL, desc, hv, desc[K], m.bias)
            factor = gate_factor(desc, hv)
            for i in range(n):
                apply_gate(REAL, desc, factor, m.bias, m.g + i * step, KP // W)
        else:
            g_rows, g_step = _token_rows(REAL, g, b, t, n, hv, desc[K], m.g)
        scale = REAL(real(desc, SCALE))
        for i in range(0, row, size):
            save(REAL, m.gates + KEY_GATE * row + i, -load(REAL, m.beta + i))
        fill_row(REAL, scale, m.gates + QUERY_GATE * row)
        for c in range(0, KP, W):
            i, tile = c * size, c * row
            key_panels(
                REAL, k_rows + i, k_step, m.k_norm, g_rows + i, g_step, step, m.x + i, m.z + i,
                m.keys + tile, m.decay + i,
            )  # fmt: skip
            query_panels(
                REAL, q_rows + i, q_step, m.q_norm, m.z + i, step, m.y + i, m.queries + tile
            )
            suffix_rows(REAL, m.x + i, m.z + i, step, m.updates + tile)
        _pairs(REAL, KP, _whole_tiles(REAL, n), m, scale)
        if PAIRS:
            pair_rows(REAL, m.keys, KP, m.key_words)
            pair_rows(REAL, m.queries, KP, m.query_words)

    return channel_gates


@cache
def _key_head(PAIRS):
    product = gram(PAIRS)

    @njit()
    def key_head(REAL, desc, m, k_rows, k_step, q_rows, q_step):
        """What the value heads of a key head share when the gate is one per token."""
        size, KP = itemsize(REAL), _padded(desc[K])
        k_norm, q_norm, keys, queries = m.k_norm, m.q_norm, m.keys, m.queries
        if PAIRS:
            # k and q are bfloat16 already: left as they are they lose nothing as words
            k_norm = q_norm = m.ones
            keys, queries = m.key_words, m.query_words
            fill_row(REAL, REAL(1), m.ones)
        for c in range(0, KP, W):
            i, tile = c * size, c * W * size
            pack_columns(REAL, k_rows + i, k_step, k_norm, m.keys + tile)
            pack_columns(REAL, q_rows + i, q_step, q_norm, m.queries + tile)
        if PAIRS:
            pair_rows(REAL, m.keys, KP, keys)
            pair_rows(REAL, m.queries, KP, queries)
            pair_tokens(REAL, m.keys, KP, m.update_words)
        for first in range(0, W, rows_of_tile(REAL)):
            product(REAL, keys, keys, first, KP, m.kk)
            product(REAL, keys, queries, first, KP, m.qk)
        if PAIRS:
            apply_norms(REAL, m.k_norm, m.q_norm, m.kk, m.qk)

    return key_head


@cache
def _value_strips(PER_CHANNEL, PAIRS):
    first_product, second_product = solve(PER_CHANNEL, PAIRS), output(PAIRS)
    third_product = update(PER_CHANNEL, PAIRS)
    DOTS_IN_UPDATE = PAIRS and not PER_CHANNEL

    @njit()
    def value_strips(REAL, desc, m, b, t, n, hk, hv, first, last, strips):
        """U, O and the new state of a value head, one strip of 16 columns after the other."""
        size, KP, width = itemsize(REAL), _padded(desc[K]), desc[V]
        row, MR = W * size, rows_of_tile(REAL)
        tokens = _whole_tiles(REAL, n)
        q, k, v, g, o = (
            array_at(desc, Q), array_at(desc, KEY), array_at(desc, VALUE), array_at(desc, G),
            array_at(desc, O),
        )  # fmt: skip
        v_rows, v_step = _token_rows(REAL, v, b, t, n, hv, width, m.v)
        direct = n == W and is_plain(REAL, o[1], o[5], width)
        o_rows, o_step = m.o, _padded(width) * size
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
            strip, i = strips + (s - first) * _strip_rows(KP, PAIRS) * row, s * row
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
    load_states, head_gates, key_head = _load_states(PAIRS), _head_gates(PAIRS), _key_head(PAIRS)
    channel_gates, value_strips = _channel_gates(PAIRS), _value_strips(PER_CHANNEL, PAIRS)

    @kernel(REAL, PER_CHANNEL, PAIRS)
    def chunk_kernel(desc, worker):
        q, k, h0, ht = (
            array_at(desc, Q), array_at(desc, KEY), array_at(desc, H0), array_at(desc, HT),
        )  # fmt: skip
        r, interval, parts = desc[HV] // desc[H], desc[INTERVAL], desc[PARTS]
        KP, VP = _padded(desc[K]), _padded(desc[V])
        per_part = (VP // W + parts - 1) // parts
        strips = desc[SCRATCH] + worker * desc[SCRATCH_STEP]
        m = _layout(strips, itemsize(REAL), KP, VP, r * per_part * _strip_rows(KP, PAIRS), PAIRS)
        strip = _strip_rows(KP, PAIRS) * W * itemsize(REAL)
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
                k_rows, k_step = _token_rows(REAL, k, b, t, n, hk, desc[K], m.k)
                q_rows, q_step = _token_rows(REAL, q, b, t, n, hk, desc[K], m.q)
                _norms(REAL, desc, k_rows, k_step, KP, m.k_norm)
                _norms(REAL, desc, q_rows, q_step, KP, m.q_norm)
                if not PER_CHANNEL:
                    key_head(REAL, desc, m, k_rows, k_step, q_rows, q_step)
                for j in range(r):
                    hv = value_head(desc, hk, j)
                    _load_beta(REAL, desc, b, t, n, hv, m.beta)
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
    pairs = DOTS_BFLOAT16 and p.q.dtype == "bfloat16" and p.precision != "highest"
    rows = p.HV // p.H * strips * strip_rows(KP, pairs)
    scratch = layout(0, np.dtype(REAL).itemsize, KP, VP, rows, pairs).end
    run(_chunk_kernel(REAL, p.per_channel, pairs), desc, items * parts, scratch, threads)
