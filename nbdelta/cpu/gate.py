"""Gates from raw projections: the log decay of both gate layouts.

-exp(A_log) softplus(x + dt_bias)    or    lower_bound sigmoid(exp(A_log) (x + dt_bias))
"""

from functools import cache

import numpy as np

from nbdelta.cpu._call import (
    A_LOG,
    BOUND,
    DT_BIAS,
    HV,
    ITEMS,
    LENGTH,
    NEXT,
    SCRATCH,
    SCRATCH_STEP,
    B,
    G,
    K,
    O,
    T,
    array_at,
    at,
    put_array,
    put_float,
    real,
)
from nbdelta.cpu._jit import kernel, njit
from nbdelta.cpu._memory import fill_row, get, load_row, real_of, store_row, zero_rows
from nbdelta.cpu._simd import W, claim, itemsize
from nbdelta.cpu._team import run, thread_count
from nbdelta.cpu._tiles import bounded_gate, softplus_gate

# tokens of one item of work
TOKENS = 64


@njit()
def load_bias(REAL, desc, hv, n, target):
    """dt_bias of a value head as a row of n numbers, a single one in all 16 lanes."""
    bias = array_at(desc, DT_BIAS)
    if bias[0] and n == 1:
        fill_row(REAL, get(REAL, bias[1], bias[0] + hv * bias[2]), target)
    elif bias[0]:
        load_row(REAL, bias[1], bias[0] + hv * bias[2], bias[3], n, target)
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


@cache
def _gate_kernel(REAL):
    SIZE = np.dtype(REAL).itemsize

    @kernel(REAL)
    def gate_kernel(desc, worker):
        x, out = array_at(desc, G), array_at(desc, O)
        n = desc[K]
        row = desc[SCRATCH] + worker * desc[SCRATCH_STEP]
        bias = row + (n + W - 1) // W * W * SIZE
        blocks = (desc[T] + TOKENS - 1) // TOKENS
        while True:
            item = claim(desc, NEXT)
            if item >= desc[ITEMS]:
                break
            block, hv, b = item % blocks, item // blocks % desc[HV], item // blocks // desc[HV]
            load_bias(REAL, desc, hv, n, bias)
            factor = gate_factor(desc, hv)
            for t in range(block * TOKENS, min(desc[T], (block + 1) * TOKENS)):
                load_row(REAL, x[1], at(x, b, t, hv), x[5], n, row)
                apply_gate(REAL, desc, factor, bias, row, (n + W - 1) // W)
                store_row(REAL, out[1], row, n, at(out, b, t, hv), out[5])

    return gate_kernel


def fused_gate(x, out, A_log, dt_bias, lower_bound):
    """Fill `out` with the log decay of `x`, ``[B, T, HV]`` or ``[B, T, HV, K]``."""
    REAL = real_of(x.dtype)
    desc = np.zeros(LENGTH, np.int64)
    for index, view in ((G, x), (O, out), (A_LOG, A_log), (DT_BIAS, dt_bias)):
        put_array(desc, index, view)
    desc[B], desc[T], desc[HV] = x.shape[:3]
    desc[K] = x.shape[3] if len(x.shape) == 4 else 1
    put_float(desc, BOUND, 0.0 if lower_bound is None else lower_bound)
    items = x.shape[0] * x.shape[2] * -(-x.shape[1] // TOKENS)
    scratch = 2 * -(-int(desc[K]) // W) * W * np.dtype(REAL).itemsize
    run(_gate_kernel(REAL), desc, items, scratch, thread_count())
