"""Chunked gated delta rule: blocks of 16 tokens against a state that stays in the cache.

Per block and value head, with G the cumulative log gate inside the block (docs/design.md derives
it):

    U = (I + A)^-1 (beta V - beta e^G K S)     A_ij = beta_i e^(G_i - G_j) k_i.k_j    i > j
    O = scale (e^G Q S + P U)                  P_ij = e^(G_i - G_j) q_i.k_j           i >= j
    S = e^G_last S + (K e^(G_last - G))^T U

with one gate per token (GDA) or one per token and channel (KDA, where k_i.k_j is a sum with a
decay in every term). k and q of a key head are packed, and for GDA multiplied with each other, once
for all of its value heads. Row i of every product only reads rows up to i.

One item of work is one sequence and some key heads, which take turns block by block: a token's
heads lie side by side in memory, so they share pages, whose addresses the processor looks up once.
"""

from array import array
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from nbdelta.cpu import _chunk_panels as panels
from nbdelta.cpu import _chunk_squares as squares
from nbdelta.cpu import _chunk_strips as strips
from nbdelta.cpu._call import (
    CHECKPOINT_STARTS,
    CHECKPOINTS,
    H0,
    HEADS_TOGETHER,
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
    H,
    K,
    Q,
    V,
    array_at,
    at,
    checkpoint_starts,
    describe,
    sequence,
    value_head,
)
from nbdelta.cpu._chunk_panels import load_beta
from nbdelta.cpu._chunk_scratch import (
    layout,
    layout_of,
    strip_rows,
    strip_rows_of,
    waiting_rows,
    waiting_rows_of,
)
from nbdelta.cpu._chunk_squares import finish_updates
from nbdelta.cpu._descriptor import claim, read_int64
from nbdelta.cpu._jit import kernel, njit
from nbdelta.cpu._matrix_unit import (
    DOTS,
    FLOATS,
    SQUARES,
    begin_tiles,
    end_tiles,
    unit_of_halves,
)
from nbdelta.cpu._memory import (
    copy_strips,
    load_columns,
    own_code,
    real_of,
    store_columns,
    zero_rows,
)
from nbdelta.cpu._simd import itemsize, padded
from nbdelta.cpu._team import run, thread_count
from nbdelta.cpu._tiles import pair_rows
from nbdelta.cpu._vector_unit import W, second_cache


@njit()
def _is_dense(REAL, desc, x):
    """Whether the rows of states lie as those of strips do: own dtype, contiguous, whole tiles."""
    return x[1] == own_code(REAL) and x[5] == itemsize(REAL) and desc[V] % W == desc[K] % W == 0


@cache
def _load_states(unit):
    WORDS = unit == DOTS

    @njit()
    def load_states(REAL, desc, h0, slot, hk, heads, first, last, states, head, strip):
        """Bring columns first.. of the states of key heads hk.. into strips `strip` bytes apart."""
        k, v, row, KP = desc[K], desc[V], W * itemsize(REAL), padded(REAL, desc[K])
        r, n = desc[HV] // desc[H], last - first
        for i in range(heads * r):
            target, hv = states + i * head, value_head(desc, hk + i // r, i % r)
            if not h0[0]:
                for s in range(n):
                    zero_rows(REAL, target + s * strip, KP)
            else:
                source = at(h0, slot, hv, 0) + first * W * h0[5]
                if _is_dense(REAL, desc, h0):
                    copy_strips(REAL, source, h0[4], row, target, row, strip, k, n)
                else:
                    for s in range(n):
                        part, width = source + s * W * h0[5], min(W, v - (first + s) * W)
                        load_columns(
                            REAL, h0[1], part, h0[4], h0[5], k, width, target + s * strip, row
                        )
            if WORDS:
                for s in range(n):
                    place = target + s * strip
                    pair_rows(REAL, place, KP, place + (KP + 2 * W) * row)

    return load_states


@njit()
def _store_states(REAL, desc, ht, slot, hk, heads, first, last, states, head, strip):
    """Write columns first.. of the states of key heads hk.. from strips `strip` bytes apart."""
    k, v, row = desc[K], desc[V], W * itemsize(REAL)
    r, n = desc[HV] // desc[H], last - first
    for i in range(heads * r):
        source, hv = states + i * head, value_head(desc, hk + i // r, i % r)
        target = at(ht, slot, hv, 0) + first * W * ht[5]
        if _is_dense(REAL, desc, ht):
            copy_strips(REAL, source, row, strip, target, ht[4], row, k, n)
        else:
            for s in range(n):
                part, width = target + s * W * ht[5], min(W, v - (first + s) * W)
                store_columns(REAL, ht[1], source + s * strip, row, k, width, part, ht[4], ht[5])


@cache
def _key_head_block(PER_CHANNEL, unit):
    stage, key_head = panels.stage(PER_CHANNEL, unit), panels.key_head(PER_CHANNEL, unit)
    head_gates = panels.head_gates(unit)
    channel_gates = panels.channel_gates(unit)
    if unit == SQUARES:
        value_strips = squares.value_strips(PER_CHANNEL)
    else:
        value_strips = strips.value_strips(PER_CHANNEL, unit)

    @njit()
    def key_head_block(
        REAL, desc, m, b, t, n, hk, t_next, hk_next, first, last, states, head, waits
    ):  # fmt: skip
        """A block of n tokens of a key head, whose states are `head` bytes apart."""
        q, k, KP = array_at(desc, Q), array_at(desc, KEY), padded(REAL, desc[K])
        stage(REAL, desc, k, b, t, n, hk, KP, m.k, m.k_norm, m.key_words)
        stage(REAL, desc, q, b, t, n, hk, KP, m.q, m.q_norm, m.query_words)
        key_head(REAL, desc, m)
        for j in range(desc[HV] // desc[H]):
            hv, following = value_head(desc, hk, j), (t_next, hk_next, value_head(desc, hk_next, j))
            load_beta(REAL, desc, b, t, n, hv, m.beta)
            if PER_CHANNEL:
                channel_gates(REAL, desc, m, b, t, n, hv)
            else:
                head_gates(REAL, desc, m, b, t, n, hv)
            own = states + j * head
            value_strips(REAL, desc, m, b, t, n, hv, following, first, last, own, waits)

    return key_head_block


@cache
def _chunk_kernel(REAL, PER_CHANNEL, unit):
    SQUARED = unit == SQUARES
    load_states, key_head_block = _load_states(unit), _key_head_block(PER_CHANNEL, unit)

    @kernel(REAL, PER_CHANNEL, unit)
    def chunk_kernel(desc, worker):
        h0, ht, kept = array_at(desc, H0), array_at(desc, HT), array_at(desc, CHECKPOINTS)
        r, interval, parts = desc[HV] // desc[H], desc[INTERVAL], desc[PARTS]
        together = desc[HEADS_TOGETHER]
        turns = (desc[H] + together - 1) // together
        KP, VP = padded(REAL, desc[K]), padded(REAL, desc[V])
        per_part = (VP // W + parts - 1) // parts
        states = desc[SCRATCH] + worker * desc[SCRATCH_STEP]
        row, strip_rows = W * itemsize(REAL), strip_rows_of(KP, unit)
        head_rows = per_part * strip_rows + waiting_rows_of(KP, unit)
        m = layout_of(states, itemsize(REAL), KP, VP, together * r * head_rows, unit)
        strip, head = strip_rows * row, head_rows * row
        if SQUARED:
            begin_tiles(REAL, m.products)
        while True:
            item = claim(desc, NEXT)
            if item >= desc[ITEMS]:
                break
            part, turn, seq = item % parts, item // parts % turns, item // parts // turns
            hk = turn * together
            heads = min(together, desc[H] - hk)
            b, bos, eos = sequence(desc, seq)
            if eos - bos < desc[MIN_LENGTH] or eos - bos > desc[MAX_LENGTH]:
                continue
            first, last = part * per_part, min((part + 1) * per_part, VP // W)
            load_states(REAL, desc, h0, seq, hk, heads, first, last, states, head, strip)
            waits = False
            t = bos
            while t < eos:
                n = min(W, eos - t)
                if interval:
                    n = min(n, interval - (t - bos) % interval)
                for i in range(heads):
                    t_next, hk_next = t, hk + i + 1
                    if i + 1 == heads:
                        t_next, hk_next = t + n, hk
                    key_head_block(
                        REAL, desc, m, b, t, n, hk + i, t_next, hk_next, first, last,
                        states + i * r * head, head, waits,
                    )  # fmt: skip
                t += n
                waits = SQUARED
                if SQUARED and (t == eos or (interval and (t - bos) % interval == 0)):
                    for i in range(heads * r):
                        finish_updates(REAL, m, KP, last - first, states + i * head)
                    waits = False
                if interval and (t - bos) % interval == 0:
                    slot = read_int64(desc[CHECKPOINT_STARTS] + 8 * seq) + (t - bos) // interval - 1
                    _store_states(
                        REAL, desc, kept, slot, hk, heads, first, last, states, head, strip
                    )
            if ht[0]:
                _store_states(REAL, desc, ht, seq, hk, heads, first, last, states, head, strip)
        if SQUARED:
            end_tiles(REAL, m.products)

    return chunk_kernel


def multiplies_halves(dtype):
    """Whether q, k and v of a dtype are multiplied in 16 bits unless `precision` forbids it."""
    return dtype == "bfloat16" and unit_of_halves() != FLOATS


# of what takes turns: bytes of states, two thirds of the second cache, and half of it where rows of
# 16 bits share pages twice as well; and work, as an interrupt waits for an item to end
STATES, STATES_OF_SQUARES = 2 * second_cache() // 3, second_cache() // 2
ITEM_FLOPS = 2 * 10**10
# what a token of a value head takes besides its products with the state, in flops of those
TOKEN_FLOPS = 6000


class Job(NamedTuple):
    """A call but for its addresses and its threads."""

    kernel: Any
    unit: int
    desc: Any  # array of int64, whose places in `recurrent.PLACES` are for the addresses
    sizes: tuple[int, ...]  # N, H, value heads per key head, padded K and V, bytes of a number
    alike: int  # sequences of one length: N, or 1
    most: int  # key heads that may take turns
    flops: int  # of all
    checkpoint_starts: Any  # kept alive


def job_of(problem, min_length=0):
    """Return the job of a problem, with the addresses of the problem's arrays."""
    p, REAL = problem, real_of(problem.q.dtype)
    desc, starts = describe(p, min_length=min_length), None
    if p.checkpoint_interval:
        starts = checkpoint_starts(p)
        desc[CHECKPOINT_STARTS] = starts.ctypes.data
    halves = multiplies_halves(p.q.dtype) and p.precision != "highest"
    unit = unit_of_halves() if halves else FLOATS
    KP, VP = -(-p.K // W) * W, -(-p.V // W) * W
    sizes = p.N, p.H, p.HV // max(1, p.H), KP, VP, np.dtype(REAL).itemsize
    kernel = _chunk_kernel(REAL, p.per_channel, unit)
    flops = (6 * KP * VP + TOKEN_FLOPS) * p.HV * p.B * p.T
    alike = p.N if p.cu_seqlens is None else 1
    # their states stay in the second cache and do not wait for each other's at the start; of packed
    # sequences one may have nearly all tokens, and which one is not known to calls that repeat
    states = sizes[2] * (VP // W * strip_rows(KP, unit) + waiting_rows(KP, unit)) * W * sizes[-1]
    blocks = -(-p.B * p.T // (W * max(1, p.N)))
    room = STATES_OF_SQUARES if unit == SQUARES else STATES
    most = min(blocks, room // max(1, states), ITEM_FLOPS * alike * p.H // max(1, flops))
    return Job(kernel, unit, array("q", desc.tobytes()), sizes, alike, most, flops, starts)


@cache
def heads_together(sequences, H, most, threads):
    """How many of H key heads take turns: at most so many, and no thread has more heads for it."""
    least = -(-sequences * H // threads)
    for heads in range(min(H, most), 1, -1):
        if -(-sequences * -(-H // heads) // threads) * heads <= least:
            return heads
    return 1


def start(job, desc):
    """Run a job with a descriptor that is complete but for its parts."""
    threads, (N, H, r, KP, VP, size) = thread_count(), job.sizes
    items, strips = N * H, VP // W
    # too few heads for the threads: every strip of the value axis can go its own way
    parts = min(strips, -(-threads // items)) if items else 1
    per_part = -(-strips // parts)
    parts = -(-strips // per_part)
    rows = r * (per_part * strip_rows(KP, job.unit) + waiting_rows(KP, job.unit))
    together = heads_together(job.alike, H, job.most, threads)
    desc[PARTS], desc[HEADS_TOGETHER] = parts, together
    scratch = layout(0, size, KP, VP, together * rows, job.unit).end
    items = N * -(-H // together) * parts
    run(
        job.kernel, desc, items, scratch, threads, address=desc.buffer_info()[0],
        flops=job.flops // max(1, items),
    )  # fmt: skip


def chunk_gated_delta_rule(problem, min_length=0):
    """Fill the outputs of a problem by the chunked algorithm.

    Parameters
    ----------
    problem : Problem
        A checked call with its outputs.
    min_length : int
        Sequences with fewer tokens are left alone.
    """
    job = job_of(problem, min_length)
    start(job, job.desc)
