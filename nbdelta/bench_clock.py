"""Times of calls that take turns, and what this machine could do at best."""

import statistics
import sys
import time
from contextlib import contextmanager
from typing import NamedTuple

import numba
import numpy as np
from numba import prange

from nbdelta.console import need
from nbdelta.cpu._jit import parallel

# Seconds of a turn, more where one call takes longer, and of a look between two turns, see `rest`.
TURN, PAUSE, LOOKS = 0.1, 0.01, 50
ROUNDS = 3
# rows of the matrices, and numbers in the array, that the limits are measured with
SIDE, STREAM = 2048, 2**26


class Times(NamedTuple):
    """Seconds of the calls of one contender."""

    min: float
    median: float
    calls: int


def wall_time(call):
    """Seconds of a call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def rest():
    """Wait until no thread of this process works any more.

    Those of OpenBLAS watch for more work for 2^26 or 2^28 ticks of the clock, 26 or 103 ms at 2.6
    GHz, and those of OpenMP for a while too. They would take a core from whoever is next.
    """
    for _ in range(LOOKS):
        begin = time.process_time()
        time.sleep(PAUSE)
        if time.process_time() - begin < PAUSE / 4:
            return


def race(calls, seconds, timer=wall_time):
    """Time calls that take turns, so that what disturbs the machine disturbs all of them.

    Parameters
    ----------
    calls : dict
        Functions without arguments by name. Each is called once before the clock runs.
    seconds : float
        Of all of them together, more where `ROUNDS` rounds take longer.
    timer : callable
        Calls what it is given and returns the seconds that took.

    Returns
    -------
    dict
        `Times` by name.
    """
    for call in calls.values():
        call()
    times = {name: [] for name in calls}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < ROUNDS or time.perf_counter() < end:
        for name, call in calls.items():
            rest()
            turn_end = time.perf_counter() + TURN
            times[name].append(timer(call))
            while time.perf_counter() < turn_end:
                times[name].append(timer(call))
        rounds += 1
    return {name: Times(min(t), statistics.median(t), len(t)) for name, t in times.items()}


@contextmanager
def limited_to(threads, command):
    """Hold NumPy's products, Numba, whose number the kernels follow, and torch to some threads."""
    threadpoolctl = need("threadpoolctl", command)
    setters = [(numba.get_num_threads(), numba.set_num_threads)]
    if torch := sys.modules.get("torch"):
        setters.append((torch.get_num_threads(), torch.set_num_threads))
    try:
        with threadpoolctl.threadpool_limits(threads):
            for _, set_threads in setters:
                set_threads(threads)
            yield
    finally:
        for before, set_threads in setters:
            set_threads(before)


class MatrixProduct:
    """The product of two float32 matrices by NumPy: the limit of arithmetic."""

    def __init__(self):
        self.a, self.b = np.random.default_rng(0).random((2, SIDE, SIDE), np.float32)
        self.out = np.empty_like(self.a)
        self.flops = 2 * SIDE**3

    def __call__(self):
        """Multiply once."""
        np.matmul(self.a, self.b, out=self.out)


class Multiply:
    """A multiplication in place of `size` float32 numbers: the limit of reading and writing."""

    def __init__(self, size):
        self.x = np.ones(size, np.float32)
        self.bytes = 2 * self.x.nbytes

    def __call__(self):
        """Go through the array once."""
        _multiply(self.x, np.float32(1))


class Copy:
    """A copy of a float32 array."""

    def __init__(self, x):
        self.x, self.out = x.reshape(-1), np.empty(x.size, np.float32)

    def __call__(self):
        """Copy once."""
        _copy(self.x, self.out)


@parallel
def _multiply(x, factor):
    for i in prange(x.size):
        x[i] *= factor


@parallel
def _copy(x, out):
    for i in prange(x.size):
        out[i] = x[i]
