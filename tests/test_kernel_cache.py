"""Kernels that several processes left in one cache folder, and how they are loaded from there."""

import os
import pickle
import subprocess
import sys

import pytest
from numba.core.registry import cpu_target
from processes import finish, run, start

from nbdelta.cpu import _jit, _machine_code

ERRORS = """
import sys
import numpy as np
import nbdelta
from nbdelta import naive
from nbdelta.cpu import chunk
from nbdelta.testing import as_dtype, make_inputs, rel_l2

call = make_inputs(0, 1, 40, 1, 2, 32, 32, "gda", dtype="bfloat16")
exact = {name: x.astype(np.float64) for name, x in call.items() if isinstance(x, np.ndarray)}
expected, _ = naive.gated_delta_rule(**exact)
for dots in sys.argv[1:]:
    chunk.unit_of_halves = lambda: int(dots == "dots")
    o, _ = nbdelta.chunk_gated_delta_rule(**call)
    assert rel_l2(o, expected) <= 5e-3, (dots, rel_l2(o, expected))
"""


def test_kernels_of_different_processes_are_not_taken_for_one_another(tmp_path):
    # two forms of one function, each compiled in a process where it came first
    for forms in (["plain"], ["dots"], ["plain", "dots"], ["dots", "plain"]):
        run = subprocess.run(
            [sys.executable, "-c", ERRORS, *forms],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert run.returncode == 0, (forms, run.stderr[-2000:])


BACKWARD = """
import numpy as np
import nbdelta
from numba.core.cpu import CPUContext
from nbdelta.testing import make_inputs

refresh, found = CPUContext.refresh, []
CPUContext.refresh = lambda self: found.append(self) or refresh(self)

for dtype, gate in (("float32", "gda"), ("float64", "kda")):
    # items for two threads
    call = make_inputs(0, 2, 40, 1, 2, 24, 16, gate, dtype=dtype, states=2)
    nbdelta.chunk_gated_delta_rule(**call, checkpoint_interval=16)
    nbdelta.chunk_gated_delta_rule_bwd(**call, do=np.ones_like(call["v"]))
print(bool(found))
"""


def test_kernels_that_no_warmup_loads_need_nothing_of_numba():
    run(BACKWARD, env={"NUMBA_NUM_THREADS": "2"})
    assert run(BACKWARD, env={"NUMBA_NUM_THREADS": "2"}).split() == ["False"]


OURS = """
x = np.arange(96, dtype=np.float32).reshape(1, 48, 2, 1)
def ours():
    assert np.array_equal(nbdelta.chunk_local_cumsum(x, 48), np.cumsum(x, 1))
    assert abs(nbdelta.fused_gate(x[:, :1])[0, 0, 0, 0] + np.log(2)) < 1e-6
"""
# memory, dictionaries and exceptions of Numba's runtime, printing, random numbers, threads
THEIRS = """
@numba.njit(cache=True)
def counts(n):
    found = {0: np.zeros(n)}
    for i in range(n):
        found[i] = np.full(n, float(i))
    return found

@numba.njit
def check(n):
    if n > 3:
        raise ValueError("too many")
    return str(n) + "!"

@numba.njit(parallel=True)
def total(x):
    s = 0.0
    for i in numba.prange(x.size):
        s += np.exp(x[i])
    return s

@numba.cfunc("float64(float64)")
def tangent(x):
    return np.sin(x) / np.cos(x)

def theirs():
    assert sum(a.sum() for a in counts(5).values()) == 50
    assert check(3) == "3!"
    try:
        check(4)
    except ValueError as error:
        assert str(error) == "too many"
    else:
        raise AssertionError
    assert total(np.zeros(100)) == 100
    assert abs(tangent.ctypes(1.0) - np.tan(1.0)) < 1e-12
"""
ORDERS = {
    "ours first": "ours(); theirs(); ours()",
    "theirs first": "theirs(); ours(); theirs()",
    "in threads": """
import threading
calls = [threading.Thread(target=f) for f in (ours, theirs) * 4]
for t in calls: t.start()
for t in calls: t.join()
ours(); theirs()
""",
    "in forks": """
import os
import pickle
def forked(f):
    child = os.fork()
    if not child:
        f()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
# not theirs once they had threads here: OpenMP ends such a process
forked(ours); ours(); forked(theirs); forked(ours); theirs(); forked(ours)
""",
}


@pytest.mark.parametrize("order", ORDERS)
def test_cached_kernels_beside_other_code_of_numba(tmp_path, order):
    if order == "in forks" and not hasattr(os, "fork"):
        pytest.skip("there are no forks on this system")
    # a file: Numba finds the place of its own cache by it
    script = tmp_path / "script.py"
    lines = ["import numba, numpy as np, nbdelta", OURS, THEIRS, "failed = []"]
    lines += ["import threading", "threading.excepthook = failed.append", ORDERS[order]]
    lines += ["assert not failed, failed", "print('works')"]
    script.write_text("\n".join(lines))
    code = f"import runpy\nrunpy.run_path({str(script)!r}, run_name='__main__')\n"
    # the second time with a full cache
    for _ in range(2):
        assert "works" in run(code, cache=tmp_path / "cache")


def test_entries_that_are_damaged_or_of_another_kernel():
    entry = object.__new__(_jit._Entry)
    code = pickle.dumps((b"code", "entry", ["nbdelta_has_no_such_name"]))
    digest = entry._digest(code)
    context = _jit._NotRefreshed(cpu_target.target_context)
    assert entry.rebuild(context, (digest, code)) is None  # for the name alone
    with pytest.raises(ValueError, match="damaged"):
        entry.rebuild(context, (digest, code.replace(b"code", b"cord")))
    entry.key = "another"
    with pytest.raises(ValueError, match="not this kernel"):
        entry.rebuild(context, (digest, code))


def test_code_that_needs_what_is_not_there():
    context = cpu_target.target_context
    assert _machine_code.load(context, b"", "entry", ["exp", "nbdelta_has_no_such_name"]) is None


PACKED = """
import pickle, sys
import numpy as np
from numba import types
from numba.core.ccallback import CFunc
from nbdelta.cpu import _jit, _machine_code

class Keep:
    def load_overload(self, signature, target_context):
        return None

    def save_overload(self, signature, result):
        with open({path!r}, "wb") as file:
            pickle.dump(_machine_code.pack(result), file)

def total(n):
    if n < 0:
        raise ValueError(n)
    return np.arange(n).sum()

compiled = CFunc(total, ((types.int64,), types.int64), {{}}, {{}})
compiled._cache = Keep()
compiled.compile()
"""
LOADED = """
import ctypes, pickle
import llvmlite.binding as llvm
from numba.core.registry import cpu_target
from nbdelta.cpu import _jit, _machine_code

with open({path!r}, "rb") as file:
    packed = pickle.load(file)
names = packed[-1]
assert "NRT_Free" in names and "numba_unpickle" in names, names
assert llvm.address_of_symbol("NRT_Free") is None
result = _machine_code.load(cpu_target.target_context, *packed)
address = result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name)
assert ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(address)(5) == 10
print("works")
"""


def test_code_that_needs_the_runtime_of_numba(tmp_path):
    path = str(tmp_path / "packed")
    finish(start(PACKED.format(path=path)))
    assert "works" in run(LOADED.format(path=path))
