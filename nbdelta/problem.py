"""One validated call of the gated delta rule: sizes, gate layout, sequences, options, outputs.

The checks come in two kinds. Structure checks see shapes, dtypes and options, and their result is
remembered, so that a decode loop pays for them once. Value checks see addresses and the contents
of the index arrays, and run every time. Nothing is allocated or written before all have passed.
"""

from dataclasses import dataclass
from typing import NamedTuple

from nbdelta.arrays import View, empty, view
from nbdelta.checks import (
    IndexArray,
    brackets,
    expect_apart,
    expect_dtype,
    expect_float,
    expect_like,
    expect_shape,
    expect_writable,
    finite_real,
    flag,
    in_letters,
    index_array,
    one_of,
    positive_int,
    wrong_shape,
)
from nbdelta.dispatch import expect_one_device

HEAD_ORDERS = ("interleaved", "tiled")
CHUNK_SIZES = (None, 16, 32, 64)
PRECISIONS = (None, "highest")
STATE_FLOATS = ("float32", "bfloat16", "float16")


class Options(NamedTuple):
    """The options of a call that are no arrays, checked one by one."""

    output_final_state: bool
    use_qk_l2norm_in_kernel: bool
    use_gate_in_kernel: bool
    lower_bound: float | None
    use_beta_sigmoid_in_kernel: bool
    allow_neg_eigval: bool
    state_v_first: bool
    head_order: str
    chunk_size: int | None
    precision: str | None
    checkpoint_interval: int  # 0: none
    inplace_final_state: bool
    per_channel_only: bool


@dataclass(slots=True, eq=False)
class Problem:
    """One validated call. States are always seen as ``[N or slots, HV, K, V]``.

    ``dt_bias`` is always seen as ``[HV, K or 1]``. ``final_state`` is the memory of
    ``initial_state`` when the state is updated in place. Checkpoints are kept after tokens
    ``interval``, ``2 * interval``, ... of each sequence.
    """

    q: View  # [B, T, H, K]
    k: View  # [B, T, H, K]
    v: View  # [B, T, HV, V]
    o: View  # [B, T, HV, V]
    g: View | None  # [B, T, HV] or [B, T, HV, K]
    beta: View | None  # [B, T, HV]
    A_log: View | None  # [HV]
    dt_bias: View | None  # [HV, K or 1]
    initial_state: View | None  # [N or slots, HV, K, V]
    final_state: View | None  # [N or slots, HV, K, V]
    checkpoints: View | None  # [n, HV, K, V]
    cu_seqlens: IndexArray | None  # [N + 1]
    state_indices: IndexArray | None  # [N, S]
    num_accepted_tokens: IndexArray | None  # [N]
    checkpoint_interval: int
    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    N: int
    scale: float
    use_qk_l2norm_in_kernel: bool
    use_gate_in_kernel: bool
    use_beta_sigmoid_in_kernel: bool
    allow_neg_eigval: bool
    lower_bound: float | None
    head_order: str
    chunk_size: int | None
    precision: str | None

    @property
    def per_channel(self) -> bool:
        """Whether the gate is a number per key channel (KDA)."""
        return self.g is not None and len(self.g.shape) == 4

    @property
    def device(self) -> str:
        """The device of every array of the call."""
        return self.q.device

    def results(self) -> "tuple[object, ...]":
        """Return what the user gets: ``(o, final_state)`` and the checkpoints if asked for."""
        final_state = None if self.final_state is None else self.final_state.owner
        if self.checkpoints is None:
            return self.o.owner, final_state
        return self.o.owner, final_state, self.checkpoints.owner


class Structure(NamedTuple):
    """What shapes, dtypes and options decide."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    N: int
    state_shape: tuple[int, int, int]  # of one state, as the user sees it
    state_dtype: str
    in_place: bool  # initial_state is overwritten


class Arrays(NamedTuple):
    """The arrays of a call as the user gave them, in the order of the arguments."""

    q: View
    k: View
    v: View
    g: View | None
    beta: View | None
    initial_state: View | None
    A_log: View | None
    dt_bias: View | None
    out: View | None


def prepare(
    q: object,
    k: object,
    v: object,
    g: object,
    beta: object,
    scale: object,
    initial_state: object,
    output_final_state: object,
    use_qk_l2norm_in_kernel: object,
    *,
    use_gate_in_kernel: object,
    A_log: object,
    dt_bias: object,
    lower_bound: object,
    use_beta_sigmoid_in_kernel: object,
    allow_neg_eigval: object,
    state_v_first: object,
    cu_seqlens: object,
    head_order: object,
    precision: object,
    checkpoint_interval: object,
    out: object,
    chunk_size: object = None,
    state_indices: object = None,
    num_accepted_tokens: object = None,
    inplace_final_state: object = False,
    per_channel_only: bool = False,
) -> Problem:
    """Check a call of one of the five forms of the rule, then allocate its results.

    Parameters
    ----------
    q, k, v, g, beta, initial_state, A_log, dt_bias, out : object
        Arrays, as in `nbdelta.gated_delta_rule`; all but `q`, `k` and `v` may be ``None``.
    scale, lower_bound, output_final_state, use_qk_l2norm_in_kernel, use_gate_in_kernel, \
    use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, head_order, precision, \
    checkpoint_interval, chunk_size, inplace_final_state : object
        Options, as in `nbdelta.gated_delta_rule` and `nbdelta.fused_recurrent_gated_delta_rule`.
    cu_seqlens, state_indices, num_accepted_tokens : object
        Arrays or sequences of integers.
    per_channel_only : bool
        Whether `g` must have the axis K.

    Returns
    -------
    Problem
        With its outputs allocated and not yet filled.

    Raises
    ------
    TypeError
        Where an argument has the wrong type or dtype.
    ValueError
        Where a shape, a value or a combination of arguments is wrong.
    """
    interval = (
        0
        if checkpoint_interval is None
        else positive_int(checkpoint_interval, "checkpoint_interval")
    )
    factor = None if scale is None else finite_real(scale, "scale")
    options = Options(
        flag(output_final_state, "output_final_state"),
        flag(use_qk_l2norm_in_kernel, "use_qk_l2norm_in_kernel"),
        flag(use_gate_in_kernel, "use_gate_in_kernel"),
        None if lower_bound is None else finite_real(lower_bound, "lower_bound"),
        flag(use_beta_sigmoid_in_kernel, "use_beta_sigmoid_in_kernel"),
        flag(allow_neg_eigval, "allow_neg_eigval"),
        flag(state_v_first, "state_v_first"),
        one_of(head_order, "head_order", HEAD_ORDERS),
        None if chunk_size is None else one_of(chunk_size, "chunk_size", CHUNK_SIZES),
        None if precision is None else one_of(precision, "precision", PRECISIONS),
        interval,
        flag(inplace_final_state, "inplace_final_state"),
        per_channel_only,
    )
    arrays = Arrays(
        view(q, "q"),
        view(k, "k"),
        view(v, "v"),
        None if g is None else view(g, "g"),
        None if beta is None else view(beta, "beta"),
        None if initial_state is None else view(initial_state, "initial_state"),
        None if A_log is None else view(A_log, "A_log"),
        None if dt_bias is None else view(dt_bias, "dt_bias"),
        None if out is None else view(out, "out"),
    )
    expect_one_device(Arrays._fields, arrays)
    cu = slots = accepted = None
    if cu_seqlens is not None:
        cu = index_array(cu_seqlens, "cu_seqlens", "[N + 1]", (1,))
    if state_indices is not None:
        slots = index_array(state_indices, "state_indices", "[N] or [N, S]", (1, 2))
    if num_accepted_tokens is not None:
        accepted = index_array(num_accepted_tokens, "num_accepted_tokens", "[N]", (1,))

    structure = _structure(arrays, options, cu, slots, accepted)
    n_checkpoints = _check_values(arrays, options, structure, cu, slots, accepted)
    if factor is None:
        factor = structure.K**-0.5
    return _allocate(arrays, options, structure, cu, slots, accepted, n_checkpoints, factor)


# what has passed, by everything that the structure checks look at
_passed: dict[object, Structure] = {}
_PASSED_AT_MOST = 1024


def _structure(
    arrays: Arrays,
    options: Options,
    cu: IndexArray | None,
    slots: IndexArray | None,
    accepted: IndexArray | None,
) -> Structure:
    """Return the remembered result of `_check_structure`, or make it."""
    key = (
        options,
        *[None if x is None else (x.shape, x.dtype, x.kind) for x in arrays],
        None if cu is None else cu.shape,
        None if slots is None else slots.shape,
        None if accepted is None else accepted.shape,
    )
    structure = _passed.get(key)
    if structure is None:
        structure = _check_structure(arrays, options, cu, slots, accepted)
        if len(_passed) >= _PASSED_AT_MOST:
            _passed.clear()
        _passed[key] = structure
    return structure


def _check_structure(
    arrays: Arrays,
    options: Options,
    cu: IndexArray | None,
    slots: IndexArray | None,
    accepted: IndexArray | None,
) -> Structure:
    """Check shapes, dtypes and the combination of options; nothing here reads memory."""
    _check_combinations(arrays, options, cu, slots, accepted)
    q, k, v, g, beta, initial_state, A_log, dt_bias, out = arrays
    B, T, H, HV, K, V = _check_qkv(q, k, v)
    N = B if cu is None else cu.size - 1
    if cu is not None and B != 1:
        raise ValueError(f"cu_seqlens: needs B = 1 (packed sequences), got q {brackets(q.shape)}")
    if cu is not None and cu.size == 0:
        raise wrong_shape("cu_seqlens", "[N + 1] with N >= 0", cu.shape)

    if g is not None:
        expect_float(g, "g")
        per_channel = in_letters("B T HV K", (B, T, HV, K))
        if options.per_channel_only:
            expect_shape(g, "g", "B T HV K", (B, T, HV, K))
        elif g.shape not in ((B, T, HV), (B, T, HV, K)):
            per_head = in_letters("B T HV", (B, T, HV))
            raise wrong_shape("g", f"{per_head} or {per_channel}", g.shape)
    if beta is not None:
        expect_float(beta, "beta")
        expect_shape(beta, "beta", "B T HV", (B, T, HV))
    if A_log is not None:
        expect_float(A_log, "A_log")
        expect_shape(A_log, "A_log", "HV", (HV,))
    if dt_bias is not None:
        expect_dt_bias(dt_bias, HV, K if g is not None and len(g.shape) == 4 else None)
    if out is not None:
        expect_like(out, "out", q, "q")
        expect_dtype(out, "out", q.dtype, "as q")
        expect_shape(out, "out", "B T HV V", (B, T, HV, V))

    state_shape = (HV, V, K) if options.state_v_first else (HV, K, V)
    state_dtype = "float64" if q.dtype == "float64" else "float32"
    if initial_state is not None:
        _check_state_dtype(initial_state, q)
        state_dtype = initial_state.dtype
        letters = "HV V K" if options.state_v_first else "HV K V"
        if slots is None:
            expect_shape(initial_state, "initial_state", f"N {letters}", (N, *state_shape))
        elif len(initial_state.shape) != 4 or initial_state.shape[1:] != state_shape:
            expected = in_letters(f"slots {letters}", ("slots", *state_shape))
            raise wrong_shape("initial_state", expected, initial_state.shape)
    if slots is not None and slots.shape[0] != N:
        one, many = in_letters("N", (N,)), in_letters("N S", (N, "S"))
        raise wrong_shape("state_indices", f"{one} or {many}", slots.shape)
    if accepted is not None and accepted.shape != (N,):
        raise wrong_shape("num_accepted_tokens", in_letters("N", (N,)), accepted.shape)
    in_place = slots is not None or options.inplace_final_state
    return Structure(B, T, H, HV, K, V, N, state_shape, state_dtype, in_place)


def _check_combinations(
    arrays: Arrays,
    options: Options,
    cu: IndexArray | None,
    slots: IndexArray | None,
    accepted: IndexArray | None,
) -> None:
    """Refuse options that lack what they need, or that another one makes meaningless."""

    def needs(name: str, given: bool, what: str, there: bool) -> None:
        if given and not there:
            raise ValueError(f"{name}: needs {what}")

    gate, sigmoid = options.use_gate_in_kernel, options.use_beta_sigmoid_in_kernel
    state, pooled = arrays.initial_state is not None, slots is not None
    needs("g", options.per_channel_only, "[B, T, HV, K], got None", arrays.g is not None)
    needs("use_gate_in_kernel", gate, "g, got None", arrays.g is not None)
    needs("A_log", arrays.A_log is not None, "use_gate_in_kernel=True, got False", gate)
    needs("dt_bias", arrays.dt_bias is not None, "use_gate_in_kernel=True, got False", gate)
    needs(
        "lower_bound", options.lower_bound is not None, "use_gate_in_kernel=True, got False", gate
    )
    needs("use_beta_sigmoid_in_kernel", sigmoid, "beta, got None", arrays.beta is not None)
    needs(
        "allow_neg_eigval",
        options.allow_neg_eigval,
        "use_beta_sigmoid_in_kernel=True, got False",
        sigmoid,
    )
    needs("inplace_final_state", options.inplace_final_state, "initial_state, got None", state)
    needs("state_indices", pooled, "initial_state (the pool), got None", state)
    needs("num_accepted_tokens", accepted is not None, "state_indices [N, S], got None", pooled)
    if options.lower_bound is not None and options.lower_bound >= 0:
        raise ValueError(f"lower_bound: expected a number below 0, got {options.lower_bound}")
    if slots is not None:
        if options.checkpoint_interval:
            raise ValueError(
                f"checkpoint_interval: must be None with state_indices, "
                f"got {options.checkpoint_interval}"
            )
        if (slots.ndim == 2) != (accepted is not None):
            raise ValueError(
                "state_indices: [N, S] goes with num_accepted_tokens and [N] without, got "
                f"{brackets(slots.shape)} "
                f"{'without' if accepted is None else 'with'} num_accepted_tokens"
            )


def _check_qkv(q: View, k: View, v: View) -> tuple[int, int, int, int, int, int]:
    """Check q, k and v, and return B, T, H, HV, K, V."""
    expect_float(q, "q")
    expect_dtype(k, "k", q.dtype, "as q")
    expect_dtype(v, "v", q.dtype, "as q")
    if len(q.shape) != 4:
        raise wrong_shape("q", "[B, T, H, K]", q.shape)
    B, T, H, K = q.shape
    if H < 1 or K < 1:
        raise wrong_shape("q", "[B, T, H, K] with H >= 1 and K >= 1", q.shape)
    expect_shape(k, "k", "B T H K", q.shape)
    if len(v.shape) != 4 or v.shape[:2] != (B, T):
        raise wrong_shape("v", in_letters("B T HV V", (B, T, "HV", "V")), v.shape)
    HV, V = v.shape[2:]
    if HV < 1 or V < 1:
        raise wrong_shape("v", "[B, T, HV, V] with HV >= 1 and V >= 1", v.shape)
    if HV % H:
        raise wrong_shape("v", f"[B, T, HV, V] with HV a multiple of H = {H}", v.shape)
    return B, T, H, HV, K, V


def expect_dt_bias(x: View, HV: int, K: int | None) -> None:
    """Raise unless `x` is ``[HV]``, or with a gate per channel ``[HV * K]`` or ``[HV, K]``."""
    expect_float(x, "dt_bias")
    expected = in_letters("HV", (HV,))
    if K is not None:
        expected = f"{expected} or [HV * K] = [{HV * K}] or {in_letters('HV K', (HV, K))}"
    if x.shape != (HV,) and (K is None or x.shape not in ((HV * K,), (HV, K))):
        raise wrong_shape("dt_bias", expected, x.shape)


def see_dt_bias(x: View, HV: int, K: int | None) -> View:
    """Return a checked dt_bias as ``[HV, K]``, with stride 0 along K where it is per head."""
    if x.shape == (HV,):
        return x.seen_as((HV, K or 1), (x.strides[0], 0))
    if len(x.shape) == 1:
        assert K is not None  # expect_dt_bias
        return x.seen_as((HV, K), (K * x.strides[0], x.strides[0]))
    return x


def _check_state_dtype(initial_state: View, q: View) -> None:
    if initial_state.dtype == "float64" and q.dtype != "float64":
        raise TypeError(f"initial_state: float64 needs float64 inputs, got q in {q.dtype}")
    if initial_state.dtype not in (*STATE_FLOATS, "float64"):
        raise TypeError(
            f"initial_state: expected {' or '.join(STATE_FLOATS)} (float64 with float64 inputs), "
            f"got {initial_state.dtype}"
        )


def _check_values(
    arrays: Arrays,
    options: Options,
    structure: Structure,
    cu: IndexArray | None,
    slots: IndexArray | None,
    accepted: IndexArray | None,
) -> int:
    """Check addresses and index contents; return the number of checkpoints."""
    out, initial_state = arrays.out, arrays.initial_state
    if out is not None:
        expect_writable(out, "out")
        expect_apart(
            out, "out", [p for p in zip(Arrays._fields, arrays, strict=True) if p[1] is not out]
        )
    if structure.in_place:
        assert initial_state is not None  # _check_combinations
        expect_writable(initial_state, "initial_state")
        expect_apart(
            initial_state,
            "initial_state",
            [p for p in zip(Arrays._fields, arrays, strict=True) if p[1] is not initial_state],
        )
    longest = structure.T
    interval = options.checkpoint_interval
    n_checkpoints = structure.N * (structure.T // interval) if interval else 0
    if cu is not None:
        lengths = check_cu_seqlens(cu, structure.T)
        longest = int(lengths.max(initial=0))
        if interval:
            n_checkpoints = int((lengths // interval).sum())
    if slots is not None:
        assert initial_state is not None
        _check_slots(slots, initial_state.shape[0], longest)
    if accepted is not None and accepted.size:
        assert slots is not None
        S = slots.shape[1]
        if accepted.min() < 1 or accepted.max() > S:
            bad = accepted[(accepted < 1) | (accepted > S)]
            raise ValueError(f"num_accepted_tokens: expected 1 to S = {S}, got {bad[0]}")
    return n_checkpoints


def check_cu_seqlens(cu: IndexArray, T: int) -> IndexArray:
    """Raise unless `cu` rises from 0 to `T`; return the lengths of the sequences."""
    if cu[0] != 0:
        raise ValueError(f"cu_seqlens: expected to start with 0, got {cu[0]}")
    if cu[-1] != T:
        raise ValueError(f"cu_seqlens: expected to end with T = {T}, got {cu[-1]}")
    # neighbours are compared, not subtracted: a difference of wild values could wrap around
    falls = cu[1:] < cu[:-1]
    if falls.any():
        i = int(falls.argmax())
        raise ValueError(f"cu_seqlens: expected no decrease, got {cu[i]} before {cu[i + 1]}")
    return cu[1:] - cu[:-1]


def _check_slots(slots: IndexArray, n_slots: int, longest: int) -> None:
    """Raise unless every slot is -1 or in the pool, and none comes twice."""
    if slots.ndim == 2 and (slots.shape[1] < longest or slots.shape[1] < 1):
        expected = f"[N, S] with S >= {max(longest, 1)} (the tokens of the longest sequence)"
        raise wrong_shape("state_indices", expected, slots.shape)
    seen = set()
    for slot in slots.ravel().tolist():
        if slot == -1:
            continue
        if not 0 <= slot < n_slots:
            raise ValueError(
                f"state_indices: expected -1 to {n_slots - 1} (the pool has {n_slots} slots), "
                f"got {slot}"
            )
        if slot in seen:
            raise ValueError(f"state_indices: slot {slot} comes twice")
        seen.add(slot)


def _allocate(
    arrays: Arrays,
    options: Options,
    structure: Structure,
    cu: IndexArray | None,
    slots: IndexArray | None,
    accepted: IndexArray | None,
    n_checkpoints: int,
    scale: float,
) -> Problem:
    """Allocate the results and lay out the views of a call that passed every check."""
    q, k, v, g, beta, initial_state, A_log, dt_bias, out = arrays
    B, T, H, HV, K, V, N, state_shape, state_dtype, in_place = structure
    if dt_bias is not None:
        dt_bias = see_dt_bias(dt_bias, HV, K if g is not None and len(g.shape) == 4 else None)
    final_state = checkpoints = None
    if options.output_final_state and not in_place:
        final_state = empty(q, (N, *state_shape), state_dtype)
    if options.checkpoint_interval:
        checkpoints = empty(q, (n_checkpoints, *state_shape), state_dtype)
    if options.state_v_first:
        initial_state = None if initial_state is None else initial_state.swap_last()
        final_state = None if final_state is None else final_state.swap_last()
        checkpoints = None if checkpoints is None else checkpoints.swap_last()
    if in_place:
        final_state = initial_state
    return Problem(
        q=q,
        k=k,
        v=v,
        o=empty(q, (B, T, HV, V), q.dtype) if out is None else out,
        g=g,
        beta=beta,
        A_log=A_log,
        dt_bias=dt_bias,
        initial_state=initial_state,
        final_state=final_state,
        checkpoints=checkpoints,
        cu_seqlens=cu,
        state_indices=slots if slots is None or slots.ndim == 2 else slots[:, None],
        num_accepted_tokens=accepted,
        checkpoint_interval=options.checkpoint_interval,
        B=B,
        T=T,
        H=H,
        HV=HV,
        K=K,
        V=V,
        N=N,
        scale=scale,
        use_qk_l2norm_in_kernel=options.use_qk_l2norm_in_kernel,
        use_gate_in_kernel=options.use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=options.use_beta_sigmoid_in_kernel,
        allow_neg_eigval=options.allow_neg_eigval,
        lower_bound=options.lower_bound,
        head_order=options.head_order,
        chunk_size=options.chunk_size,
        precision=options.precision,
    )
