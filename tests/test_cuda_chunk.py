"""The chunk kernels of the CUDA room: products of 16-bit numbers, variants for every device."""

import numpy as np
import pytest
from cases import alike

from nbdelta import naive
from nbdelta.testing import Shape, as_dtype, make_inputs, rel_l2

pytestmark = pytest.mark.usefixtures("cuda_room")
# relative L2 of o and of the state, of products of numbers with 8, 11 and 24 bits
BOUNDS = {"bfloat16": 5e-3, "float16": 1e-3, "float32": 2e-6}
KILOBYTES = {"sm_80": 163, "sm_86": 99, "sm_90": 227}


@pytest.fixture
def cuda_room(device):
    if device == "cpu":
        pytest.skip("of the kernels for GPUs: --device sim, emu or gpu")
    pytest.importorskip("ml_dtypes")


@pytest.fixture
def shared_memory(monkeypatch):
    """Let the host code choose for a device with this many KB of shared memory for a block."""
    from nbdelta.cuda import _jit, chunk

    def pretend(kilobytes):
        limits = _jit.Limits(kilobytes * 1024, 132)
        monkeypatch.setattr(chunk, "device_limits", lambda index: limits)

    return pretend


def public():
    import nbdelta  # as the fixture `device` has it now

    return nbdelta.chunk_gated_delta_rule


def errors(call, **options):
    result = public()(**call, output_final_state=True, **options)
    options = {k: v for k, v in options.items() if k not in ("precision", "chunk_size")}
    reference = naive.gated_delta_rule(**call, output_final_state=True, **options)
    return [rel_l2(x, ref, 2 if i == 0 else 1) for i, (x, ref) in enumerate(zip(result, reference))]


@pytest.mark.parametrize("D", [28, 30])  # numbers are copied by fours and by twos
def test_a_thread_copies_from_place_to_place(monkeypatch, D):
    from nbdelta.cuda import _jit, chunk

    one = _jit.Limits(KILOBYTES["sm_90"] * 1024, 1)
    monkeypatch.setattr(chunk, "device_limits", lambda index: one)
    call = make_inputs(0, 2, 260, 3, 3, D, D, states=2)
    for error in errors(call):
        assert np.max(error) <= BOUNDS["float32"]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("gate", ["gda", "kda", None])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 16, 1, 1, 32, 16),  # a full chunk, also in the simulator
        Shape(1, 19, 1, 2, 20, 12),
        Shape(2, 130, 1, 2, 128, 128),
        Shape(1, 70, 2, 4, 60, 100),
        Shape(1, 65, 1, 1, 256, 40),
        Shape(1, 64, 1, 1, 96, 192),
    ],
    ids=str,
)
def test_errors(shape, gate, dtype):
    call = make_inputs(0, *shape, gate, dtype=dtype, gate_dtype="float32", states=shape.B)
    assert max(errors(call)) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("gate", ["gda", "kda"])
@pytest.mark.parametrize("log_decay", [0.0, -20.0, -316.0, -1000.0, -np.inf, "mixed", 0.02])
def test_gates(log_decay, gate, dtype):
    """Every gate is an exact limit, and strong ones leave the precision of weak ones alone."""
    options = {"dtype": dtype, "gate_dtype": "float32", "states": 1, "log_decay": log_decay}
    call = make_inputs(1, 1, 40, 1, 1, 32, 32, gate, **options)
    assert max(errors(call)) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("gate", ["gda", "kda"])
@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("keys", ["alike", "equal"])
def test_highest_precision(keys, beta, gate, dtype):
    """Without decay, errors of products of 16-bit numbers add up over keys that are alike."""
    call = make_inputs(2, 1, 96, 1, 1, 64, 64, gate, gate_dtype="float32", log_decay=0.0, states=1)
    k = call["k"]
    if keys == "equal":
        k = np.broadcast_to(k[:, :1], k.shape)
    else:
        k = alike(k)
    call["beta"] = np.full_like(call["beta"], beta if keys == "alike" else 1.0)
    call.update({name: as_dtype(x, dtype) for name, x in (("q", call["q"]), ("v", call["v"]))})
    call["k"] = as_dtype(np.ascontiguousarray(k), dtype)
    o, state = errors(call, precision="highest")
    assert o < (2.5e-3 if dtype == "bfloat16" else 5e-4)  # mostly the rounding of o
    assert state < 5e-4


@pytest.mark.parametrize("kilobytes", KILOBYTES.values(), ids=KILOBYTES)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("gate", ["gda", "kda"])
@pytest.mark.parametrize("K", [64, 128, 256])
def test_devices(K, gate, dtype, kilobytes, shared_memory):
    shared_memory(kilobytes)
    call = make_inputs(3, 1, 70, 1, 2, K, 32, gate, dtype=dtype, gate_dtype="float32", states=1)
    assert max(errors(call)) < BOUNDS[dtype]


def test_batch_size_decides_no_length():
    """The length of a chunk shows in the last bits, and those are the same alone and in a batch."""
    from nbdelta.cuda.chunk import PLANES, pick_variant

    for dtype, precision in PLANES:
        for K in (64, 128, 256):
            for per_channel in (False, True):
                for kilobytes in KILOBYTES.values():
                    rule = dtype, precision, K, 128, per_channel, None
                    variants = {pick_variant(*rule, n, kilobytes * 1024, 132) for n in (1, 9999)}
                    assert len({v and v.form for v in variants}) == 1


@pytest.mark.parametrize("interval", [16, 24, 7])
def test_checkpoints_between_chunks(interval):
    call = make_inputs(4, 2, 45, 1, 1, 32, 16, dtype="float32", states=2)
    assert max(errors(call, checkpoint_interval=interval)) < BOUNDS["float32"]


def test_packed_lengths_on_the_device():
    """Boundaries that only the device knows give the bits of those that the host knows."""
    from numba import cuda

    call = make_inputs(5, 1, 45, 1, 2, 32, 16, dtype="bfloat16", gate_dtype="float32", states=4)
    ends = np.array([0, 17, 17, 40, 45])
    for index in ("int64", "int32"):
        there = public()(**call, cu_seqlens=cuda.to_device(ends.astype(index)))[0]
        here = public()(**call, cu_seqlens=ends)[0]
        assert np.array_equal(there.view(np.uint16), here.view(np.uint16))


def test_nonsense_on_the_device_is_empty():
    """Boundaries out of range cost nothing but their own sequences."""
    from numba import cuda

    call = make_inputs(6, 1, 40, 1, 1, 32, 16, dtype="bfloat16", gate_dtype="float32", states=3)
    ends = cuda.to_device(np.array([0, 20, -3, 2**40]))
    o, states = public()(**call, cu_seqlens=ends, output_final_state=True)
    right = {name: x if name == "initial_state" else x[:, :20] for name, x in call.items()}
    right["initial_state"] = call["initial_state"][:1]
    expected = naive.gated_delta_rule(**right, output_final_state=True)
    assert rel_l2(o[:, :20], expected[0]) < BOUNDS["bfloat16"]
    assert rel_l2(states[:1], expected[1], 1) < BOUNDS["bfloat16"]
    assert np.array_equal(states[1:], call["initial_state"][1:])


@pytest.mark.parametrize("gate", ["gda", "kda"])
def test_layouts_that_tiles_cannot_be_copied_from(gate):
    """Heads before tokens, an odd offset and a step between channels give the same bits."""
    call = make_inputs(7, 1, 20, 1, 2, 32, 16, gate, dtype="bfloat16", gate_dtype="float32")
    expected = public()(**call)[0]
    q, k, v = (call[name] for name in ("q", "k", "v"))
    memory = np.zeros((*q.shape[:3], 2 * 32 + 1), q.dtype)
    memory[..., 1::2] = q
    call["q"] = memory[..., 1::2]
    call["k"] = np.ascontiguousarray(k.swapaxes(1, 2)).swapaxes(1, 2)
    memory = np.zeros((*v.shape[:3], 17), v.dtype)
    memory[..., 1:] = v
    call["v"] = memory[..., 1:]
    call["out"] = np.zeros((*v.shape[:3], 17), v.dtype)[..., 1:]
    assert np.array_equal(public()(**call)[0].view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("dtype", BOUNDS)
def test_tokens_side_by_side(dtype):
    """As behind the short convolution of a model: the same bits, channels and tokens left over."""
    call = make_inputs(8, 2, 70, 2, 4, 60, 36, dtype=dtype)
    expected = public()(**call)[0]
    for name in ("q", "k", "v"):
        x = np.ascontiguousarray(call[name].transpose(0, 2, 3, 1))
        call[name] = x.transpose(0, 3, 1, 2)
    assert np.array_equal(public()(**call)[0].view(np.uint8), expected.view(np.uint8))
