"""Machine code of kernels on the disk, so that the next process need not compile them again.

A file that cannot be read, is damaged or belongs to other sources counts as none; a folder that
cannot be written costs the time to compile, and nothing else.
"""

import contextlib
import hashlib
import os
import tempfile
from functools import lru_cache
from pathlib import Path

import numba_cuda
from numba.cuda.cudadrv import nvvm

_DIGEST = hashlib.sha256().digest_size


@lru_cache
def _sources():
    """Digest of all that machine code depends on, apart from the kernel and the device."""
    digest = hashlib.sha256(f"{numba_cuda.__version__} {nvvm.NVVM().get_version()}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def folder():
    """Where the files are: NUMBA_CACHE_DIR, or next to the sources, or the user's own cache."""
    if named := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(named) / "nbdelta-cuda"
    beside = Path(__file__).parent / "__pycache__"
    if os.access(beside if beside.exists() else beside.parent, os.W_OK):
        return beside
    return Path.home() / ".cache" / "nbdelta-cuda"


def _path(key):
    return folder() / f"{hashlib.sha256(f'{_sources()} {key!r}'.encode()).hexdigest()[:32]}.cubin"


def load(key):
    """Return the name of a kernel in its machine code, and that code; None when it is not here.

    Parameters
    ----------
    key : tuple
        Of a ``repr`` that is the same in every process: the kernel, its options and the device.
    """
    try:
        data = _path(key).read_bytes()
    except OSError:
        return None
    digest, content = data[:_DIGEST], data[_DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        return None
    name, _, code = content.partition(b"\0")
    return name, code


def save(key, name, code):
    """Keep what `load` will return. Processes that do so at once do not disturb each other."""
    content = name + b"\0" + code
    path = _path(key)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(file.name, path)
