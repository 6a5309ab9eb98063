"""Cases in a process of their own: to start one, and code that several tests run there."""

import os
import subprocess
import sys
import textwrap

ALL_FUNCTIONS = """
import hashlib, sys, threading
import numpy as np
import torch
import nbdelta
from nbdelta.testing import make_inputs

def calls():
    gda = make_inputs(1, 2, 70, 2, 4, 32, 48, "gda")
    kda = make_inputs(2, 2, 33, 1, 2, 40, 24, "kda")
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 70, 3)).astype(np.float32)
    A = rng.standard_normal((1, 32, 2, 16)).astype(np.float32) * 0.1
    L = np.tril(rng.standard_normal((3, 20, 20))).astype(np.float32) + 5 * np.eye(20, dtype="f4")
    b = rng.standard_normal((3, 20, 7)).astype(np.float32)
    do = np.ones_like(kda["v"])
    def autograd():
        leaves = {n: torch.from_numpy(x).requires_grad_() for n, x in kda.items()}
        nbdelta.gated_delta_rule(**leaves)[0].sum().backward()
        return tuple(x.grad.numpy() for x in leaves.values())
    return [
        lambda: nbdelta.chunk_gated_delta_rule(**gda),
        lambda: nbdelta.fused_recurrent_gated_delta_rule(**gda),
        lambda: nbdelta.chunk_kda(**kda),
        lambda: nbdelta.fused_recurrent_kda(**kda),
        lambda: nbdelta.gated_delta_rule(**kda),
        lambda: nbdelta.chunk_gated_delta_rule_bwd(**kda, do=do),
        autograd,
        lambda: nbdelta.chunk_local_cumsum(x, 16),
        lambda: nbdelta.solve_tril(A),
        lambda: nbdelta.solve_triangular(L, b),
        lambda: nbdelta.fused_gate(x),
    ]

def bits(result):
    results = result if isinstance(result, tuple) else (result,)
    return hashlib.sha256(b"".join(x.tobytes() for x in results if x is not None)).hexdigest()
"""

DECODE = """
import numpy as np, nbdelta
q = np.ones((1, 1, 2, 16), np.float32)
o, _ = nbdelta.fused_recurrent_gated_delta_rule(q, q, q, -q[..., 0], q[..., 0])
assert abs(float(o[0, 0, 0, 0]) - 4.0) < 1e-5, o
print("works")
"""


def start(code, *, env=None, cache=None, before=(), **options):
    """Start a new Python on some code.

    `env`: what its environment has besides, or with None has not; `cache`: the folder of its
    compiled kernels; `before`: the command that starts it.
    """
    environment = {**os.environ, **(env or {}), "PYTEST_XDIST_WORKER": None}
    if cache is not None:
        environment["NUMBA_CACHE_DIR"] = str(cache)
    environment = {name: value for name, value in environment.items() if value is not None}
    # newer Pythons warn of any fork in a process with threads
    python = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(code)]
    command = [*before, *python]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, stdout=pipe, stderr=pipe, text=True, **options
    )


def finish(process, timeout=240):
    """Wait for a Python, and return what it printed, and its warnings."""
    try:
        out, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]
    return out, errors


def run(code, **options):
    return finish(start(code, **options))[0]
