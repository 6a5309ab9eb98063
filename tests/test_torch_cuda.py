"""PyTorch's CUDA tensors without a GPU: as fakes, and as memory of the emulator."""

import pytest
from emulated_torch import serve_torch
from test_backward import call_of, reference

from nbdelta import naive, ops
from nbdelta.testing import Shape, make_inputs, rel_l2

torch = pytest.importorskip("torch")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")


@pytest.mark.parametrize("gate", ["gda", "kda"])
def test_operators_on_fakes(gate):
    """A graph is traced for a device that is not there; its results are on that device."""
    import nbdelta.torch  # the operators

    B, T, H, HV, K, V = 2, 130, 1, 2, 6, 3
    head = [B, T, HV, K] if gate == "kda" else [B, T, HV]
    shapes = [B, T, H, K], [B, T, H, K], [B, T, HV, V], head, [B, T, HV], [B, HV, K, V]
    options = (None, True, False, False, None, False, False, False, "interleaved", None, None)
    assert nbdelta.torch._N_OPTIONS == len(options) + 1
    with torch._subclasses.FakeTensorMode():
        tensors = [torch.empty(shape, device="cuda:0") for shape in shapes]
        given = (*tensors, None, None, None, *options, gate == "kda")
        results = torch.ops.nbdelta.gated_delta_rule(*given, "chunk", True)
        gradients = torch.ops.nbdelta.gated_delta_rule_bwd(*given, *results)
    # o, the final state, and the states that the backward pass wants, after every 64 tokens
    assert [list(x.shape) for x in results] == [shapes[2], shapes[5], [4, HV, K, V]]
    assert [list(x.shape) for x in gradients] == list(shapes)
    assert {x.device for x in (*results, *gradients)} == {torch.device("cuda:0")}


@pytest.fixture
def launches(device, monkeypatch):
    """Names of the kernels launched."""
    if device != "emu":
        pytest.skip("tensors get memory of the emulator: --device emu")
    from ptxemu import host

    names = []
    serve_torch(monkeypatch)
    monkeypatch.setattr(host._state, "on_launch", lambda name, *launch: names.append(name))
    return names


def test_gradients_come_from_the_kernels_of_the_device(launches):
    call = call_of("initial-state", "gda", Shape(1, 70, 1, 2, 6, 3), "float32")
    expected = reference(call)
    weights = [torch.from_numpy(call.pop(name)) for name in ("do", "dht")]
    call = {name: torch.from_numpy(x).requires_grad_() for name, x in call.items()}
    results = ops.chunk_gated_delta_rule(**call, output_final_state=True)
    loss = sum((x * w).sum() for x, w in zip(results, weights))
    assert not any("backward" in name for name in launches)
    del launches[:]
    loss.backward()
    assert launches[:2] == ["gate_kernel", "backward_pairs_kernel"]
    assert launches[-1] == "backward_gates_kernel"
    for name, x in call.items():
        assert rel_l2(x.grad.numpy(), expected[name], 0) < 3e-6, name


def test_gradients_have_the_precision_of_their_call(launches):
    """The bits of the function that is given all: the states come from the forward pass."""
    call = call_of("initial-state", "kda", Shape(1, 130, 1, 1, 20, 28), "float32")
    call = {name: torch.from_numpy(x) for name, x in call.items()}
    for name in ("q", "k", "v", "do"):
        call[name] = call[name].bfloat16()
    expected = ops.chunk_gated_delta_rule_bwd(**call, precision="highest")
    weights = [call.pop(name) for name in ("do", "dht")]
    leaves = {name: x.requires_grad_() for name, x in call.items()}
    results = ops.chunk_gated_delta_rule(**leaves, output_final_state=True, precision="highest")
    loss = sum((x.float() * w).sum() for x, w in zip(results, weights))
    for name, x, dx in zip(leaves, torch.autograd.grad(loss, leaves.values()), expected):
        assert torch.equal(x, dx), name


@pytest.mark.parametrize("there", [False, True], ids=["host", "device"])
def test_states_that_no_packed_sequence_fills_are_zeros(launches, there):
    """The memory is for as many states as shapes allow, three here, and two are kept."""
    boundaries = torch.tensor([0, 63, 63, 130, 199], dtype=torch.int32)
    call = make_inputs(0, 1, 199, 1, 2, 6, 3, "gda")
    kept = naive.fused_recurrent_gated_delta_rule(
        **call, cu_seqlens=boundaries.numpy(), checkpoint_interval=64
    )[2]
    tensors = [torch.from_numpy(x) for x in call.values()]
    ends = boundaries.cuda() if there else boundaries
    options = (None, False, False, False, None, False, False, False, "interleaved", None, None)
    states = torch.ops.nbdelta.gated_delta_rule(
        *tensors, None, None, None, ends, *options, False, "chunk", True
    )[2].numpy()
    assert states.shape == (3, 2, 6, 3) and len(kept) == 2
    assert rel_l2(states[:2], kept, 1) < 2e-6
    assert not states[2:].any()
    # the host may know, and then the device is not asked
    assert ("clear_states_kernel" in launches) == there
