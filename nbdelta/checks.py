"""Checks of single arguments; each error names the argument, what was expected and what came."""

import math
import numbers
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from nbdelta.arrays import Array, View, as_numpy, view

FLOATS = ("float32", "float64", "float16", "bfloat16")
INTEGERS = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")

DEVICE_INTEGERS = ("int64", "int32")

IndexLike: TypeAlias = Array | Sequence[Any]
IndexArray: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Size: TypeAlias = int | str  # a letter where any size will do


def brackets(sizes: Sequence[object]) -> str:
    """Write sizes or letters as ``[2, 64, 4, 128]``."""
    return f"[{', '.join(map(str, sizes))}]"


def in_letters(letters: str, sizes: Sequence[Size]) -> str:
    """Write ``[B, T, H] = [2, 64, 4]``; the letters alone when no size is known."""
    names = letters.split()
    if all(isinstance(n, str) for n in sizes):
        return brackets(names)
    return f"{brackets(names)} = {brackets(sizes)}"


def wrong_shape(name: str, expected: str, got: Sequence[int]) -> ValueError:
    """Return the error of an array whose shape is not the `expected` one."""
    return ValueError(f"{name}: expected {expected}, got {brackets(got)}")


def expect_shape(x: View, name: str, letters: str, sizes: tuple[int, ...]) -> None:
    """Raise unless `x` has these sizes."""
    if x.shape != sizes:
        raise wrong_shape(name, in_letters(letters, sizes), x.shape)


def expect_float(x: View, name: str) -> None:
    """Raise unless `x` has a real floating dtype."""
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected {' or '.join(FLOATS)}, got {x.dtype}")


def expect_dtype(x: View, name: str, dtype: str, why: str) -> None:
    """Raise unless `x` has this dtype; `why` says where it comes from."""
    if x.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype} ({why}), got {x.dtype}")


def expect_writable(x: View, name: str) -> None:
    """Raise when `x` is read-only, or two of its elements share memory."""
    if x.readonly:
        raise ValueError(f"{name}: is written to, but the array is read-only")
    if x.overlaps_itself():
        raise ValueError(
            f"{name}: is written to, but elements of it share memory (shape {brackets(x.shape)}, "
            f"byte strides {brackets(x.strides)})"
        )


def expect_apart(
    names: Sequence[str],
    arrays: Sequence[View | None],
    extents: Sequence[tuple[int, int]],
    written: int,
) -> None:
    """Raise when the bytes of array number `written` meet those of another one.

    The ranges from first to last byte are compared, so views that interleave count as meeting.
    """
    target = arrays[written]
    assert target is not None
    low, high = target.address + extents[written][0], target.address + extents[written][1]
    for i, x in enumerate(arrays):
        if x is None or i == written:
            continue
        start, end = extents[i]
        if x.address + start < high and low < x.address + end:
            raise ValueError(
                f"{names[written]}: is written to, but shares memory with {names[i]} (bytes "
                f"{low:#x} to {high:#x} and {x.address + start:#x} to {x.address + end:#x})"
            )


def expect_like(out: View, name: str, like: View, like_name: str) -> None:
    """Raise unless `out` is an array of the library of `like`."""
    kind = like.kind
    if kind == "dlpack":
        kind = "numpy" if like.device == "cpu" else "numba"
    if out.kind not in (kind, like.kind):
        raise TypeError(f"{name}: expected a {kind} array (as {like_name} is), got {out.kind}")


def flag(x: object, name: str) -> bool:
    """Return `x` as a bool, or raise a TypeError."""
    if x is True or x is False:
        return x
    if isinstance(x, np.bool_):
        return bool(x)
    raise TypeError(f"{name}: expected True or False, got {_show(x)}")


def positive_int(x: object, name: str) -> int:
    """Return `x` as an int of at least 1, or raise.

    It is held to what an int64 can count; no array is that long, so nothing else changes.
    """
    number = integer(x, name)
    if number < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {number}")
    return min(number, 2**62)


def integer(x: object, name: str) -> int:
    """Return `x` as an int, or raise a TypeError; a bool is not an integer here."""
    if isinstance(x, int | np.integer) and not isinstance(x, bool):
        return int(x)
    raise TypeError(f"{name}: expected an integer, got {_show(x)}")


def finite_real(x: object, name: str) -> float:
    """Return `x` as a finite float, or raise; a bool is not a number here."""
    if type(x) is not float:
        if not isinstance(x, numbers.Real) or isinstance(x, bool):
            raise TypeError(f"{name}: expected a real number, got {_show(x)}")
        try:
            x = float(x)
        except OverflowError:
            x = math.inf
    if not math.isfinite(x):
        raise ValueError(f"{name}: expected a finite number, got {x}")
    return x


def one_of(x: object, name: str, choices: tuple[object, ...]) -> Any:
    """Return the choice that `x` is, or raise; types are told apart (True is not 1)."""
    if type(x) is str and x in choices:
        return x
    kinds = tuple({type(c) for c in choices if c is not None})
    if x is None and None in choices:
        return None
    if int in kinds:
        x = integer(x, name)
    elif not isinstance(x, kinds):
        raise TypeError(f"{name}: expected {_list(choices)}, got {_show(x)}")
    for choice in choices:
        if x == choice:
            return choice
    raise ValueError(f"{name}: expected {_list(choices)}, got {x!r}")


def index_view(x: object, name: str) -> View:
    """Return an array of integers, or a sequence of them, as a view."""
    if isinstance(x, list | tuple):
        return view(_from_sequence(x, name), name)
    seen = view(x, name)
    if seen.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected integers, got {seen.dtype}")
    return seen


def read_indices(x: View, name: str) -> IndexArray | View:
    """Return a contiguous int64 copy of an array of integers; a view that is on a device itself.

    A copy, because kernels trust what was checked, and the caller's memory may change. What is on
    a device is not read by the host, and its kernels trust nothing.
    """
    if x.device != "cpu":
        if x.dtype not in DEVICE_INTEGERS:
            expected = " or ".join(DEVICE_INTEGERS)
            raise TypeError(f"{name}: expected {expected} on {x.device}, got {x.dtype}")
        return x
    array = as_numpy(x, name)
    if x.dtype == "uint64" and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: {array.max()} is out of range")
    return np.array(array, np.int64, order="C")


def _from_sequence(x: Sequence[Any], name: str) -> np.ndarray[Any, np.dtype[Any]]:
    rows = [list(row) if isinstance(row, list | tuple) else row for row in x]
    flat = [i for row in rows for i in (row if isinstance(row, list) else [row])]
    for i in flat:
        integer(i, name)
    lengths = {len(row) if isinstance(row, list) else -1 for row in rows}
    if len(lengths) > 1:
        raise ValueError(f"{name}: rows of different lengths")
    try:
        return np.array(rows, np.int64)
    except OverflowError:
        raise ValueError(f"{name}: {max(flat, key=abs)} is out of range") from None


def _show(x: object) -> str:
    text = repr(x) if isinstance(x, bool | int | float | complex | str | None) else ""
    return f"{text} ({type(x).__name__})" if text else type(x).__name__


def _list(choices: tuple[object, ...]) -> str:
    return " or ".join(map(repr, choices))
