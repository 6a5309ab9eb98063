"""The rule by whichever algorithm suits the lengths; its docstring has all arguments at length."""

from nbdelta.arrays import Array
from nbdelta.checks import IndexLike
from nbdelta.ops._apply import ArrayT, apply


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
        gradients are recorded with `out` or `checkpoint_interval`, which have none, or a tensor
        has a tangent (forward-mode differentiation).
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
    return apply(arrays, options)
