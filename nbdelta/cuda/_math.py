"""Gates and their functions in the compute dtype, for kernels whose time goes elsewhere.

As exact as the dtype is; ``_chunk_gates.py`` has the faster ones of the tensor-core kernels.
"""

import math
from functools import cache

import numpy as np

from nbdelta.cuda._call import BOUND, RAW_GATE
from nbdelta.cuda._jit import SIMULATOR, device
from nbdelta.cuda._memory import real_field


def _quietly(function):
    """A NumPy function of the simulator: infinities come without a warning, as on the device."""

    def call(x):
        with np.errstate(all="ignore"):
            return function(x)

    return call


exp = _quietly(np.exp) if SIMULATOR else math.exp
log1p = _quietly(np.log1p) if SIMULATOR else math.log1p
sqrt = _quietly(np.sqrt) if SIMULATOR else math.sqrt


@cache
def gate_functions(REAL):
    """Return ``sigmoid(x)`` and ``log_decay(desc, x, rate, bias)``, where rate is e^A_log."""
    real, zero, one = real_field(REAL), REAL(0), REAL(1)

    @device
    def sigmoid(x):
        e = exp(-abs(x))
        return (one if x >= zero else e) / (one + e)

    @device
    def softplus(x):
        return max(x, zero) + log1p(exp(-abs(x)))

    @device
    def log_decay(desc, x, rate, bias):
        if desc[RAW_GATE]:
            bound = real(desc[BOUND])
            if bound < zero:
                return bound * sigmoid(rate * (x + bias))
            return -rate * softplus(x + bias)
        return x

    return sigmoid, log_decay
