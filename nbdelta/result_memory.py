"""Memory of large new CPU arrays: on a line of the cache, and used again once nobody holds it.

The system clears memory at its first use. For the output of a long prefill that takes about a
tenth of the call, on every call, since such an array goes back to the system when it dies. Here
it is kept for the next call that asks for as many bytes; a call that asks for others gives all
that is kept back first, so nothing adds to the memory that a call needs.
"""

from typing import Any

import numpy as np

LINE = 64
LARGE = 256 << 10
KEPT_AT_MOST = 256 << 20

# what nobody holds, by its size and address. Arrays may die in any thread and in the midst of
# this code: single operations on a dictionary, no lock
_free: dict[tuple[int, int], "np.ndarray[Any, Any]"] = {}


class _Block:
    """Owner of the memory of one array and its views."""

    def __init__(self, nbytes: int, memory: "np.ndarray[Any, Any]") -> None:
        address = memory.ctypes.data
        # all that is needed at the end, which may come after that of the modules
        self._memory, self._key, self._free = memory, (nbytes, address), _free
        self.__array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (-(-address // LINE) * LINE, False),
            "version": 3,
        }

    def __del__(self, most: int = KEPT_AT_MOST) -> None:
        if sum(nbytes for nbytes, _ in list(self._free)) + self._key[0] <= most:
            self._free[self._key] = self._memory


def new_bytes(nbytes: int) -> "np.ndarray[Any, Any]":
    """Return an array of bytes with arbitrary contents.

    Parameters
    ----------
    nbytes : int
        At least `LARGE`: less is as well with an ordinary array.
    """
    for key in list(_free):
        memory = _free.pop(key, None) if key[0] == nbytes else None
        if memory is not None:
            return np.asarray(_Block(nbytes, memory))
    _free.clear()
    return np.asarray(_Block(nbytes, np.empty(nbytes + LINE, np.uint8)))
