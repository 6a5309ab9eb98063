"""What the host code asks of CUDA: launches on the caller's stream, and nothing that waits."""

import ctypes
import sys
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest

from nbdelta import dispatch, ops
from nbdelta.testing import make_inputs

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from nbdelta.cuda import _arrays, _jit


class Driver:
    """Takes launches. It has no other function, so whoever asks for one fails."""

    def __init__(self):
        self.launches = []

    def cuCtxGetDevice(self):
        return 0, 0

    def cuLaunchKernel(self, *arguments):
        *arguments, parameters, extra = arguments
        tag, address, size_tag, size, end = (ctypes.c_void_p * 5).from_address(extra)
        assert (parameters, tag, size_tag, end) == (0, 1, 2, None)
        size = ctypes.c_size_t.from_address(size).value
        # what lies there after the call is of no interest: the driver copies it
        desc = np.frombuffer(ctypes.string_at(address, size), np.int64)
        self.launches.append((*arguments, desc.tolist()))
        return (0,)


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(_jit, "_driver", lambda: made)
    return made


@pytest.fixture
def kernel():
    """A kernel that is compiled for device 0 and a descriptor of three numbers."""
    made = _jit.Kernel(SimpleNamespace(py_func=test_a_launch_is_one_call), 128)
    made._functions[3, 0], made._shared[3, 0] = "function", 1024
    return made


def test_a_launch_is_one_call(driver, kernel):
    kernel.launch((2, 3, 4), np.array([7, -8, 2**40]), (0, 77), shared=1024)
    assert driver.launches == [("function", 2, 3, 4, 128, 1, 1, 1024, 77, [7, -8, 2**40])]


@pytest.mark.parametrize("grid", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_no_blocks_are_no_launch(driver, kernel, grid):
    kernel.launch(grid, np.zeros(3, np.int64), (0, 77))
    assert driver.launches == []


def test_an_error_of_a_launch_names_the_kernel(driver, kernel):
    driver.cuLaunchKernel = lambda *arguments: (SimpleNamespace(name="CUDA_ERROR_SOMETHING"),)
    with pytest.raises(RuntimeError, match="test_a_launch_is_one_call: CUDA_ERROR_SOMETHING"):
        kernel.launch((1, 1, 1), np.zeros(3, np.int64), (0, 77))


def test_the_stream_is_the_caller_s(monkeypatch):
    def torch_stream(index):
        return SimpleNamespace(cuda_stream=100 + index)

    def cupy_stream(index):
        return SimpleNamespace(ptr=200 + index)

    torch = SimpleNamespace(cuda=SimpleNamespace(current_stream=torch_stream))
    cupy = SimpleNamespace(cuda=SimpleNamespace(get_current_stream=cupy_stream))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert _jit.current_place("torch", "cuda:1") == (1, 101)
    assert _jit.current_place("cupy", "cuda:0") == (0, 200)
    assert _jit.current_place("numba", "cuda:1") == (1, 0)
    monkeypatch.setattr(_jit.config, "CUDA_PER_THREAD_DEFAULT_STREAM", 1, raising=False)
    assert _jit.current_place("numba", "cuda:0") == (0, 2)


def fake_torch():
    streams = SimpleNamespace(
        current_stream=lambda index: SimpleNamespace(cuda_stream=1),
        is_current_stream_capturing=lambda: True,
    )
    return SimpleNamespace(cuda=streams)


def fake_cupy():
    stream = SimpleNamespace(ptr=1, is_capturing=lambda: True)
    return SimpleNamespace(cuda=SimpleNamespace(get_current_stream=lambda index: stream))


@pytest.mark.parametrize("library", [fake_torch, fake_cupy])
def test_no_copy_from_the_host_gets_into_a_graph(monkeypatch, library):
    """Not even one made before: others take its place, and the graph would read what came next."""
    kind = library.__name__.removeprefix("fake_")
    monkeypatch.setitem(sys.modules, kind, library())
    like, array = SimpleNamespace(kind=kind, device="cuda:0"), np.array([0, 12345])
    key = kind, 0, 1, array.shape, array.tobytes()
    for uploaded in ({}, {key: "a view"}):
        monkeypatch.setattr(_arrays, "_uploaded", OrderedDict(uploaded))
        with pytest.raises(RuntimeError, match=r"while a CUDA graph is captured, .*must be on the"):
            _arrays.upload(array, like)


def test_without_a_driver_the_error_says_so(monkeypatch):
    monkeypatch.setattr(_jit.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dispatch, "_served", {"cpu"})
    reason = dispatch.rejection_reason("cuda:0")
    assert "NVIDIA driver" in reason and "nvidia-smi" in reason


@pytest.fixture
def waits(device, monkeypatch):
    """Names of the functions of CUDA that were called and wait or copy; `ops` is the users'."""
    if device == "cpu":
        pytest.skip("needs --device sim, emu or gpu")
    from numba import cuda

    called = []
    array = type(cuda.to_device(np.zeros(1)))
    names = {cuda: ("to_device", "synchronize"), array: ("copy_to_host", "copy_to_device")}

    def forbid():
        for owner, functions in names.items():
            for name in functions:
                monkeypatch.setattr(owner, name, lambda *a, name=name, **k: called.append(name))

    return SimpleNamespace(forbid=forbid, called=called, sent=cuda.to_device)


def calls(sent):
    """Every function, with all of its arrays on the device, those of indices too."""
    call = make_inputs(0, 1, 6, 1, 2, 16, 16, "gda", states=3)
    pool = sent(call.pop("initial_state"))
    call = {name: sent(x) for name, x in call.items()}
    ends = {"cu_seqlens": sent(np.array([0, 1, 6]))}
    slots = {"state_indices": sent(np.array([2, 0])), "initial_state": pool}
    x = sent(np.zeros((1, 20, 3), np.float32))
    A = sent(np.zeros((1, 20, 1, 16), np.float32))
    L = sent(np.eye(5, dtype=np.float32)[None])
    yield lambda: ops.fused_recurrent_gated_delta_rule(**call, **ends, **slots)
    yield lambda: ops.chunk_gated_delta_rule(**call, **ends, output_final_state=True)
    yield lambda: ops.gated_delta_rule(**call, **ends)
    yield lambda: ops.chunk_local_cumsum(x, 16, **ends)
    yield lambda: ops.solve_tril(A, **ends)
    yield lambda: ops.solve_triangular(L, L)
    yield lambda: ops.fused_gate(x)


def test_nothing_waits_and_nothing_is_copied(waits):
    made = list(calls(waits.sent))
    waits.forbid()
    for call in made:
        call()
    assert waits.called == []
