"""Gates from raw projections: the log decay of both gate layouts.

-exp(A_log) softplus(x + dt_bias)    or    lower_bound sigmoid(exp(A_log) (x + dt_bias))
"""

import numpy as np
from numba import cuda

from nbdelta.cuda._call import (
    A_LOG,
    BOUND,
    DT_BIAS,
    EXTRA,
    HV,
    LENGTH,
    RAW_GATE,
    B,
    G,
    K,
    O,
    T,
    array_at,
    at,
    put_array,
    put_float,
)
from nbdelta.cuda._jit import kernel, place_of, specialised
from nbdelta.cuda._math import exp, gate_functions
from nbdelta.cuda._memory import read_real, reader, real_of, writer

THREADS = 128
# tokens of a thread, which all have one bias
TOKENS = 8
# number of threads that share the tokens of a channel
GROUPS = EXTRA


@specialised
def _gate_kernel(DTYPE, OUT, WIDE, DECAY=False):
    """Kernel for dtypes of x and of the result; `WIDE`: A_log or dt_bias is float64.

    `DECAY`: the result is the decay itself.
    """
    REAL = real_of(OUT)
    get, put, get_parameter = reader(DTYPE, REAL), writer(str(REAL), REAL), read_real(REAL, WIDE)
    _, log_decay = gate_functions(REAL)

    @kernel(THREADS)
    def gate_kernel(desc):
        x, out = array_at(desc, G), array_at(desc, O)
        a_log, dt_bias = array_at(desc, A_LOG), array_at(desc, DT_BIAS)
        # neighbouring threads have channels, then heads, then tokens side by side
        item = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        item, k = item // desc[K], item % desc[K]
        item, hv = item // desc[HV], item % desc[HV]
        b, first = item // desc[GROUPS], item % desc[GROUPS]
        if b >= desc[B]:
            return
        rate, bias = REAL(1), REAL(0)
        if a_log[0] != 0:
            rate = exp(get_parameter(a_log[1], a_log[0] + hv * a_log[2]))
        if dt_bias[0] != 0:
            bias = get_parameter(dt_bias[1], dt_bias[0] + hv * dt_bias[2] + k * dt_bias[3])
        source, target = at(x, b, first, hv) + k * x[5], at(out, b, first, hv) + k * out[5]
        t = first
        while t < desc[T]:
            decay = log_decay(desc, get(source), rate, bias)
            put(target, exp(decay) if DECAY else decay)
            t += desc[GROUPS]
            source, target = source + desc[GROUPS] * x[3], target + desc[GROUPS] * out[3]

    return gate_kernel


def specialisations():
    """Name, kernel, descriptor length and dynamic shared memory of all that is ever launched."""
    for dtype in ("float32", "float16", "bfloat16"):
        yield f"gate {dtype}", _gate_kernel(dtype, "float32", False), LENGTH, 0
        wide = _gate_kernel(dtype, "float32", True)
        yield f"gate {dtype}, parameters float64", wide, LENGTH, 0
    yield "gate float64", _gate_kernel("float64", "float64", True), LENGTH, 0
    # for the backward pass, in the precision of q
    for dtype, out in (
        ("float32", "float32"), ("bfloat16", "float32"), ("float16", "float32"),
        ("float64", "float32"), ("float32", "float64"), ("float64", "float64"),
    ):  # fmt: skip
        wide = "float64" in (dtype, out)
        yield f"gate {dtype} to decay {out}", _gate_kernel(dtype, out, wide, True), LENGTH, 0


def fused_gate(x, out, A_log, dt_bias, lower_bound):
    """Fill `out` with the log decay of `x`, ``[B, T, HV]`` or ``[B, T, HV, K]``."""
    _fill(x, out, A_log, dt_bias, lower_bound)


def decays(problem, out):
    """Fill `out` with the decays of a problem that has gates, raw ones or not.

    `out` is float32 or float64, and so are the numbers in between.
    """
    p = problem
    raw = p.use_gate_in_kernel
    _fill(p.g, out, p.A_log, p.dt_bias, p.lower_bound, raw, decay=True)


def _fill(x, out, A_log, dt_bias, lower_bound, raw=True, decay=False):
    desc = np.zeros(LENGTH, np.int64)
    for index, view in ((G, x), (O, out), (A_LOG, A_log), (DT_BIAS, dt_bias)):
        put_array(desc, index, view)
    desc[B], desc[T], desc[HV] = x.shape[:3]
    desc[K] = x.shape[3] if len(x.shape) == 4 else 1
    desc[GROUPS] = groups = -(-x.shape[1] // TOKENS)
    desc[RAW_GATE] = raw
    put_float(desc, BOUND, lower_bound or 0.0, np.dtype(out.dtype))
    wide = "float64" in (x.dtype, out.dtype)
    wide = wide or any(p and p.dtype == "float64" for p in (A_log, dt_bias))
    items = x.shape[0] * groups * int(desc[HV] * desc[K])
    gate_kernel = _gate_kernel(x.dtype, out.dtype, wide, decay)
    gate_kernel.launch((-(-items // THREADS), 1, 1), desc, place_of(x))
