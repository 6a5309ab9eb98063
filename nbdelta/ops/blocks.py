"""Building blocks of the chunked algorithm, for use alone."""

from typing import cast

from nbdelta.arrays import Array
from nbdelta.blocks import (
    prepare_cumsum,
    prepare_gate,
    prepare_solve_triangular,
    prepare_solve_tril,
)
from nbdelta.checks import IndexLike
from nbdelta.dispatch import stage
from nbdelta.ops._apply import ArrayT, no_operator


@no_operator
def chunk_local_cumsum(
    x: ArrayT,
    chunk_size: int,
    *,
    axis: int = 1,
    reverse: bool = False,
    scale: float | None = None,
    cu_seqlens: IndexLike | None = None,
    out: Array | None = None,
) -> ArrayT:
    """Sum up along an axis, starting anew at each chunk.

    Parameters
    ----------
    x : array, any shape
        float32, float64, float16 or bfloat16. Any strides.
    chunk_size : int
        Entries per chunk, at least 1. The last chunk may be short.
    axis : int
        The axis to sum along, the tokens of ``[B, T, ...]`` by default.
    reverse : bool
        Whether entry ``t`` is the sum from ``t`` to the end of the chunk, instead of from its
        start to ``t``. It is added up from the end, never a difference of sums.
    scale : float, optional
        Factor of the sums. ``None`` is 1.
    cu_seqlens : array or sequence of int, shape ``[N + 1]``, optional
        Sequences packed along `axis`, rising from 0 to its length; chunks start anew with each.
    out : array, shape of `x`, optional
        float32, or float64 if `x` is. Must not overlap `x`, but may be `x` itself.

    Returns
    -------
    array, shape of `x`
        The sums in float32, of the kind of `x`; `out` itself when it was given.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `gated_delta_rule` does, before anything is written.

    Notes
    -----
    The prefix sums of the log decays in a chunk are the exponents of the chunked algorithm
    (arXiv 2412.06464, 2406.06484; per channel 2510.26692).

    Examples
    --------
    >>> import numpy as np
    >>> import nbdelta
    >>> x = np.arange(1, 6, dtype=np.float32)
    >>> print(nbdelta.chunk_local_cumsum(x, 3, axis=0))
    [1. 3. 6. 4. 9.]
    >>> print(nbdelta.chunk_local_cumsum(x, 3, axis=0, reverse=True))
    [6. 5. 3. 9. 5.]
    """
    source, target, size, axis, reverse, factor, cu = prepare_cumsum(
        x, chunk_size, axis, reverse, scale, cu_seqlens, out
    )
    stage("chunk_cumsum", source.device).chunk_local_cumsum(
        source, target, size, axis, reverse, factor, cu
    )
    return cast(ArrayT, target.owner)


@no_operator
def solve_tril(
    A: ArrayT, *, cu_seqlens: IndexLike | None = None, out: Array | None = None
) -> ArrayT:
    """Invert ``I + A`` chunk by chunk, for strictly lower triangular ``A``.

    Parameters
    ----------
    A : array, shape ``[B, T, H, BT]``
        Row ``t`` holds its chunk's row of ``A``; ``BT`` is 16, 32 or 64. Entries on or above the
        diagonal are ignored. float32, float64, float16 or bfloat16, any strides.
    cu_seqlens : array or sequence of int, shape ``[N + 1]``, optional
        Boundaries of packed sequences (``B`` is 1), rising from 0 to ``T``; chunks start anew
        with each.
    out : array, shape ``[B, T, H, BT]``, optional
        Of the kind and dtype of `A`; must not overlap it.

    Returns
    -------
    array, shape ``[B, T, H, BT]``
        ``(I + A)^-1`` in the dtype of `A`: unit diagonal, zeros above; columns past a short last
        chunk are zero. `out` itself when it was given.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `gated_delta_rule` does, before anything is written.

    Notes
    -----
    Diagonal blocks of 16 by forward substitution, the rest by block products
    ``Ai[i, j] = -Ai[i, i] @ sum_m A[i, m] @ Ai[m, j]``. This is the matrix ``T`` of the chunked
    delta rule (arXiv 2406.06484, 2412.06464, 2510.26692).

    Examples
    --------
    >>> import numpy as np
    >>> import nbdelta
    >>> A = np.zeros((1, 16, 1, 16), np.float32)
    >>> A[0, 1, 0, 0] = 0.5
    >>> float(nbdelta.solve_tril(A)[0, 1, 0, 0])
    -0.5
    """
    source, target, cu = prepare_solve_tril(A, cu_seqlens, out)
    stage("solve_tril", source.device).solve_tril(source, target, cu)
    return cast(ArrayT, target.owner)


@no_operator
def solve_triangular(
    L: Array, b: ArrayT, *, unit_diagonal: bool = False, out: Array | None = None
) -> ArrayT:
    """Solve ``L x = b`` for lower triangular matrices, a batch of them at once.

    Parameters
    ----------
    L : array, shape ``[..., n, n]``
        Only the lower triangle is read. float32, float64, float16 or bfloat16, any strides.
    b : array, shape ``[..., n, m]``
        Right-hand sides in the columns, in the dtype of `L`. The batch axes broadcast with those
        of `L` as in NumPy.
    unit_diagonal : bool
        Whether the diagonal is taken as 1 and not read.
    out : array, optional
        Of the kind and dtype of `b`, in the shape of the result; must not overlap an input.

    Returns
    -------
    array, shape ``[..., n, m]``
        ``x``, in the kind and dtype of `b`. Infinite or NaN where the diagonal has a zero.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `gated_delta_rule` does, before anything is written.

    Notes
    -----
    Forward substitution in blocks; the chunked delta rule (arXiv 2406.06484, 2412.06464,
    2510.26692) is built on such solves.

    Examples
    --------
    >>> import numpy as np
    >>> import nbdelta
    >>> L = np.array([[2, 0], [1, 4]], np.float32)
    >>> b = np.array([[2], [9]], np.float32)
    >>> print(nbdelta.solve_triangular(L, b).ravel())
    [1. 2.]
    """
    lower, right, target, unit = prepare_solve_triangular(L, b, unit_diagonal, out)
    stage("solve_tril", lower.device).solve_triangular(lower, right, target, unit)
    return cast(ArrayT, target.owner)


@no_operator
def fused_gate(
    x: ArrayT,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    *,
    lower_bound: float | None = None,
) -> ArrayT:
    """Compute the log decay from its raw form, as `use_gate_in_kernel` does.

    Parameters
    ----------
    x : array, shape ``[B, T, HV]`` or ``[B, T, HV, K]``
        Raw gate, float32, float64, float16 or bfloat16. Any strides.
    A_log : array, shape ``[HV]``, optional
        Zeros when ``None``.
    dt_bias : array, shape ``[HV]``, ``[HV * K]`` or ``[HV, K]``, optional
        Zeros when ``None``; with ``K`` only for `x` of four axes.
    lower_bound : float, optional
        A number below 0, the least log decay.

    Returns
    -------
    array, shape of `x`
        Natural logarithm of the decay, at most 0: ``-exp(A_log) * softplus(x + dt_bias)``, or
        with `lower_bound` ``lower_bound * sigmoid(exp(A_log) * (x + dt_bias))``. float32, or
        float64 for float64 `x`; of the kind of `x`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `gated_delta_rule` does, before anything is written.

    Notes
    -----
    The gates of Gated DeltaNet (arXiv 2412.06464, which builds on 2406.06484) and of Kimi Delta
    Attention (2510.26692).

    Examples
    --------
    >>> import numpy as np
    >>> import nbdelta
    >>> x = np.zeros((1, 1, 2), np.float32)
    >>> print(nbdelta.fused_gate(x).ravel().round(3))
    [-0.693 -0.693]
    >>> print(nbdelta.fused_gate(x, lower_bound=-5.0).ravel().round(3))
    [-2.5 -2.5]
    """
    raw, target, log, bias, bound = prepare_gate(x, A_log, dt_bias, lower_bound)
    stage("gate", raw.device).fused_gate(raw, target, log, bias, bound)
    return cast(ArrayT, target.owner)
