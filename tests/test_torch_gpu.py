"""PyTorch on a real card: streams, graphs, gradients, models. ``pytest -m gpu`` runs it."""

import numpy as np
import pytest
from test_backward import call_of, reference

from nbdelta import naive, ops
from nbdelta.testing import Shape, make_inputs, rel_l2

torch = pytest.importorskip("torch")
SHAPE = Shape(2, 150, 2, 4, 128, 64)
DECODE = Shape(3, 1, 2, 4, 128, 128)
BUSY = 10**8  # clock cycles: longer than anything else here takes


@pytest.fixture(autouse=True)
def card(device):
    if device != "gpu":
        pytest.skip("needs a card: --device gpu, or -m gpu")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no GPU")


def tensor(x, device="cuda"):
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(x).to(device)


def tensors(call, device="cuda"):
    return {name: tensor(x, device) for name, x in call.items() if x is not None}


def prefill_inputs(gate="gda", **options):
    return make_inputs(0, *SHAPE, gate, dtype="bfloat16", gate_dtype="float32", states=2, **options)


@pytest.mark.parametrize("gate", ["gda", "kda"])
def test_results(gate):
    call = prefill_inputs(gate)
    expected = naive.gated_delta_rule(**call, output_final_state=True)
    for name in ("chunk", "fused_recurrent"):
        function = getattr(ops, f"{name}_gated_delta_rule")
        results = function(**tensors(call), output_final_state=True)
        for x, ref, axis in zip(results, expected, (2, 1), strict=True):
            assert x.is_cuda and rel_l2(x.float().cpu().numpy(), ref, axis) < 5e-3


@pytest.mark.parametrize("name", ["chunk", "fused_recurrent"])
def test_the_current_stream_is_used(name):
    """Inputs come late on a stream of the caller's; a kernel on another one would not wait."""
    function = getattr(ops, f"{name}_gated_delta_rule")
    right = tensors(prefill_inputs())
    expected = function(**right)[0]
    late = {key: torch.zeros_like(x) for key, x in right.items()}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY)
        for key, x in late.items():
            x.copy_(right[key])
        o = function(**late)[0].clone()
        assert not stream.query()  # nothing waited either
    stream.synchronize()
    assert torch.equal(o, expected)


def captured(function):
    """A graph of a call that was made once before, and what it fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("gate", ["gda", "kda"])
def test_a_graph_of_a_prefill(gate):
    ends = torch.tensor([0, 30, 60, 150], dtype=torch.int32, device="cuda")
    call = make_inputs(1, 1, 150, 2, 4, 128, 64, gate, dtype="bfloat16", states=3)
    given = tensors(call)
    graph, results = captured(
        lambda: ops.chunk_gated_delta_rule(**given, cu_seqlens=ends, output_final_state=True)
    )
    for factor in (1, 2):  # other numbers, other lengths, the same memory
        given["v"].mul_(factor)
        ends[1] += factor
        graph.replay()
        expected = ops.chunk_gated_delta_rule(**given, cu_seqlens=ends, output_final_state=True)
        assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_a_graph_of_a_decode_step():
    call = make_inputs(2, *DECODE, "gda", dtype="bfloat16", states=5)
    given, slots = tensors(call), torch.tensor([4, 0, 2], dtype=torch.int32, device="cuda")
    before = given["initial_state"].clone()

    def step():
        return ops.fused_recurrent_gated_delta_rule(**given, state_indices=slots)

    graph, (o, states) = captured(step)
    assert states is given["initial_state"]
    states.copy_(before)
    graph.replay()
    found, after = o.clone(), states.clone()
    states.copy_(before)
    assert torch.equal(step()[0], found) and torch.equal(states, after)


def test_index_arrays_of_the_host_do_not_get_into_a_graph():
    """Not even those that an earlier call on the stream brought to the card."""
    given, ends = tensors(make_inputs(3, 1, 20, 1, 1, 32, 32, "gda")), np.array([0, 5, 20])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.chunk_gated_delta_rule(**given, cu_seqlens=ends)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        torch.zeros(1, device="cuda")  # an empty graph is warned of
        with pytest.raises(RuntimeError, match=r"must be on the device"):
            ops.chunk_gated_delta_rule(**given, cu_seqlens=ends)


@pytest.mark.parametrize("gate", ["gda", "kda"])
def test_gradients(gate):
    call = call_of("initial-state", gate, Shape(1, 150, 1, 2, 64, 40), "float32")
    expected = reference(call)
    weights = [tensor(call.pop(name)) for name in ("do", "dht")]
    leaves = {name: x.requires_grad_() for name, x in tensors(call).items()}
    results = ops.chunk_gated_delta_rule(**leaves, output_final_state=True)
    sum((x * w).sum() for x, w in zip(results, weights)).backward()
    for name, x in leaves.items():
        assert rel_l2(x.grad.cpu().numpy(), expected[name], 0) < 3e-6, name


def test_calls_on_two_streams_at_once():
    """What a call works on goes back to PyTorch before the kernels end, and only to its stream."""
    call = tensors(prefill_inputs("kda"))
    expected = ops.chunk_gated_delta_rule(**call)[0]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    for i in range(40):
        with torch.cuda.stream(streams[i % 2]):
            results.append(ops.chunk_gated_delta_rule(**call)[0])
    torch.cuda.synchronize()
    assert all(torch.equal(x, expected) for x in results)


def test_the_device_of_the_tensors_need_not_be_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    call = prefill_inputs()
    expected = ops.chunk_gated_delta_rule(**tensors(call))[0]
    o, _ = ops.chunk_gated_delta_rule(**tensors(call, "cuda:1"))
    assert o.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert torch.equal(o.cpu(), expected.cpu())


@pytest.mark.parametrize("name", ["qwen3_next", "kimi_linear"])
def test_models(name):
    pytest.importorskip("transformers")
    from test_transformers import model_of, tokens

    from nbdelta import transformers as served

    model, ids = model_of(name).cuda(), tokens(2, 80).cuda()
    with torch.no_grad():
        expected = model(ids).logits
        with served.enable():
            got = model(ids).logits
    assert rel_l2(got.cpu(), expected.cpu()) < 1e-4
