"""The rule as an operator of PyTorch: compiled, exported, traced, checkpointed, under autocast."""

import shutil

import pytest
from test_autograd import NAMES, assert_close, assert_equal, call_of, given, gradients, loss_of

import nbdelta
from nbdelta.testing import Shape

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("option", ["plain", "packed", "everything"])
def test_opcheck(option, monkeypatch):
    from nbdelta import torch as operators

    calls = []
    forward, backward = operators._forward, operators._backward
    monkeypatch.setattr(operators, "_forward", lambda *a: (calls.append(a), forward(*a))[1])
    monkeypatch.setattr(operators, "_backward", lambda *a: (calls.append(a), backward(*a))[1])
    gradients(call_of(option, "kda", dtype="float32"))
    for operator, call in zip((forward, backward), [*calls], strict=True):
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        if operator is forward:
            tests += ("test_autograd_registration",)
        else:  # which has no derivative
            call = [x.detach() if isinstance(x, torch.Tensor) else x for x in call]
        found = torch.library.opcheck(operator, call, test_utils=tests)
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("rule", ["gated_delta_rule", "fused_recurrent_gated_delta_rule"])
@pytest.mark.parametrize("option", ["initial-state", "everything"])
def test_compile(option, rule):
    torch.compiler.reset()
    rule = getattr(nbdelta, rule)
    call = call_of(option, "gda", dtype="float32")
    compiled = torch.compile(
        lambda **call: rule(**call), fullgraph=True, backend="aot_eager", dynamic=True
    )
    assert_equal(gradients(call, compiled), gradients(call, rule))
    with torch.no_grad():
        for x, y in zip(compiled(**call), rule(**call)):
            assert torch.equal(x, y) and not x.requires_grad


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_inductor():
    """Kernels that PyTorch makes around the operators change no gradient but by rounding."""

    def layer(q, k, v, g, **rest):
        o, state = nbdelta.gated_delta_rule(torch.tanh(q), k, v, g.exp().log(), **rest)
        return o.relu() * 2, state

    torch.compiler.reset()
    call = call_of("initial-state", "gda", dtype="float32")
    assert_close(
        gradients(call, torch.compile(layer, fullgraph=True)), gradients(call, layer), call
    )


class Layer(torch.nn.Module):
    """Gates with parameters around the rule."""

    def __init__(self):
        super().__init__()
        self.A_log = torch.nn.Parameter(torch.zeros(6))
        self.dt_bias = torch.nn.Parameter(torch.zeros(6))

    def forward(self, q, k, v, g, beta):
        o, _ = nbdelta.gated_delta_rule(
            *(q, k, v, g, beta), use_gate_in_kernel=True, A_log=self.A_log, dt_bias=self.dt_bias
        )
        return o.relu()


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    layer, call = Layer(), call_of("plain", "gda", dtype="float32")
    tensors = tuple(call[n].detach() for n in NAMES[:5])
    program = torch.export.export(layer, tensors, strict=strict)
    assert "gated_delta_rule" in program.graph_module.code
    assert torch.equal(program.module()(*tensors), layer(*tensors))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    call = call_of("everything", "gda", dtype="float32")

    def rule(**call):
        names = list(given(call))
        rest = {n: x for n, x in call.items() if n not in names}
        return checkpoint(
            lambda *x: nbdelta.gated_delta_rule(**dict(zip(names, x)), **rest),
            *given(call).values(),
            use_reentrant=reentrant,
        )

    for x in given(call).values():
        x.grad = None
    loss_of(rule(**call)).backward()
    assert_equal({n: x.grad for n, x in given(call).items()}, gradients(call))


@pytest.mark.parametrize("T", [1, 71])
def test_autocast(T):
    """q, k and v are cast, gates and states stay; their gradients have their own dtypes."""
    call = call_of("initial-state", "gda", Shape(2, T, 2, 6, 5, 3), "float32")
    half = {**call, **{n: call[n].detach().bfloat16().requires_grad_() for n in "qkv"}}
    expected, wanted = nbdelta.gated_delta_rule(**half), gradients(half)
    with torch.autocast("cpu", torch.bfloat16):
        results = nbdelta.gated_delta_rule(**call)
        with torch.no_grad():
            without = nbdelta.gated_delta_rule(**call)
    for x, y, z in zip(results, expected, without):
        assert x.dtype == y.dtype == z.dtype
        assert torch.equal(x, y) and torch.equal(z, y)
    got = dict(zip(NAMES, torch.autograd.grad(loss_of(results), list(given(call).values()))))
    for name, x in wanted.items():
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], x.float()), name
    wide = call_of("initial-state", "gda", Shape(2, T, 2, 6, 5, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert nbdelta.gated_delta_rule(**wide)[0].dtype == torch.float64


def traced_by_jit(function, q):
    return torch.jit.trace(function, q, check_trace=False)


def traced_by_make_fx(function, q):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function)(q)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("trace", [traced_by_jit, traced_by_make_fx])
def test_other_tracers_see_the_operator(trace):
    """What they do not see they take for a constant, without a word."""
    call = {n: x.detach() if torch.is_tensor(x) else x for n, x in call_of().items()}
    q = call.pop("q")

    def of_q(q):
        return nbdelta.gated_delta_rule(q, **call)[0]

    of_q(q)
    traced = trace(of_q, q)
    assert torch.equal(traced(2 * q), of_q(2 * q))


def test_fake_tensors_give_fake_results():
    from torch._subclasses.fake_tensor import FakeTensorMode

    call = {n: x.detach() if torch.is_tensor(x) else x for n, x in call_of().items()}
    o, state = nbdelta.gated_delta_rule(**call)
    with FakeTensorMode() as mode:
        call = {n: mode.from_tensor(x) if torch.is_tensor(x) else x for n, x in call.items()}
        fake, fake_state = nbdelta.gated_delta_rule(**call)
    assert (fake.shape, fake.dtype, fake_state.shape) == (o.shape, o.dtype, state.shape)


def test_boundaries_are_the_host_s_whatever_the_default_device():
    call = {n: x[:1] if torch.is_tensor(x) else x for n, x in call_of().items()}
    T = call["q"].shape[1]
    call |= {"initial_state": None, "cu_seqlens": [0, 3, T]}
    o, _ = nbdelta.gated_delta_rule(**call)
    with torch.device("meta"):
        assert torch.equal(nbdelta.gated_delta_rule(**call)[0], o)


def _pool(**call):
    call = {n: x if n == "cu_seqlens" or x is None else x[:1, :1] for n, x in call.items()}
    pool = torch.ones(3, 6, 5, 3)
    return nbdelta.fused_recurrent_gated_delta_rule(
        **call, initial_state=pool, state_indices=torch.tensor([1])
    )


NO_OPERATORS = {
    "checkpoints": lambda **call: nbdelta.gated_delta_rule(**call, checkpoint_interval=4),
    "out": lambda **call: nbdelta.gated_delta_rule(**call, out=torch.empty_like(call["v"])),
    "pool": _pool,
    "numpy": lambda **call: nbdelta.gated_delta_rule(**{n: x.numpy() for n, x in call.items()}),
    "gradients": lambda **call: nbdelta.chunk_gated_delta_rule_bwd(**call, do=call["v"]),
    "gate": lambda g, **call: (nbdelta.fused_gate(g),),
    "cumsum": lambda g, **call: (nbdelta.chunk_local_cumsum(g, 16),),
    "tril": lambda **call: (nbdelta.solve_tril(torch.ones(1, 20, 1, 16)),),
    "triangular": lambda **call: (nbdelta.solve_triangular(torch.eye(3) + 1, torch.ones(3, 2)),),
}


@pytest.mark.parametrize("name", NO_OPERATORS)
def test_what_is_no_operator_is_called_between_graphs(name):
    """The compiler does not look into the package, where it would find no sense."""
    torch.compiler.reset()
    call = call_of("plain", "gda", dtype="float32")
    call = {n: x.detach() for n, x in call.items() if n in NAMES[:5]}

    def around(**call):
        results = NO_OPERATORS[name](**{n: 2 * x for n, x in call.items()})
        return [torch.as_tensor(x) + 1 for x in results if x is not None]

    results = torch.compile(around, backend="eager")(**call)
    for x, y in zip(results, around(**call), strict=True):
        assert torch.equal(x, y)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="nbdelta has no operator"):
        torch.compile(around, backend="eager", fullgraph=True)(**call)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("trace", [traced_by_jit, traced_by_make_fx])
@pytest.mark.parametrize(
    "block", [lambda x: nbdelta.fused_gate(x), lambda x: nbdelta.solve_tril(A=x)]
)
def test_other_tracers_refuse_building_blocks(trace, block):
    """Their results would be constants."""
    x = torch.ones(1, 20, 1, 16)
    block(x)
    with pytest.raises(ValueError, match=r"^(x|A): \w+ is no operator"):
        trace(block, x)
