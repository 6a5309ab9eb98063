"""The public functions: docstring, validation, dispatch."""

import sys
from typing import Any, TypeVar, cast

from nbdelta import repeat
from nbdelta.arrays import Array, expect_no_tangent
from nbdelta.blocks import (
    prepare_cumsum,
    prepare_gate,
    prepare_solve_triangular,
    prepare_solve_tril,
)
from nbdelta.checks import IndexLike
from nbdelta.dispatch import run, stage
from nbdelta.gradients import fill_gradients, keep_states, prepare_gradients
from nbdelta.problem import prepare
from nbdelta.structure import Arrays

# the results are arrays of the kind of the first argument; `final_state` may be None all the same,
# as in typeshed's own stubs, so that callers who asked for it need no assertion
ArrayT = TypeVar("ArrayT", bound=Array)


def _rule(arrays: repeat.Arrays, options: tuple[object, ...]) -> tuple[Any, ...]:
    """Make a call of the rule by the shortest way that it can go.

    `arrays` are in the order of `nbdelta.structure.Arrays`, `options` are the algorithm, the scale,
    and the rest in the order of `nbdelta.structure.Options`.
    """
    torch = sys.modules.get("torch")
    if torch is not None and not isinstance(arrays[0], torch.Tensor):
        torch = None
    if torch is not None:
        if torch.autograd.forward_ad._current_level >= 0:
            for name, x in zip(Arrays._fields, arrays):
                expect_no_tangent(x, name)
        if torch.is_autocast_enabled("cpu" if arrays[0].is_cpu else arrays[0].device.type):
            from nbdelta.torch import autocast

            arrays = autocast(arrays)
        if torch.compiler.is_compiling():
            return _recorded_rule(arrays, options)
    results = repeat.results_of(arrays, options)
    if results is None:
        if torch is not None and torch.is_grad_enabled():
            if any([isinstance(x, torch.Tensor) and x.requires_grad for x in arrays]):
                return _recorded_rule(arrays, options)
        algorithm, *others = options
        problem = prepare(arrays, others)
        run(problem, str(algorithm))
        repeat.remember(arrays, options, problem)
        results = problem.results()
    return results


def _recorded_rule(arrays: repeat.Arrays, options: tuple[object, ...]) -> tuple[Any, ...]:
    """Make a call that PyTorch has to know of."""
    from nbdelta.torch import rule

    return rule(arrays, options)


def gated_delta_rule(
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
    """Apply the gated delta rule, the recurrent attention of Qwen3-Next and Kimi Linear.

    Picks the device from the arrays, the gate layout from the shape of `g` and the algorithm from
    the lengths: token by token for sequences of a single token, chunked for all others.

    Parameters
    ----------
    q, k : array, shape ``[B, T, H, K]``
        Queries and keys: float32, float64, float16 or bfloat16. Any strides, read-only too.
    v : array, shape ``[B, T, HV, V]``
        Values, in the dtype of `q`. ``HV`` is a multiple of ``H`` (grouped value heads), ``V``
        need not be ``K``, and neither need be a power of two.
    g : array, shape ``[B, T, HV]`` or ``[B, T, HV, K]``, or None
        Natural logarithm of the decay, so 0 keeps the state and ``-inf`` resets it: a number per
        value head (GDA) or per key channel (KDA). ``None`` is no decay, the plain delta rule. Any
        floating dtype, and so are `beta`, `A_log` and `dt_bias`.
    beta : array, shape ``[B, T, HV]``, or None
        Strength of the write, commonly in ``[0, 2]``. ``None`` is 1.
    scale : float, optional
        Factor of the output. ``None`` is ``K ** -0.5``.
    initial_state : array, shape ``[N, HV, K, V]``, optional
        The state before the first token of each of the ``N`` sequences, zeros when ``None``:
        float32, bfloat16 or float16, and float64 with float64 inputs. Not modified.
    output_final_state : bool
        Whether to return the states after the last tokens.
    use_qk_l2norm_in_kernel : bool
        Whether to divide `q` and `k` by ``sqrt(sum(x ** 2) + 1e-6)`` over ``K``.
    use_gate_in_kernel : bool
        Whether `g` is raw. The log decay is then ``-exp(A_log) * softplus(g + dt_bias)``, or with
        `lower_bound` ``lower_bound * sigmoid(exp(A_log) * (g + dt_bias))``.
    A_log : array, shape ``[HV]``, optional
        Zeros when ``None``. Needs `use_gate_in_kernel`.
    dt_bias : array, shape ``[HV]``, ``[HV * K]`` or ``[HV, K]``, optional
        Zeros when ``None``; with ``K`` only for a gate per channel. Needs `use_gate_in_kernel`.
    lower_bound : float, optional
        A number below 0, the least log decay. Needs `use_gate_in_kernel`.
    use_beta_sigmoid_in_kernel : bool
        Whether `beta` is a logit, so that ``sigmoid(beta)`` is used.
    allow_neg_eigval : bool
        Whether that sigmoid is doubled, into ``(0, 2)``. Needs `use_beta_sigmoid_in_kernel`.
    state_v_first : bool
        Whether all states have the layout ``[N, HV, V, K]``.
    cu_seqlens : array or sequence of int, shape ``[N + 1]``, optional
        Packed sequences (``B`` is 1): sequence ``n`` is the tokens ``cu_seqlens[n]`` to
        ``cu_seqlens[n + 1]``. Rises from 0 to ``T``; empty sequences are legal. Without it every
        batch row is a sequence and ``N`` is ``B``.
    head_order : {"interleaved", "tiled"}
        Value head ``h`` reads key head ``h // (HV // H)`` (as transformers has it) or ``h % H`` (as
        GGUF files of Qwen3.5 do).
    chunk_size : {16, 32, 64}, optional
        Tokens per chunk of the chunked algorithm. ``None`` picks.
    precision : {"highest"}, optional
        ``None`` lets bfloat16 and float16 inputs use half-precision products, accumulated in
        float32, where the hardware has them; ``"highest"`` forbids it.
    checkpoint_interval : int, optional
        Keep the states after every so many tokens of each sequence as well.
    out : array, shape ``[B, T, HV, V]``, optional
        Array for ``o``, of the kind and dtype of `q`; must not overlap any input.

    Returns
    -------
    o : array, shape ``[B, T, HV, V]``
        Outputs in the dtype of `q`: of its kind too, as all results are (NumPy's for arrays that
        are known by DLPack alone). `out` itself when it was given.
    final_state : array, shape ``[N, HV, K, V]``, or None
        In the dtype of `initial_state`; without one float32, or float64 with float64 inputs.
        ``None`` without `output_final_state`.
    checkpoints : array, shape ``[n, HV, K, V]``
        Only with `checkpoint_interval`: the states after tokens ``interval, 2 * interval, ...`` of
        the first sequence, then of the second, and so on, in the dtype of `final_state`.

    Raises
    ------
    TypeError
        Where an argument has the wrong type or dtype.
    ValueError
        Where a shape, a value or a combination of options is wrong, arrays live on several devices,
        or gradients are recorded with `out` or `checkpoint_interval`, which have none.
    RuntimeError
        Where the device of the arrays cannot be served.

    Notes
    -----
    Per token, with a state ``S`` ``[K, V]`` for each sequence and value head::

        S = exp(g)[:, None] * S              # exp(g) * S with a gate per head
        S = S + outer(k, beta * (v - S.T @ k))
        o = scale * S.T @ q

    Results do not depend on the batch that a sequence is in, on packing or on later tokens, to the
    last bit. Torch tensors that require a gradient get one: q, k, v, g (raw or not), beta (or its
    logit), initial_state, A_log and dt_bias.

    Gated DeltaNet is arXiv 2412.06464, Kimi Delta Attention 2510.26692, the chunked form
    of the delta rule 2406.06484.

    Examples
    --------
    >>> import numpy as np
    >>> import nbdelta
    >>> q = k = np.ones((1, 3, 1, 1), np.float32)
    >>> v = np.array([1, 2, 3], np.float32).reshape(1, 3, 1, 1)
    >>> g = np.full((1, 3, 1), np.log(0.5), np.float32)
    >>> beta = np.full((1, 3, 1), 0.5, np.float32)
    >>> o, final_state = nbdelta.gated_delta_rule(q, k, v, g, beta, output_final_state=True)
    >>> print(o.ravel().round(3))
    [0.5   1.125 1.781]
    >>> print(final_state.shape, final_state.ravel().round(3))
    (1, 1, 1, 1) [1.781]
    """
    arrays = (
        q, k, v, g, beta, initial_state, A_log, dt_bias, out, cu_seqlens,
        None, None,
    )  # fmt: skip
    options = (
        "auto", scale, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel,
        lower_bound, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, head_order,
        chunk_size, precision, checkpoint_interval, False, False,
    )  # fmt: skip
    return _rule(arrays, options)


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
    return _rule(arrays, options)


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
    return _rule(arrays, options)


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
    return _rule(arrays, options)


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
    return _rule(arrays, options)


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
        are those of float32, or float64 with float64 inputs.

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
    The states at every 64th token are kept, all others made anew. Gradients do not depend on the
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
