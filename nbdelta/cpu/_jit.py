"""The only place that calls ``numba.njit``: every option of the CPU kernels is here."""

import hashlib
import warnings
from pathlib import Path

import numba

# Numba's disk cache notices an edit of the file that defines a kernel, not of the files it
# imports. Every kernel refers to this number, which makes it a part of the cache key.
SOURCES = int.from_bytes(
    hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    ).digest()[:7]
)

# one per kernel: a descriptor of the call (see _call.py) and the number of the worker
SIGNATURE = "void(int64[::1], int64)"


def njit(signature=None, *, parallel=False):
    """Compile a function that kernels call.

    No fastmath: the tiles say themselves where a product and a sum become one ``fma``, and NaN,
    infinities and the order of every sum stay as written.
    """
    args = () if signature is None else (signature,)
    return numba.njit(*args, error_model="numpy", nogil=True, parallel=parallel)


def kernel(function):
    """Compile an entry point ``(desc, worker)`` at once, through the disk cache if there is one."""
    options = {"error_model": "numpy", "nogil": True}
    try:
        return numba.njit(SIGNATURE, cache=True, **options)(function)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "cannot cache" not in str(error):
            raise
        warnings.warn(
            f"nbdelta compiles its kernels anew in this process, the cache cannot be used: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return numba.njit(SIGNATURE, **options)(function)
