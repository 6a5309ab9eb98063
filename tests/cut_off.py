"""Products of matrices on the emulator, with sums that are cut off as tensor cores do it.

The emulator rounds them. Its function for ``mma.sync`` is compiled once more, with another one for
the sums; those are the simulator's (``nbdelta/cuda/_lanes.py``), bit for bit.
"""

from functools import cache
from types import FunctionType

import numba
import numpy as np
from ptxemu import core
from ptxemu.vec import bits_f32, bits_f64, f32_bits, f64_bits, ld32, st32

jit = numba.njit(error_model="numpy")
ROWS, COLUMNS = 16, 8
EXPONENT = 0x7FF << 52  # of a float64
SMALLEST, LAST = 2.0**-126, 2.0**-25


@jit
def _number(address, i):
    return np.float64(bits_f32(ld32(address + 4 * i)))


@jit
def _cut_off(total):
    """The bits of the nearest float32 that is no farther from zero."""
    near = np.float32(total)
    return f32_bits(near) - (abs(np.float64(near)) > abs(total))


@jit
def _multiply(a, b, c, k):
    """C + A B for 16 x k and k x 8 numbers of float32, row after row at three addresses."""
    terms = np.empty(k + 1)
    for i in range(ROWS):
        for j in range(COLUMNS):
            terms[k] = _number(c, COLUMNS * i + j)
            for m in range(k):
                terms[m] = _number(a, k * i + m) * _number(b, COLUMNS * m + j)
            largest, total = SMALLEST, 0.0
            for term in terms:
                largest, total = max(largest, abs(term)), total + term
            if abs(total) < np.inf:
                # a power of two: nothing is lost but what is cut off
                unit = bits_f64(f64_bits(largest) & EXPONENT) * LAST
                scale, units = 1 / unit, 0
                for term in terms:
                    units += int(term * scale)
                total = units * unit
            st32(c + 4 * (COLUMNS * i + j), _cut_off(total))


@cache
def _compiled():
    """The emulator's function with these sums, and its place among those that kernels call."""
    own, arguments, place = next(f for f in core._c_functions if f[0].__name__ == "do_mma")
    changed = FunctionType(own.__code__, {**own.__globals__, "gemm16x8": _multiply}, "do_mma")
    changed.__module__ = __name__
    signature = numba.int64(*[numba.int64] * arguments)
    return numba.cfunc(signature, error_model="numpy")(changed), place


def install(monkeypatch):
    """Let the emulator cut sums off until the test ends."""
    function, place = _compiled()
    monkeypatch.setitem(core.addresses(), place, function.address)
