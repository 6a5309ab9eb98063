"""The chunked algorithm, under both of its names, and its gradients."""

from typing import cast

from nbdelta.arrays import Array
from nbdelta.checks import IndexLike
from nbdelta.dispatch import run
from nbdelta.gradients import fill_gradients, keep_states, prepare_gradients
from nbdelta.ops._apply import ArrayT, apply, no_operator


def chunk_gated_delta_rule(
    q: ArrayT,
    k: Array,
    v: Array,
    g: Array | None,
    beta: Array | None,
    scale: float | None = None,
    initial_state: Array | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    lower_bound: float | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: IndexLike | None = None,
    head_order: str = "interleaved",
    chunk_size: int | None = None,
    precision: str | None = None,
    checkpoint_interval: int | None = None,
    out: Array | None = None,
) -> tuple[ArrayT, ...]:
    """Apply the gated delta rule chunk by chunk, whatever the lengths.

    The same function as `gated_delta_rule`, which see for the arguments at length. Sequences of one
    token are faster with `fused_recurrent_gated_delta_rule`.

    Parameters
    ----------
    q, k : array, shape ``[B, T, H, K]``
        Queries and keys.
    v : array, shape ``[B, T, HV, V]``
        Values, in the dtype of `q`.
    g : array, shape ``[B, T, HV]`` or ``[B, T, HV, K]``, or None
        Natural logarithm of the decay; ``None`` is no decay.
    beta : array, shape ``[B, T, HV]``, or None
        Strength of the write; ``None`` is 1.
    scale : float, optional
        Factor of the output. ``None`` is ``K ** -0.5``.
    initial_state : array, shape ``[N, HV, K, V]``, optional
        The state before the first token of each sequence; not modified.
    output_final_state, use_qk_l2norm_in_kernel : bool
        As in `gated_delta_rule`.
    use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first : bool
        As in `gated_delta_rule`.
    A_log, dt_bias : array, optional
        As in `gated_delta_rule`, shape ``[HV]``; dt_bias also ``[HV * K]`` or ``[HV, K]``.
    lower_bound : float, optional
        As in `gated_delta_rule`.
    cu_seqlens : array or sequence of int, shape ``[N + 1]``, optional
        As in `gated_delta_rule`.
    head_order : {"interleaved", "tiled"}
        As in `gated_delta_rule`.
    chunk_size : {16, 32, 64}, optional
        Tokens per chunk. ``None`` picks.
    precision : {"highest"}, optional
        As in `gated_delta_rule`.
    checkpoint_interval : int, optional
        Keep the states after every so many tokens of each sequence as well.
    out : array, shape ``[B, T, HV, V]``, optional
        Array for ``o``; must not overlap any input.

    Returns
    -------
    o : array, shape ``[B, T, HV, V]``
        Outputs in the kind and dtype of `q`.
    final_state : array, shape ``[N, HV, K, V]``, or None
        As in `gated_delta_rule`.
    checkpoints : array, shape ``[n, HV, K, V]``
        Only with `checkpoint_interval`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `gated_delta_rule` does, before anything is written.

    Notes
    -----
    Within a chunk the states are eliminated by a triangular solve (arXiv 2406.06484), with the
    decay of 2412.06464, or of 2510.26692 for a gate per channel. Torch tensors get gradients, as in
    `gated_delta_rule`.

    Examples
    --------
    >>> import numpy as np
    >>> import nbdelta
    >>> q = k = np.ones((1, 2, 1, 1), np.float32)
    >>> v = np.array([1, 2], np.float32).reshape(1, 2, 1, 1)
    >>> beta = np.full((1, 2, 1), 0.5, np.float32)
    >>> o, _ = nbdelta.chunk_gated_delta_rule(q, k, v, None, beta)
    >>> print(o.ravel().round(3))
    [0.5  1.25]
    """
    arrays = (
        q, k, v, g, beta, initial_state, A_log, dt_bias, out, cu_seqlens,
        None, None,
    )  # fmt: skip
    options = (
        "chunk", scale, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel,
        lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, head_order,
        chunk_size, precision, checkpoint_interval, False, False,
    )  # fmt: skip
    return apply(arrays, options)


def chunk_kda(
    q: ArrayT,
    k: Array,
    v: Array,
    g: Array | None,
    beta: Array | None,
    scale: float | None = None,
    initial_state: Array | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    lower_bound: float | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: IndexLike | None = None,
    head_order: str = "interleaved",
    chunk_size: int | None = None,
    precision: str | None = None,
    checkpoint_interval: int | None = None,
    out: Array | None = None,
) -> tuple[ArrayT, ...]:
    """Apply Kimi Delta Attention chunk by chunk: the gated delta rule with a gate per key channel.

    `chunk_gated_delta_rule` under FLA's name for it; `g` must have the axis ``K``. See
    `gated_delta_rule` for the arguments at length.

    Parameters
    ----------
    q, k : array, shape ``[B, T, H, K]``
        Queries and keys.
    v : array, shape ``[B, T, HV, V]``
        Values, in the dtype of `q`.
    g : array, shape ``[B, T, HV, K]``
        Natural logarithm of the decay of each key channel.
    beta : array, shape ``[B, T, HV]``, or None
        Strength of the write; ``None`` is 1.
    scale : float, optional
        Factor of the output. ``None`` is ``K ** -0.5``.
    initial_state : array, shape ``[N, HV, K, V]``, optional
        The state before the first token of each sequence; not modified.
    output_final_state, use_qk_l2norm_in_kernel : bool
        As in `gated_delta_rule`.
    use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first : bool
        As in `gated_delta_rule`.
    A_log, dt_bias : array, optional
        As in `gated_delta_rule`, shape ``[HV]``; dt_bias also ``[HV * K]`` or ``[HV, K]``.
    lower_bound : float, optional
        As in `gated_delta_rule`.
    cu_seqlens : array or sequence of int, shape ``[N + 1]``, optional
        As in `gated_delta_rule`.
    head_order : {"interleaved", "tiled"}
        As in `gated_delta_rule`.
    chunk_size : {16, 32, 64}, optional
        Tokens per chunk. ``None`` picks.
    precision : {"highest"}, optional
        As in `gated_delta_rule`.
    checkpoint_interval : int, optional
        Keep the states after every so many tokens of each sequence as well.
    out : array, shape ``[B, T, HV, V]``, optional
        Array for ``o``; must not overlap any input.

    Returns
    -------
    o : array, shape ``[B, T, HV, V]``
        Outputs in the kind and dtype of `q`.
    final_state : array, shape ``[N, HV, K, V]``, or None
        As in `gated_delta_rule`.
    checkpoints : array, shape ``[n, HV, K, V]``
        Only with `checkpoint_interval`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `gated_delta_rule` does, before anything is written.

    Notes
    -----
    arXiv 2510.26692; the chunked form is that of 2406.06484, the gated rule that of 2412.06464.
    Torch tensors get gradients, as in `gated_delta_rule`.

    Examples
    --------
    >>> import numpy as np
    >>> import nbdelta
    >>> q = k = np.ones((1, 2, 1, 2), np.float32)
    >>> v = np.ones((1, 2, 1, 1), np.float32)
    >>> g = np.zeros((1, 2, 1, 2), np.float32)
    >>> g[..., 1] = -np.inf  # the second channel forgets everything
    >>> beta = np.full((1, 2, 1), 0.5, np.float32)
    >>> o, _ = nbdelta.chunk_kda(q, k, v, g, beta, scale=1.0)
    >>> print(o.ravel().round(3))
    [1. 1.]
    """
    arrays = (
        q, k, v, g, beta, initial_state, A_log, dt_bias, out, cu_seqlens,
        None, None,
    )  # fmt: skip
    options = (
        "chunk", scale, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel,
        lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, head_order,
        chunk_size, precision, checkpoint_interval, False, True,
    )  # fmt: skip
    return apply(arrays, options)


@no_operator
def chunk_gated_delta_rule_bwd(
    q: ArrayT,
    k: Array,
    v: Array,
    g: Array | None,
    beta: Array | None,
    do: Array | None,
    dht: Array | None = None,
    scale: float | None = None,
    initial_state: Array | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    lower_bound: float | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: IndexLike | None = None,
    head_order: str = "interleaved",
    precision: str | None = None,
) -> tuple[ArrayT | None, ...]:
    """Compute the gradients of `chunk_gated_delta_rule`, for both gate layouts.

    The gradients of ``sum(do * o) + sum(dht * final_state)``. Torch tensors that require a gradient
    get it without this function.

    Parameters
    ----------
    q, k : array, shape ``[B, T, H, K]``
        Queries and keys.
    v : array, shape ``[B, T, HV, V]``
        Values, in the dtype of `q`.
    g : array, shape ``[B, T, HV]`` or ``[B, T, HV, K]``, or None
        Natural logarithm of the decay, or raw gates; ``None`` is no decay.
    beta : array, shape ``[B, T, HV]``, or None
        Strength of the write; ``None`` is 1.
    do : array, shape ``[B, T, HV, V]``, or None
        Gradient of the output, in any floating dtype; ``None`` is zeros, and then `dht` is needed.
    dht : array, shape ``[N, HV, K, V]``, optional
        Gradient of the final state, in any floating dtype and in the layout of the states; zeros
        when ``None``.
    scale : float, optional
        Factor of the output. ``None`` is ``K ** -0.5``.
    initial_state : array, shape ``[N, HV, K, V]``, optional
        The state before the first token of each sequence.
    use_qk_l2norm_in_kernel : bool
        As in `gated_delta_rule`.
    use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first : bool
        As in `gated_delta_rule`.
    A_log, dt_bias : array, optional
        As in `gated_delta_rule`, shape ``[HV]``; dt_bias also ``[HV * K]`` or ``[HV, K]``.
    lower_bound : float, optional
        As in `gated_delta_rule`.
    cu_seqlens : array or sequence of int, shape ``[N + 1]``, optional
        As in `gated_delta_rule`.
    head_order : {"interleaved", "tiled"}
        As in `gated_delta_rule`.
    precision : {"highest"}, optional
        As in `gated_delta_rule`, for the states, which are computed once more. All other products
        are those of float32, or float64 with float64 inputs; on GPUs, with bfloat16 and float16
        inputs, of numbers of 16 bits. Automatic gradients have the precision of their call.

    Returns
    -------
    dq, dk, dv, dg, dbeta, dh0 : array or None
        Gradients of q, k, v, g, beta and initial_state, in their shapes and dtypes and of the kind
        of `q`; ``None`` for an argument that is ``None``. Those of what was given: of the raw gate,
        the logit of beta, the vector before it was normalised.
    dA_log, ddt_bias : array or None
        Only with `use_gate_in_kernel`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `gated_delta_rule` does, before anything is written.

    Notes
    -----
    The states at every 128th token are kept (on GPUs every 64th) and all others made anew. On the
    CPU what every token wrote is kept as well, but for bfloat16. Gradients do not depend on the
    number of threads, and those of a sequence not on the batch it is in, to the last bit; all but
    those of `A_log` and `dt_bias`, which are sums over sequences, in their order. The backward pass
    of arXiv 2412.06464 and 2510.26692, with the solve of 2406.06484.

    Examples
    --------
    >>> import numpy as np
    >>> import nbdelta
    >>> q = k = np.ones((1, 1, 1, 1), np.float32)
    >>> v, do = 2 * q, 3 * q
    >>> beta = np.full((1, 1, 1), 0.5, np.float32)
    >>> dq, dk, dv, dg, dbeta, dh0 = nbdelta.chunk_gated_delta_rule_bwd(q, k, v, None, beta, do)
    >>> print(dq.item(), dv.item(), dbeta.item(), dg, dh0)
    3.0 1.5 6.0 None None
    """
    arrays = (
        q, k, v, g, beta, initial_state, A_log, dt_bias, None, cu_seqlens, None, None,
    )  # fmt: skip
    options = (
        scale, False, use_qk_l2norm_in_kernel, use_gate_in_kernel, lower_bound,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, head_order,
        None, precision, None, False, False,
    )  # fmt: skip
    gradients = prepare_gradients(arrays, options, do, dht)
    states = keep_states(gradients.problem)
    if states.shape[0]:
        run(gradients.problem, "chunk")  # its output is overwritten with the gradient of v
    fill_gradients(gradients)
    return cast("tuple[ArrayT | None, ...]", gradients.results())
