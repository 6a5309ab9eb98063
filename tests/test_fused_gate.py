import numpy as np
import pytest
from cases import DTYPES, LAYOUTS, assert_same_bits, relayout

import nbdelta
from nbdelta import naive
from nbdelta.testing import as_dtype

pytestmark = pytest.mark.usefixtures("device")
SHAPES = {"gda": (2, 19, 6), "kda": (2, 19, 6, 10)}


def raw(gate, dtype="float32", seed=0):
    return as_dtype(4.0 * np.random.default_rng(seed).standard_normal(SHAPES[gate]), dtype)


def parameters(gate, bias, seed=1):
    rng = np.random.default_rng(seed)
    A_log = rng.standard_normal(6).astype(np.float32)
    sizes = {"none": None, "per-head": (6,), "per-channel": (60,), "per-channel-2d": (6, 10)}
    shape = sizes[bias]
    return A_log, None if shape is None else rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize(
    ("gate", "bias"),
    [
        ("gda", "none"),
        ("gda", "per-head"),
        ("kda", "none"),
        ("kda", "per-head"),
        ("kda", "per-channel"),
        ("kda", "per-channel-2d"),
    ],
)
@pytest.mark.parametrize("with_A_log", [False, True])
def test_against_naive(gate, bias, with_A_log, lower_bound):
    x = raw(gate)
    A_log, dt_bias = parameters(gate, bias)
    A_log = A_log if with_A_log else None
    g = nbdelta.fused_gate(x, A_log, dt_bias, lower_bound=lower_bound)
    assert g.dtype == np.float32 and g.shape == x.shape
    reference = naive.fused_gate(x, A_log, dt_bias, lower_bound=lower_bound)
    # element by element: the smallest decays count as much as the largest
    np.testing.assert_allclose(g, reference, rtol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_dtypes(dtype, lower_bound):
    x = raw("kda", dtype)
    A_log, dt_bias = parameters("kda", "per-channel")
    g = nbdelta.fused_gate(x, A_log, dt_bias, lower_bound=lower_bound)
    assert g.dtype == (np.float64 if dtype == "float64" else np.float32)
    reference = naive.fused_gate(x, A_log, dt_bias, lower_bound=lower_bound)
    np.testing.assert_allclose(g, reference, rtol=1e-13 if dtype == "float64" else 4e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameter_dtypes(dtype):
    A_log, dt_bias = (as_dtype(x, dtype) for x in parameters("gda", "per-head"))
    g = nbdelta.fused_gate(raw("gda"), A_log, dt_bias)
    np.testing.assert_allclose(g, naive.fused_gate(raw("gda"), A_log, dt_bias), rtol=4e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tails(dtype):
    # softplus(x) is e^x far below zero and x far above, neither 0 nor inf
    x = np.array([-np.inf, -100.0, -80.0, -30.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 50.0, 1e3, 1e30])
    x = x.astype(dtype).reshape(1, -1, 1)
    g = nbdelta.fused_gate(x)
    reference = naive.fused_gate(x)
    normal = np.abs(reference) > 1e-37
    np.testing.assert_allclose(g[normal], reference[normal], rtol=4e-6)
    np.testing.assert_allclose(g[~normal], reference[~normal], atol=1e-37)
    bounded = nbdelta.fused_gate(x, lower_bound=-5.0)
    reference = naive.fused_gate(x, lower_bound=-5.0)
    np.testing.assert_allclose(bounded, reference, rtol=4e-6, atol=1e-37)


def test_bad_numbers_stay_where_they_are():
    x = raw("kda")
    clean = nbdelta.fused_gate(x)
    x[1, 3, 2, 7] = np.nan
    x[0, 4, 1, 2] = np.inf
    g = nbdelta.fused_gate(x)
    assert np.isnan(g[1, 3, 2, 7]) and g[0, 4, 1, 2] == -np.inf
    same = np.isfinite(x)
    assert_same_bits(g[same], clean[same])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", ["gda", "kda"])
def test_layouts(gate, layout):
    x = raw(gate)
    A_log, dt_bias = parameters(gate, "per-head")
    before = x.copy()
    expected = nbdelta.fused_gate(x, A_log, dt_bias)
    strided = np.repeat(A_log, 2)[::2], np.repeat(dt_bias, 3)[::3]
    assert_same_bits(nbdelta.fused_gate(relayout(x, layout), *strided), expected)
    assert_same_bits(x, before)


@pytest.mark.parametrize("rule", ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"])
@pytest.mark.parametrize("gate", ["gda", "kda"])
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_is_the_gate_of_the_rule(rule, gate, lower_bound):
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((2, 2, 19, 3, 10)).astype(np.float32)
    v = rng.standard_normal((2, 19, 6, 8)).astype(np.float32)
    A_log, dt_bias = parameters(gate, "per-head")
    rule = getattr(nbdelta, rule)
    options = {"use_qk_l2norm_in_kernel": True}
    g = nbdelta.fused_gate(raw(gate), A_log, dt_bias, lower_bound=lower_bound)
    apart = rule(q, k, v, g, None, **options)[0]
    inside = rule(
        q,
        k,
        v,
        raw(gate),
        None,
        use_gate_in_kernel=True,
        A_log=A_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        **options,
    )[0]
    np.testing.assert_allclose(inside, apart, rtol=0, atol=1e-6 * np.abs(apart).max())
