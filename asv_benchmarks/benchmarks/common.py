"""What the benchmarks share: inputs on a device, the check before the clock, clock and floor.

Nothing of the package but its public functions and the float64 reference, since versions of any
age are measured.
"""

import time

import numba
import numpy as np
import threadpoolctl
from numba import prange

import nbdelta
from nbdelta import naive

DEVICES = ["cpu", "cpu-1-thread", "cuda"]
# Seconds that one number takes, of a turn of a call or its floor, and of a look between two turns
SECONDS, TURN, PAUSE, LOOKS = 2.0, 0.1, 0.01, 50
SIDE = 1024


def public(name):
    """Return a function, or tell asv that this version does not have it."""
    if not hasattr(nbdelta, name):
        raise NotImplementedError(f"no {name} yet")
    return getattr(nbdelta, name)


def inputs(shape, dtype="float32"):
    """Arguments of a call, the same on every machine: unit keys and the gates of a model."""
    rng = np.random.default_rng(0)
    B, T, H, HV, K, V = shape[1:]
    q, k, v = (rng.standard_normal((B, T, h, d)) for h, d in ((H, K), (H, K), (HV, V)))
    gate_shape = (B, T, HV, K) if shape.gate == "kda" else (B, T, HV)
    g = -np.logaddexp(0.0, -rng.standard_normal(gate_shape) - 2.0)
    arrays = {
        "q": q / np.linalg.norm(q, axis=-1, keepdims=True),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": v,
        "g": g,
        "beta": rng.random((B, T, HV)),
        "initial_state": rng.standard_normal((B, HV, K, V)),
    }
    return {name: x.astype(dtype) for name, x in arrays.items()}


def on_device(device, arrays):
    """Return the arrays where `device` says, or tell asv that this machine cannot."""
    if device == "cuda":
        return _on_gpu(arrays)
    count = numba.config.NUMBA_NUM_THREADS
    if device == "cpu" and count == 1:
        raise NotImplementedError("one core: see cpu-1-thread")
    count = count if device == "cpu" else 1
    numba.set_num_threads(count)
    threadpoolctl.threadpool_limits(count)
    return arrays


def _on_gpu(arrays):
    try:
        from numba import cuda

        available = not numba.config.ENABLE_CUDASIM and cuda.is_available()
    except ImportError:
        available = False
    if not available:
        raise NotImplementedError("no GPU")
    return {name: cuda.to_device(x) for name, x in arrays.items()}


def host(x):
    """Return any array as one of NumPy."""
    return x.copy_to_host() if hasattr(x, "copy_to_host") else np.asarray(x)


def error_of(o, arrays, tokens=32, heads=2, **options):
    """Relative L2 error of the first tokens and value heads of `o` to the float64 reference.

    Tokens and heads do not see later ones, so a part of the output is the output of a part.
    """
    HV, H = arrays["v"].shape[2], arrays["q"].shape[2]
    key_heads = -(-heads * H // HV)
    heads = key_heads * HV // H
    first = {"q": key_heads, "k": key_heads, "v": heads, "g": heads, "beta": heads}
    part = {n: host(arrays[n])[:, :tokens, :h].astype(np.float64) for n, h in first.items()}
    part["initial_state"] = host(arrays["initial_state"])[:, :heads].astype(np.float64)
    expected, _ = naive.gated_delta_rule(**part, **options)
    got = host(o)[:, :tokens, :heads].astype(np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


class _Timed:
    """A class of benchmarks with a method `call`, on the `device` of its first parameter.

    The machine's speed changes by more than what one looks for. So the numbers are least times of
    many calls, and one of them is relative to a floor that takes turns with the call.
    """

    version, timeout = "2", 600

    def track_best(self, device, *_):
        """Least time of a call."""
        return 1e3 * _race(device, self.call)[0]

    def track_over_floor(self, device, *_):
        """Least time of a call over that of its floor."""
        floor, factor = self.floor(device)
        best, limit = _race(device, self.call, floor)
        return best / (factor * limit)

    track_best.unit, track_over_floor.unit = "ms", "time / floor"


def product_floor(device, flops, numbers):
    """Return the floor of some flops: a matrix product, and how many of it."""
    if device == "cuda":
        return stream_floor(device, numbers)
    a = np.random.default_rng(0).random((SIDE, SIDE), np.float32)
    out = np.empty_like(a)
    return lambda: np.matmul(a, a, out=out), flops / (2 * SIDE**3)


def stream_floor(device, numbers):
    """Return the floor of reading and writing some float32 numbers."""
    x = np.ones(numbers, np.float32)
    if device == "cuda":
        there = on_device(device, {"source": x, "target": x})
        return lambda: there["target"].copy_to_device(there["source"]), 1
    return lambda: _multiply(x, np.float32(1)), 1


@numba.njit(parallel=True, cache=True)
def _multiply(x, factor):
    for i in prange(x.size):
        x[i] *= factor


def _rest():
    """Wait until no thread of this process works: OpenBLAS's watch for work up to 103 ms."""
    for _ in range(LOOKS):
        begin = time.process_time()
        time.sleep(PAUSE)
        if time.process_time() - begin < PAUSE / 4:
            return


def _race(device, *calls):
    """Least seconds of calls that take turns, after one each that compiles and warms up."""
    wait = _synchronize if device == "cuda" else _nothing

    def timed(call):
        begin = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - begin

    best, end = [min(timed(call), timed(call)) for call in calls], time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for i, call in enumerate(calls):
            _rest()
            turn = time.perf_counter() + TURN
            while time.perf_counter() < turn:
                best[i] = min(best[i], timed(call))
    return best


def _nothing():
    pass


def _synchronize():
    from numba import cuda

    cuda.synchronize()
