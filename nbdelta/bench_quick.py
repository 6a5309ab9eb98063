"""``python -m nbdelta bench --quick``: times over what this machine could do at best, and bars.

The floor of a prefill is its three state products, ``6 K V`` flops for each token and value head,
at the speed of NumPy's matrix product; that of a decode step is an in-place multiply of an array as
large as the states, that of a cumulative sum a copy. Kernel and floor take turns, on as many
threads.
"""

import functools
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np

import nbdelta
from nbdelta import bench_clock as clock
from nbdelta import console as out
from nbdelta.cpu._team import thread_count
from nbdelta.shapes import LAYERS
from nbdelta.testing import as_dtype, make_inputs

SECONDS = 1.5
ROWS = 4096  # of 8 KB, of what is summed
MODELS = {"GDA": "qwen3-next", "KDA": "kimi-linear"}


class Row(NamedTuple):
    """What is timed, its floor in calls of another function, and the largest time over it."""

    name: str
    call: Callable
    floor: Callable
    factor: float
    bar: float | None


def quick():
    """Print the table; returns 0: a machine that is busy with other work is no error."""
    console = out.console("bench")
    threads = thread_count()
    rows = _rows(threads)
    peaks = []
    table = out.table(
        f"time over the machine's own limit, {threads} thread{'s' if threads > 1 else ''}",
        *("case", ">ms", ">floor ms", ">time / floor", ">bar"),
    )
    with clock.limited_to(threads, "bench"), out.progress(console, len(rows)) as step:
        for make in rows:
            row = make()
            step(row.name, 0)
            times = clock.race({"call": row.call, "floor": row.floor}, SECONDS)
            best, floor = times["call"].min, row.factor * times["floor"].min
            if isinstance(row.floor, clock.MatrixProduct):
                peaks.append(row.floor.flops / times["floor"].min / 1e9)
            bar = "" if row.bar is None else f"{row.bar:.2f}"
            table.add_row(
                *(row.name, f"{1e3 * best:.3f}", f"{1e3 * floor:.3f}", f"{best / floor:.2f}", bar)
            )
            step("")
    console.print(table)
    console.print(
        f"matrix product {min(peaks):.0f} to {max(peaks):.0f} GFLOP/s in the rows that it is the "
        "floor of; times are the best of many calls"
    )
    first = f"prefill {_first_call(64):.2f} s, decode {_first_call(1):.2f} s"
    console.print(f"first call of a process with a filled compile cache: {first}")
    return 0


def _rows(threads):
    """Makers of rows; a bar of one thread or two is taken for more than two as well."""
    gda = (1.25, 1.12, 1.12) if threads == 1 else (1.25, 1.08, 1.08)
    kda = (None, None, None) if threads == 1 else (1.38, 1.2, 1.2)
    if numba.config.CPU_NAME == "haswell":
        gda = (None, 1.4, None)
    decode = {"GDA": (2.3, 1.35, 1.15), "KDA": (2.3, 1.4, 1.25)}
    make = functools.partial
    backward = [make(_backward, "GDA", 2048, 3.2), make(_backward, "KDA", 512, None)]
    return [
        *(make(_prefill, "GDA", T, bar) for T, bar in zip((64, 512, 2048), gda, strict=True)),
        *(make(_prefill, "KDA", T, bar) for T, bar in zip((64, 512, 2048), kda, strict=True)),
        make(_prefill, "GDA", 2048, 0.64, "bfloat16"),
        make(_prefill, "KDA", 2048, 0.80, "bfloat16"),
        *(
            make(_decode, gate, B, bar if threads > 1 else None)
            for gate, bars in decode.items()
            for B, bar in zip((1, 16, 64), bars, strict=True)
        ),
        make(_decode, "GDA", 64, 0.65, "bfloat16"),
        *(backward if importlib.util.find_spec("torch") else []),
        make(_solve_triangular, 2.0),
        *(make(_cumsum, axis, reverse) for axis in (1, -1) for reverse in (False, True)),
        _fused_gate,
    ]


def _inputs(shape, **options):
    """Arguments of a call, l2norm, initial and final state included."""
    inputs = make_inputs(0, *shape[1:], gate=shape.gate, states=shape.B, **options)
    return {**inputs, "use_qk_l2norm_in_kernel": True}


def _prefill(gate, T, bar, dtype="float32"):
    shape, product = LAYERS[MODELS[gate]].shape(1, T), clock.MatrixProduct()
    inputs = _inputs(shape, dtype=dtype)
    name = f"prefill {gate}, T = {T}" + (f", {dtype}" if dtype != "float32" else "")
    call = functools.partial(nbdelta.chunk_gated_delta_rule, **inputs, output_final_state=True)
    return Row(name, call, product, shape.flops / product.flops, bar)


def _decode(gate, B, bar, dtype="float32"):
    shape = LAYERS[MODELS[gate]].shape(B, 1)
    inputs = _inputs(shape, dtype=dtype, state_dtype=dtype)
    name = f"decode {gate}, B = {B}" + (f", {dtype} state" if dtype != "float32" else "")
    # without `partial`: what Python adds to the kernel is a part of this time
    call = lambda: nbdelta.fused_recurrent_gated_delta_rule(**inputs, inplace_final_state=True)  # noqa: E731
    return Row(name, call, clock.Multiply(shape.state_size), 1, bar)


def _backward(gate, T, bar):
    """Forward and backward through torch, over the forward alone."""
    torch = importlib.import_module("torch")
    inputs = _inputs(LAYERS[MODELS[gate]].shape(1, T))
    del inputs["use_qk_l2norm_in_kernel"]
    tensors = {name: torch.from_numpy(x) for name, x in inputs.items()}
    trained = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    do = tensors["v"].flip(1)

    def forward(tensors=tensors):
        return nbdelta.chunk_gated_delta_rule(**tensors, use_qk_l2norm_in_kernel=True)[0]

    def both():
        torch.autograd.grad(forward(trained), list(trained.values()), do)

    return Row(f"forward + backward {gate}, T = {T}, over the forward", both, forward, 1, bar)


def _solve_triangular(bar):
    rng, product = np.random.default_rng(0), clock.MatrixProduct()
    L = np.tril(rng.standard_normal((256, 64, 64))) / 64 + 2 * np.eye(64)
    L, b = as_dtype(L, "float32"), as_dtype(rng.standard_normal((256, 64, 64)), "float32")
    call = functools.partial(nbdelta.solve_triangular, L, b)
    factor = 256 * 64**3 / product.flops
    return Row("solve_triangular, 256 of 64 x 64", call, product, factor, bar)


def _stream():
    x = np.random.default_rng(0).random((1, ROWS, 32, 64), np.float32)
    return x, clock.Copy(x)


def _cumsum(axis, reverse):
    x, copy = _stream()
    call = functools.partial(
        nbdelta.chunk_local_cumsum, x, 64, axis=axis, reverse=reverse, out=np.empty_like(x)
    )
    name = f"chunk_local_cumsum, axis {axis}{', reverse' if reverse else ''}"
    # 70 % of the stream; a copy reads and writes as many bytes
    return Row(name, call, copy, 1, 1 / 0.7)


def _fused_gate():
    # no bar: an exponential and a logarithm a number take longer than the stream
    x, copy = _stream()
    return Row("fused_gate", functools.partial(nbdelta.fused_gate, x), copy, 1, None)


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
