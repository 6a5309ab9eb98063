"""Denormals, and numbers as large and as small as the dtypes go, in all functions on the CPU.

Results below the smallest normal number are 0, so that is the unit of what an error may be.
"""

import platform

import numpy as np
import pytest
from cases import DTYPES, GATES

import nbdelta
from nbdelta import naive
from nbdelta.testing import as_dtype, make_inputs

BACKWARD = "chunk_gated_delta_rule_bwd"
RULES = ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule", BACKWARD]
# rounding of the results, and the number that is small enough to be taken for 0, by dtype; float16
# is computed in float32, and its denormals are rounded to
ROUNDING = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 4e-3, "float16": 5e-4}
ROUNDING_BACKWARD = {"float32": 2e-4, "float64": 1e-9, "bfloat16": 0.02, "float16": 0.02}
SMALLEST = {"float32": 2.0**-126, "float64": 2.0**-1022, "bfloat16": 2.0**-126, "float16": 2.0**-24}
# such units an element may be off: what is flushed on the way to it adds up
UNITS, UNITS_BACKWARD = 2, 16
FLUSHES = platform.machine() in ("x86_64", "AMD64")
FACTORS = {
    "denormal": {"float32": 1e-40, "float64": 1e-310, "bfloat16": 1e-39, "float16": 1e-6},
    "smallest": {"float32": 1e-36, "float64": 1e-306, "bfloat16": 1e-36, "float16": 1e-5},
    "tiny": {"float32": 1e-30, "float64": 1e-250, "bfloat16": 1e-30, "float16": 1e-3},
    "huge": {"float32": 1e30, "float64": 1e250, "bfloat16": 1e30, "float16": 1e3},
}
every_factor = pytest.mark.parametrize("size", FACTORS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def sized(x, size, dtype=None):
    return as_dtype(x.astype(float) * FACTORS[size][dtype or x.dtype.name], x.dtype)


def random(shape, dtype, seed=0):
    return as_dtype(np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_close(x, reference, rounding, units=UNITS):
    """Compare norms, with room for a few of the smallest numbers of the dtype in every element."""
    x = np.asarray(x)
    unit = units * SMALLEST[x.dtype.name]
    largest = max(np.abs(reference).max(), unit)
    # neither the squares of denormals nor those of huge numbers are there
    error = np.linalg.norm((x.astype(float) - reference) / largest)
    allowed = rounding * np.linalg.norm(reference / largest)
    assert error <= allowed + np.sqrt(x.size) * (unit / largest)


def assert_no_denormals(x):
    """Nothing but 0 is smaller than the smallest normal number."""
    x = np.asarray(x)
    if FLUSHES and x.dtype != np.float16:
        sizes = np.abs(x.astype(float))
        assert (sizes[sizes < SMALLEST[x.dtype.name]] == 0.0).all()


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
        rounding, units = ROUNDING_BACKWARD[dtype], UNITS_BACKWARD
        reference = naive.chunk_gated_delta_rule_bwd(**call)
    else:
        del call["do"], call["dht"]
        call["output_final_state"] = True
        rounding, units = ROUNDING[dtype], UNITS
        reference = naive.gated_delta_rule(**call)
    # products of pairs of bfloat16 take denormal inputs for 0
    for x, ref in zip(getattr(nbdelta, rule)(**call, precision="highest"), reference):
        assert_close(x, ref, rounding, units)
        assert_no_denormals(x)


@pytest.mark.parametrize("decay", [-0.3, -1.0, -5.0, -30.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("rule", RULES[:2])
def test_states_decay_to_zero_and_stay(rule, gate, dtype, decay):
    """A state that nothing is written to is right to the last normal number, and 0 from then on."""
    # down to e^-960, where float64 ends at e^-708
    T = 3200 if decay == -0.3 else 960
    call = make_inputs(0, 1, T, 1, 2, 24, 24, gate, dtype=dtype, log_decay=decay, states=1)
    call["beta"][:] = 0.0
    options = {"output_final_state": True, "checkpoint_interval": 16}
    _, final, states = getattr(nbdelta, rule)(**call, **options)
    before, smallest = call["initial_state"].astype(float), SMALLEST[dtype]
    for i, state in enumerate(states):
        # the errors of the decays add up
        exact = before * np.exp(16 * (i + 1) * float(call["g"].flat[0]))
        error = (i + 1) * (3e-6 if dtype == "float32" else 1e-14)
        normal = np.abs(exact) > (1 + error) * smallest
        np.testing.assert_allclose(state[normal[0]], exact[normal], rtol=error)
        if FLUSHES:
            assert (state[np.abs(exact[0]) < (1 - error) * smallest] == 0.0).all()
    assert (final == 0.0).all()


@pytest.mark.parametrize("low", [-1.0, -10.0, -30.0])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("rule", RULES)
def test_strong_gates(rule, gate, dtype, low):
    """Gates whose products pass through the range where denormals would be."""
    call = make_inputs(0, 1, 200, 1, 2, 40, 24, gate, dtype=dtype, states=1)
    call["g"] = np.random.default_rng(1).uniform(low, 0.0, call["g"].shape).astype(call["g"].dtype)
    # a state that is written to at the start alone is seen while it goes, and no sum cancels
    call["beta"][:, 20:] = 0.0
    call["q"], call["k"] = np.abs(call["q"]), np.abs(call["k"])
    if rule == BACKWARD:
        call["do"], call["dht"] = random(call["v"].shape, dtype), random((1, 2, 40, 24), dtype)
        rounding, units = ROUNDING_BACKWARD[dtype], UNITS_BACKWARD
        reference = naive.chunk_gated_delta_rule_bwd(**call)
    else:
        call["output_final_state"] = True
        rounding, units = ROUNDING[dtype], UNITS
        reference = naive.gated_delta_rule(**call)
    for x, ref in zip(getattr(nbdelta, rule)(**call, precision="highest"), reference):
        assert_no_denormals(x)
        # token by token, as the first ones are large and the last ones small
        for here, expected in zip(x[0], ref[0]) if ref.shape[1] == 200 else [(x, ref)]:
            assert_close(here, expected, rounding, units)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("rule", RULES[:2])
def test_denormal_inputs_are_not_taken_for_zero(rule, gate):
    """What makes a normal number of them is the first that happens to them here."""
    q = np.full((1, 20, 1, 8), 2.0**-130, np.float32)
    call = make_inputs(0, 1, 20, 1, 1, 8, 8, gate, states=1)
    call.update(q=q, use_qk_l2norm_in_kernel=True, scale=1.0)
    o, _ = getattr(nbdelta, rule)(**call)
    reference, _ = naive.gated_delta_rule(**call)
    assert_close(o, reference, ROUNDING["float32"])
    assert np.abs(reference).max() > 2.0**-121


@pytest.mark.parametrize(("dtype", "b"), [("float32", 2.0**-140), ("float64", 2.0**-1060)])
def test_denormal_right_hand_sides_are_not_taken_for_zero(dtype, b):
    L, b = 2.0**-60 * np.eye(20, dtype=dtype), np.full((20, 3), b, dtype)
    assert (nbdelta.solve_triangular(L, b) == b * 2.0**60).all()


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
    """A float32 or float64 has no reciprocal if that or itself is denormal: those are not tried."""
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
