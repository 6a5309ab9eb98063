"""The chunked algorithm against the token-by-token reference."""

import numpy as np
import pytest
from cases import (
    DTYPES,
    GATES,
    LAYOUTS,
    OPTIONS,
    PACKED_LENGTHS,
    SHAPES,
    arguments,
    assert_matches,
    assert_same_bits,
    cu_seqlens,
    relayout,
)

import nbdelta
from nbdelta import naive
from nbdelta.testing import Shape, make_inputs

pytestmark = pytest.mark.usefixtures("device")
ODD = Shape(2, 37, 2, 6, 20, 28)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, gate):
    call = make_inputs(0, *shape, gate, states=shape.B)
    reference = naive.gated_delta_rule(**call, output_final_state=True)
    assert_matches(
        nbdelta.chunk_gated_delta_rule(**call, output_final_state=True), reference, "float32"
    )


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, gate):
    call = arguments(option, ODD, gate)
    assert_matches(
        nbdelta.chunk_gated_delta_rule(**call),
        naive.gated_delta_rule(**call),
        "float32",
        # a raw gate or beta adds an error of its own
        hard_gates="raw" in option or option == "everything",
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("option", ["initial-state", "packed", "everything"])
def test_dtypes(option, gate, dtype):
    call = arguments(option, ODD, gate, dtype)
    assert_matches(
        nbdelta.chunk_gated_delta_rule(**call),
        naive.gated_delta_rule(**call),
        dtype,
        hard_gates=option == "everything",
    )


@pytest.mark.parametrize("gate_dtype", DTYPES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_gate_dtypes(dtype, gate_dtype):
    call = make_inputs(1, *ODD, "kda", dtype=dtype, gate_dtype=gate_dtype)
    reference = naive.gated_delta_rule(**call, output_final_state=True)
    assert_matches(
        nbdelta.chunk_gated_delta_rule(**call, output_final_state=True), reference, dtype
    )


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        ("float32", "bfloat16"),
        ("float32", "float16"),
        ("bfloat16", "bfloat16"),
        ("float16", "float32"),
        ("float64", "float32"),
        ("float64", "bfloat16"),
        ("float64", "float64"),
    ],
)
def test_state_dtypes(dtype, state_dtype):
    call = make_inputs(2, *ODD, "gda", dtype=dtype, states=2, state_dtype=state_dtype)
    call.update(output_final_state=True, checkpoint_interval=10)
    result = nbdelta.chunk_gated_delta_rule(**call)
    assert_matches(result, naive.gated_delta_rule(**call), dtype, state_dtype=state_dtype)


@pytest.mark.parametrize("chunk_size", [None, 16, 32, 64])
@pytest.mark.parametrize("gate", GATES)
def test_chunk_sizes(gate, chunk_size):
    call = make_inputs(3, 1, 100, 1, 2, 24, 40, gate, states=1)
    result = nbdelta.chunk_gated_delta_rule(**call, chunk_size=chunk_size, output_final_state=True)
    assert_matches(result, naive.gated_delta_rule(**call, output_final_state=True), "float32")


@pytest.mark.parametrize("interval", [1, 16, 50, 64, 1000])
def test_checkpoint_intervals(interval):
    call = make_inputs(4, 2, 100, 1, 2, 24, 40, "kda", states=2)
    call.update(output_final_state=True, checkpoint_interval=interval)
    result = nbdelta.chunk_gated_delta_rule(**call)
    assert result[2].shape == (2 * (100 // interval), 2, 24, 40)
    assert_matches(result, naive.gated_delta_rule(**call), "float32")


def test_checkpoints_do_not_change_the_rest():
    call = make_inputs(4, 1, 100, 1, 2, 24, 40, "gda")
    call["output_final_state"] = True
    with_checkpoints = nbdelta.chunk_gated_delta_rule(**call, checkpoint_interval=64)
    plain = nbdelta.chunk_gated_delta_rule(**call)
    assert_same_bits(with_checkpoints[0], plain[0])
    assert_same_bits(with_checkpoints[1], plain[1])


@pytest.mark.parametrize("gate", GATES)
def test_state_only_where_asked(gate):
    call = make_inputs(5, *ODD, gate)
    o, state = nbdelta.chunk_gated_delta_rule(**call)
    assert state is None
    with_state, state = nbdelta.chunk_gated_delta_rule(**call, output_final_state=True)
    assert state.shape == (ODD.B, ODD.HV, ODD.K, ODD.V)
    assert_same_bits(o, with_state)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", GATES)
def test_layouts_have_the_same_bits(gate, layout):
    call = make_inputs(6, *ODD, gate, states=2)
    call["output_final_state"] = True
    expected = nbdelta.chunk_gated_delta_rule(**call)
    names = ("q", "k", "v", "g", "beta", "initial_state")
    other = {name: relayout(call[name], layout) for name in names}
    for name in names:
        np.testing.assert_array_equal(other[name], call[name])
    result = nbdelta.chunk_gated_delta_rule(**{**call, **other})
    for x, y in zip(result, expected, strict=True):
        assert_same_bits(x, y)


def test_broadcast_inputs():
    call = make_inputs(7, *ODD, "kda")
    call["g"] = np.broadcast_to(call["g"][:, :1, :, :1], call["g"].shape)
    call["beta"] = np.broadcast_to(np.float32(0.5), call["beta"].shape)
    call["q"] = np.broadcast_to(call["q"][:1], call["q"].shape)
    assert_matches(
        nbdelta.chunk_gated_delta_rule(**call), naive.gated_delta_rule(**call), "float32"
    )


@pytest.mark.parametrize("algorithm", ["chunk", "fused_recurrent"])
def test_views_of_one_projection(algorithm):
    # transformers splits one [B, T, heads * dims] projection; no copy is needed
    rng = np.random.default_rng(8)
    mixed = rng.standard_normal((2, 37, 2 * 20 * 2 + 6 * 28)).astype(np.float32)
    q, k, v = np.split(mixed, [40, 80], axis=-1)
    q, k, v = q.reshape(2, 37, 2, 20), k.reshape(2, 37, 2, 20), v.reshape(2, 37, 6, 28)
    call = make_inputs(8, *ODD, "gda") | {"q": q, "k": k, "v": v, "use_qk_l2norm_in_kernel": True}
    rule = getattr(nbdelta, f"{algorithm}_gated_delta_rule")
    assert_matches(rule(**call), naive.gated_delta_rule(**call), "float32")


@pytest.mark.parametrize("layout", [None, "transposed", "reversed", "padded", "fortran"])
def test_out_is_written_and_nothing_around_it(layout):
    call = make_inputs(9, *ODD, "gda")
    expected, _ = nbdelta.chunk_gated_delta_rule(**call)
    out = relayout(np.full(expected.shape, 7.0, np.float32), layout)
    guard = out.base.copy() if layout == "padded" else None
    o, _ = nbdelta.chunk_gated_delta_rule(**call, out=out)
    assert o is out
    assert_same_bits(o, expected)
    if guard is not None:
        around = np.isnan(guard)
        assert np.isnan(out.base[around]).all()


@pytest.mark.parametrize("gate", GATES)
def test_inputs_are_not_changed(gate):
    call = arguments("everything", ODD, gate)
    before = {name: x.copy() for name, x in call.items() if isinstance(x, np.ndarray)}
    nbdelta.chunk_gated_delta_rule(**call)
    for name, x in before.items():
        assert_same_bits(call[name], x, name)


def test_empty_batch_and_no_tokens():
    for shape in (Shape(0, 5, 1, 2, 4, 6), Shape(2, 0, 1, 2, 4, 6)):
        call = make_inputs(11, *shape, "gda", states=shape.B)
        o, state = nbdelta.chunk_gated_delta_rule(**call, output_final_state=True)
        assert o.shape == (shape.B, shape.T, 2, 6)
        np.testing.assert_array_equal(state, call["initial_state"])


def test_empty_sequences_keep_their_state():
    lengths = [0, 5, 0]
    call = make_inputs(12, 1, 5, 1, 2, 4, 6, "gda", states=3)
    call["cu_seqlens"] = cu_seqlens(lengths)
    _, state = nbdelta.chunk_gated_delta_rule(**call, output_final_state=True)
    assert_same_bits(state[[0, 2]], call["initial_state"][[0, 2]])
    del call["initial_state"]
    _, state = nbdelta.chunk_gated_delta_rule(**call, output_final_state=True)
    assert not state[[0, 2]].any()


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_cu_seqlens_dtypes(dtype):
    call = make_inputs(13, 1, sum(PACKED_LENGTHS), 1, 2, 8, 8, "gda")
    call.update(cu_seqlens=cu_seqlens(PACKED_LENGTHS).astype(dtype), output_final_state=True)
    assert_matches(
        nbdelta.chunk_gated_delta_rule(**call), naive.gated_delta_rule(**call), "float32"
    )


def test_chunk_kda_is_the_same_function():
    call = make_inputs(14, *ODD, "kda", states=2)
    call["output_final_state"] = True
    for x, y in zip(nbdelta.chunk_kda(**call), nbdelta.chunk_gated_delta_rule(**call), strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_tokens_side_by_side_in_memory(dtype):
    """The layout that the short convolution of a model leaves: ``[B, H, K, T]`` in memory."""
    rng = np.random.default_rng(0)
    heads = [(2, 64), (2, 64), (6, 48)]
    x = [rng.standard_normal((1, h, d, 85)).astype(dtype).transpose(0, 3, 1, 2) for h, d in heads]
    g, beta = -rng.random((1, 85, 6)), rng.random((1, 85, 6))
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    got = nbdelta.chunk_gated_delta_rule(*x, g, beta, **options)
    same = nbdelta.chunk_gated_delta_rule(*map(np.ascontiguousarray, x), g, beta, **options)
    for a, b in zip(got, same, strict=True):
        np.testing.assert_array_equal(a, b)
