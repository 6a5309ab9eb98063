"""Which device, which algorithm, and the sentence why not."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nbdelta.arrays import View

if TYPE_CHECKING:
    from nbdelta.problem import Problem


def expect_one_device(names: Sequence[str], arrays: Sequence[View | None]) -> None:
    """Raise unless all arrays live on one device, and that one can be served.

    Parameters
    ----------
    names : sequence of str
        The arguments' names.
    arrays : sequence of View or None
        The arguments; the first one is there.

    Raises
    ------
    ValueError
        When devices are mixed; the arrays are named.
    RuntimeError
        When the device cannot be served, with the reason.
    """
    assert arrays[0] is not None
    device = arrays[0].device
    for x in arrays:
        if x is not None and x.device != device:
            where = [f"{n} on {a.device}" for n, a in zip(names, arrays, strict=True) if a]
            raise ValueError(
                f"all arrays must be on one device, got {', '.join(where)}; nothing is copied "
                "between devices behind your back"
            )
    if device != "cpu":
        reason = rejection_reason(device)
        if reason is not None:
            raise RuntimeError(f"{names[0]}: is on {device}: {reason}")


def rejection_reason(device: str) -> str | None:
    """Return why arrays on `device` cannot be served, or ``None`` when they can."""
    if device == "cpu":
        return None
    if device.startswith("cuda"):
        return cuda_rejection_reason()
    return f"nbdelta has no kernels for {device}; move the arrays to the CPU"


def cuda_rejection_reason() -> str | None:
    """Return why CUDA arrays cannot be served, or ``None`` when they can."""
    return "nbdelta has no CUDA kernels in this version; move the arrays to the CPU"


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
    long = np.diff(problem.cu_seqlens) > 1
    return not long.all(), bool(long.any())


def _recurrent(problem: "Problem", max_length: int | None = None) -> None:
    from nbdelta.cpu import recurrent

    recurrent.fused_recurrent_gated_delta_rule(problem, max_length)


def _chunk(problem: "Problem", min_length: int = 0) -> None:
    from nbdelta.cpu import chunk

    chunk.chunk_gated_delta_rule(problem, min_length)
