"""The shapes of the tiles for other machines: run in the instructions of this one, or compiled.

Numba compiles for another processor where its environment says so, when a process begins.
"""

import json
import os
import platform
import re
import subprocess
import sys

import numba
import pytest
from llvmlite import binding

from nbdelta.cpu import _vector_unit
from nbdelta.cpu._matrix_unit import DOTS, SQUARES

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="these are shapes of x86-64"
)
FEATURES = binding.get_host_cpu_features().flatten()
NATIVE = [_vector_unit.BITS, _vector_unit.REGISTERS]
AVX512 = ["f", "bw", "cd", "dq", "vl", "bf16", "vnni", "ifma", "vbmi"]


def python(code, cache=None, **environment):
    """Run code in a new process, and return the JSON that it prints.

    `cache` is the folder of kernels that are compiled for it alone.
    """
    environment = {**os.environ, **environment}
    if cache:
        environment["NUMBA_CACHE_DIR"] = str(cache)
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


ERRORS = """
import json
import numpy as np
import nbdelta
from nbdelta import naive
from nbdelta.cpu import _vector_unit
from nbdelta.testing import as_dtype, make_inputs, rel_l2

errors = {"shape": [_vector_unit.BITS, _vector_unit.REGISTERS]}

def compare(name, result, reference):
    for x, y in zip(result, reference):
        # a NaN stays one
        errors[name] = float(np.max([errors.get(name, 0.0), *np.ravel(rel_l2(x, y))]))

for gate in ("gda", "kda"):
    for sizes in ((2, 37, 2, 4, 32, 48), (1, 20, 1, 2, 20, 7)):
        call = make_inputs(0, *sizes, gate, states=sizes[0])
        call.update(use_qk_l2norm_in_kernel=True, output_final_state=True)
        reference = naive.gated_delta_rule(**call)
        compare("chunk " + gate, nbdelta.chunk_gated_delta_rule(**call), reference)
        compare("recurrent " + gate, nbdelta.fused_recurrent_gated_delta_rule(**call), reference)
rng = np.random.default_rng(0)
x = rng.standard_normal((1, 70, 3, 32)).astype(np.float32)
for axis in (1, 3):
    result = nbdelta.chunk_local_cumsum(x, 16, axis=axis, reverse=axis == 3)
    compare("cumsum", [result], [naive.chunk_local_cumsum(x, 16, axis=axis, reverse=axis == 3)])
compare("gate", [nbdelta.fused_gate(x)], [naive.fused_gate(x)])
compare("solve_tril", [nbdelta.solve_tril(x / 8)], [naive.solve_tril(x / 8)])
half = as_dtype(x, "float16")
compare("float16", [nbdelta.chunk_local_cumsum(half, 16)], [naive.chunk_local_cumsum(half, 16)])
print(json.dumps(errors))
"""


@pytest.mark.parametrize(
    ("name", "features", "shape"),
    [
        pytest.param(
            "haswell",
            "+avx2",
            [256, 16],
            marks=pytest.mark.skipif("+avx2" not in FEATURES, reason="this machine has no AVX2"),
        ),
        # neither fused multiply-adds nor conversions of float16
        ("x86-64", None, [128, 16]),
    ],
)
def test_other_shapes_have_the_same_accuracy(tmp_path, name, features, shape):
    if shape == NATIVE:  # with the kernels of all other tests
        errors = python(ERRORS)
    else:
        kept = FEATURES if features else "+sse,+sse2,+cx8,+fxsr,+mmx,+64bit"
        errors = python(ERRORS, tmp_path, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=kept)
    assert errors.pop("shape") == shape
    assert all(error <= 2e-6 for error in errors.values()), errors


@pytest.mark.parametrize(
    ("name", "features", "shape"),
    [
        ("znver4", "+avx2,+avx512f", (512, 32)),
        (None, "+avx2,+avx512f", (512, 32)),
        ("haswell", "+avx2,+avx512f", (256, 16)),
        ("znver3", "+avx2,-avx512f", (256, 16)),
        ("znver4", "+avx2", (256, 16)),
        ("x86-64", "+avx2,+avx512f", (128, 16)),
        (None, "+sse2,-avx2", (128, 16)),
    ],
)
def test_names_and_features_narrow_the_shape(monkeypatch, name, features, shape):
    monkeypatch.setattr(numba.config, "CPU_NAME", name)
    monkeypatch.setattr(numba.config, "CPU_FEATURES", features)
    assert _vector_unit.vector_unit() == shape


FORCED = """
from nbdelta.cpu import _vector_unit

_vector_unit.BITS, _vector_unit.REGISTERS = {shape}
"""
HALVES = """
from nbdelta.cpu import _matrix_unit, chunk

_matrix_unit.unit_of_halves()
chunk.unit_of_halves = lambda: {unit}
errors = {{}}
for gate in ("gda", "kda"):
    call = make_inputs(0, 1, 37, 1, 2, 20, 40, gate, dtype="bfloat16", states=1)
    exact = dict((n, np.float64(x) if hasattr(x, "shape") else x) for n, x in call.items())
    results = nbdelta.chunk_gated_delta_rule(**call, output_final_state=True)
    reference = naive.gated_delta_rule(**exact, output_final_state=True)
    compare("bfloat16 " + gate, results, reference)
print(json.dumps(errors))
"""


@pytest.mark.parametrize("shape", [(512, 32), (128, 32)], ids=["AVX-512", "NEON"])
def test_forced_shapes_have_the_same_accuracy(tmp_path, shape):
    # LLVM makes of one wide register some narrow ones
    own = None if list(shape) == NATIVE else tmp_path
    errors = python(FORCED.format(shape=shape) + ERRORS, own)
    assert errors.pop("shape") == list(shape)
    assert all(error <= 2e-6 for error in errors.values()), errors


@pytest.mark.parametrize("unit", [DOTS, SQUARES])
def test_products_of_halves_in_the_shape_of_avx512(tmp_path, unit):
    imports, defined = ERRORS.split("for gate", 1)[0], FORCED.format(shape=(512, 32))
    errors = python(defined + imports + HALVES.format(unit=unit), tmp_path)
    assert all(error <= 5e-3 for error in errors.values()), errors


BITS = """
import hashlib, json
import nbdelta
from nbdelta.testing import make_inputs

_vector_unit.side_by_side = lambda: {side}
found = []
for gate, dtype in ("gda", "float32"), ("kda", "float32"), ("gda", "float64"):
    call = make_inputs(0, 1, 45, 1, 2, 40, 72, gate, dtype=dtype, states=1)
    results = nbdelta.chunk_gated_delta_rule(**call, output_final_state=True)
    found += [hashlib.sha256(x.tobytes()).hexdigest() for x in results]
print(json.dumps(found))
"""


def test_strips_side_by_side_have_the_bits_of_one(tmp_path):
    found = []
    for side in (1, 2):
        native = NATIVE == [512, 32] and side == _vector_unit.side_by_side()
        code = FORCED.format(shape=(512, 32)) + BITS.format(side=side)
        found.append(python(code, None if native else tmp_path / str(side)))
    assert found[0] == found[1]


CODE = """
import json
import numpy as np
from nbdelta.cpu import _vector_unit as unit
from nbdelta.cpu import chunk, recurrent, solve_tril

assert (unit.BITS, unit.REGISTERS, unit.DOTS_BFLOAT16) == (512, 32, True)
kernels = {
    "chunk": chunk._chunk_kernel(np.float32, False, 0),
    "chunk of bfloat16": chunk._chunk_kernel(np.float32, True, 1),
    "solve": solve_tril._solve_kernel(np.float32),
    "decode": recurrent._recurrent_kernel(np.float32, False, np.float32, False),
}
print(json.dumps({n: k.compiled._library.get_asm_str() for n, k in kernels.items()}))
"""


def test_avx512_code_fills_the_registers_and_spills_next_to_nothing(tmp_path):
    features = [f for f in FEATURES.split(",") if "avx512" not in f]
    features += [f"+avx512{f}" for f in AVX512]
    texts = python(CODE, tmp_path, NUMBA_CPU_NAME="znver4", NUMBA_CPU_FEATURES=",".join(features))
    # rows of a state come by themselves on such a processor
    assert "prefetcht1" not in texts.pop("decode")
    for name, text in texts.items():
        vectors = len(re.findall("%zmm", text))
        assert vectors > 1000, name
        assert re.search(r"%zmm(1[6-9]|2\d|3[01])\b", text), name
        # to the stack: %rbp holds other addresses too, but none below it
        spills = len(re.findall(r"\svmov\w+\s+%zmm\d+, (\d*\(%rsp\)|-\d+\(%rbp\))", text))
        assert spills <= 0.02 * vectors, name
        products = len(re.findall(r"\svfmadd\w+\s.*%zmm", text))
        assert products > 200, name
    assert "vdpbf16ps" in texts["chunk of bfloat16"]
