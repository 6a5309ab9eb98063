"""Denormals, and numbers as large and as small as the dtypes go, in all functions on the CPU."""

import numpy as np
import pytest
from cases import DTYPES, GATES

import nbdelta
from nbdelta import naive
from nbdelta.testing import as_dtype, make_inputs

BACKWARD = "chunk_gated_delta_rule_bwd"
RULES = ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule", BACKWARD]
# rounding of the results, and the smallest number, by dtype
ROUNDING = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 4e-3, "float16": 5e-4}
ROUNDING_BACKWARD = {"float32": 2e-4, "float64": 1e-9, "bfloat16": 0.02, "float16": 0.02}
SMALLEST = {"float32": 2.0**-149, "float64": 2.0**-1074, "bfloat16": 2.0**-133, "float16": 2.0**-24}
FACTORS = {
    "denormal": {"float32": 1e-40, "float64": 1e-310, "bfloat16": 1e-39, "float16": 1e-6},
    "tiny": {"float32": 1e-30, "float64": 1e-250, "bfloat16": 1e-30, "float16": 1e-3},
    "huge": {"float32": 1e30, "float64": 1e250, "bfloat16": 1e30, "float16": 1e3},
}
every_factor = pytest.mark.parametrize("size", FACTORS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def sized(x, size, dtype=None):
    return as_dtype(x.astype(float) * FACTORS[size][dtype or x.dtype.name], x.dtype)


def random(shape, dtype, seed=0):
    return as_dtype(np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_close(x, reference, rounding):
    """Compare norms, with room for a few of the smallest numbers of the dtype in every element."""
    x = np.asarray(x)
    unit = 16 * SMALLEST[x.dtype.name]
    largest = max(np.abs(reference).max(), unit)
    # neither the squares of denormals nor those of huge numbers are there
    error = np.linalg.norm((x.astype(float) - reference) / largest)
    allowed = rounding * np.linalg.norm(reference / largest)
    assert error <= allowed + np.sqrt(x.size) * (unit / largest)


# the errors of the rule grow with the square of k and with beta: those cannot be huge
ARGUMENTS = [("v", "initial_state"), ("do", "dht"), ("q",), ("g",), ("k",), ("beta",)]
CASES = [(names, size) for size in FACTORS for names in ARGUMENTS[: 4 if size == "huge" else None]]


@pytest.mark.parametrize(("names", "size"), CASES, ids=lambda x: "".join(x))
@every_dtype
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("rule", RULES)
def test_rules(rule, gate, dtype, names, size):
    call = make_inputs(0, 1, 70, 1, 2, 40, 24, gate, dtype=dtype, states=1)
    call["do"], call["dht"] = random(call["v"].shape, dtype), random((1, 2, 40, 24), dtype)
    for name in names:
        call[name] = sized(call[name], size, dtype)
    if rule == BACKWARD:
        rounding = ROUNDING_BACKWARD[dtype]
        reference = naive.chunk_gated_delta_rule_bwd(**call)
    else:
        del call["do"], call["dht"]
        call["output_final_state"] = True
        rounding = ROUNDING[dtype]
        reference = naive.gated_delta_rule(**call)
    # products of pairs of bfloat16 take denormals for 0
    for x, ref in zip(getattr(nbdelta, rule)(**call, precision="highest"), reference):
        assert_close(x, ref, rounding)


@every_factor
@every_dtype
def test_cumsum(dtype, size):
    x = sized(random((2, 70, 5), dtype), size)
    out = np.empty(x.shape, "float64" if dtype == "float64" else "float32")
    y = nbdelta.chunk_local_cumsum(x, 16, out=out)
    assert_close(y, naive.chunk_local_cumsum(x, 16), ROUNDING[y.dtype.name])


@every_factor
@every_dtype
def test_right_hand_sides(dtype, size):
    L = as_dtype(np.tril(random((30, 30), "float64")) / 8.0 + 2.0 * np.eye(30), dtype)
    b = sized(random((30, 9), dtype), size)
    x = nbdelta.solve_triangular(L, b)
    assert_close(x, naive.solve_triangular(L, b), ROUNDING[dtype])


@pytest.mark.parametrize("size", ["tiny", "huge"])
@every_dtype
def test_matrices(dtype, size):
    """A float32 or float64 has no reciprocal if it is denormal: such diagonals are not tried."""
    L = as_dtype(np.tril(random((30, 30), "float64")) / 8.0 + 2.0 * np.eye(30), dtype)
    L, b = sized(L, size), sized(random((30, 9), dtype), size)
    x = nbdelta.solve_triangular(L, b)
    assert_close(x, naive.solve_triangular(L, b), ROUNDING[dtype])


@pytest.mark.parametrize("size", ["denormal", "tiny"])
@every_dtype
def test_inverses(dtype, size):
    A = sized(random((2, 64, 2, 16), dtype), size)
    identity = np.tile(np.eye(16), 4).T[None, :, None]
    inverse, reference = nbdelta.solve_tril(A).astype(float), naive.solve_tril(A)
    assert_close(as_dtype(inverse - identity, dtype), reference - identity, ROUNDING[dtype])


@every_factor
@every_dtype
def test_gates(dtype, size):
    x = sized(random((2, 19, 6, 10), dtype), size)
    for options in ({}, {"lower_bound": -5.0}):
        g = nbdelta.fused_gate(x, **options)
        assert_close(g, naive.fused_gate(x, **options), ROUNDING[g.dtype.name])
