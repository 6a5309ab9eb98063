"""What a new process pays: the import, how many compilations, and none once they are cached."""

import json
import os
import subprocess
import sys

import pytest

from nbdelta.cpu import chunk

# counts what Numba makes machine code of; helpers are only lowered, and Numba has functions of its
# own, so that the names tell
COUNTING = """
import collections, json
import numpy as np
from numba.core import event

class Compilations(event.Listener):
    names = collections.Counter()

    def on_start(self, event):
        if event.data["name"].startswith("native_lowering "):
            self.names[event.data["qualname"].split(".")[-1]] += 1

    def on_end(self, event):
        pass

event.register("numba:run_pass", Compilations())
"""
REPORT = "print(json.dumps(Compilations.names))"


def python(code, **environment):
    """Run code in a new process, and return the last line that it prints."""
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", code]
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()[-1]


def test_import():
    code = """
import sys, time
begin = time.process_time()
import nbdelta
print(time.process_time() - begin)
heavy = {"torch", "cupy", "numba.cuda", "transformers", "rich"} & set(sys.modules)
assert not heavy, heavy
"""
    assert min(float(python(code)) for _ in range(3)) < 1.0


CALLS = """
import sys
import nbdelta
from nbdelta.testing import make_inputs

sys.path.insert(0, {tests!r})
from cases import LAYOUTS, relayout

def inputs(dtype, T):
    return make_inputs(0, 2, T, 2, 4, 20, 24, {gate!r}, dtype=dtype, states=2)

for dtype in ("float32", "bfloat16", "float16"):
    for layout in (None, *LAYOUTS):
        call = {{n: relayout(x, layout) for n, x in inputs(dtype, {T}).items()}}
        for more in ({{}}, {{"scale": 0.5, "use_qk_l2norm_in_kernel": True}}):
            nbdelta.{rule}(**call, **more)
"""


@pytest.mark.parametrize(
    ("rule", "gate", "T"),
    [("chunk_gated_delta_rule", "gda", 70), ("fused_recurrent_kda", "kda", 1)],
)
def test_one_compilation_for_all_layouts_and_dtypes(tmp_path, rule, gate, T):
    code = COUNTING + CALLS.format(tests=os.path.dirname(__file__), rule=rule, gate=gate, T=T)
    names = json.loads(python(code + REPORT, NUMBA_CACHE_DIR=str(tmp_path)))
    kernels = {name: n for name, n in names.items() if name.endswith("_kernel")}
    stage = "chunk" if rule.startswith("chunk") else "recurrent"
    # products of bfloat16 pairs are a kernel of their own
    expected = 2 if stage == "chunk" and chunk.multiplies_halves("bfloat16") else 1
    assert kernels == {f"{stage}_kernel": expected}


BLOCKS = """
import nbdelta

rng = np.random.default_rng(0)
x = rng.standard_normal((2, 70, 3, 16)).astype(np.float32)
for dtype in (np.float32, np.float16):
    for y in (x, x[:, ::2], x[..., ::-1], np.asfortranarray(x)):
        y = y.astype(dtype, order="K")
        y.flags.writeable = False
        for axis in range(4):
            nbdelta.chunk_local_cumsum(y, 8, axis=axis)
        nbdelta.fused_gate(y)
        nbdelta.fused_gate(y[..., 0], lower_bound=-1.0)
        nbdelta.solve_tril(y / 16)
        nbdelta.solve_triangular(y[..., :3, :3], y[..., :3, :], unit_diagonal=True)
"""


def test_one_compilation_of_each_building_block(tmp_path):
    names = json.loads(python(COUNTING + BLOCKS + REPORT, NUMBA_CACHE_DIR=str(tmp_path)))
    kernels = {name: n for name, n in names.items() if name.endswith("_kernel")}
    assert kernels == {"cumsum_kernel": 1, "gate_kernel": 1, "solve_kernel": 1}


# what the cache holds is loaded without all that Numba could compile; a kernel that needed its
# runtime would bring it in
LOADING = """
from numba.core.cpu import CPUContext

def refused(self):
    raise AssertionError("all of Numba, for kernels that are there")

CPUContext.refresh = refused
"""

OPTIONS = """
import sys
import nbdelta
from nbdelta.cpu import _jit

def left_out(kernel):
    raise AssertionError("a kernel that the warm-up did not load")

_jit.CFunc.compile = left_out
sys.path.insert(0, {tests!r})
from cases import DTYPES, GATES, OPTIONS, arguments

for dtype in DTYPES:
    for gate in GATES:
        for option in OPTIONS:
            call = arguments(option, (2, 40, 2, 4, 24, 20), gate, dtype)
            nbdelta.chunk_gated_delta_rule(**call)
            nbdelta.fused_recurrent_gated_delta_rule(**call)
"""


def test_warmup_compiles_all_and_only_once():
    """After a first warm-up, neither a second one nor other calls compile anything."""
    pytest.importorskip("rich")
    python(COUNTING + "from nbdelta import warmup\nwarmup.warmup()\n" + REPORT)
    code = "from nbdelta import warmup\nwarmup.warmup()\n" + OPTIONS
    code = COUNTING + LOADING + code.format(tests=os.path.dirname(__file__)) + REPORT
    names = json.loads(python(code))
    assert names == {}
