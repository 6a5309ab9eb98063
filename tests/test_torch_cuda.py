"""PyTorch's CUDA tensors without a GPU: as fakes, and as memory of the emulator."""

import ctypes
import math
from types import SimpleNamespace

import numpy as np
import pytest
from test_backward import call_of, reference

from nbdelta import arrays, ops
from nbdelta.testing import Shape, rel_l2

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
    """Names of the kernels launched. CPU tensors count as CUDA tensors, by memory of the emulator.

    Those that come without, as autograd makes some, are copied there.
    """
    if device != "emu":
        pytest.skip("tensors get memory of the emulator: --device emu")
    from numba import cuda
    from ptxemu import host

    import nbdelta.torch

    held, names, torch_view = {}, [], arrays._torch_view

    def new(shape, dtype, device="cuda:0"):
        memory = cuda.device_array(max(math.prod(shape), 1) * dtype.itemsize, np.uint8)
        address = memory.__cuda_array_interface__["data"][0]
        held[address] = memory
        numbers = (ctypes.c_uint8 * memory.size).from_address(address)
        flat = torch.frombuffer(numbers, dtype=dtype, count=memory.size // dtype.itemsize)
        return flat[: math.prod(shape)].view(shape)

    def view(x, torch, name):
        if x.data_ptr() not in held:
            x = new(x.shape, x.dtype).copy_(x.detach())
        seen = torch_view(x, torch, name)
        seen.device = "cuda:0"
        return seen

    def states(given, keep):
        made = real_states(given, keep)
        return new(made.shape, made.dtype)

    real_states = nbdelta.torch._empty_states
    monkeypatch.setattr(nbdelta.torch, "_empty_states", states)
    monkeypatch.setattr(arrays, "_torch_view", view)
    monkeypatch.setattr(torch, "empty", new)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: stream)
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
    assert launches[0] == "backward_pairs_kernel" and launches[-1] == "backward_gates_kernel"
    for name, x in call.items():
        assert rel_l2(x.grad.numpy(), expected[name], 0) < 3e-6, name
