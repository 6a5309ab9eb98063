"""The reference itself: numbers worked out by hand, and its two forms against each other."""

import numpy as np
import pytest
from cases import GATES, OPTIONS, arguments

from nbdelta import naive
from nbdelta.testing import Shape, make_inputs, rel_l2


def tiny(g):
    """Two tokens, K = 2, V = 1, numbers that a person can follow."""
    return {
        "q": np.array([[1.0, 1.0], [2.0, 1.0]]).reshape(1, 2, 1, 2),
        "k": np.array([[1.0, 0.0], [0.5, 1.0]]).reshape(1, 2, 1, 2),
        "v": np.array([2.0, 3.0]).reshape(1, 2, 1, 1),
        "g": g,
        "beta": np.array([0.5, 1.0]).reshape(1, 2, 1),
        "scale": 1.0,
        "output_final_state": True,
    }


@pytest.mark.parametrize("form", ["chunk", "fused_recurrent"])
def test_by_hand_gda(form):
    rule = getattr(naive, f"{form}_gated_delta_rule")
    call = tiny(np.log([0.25, 0.5]).reshape(1, 2, 1))
    call["initial_state"] = np.array([4.0, 8.0]).reshape(1, 1, 2, 1)
    # token 1: S = [1, 2], d = .5 (2 - 1) = .5, S = [1.5, 2], o = 3.5
    # token 2: S = [.75, 1], d = 3 - 1.375 = 1.625, S = [1.5625, 2.625], o = 5.75
    o, state = rule(**call)
    np.testing.assert_allclose(o.ravel(), [3.5, 5.75], rtol=1e-14)
    np.testing.assert_allclose(state.ravel(), [1.5625, 2.625], rtol=1e-14)


@pytest.mark.parametrize("form", ["chunk", "fused_recurrent"])
def test_by_hand_kda(form):
    rule = getattr(naive, f"{form}_kda")
    call = tiny(np.log([[0.25, 0.5], [0.5, 1.0]]).reshape(1, 2, 1, 2))
    call["initial_state"] = np.array([4.0, 8.0]).reshape(1, 1, 2, 1)
    # token 1: S = [1, 4], d = .5, S = [1.5, 4], o = 5.5
    # token 2: S = [.75, 4], d = 3 - 4.375 = -1.375, S = [.0625, 2.625], o = 2.75
    o, state = rule(**call)
    np.testing.assert_allclose(o.ravel(), [5.5, 2.75], rtol=1e-14)
    np.testing.assert_allclose(state.ravel(), [0.0625, 2.625], rtol=1e-14)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_chunks_equal_tokens(gate, option, chunk_size):
    call = arguments(option, Shape(2, 70, 2, 6, 5, 3), gate, "float64")
    by_token = naive.fused_recurrent_gated_delta_rule(**call)
    by_chunk = naive.chunk_gated_delta_rule(**call, chunk_size=chunk_size)
    assert len(by_token) == len(by_chunk)
    for i, (x, y) in enumerate(zip(by_chunk, by_token, strict=True)):
        assert x.dtype == np.float64
        assert rel_l2(x, y, 1 if i else 2) < 1e-12


@pytest.mark.parametrize("log_decay", [0.0, -20.0, -316.0, -1000.0, -np.inf, "mixed"])
@pytest.mark.parametrize("gate", GATES)
def test_chunks_equal_tokens_at_any_gate(gate, log_decay):
    call = make_inputs(1, 1, 70, 1, 2, 5, 3, gate, dtype="float64", log_decay=log_decay, states=1)
    by_token = naive.fused_recurrent_gated_delta_rule(**call, output_final_state=True)
    by_chunk = naive.chunk_gated_delta_rule(**call, output_final_state=True)
    assert rel_l2(by_chunk[0], by_token[0]) < 1e-12
    assert rel_l2(by_chunk[1], by_token[1], 1) < 1e-12


def test_minus_infinity_is_a_reset():
    call = make_inputs(2, 1, 9, 1, 2, 4, 3, "gda", dtype="float64", states=1)
    call["g"][:, 5] = -np.inf
    o, _ = naive.gated_delta_rule(**call)
    tail = {name: call[name][:, 5:] for name in ("q", "k", "v", "g", "beta")}
    np.testing.assert_array_equal(o[:, 5:], naive.gated_delta_rule(**tail)[0])


@pytest.mark.parametrize("name", ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_stays_in_its_head_and_after_its_token(name, bad):
    rule = getattr(naive, name)
    call = make_inputs(3, 1, 20, 2, 4, 4, 3, "gda", dtype="float64")
    clean = rule(**call)[0]
    call["g"][0, 7, 1] = bad
    o = rule(**call)[0]
    np.testing.assert_array_equal(o[:, :, [0, 2, 3]], clean[:, :, [0, 2, 3]])
    np.testing.assert_array_equal(o[:, :7], clean[:, :7])
    assert not np.isfinite(o[:, 7:, 1]).any()


def test_head_orders():
    call = make_inputs(4, 1, 5, 2, 6, 4, 3, "gda", dtype="float64")
    for order, heads in {"interleaved": [0, 0, 0, 1, 1, 1], "tiled": [0, 1, 0, 1, 0, 1]}.items():
        wide = {**call, "q": call["q"][:, :, heads], "k": call["k"][:, :, heads]}
        o, _ = naive.gated_delta_rule(**call, head_order=order)
        np.testing.assert_array_equal(o, naive.gated_delta_rule(**wide)[0])


def test_l2norm_and_activations_are_what_they_say():
    rng = np.random.default_rng(5)
    call = make_inputs(5, 1, 6, 1, 2, 4, 3, "kda", dtype="float64")
    call["q"] = 5.0 * call["q"]
    A_log, dt_bias = rng.standard_normal(2), rng.standard_normal(8)
    plain = dict(call)
    for name in "qk":
        x = call[name]
        plain[name] = x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)
    raw = call["g"] + dt_bias.reshape(2, 4)
    plain["g"] = -np.exp(A_log)[:, None] * np.log1p(np.exp(raw))
    plain["beta"] = 2.0 / (1.0 + np.exp(-call["beta"]))
    o, _ = naive.gated_delta_rule(
        **call,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        A_log=A_log,
        dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=True,
    )
    assert rel_l2(o, naive.gated_delta_rule(**plain)[0]) < 1e-13


def test_default_scale_and_no_state_wanted():
    call = make_inputs(6, 1, 3, 1, 1, 4, 2, "gda", dtype="float64")
    o, state = naive.gated_delta_rule(**call)
    assert state is None
    np.testing.assert_allclose(o, naive.gated_delta_rule(**call, scale=1.0)[0] / 2, rtol=1e-14)


@pytest.mark.parametrize("name", ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"])
def test_checkpoints_are_states_of_prefixes(name):
    rule = getattr(naive, name)
    call = make_inputs(7, 2, 10, 1, 2, 4, 3, "gda", dtype="float64")
    kept = rule(**call, checkpoint_interval=4)[2]
    assert kept.shape == (4, 2, 4, 3)
    for row, t in enumerate((4, 8)):
        head = {key: x[:, :t] for key, x in call.items()}
        state = rule(**head, output_final_state=True)[1]
        np.testing.assert_allclose(kept[[row, row + 2]], state, rtol=1e-12, atol=1e-14)


def test_pool_is_returned_and_not_modified():
    call = make_inputs(8, 3, 1, 1, 2, 4, 3, "gda", dtype="float64", states=5)
    pool = call.pop("initial_state")
    before = pool.copy()
    o, new = naive.fused_recurrent_gated_delta_rule(
        **call, initial_state=pool, state_indices=np.array([4, -1, 0])
    )
    np.testing.assert_array_equal(pool, before)
    np.testing.assert_array_equal(new[[1, 2, 3]], before[[1, 2, 3]])
    np.testing.assert_array_equal(o[1], 0.0)
    alone, state = naive.gated_delta_rule(
        **call, initial_state=before[[4, 1, 0]], output_final_state=True
    )
    np.testing.assert_array_equal(o[[0, 2]], alone[[0, 2]])
    np.testing.assert_array_equal(new[[4, 0]], state[[0, 2]])


def test_speculative_decode_stores_the_state_of_every_token():
    call = make_inputs(9, 2, 3, 1, 2, 4, 3, "gda", dtype="float64", states=6)
    pool = call.pop("initial_state")
    slots = np.array([[0, 1, 2], [3, 4, -1]])
    o, new = naive.fused_recurrent_gated_delta_rule(
        **call, initial_state=pool, state_indices=slots, num_accepted_tokens=np.array([2, 1])
    )
    alone, _, kept = naive.gated_delta_rule(
        **call, initial_state=pool[[1, 3]], checkpoint_interval=1
    )
    np.testing.assert_array_equal(o, alone)
    np.testing.assert_array_equal(new[[0, 1, 2, 3, 4]], kept[[0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(new[5], pool[5])


@pytest.mark.parametrize("slots", [np.zeros(0, int), np.zeros((0, 2), int)])
def test_a_pool_and_no_sequence(slots):
    q = k = v = np.zeros((0, 2, 1, 1))
    pool = np.ones((3, 1, 1, 1))
    accepted = {"num_accepted_tokens": slots[:, 0]} if slots.ndim == 2 else {}
    o, states = naive.fused_recurrent_gated_delta_rule(
        q, k, v, None, None, initial_state=pool, state_indices=slots, **accepted
    )
    assert o.shape == v.shape
    np.testing.assert_array_equal(states, pool)


def test_cumsum_by_hand():
    x = np.arange(1.0, 8.0).reshape(1, 7, 1)
    forward = naive.chunk_local_cumsum(x, 3)
    backward = naive.chunk_local_cumsum(x, 3, reverse=True, scale=2.0)
    packed = naive.chunk_local_cumsum(x, 3, cu_seqlens=[0, 0, 2, 7])
    np.testing.assert_array_equal(forward.ravel(), [1, 3, 6, 4, 9, 15, 7])
    np.testing.assert_array_equal(backward.ravel(), [12, 10, 6, 30, 22, 12, 14])
    np.testing.assert_array_equal(packed.ravel(), [1, 3, 3, 7, 12, 6, 13])


def test_solves_against_numpy():
    rng = np.random.default_rng(10)
    L = rng.standard_normal((2, 1, 6, 6)) + 4.0 * np.eye(6)
    b = rng.standard_normal((3, 6, 2))
    np.testing.assert_allclose(
        naive.solve_triangular(L, b), np.linalg.solve(np.tril(L), b), rtol=1e-10
    )
    unit = np.tril(L, -1) + np.eye(6)
    np.testing.assert_allclose(
        naive.solve_triangular(L, b, unit_diagonal=True), np.linalg.solve(unit, b), rtol=1e-10
    )
    A = 0.1 * rng.standard_normal((1, 20, 2, 16))
    Ai = naive.solve_tril(A)
    for h in range(2):
        for first, rows in ((0, 16), (16, 4)):
            chunk = np.tril(A[0, first : first + rows, h, :rows], -1) + np.eye(rows)
            inverse = np.linalg.inv(chunk)
            got = Ai[0, first : first + rows, h]
            np.testing.assert_allclose(got[:, :rows], inverse, rtol=1e-10, atol=1e-14)
            assert not got[:, rows:].any()


def test_gate_by_hand():
    x = np.array([[[0.0, 1.0]]])
    A_log, bias = np.log([1.0, 3.0]), np.array([0.0, -1.0])
    softplus0, sigmoid0 = np.log(2.0), 0.5
    np.testing.assert_allclose(
        naive.fused_gate(x, A_log, bias).ravel(), [-softplus0, -3.0 * softplus0]
    )
    np.testing.assert_allclose(
        naive.fused_gate(x, A_log, bias, lower_bound=-5.0).ravel(), [-5.0 * sigmoid0] * 2
    )
    assert naive.fused_gate(np.full((1, 1, 1, 3), -np.inf)).tolist() == [[[[0.0] * 3]]]


def test_agrees_with_transformers():
    torch = pytest.importorskip("torch")
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    call = make_inputs(11, 2, 21, 3, 3, 8, 6, "gda", states=2)
    tensors = {name: torch.from_numpy(x) for name, x in call.items()}
    q, k, v = (tensors.pop(name) for name in "qkv")
    theirs = qwen.torch_recurrent_gated_delta_rule(
        q, k, v, output_final_state=True, use_qk_l2norm_in_kernel=True, **tensors
    )
    ours = naive.gated_delta_rule(**call, output_final_state=True, use_qk_l2norm_in_kernel=True)
    assert rel_l2(theirs[0].numpy(), ours[0]) < 2e-6
    assert rel_l2(theirs[1].numpy(), ours[1], 1) < 2e-6
