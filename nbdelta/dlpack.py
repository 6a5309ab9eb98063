"""What a DLPack capsule says of an array: on a device, or in bfloat16, which NumPy cannot read."""

import ctypes
from typing import Any, NamedTuple

CPU, CUDA, CUDA_MANAGED = 1, 2, 13
_TYPE_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}
# the default stream in DLPack's words
LEGACY_STREAM = 1


class _Tensor(ctypes.Structure):
    """The first member of DLManagedTensor, fixed by DLPack's ABI."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Described(NamedTuple):
    """An array as DLPack tells of it."""

    address: int
    index: int  # of the device
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None  # in elements; None: C-contiguous


def describe(x: Any, stream: int | None) -> Described:
    """Return where an array with ``__dlpack__`` lies.

    Parameters
    ----------
    x : object
        Stays the owner of its memory: the capsule is read and dropped.
    stream : int or None
        What will read it, after all that its library has under way; ``None`` on the CPU.

    Returns
    -------
    Described
        The dtype is a name such as ``"float32"``, also of types that nbdelta does not take.
    """
    capsule = x.__dlpack__(stream=stream)
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = get_pointer(capsule, b"dltensor")
    assert address is not None  # PyCapsule_GetPointer raises
    t = _Tensor.from_address(address)
    name = _TYPE_CODES.get(t.code, f"type {t.code} of DLPack ")
    dtype = name if name == "bool" else f"{name}{t.bits}" + (f"x{t.lanes}" if t.lanes != 1 else "")
    shape = tuple(t.shape[: t.ndim])
    strides = tuple(t.strides[: t.ndim]) if t.strides else None
    return Described((t.data or 0) + t.byte_offset, t.device_id, dtype, shape, strides)
