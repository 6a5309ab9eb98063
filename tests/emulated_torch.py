"""CUDA tensors without a GPU: CPU tensors whose memory is the emulator's."""

import ctypes
import math
import time
from types import SimpleNamespace

import numpy as np


class Event:
    """Records the host's time; the emulator is done when a launch returns."""

    def __init__(self, enable_timing=False):
        self.timed, self.seconds = enable_timing, None

    def record(self):
        self.seconds = time.perf_counter()

    def synchronize(self):
        assert self.seconds is not None, "an event that nobody recorded"

    def elapsed_time(self, end):
        assert self.timed and end.timed
        return 1e3 * (end.seconds - self.seconds)


def serve_torch(monkeypatch):
    """Let CPU tensors count as CUDA tensors until the test ends.

    Those whose memory is not the emulator's, as autograd makes some, are copied there when the
    package looks at them; integers stay on the host until they are sent with ``cuda()``.
    """
    import torch
    from numba import cuda

    from nbdelta import arrays

    held, torch_view, real_to = {}, arrays._torch_view, torch.Tensor.to

    def new(shape, dtype, device="cuda:0"):
        assert str(device).startswith("cuda")
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        memory = cuda.device_array(max(math.prod(shape), 1) * dtype.itemsize, np.uint8)
        address = memory.__cuda_array_interface__["data"][0]
        held[address] = memory
        numbers = (ctypes.c_uint8 * memory.size).from_address(address)
        flat = torch.frombuffer(numbers, dtype=dtype, count=memory.size // dtype.itemsize)
        return flat[: math.prod(shape)].view(shape)

    def to_cuda(x):
        return new(x.shape, x.dtype).copy_(x.detach())

    def view(x, torch, name):
        there = x.data_ptr() in held
        if not there and not x.is_floating_point():
            return torch_view(x, torch, name)
        seen = torch_view(x if there else to_cuda(x), torch, name)
        seen.device = "cuda:0"
        return seen

    def to(x, target, *args, **kwargs):
        return to_cuda(x) if str(target).startswith("cuda") else real_to(x, target, *args, **kwargs)

    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(arrays, "_torch_view", view)
    monkeypatch.setattr(torch, "empty", new)
    monkeypatch.setattr(torch.Tensor, "cuda", to_cuda)
    monkeypatch.setattr(torch.Tensor, "to", to)
    for name, value in (
        ("is_available", lambda: True),
        ("is_current_stream_capturing", lambda: False),
        ("current_stream", lambda index: stream),
        ("get_device_name", lambda: "an emulated GPU"),
        ("Event", Event),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    return new
