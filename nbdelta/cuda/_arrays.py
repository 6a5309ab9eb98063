"""Numba's own device arrays, for whoever brings no array library of another kind."""

import sys
from collections import OrderedDict

import numpy as np
from numba import cuda

from nbdelta.arrays import view
from nbdelta.cuda._jit import SIMULATOR, current_place, follow, place_of

# index arrays from the host that were brought to a device, by place and contents: every layer of a
# model asks for the same ones
_uploaded = OrderedDict()
_UPLOADED_AT_MOST = 64


def new(shape, dtype, index):
    """Return a new array on a device.

    Parameters
    ----------
    shape : tuple of int
        Sizes of the axes.
    dtype : numpy.dtype
        Type of the elements.
    index : int
        Number of the device.

    Returns
    -------
    numba device array
        C-contiguous; the contents are arbitrary.
    """
    if SIMULATOR:
        return cuda.device_array(shape, dtype)
    with cuda.gpus[index]:
        return cuda.device_array(shape, dtype)


def send(array, index=0):
    """Return a NumPy array's numbers on a device."""
    array = np.ascontiguousarray(array)
    if SIMULATOR:
        return cuda.to_device(array)
    # Numba copies what has a buffer, and bfloat16 has none
    plain = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
    with cuda.gpus[index]:
        there = cuda.to_device(plain)
    return there if plain is array else there.view(array.dtype)


def fetch(x):
    """Return a device array's numbers as a NumPy array; waits for what is under way."""
    return x.copy_to_host()


def device_of(address):
    """Return the number of the device that memory is on; 0 where there is only one."""
    if SIMULATOR or len(cuda.gpus) == 1 or not address:
        return 0
    from cuda.bindings import driver

    ordinal = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    error, index = driver.cuPointerGetAttribute(ordinal, address)
    if error:
        raise ValueError(f"not device memory ({error.name})")
    return int(index)


def wait_for(stream, device):
    """Let the kernels for arrays of no known library wait for what a stream has been given so far.

    Parameters
    ----------
    stream : int
        Handle of the stream on which an array is written, as its CUDA array interface names it.
    device : str
        Where the array is.
    """
    if not SIMULATOR:
        follow(stream, current_place("numba", device))


def _is_captured(kind, index):
    """Whether what is asked of the current stream becomes a part of a CUDA graph."""
    if kind == "torch":
        return sys.modules["torch"].cuda.is_current_stream_capturing()
    if kind == "cupy":
        return sys.modules["cupy"].cuda.get_current_stream(index).is_capturing()
    return False


def upload(array, like):
    """Bring a small array of integers to the device of a view, in the order of its stream.

    Parameters
    ----------
    array : int64 array
        Contiguous; nobody changes it.
    like : View
        An array of the call.

    Returns
    -------
    View
        Of an array of the library of `like`, or Numba's. It is kept for the next call with an equal
        one.
    """
    index, stream = place_of(like)
    # nor may a graph hold the address of an array that is kept only until others take its place
    if _is_captured(like.kind, index):
        raise RuntimeError(
            "while a CUDA graph is captured, cu_seqlens, state_indices and num_accepted_tokens "
            "must be on the device: a graph cannot hold a copy from the host"
        )
    key = like.kind, index, stream, array.shape, array.tobytes()
    if key in _uploaded:
        _uploaded.move_to_end(key)
        return _uploaded[key]
    if like.kind == "torch":
        torch = sys.modules["torch"]
        # the memory is pageable, so the driver has taken what it needs when the call returns
        owner = torch.from_numpy(array).to(like.device, non_blocking=True)
    elif like.kind == "cupy":
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(index):
            owner = cupy.asarray(array)
    else:
        owner = send(array, index)
    _uploaded[key] = view(owner, "indices")
    if len(_uploaded) > _UPLOADED_AT_MOST:
        _uploaded.popitem(last=False)
    return _uploaded[key]
