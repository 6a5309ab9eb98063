"""``python -m nbdelta bench``: times of the kernels over what this machine could do at best.

The floor of a prefill is its three state products, ``6 K V`` flops for each token and value head,
at the speed of this machine's own matrix product; that of a decode step is an in-place multiply
of an array as large as the states, that of a cumulative sum a copy. All are measured in the same
run on as many threads.
"""

import functools
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass

import numba
import numpy as np
from numba import prange

import nbdelta
from nbdelta import console as out
from nbdelta.cpu._jit import parallel
from nbdelta.cpu._team import thread_count
from nbdelta.testing import as_dtype, make_inputs

HV, D = 32, 128


@dataclass(frozen=True)
class _Case:
    """One row: what is run, and the largest time / floor that it should have."""

    gate: str
    H: int
    B: int
    T: int
    bar: float | None
    dtype: str = "float32"
    state_dtype: str = "float32"

    @property
    def name(self):
        what = f"B = {self.B}" if self.T == 1 else f"T = {self.T}"
        kind = "decode" if self.T == 1 else "prefill"
        if self.state_dtype != "float32":
            what += f", {self.state_dtype} state"
        elif self.dtype != "float32":
            what += f", {self.dtype}"
        return f"{kind} {self.gate.upper()}, {what}"


def _cases(threads):
    """Rows and bars; a bar of one thread or two is taken for more than two as well."""
    gda = (1.25, 1.12, 1.12) if threads == 1 else (1.25, 1.08, 1.08)
    kda = (None, None, None) if threads == 1 else (1.38, 1.2, 1.2)
    if numba.config.CPU_NAME == "haswell":
        gda = (None, 1.4, None)
    for T, bar in zip((64, 512, 2048), gda, strict=True):
        yield _Case("gda", 16, 1, T, bar)
    for T, bar in zip((64, 512, 2048), kda, strict=True):
        yield _Case("kda", 32, 1, T, bar)
    yield _Case("gda", 16, 1, 2048, 0.64, "bfloat16")
    yield _Case("kda", 32, 1, 2048, 0.80, "bfloat16")
    for B, bar in ((1, 2.3), (16, 1.35), (64, 1.15)):
        yield _Case("gda", 16, B, 1, bar if threads > 1 else None)
    for B, bar in ((1, 2.3), (16, 1.4), (64, 1.25)):
        yield _Case("kda", 32, B, 1, bar if threads > 1 else None)
    yield _Case("gda", 16, 64, 1, 0.65, "bfloat16", "bfloat16")


def bench(quick=False):
    """Print the table.

    Parameters
    ----------
    quick : bool
        Whether to spend about a quarter of a second on each row instead of two.

    Returns
    -------
    int
        0: a machine that is busy with other work is no error.
    """
    console = out.console("bench")
    threadpoolctl = out.need("threadpoolctl", "bench")
    seconds = 0.25 if quick else 2.0
    threads = thread_count()
    cases = list(_cases(threads))
    table = out.table(
        f"time over the machine's own limit, {threads} thread{'s' if threads > 1 else ''}, "
        f"D = {D}, {HV} value heads",
        *("case", ">ms", ">floor ms", ">time / floor", ">bar"),
    )
    with (
        threadpoolctl.threadpool_limits(threads),
        _numba_threads(threads),
        out.progress(console, len(cases) + 7) as step,
    ):
        step("matrix product", 0)
        peak = _peak(seconds)
        step("")
        for case in cases:
            step(case.name, 0)
            floor = _decode_floor(case.B, seconds) if case.T == 1 else _prefill_floor(case, peak)
            best = _best(_call(case), seconds)
            bar = "" if case.bar is None else f"{case.bar:.2f}"
            table.add_row(
                *(case.name, f"{1e3 * best:.3f}", f"{1e3 * floor:.3f}", f"{best / floor:.2f}", bar)
            )
            step("")
        for name, call, floor, bar in _blocks(peak, seconds):
            step(name, 0)
            best = _best(call, seconds)
            bar = "" if bar is None else f"{bar:.2f}"
            row = (f"{1e3 * best:.3f}", f"{1e3 * floor:.3f}", f"{best / floor:.2f}", bar)
            table.add_row(name, *row)
            step("")
    console.print(table)
    console.print(f"matrix product {peak / 1e9:.0f} GFLOP/s; times are the best of many calls")
    times = f"prefill {_first_call(64):.2f} s, decode {_first_call(1):.2f} s"
    console.print(f"first call of a process with a filled compile cache: {times}")
    return 0


@contextmanager
def _numba_threads(threads):
    """Hold Numba's own threads, which the stream floor runs on, to the number of the kernels."""
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        yield
    finally:
        numba.set_num_threads(before)


def _best(call, seconds):
    """Best time of the calls that fit, after one that compiles and warms the caches."""
    call()
    best, end = np.inf, time.perf_counter() + seconds
    count = 0
    while count < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
        count += 1
    return best


def _peak(seconds):
    """Flops per second of a float32 product of two 2048 x 2048 matrices."""
    # a peak that is too low flatters every row: one disturbed quarter of a second must not set it
    seconds = max(seconds, 2.0)
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((2048, 2048)).astype(np.float32) for _ in range(2))
    c = np.empty_like(a)
    return 2 * 2048**3 / _best(lambda: np.matmul(a, b, out=c), seconds)


@parallel
def _multiply(x, factor):
    for i in prange(x.size):
        x[i] *= factor


@parallel
def _copy(x, out):
    for i in prange(x.size):
        out[i] = x[i]


def _stream(size, seconds):
    x = np.ones(size, np.float32)
    return _best(lambda: _multiply(x, np.float32(1)), seconds)


FIRST_CALL = """
import time
import nbdelta
from nbdelta.testing import make_inputs
inputs = make_inputs(0, 1, {T}, 1, 1, 16, 16, "gda", states=1)
begin = time.perf_counter()
nbdelta.gated_delta_rule(**inputs, output_final_state=True)
print(time.perf_counter() - begin)
"""


def _first_call(T):
    """Seconds of the first call of a process, with the compile cache filled."""
    command = [sys.executable, "-c", FIRST_CALL.format(T=T)]
    runs = (subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(4))
    return min(float(run.stdout) for run in runs)


def _prefill_floor(case, peak):
    return 6 * D * D * HV * case.B * case.T / peak


@functools.cache
def _decode_floor(B, seconds):
    return _stream(B * HV * D * D, 2 * seconds)


def _call(case):
    """Make a call through the public functions, l2norm, initial and final state included."""
    inputs = make_inputs(
        0,
        *(case.B, case.T, case.H, HV, D, D),
        gate=case.gate,
        dtype=case.dtype,
        states=case.B,
        state_dtype=case.state_dtype,
    )
    inputs.update(use_qk_l2norm_in_kernel=True, output_final_state=True)
    if case.T > 1:
        return lambda: nbdelta.chunk_gated_delta_rule(**inputs)
    inputs["inplace_final_state"] = True
    return lambda: nbdelta.fused_recurrent_gated_delta_rule(**inputs)


def _blocks(peak, seconds):
    """Yield name, call, floor and bar of the building blocks."""
    rng = np.random.default_rng(0)
    L = np.tril(rng.standard_normal((256, 64, 64))) / 64 + 2 * np.eye(64)
    L, b = as_dtype(L, "float32"), as_dtype(rng.standard_normal((256, 64, 64)), "float32")
    call = lambda: nbdelta.solve_triangular(L, b)  # noqa: E731
    yield "solve_triangular, 256 of 64 x 64", call, 256 * 64**3 / peak, 2.0
    # 70 % of the stream; a copy reads and writes as many bytes
    x = rng.standard_normal((1, 4096, 32, 64)).astype(np.float32)
    result = np.empty_like(x)
    floor = _best(lambda: _copy(x.reshape(-1), result.reshape(-1)), seconds)
    for axis in (1, -1):
        for reverse in (False, True):
            call = functools.partial(
                nbdelta.chunk_local_cumsum, x, 64, axis=axis, reverse=reverse, out=result
            )
            name = f"chunk_local_cumsum, axis {axis}{', reverse' if reverse else ''}"
            yield name, call, floor, 1 / 0.7
    # no bar: an exponential and a logarithm a number take longer than the stream
    yield "fused_gate, 32 MB", lambda: nbdelta.fused_gate(x), floor, None
