"""Gradients of the rule: the reference against autograd, the kernel against the reference."""

import numpy as np
import pytest
from cases import (
    DTYPES,
    GATES,
    LAYOUTS,
    OPTIONS,
    SHAPES,
    arguments,
    assert_same_bits,
    relayout,
)

import nbdelta
from nbdelta import naive
from nbdelta.testing import MIXED_GATES, Shape, as_dtype, make_inputs, rel_l2

torch = pytest.importorskip("torch")
torch_rule = pytest.importorskip("token_loop").torch_rule

NAMES = ["q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias"]
TRAINING = [option for option in OPTIONS if "checkpoints" not in option]
# relative errors by the dtype of a gradient; those that are sums over a row of products, g and
# beta, are held to more than one rounding in half precision
ALLOWED = {"float64": 1e-9, "float32": 2e-4, "bfloat16": 0.008, "float16": 0.008}
ALLOWED_GATES = {**ALLOWED, "bfloat16": 0.02, "float16": 0.02}


SMALL = Shape(2, 21, 2, 6, 5, 3)


def call_of(option, gate, shape=SMALL, dtype="float64", seed=0, **kwargs):
    """Arguments of a backward call."""
    call = arguments(option, shape, gate, dtype, seed=seed, **kwargs)
    call.pop("checkpoint_interval", None)
    rng = np.random.default_rng(seed + 2)
    o, state = naive.gated_delta_rule(**call)
    del call["output_final_state"]
    call["do"] = as_dtype(rng.standard_normal(o.shape), dtype)
    call["dht"] = as_dtype(rng.standard_normal(state.shape), dtype)
    return call


def reference(call):
    return dict(zip(NAMES, naive.chunk_gated_delta_rule_bwd(**call)))


def kernel(call):
    return dict(zip(NAMES, nbdelta.chunk_gated_delta_rule_bwd(**call)))


def forward_of(call):
    return {name: x for name, x in call.items() if name not in ("do", "dht")}


def rounding_of_sums(call, expected, dtype):
    """What a head's gradients of gates may be where all their terms cancel, but for rounding.

    Those are products of a state and its gradient, which are as large as v and the initial state
    and their gradients. They cancel where no gate matters: the only channel of a head, written to
    with beta = 1, keeps nothing.
    """

    def norms(x, axis):
        if x is None:
            return 0.0
        heads = np.moveaxis(np.asarray(x).astype(float), axis, 0)
        return np.linalg.norm(heads.reshape(len(heads), -1), axis=1)

    size = norms(call["v"], 2) * norms(expected["v"], 2)
    size += norms(call.get("initial_state"), 1) * norms(expected["initial_state"], 1)
    return size * (2.0**-50 if dtype == "float64" else 2.0**-22)


def assert_close(got, expected, call, dtype):
    """Compare all gradients, each of its heads apart."""
    assert list(got) == list(expected)
    rounding = rounding_of_sums(call, expected, dtype)
    for name, ref in expected.items():
        if ref is None:
            assert got[name] is None, name
            continue
        x = got[name]
        assert x.shape == np.shape(call[name]) and x.dtype == call[name].dtype, name
        axis = {"initial_state": 1, "A_log": 0, "dt_bias": 0}.get(name, 2)
        allowed = ALLOWED_GATES if name in ("g", "beta") else ALLOWED
        if axis == 0:  # one number each, sums over all tokens: not each by itself
            x, ref = np.asarray(x)[None], ref[None]
        bound = max(allowed[x.dtype.name], allowed[dtype])
        error = rel_l2(x, ref, axis, rounding / bound if name == "g" else 0.0)
        assert error <= bound, f"{name}: {error:.2e} > {bound:.0e}"


# ---- the reference ----


def autograd(call):
    """Gradients of the call by PyTorch, in float64."""
    x = dict(call)
    for name in NAMES:
        if x.get(name) is not None:
            x[name] = torch.tensor(np.asarray(x[name], np.float64), requires_grad=True)
    o, state = torch_rule(x)
    wanted = [name for name in NAMES if x.get(name) is not None]
    loss = (o * torch.tensor(call["do"])).sum() + (state * torch.tensor(call["dht"])).sum()
    return dict(zip(wanted, torch.autograd.grad(loss, [x[name] for name in wanted])))


def assert_like_autograd(call):
    got = reference(call)
    for name, x in autograd(call).items():
        assert got[name].shape == np.shape(call[name])
        assert rel_l2(got[name], x, 0) < 1e-11, name


@pytest.mark.parametrize("option", TRAINING)
@pytest.mark.parametrize("gate", GATES)
def test_reference_against_autograd(gate, option):
    assert_like_autograd(call_of(option, gate))


@pytest.mark.parametrize("log_decay", [*MIXED_GATES[:-1]])
@pytest.mark.parametrize("gate", GATES)
def test_reference_against_autograd_at_any_gate(gate, log_decay):
    assert_like_autograd(call_of("initial-state", gate, log_decay=log_decay))


@pytest.mark.parametrize("gate", GATES)
def test_reference_against_finite_differences(gate):
    """Without a second derivation: the gradient along a direction is a difference of losses."""
    call, step = call_of("everything", gate, Shape(1, 9, 1, 2, 3, 2)), 1e-6
    got, rng = reference(call), np.random.default_rng(5)

    def loss(**changed):
        o, state = naive.gated_delta_rule(**forward_of(call | changed), output_final_state=True)
        return (o * call["do"]).sum() + (state * call["dht"]).sum()

    for name in NAMES:
        x = np.asarray(call[name], np.float64)
        way = step * rng.standard_normal(x.shape)
        difference = loss(**{name: x + way}) - loss(**{name: x - way})
        assert np.isclose((got[name] * way).sum(), difference / 2, rtol=1e-7), name


# ---- the kernel ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_shapes(gate, shape, dtype):
    call = call_of("initial-state", gate, shape, dtype)
    assert_close(kernel(call), reference(call), call, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("option", TRAINING)
@pytest.mark.parametrize("gate", GATES)
def test_options(gate, option, dtype):
    call = call_of(option, gate, Shape(2, 150, 2, 6, 20, 28), dtype)
    assert_close(kernel(call), reference(call), call, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("log_decay", [*MIXED_GATES, "mixed"])
@pytest.mark.parametrize("gate", GATES)
def test_any_gate(gate, log_decay, dtype):
    """Gates of one size each have gradients of one size, and those are right however small."""
    call = call_of(
        "initial-state", gate, Shape(1, 70, 1, 2, 20, 28), dtype, log_decay=log_decay, beta_max=2.0
    )
    got, expected = kernel(call), reference(call)
    if dtype == "float32":  # which has no numbers for some of them
        got, expected = without_tiny_numbers(got), without_tiny_numbers(expected)
    assert_close(got, expected, call, dtype)


def without_tiny_numbers(gradients):
    return {
        name: x if x is None else np.where(np.abs(x) < 1e-30, x.dtype.type(0), x)
        for name, x in gradients.items()
    }


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_that_is_shut(gate):
    """A raw gate so large that its decay is 0 has no gradient, and none that is not a number."""
    call = call_of("raw-gate-A_log", gate, Shape(1, 40, 1, 2, 20, 28), "float32")
    call["g"][:, 7] = np.inf
    got = kernel(call)
    for name, x in got.items():
        assert x is None or np.isfinite(x).all(), name
    assert not got["g"][:, 7].any()


@pytest.mark.parametrize("gate", GATES)
def test_no_write_at_all(gate):
    """The gradient of a beta of 0 is there: it is not found by a division."""
    call = call_of("plain", gate, Shape(1, 40, 1, 2, 20, 28), "float64")
    call["beta"][:, ::3] = 0.0
    assert_close(kernel(call), reference(call), call, "float64")


@pytest.mark.parametrize("left_out", ["do", "dht"])
def test_one_of_the_two_gradients(left_out):
    call = call_of("initial-state", "gda", Shape(1, 70, 1, 2, 20, 28))
    expected = kernel({**call, left_out: np.zeros_like(call[left_out])})
    got = kernel({**call, left_out: None})
    assert_close(got, reference({**call, left_out: None}), call, "float64")
    for name, x in expected.items():
        assert x is None or np.array_equal(got[name], x), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", GATES)
def test_layouts(gate, layout):
    call = call_of("everything", gate, dtype="float32")
    large = [n for n in (*NAMES, "do", "dht") if call[n].ndim > 2]
    arrays = {n: relayout(call[n], layout) for n in large}
    for name, x in kernel(call).items():
        assert_same_bits(kernel({**call, **arrays})[name], x, name)


@pytest.mark.parametrize("gate", GATES)
def test_sequences_and_threads_change_nothing(gate):
    """Alone, in a batch, packed, on one thread or two: the same bits."""
    import numba

    call = call_of("initial-state", gate, Shape(3, 100, 2, 4, 20, 28), "float32")
    together = kernel(call)
    packed = {
        name: x.reshape(1, -1, *x.shape[2:]) if name not in ("initial_state", "dht") else x
        for name, x in call.items()
    }
    as_one = kernel({**packed, "cu_seqlens": [0, 100, 200, 300]})
    threads = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        on_one_thread = kernel(call)
    finally:
        numba.set_num_threads(threads)
    for name, x in together.items():
        if x is None:
            continue
        assert_same_bits(on_one_thread[name], x, name)
        assert_same_bits(as_one[name].reshape(x.shape), x, name)
        for n in range(3):
            alone = kernel({m: y[n : n + 1] for m, y in call.items()})
            assert_same_bits(alone[name], x[n : n + 1], name)


@pytest.mark.parametrize("gate", GATES)
def test_bad_numbers_stay_in_their_key_head(gate):
    call = make_inputs(3, 2, 40, 2, 4, 20, 28, gate)
    call["do"] = np.ones_like(call["v"])
    clean = kernel(call)
    call["v"] = call["v"].copy()
    call["v"][0, 20, 1, 3] = np.nan
    for name, x in kernel(call).items():
        if x is None:
            continue
        heads = 2 // (4 // x.shape[2])
        assert_same_bits(x[1], clean[name][1], name)
        assert_same_bits(x[0, :, heads:], clean[name][0, :, heads:], name)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (dict(do=None), ValueError, "do: needs a gradient of o, of the final state"),
        (dict(do=np.ones((1, 9, 2, 4))), ValueError, "do: expected .* got .1, 9, 2, 4."),
        (dict(do=np.ones((1, 9, 2, 3), np.int32)), TypeError, "do: expected float32 or"),
        (dict(dht=np.ones((1, 2, 3, 5))), ValueError, "dht: expected .N, HV, K, V. = .1, 2, 5, 3."),
        (
            dict(dht=np.ones((1, 2, 5, 3)), state_v_first=True),
            ValueError,
            "dht: expected .N, HV, V, K. = .1, 2, 3, 5.",
        ),
        (dict(A_log=np.ones(2)), ValueError, "A_log: needs use_gate_in_kernel=True"),
        (dict(beta=np.ones((1, 9, 1))), ValueError, "beta: expected"),
    ],
)
def test_errors(changed, error, message):
    call = make_inputs(0, 1, 9, 1, 2, 5, 3, "gda")
    with pytest.raises(error, match=message):
        nbdelta.chunk_gated_delta_rule_bwd(**{**call, "do": np.ones_like(call["v"]), **changed})
