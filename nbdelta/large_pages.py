"""Large pages for large new tensors, as NumPy asks for them.

The system clears memory at its first use, a page at a time. PyTorch leaves pages at 4 KB, and what
a training step allocates then costs about as much time as a forward pass.
"""

import ctypes
import sys
from functools import cache
from typing import Any

PAGE = 2 << 20
_MADV_HUGEPAGE = 14


def ask_for_large_pages(address: int, nbytes: int) -> None:
    """Say that memory nobody has used yet should come in large pages, where there are any.

    Parameters
    ----------
    address, nbytes : int
        Of the memory; only whole large pages in it are asked for.
    """
    first, end = -(-address // PAGE) * PAGE, (address + nbytes) // PAGE * PAGE
    madvise = _madvise() if end > first else None
    if madvise is not None:
        madvise(first, end - first, _MADV_HUGEPAGE)  # a system without them says no, which is fine


@cache
def _madvise() -> Any:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function
