"""Random sizes, dtypes, layouts and options against the reference (``--hypothesis-profile=nightly``
for many more)."""

import itertools

import cases
import numpy as np
import pytest
from cases import (
    DTYPES,
    GATES,
    LAYOUTS,
    OPTIONS,
    arguments,
    assert_matches,
    assert_same_bits,
    cu_seqlens,
    relayout,
    repeat,
    sizes_of_terms,
)
from hypothesis import example, given
from hypothesis import strategies as st

import nbdelta
from nbdelta import naive
from nbdelta.testing import Shape, allowed_error, as_dtype, make_inputs, rel_l2

pytestmark = pytest.mark.usefixtures("device")

RULE_ARRAYS = ("q", "k", "v", "g", "beta", "initial_state")
ROUNDED = {
    "option": "plain",
    "dtype": "bfloat16",
    "rule": "chunk_gated_delta_rule",
    "log_decay": None,
    "beta_max": 1.0,
    "layouts": [None] * 6,
}
SPECIALS = [0.0, -0.0, 1e-40, -1e-310, 1e30, -1e30, np.inf, -np.inf, np.nan]
head_dims = st.one_of(st.integers(1, 40), st.sampled_from([60, 64, 96, 100, 128]))


@st.composite
def shapes(draw, max_tokens=100):
    H = draw(st.integers(1, 3))
    return Shape(
        B=draw(st.integers(1, 3)),
        T=draw(st.one_of(st.integers(1, 20), st.integers(1, max_tokens))),
        H=H,
        HV=H * draw(st.integers(1, 3)),
        K=draw(head_dims),
        V=draw(head_dims),
    )


@given(
    shape=shapes(),
    option=st.sampled_from(OPTIONS),
    gate=st.sampled_from(["gda", "kda"]),
    dtype=st.sampled_from(DTYPES),
    rule=st.sampled_from(["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"]),
    seed=st.integers(0, 1000),
    log_decay=st.sampled_from([None, None, 0.0, "mixed", -316.0]),
    beta_max=st.sampled_from([1.0, 2.0]),
    layouts=st.lists(st.sampled_from([None, *LAYOUTS]), min_size=6, max_size=6),
    repeated=st.lists(st.tuples(st.sampled_from(RULE_ARRAYS), st.integers(0, 2)), max_size=2),
)
# the second token takes away most of what the first one brought, but nothing of its rounding
@example(**ROUNDED, shape=Shape(1, 2, 1, 1, 1, 1), gate="gda", seed=1, repeated=[])
# the only q is nearly orthogonal to the only k
@example(
    **ROUNDED,
    shape=Shape(1, 20, 1, 3, 96, 1),
    gate="kda",
    seed=254,
    repeated=[("q", 1), ("k", 1)],
)
def test_rules(shape, option, gate, dtype, rule, seed, log_decay, beta_max, layouts, repeated):
    call = arguments(option, shape, gate, dtype, seed, log_decay=log_decay, beta_max=beta_max)
    for name, layout in zip(RULE_ARRAYS, layouts, strict=True):
        call[name] = relayout(call.get(name), layout)
    for name, axis in repeated:
        call[name] = repeat(call[name], axis)
    result = getattr(nbdelta, rule)(**call)
    halves = cases.multiplies_halves(dtype) and rule == "chunk_gated_delta_rule"
    sizes = sizes_of_terms(call) if halves else None
    expected = naive.gated_delta_rule(**call)
    assert_matches(result, expected, dtype, hard_gates=True, halves=halves, sizes=sizes)


@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    gate=st.sampled_from(["gda", "kda"]),
    rule=st.sampled_from(
        ["gated_delta_rule", "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"]
    ),
    interval=st.one_of(st.none(), st.integers(1, 80)),
    seed=st.integers(0, 1000),
)
def test_packed_equals_alone(lengths, gate, rule, interval, seed):
    rule = getattr(nbdelta, rule)
    call = make_inputs(seed, 1, sum(lengths), 1, 2, 9, 11, gate, states=len(lengths))
    options = {"output_final_state": True, "checkpoint_interval": interval}
    bounds = cu_seqlens(lengths)
    packed = rule(**call, cu_seqlens=bounds, **options)
    assert_matches(packed, naive.gated_delta_rule(**call, cu_seqlens=bounds, **options), "float32")
    kept = []
    for n, (bos, eos) in enumerate(itertools.pairwise(bounds)):
        one = {name: x[:, bos:eos] for name, x in call.items()}
        one["initial_state"] = call["initial_state"][n : n + 1]
        alone = rule(**one, **options)
        assert_same_bits(alone[0], packed[0][:, bos:eos])
        assert_same_bits(alone[1], packed[1][n : n + 1])
        kept += [] if interval is None else [alone[2]]
    if interval is not None:
        assert_same_bits(np.concatenate(kept), packed[2])


@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    chunk_size=st.integers(1, 70),
    reverse=st.booleans(),
    scale=st.sampled_from([None, 0.3, -2.0, 1e-20]),
    layout=st.sampled_from([None, *LAYOUTS]),
)
def test_cumsum(data, dtype, chunk_size, reverse, scale, layout):
    shape = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=4))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    shape[axis] = data.draw(st.integers(0, 150))
    x = np.random.default_rng(0).standard_normal(shape)
    x = relayout(as_dtype(x, dtype), layout)
    repeated = data.draw(st.sampled_from([None, *range(len(shape))]))
    if repeated is not None:
        x = repeat(x, repeated)
    options = {"axis": axis, "reverse": reverse, "scale": scale}
    if data.draw(st.booleans()):
        inner = data.draw(st.lists(st.integers(0, shape[axis]), max_size=4))
        options["cu_seqlens"] = np.array([0, *sorted(inner), shape[axis]])
    y = nbdelta.chunk_local_cumsum(x, chunk_size, **options)
    reference = naive.chunk_local_cumsum(x, chunk_size, **options)
    size = np.abs(naive.chunk_local_cumsum(np.abs(x), chunk_size, **options))
    # equal numbers are rounded the same way at every step, to float32's 2^-24 each
    equal = repeated is not None and repeated == axis % len(shape)
    allowed = max(1e-6, chunk_size * 2.0**-24) if equal else 1e-6
    assert (np.abs(y - reference) <= allowed * size).all()


@given(
    n=st.integers(1, 90),
    m=st.integers(0, 40),
    batch=st.integers(1, 3),
    unit=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(st.sampled_from([None, *LAYOUTS]), st.sampled_from([None, *LAYOUTS])),
    repeated=st.tuples(st.booleans(), st.sampled_from([None, 0, 1, 2])),
)
def test_solve_triangular(n, m, batch, unit, dtype, layouts, repeated):
    rng = np.random.default_rng(n)
    L = as_dtype(rng.standard_normal((batch, n, n)) / (2.0 * np.sqrt(n)) + np.eye(n), dtype)
    b = as_dtype(rng.standard_normal((batch, n, m)), dtype)
    L, b = relayout(L, layouts[0]), relayout(b, layouts[1])
    if repeated[0]:
        L = repeat(L, 0)
    if repeated[1] is not None:
        b = repeat(b, repeated[1])
    reference = naive.solve_triangular(L, b, unit_diagonal=unit)
    x = nbdelta.solve_triangular(L, b, unit_diagonal=unit)
    assert rel_l2(x, reference, 0) <= allowed_error(reference, dtype, 0)


@given(
    T=st.integers(0, 150),
    BT=st.sampled_from([16, 32, 64]),
    cuts=st.none() | st.lists(st.integers(0, 150), max_size=4),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from([None, *LAYOUTS]),
    repeated=st.sampled_from([None, 0, 1, 2]),
)
def test_solve_tril(T, BT, cuts, dtype, layout, repeated):
    A = np.random.default_rng(T).standard_normal((2 if cuts is None else 1, T, 2, BT)) / 10.0
    A, bounds = relayout(as_dtype(A, dtype), layout), None
    if repeated is not None:
        A = repeat(A, repeated)
    if cuts is not None:
        bounds = np.array([0, *sorted(min(cut, T) for cut in cuts), T])
    reference = naive.solve_tril(A, cu_seqlens=bounds)
    Ai = nbdelta.solve_tril(A, cu_seqlens=bounds)
    assert rel_l2(Ai, reference) <= allowed_error(reference, dtype)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(0, 40), st.integers(1, 5), st.integers(1, 40)),
    gate=st.sampled_from(GATES),
    dtype=st.sampled_from(DTYPES),
    parameters=st.sampled_from(DTYPES),
    bias=st.sampled_from([None, "per-head", "per-channel"]),
    with_A_log=st.booleans(),
    lower_bound=st.sampled_from([None, -5.0, -0.1]),
    layout=st.sampled_from([None, *LAYOUTS]),
    repeated=st.sampled_from([None, 0, 1, 2]),
    step=st.sampled_from([1, 3, -1, 0]),
    specials=st.lists(st.sampled_from(SPECIALS), max_size=6),
    seed=st.integers(0, 1000),
)
def test_fused_gate(
    shape, gate, dtype, parameters, bias, with_A_log, lower_bound, layout, repeated, step, specials,
    seed,
):  # fmt: skip
    """Element by element: the smallest decays count as much as the largest."""
    B, T, HV, K = shape
    rng = np.random.default_rng(seed)

    def parameter(n):
        values = as_dtype(rng.uniform(-1.0, 0.5, max(n * abs(step), 1)), parameters)
        return np.broadcast_to(values, n) if step == 0 else values[::step]

    x = rng.uniform(-8.0, 8.0, (B, T, HV, K)[: 3 if gate == "gda" else 4])
    with np.errstate(over="ignore"):
        x = as_dtype(x, dtype)
        for value in specials if x.size else ():
            x[tuple(rng.integers(x.shape))] = value
    x = relayout(x, layout)
    if repeated is not None:
        x = repeat(x, repeated)
    A_log = parameter(HV) if with_A_log else None
    dt_bias = parameter(HV * K if bias == "per-channel" and gate == "kda" else HV)
    if bias is None:
        dt_bias = None
    g = nbdelta.fused_gate(x, A_log, dt_bias, lower_bound=lower_bound)
    with np.errstate(over="ignore", invalid="ignore"):
        reference = naive.fused_gate(x, A_log, dt_bias, lower_bound=lower_bound).astype(g.dtype)
    exact = dtype == "float64"
    # float32 has few bits for decays below 2^-126
    np.testing.assert_allclose(g, reference, rtol=1e-13 if exact else 4e-6, atol=1e-37)
