"""Gradients through torch: against a float64 token loop, and all that PyTorch does with a call."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from cases import GATES, OPTIONS, PACKED_LENGTHS, arguments, cu_seqlens

import nbdelta
from nbdelta.testing import Shape, make_inputs

torch = pytest.importorskip("torch")
torch_rule = pytest.importorskip("token_loop").torch_rule

NAMES = ["q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias"]
TRAINING = [option for option in OPTIONS if "checkpoints" not in option]
SHAPE = Shape(2, 71, 2, 6, 5, 3)
# relative errors; in half precision those of g and beta are sums over products that were rounded
ALLOWED = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 0.008, torch.float16: 0.008}
ALLOWED_GATES = {**ALLOWED, torch.bfloat16: 0.02, torch.float16: 0.02}


@pytest.fixture(autouse=True)
def one_thread():
    """The token loop is thousands of small operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def to_torch(x):
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def call_of(option="initial-state", gate="gda", shape=SHAPE, dtype="float64", **kwargs):
    """Arguments of a call of the rule as tensors that require a gradient."""
    call = {n: to_torch(x) for n, x in arguments(option, shape, gate, dtype, **kwargs).items()}
    call.pop("checkpoint_interval", None)
    for name in NAMES:
        if call.get(name) is not None:
            call[name].requires_grad_()
    return call


def given(call):
    return {name: call[name] for name in NAMES if call.get(name) is not None}


def loss_of(results):
    """Sum of all results with random weights, in float64."""
    generator = torch.Generator().manual_seed(1)
    return sum(
        (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
        for x in results
        if x is not None
    )


def gradients(call, rule=nbdelta.gated_delta_rule):
    """The gradients of a call, by the names of its arguments."""
    wanted = {name: x for name, x in given(call).items() if x.requires_grad}
    found = torch.autograd.grad(loss_of(rule(**call)), list(wanted.values()))
    return dict(zip(wanted, found))


def reference(call):
    exact = {n: x.detach().double().requires_grad_() for n, x in given(call).items()}
    return gradients({**call, **exact}, lambda **call: torch_rule(call))


def rel_l2(x, expected):
    x, expected = x.double(), expected.double()
    if not expected.any():
        return 0.0 if not x.any() else float("inf")
    return float((x - expected).norm() / expected.norm())


def assert_close(got, expected, call):
    assert list(got) == list(expected)
    coarsest = call["q"].dtype
    for name, x in expected.items():
        assert got[name].shape == x.shape and got[name].dtype == call[name].dtype, name
        allowed = ALLOWED_GATES if name in ("g", "beta", "A_log", "dt_bias") else ALLOWED
        error = rel_l2(got[name], x)
        bound = max(allowed[coarsest], allowed[got[name].dtype])
        assert error <= bound, f"{name}: {error:.1e} > {bound:.0e}"


def assert_equal(got, expected):
    assert list(got) == list(expected)
    for name, x in expected.items():
        assert torch.equal(got[name], x), name


# ---- against the token loop ----


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("option", TRAINING)
@pytest.mark.parametrize("gate", GATES)
def test_options(gate, option, dtype):
    call = call_of(option, gate, dtype=dtype)
    assert_close(gradients(call), reference(call), call)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("option", ["plain", "initial-state", "raw-gate-dt_bias", "everything"])
@pytest.mark.parametrize("gate", GATES)
def test_half_precision(gate, option, dtype):
    call = call_of(option, gate, Shape(1, 71, 2, 4, 20, 28), dtype)
    assert_close(gradients(call), reference(call), call)


@pytest.mark.parametrize("log_decay", [0.0, -20.0, -316.0, -np.inf, "mixed"])
@pytest.mark.parametrize("gate", GATES)
def test_strong_gates(gate, log_decay):
    """Float64, since the gradients of a gate of -316 are too small for float32."""
    call = call_of("initial-state", gate, Shape(1, 40, 1, 2, 5, 3), log_decay=log_decay)
    got = gradients(call)
    assert all(x.isfinite().all() for x in got.values())
    assert_close(got, reference(call), call)


@pytest.mark.parametrize(
    "rule",
    ["gated_delta_rule", "chunk_kda", "fused_recurrent_gated_delta_rule", "fused_recurrent_kda"],
)
@pytest.mark.parametrize("T", [1, 2, 64, 129])
def test_functions_and_lengths(rule, T):
    rule = getattr(nbdelta, rule)
    call = call_of("initial-state", "kda", Shape(2, T, 1, 2, 5, 3))
    with torch.no_grad():
        expected = rule(**call)
    results = rule(**call)
    for x, y in zip(results, expected):
        assert torch.equal(x, y) and x.requires_grad
    assert_close(gradients(call, rule), reference(call), call)


@pytest.mark.parametrize("gate", GATES)
def test_nothing_to_do(gate):
    """No tokens, no sequences: the state's gradient passes through, sums are zeros."""
    for B, T in ((2, 0), (0, 3)):
        shape = Shape(B, T, 1, 2, 5, 3)
        call = call_of("raw-gate-dt_bias", gate, shape)
        call["initial_state"] = torch.randn(B, 2, 5, 3, dtype=torch.float64, requires_grad=True)
        o, state = nbdelta.gated_delta_rule(**call)
        assert o.shape == (B, T, 2, 3)
        found = torch.autograd.grad((state * 2).sum() + o.sum(), list(given(call).values()))
        for name, x in zip(given(call), found):
            assert x.shape == call[name].shape
            assert torch.equal(x, torch.full_like(x, 2.0 if name == "initial_state" else 0.0)), name


@pytest.mark.parametrize("kind", ["list", "tuple", "int32", "int64", "numpy"])
def test_packed_bounds_of_any_kind(kind):
    bounds = cu_seqlens(PACKED_LENGTHS)
    call = call_of("packed-initial-state", "gda")
    expected = gradients(call)
    call["cu_seqlens"] = {
        "list": bounds.tolist(),
        "tuple": tuple(bounds.tolist()),
        "int32": torch.from_numpy(bounds),
        "int64": torch.from_numpy(bounds).long(),
        "numpy": bounds,
    }[kind]
    assert_equal(gradients(call), expected)


def test_packed_sequences_are_apart():
    """The bits of a sequence's gradients do not depend on the others."""
    call = call_of("packed-initial-state", "kda", dtype="float32")
    ends = call["cu_seqlens"].tolist()
    weights = torch.randn(call["v"].shape)
    o, _ = nbdelta.gated_delta_rule(**call)
    together = torch.autograd.grad((o * weights).sum(), [call[n] for n in "qkvg"])
    for n, (bos, eos) in enumerate(itertools.pairwise(ends)):
        one = {m: x[:, bos:eos].detach().requires_grad_() for m, x in call.items() if m in "qkvg"}
        beta, state = call["beta"][:, bos:eos], call["initial_state"][n : n + 1]
        o, _ = nbdelta.gated_delta_rule(**one, beta=beta, initial_state=state)
        alone = torch.autograd.grad((o * weights[:, bos:eos]).sum(), list(one.values()))
        for x, y in zip(alone, together):
            assert torch.equal(x, y[:, bos:eos])


def test_each_argument_alone():
    call = call_of("everything", "kda")
    expected = gradients(call)
    for name in given(call):
        alone = {n: x.detach() for n, x in given(call).items()}
        alone[name].requires_grad_()
        got = gradients({**call, **alone})
        assert_equal(got, {name: expected[name]})


@pytest.mark.parametrize("i", [0, 1], ids=["o", "final-state"])
def test_one_result_alone(i):
    """Gradients from one of the two: the other one's gradient is never given."""
    call = call_of("initial-state", "gda")
    got, expected = (
        torch.autograd.grad(
            rule(call)[i].square().sum(), list(given(call).values()), materialize_grads=True
        )
        for rule in (lambda call: nbdelta.gated_delta_rule(**call), torch_rule)
    )
    assert_close(dict(zip(given(call), got)), dict(zip(given(call), expected)), call)


def test_views():
    """Slices of one projection, permuted and expanded tensors; gradients that are expanded."""
    mixed = torch.randn(2, 71, 2 * 2 * 5 + 6 * 3, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(2, 6, 71, dtype=torch.float64, requires_grad=True)
    state = torch.randn(1, 1, 3, 5, dtype=torch.float64, requires_grad=True)

    def run(rule):
        q, k, v = mixed.split([10, 10, 18], dim=-1)
        call = {
            "q": q.reshape(2, 71, 2, 5),
            "k": torch.nn.functional.normalize(k.reshape(2, 71, 2, 5), dim=-1),
            "v": v.reshape(2, 71, 6, 3),
            "g": -gates.transpose(1, 2),
            "beta": gates[:, :1].transpose(1, 2).expand(2, 71, 6),
            "initial_state": state.transpose(-1, -2).expand(2, 6, 5, 3),
        }
        o, last = rule(call)
        return torch.autograd.grad(o.sum() + last.sum(), [mixed, gates, state])

    got = run(lambda call: nbdelta.gated_delta_rule(**call, output_final_state=True))
    for x, y in zip(got, run(torch_rule)):
        assert rel_l2(x, y) < 1e-13


def test_an_expanded_leaf_gets_one_gradient():
    call = call_of("plain", "gda", dtype="float32")
    call["g"] = torch.full((), -0.5, requires_grad=True).expand(2, 71, 6)
    gradient = gradients({n: x for n, x in call.items() if n != "g"} | {"g": call["g"]})["g"]
    assert gradient.shape == (2, 71, 6) and gradient.isfinite().all()


# ---- what PyTorch does with a call ----


@pytest.mark.parametrize("option", ["initial-state", "everything"])
@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(gate, option):
    call = call_of(option, gate, Shape(1, 9, 1, 2, 3, 2))
    if option == "everything":  # fewer tokens, with empty sequences
        keep = [0, 0, 1, 5, 5]
        call = {n: x[:, :5] if n in NAMES[:5] else x for n, x in call.items()}
        call["initial_state"] = call["initial_state"][:4]
        call["cu_seqlens"] = torch.tensor(keep)
        # gates near 0 alone would let rounding decide
    names = list(given(call))
    tensors = [call[n].detach().double().requires_grad_() for n in names]

    def rule(*tensors):
        return nbdelta.chunk_gated_delta_rule(**{**call, **dict(zip(names, tensors))})

    assert torch.autograd.gradcheck(rule, tensors)


# ---- what is refused ----


def test_no_second_derivative():
    call = call_of()
    first = torch.autograd.grad(
        loss_of(nbdelta.gated_delta_rule(**call)), call["q"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="the gradients of the rule have no gradients"):
        first[0].sum().backward()


def test_function_transforms():
    call = call_of()

    def of_q(q):
        return nbdelta.gated_delta_rule(**{**call, "q": q})[0].sum()

    with pytest.raises(ValueError, match=r"torch.func .* is not supported"):
        torch.func.grad(of_q)(call["q"].detach())
    with pytest.raises(ValueError, match=r"torch.func .* is not supported"):
        torch.vmap(of_q)(call["q"].detach()[None])


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", ["q", "g", "initial_state"])
def test_forward_mode(name, recorded):
    """A tangent would be dropped without a word."""
    call = {n: x.detach() if torch.is_tensor(x) else x for n, x in call_of().items()}
    ad = torch.autograd.forward_ad
    with ad.dual_level():
        nbdelta.gated_delta_rule(**call)  # a level alone does no harm
        call["v"].requires_grad_(recorded)
        dual = {**call, name: ad.make_dual(call[name], torch.ones_like(call[name]))}
        with pytest.raises(ValueError, match=rf"^{name}: has a tangent, .* reverse mode"):
            nbdelta.gated_delta_rule(**dual)


def test_forward_mode_of_building_blocks():
    ad = torch.autograd.forward_ad
    with ad.dual_level():
        x = ad.make_dual(torch.ones(1, 4, 2), torch.ones(1, 4, 2))
        for function, name in ((nbdelta.chunk_local_cumsum, "x"), (nbdelta.fused_gate, "x")):
            with pytest.raises(ValueError, match=rf"^{name}: has a tangent"):
                function(x, *[2] * (function is nbdelta.chunk_local_cumsum))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("checkpoint_interval", 64),
        ("out", torch.empty(2, 71, 6, 3, dtype=torch.float64)),
        ("inplace_final_state", True),
        ("state_indices", [0, 1]),
    ],
)
def test_options_without_a_gradient(name, value):
    with pytest.raises(ValueError, match=f"^{name}: has no gradient.*no_grad"):
        nbdelta.fused_recurrent_gated_delta_rule(**call_of(), **{name: value})


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"k": torch.ones(2, 71, 2, 6)}, TypeError, "k: expected float64"),
        ({"k": torch.ones(2, 71, 2, 6).double()}, ValueError, "k: expected .B, T, H, K."),
        ({"k": np.ones((2, 71, 2, 5))}, TypeError, "k: expected a tensor, as q is, got ndarray"),
        ({"scale": True}, TypeError, "scale: expected a real number"),
        ({"state_v_first": 1}, TypeError, "state_v_first: expected True or False"),
        ({"head_order": "other"}, ValueError, "head_order"),
        ({"lower_bound": -1}, ValueError, "lower_bound: needs use_gate_in_kernel"),
        ({"cu_seqlens": [0, 71]}, ValueError, "cu_seqlens: needs B = 1"),
        ({"cu_seqlens": [0, 0.5]}, TypeError, "cu_seqlens: expected integers"),
    ],
)
def test_errors_are_those_of_calls_without_gradients(changes, error, words):
    with pytest.raises(error, match=words):
        nbdelta.gated_delta_rule(**{**call_of(), **changes})


def test_a_tensor_beside_arrays():
    call = make_inputs(0, 1, 9, 1, 2, 5, 3, "gda")
    call["v"] = torch.from_numpy(call["v"]).requires_grad_()
    with pytest.raises(ValueError, match="v: requires a gradient, and none is recorded here"):
        nbdelta.gated_delta_rule(**call)


def test_operators_are_imported_when_used():
    code = """
import sys, torch, nbdelta
q = k = v = torch.ones(1, 2, 1, 2)
nbdelta.gated_delta_rule(q, k, v, None, None)
assert "nbdelta.torch" not in sys.modules
nbdelta.gated_delta_rule(q, k, v, None, None, initial_state=torch.ones(1, 1, 2, 2).requires_grad_())
assert "nbdelta.torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
