"""Kinds of array in and out."""

import importlib.util
import re
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import Exporter

import nbdelta
from nbdelta.arrays import empty, view


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "bfloat16", "int32", "int64", "uint64", "bool"]
)
def test_numpy_view(dtype):
    x = np.zeros((2, 3), ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    seen = view(x, "x")
    assert (seen.owner is x, seen.kind, seen.device, seen.dtype) == (True, "numpy", "cpu", dtype)
    assert (seen.shape, seen.strides, seen.address) == (x.shape, x.strides, x.ctypes.data)
    assert seen.itemsize == x.itemsize
    assert not seen.readonly


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int32", "int64"])
def test_torch_view(dtype):
    x = torch.zeros((4, 6), dtype=getattr(torch, dtype))[1:, ::2]
    seen = view(x, "x")
    assert (seen.owner is x, seen.kind, seen.device, seen.dtype) == (True, "torch", "cpu", dtype)
    assert (seen.shape, seen.address) == ((3, 3), x.data_ptr())
    assert seen.strides == tuple(s * x.element_size() for s in x.stride())
    assert type(seen.shape) is tuple


@pytest.mark.parametrize(
    "index",
    [
        np.s_[:],
        np.s_[::-1, 1:],
        np.s_[..., ::-2],
        np.s_[:, :0],
        np.s_[2],
        np.s_[None, :, 1],
    ],
)
def test_strided_views(index):
    x = np.arange(24.0).reshape(4, 6)[index]
    seen = view(x, "x")
    assert (seen.address, seen.strides) == (x.ctypes.data, x.strides)
    low, high = seen.extent()
    assert (seen.address + low, seen.address + high) == np.lib.array_utils.byte_bounds(
        x
    ) or x.size == 0


def test_read_only_and_misaligned():
    x = np.zeros(4, np.float32)
    x.flags.writeable = False
    assert view(x, "x").readonly
    odd = np.zeros(17, np.uint8)[1:].view(np.float32)
    assert view(odd, "odd").address == odd.ctypes.data
    assert odd.ctypes.data % 4


@pytest.mark.parametrize(
    ("x", "overlaps"),
    [
        (np.zeros((2, 3)), False),
        (np.zeros((2, 3)).T, False),
        (np.zeros((4, 3))[::-2], False),
        (np.broadcast_to(np.zeros(3), (2, 3)), True),
        (np.broadcast_to(np.zeros(3), (1, 3)), False),
        (np.broadcast_to(np.zeros(3), (0, 3)), False),
        (np.lib.stride_tricks.sliding_window_view(np.zeros(5), 3), True),
        (np.zeros(6)[::2], False),
    ],
)
def test_overlaps_itself(x, overlaps):
    assert view(x, "x").overlaps_itself() is overlaps


def test_swapped_view_is_the_same_memory():
    x = np.zeros((2, 3, 4), np.float32)
    seen = view(x, "x").swap_last()
    assert (seen.shape, seen.strides) == (x.swapaxes(1, 2).shape, x.swapaxes(1, 2).strides)
    assert seen.owner is x


class CudaArray:
    """What CuPy and numba show of an array, without a device."""

    def __init__(self, shape, address=256):
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "<f4",
            "data": (address, False),
            "version": 3,
        }


def test_dlpack_view():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::2]
    seen = view(Exporter(x), "x")
    assert (seen.kind, seen.dtype, seen.shape, seen.strides) == (
        "dlpack",
        "float32",
        (2, 2),
        (12, 8),
    )
    assert seen.address == x.ctypes.data


def test_cuda_view():
    seen = view(CudaArray((2, 3)), "x")
    assert (seen.device, seen.address, seen.strides) == ("cuda:0", 256, (12, 4))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("like", [np.zeros(1), torch.zeros(1)])
def test_empty(like, dtype):
    new = empty(view(like, "x"), (2, 0, 3), dtype)
    assert type(new.owner) is type(like)
    assert tuple(new.owner.shape) == new.shape == (2, 0, 3)
    again = view(new.owner, "x")
    assert again.dtype == dtype
    new = empty(view(like, "x"), (2, 5, 3), dtype)
    again = view(new.owner, "x")
    assert (again.address, again.strides) == (new.address, new.strides)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems are not asked")
def test_large_torch_results_come_in_large_pages():
    result = empty(view(torch.zeros(1), "q"), (2**23,), "float32")
    inside, flags = result.address + result.owner.nbytes // 2, None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(x, 16) for x in bounds.groups())
        elif line.startswith("VmFlags:") and begin <= inside < end:
            flags = line.split()
    assert "hg" in flags


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (None, "NoneType"),
        ([1.0, 2.0], "list"),
        (3.0, "float"),
        (np.float32(3), "float32"),
        (np.ma.zeros(3), "masked"),
        (np.zeros(3, ">f4"), "byte-swapped"),
        (np.zeros(3, object), "object"),
        (np.zeros(3, "U2"), "<U2"),
        (np.zeros(3, "M8[s]"), "datetime64"),
        (np.zeros(3, "f4,i4"), "i4"),
        (torch.zeros(3, dtype=torch.float32).to_sparse(), "sparse"),
        (torch.zeros(3, device="meta"), "meta"),
        (torch.zeros(3, dtype=torch.complex64).conj().imag, "negated"),
        (Exporter(torch.zeros(3, dtype=torch.float8_e4m3fn)), "Exporter"),
        (torch.zeros(3, dtype=torch.float8_e4m3fn), "float8"),
        (np.ndarray, "type"),
        (torch.Tensor, "TensorMeta"),
    ],
)
def test_what_is_no_array(x, words):
    with pytest.raises(TypeError, match=f"^x: .*{words}"):
        view(x, "x")


def test_gradients_are_refused():
    x = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"^x: requires a gradient.*no_grad\(\).*detach"):
        view(x, "x")
    with torch.no_grad():
        assert view(x, "x").address == x.data_ptr()
    assert view(x.detach(), "x").address == x.data_ptr()


def inputs(wrap=lambda x: x):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 3, 2, 4)).astype(np.float32) for _ in range(3))
    g, beta = (-rng.random((1, 3, 2), np.float32) for _ in range(2))
    return [wrap(x) for x in (q, k, v, g, beta)]


def test_result_kind_follows_q():
    o, state = nbdelta.gated_delta_rule(*inputs(), output_final_state=True)
    assert type(o) is np.ndarray and type(state) is np.ndarray
    t, t_state = nbdelta.gated_delta_rule(*inputs(torch.from_numpy), output_final_state=True)
    assert type(t) is torch.Tensor and type(t_state) is torch.Tensor
    assert np.array_equal(t.numpy(), o) and np.array_equal(t_state.numpy(), state)
    q, *others = inputs()
    t, _ = nbdelta.gated_delta_rule(torch.from_numpy(q), *others)  # mixed, on one device
    assert type(t) is torch.Tensor
    assert np.array_equal(t.numpy(), o)
    d, _ = nbdelta.gated_delta_rule(*inputs(Exporter))
    assert type(d) is np.ndarray
    assert np.array_equal(d, o)


def test_subclasses_are_plain_memory(tmp_path):
    expected, _ = nbdelta.gated_delta_rule(*inputs())
    q, *others = inputs()
    mapped = np.memmap(tmp_path / "q", np.float32, "w+", shape=q.shape)
    mapped[:] = q
    o, _ = nbdelta.gated_delta_rule(mapped, *others)
    assert type(o) is np.ndarray
    assert np.array_equal(o, expected)
    t, *others = inputs(torch.from_numpy)
    with torch.no_grad():
        o, _ = nbdelta.gated_delta_rule(torch.nn.Parameter(t), *others)
    assert type(o) is torch.Tensor


def test_numpy_result_with_a_torch_state_in_bfloat16():
    state = torch.zeros((1, 2, 4, 4), dtype=torch.bfloat16)
    _, final = nbdelta.gated_delta_rule(*inputs(), initial_state=state, output_final_state=True)
    assert type(final) is np.ndarray
    assert final.dtype == ml_dtypes.bfloat16


def test_returned_arrays_are_those_given():
    out = np.empty((1, 3, 2, 4), np.float32)
    pool = np.zeros((5, 2, 4, 4), np.float32)
    o, state = nbdelta.fused_recurrent_gated_delta_rule(
        *inputs(), initial_state=pool, state_indices=[3], out=out
    )
    assert o is out and state is pool
    assert pool[3].any() and not pool[:3].any() and not pool[4:].any()


def test_devices_are_not_mixed():
    q, k, *others = inputs()
    with pytest.raises(ValueError, match="q on cpu, k on cuda:0, v on cpu"):
        nbdelta.gated_delta_rule(q, CudaArray(k.shape), *others)
    host = np.zeros((1, 16, 16, 16), np.float32)
    with pytest.raises(ValueError, match="L on cpu, b on cuda:0"):
        nbdelta.solve_triangular(host, CudaArray(host.shape))
    with pytest.raises(ValueError, match="x on cpu, out on cuda:0"):
        nbdelta.chunk_local_cumsum(host, 4, out=CudaArray(host.shape))
    with pytest.raises(ValueError, match="A on cpu, out on cuda:0"):
        nbdelta.solve_tril(host, out=CudaArray(host.shape))
    with pytest.raises(ValueError, match="x on cpu, A_log on cuda:0"):
        nbdelta.fused_gate(host, CudaArray((16,)))


def test_cuda_without_numba_cuda_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    q, k, v = (CudaArray((1, 3, 2, 4)) for _ in range(3))
    with pytest.raises(RuntimeError, match=r"^q: is on cuda:0: .*pip install 'nbdelta\[cu13\]'"):
        nbdelta.gated_delta_rule(q, k, v, None, None)
    square = CudaArray((1, 16, 16, 16))
    for call in (
        lambda: nbdelta.chunk_local_cumsum(square, 16),
        lambda: nbdelta.solve_tril(square),
        lambda: nbdelta.solve_triangular(square, square),
        lambda: nbdelta.fused_gate(square),
    ):
        with pytest.raises(RuntimeError, match=r"^\w+: is on cuda:0"):
            call()
