"""Which device, which algorithm, and the sentence why not."""

import importlib
import importlib.util
import sys
import threading
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from nbdelta.arrays import View
from nbdelta.checks import IndexArray
from nbdelta.forks import wait_for

if TYPE_CHECKING:
    from nbdelta.problem import Problem


def expect_one_device(
    names: Sequence[str], arrays: Sequence[View | None], host_too: Collection[str] = ()
) -> None:
    """Raise unless all arrays live on one device, and that one can be served.

    Parameters
    ----------
    names : sequence of str
        The arguments' names.
    arrays : sequence of View or None
        The arguments; the first one is there.
    host_too : collection of str
        The arguments that may be on the CPU whatever the device is.

    Raises
    ------
    ValueError
        When devices are mixed, or a device array has numbers across the borders of their size.
    RuntimeError
        When the device cannot be served, with the reason.
    """
    assert arrays[0] is not None
    device = arrays[0].device
    for name, x in zip(names, arrays, strict=True):
        if x is not None and x.device != device and not (name in host_too and x.device == "cpu"):
            where = [f"{n} on {a.device}" for n, a in zip(names, arrays, strict=True) if a]
            raise ValueError(
                f"all arrays must be on one device, got {', '.join(where)}; nothing is copied "
                "between devices behind your back"
            )
    if device == "cpu":
        return
    reason = rejection_reason(device)
    if reason is not None:
        raise RuntimeError(f"{names[0]}: is on {device}: {reason}")
    for name, x in zip(names, arrays, strict=True):
        if x is not None and x.device != "cpu" and not x.is_aligned():
            raise ValueError(
                f"{name}: {x.dtype} on {device} needs addresses that are multiples of "
                f"{x.itemsize}, got address {x.address:#x} and byte strides {list(x.strides)}"
            )


def rejection_reason(device: str) -> str | None:
    """Return why arrays on `device` cannot be served, or ``None`` when they can."""
    if device in _served:
        return None
    if device.partition(":")[0] != "cuda":
        return f"nbdelta has no kernels for {device}; move the arrays to the CPU"
    reason = cuda_rejection_reason() or _device_rejection_reason(device)
    if reason is None:
        _served.add(device)
    return reason


_served = {"cpu"}  # devices that were found fit


def cuda_rejection_reason() -> str | None:
    """Return why CUDA arrays cannot be served, or ``None`` when they can."""
    if importlib.util.find_spec("numba_cuda") is None:
        return (
            "nbdelta needs numba-cuda for CUDA arrays: pip install 'nbdelta[cu13]', or "
            "'nbdelta[cu12]' for a driver of CUDA 12 (nvidia-smi names its version)"
        )
    from nbdelta.cuda import _jit

    reason: str | None = _jit.driver_rejection_reason()
    return reason


def _device_rejection_reason(device: str) -> str | None:
    from nbdelta.cuda import _jit

    reason: str | None = _jit.device_rejection_reason(int(device.partition(":")[2] or 0))
    return reason


def to_device(array: IndexArray, like: View) -> View:
    """Bring a small array of integers that was checked on the host to the device of a view."""
    from nbdelta.cuda._arrays import upload

    brought: View = upload(array, like)
    return brought


# of modules that a first call imports; the child of a fork amid that could never import them
_importing = threading.RLock()
wait_for(_importing)


@lru_cache
def stage(name: str, device: str) -> Any:
    """Return the module with the host functions of a stage: the rooms are twins."""
    with _importing:
        try:
            return importlib.import_module(f"nbdelta.{device.partition(':')[0]}.{name}")
        except BaseException:
            _forget_orphans()
            raise


def _forget_orphans() -> None:
    """Let the next call import anew what belongs to packages whose import was interrupted.

    Python takes such a package back, but not the modules of it that were complete by then, and
    does not make them attributes of the package when that is imported again.
    """
    for name in sorted(sys.modules):
        package = name.rpartition(".")[0]
        ours = name.partition(".")[0] in ("numba", "llvmlite", "nbdelta")
        if ours and package and package not in sys.modules:
            del sys.modules[name]


def run(problem: "Problem", algorithm: str) -> None:
    """Fill the outputs of `problem`.

    Parameters
    ----------
    problem : Problem
        A validated call.
    algorithm : str
        ``"chunk"``, ``"recurrent"``, or ``"auto"``: token by token for sequences of at most one
        token, chunked for all others. It is picked for each sequence apart, so that packing
        or batching sequences never changes their bits.
    """
    if algorithm == "recurrent":
        _recurrent(problem)
    elif algorithm == "chunk":
        _chunk(problem)
    else:
        short, long = _lengths(problem)
        if short:
            _recurrent(problem, max_length=1)
        if long:
            _chunk(problem, min_length=2)


def _lengths(problem: "Problem") -> tuple[bool, bool]:
    """Whether there are sequences of at most one token, and whether there are longer ones."""
    if problem.cu_seqlens is None:
        return problem.T <= 1, problem.T > 1
    if problem.lengths is None:  # known to the device alone
        return True, True
    long = problem.lengths > 1
    return not long.all(), bool(long.any())


def _recurrent(problem: "Problem", max_length: int | None = None) -> None:
    stage("recurrent", problem.device).fused_recurrent_gated_delta_rule(problem, max_length)


def _chunk(problem: "Problem", min_length: int = 0) -> None:
    stage("chunk", problem.device).chunk_gated_delta_rule(problem, min_length)
