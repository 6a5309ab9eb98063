"""Kinds of array in and out: everything becomes an address with a shape and byte strides.

No array library but NumPy is imported here. Torch is looked up in ``sys.modules``: whoever holds a
tensor has imported it.
"""

import ctypes
import math
import sys
from functools import lru_cache
from typing import Any, Protocol, cast

import numpy as np

from nbdelta import dlpack
from nbdelta.array_view import ITEMSIZE as ITEMSIZE
from nbdelta.array_view import View as View
from nbdelta.result_memory import LARGE, new_bytes


class Array(Protocol):
    """Any array of a supported kind: NumPy, torch, CuPy, numba, or one with DLPack."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def dtype(self) -> object:
        """Type of the elements, in the words of the array's own library."""


# dtype objects of NumPy and torch to names; a miss takes the slow path and may add an entry
_NUMPY_DTYPES: dict[object, str] = {np.dtype(d): d for d in ITEMSIZE if d != "bfloat16"}
_TORCH_DTYPES: dict[object, str] = {}


def view(x: object, name: str) -> View:
    """Return `x` as a `View`, without a copy.

    Parameters
    ----------
    x : array
        NumPy array, torch tensor, or an object with ``__cuda_array_interface__`` or DLPack.
    name : str
        The argument's name, for the error.

    Returns
    -------
    View
        Of any dtype that has a name in `ITEMSIZE`.

    Raises
    ------
    TypeError
        When `x` is not such an array, is masked, sparse or byte-swapped, or has no plain numbers.
    ValueError
        When `x` is a torch tensor that requires a gradient, while gradients are recorded, or has
        a tangent.
    """
    if type(x) is np.ndarray:  # `_numpy_view` without the call, for the sake of decode steps
        dtype = _NUMPY_DTYPES.get(x.dtype) or _name_numpy_dtype(x.dtype, name)
        readonly = not x.flags.writeable
        return View(x, "numpy", "cpu", dtype, x.shape, x.strides, numpy_address(x), readonly)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return _torch_view(x, torch, name)
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name}: a masked array is not supported; fill it first (x.filled(...))")
    if isinstance(x, np.ndarray):
        return _numpy_view(x, x, "numpy", name)
    if not isinstance(x, type):  # classes have the attributes too
        if hasattr(x, "__cuda_ndarray__"):
            return _numba_view(x, name)
        if hasattr(x, "__cuda_array_interface__"):
            return _cuda_view(x, x.__cuda_array_interface__, name)
        if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
            if x.__dlpack_device__()[0] in (dlpack.CUDA, dlpack.CUDA_MANAGED):
                return _cuda_dlpack_view(x, name)
            return _host_dlpack_view(x, name)
    raise TypeError(
        f"{name}: expected an array (NumPy, torch, or one with DLPack), got {type(x).__name__}"
    )


def empty(like: View, shape: tuple[int, ...], dtype: str) -> View:
    """Return a new C-contiguous array of the kind and on the device of `like`.

    Parameters
    ----------
    like : View
        Of kind ``"dlpack"`` it yields a NumPy array, or Numba's on a CUDA device.
    shape : tuple of int
        Sizes of the axes.
    dtype : str
        One of the floating types in `ITEMSIZE`.

    Returns
    -------
    View
        Its ``owner`` is what the user gets; the contents are arbitrary.
    """
    owner: Any
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    if like.device != "cpu" and like.kind != "torch":
        return _empty_on_device(like, shape, dtype)
    recycled = like.device == "cpu" and nbytes >= LARGE
    if like.kind == "torch":
        torch = sys.modules["torch"]
        kind = getattr(torch, dtype)
        if recycled:
            owner = torch.from_numpy(new_bytes(nbytes)).view(kind).view(shape)
        else:
            owner = torch.empty(shape, dtype=kind, device=like.device)
        strides, address = _contiguous(shape, ITEMSIZE[dtype]), owner.data_ptr()
        return View(owner, "torch", like.device, dtype, shape, strides, address, False)
    if recycled:
        owner = new_bytes(nbytes).view(_numpy_dtype(dtype)).reshape(shape)
    else:
        owner = np.empty(shape, _numpy_dtype(dtype))
    return View(owner, "numpy", "cpu", dtype, shape, owner.strides, numpy_address(owner), False)


@lru_cache
def _contiguous(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the byte strides of a C-contiguous array."""
    strides = []
    step = itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    strides.reverse()
    return tuple(strides)


def as_numpy(x: View, name: str) -> np.ndarray[Any, np.dtype[Any]]:
    """Return the memory of a CPU view's owner as a NumPy array, without a copy.

    Parameters
    ----------
    x : View
        As `view` made it, on the CPU, of a dtype that NumPy has.
    name : str
        The argument's name, for the error.

    Returns
    -------
    numpy.ndarray
        The same memory.
    """
    owner: Any = x.owner
    if x.kind == "torch":
        return cast(np.ndarray[Any, np.dtype[Any]], owner.numpy())
    if x.kind == "dlpack":
        return _from_dlpack(owner, name)
    return np.asarray(owner)


def _numpy_view(owner: object, x: np.ndarray[Any, np.dtype[Any]], kind: str, name: str) -> View:
    dtype = _NUMPY_DTYPES.get(x.dtype) or _name_numpy_dtype(x.dtype, name)
    readonly = not x.flags.writeable
    return View(owner, kind, "cpu", dtype, x.shape, x.strides, numpy_address(x), readonly)


def _name_numpy_dtype(dtype: np.dtype[Any], name: str) -> str:
    """Name a dtype that has no entry yet: aliases, ml_dtypes' bfloat16, and all wrong ones."""
    if not dtype.isnative:
        raise TypeError(f"{name}: byte-swapped {dtype.str!r} is not supported; convert it first")
    # NumPy gives some types twice (int64 is both long and long long), and they hash alike or not
    known = dtype.name
    if known not in ITEMSIZE or dtype.itemsize != ITEMSIZE[known]:
        raise TypeError(f"{name}: expected an array of real numbers, got dtype {dtype}")
    _NUMPY_DTYPES[dtype] = known
    return known


@lru_cache
def _numpy_dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes  # the array that asks for it is ml_dtypes' or torch's

        name = ml_dtypes.bfloat16
    return np.dtype(name)


def _torch_view(x: Any, torch: Any, name: str) -> View:
    if not _TORCH_DTYPES:
        _TORCH_DTYPES.update({getattr(torch, d): d for d in ITEMSIZE if hasattr(torch, d)})
    dtype = _TORCH_DTYPES.get(x.dtype)
    if dtype is None or x.layout is not torch.strided or x.is_nested or x.is_neg():
        raise TypeError(
            f"{name}: expected a dense tensor of real numbers, got {x.dtype}, {x.layout}"
            + (", nested" if x.is_nested else "")
            + (", lazily negated (x.resolve_neg() helps)" if x.is_neg() else "")
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: requires a gradient, and none is recorded here; call under "
            "torch.no_grad(), or pass x.detach()"
        )
    expect_no_tangent(x, name)
    try:
        address = x.data_ptr()
    except RuntimeError as error:  # fake and functorch tensors
        raise TypeError(f"{name}: a tensor without memory of its own ({error})") from None
    device = "cpu" if x.is_cpu else str(x.device)
    shape = tuple(x.shape)
    if device == "meta" or (address == 0 and 0 not in shape):
        raise TypeError(f"{name}: a tensor without memory of its own (device {x.device})")
    strides = _in_bytes(x.stride(), ITEMSIZE[dtype])
    return View(x, "torch", device, dtype, shape, strides, address, False)


def expect_no_tangent(x: Any, name: str) -> None:
    """Raise when `x` is a dual tensor of forward-mode automatic differentiation.

    Parameters
    ----------
    x : object
        An argument, of any kind.
    name : str
        Its name, for the error.

    Raises
    ------
    ValueError
        When it has a tangent, which the result would be without.
    """
    torch = sys.modules.get("torch")
    if torch is None or torch.autograd.forward_ad._current_level < 0:
        return
    if isinstance(x, torch.Tensor) and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
        raise ValueError(
            f"{name}: has a tangent, and forward-mode differentiation (torch.autograd.forward_ad) "
            "is not supported; use reverse mode, or pass unpack_dual(x).primal"
        )


@lru_cache
def _in_bytes(strides: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple([itemsize * s for s in strides])


def _numba_view(x: Any, name: str) -> View:
    """View Numba's device arrays.

    Their CUDA array interface leaves out the strides of repeated axes and knows no bfloat16, and in
    the simulator they have none.
    """
    dtype = _NUMPY_DTYPES.get(x.dtype) or _name_numpy_dtype(x.dtype, name)
    host = getattr(x, "_ary", None)  # in the simulator
    if host is not None:
        at, readonly = numpy_address(host), not host.flags.writeable
        return View(x, "numba", "cuda:0", dtype, host.shape, host.strides, at, readonly)
    context = getattr(x.gpu_data, "context", None)
    index = 0 if context is None else context.device.id
    address = x.device_ctypes_pointer.value or 0
    if x.stream:
        _wait_for(int(x.stream), f"cuda:{index}")
    return View(x, "numba", f"cuda:{index}", dtype, x.shape, x.strides, address, False)


def _cuda_view(x: Any, interface: dict[str, Any], name: str) -> View:
    """View CuPy's and other CUDA arrays; torch tensors come by `_torch_view`."""
    try:
        dtype = np.dtype(interface["typestr"])
        shape = tuple(interface["shape"])
        strides = tuple(interface.get("strides") or _contiguous(shape, dtype.itemsize))
        address, readonly = interface["data"][0] or 0, interface["data"][1]
    except (KeyError, TypeError, ValueError) as error:
        raise TypeError(f"{name}: malformed __cuda_array_interface__ ({error!r})") from None
    own = getattr(x, "dtype", None)  # the interface has no word for bfloat16
    if isinstance(own, np.dtype) and own.itemsize == dtype.itemsize:
        dtype = own
    known = _NUMPY_DTYPES.get(dtype) or _name_numpy_dtype(dtype, name)
    if type(x).__module__.partition(".")[0] == "cupy":
        return View(x, "cupy", f"cuda:{x.device.id}", known, shape, strides, address, readonly)
    device = _device_of(address)
    if interface.get("stream") is not None:
        _wait_for(interface["stream"], device)
    return View(x, "dlpack", device, known, shape, strides, address, readonly)


def _device_of(address: int) -> str:
    from nbdelta.dispatch import cuda_rejection_reason

    if cuda_rejection_reason() is not None:
        return "cuda:0"  # the call will be refused for that reason, which says more
    from nbdelta.cuda._arrays import device_of

    return f"cuda:{device_of(address)}"


def _wait_for(stream: int, device: str) -> None:
    from nbdelta.dispatch import cuda_rejection_reason

    if cuda_rejection_reason() is None:
        from nbdelta.cuda._arrays import wait_for

        wait_for(stream, device)


def _host_dlpack_view(x: Any, name: str) -> View:
    try:
        return _numpy_view(x, _from_dlpack(x, name), "dlpack", name)
    except TypeError:
        try:
            found = dlpack.describe(x, None)
        except (BufferError, RuntimeError, TypeError, ValueError):
            found = None
        if found is None or found.dtype != "bfloat16" or x.__dlpack_device__()[0] != dlpack.CPU:
            raise
    # NumPy reads no bfloat16; whether it may be written to is not said
    return _dlpack_view(x, name, "cpu", found, readonly=True)


def _cuda_dlpack_view(x: Any, name: str) -> View:
    try:
        found = dlpack.describe(x, _stream_of_others())
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: {type(x).__name__} does not export its memory ({error})"
        ) from None
    return _dlpack_view(x, name, f"cuda:{found.index}", found, readonly=False)


def _dlpack_view(
    x: Any, name: str, device: str, found: dlpack.Described, *, readonly: bool
) -> View:
    if found.dtype not in ITEMSIZE:
        raise TypeError(f"{name}: expected an array of real numbers, got dtype {found.dtype}")
    itemsize = ITEMSIZE[found.dtype]
    if found.strides is None:
        strides = _contiguous(found.shape, itemsize)
    else:
        strides = _in_bytes(found.strides, itemsize)
    return View(x, "dlpack", device, found.dtype, found.shape, strides, found.address, readonly)


def _stream_of_others() -> int:
    """Return the stream that kernels for arrays of no known library run on, in DLPack's words."""
    from nbdelta.dispatch import cuda_rejection_reason

    if cuda_rejection_reason() is not None:
        return dlpack.LEGACY_STREAM
    from nbdelta.cuda._jit import current_place

    stream: int = current_place("dlpack", "cuda:0")[1]
    return stream or dlpack.LEGACY_STREAM


def _empty_on_device(like: View, shape: tuple[int, ...], dtype: str) -> View:
    owner: Any
    index = int(like.device.partition(":")[2])
    if like.kind == "cupy":
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(index):
            owner = cupy.empty(shape, _numpy_dtype(dtype))
        strides = _contiguous(shape, ITEMSIZE[dtype])
        return View(owner, "cupy", like.device, dtype, shape, strides, owner.data.ptr, False)
    from nbdelta.cuda._arrays import new

    return _numba_view(new(shape, _numpy_dtype(dtype), index), "out")


def _from_dlpack(x: Any, name: str) -> np.ndarray[Any, np.dtype[Any]]:
    try:
        return cast(np.ndarray[Any, np.dtype[Any]], np.from_dlpack(x))
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: {type(x).__name__} does not export CPU memory of a type that NumPy has "
            f"({error})"
        ) from None


# PyArrayObject's first field after the object header is the data pointer, fixed by NumPy's ABI
# (PyArray_DATA is compiled into every extension). Read there it takes 0.15 us;
# __array_interface__ takes 1.4 us, and a decode step asks for eight addresses.
_DATA_FIELD = object.__basicsize__
_pointer_at = ctypes.c_void_p.from_address


def _address_by_field(x: np.ndarray[Any, np.dtype[Any]]) -> int:
    return _pointer_at(id(x) + _DATA_FIELD).value or 0


def _address_by_interface(x: np.ndarray[Any, np.dtype[Any]]) -> int:
    return cast(int, x.__array_interface__["data"][0])


def _pick_address() -> Any:
    if sys.implementation.name != "cpython":
        return _address_by_interface
    probes = [np.arange(3.0), np.arange(3.0)[::-1], np.zeros((2, 2))[1:, 1:]]
    right = all(_address_by_field(p) == _address_by_interface(p) for p in probes)
    return _address_by_field if right else _address_by_interface


numpy_address = _pick_address()
