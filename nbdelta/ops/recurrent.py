"""The token-by-token algorithm, under both of its names."""

from nbdelta.arrays import Array
from nbdelta.checks import IndexLike
from nbdelta.ops._apply import ArrayT, apply


def fused_recurrent_gated_delta_rule(
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
    precision: str | None = None,
    checkpoint_interval: int | None = None,
    state_indices: IndexLike | None = None,
    num_accepted_tokens: IndexLike | None = None,
    inplace_final_state: bool = False,
    out: Array | None = None,
) -> tuple[ArrayT, ...]:
    """Apply the gated delta rule token by token; a decode step when ``T`` is 1.

    The same function as `gated_delta_rule`, which see for the arguments at length, and with states
    in place: a pool for serving, and speculative decoding.

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
    initial_state : array, shape ``[N, HV, K, V]``, or with `state_indices` ``[slots, HV, K, V]``
        The state before the first token of each sequence, or the pool of states. Not modified,
        but with `state_indices` or `inplace_final_state`.
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
    precision : {"highest"}, optional
        As in `gated_delta_rule`.
    checkpoint_interval : int, optional
        Keep the states after every so many tokens of each sequence as well.
    state_indices : array or sequence of int, shape ``[N]`` or ``[N, S]``, optional
        The slot of each sequence in the pool, or with `num_accepted_tokens` the slots for the
        states after each of its (at most ``S``) tokens. -1 is a padded row, whose output is zero
        and which touches no slot. No slot may come twice.
    num_accepted_tokens : array or sequence of int, shape ``[N]``, optional
        Speculative decoding: sequence ``n`` starts from slot
        ``state_indices[n, num_accepted_tokens[n] - 1]``, and the state after its token ``t`` is
        stored in slot ``state_indices[n, t]``.
    inplace_final_state : bool
        Whether `initial_state` is overwritten with the final states and returned. Implied by
        `state_indices`.
    out : array, shape ``[B, T, HV, V]``, optional
        Array for ``o``; must not overlap any input.

    Returns
    -------
    o : array, shape ``[B, T, HV, V]``
        Outputs in the kind and dtype of `q`.
    final_state : array, shape ``[N, HV, K, V]``, or None
        As in `gated_delta_rule`. With `state_indices` or `inplace_final_state` always
        `initial_state` itself, whole.
    checkpoints : array, shape ``[n, HV, K, V]``
        Only with `checkpoint_interval`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `gated_delta_rule` does, and where slots are out of range or come twice;
        before anything is written.

    Notes
    -----
    The recurrence of arXiv 2412.06464 (gate per head) and 2510.26692 (gate per channel), as it
    stands in `gated_delta_rule`; its chunked form (2406.06484) is `chunk_gated_delta_rule`. Torch
    tensors get gradients, as there, and not with a pool or the state in place.

    Examples
    --------
    A pool of three states; sequence 0 lives in slot 2, and row 1 is padding.

    >>> import numpy as np
    >>> import nbdelta
    >>> q = k = v = np.ones((2, 1, 1, 1), np.float32)
    >>> pool = np.zeros((3, 1, 1, 1), np.float32)
    >>> o, states = nbdelta.fused_recurrent_gated_delta_rule(
    ...     q, k, v, None, None, initial_state=pool, state_indices=[2, -1]
    ... )
    >>> print(o.ravel(), pool.ravel(), states is pool)
    [1. 0.] [0. 0. 1.] True
    """
    arrays = (
        q, k, v, g, beta, initial_state, A_log, dt_bias, out, cu_seqlens,
        state_indices, num_accepted_tokens,
    )  # fmt: skip
    options = (
        "recurrent", scale, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel,
        lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, head_order,
        None, precision, checkpoint_interval, inplace_final_state, False,
    )  # fmt: skip
    return apply(arrays, options)


def fused_recurrent_kda(
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
    precision: str | None = None,
    checkpoint_interval: int | None = None,
    state_indices: IndexLike | None = None,
    num_accepted_tokens: IndexLike | None = None,
    inplace_final_state: bool = False,
    out: Array | None = None,
) -> tuple[ArrayT, ...]:
    """Apply Kimi Delta Attention token by token: the gated delta rule with a gate per key channel.

    `fused_recurrent_gated_delta_rule` under FLA's name for it; `g` must have the axis ``K``. See
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
    initial_state : array, shape ``[N, HV, K, V]``, or with `state_indices` ``[slots, HV, K, V]``
        The state before the first token of each sequence, or the pool of states. Not modified,
        but with `state_indices` or `inplace_final_state`.
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
    precision : {"highest"}, optional
        As in `gated_delta_rule`.
    checkpoint_interval : int, optional
        Keep the states after every so many tokens of each sequence as well.
    state_indices, num_accepted_tokens : array or sequence of int, optional
        As in `fused_recurrent_gated_delta_rule`.
    inplace_final_state : bool
        As in `fused_recurrent_gated_delta_rule`.
    out : array, shape ``[B, T, HV, V]``, optional
        Array for ``o``; must not overlap any input.

    Returns
    -------
    o : array, shape ``[B, T, HV, V]``
        Outputs in the kind and dtype of `q`.
    final_state : array, shape ``[N, HV, K, V]``, or None
        As in `gated_delta_rule`. With `state_indices` or `inplace_final_state` always
        `initial_state` itself, whole.
    checkpoints : array, shape ``[n, HV, K, V]``
        Only with `checkpoint_interval`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `gated_delta_rule` does, and where slots are out of range or come twice;
        before anything is written.

    Notes
    -----
    arXiv 2510.26692; the gated rule is that of 2412.06464, the delta rule's chunks 2406.06484.
    Torch tensors get gradients, as in `fused_recurrent_gated_delta_rule`.

    Examples
    --------
    >>> import numpy as np
    >>> import nbdelta
    >>> q = k = np.ones((1, 1, 1, 2), np.float32)
    >>> v = np.ones((1, 1, 1, 1), np.float32)
    >>> g = np.log(np.array([1, 0.5], np.float32)).reshape(1, 1, 1, 2)
    >>> state = np.ones((1, 1, 2, 1), np.float32)
    >>> o, final_state = nbdelta.fused_recurrent_kda(
    ...     q, k, v, g, None, scale=1.0, initial_state=state, output_final_state=True
    ... )
    >>> print(o.ravel().round(3), final_state.ravel().round(3))
    [0.5] [0.5 0. ]
    """
    arrays = (
        q, k, v, g, beta, initial_state, A_log, dt_bias, out, cu_seqlens,
        state_indices, num_accepted_tokens,
    )  # fmt: skip
    options = (
        "recurrent", scale, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel,
        lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, head_order,
        None, precision, checkpoint_interval, inplace_final_state, True,
    )  # fmt: skip
    return apply(arrays, options)
