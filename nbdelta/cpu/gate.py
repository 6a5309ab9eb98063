"""Gates from raw projections: the log decay of both gate layouts.

-exp(A_log) softplus(x + dt_bias)    or    lower_bound sigmoid(exp(A_log) (x + dt_bias))
"""

import math
from functools import cache

import numpy as np

from nbdelta.cpu._call import (
    A_LOG,
    BOUND,
    DT_BIAS,
    HV,
    LENGTH,
    SCRATCH,
    SCRATCH_STEP,
    B,
    G,
    K,
    O,
    T,
    array_at,
    at,
    next_item,
    put_array,
    put_float,
    real,
)
from nbdelta.cpu._gate_tiles import bounded_row, softplus_row
from nbdelta.cpu._jit import kernel, njit
from nbdelta.cpu._memory import (
    fill_row,
    get,
    is_plain,
    load_row,
    real_of,
    save,
    store_row,
    zero_rows,
)
from nbdelta.cpu._simd import itemsize
from nbdelta.cpu._team import run, thread_count
from nbdelta.cpu._tiles import bounded_gate, softplus_gate
from nbdelta.cpu._vector_unit import W

# descriptor fields of this kernel: tokens of an item of work, and what the lanes are
TOKENS, PER_CHANNEL = 88, 89

# numbers of an item of work; below which it is not shared, and no thread is woken for it
NUMBERS, SERIAL, BRIEF = 1 << 13, 1 << 15, 1 << 18
# what a number costs, in flops of a matrix product: 80, and more where the system has to clear the
# pages of a new result
FLOPS = 400


@njit()
def load_bias(REAL, desc, hv, n, target):
    """dt_bias of a value head as a row of n numbers, a single one in all 16 lanes."""
    bias = array_at(desc, DT_BIAS)
    if bias[0] and n == 1:
        fill_row(REAL, get(REAL, bias[1], bias[0] + hv * bias[2]), target)
    elif bias[0]:
        # n is K here; where it is the constant 1 Numba would compile load_row once more for it
        load_row(REAL, bias[1], bias[0] + hv * bias[2], bias[3], desc[K], target)
    else:
        zero_rows(REAL, target, (n + W - 1) // W)


@njit()
def gate_factor(desc, hv):
    """e^A_log of a value head."""
    a_log = array_at(desc, A_LOG)
    if a_log[0]:
        return np.exp(get(np.float64, a_log[1], a_log[0] + hv * a_log[2]))
    return 1.0


@njit()
def apply_gate(REAL, desc, factor, bias, x, n):
    """Turn n rows of 16 raw gates into log decays in place."""
    SIZE, bound = itemsize(REAL), real(desc, BOUND)
    for i in range(n):
        row = i * W * SIZE
        if bound == 0.0:
            softplus_gate(REAL, x + row, bias + row, REAL(-factor), x + row)
        else:
            bounded_gate(REAL, x + row, bias + row, REAL(factor), REAL(bound), x + row)


@njit()
def _load_lanes(REAL, desc, hv, n, bias, factors):
    """Bias and factor of every lane: the channels of a value head, or the value heads."""
    SIZE = itemsize(REAL)
    rows = (n + W - 1) // W
    if desc[PER_CHANNEL]:
        load_bias(REAL, desc, hv, n, bias)
        for i in range(rows):
            fill_row(REAL, REAL(gate_factor(desc, hv)), factors + i * W * SIZE)
        return
    zero_rows(REAL, bias, rows)
    zero_rows(REAL, factors, rows)
    x = array_at(desc, DT_BIAS)
    if x[0]:
        load_row(REAL, x[1], x[0], x[2], n, bias)
    for i in range(n):
        save(REAL, factors + i * SIZE, REAL(gate_factor(desc, i)))


@cache
def _gate_kernel(REAL):
    SIZE = np.dtype(REAL).itemsize

    @kernel(REAL)
    def gate_kernel(desc, worker):
        x, out = array_at(desc, G), array_at(desc, O)
        n, bound = desc[K], real(desc, BOUND)
        padded = (n + W - 1) // W * W
        staged = desc[SCRATCH] + worker * desc[SCRATCH_STEP]
        bias, factors = staged + padded * SIZE, staged + 2 * padded * SIZE
        x_direct = is_plain(REAL, x[1], x[5], n)
        out_direct = is_plain(REAL, out[1], out[5], n)
        blocks = (desc[T] + desc[TOKENS] - 1) // desc[TOKENS]
        loaded = -1
        while True:
            item = next_item(desc, worker)
            if item < 0:
                break
            # heads vary fastest: they usually lie side by side, in the same pages of memory
            hv, block, b = item % desc[HV], item // desc[HV] % blocks, item // desc[HV] // blocks
            if hv != loaded:
                _load_lanes(REAL, desc, hv, n, bias, factors)
                loaded = hv
            first = block * desc[TOKENS]
            for t in range(first, min(desc[T], first + desc[TOKENS])):
                row, result = at(x, b, t, hv), at(out, b, t, hv)
                if not x_direct:
                    load_row(REAL, x[1], row, x[5], n, staged)
                    row = staged
                place = result if out_direct else staged
                if bound == 0.0:
                    softplus_row(REAL, row, x[3], bias, factors, REAL(0), place, padded)
                else:
                    bounded_row(REAL, row, x[3], bias, factors, REAL(bound), place, padded)
                if not out_direct:
                    store_row(REAL, out[1], staged, n, result, out[5])

    return gate_kernel


def fused_gate(x, out, A_log, dt_bias, lower_bound):
    """Fill `out` with the log decay of `x`, ``[B, T, HV]`` or ``[B, T, HV, K]``.

    Lanes are the channels, or else the value heads. A thread's scratch is three rows of them.
    """
    REAL = real_of(x.dtype)
    per_channel = len(x.shape) == 4
    if not per_channel:
        x, out = (
            a.seen_as((*a.shape[:2], 1, a.shape[2]), (*a.strides[:2], 0, a.strides[2]))
            for a in (x, out)
        )
    desc = np.zeros(LENGTH, np.int64)
    for index, view in ((G, x), (O, out), (A_LOG, A_log), (DT_BIAS, dt_bias)):
        put_array(desc, index, view)
    desc[B], desc[T], desc[HV], desc[K] = x.shape
    tokens = desc[TOKENS] = max(1, NUMBERS // x.shape[3])
    desc[PER_CHANNEL] = per_channel
    put_float(desc, BOUND, 0.0 if lower_bound is None else lower_bound)
    items = x.shape[0] * x.shape[2] * -(-x.shape[1] // tokens)
    scratch = 3 * -(-x.shape[3] // W) * W * np.dtype(REAL).itemsize
    size = math.prod(x.shape)
    threads = thread_count() if size >= SERIAL else 1
    flops = FLOPS * size // max(1, items)
    run(_gate_kernel(REAL), desc, items, scratch, threads, size < BRIEF, flops=flops, shares=True)
