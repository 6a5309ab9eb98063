"""Devices that tests run on: the CPU, a GPU, Numba's simulator of one, or an emulator of its code.

`prepare` comes before anything imports numba. `serve` lets the public functions take the NumPy
arrays of the tests to a device and bring the results back, so that a test is the same everywhere.
"""

import ctypes
import functools
import importlib.util
import inspect
import os
import sys
from pathlib import Path

import numpy as np
import pytest

NAMES = ("cpu", "sim", "emu", "gpu")
# where the emulator is when it is not installed: next to this checkout
EMULATOR = Path(__file__).resolve().parents[2] / "shared" / "tools" / "ptxemu"
# multiply-adds of the recurrence, or elements of another function, that a call may have there; of
# the chunked kernels, which are many instructions for tensor cores, in the simulator fewer
LARGEST = {"sim": 60_000, "emu": 6_000_000}
LARGEST_CHUNKED = {"sim": 10_000}


def rejection_reason(name):
    """Say why a device cannot be used on this machine, as far as files tell; or return None."""
    if name != "cpu" and importlib.util.find_spec("numba_cuda") is None:
        return "numba-cuda is not installed"
    if name == "emu":
        if importlib.util.find_spec("ptxemu") is None and EMULATOR.is_dir():
            sys.path.append(str(EMULATOR))
        if importlib.util.find_spec("ptxemu") is None:
            return "the emulator ptxemu is not here"
    return None


def prepare(name):
    """Set a device up in this process; returns why it cannot be used, or None."""
    reason = rejection_reason(name)
    if reason or name == "cpu":
        return reason
    if name == "sim":
        if "numba" in sys.modules:
            return "numba was imported before the simulator was switched on"
        os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
        if hasattr(os, "sched_setaffinity"):
            # a Python thread for each of a GPU, one of which runs at a time: on several cores it
            # takes twice as long until the next one does
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    elif name == "emu":
        import ptxemu

        ptxemu.install(check=True)
        _keep_ptx()
    else:
        from numba import cuda

        if not cuda.is_available():
            return f"no CUDA device: {cuda.cuda_error()}"
    return None


def _keep_ptx():
    """Let the emulator find the PTX of kernels where other processes left it.

    It is in the folder where their machine code would be for a GPU, under names that say as much.
    """
    from ptxemu import abi

    from nbdelta.cuda import _cache, _jit

    # a part of what ships, and of some kernels it changes the code
    abi._OPTS = (*abi._OPTS, "launch_bounds")
    compile_kernel, compiled = abi.compile_kernel, _jit.Kernel._compiled
    names, found = {}, {}

    def with_name(kernel, length, capability):
        names[kernel.dispatcher] = kernel.key
        return compiled(kernel, length, capability)

    def kept(dispatcher, types, capability, options=None):
        launched = dispatcher, tuple(types), tuple(capability), repr(options or {})
        if launched in found:
            return found[launched]
        name = names.get(dispatcher)
        key = _key_of_ptx(name, *launched[1:])
        entry = _cache.load(key) if name else None
        if entry:
            texts = tuple(entry[1].decode().split("\0"))
        else:
            texts = compile_kernel(dispatcher, types, capability, options)
            if name:
                _cache.save(key, b"", "\0".join(texts).encode())
        found[launched] = texts
        return texts

    abi.compile_kernel, _jit.Kernel._compiled = kept, with_name


def _key_of_ptx(name, types, capability, options):
    return "PTX", name, types, capability, options


def leave_ptx(kernel, types, capability, text):
    """Leave the PTX of a kernel to the processes that run the emulator."""
    from nbdelta.cuda import _cache

    key = _key_of_ptx(kernel.key, tuple(types), tuple(capability), repr({}))
    _cache.save(key, b"", text.encode())


class OnDevice:
    """A NumPy array's numbers in device memory, with the same strides."""

    def __init__(self, array, address):
        self.dtype = array.dtype
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "strides": array.strides,
            "typestr": array.dtype.str,
            "data": (address, not array.flags.writeable),
            "version": 3,
        }


class Memory:
    """Device memory that holds all the bytes of a NumPy array, those between its numbers too."""

    def __init__(self, array):
        from numba import cuda

        self.array = array
        self.low, high = np.lib.array_utils.byte_bounds(array)
        self.bytes = np.ctypeslib.as_array(
            (ctypes.c_uint8 * (high - self.low)).from_address(self.low)
        )
        self.copy = cuda.to_device(self.bytes.copy())
        self.address = _address(self.copy)

    def bring_back(self):
        """Copy what the device has to the host, or find it unchanged where nobody may write."""
        now = self.copy.copy_to_host()
        if self.array.flags.writeable:
            self.bytes[...] = now
        else:
            assert np.array_equal(self.bytes, now), "a read-only array was written to"


def _address(x):
    """Address of a device array; in the simulator they are on the host."""
    interface = getattr(x, "__cuda_array_interface__", None) or x._ary.__array_interface__
    return interface["data"][0]


def _root(array):
    """The array whose memory an array is a view of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _is_numbers(x):
    return isinstance(x, np.ndarray) and x.dtype.kind not in "iub"


def _size(arguments):
    """Multiply-adds of a state's update in all, or else elements of the largest array."""
    if "v" in arguments:
        return arguments["v"].size * arguments["q"].shape[-1]
    return max([x.size for x in arguments.values() if _is_numbers(x)], default=0)


def send(array):
    """Bring an array to the device and leave it there."""
    memory = Memory(array)
    there = OnDevice(array, memory.address)
    there.memory = memory
    return there


def on_device(function, largest):
    """Return the function with its arrays of numbers on the device for the time of the call."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        arrays = [x for x in (*args, *kwargs.values()) if _is_numbers(x)]
        if not arrays:  # they are on the device, and so will the results be
            return function(*args, **kwargs)
        size = _size(signature.bind(*args, **kwargs).arguments)
        if largest and size > largest:
            pytest.skip(f"{size} multiply-adds or elements are too many to simulate")
        if any(not x.flags.aligned for x in arrays):
            pytest.skip("a GPU reads numbers at multiples of their size only")
        memories, sent = {}, {}
        for x in arrays:
            root = _root(x)
            memory = memories.setdefault(id(root), None) or Memory(root)
            memories[id(root)] = memory
            start = x.__array_interface__["data"][0] - memory.low
            sent[id(x)] = OnDevice(x, memory.address + start)
        here = {id(there): x for x in arrays for there in [sent[id(x)]]}
        try:
            result = function(
                *[sent.get(id(x), x) for x in args],
                **{name: sent.get(id(x), x) for name, x in kwargs.items()},
            )
        finally:
            for memory in memories.values():
                memory.bring_back()
        if isinstance(result, tuple):
            return tuple([_fetch(x, here) for x in result])
        return _fetch(result, here)

    return call


def _fetch(x, here):
    return x if x is None else here[id(x)] if id(x) in here else x.copy_to_host()


def serve(name, monkeypatch):
    """Let the public functions work on a device until the test ends."""
    import nbdelta

    for function in nbdelta.__all__:
        largest = LARGEST.get(name)
        if function in ("chunk_gated_delta_rule", "chunk_kda", "gated_delta_rule"):
            largest = LARGEST_CHUNKED.get(name, largest)
        wrapped = on_device(getattr(nbdelta, function), largest)
        monkeypatch.setattr(nbdelta, function, wrapped)
