"""The only place that calls ``cuda.jit``, and the only one that launches.

A kernel takes one argument, a tuple of int64: the descriptor of the call (see ``_call.py``). It
lies in constant memory on the device, so a launch copies nothing but itself.
"""

import contextlib
import ctypes
import sys
import threading
from functools import cache, lru_cache
from typing import NamedTuple

from numba import cuda
from numba.cuda import types
from numba.cuda.core import config

SIMULATOR = bool(config.ENABLE_CUDASIM)
if not SIMULATOR:
    from nbdelta.cuda import _cache

# compute capability of the oldest devices served: they have the instructions for bfloat16
OLDEST = (8, 0)
# up to here a launch needs no permission
_FREE_SHARED = 48 * 1024
# two handles of the default stream
_LEGACY = {0, 1}


def device(function):
    """Compile a function that kernels call; it becomes a part of them.

    No fastmath: Numba's form of it would let NaN and infinities go astray.
    """
    # the simulator puts its `cuda` into the file of the kernel, and calls helpers as they are
    return function if SIMULATOR else cuda.jit(function, device=True, forceinline=True, lto=False)


def intrinsic(simulated):
    """Make an intrinsic of a typing function, as Numba's decorator does, with a simulator twin.

    Parameters
    ----------
    simulated : callable
        What the simulator calls instead, with the same arguments.
    """
    if SIMULATOR:
        return lambda function: simulated
    from numba.cuda.extending import intrinsic

    return intrinsic


def kernel(threads, blocks_per_sm=1):
    """Make a `Kernel` of a function of a descriptor.

    Parameters
    ----------
    threads : int
        Threads in a block.
    blocks_per_sm : int, optional
        Blocks that are to fit on a multiprocessor at once; bounds the registers. None: the
        compiler is told neither that nor the number of threads. Told, it makes longer code for the
        addresses in some kernels.
    """

    def make(function):
        options = {"lto": False}
        if blocks_per_sm is not None:
            options["launch_bounds"] = threads, blocks_per_sm
        return Kernel(cuda.jit(function, **{} if SIMULATOR else options), threads)

    return make


def specialised(factory):
    """Make one kernel for each set of arguments of a factory, the disk cache's name for it.

    So the ``repr`` of the arguments must say all that the kernel depends on, but for the sources.
    """

    @cache
    def make(*options, **named):
        made = factory(*options, **named)
        made.key = factory.__module__, factory.__qualname__, options, sorted(named.items())
        return made

    return make


class Kernel:
    """A compiled kernel and its way to the device.

    Numba's own launch converts the argument number by number, which takes longer than a decode step
    runs; this one hands the driver the address of the descriptor.
    """

    def __init__(self, dispatcher, threads):
        self.dispatcher, self.threads = dispatcher, threads
        self.key = None  # in the disk cache
        self._functions = {}  # (length of the descriptor, device): CUfunction
        self._shared = {}  # the same: bytes of dynamic shared memory allowed so far
        self._lock = threading.Lock()

    def launch(self, grid, desc, place, shared=0):
        """Start the kernel; nothing is waited for.

        Parameters
        ----------
        grid : tuple of int
            Blocks along x, y and z; nothing happens when there are none.
        desc : contiguous int64 array
            The descriptor; copied before the call returns.
        place : tuple
            Device index and stream handle, as `place_of` returns them.
        shared : int
            Bytes of dynamic shared memory.
        """
        x, y, z = grid
        if not x * y * z:
            return
        index, stream = place
        key = len(desc), index
        if self._shared.get(key, -1) < shared:
            self._prepare(key, shared)
        function = self._functions[key]
        if function is None:  # the simulator, or something else that stands in for a device
            self.dispatcher[grid, (self.threads, 1, 1), 0, shared](tuple(desc.tolist()))
            return
        size = ctypes.c_size_t(desc.nbytes)
        # CU_LAUNCH_PARAM_BUFFER_POINTER, _BUFFER_SIZE, _END
        extra = (ctypes.c_void_p * 5)(1, desc.ctypes.data, 2, ctypes.addressof(size), 0)
        with _current(index):
            (error,) = _driver().cuLaunchKernel(
                *(function, x, y, z, self.threads, 1, 1, shared, stream, 0),
                ctypes.addressof(extra),
            )
        _check(error, self.dispatcher.py_func.__name__)

    def _prepare(self, key, shared):
        """Compile for a device and allow this much shared memory there."""
        length, index = key
        with self._lock:
            function, shared = self._functions.get(key), max(shared, self._shared.get(key, 0))
            if not SIMULATOR:
                with cuda.gpus[index]:
                    if function is None:
                        function = self._compiled(length, cuda.gpus[index].compute_capability)
                    if function is not None and shared > _FREE_SHARED:
                        # Numba never does (its issue 94), and the launch would fail
                        _allow_shared(function, shared)
            self._functions[key], self._shared[key] = function, shared

    def _compiled(self, length, capability):
        """Return the CUfunction on the current device; None when Numba has something else."""
        key = (*self.key, length, tuple(capability)) if self.key else None
        found = _cache.load(key) if key else None
        if found:
            with contextlib.suppress(RuntimeError):
                return _load_code(*found)
        compiled = self.dispatcher.compile((types.UniTuple(types.int64, length),))
        library = getattr(compiled, "_codelibrary", None)
        if library is None:
            return None
        if key:
            _cache.save(key, library._entry_name.encode(), library.get_cubin().code)
        return _function_of(library.get_cufunc().handle)


def devices():
    """Yield a line about each device."""
    if SIMULATOR:
        yield "Numba's simulator (NUMBA_ENABLE_CUDASIM)"
        return
    for index, found in enumerate(cuda.list_devices()):
        name = found.name.decode() if isinstance(found.name, bytes) else found.name
        major, minor = found.compute_capability
        shared = found.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN >> 10
        reason = device_rejection_reason(index)
        yield (
            f"cuda:{index} {name} (sm_{major}{minor}, {found.MULTIPROCESSOR_COUNT} "
            f"multiprocessors, {shared} KB of shared memory a block): {reason or 'ready'}"
        )


def driver_rejection_reason():
    """Say why no kernel can run in this process, or return None."""
    if SIMULATOR or cuda.is_available():
        return None
    return (
        "no NVIDIA driver with a device was found (nvidia-smi, which comes with the driver, shows "
        "both); CUDA 13 needs driver 580 or later, CUDA 12 driver 525"
    )


def device_rejection_reason(index):
    """Say why a device cannot be served, or return None."""
    if SIMULATOR:
        return None
    major, minor = cuda.gpus[index].compute_capability
    if (major, minor) < OLDEST:
        least = ".".join(map(str, OLDEST))
        return f"needs compute capability {least} or later, the device has {major}.{minor}"
    return None


class Limits(NamedTuple):
    """What a device has."""

    shared: int  # bytes of shared memory that a block may have
    processors: int  # multiprocessors


@lru_cache
def device_limits(index):
    """Return the `Limits` of a device."""
    if SIMULATOR:
        return Limits(227 * 1024, 1)
    found = cuda.gpus[index]
    return Limits(found.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, found.MULTIPROCESSOR_COUNT)


def place_of(view):
    """Where a kernel runs that works on an array: device index, and the caller's current stream."""
    return current_place(view.kind, view.device)


def current_place(kind, device):
    """The same for arrays of a library on a device."""
    index = int(device.partition(":")[2] or 0)
    if kind == "torch":
        return index, sys.modules["torch"].cuda.current_stream(index).cuda_stream
    if kind == "cupy":
        return index, sys.modules["cupy"].cuda.get_current_stream(index).ptr
    # CU_STREAM_PER_THREAD, or the legacy stream
    return index, 2 if getattr(config, "CUDA_PER_THREAD_DEFAULT_STREAM", 0) else 0


def follow(stream, place):
    """Let what is launched at a place from now on wait for what a stream has been given so far.

    The device waits, not the caller.
    """
    index, own = place
    if stream == own or {stream, own} <= _LEGACY:
        return
    driver = _driver()
    with _current(index):
        error, event = driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        _check(error, "an event")
        (error,) = driver.cuEventRecord(event, stream)
        _check(error, f"an event on stream {stream:#x}")
        (error,) = driver.cuStreamWaitEvent(own, event, 0)
        _check(error, f"waiting for stream {stream:#x}")
        driver.cuEventDestroy(event)  # as soon as it has come


@lru_cache
def _driver():
    from cuda.bindings import driver

    return driver


def _check(error, what):
    if error:
        raise RuntimeError(f"CUDA: {what}: {error.name}")


def _function_of(handle):
    """Return the CUfunction, in the current context, of what Numba has as a kernel."""
    driver = _driver()
    if isinstance(handle, driver.CUkernel):
        error, handle = driver.cuKernelGetFunction(handle)
        _check(error, "loading a kernel")
    return handle


def _load_code(name, code):
    driver = _driver()
    error, module = driver.cuModuleLoadData(code)
    _check(error, "loading a kernel")
    error, function = driver.cuModuleGetFunction(module, name)
    _check(error, "loading a kernel")
    return function


def _allow_shared(function, size):
    driver = _driver()
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (error,) = driver.cuFuncSetAttribute(function, attribute, size)
    _check(error, f"{size} bytes of shared memory for a block")


def _current(index):
    """Make a device current for a block of code, unless it is already."""
    error, device = _driver().cuCtxGetDevice()
    if not error and int(device) == index:
        return contextlib.nullcontext()
    return cuda.gpus[index]
