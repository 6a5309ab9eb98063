"""Device arrays in and out: kinds, index arrays on either side, and what is refused."""

import ctypes
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from cases import assert_same_bits

from nbdelta import dlpack, naive, ops
from nbdelta.arrays import empty, view
from nbdelta.testing import allowed_error, make_inputs, rel_l2

SHAPE = (3, 1, 1, 2, 16, 12)


@pytest.fixture
def cuda(device):
    """Numba's CUDA of the device under test; `ops` has the functions as users have them."""
    if device == "cpu":
        pytest.skip("needs --device sim, emu or gpu")
    from numba import cuda

    return cuda


def sent(call):
    from nbdelta.cuda._arrays import send

    return {name: send(x) if isinstance(x, np.ndarray) else x for name, x in call.items()}


class Interface:
    """An array of an unknown library with a CUDA array interface."""

    def __init__(self, x, readonly=False):
        seen = view(x, "x")
        self.owner = x
        self.__cuda_array_interface__ = {
            "shape": seen.shape,
            "strides": None,
            "typestr": x.dtype.str,
            "data": (seen.address, readonly),
            "version": 3,
        }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_numba_arrays(cuda, dtype):
    call = make_inputs(0, *SHAPE, "gda", dtype=dtype, states=3)
    reference, _ = naive.gated_delta_rule(**call)
    on_device = sent(call)
    seen = view(on_device["q"], "q")
    assert (seen.kind, seen.device, seen.dtype) == ("numba", "cuda:0", dtype)
    o, state = ops.fused_recurrent_gated_delta_rule(**on_device, output_final_state=True)
    assert type(o) is type(state) is type(on_device["q"])
    assert o.copy_to_host().dtype.name == dtype
    assert state.copy_to_host().dtype == np.float32
    assert rel_l2(o.copy_to_host(), reference) <= allowed_error(reference, dtype)


def test_unknown_libraries_get_numba_arrays(cuda):
    call = make_inputs(1, *SHAPE, "kda")
    arrays = sent(call)
    expected, _ = ops.fused_recurrent_gated_delta_rule(**arrays)
    wrapped = {name: Interface(x, readonly=True) for name, x in arrays.items()}
    o, _ = ops.fused_recurrent_gated_delta_rule(**wrapped)
    assert type(o) is type(expected)
    assert_same_bits(o.copy_to_host(), expected.copy_to_host())


def test_new_arrays(cuda):
    like = view(cuda.to_device(np.zeros(3, np.float32)), "x")
    for dtype in ("float32", "bfloat16"):
        made = empty(like, (2, 0, 5), dtype)
        assert (made.kind, made.device, made.dtype) == ("numba", "cuda:0", dtype)
        assert made.shape == (2, 0, 5)


@pytest.mark.parametrize("integers", [np.int32, np.int64])
def test_index_arrays_on_the_device(cuda, integers):
    call = make_inputs(2, 1, 6, 1, 2, 16, 12, "gda", states=7)
    pool = call.pop("initial_state")
    indices = {
        "cu_seqlens": np.array([0, 2, 2, 6], integers),
        "state_indices": np.array([[4, 1, 0, 3], [2, -1, -1, -1], [5, -1, 6, -1]], integers),
        "num_accepted_tokens": np.array([1, 1, 1], integers),
    }
    results = []
    for place in (lambda x: x, cuda.to_device):
        states = cuda.to_device(pool)
        o, new = ops.fused_recurrent_gated_delta_rule(
            **sent(call),
            initial_state=states,
            **{name: place(x) for name, x in indices.items()},
        )
        assert new is states
        results.append((o.copy_to_host(), states.copy_to_host()))
    assert_same_bits(results[0][0], results[1][0])
    assert_same_bits(results[0][1], results[1][1])
    reference, _ = naive.fused_recurrent_gated_delta_rule(
        **call, initial_state=pool.copy(), **indices
    )
    assert rel_l2(results[0][0], reference) <= allowed_error(reference, "float32")


@pytest.mark.parametrize("wrong", [-2, 4, 2**31 - 1])
def test_wrong_slots_on_the_device_are_padded(cuda, wrong):
    call = make_inputs(3, *SHAPE, "gda", states=4)
    pool = call.pop("initial_state")
    states, arrays = cuda.to_device(pool), sent(call)
    slots = cuda.to_device(np.array([1, wrong, 3], np.int32))
    o, _ = ops.fused_recurrent_gated_delta_rule(**arrays, initial_state=states, state_indices=slots)
    assert not o.copy_to_host()[1].any() and o.copy_to_host()[[0, 2]].any()
    assert_same_bits(states.copy_to_host()[[0, 2]], pool[[0, 2]])


@pytest.mark.parametrize("accepted", [0, 3, -1])
def test_wrong_counts_on_the_device_are_padded(cuda, accepted):
    call = make_inputs(4, 2, 2, 1, 2, 16, 12, "gda", states=5)
    pool = call.pop("initial_state")
    states = cuda.to_device(pool)
    o, _ = ops.fused_recurrent_gated_delta_rule(
        **sent(call),
        initial_state=states,
        state_indices=np.array([[0, 1], [2, 3]]),
        num_accepted_tokens=cuda.to_device(np.array([1, accepted], np.int32)),
    )
    assert not o.copy_to_host()[1].any()
    assert_same_bits(states.copy_to_host()[2:], pool[2:])


@pytest.mark.parametrize("boundaries", [[0, 9, 4], [-3, 2, 4], [3, 1, 4]])
def test_wrong_boundaries_on_the_device_are_empty_sequences(cuda, boundaries):
    call = make_inputs(5, 1, 4, 1, 2, 16, 12, "gda")
    out = cuda.to_device(np.full((1, 4, 2, 12), 7, np.float32))
    o, state = ops.fused_recurrent_gated_delta_rule(
        **sent(call),
        cu_seqlens=cuda.to_device(np.array(boundaries, np.int64)),
        output_final_state=True,
        out=out,
    )
    assert o is out
    assert not state.copy_to_host()[0].any()


def test_refusals(cuda):
    call = make_inputs(6, 1, 4, 1, 2, 16, 12, "gda")
    arrays = sent(call)
    function = ops.fused_recurrent_gated_delta_rule
    with pytest.raises(ValueError, match=r"q on cuda:0, k on cpu, v on cuda:0"):
        function(**{**arrays, "k": call["k"]})
    ends = cuda.to_device(np.array([0, 4], np.int32))
    with pytest.raises(ValueError, match=r"^checkpoint_interval: needs cu_seqlens on the host"):
        function(**arrays, cu_seqlens=ends, checkpoint_interval=2)
    with pytest.raises(
        TypeError, match=r"^cu_seqlens: expected int64 or int32 on cuda:0, got int8"
    ):
        function(**arrays, cu_seqlens=cuda.to_device(np.array([0, 4], np.int8)))
    with pytest.raises(
        ValueError, match=r"^all arrays must be on one device, .*cu_seqlens on cuda"
    ):
        function(**call, cu_seqlens=ends)
    wide = sent(make_inputs(7, 1, 1, 1, 1, 257, 4, "gda"))
    with pytest.raises(ValueError, match=r"^k: on CUDA devices K is at most 256, got 257"):
        function(**wide)
    q = Interface(arrays["q"])
    address = q.__cuda_array_interface__["data"][0]
    q.__cuda_array_interface__["data"] = address + 2, False
    with pytest.raises(
        ValueError, match=r"^q: float32 on cuda:0 needs addresses .* multiples of 4"
    ):
        function(**{**arrays, "q": q})


class _Managed(ctypes.Structure):
    _fields_ = (
        ("tensor", dlpack._Tensor),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class Capsuled:
    """An array that is known by DLPack alone."""

    def __init__(self, device, code, bits, shape, strides=None, offset=0):
        n = len(shape)
        self.shape = (ctypes.c_int64 * n)(*shape)
        self.strides = None if strides is None else (ctypes.c_int64 * n)(*strides)
        pointer = ctypes.POINTER(ctypes.c_int64)
        tensor = dlpack._Tensor(
            *(4096, *device, n, code, bits, 1, ctypes.cast(self.shape, pointer)),
            ctypes.cast(self.strides, pointer) if strides else None,
            offset,
        )
        self.managed = _Managed(tensor)
        self.device, self.streams = device, []

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, stream=None):
        self.streams.append(stream)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.managed), b"dltensor", None)


def test_dlpack_of_device_memory():
    seen = view(Capsuled((dlpack.CUDA, 1), 4, 16, (3, 5), (1, 3), 64), "x")
    assert (seen.kind, seen.device, seen.dtype) == ("dlpack", "cuda:1", "bfloat16")
    assert (seen.shape, seen.strides, seen.address) == ((3, 5), (2, 6), 4096 + 64)
    seen = view(Capsuled((dlpack.CUDA_MANAGED, 0), 2, 32, (3, 5)), "x")
    assert (seen.device, seen.dtype, seen.strides) == ("cuda:0", "float32", (20, 4))
    with pytest.raises(TypeError, match=r"^x: expected an array of real numbers, got dtype float8"):
        view(Capsuled((dlpack.CUDA, 0), 2, 8, (3,)), "x")


@pytest.mark.parametrize(("per_thread", "stream"), [(0, 1), (1, 2)])
def test_dlpack_is_told_the_stream_of_the_kernels(monkeypatch, per_thread, stream):
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
    from nbdelta import dispatch
    from nbdelta.cuda import _jit

    monkeypatch.setattr(dispatch, "cuda_rejection_reason", lambda: None)
    monkeypatch.setattr(_jit.config, "CUDA_PER_THREAD_DEFAULT_STREAM", per_thread, raising=False)
    array = Capsuled((dlpack.CUDA, 0), 2, 32, (3, 5))
    view(array, "x")
    assert array.streams == [stream]


def test_bfloat16_behind_a_cuda_array_interface():
    x = SimpleNamespace(dtype=np.dtype(ml_dtypes.bfloat16))
    x.__cuda_array_interface__ = {
        "shape": (2,),
        "typestr": x.dtype.str,
        "data": (4096, False),
        "version": 3,
    }
    assert view(x, "x").dtype == "bfloat16"
