"""What the benchmarks share: inputs on a device, the check before the clock, the clock."""

import os
import time

import numba
import numpy as np

from nbdelta import naive

DEVICES = ["cpu", "cpu-1-thread", "cuda"]
# seconds that the repetitions of one number may take
SECONDS = 1.0


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
    numba.set_num_threads(count if device == "cpu" else 1)
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


def best_ms(call, device="cpu"):
    """Milliseconds of the fastest of many calls, after one that compiles and warms up."""
    wait = _synchronize if device == "cuda" else _nothing

    def timed():
        begin = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - begin

    timed()
    best, end = timed(), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        best = min(best, timed())
    return 1e3 * best


def _nothing():
    pass


def _synchronize():
    from numba import cuda

    cuda.synchronize()


# NumPy's own threads would take cores from the kernels
os.environ.setdefault("OMP_NUM_THREADS", "1")
