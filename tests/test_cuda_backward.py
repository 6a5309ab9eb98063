"""The kernels of the backward pass of the CUDA room, against the reference in float64."""

import numpy as np
import pytest
from cases import alike, assert_same_bits, relayout
from test_backward import NAMES, SMALL, call_of, reference, without_tiny_numbers

from nbdelta.testing import Shape, as_dtype, rel_l2

pytestmark = pytest.mark.usefixtures("cuda_room")
# relative L2 of a head; sums are in float32 for all but float64, the results are rounded
BOUNDS = {"float64": 1e-13, "float32": 3e-6, "bfloat16": 4e-3, "float16": 5e-4}


@pytest.fixture
def cuda_room(device):
    if device in ("cpu", "sim"):
        pytest.skip("256 threads with barriers take minutes but on --device emu or gpu")
    pytest.importorskip("ml_dtypes")


def kernel(call):
    import nbdelta  # as the fixture `device` has it now

    return dict(zip(NAMES, nbdelta.chunk_gated_delta_rule_bwd(**call)))


def assert_close(call, dtype, cleaned=lambda gradients: gradients):
    got, expected = cleaned(kernel(call)), cleaned(reference(call))
    assert list(got) == list(expected)
    for name, ref in expected.items():
        if ref is None:
            assert got[name] is None, name
            continue
        x = got[name]
        assert x.shape == np.shape(call[name]) and x.dtype == call[name].dtype, name
        axis = {"initial_state": 1, "A_log": 0, "dt_bias": 0}.get(name, 2)
        if axis == 0:  # sums over all tokens
            x, ref = np.asarray(x)[None], ref[None]
        error, bound = rel_l2(x, ref, axis), max(BOUNDS[x.dtype.name], BOUNDS[dtype])
        assert error <= bound, f"{name}: {error:.2e} > {bound:.0e}"


@pytest.mark.parametrize(
    ("option", "gate"),
    [
        ("everything", "gda"),
        ("everything", "kda"),
        ("raw-gate-lower_bound", "gda"),
        ("raw-gate-dt_bias-per-channel", "kda"),
        ("no-gate", "gda"),
        ("no-beta", "kda"),
    ],
)
def test_options(option, gate):
    assert_close(call_of(option, gate, SMALL, "float32"), "float32")


@pytest.mark.parametrize(
    ("shape", "gate", "dtype"),
    [
        (Shape(1, 140, 1, 2, 20, 40), "gda", "float32"),  # three chunks, two slices of V
        (Shape(1, 140, 1, 2, 20, 40), "kda", "float32"),
        (Shape(1, 50, 1, 2, 20, 28), "kda", "bfloat16"),
        (Shape(1, 20, 1, 1, 200, 12), "gda", "float16"),
        (Shape(1, 20, 1, 1, 100, 12), "kda", "float64"),
    ],
    ids=str,
)
def test_shapes(shape, gate, dtype):
    assert_close(call_of("initial-state", gate, shape, dtype), dtype)


@pytest.mark.parametrize(("gate", "dtype"), [("kda", "bfloat16"), ("gda", "float16")])
def test_highest_precision(gate, dtype):
    """Without decay, errors of states add up over keys that are alike; beta = 2 forgets none."""
    call = call_of(
        "initial-state", gate, Shape(1, 160, 1, 1, 64, 32), dtype, gate_dtype="float32",
        log_decay=0.0,
    )  # fmt: skip
    call["k"] = as_dtype(alike(call["k"].astype(np.float32)), dtype)
    call["beta"] = np.full_like(call["beta"], 2.0)
    assert_close({**call, "precision": "highest"}, dtype)


@pytest.mark.parametrize(("dtype", "gates"), [("float64", "float32"), ("float32", "float64")])
def test_raw_gates_of_another_precision(dtype, gates):
    """The log decay is in the precision of q, which is not that of the public `fused_gate`."""
    call = call_of("raw-gate-dt_bias", "gda", Shape(1, 20, 1, 2, 7, 5), dtype)
    call["g"] = call["g"].astype(gates)
    assert_close(call, dtype)


@pytest.mark.parametrize("log_decay", [0.0, -20.0, -316.0, -np.inf, "mixed"])
@pytest.mark.parametrize("gate", ["gda", "kda"])
def test_any_gate(gate, log_decay):
    """Gates of one size each have gradients of one size, and those are right however small."""
    call = call_of(
        "initial-state", gate, Shape(1, 40, 1, 2, 20, 28), "float32", log_decay=log_decay,
        beta_max=2.0,
    )  # fmt: skip
    assert_close(call, "float32", without_tiny_numbers)


def test_final_state_alone():
    call = call_of("initial-state", "gda", SMALL, "float32")
    assert_close({**call, "do": None}, "float32")


def test_packed_lengths_on_the_device_and_sequences_alone():
    """The bits of a sequence depend on nothing but its own numbers."""
    from numba import cuda

    call = call_of("packed-initial-state", "kda", Shape(1, 1, 1, 2, 20, 12), "float32")
    ends = call.pop("cu_seqlens")
    together = kernel({**call, "cu_seqlens": ends})
    there = kernel({**call, "cu_seqlens": cuda.to_device(ends)})
    for name, x in together.items():
        assert x is None or np.array_equal(there[name], x), name
    n = int(np.argmax(np.diff(ends)))
    alone = kernel(
        {
            name: x[n : n + 1]
            if name in ("initial_state", "dht")
            else x[:, ends[n] : ends[n + 1]]
            if isinstance(x, np.ndarray)
            else x
            for name, x in call.items()
        }
    )
    for name in ("q", "k", "v", "g", "beta"):
        assert np.array_equal(alone[name], together[name][:, ends[n] : ends[n + 1]]), name
    assert np.array_equal(alone["initial_state"], together["initial_state"][n : n + 1])


@pytest.mark.parametrize(
    "boundaries",
    [[70, 134], [70, 999], [0, 130, 0, 130]],
    ids=["late", "out of range", "falling"],
)
def test_wrong_boundaries_on_the_device_reach_no_other_memory(boundaries):
    """The host cannot look at them. One in range keeps its gradients, one out of it is empty."""
    from numba import cuda

    T, sequences = min(boundaries[1], 134), len(boundaries) - 1
    call = call_of("initial-state", "gda", Shape(1, T, 1, 1, 20, 12), "float32")
    for name in ("initial_state", "dht"):
        call[name] = np.repeat(call[name], sequences, axis=0)
    together = kernel({**call, "cu_seqlens": cuda.to_device(np.array(boundaries, np.int32))})
    for n in range(min(sequences, 2)):  # the third one overlaps the first one
        bos, eos = boundaries[n : n + 2]
        if not bos < eos <= T:
            assert np.array_equal(together["initial_state"][n], call["dht"][n])
            continue
        alone = {
            name: x[n : n + 1] if name in ("initial_state", "dht") else x[:, bos:eos]
            for name, x in call.items()
        }
        assert_same_bits(together["initial_state"][n], kernel(alone)["initial_state"][0])


@pytest.mark.parametrize(("K", "dtype", "fits"), [(65, "float64", False), (64, "float64", True)])
def test_float64_where_shared_memory_is_short(monkeypatch, K, dtype, fits):
    """99 KB a block, as GeForce cards have it."""
    from nbdelta.cuda import _jit, chunk_backward

    limits = _jit.Limits(99 * 1024, 1)
    monkeypatch.setattr(chunk_backward, "device_limits", lambda index: limits, raising=False)
    call = call_of("initial-state", "gda", Shape(1, 3, 1, 1, K, 4), dtype)
    if fits:
        assert_close(call, dtype)
        return
    with pytest.raises(ValueError, match=r"^q: gradients in float64 with K = 65 need \d+ bytes"):
        kernel(call)


@pytest.mark.parametrize("layout", ["padded", "reversed"])
def test_layouts(layout):
    """Any strides, of the incoming gradients as well, give the same bits."""
    call = call_of("initial-state-v-first", "kda", Shape(1, 18, 1, 2, 7, 5), "bfloat16")
    moved = {n: relayout(x, layout) if isinstance(x, np.ndarray) else x for n, x in call.items()}
    expected = kernel(call)
    for name, x in kernel(moved).items():
        assert x is expected[name] is None or np.array_equal(x, expected[name]), name


def test_no_tokens():
    call = call_of("raw-gate-A_log", "gda", Shape(2, 0, 1, 2, 7, 5), "float32")
    call["initial_state"] = np.ones_like(call["dht"])
    got = kernel(call)
    assert_same_bits(got["initial_state"], call["dht"])
    assert got["q"].size == 0 and not got["A_log"].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_tokens_side_by_side(dtype):
    """As behind the short convolution of a model: the same bits."""
    call = call_of("everything", "gda", SMALL, dtype)
    expected = kernel(call)
    for name in ("q", "k", "v"):
        x = np.ascontiguousarray(call[name].transpose(0, 2, 3, 1))
        call[name] = x.transpose(0, 3, 1, 2)
    for name, x in kernel(call).items():
        assert_same_bits(x, expected[name], name)
