"""Random sizes, dtypes, layouts and options against the reference (``--hypothesis-profile=nightly``
for many more)."""

import itertools

import numpy as np
import pytest
from cases import (
    DTYPES,
    LAYOUTS,
    OPTIONS,
    arguments,
    assert_matches,
    assert_same_bits,
    cu_seqlens,
    relayout,
)
from hypothesis import given
from hypothesis import strategies as st

import nbdelta
from nbdelta import naive
from nbdelta.testing import Shape, allowed_error, as_dtype, make_inputs, rel_l2

pytestmark = pytest.mark.usefixtures("device")

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
    layouts=st.lists(st.sampled_from([None, *LAYOUTS]), min_size=5, max_size=5),
)
def test_rules(shape, option, gate, dtype, rule, seed, log_decay, beta_max, layouts):
    call = arguments(option, shape, gate, dtype, seed, log_decay=log_decay, beta_max=beta_max)
    for name, layout in zip(("q", "k", "v", "g", "beta"), layouts, strict=True):
        call[name] = relayout(call[name], layout)
    result = getattr(nbdelta, rule)(**call)
    assert_matches(result, naive.gated_delta_rule(**call), dtype, hard_gates=True)


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
    layout=st.sampled_from(LAYOUTS),
)
def test_cumsum(data, dtype, chunk_size, reverse, layout):
    shape = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=4))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    shape[axis] = data.draw(st.integers(0, 150))
    x = np.random.default_rng(0).standard_normal(shape)
    x = as_dtype(x, dtype)
    options = {"axis": axis, "reverse": reverse}
    y = nbdelta.chunk_local_cumsum(relayout(x, layout), chunk_size, **options)
    reference = naive.chunk_local_cumsum(x, chunk_size, **options)
    size = naive.chunk_local_cumsum(np.abs(x), chunk_size, **options)
    assert (np.abs(y - reference) <= 1e-6 * size).all()


@given(
    n=st.integers(1, 90),
    m=st.integers(0, 40),
    batch=st.integers(1, 3),
    unit=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
)
def test_solve_triangular(n, m, batch, unit, dtype, layouts):
    rng = np.random.default_rng(n)
    L = as_dtype(rng.standard_normal((batch, n, n)) / (2.0 * np.sqrt(n)) + np.eye(n), dtype)
    b = as_dtype(rng.standard_normal((batch, n, m)), dtype)
    reference = naive.solve_triangular(L, b, unit_diagonal=unit)
    x = nbdelta.solve_triangular(
        relayout(L, layouts[0]), relayout(b, layouts[1]), unit_diagonal=unit
    )
    assert rel_l2(x, reference, 0) <= allowed_error(reference, dtype, 0)


@given(
    T=st.integers(0, 150),
    BT=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_solve_tril(T, BT, dtype, layout):
    A = np.random.default_rng(T).standard_normal((2, T, 2, BT)) / 10.0
    A = as_dtype(A, dtype)
    reference = naive.solve_tril(A)
    Ai = nbdelta.solve_tril(relayout(A, layout))
    assert rel_l2(Ai, reference) <= allowed_error(reference, dtype)
