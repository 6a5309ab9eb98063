"""Torch tensors on the CPU, without copies, and what else NumPy arrays may be."""

import numpy as np
import pytest
from cases import GATES, Exporter, assert_matches, assert_same_bits

import nbdelta
from nbdelta import naive
from nbdelta.testing import make_inputs

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("device")
RULES = ["gated_delta_rule", "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"]


@pytest.fixture(autouse=True)
def nan_filled_tensors(monkeypatch):
    """Fill new tensors with NaN, as conftest does for NumPy arrays."""
    empty = torch.empty

    def nan_filled(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", nan_filled)


def to_torch(x):
    """Share the memory of an array; torch takes no bfloat16 array, so by its bits."""
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def to_numpy(x):
    if x is None or isinstance(x, np.ndarray):
        return x
    if x.dtype == torch.bfloat16:
        import ml_dtypes

        return x.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_same_bits_as_numpy(rule, gate, dtype):
    rule = getattr(nbdelta, rule)
    call = make_inputs(0, 2, 37, 2, 4, 20, 28, gate, dtype=dtype, states=2)
    call.update(output_final_state=True, checkpoint_interval=10)
    expected = rule(**call)
    tensors = {name: to_torch(x) for name, x in call.items()}
    before = {name: x.clone() for name, x in tensors.items() if isinstance(x, torch.Tensor)}
    result = rule(**tensors)
    assert result[0].dtype == getattr(torch, dtype)
    for x, y in zip(result, expected, strict=True):
        assert isinstance(x, torch.Tensor) and x.device.type == "cpu"
        assert_same_bits(to_numpy(x), y)
    assert_matches([to_numpy(x) for x in result], naive.gated_delta_rule(**call), dtype)
    for name, x in before.items():
        assert torch.equal(tensors[name], x), name


@pytest.mark.parametrize("rule", RULES)
def test_views_are_not_copied(rule, monkeypatch):
    # [B, heads, T, dims] permuted, and slices of one projection, as models hold them
    rng = np.random.default_rng(1)
    mixed = torch.from_numpy(rng.standard_normal((2, 37, 2 * 20 * 2 + 4 * 28), np.float32))
    q, k, v = torch.split(mixed, [40, 40, 112], dim=-1)
    call = {
        "q": q.reshape(2, 37, 2, 20),
        "k": k.reshape(2, 37, 2, 20),
        "v": v.reshape(2, 37, 4, 28),
        "g": -torch.rand(2, 4, 37).transpose(1, 2),
        "beta": torch.rand(37, 4, 2).permute(2, 0, 1),
        "initial_state": torch.rand(2, 4, 28, 20).transpose(-1, -2),
        "use_qk_l2norm_in_kernel": True,
        "output_final_state": True,
    }
    assert call["q"].data_ptr() == mixed.data_ptr()
    expected = naive.gated_delta_rule(
        **{name: to_numpy(x) if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    )

    def refuse(*args, **kwargs):
        raise AssertionError("a tensor was copied")

    for name in ("contiguous", "clone", "to", "numpy", "copy_"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    result = getattr(nbdelta, rule)(**call)
    monkeypatch.undo()
    assert_matches([to_numpy(x) for x in result], expected, "float32")


def test_decode_in_a_pool():
    call = make_inputs(2, 3, 1, 2, 4, 20, 28, "gda", dtype="bfloat16", states=6)
    tensors = {name: to_torch(x.copy()) for name, x in call.items()}
    pool = tensors["initial_state"]
    o, new = nbdelta.fused_recurrent_gated_delta_rule(
        **tensors, state_indices=torch.tensor([5, -1, 2])
    )
    expected = naive.gated_delta_rule(**call, state_indices=np.array([5, -1, 2]))
    assert new is pool
    assert_matches([to_numpy(o), to_numpy(pool)], expected, "bfloat16")
    o, new = nbdelta.fused_recurrent_gated_delta_rule(
        **tensors,
        state_indices=torch.tensor([[5, 0], [1, 2], [3, 4]], dtype=torch.int32),
        num_accepted_tokens=torch.tensor([1, 2, 1], dtype=torch.int32),
    )
    assert new is pool


def test_out_and_state_in_place():
    call = make_inputs(3, 2, 37, 2, 4, 20, 28, "kda", states=2)
    expected = nbdelta.fused_recurrent_gated_delta_rule(**call, output_final_state=True)
    tensors = {name: to_torch(x.copy()) for name, x in call.items()}
    out = torch.empty(2, 4, 37, 28).transpose(1, 2)
    o, state = nbdelta.fused_recurrent_gated_delta_rule(
        **tensors, out=out, output_final_state=True, inplace_final_state=True
    )
    assert o is out and state is tensors["initial_state"]
    assert_same_bits(o.contiguous().numpy(), expected[0])
    assert_same_bits(state.numpy(), expected[1])


def test_packed_with_a_tensor_of_bounds():
    call = make_inputs(4, 1, 40, 2, 4, 20, 28, "gda")
    bounds = torch.tensor([0, 0, 17, 40], dtype=torch.int32)
    tensors = {name: to_torch(x) for name, x in call.items()}
    result = nbdelta.gated_delta_rule(**tensors, cu_seqlens=bounds, output_final_state=True)
    expected = naive.gated_delta_rule(**call, cu_seqlens=bounds.numpy(), output_final_state=True)
    assert_matches([to_numpy(x) for x in result], expected, "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_building_blocks(dtype):
    x = (torch.rand(2, 40, 4, 16, generator=torch.manual_seed(5)) / 8).to(dtype)
    array = to_numpy(x)
    g = nbdelta.fused_gate(x)
    assert g.dtype == torch.float32
    assert_same_bits(to_numpy(g), nbdelta.fused_gate(array))
    y = nbdelta.chunk_local_cumsum(x, 16)
    assert y.dtype == torch.float32
    assert_same_bits(to_numpy(y), nbdelta.chunk_local_cumsum(array, 16))
    Ai = nbdelta.solve_tril(x)
    assert Ai.dtype == dtype
    assert_same_bits(to_numpy(Ai), nbdelta.solve_tril(array))
    L, b = x[:, :16, 0] + torch.eye(16, dtype=dtype), x[:, :16, 1, :5]
    solution = nbdelta.solve_triangular(L, b)
    assert solution.dtype == dtype
    assert_same_bits(to_numpy(solution), nbdelta.solve_triangular(to_numpy(L), to_numpy(b)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_parameters_without_gradients_recorded(mode):
    call = make_inputs(6, 1, 20, 2, 4, 20, 28, "gda")
    tensors = {name: to_torch(x) for name, x in call.items()}
    tensors["A_log"] = torch.nn.Parameter(torch.zeros(4))
    tensors["dt_bias"] = torch.nn.Parameter(torch.ones(4))
    with mode():
        o, _ = nbdelta.gated_delta_rule(**tensors, use_gate_in_kernel=True)
    assert not o.requires_grad
    call.update(A_log=np.zeros(4), dt_bias=np.ones(4), use_gate_in_kernel=True)
    assert_matches([o.numpy()], naive.gated_delta_rule(**call)[:1], "float32")


@pytest.mark.parametrize("rule", RULES)
def test_read_only_and_sliced_numpy(rule):
    rule = getattr(nbdelta, rule)
    call = make_inputs(7, 2, 37, 2, 4, 20, 28, "kda", states=2)
    expected = rule(**call, output_final_state=True)
    for name, x in call.items():
        wide = np.repeat(x, 2, axis=0)[::2]
        wide.flags.writeable = False
        call[name] = wide
    for x, y in zip(rule(**call, output_final_state=True), expected, strict=True):
        assert type(x) is np.ndarray and x.flags.writeable
        assert_same_bits(x, y)


def test_other_arrays_with_dlpack():
    call = make_inputs(8, 1, 20, 2, 4, 20, 28, "gda")
    expected = nbdelta.gated_delta_rule(**call)[0]
    o, _ = nbdelta.gated_delta_rule(**{name: Exporter(x) for name, x in call.items()})
    assert_same_bits(np.asarray(o), expected)


def test_bfloat16_with_dlpack():
    """NumPy reads no such capsule, and whether its memory may be written to is not known."""
    call = make_inputs(8, 1, 20, 2, 4, 20, 28, "gda", dtype="bfloat16")
    expected = nbdelta.gated_delta_rule(**call)[0]
    tensors = {n: torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16) for n, x in call.items()
               if x.dtype.name == "bfloat16"}  # fmt: skip
    # strides of their own
    sent = {n: Exporter(x.transpose(1, 2).contiguous().transpose(1, 2)) for n, x in tensors.items()}
    o, _ = nbdelta.gated_delta_rule(**{**call, **sent})
    assert type(o) is np.ndarray
    assert_same_bits(o, expected)
    out = Exporter(torch.empty(expected.shape, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"^out: .* read-only"):
        nbdelta.gated_delta_rule(**{**call, **sent}, out=out)
