"""What a call needs beside its inputs and results: bounded scratch per thread, nothing large.

Nothing grows with the number of tokens: every thread has the state of one head and some blocks of
16 tokens.
"""

import os
import subprocess
import sys

import numpy as np
import pytest

import nbdelta
from nbdelta.cpu import _team
from nbdelta.cpu._vector_unit import second_cache
from nbdelta.testing import make_inputs

PEAK = """
import sys
import nbdelta
from nbdelta.testing import make_inputs

def call(T):
    H, HV, K, V, gate = {sizes}
    inputs = make_inputs(0, 1, T, H, HV, K, V, gate, states=1)
    return inputs | dict(output_final_state=True, use_qk_l2norm_in_kernel=True)

def status(name):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

nbdelta.{rule}(**call(64))  # compiles and starts the threads
inputs = call({T})
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
before = status("VmRSS")
results = nbdelta.{rule}(**inputs)
print(status("VmHWM") - before, sum(x.nbytes for x in results))
"""


def peak_of(rule, T, *sizes):
    """Return by how much a call raises the memory of a process, and the bytes of its results."""
    code = PEAK.format(rule=rule, T=T, sizes=sizes)
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return map(int, run.stdout.split())


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("rule", "sizes"),
    [
        # T x T would be 4 GB, T x K x K 512 MB, a state per 64 tokens 16 MB a head
        ("chunk_gated_delta_rule", (1, 2, 64, 64, "gda")),
        ("chunk_kda", (2, 2, 64, 64, "kda")),
        ("fused_recurrent_gated_delta_rule", (1, 2, 64, 64, "gda")),
    ],
)
def test_peak_of_a_long_prefill(rule, sizes):
    peak, results = peak_of(rule, 32768, *sizes)
    # the bound is 64 MB for heads of any number and size; these few small ones need much less
    assert peak <= results + (8 << 20)


@pytest.fixture
def scratch(monkeypatch):
    """List that collects the bytes per thread of every call."""
    sizes = []
    run = _team.run

    def recording(kernel, desc, items, scratch_bytes, *args, **kwargs):
        sizes.append(scratch_bytes)
        return run(kernel, desc, items, scratch_bytes, *args, **kwargs)

    for stage in ("chunk", "recurrent", "chunk_cumsum", "solve_tril", "gate"):
        __import__(f"nbdelta.cpu.{stage}")
        monkeypatch.setattr(sys.modules[f"nbdelta.cpu.{stage}"], "run", recording)
    return sizes


@pytest.mark.parametrize("gate", ["gda", "kda"])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("rule", ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"])
def test_scratch_is_that_of_some_heads(scratch, rule, layout, gate):
    K, V, HV = 128, 128, 8
    rule = getattr(nbdelta, rule)
    for T in (100, 400):
        for H in (4, 2):
            inputs = make_inputs(0, 1, T, H, HV, K, V, gate, states=1)
            if layout == "strided":
                inputs = {n: np.repeat(x, 2, axis=-1)[..., ::2] for n, x in inputs.items()}
            rule(**inputs, output_final_state=True)
    short, long = scratch[:2], scratch[2:]
    assert short == long
    # the states of a key head's value heads, or of several key heads where they take no more than
    # two thirds of the second cache, and 16 tokens some times over
    for H, size in zip((4, 2), short, strict=True):
        own, several = 4 * HV // H * V * (K + 64), 2 * second_cache() // 3
        states = own if "recurrent" in rule.__name__ else max(own, min(H * own, several))
        assert size <= states + 4 * (16 * (10 * K + 4 * V) + 4096)


def test_scratch_of_the_building_blocks(scratch):
    x = np.ones((2, 300, 4, 64), np.float32)
    L = np.tile(np.eye(64, dtype=np.float32), (50, 1, 1))
    nbdelta.chunk_local_cumsum(x, 64)
    nbdelta.chunk_local_cumsum(x, 64, axis=-1)
    nbdelta.fused_gate(x)
    nbdelta.solve_tril(x)
    assert max(scratch) <= 64 << 10
    nbdelta.solve_triangular(L, np.ones((50, 64, 500), np.float32))
    # a thread has the columns of x that it solves for, 16 rows of b, and 16 of L twice
    assert scratch[-1] <= 4 * ((64 + 16) * 512 + 2 * 16 * 64 + 64)
