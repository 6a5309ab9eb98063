"""Checks of a call that see shapes, strides, dtypes and options, and no memory.

What passes is remembered, so that a decode loop pays for these checks once.
"""

from typing import NamedTuple

from nbdelta.arrays import View
from nbdelta.checks import (
    brackets,
    expect_dtype,
    expect_float,
    expect_like,
    expect_shape,
    expect_writable,
    in_letters,
    wrong_shape,
)

STATE_FLOATS = ("float32", "bfloat16", "float16")


class Arrays(NamedTuple):
    """The arrays of a call, as the user gave them."""

    q: View
    k: View
    v: View
    g: View | None
    beta: View | None
    initial_state: View | None
    A_log: View | None
    dt_bias: View | None
    out: View | None
    cu_seqlens: View | None
    state_indices: View | None
    num_accepted_tokens: View | None


class Options(NamedTuple):
    """The options that are no arrays, checked one by one."""

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


class Structure(NamedTuple):
    """What shapes, strides, dtypes and options decide."""

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
    extents: list[tuple[int, int]]  # of `Arrays`, see View.extent


_passed: dict[object, Structure] = {}
_PASSED_AT_MOST = 1024


def structure_of(arrays: Arrays, options: Options) -> Structure:
    """Check the structure of a call, unless an equal one has passed.

    Parameters
    ----------
    arrays : Arrays
        Views of everything the user gave.
    options : Options
        Each one already found valid by itself.

    Returns
    -------
    Structure
        Sizes and layouts of the call.

    Raises
    ------
    TypeError
        Where a dtype is wrong.
    ValueError
        Where a shape or a combination of arguments is wrong.
    """
    key = (
        options,
        *[None if x is None else (x.shape, x.strides, x.dtype, x.kind, x.readonly) for x in arrays],
    )
    structure = _passed.get(key)
    if structure is None:
        structure = _check(arrays, options)
        if len(_passed) >= _PASSED_AT_MOST:
            _passed.clear()
        _passed[key] = structure
    return structure


def expect_dt_bias(x: View, HV: int, K: int | None) -> None:
    """Raise unless `x` is ``[HV]``, or with a gate per channel ``[HV * K]`` or ``[HV, K]``."""
    expect_float(x, "dt_bias")
    if x.shape != (HV,) and (K is None or x.shape not in ((HV * K,), (HV, K))):
        expected = in_letters("HV", (HV,))
        if K is not None:
            expected += f" or [HV * K] = [{HV * K}] or {in_letters('HV K', (HV, K))}"
        raise wrong_shape("dt_bias", expected, x.shape)


def see_dt_bias(x: View, HV: int, K: int | None) -> View:
    """Return a checked dt_bias as ``[HV, K or 1]``, with stride 0 along K where it is per head."""
    if x.shape == (HV,):
        return x.seen_as((HV, K or 1), (x.strides[0], 0))
    if len(x.shape) == 1:
        assert K is not None  # expect_dt_bias
        return x.seen_as((HV, K), (K * x.strides[0], x.strides[0]))
    return x


def _check(arrays: Arrays, options: Options) -> Structure:
    _check_combinations(arrays, options)
    q, k, v, g, beta, initial_state, A_log, dt_bias, out, cu, _, _ = arrays
    B, T, H, HV, K, V = _check_qkv(q, k, v)
    if g is not None:
        _check_g(g, B, T, HV, K, options.per_channel_only)
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
        expect_writable(out, "out")
    N = B
    if cu is not None:
        if len(cu.shape) != 1 or cu.shape[0] < 1:
            raise wrong_shape("cu_seqlens", "[N + 1] with N >= 0", cu.shape)
        if B != 1:
            got = brackets(q.shape)
            raise ValueError(f"cu_seqlens: needs B = 1 (packed sequences), got q {got}")
        N = cu.shape[0] - 1
    _check_pool(arrays, N)
    state_shape = (HV, V, K) if options.state_v_first else (HV, K, V)
    state_dtype = "float64" if q.dtype == "float64" else "float32"
    in_place = arrays.state_indices is not None or options.inplace_final_state
    if initial_state is not None:
        state_dtype = initial_state.dtype
        _check_state(arrays, initial_state, N, state_shape, options.state_v_first)
        if in_place:
            expect_writable(initial_state, "initial_state")
    extents = [(0, 0) if x is None else x.extent() for x in arrays]
    return Structure(B, T, H, HV, K, V, N, state_shape, state_dtype, in_place, extents)


def _check_combinations(arrays: Arrays, options: Options) -> None:
    """Refuse options that lack what they need, or that another one makes meaningless."""
    o = options
    no_gate = not o.use_gate_in_kernel and "use_gate_in_kernel=True, got False"
    no_g = arrays.g is None and "g, got None"
    no_beta = arrays.beta is None and "beta, got None"
    no_sigmoid = not o.use_beta_sigmoid_in_kernel and "use_beta_sigmoid_in_kernel=True, got False"
    no_state = arrays.initial_state is None and "initial_state, got None"
    no_slots = arrays.state_indices is None and "state_indices [N, S], got None"
    for name, given, lacks in (
        ("use_gate_in_kernel", o.use_gate_in_kernel, no_g),
        ("A_log", arrays.A_log, no_gate),
        ("dt_bias", arrays.dt_bias, no_gate),
        ("lower_bound", o.lower_bound, no_gate),
        ("use_beta_sigmoid_in_kernel", o.use_beta_sigmoid_in_kernel, no_beta),
        ("allow_neg_eigval", o.allow_neg_eigval, no_sigmoid),
        ("inplace_final_state", o.inplace_final_state, no_state),
        ("state_indices", arrays.state_indices, no_state),
        ("num_accepted_tokens", arrays.num_accepted_tokens, no_slots),
    ):
        if lacks and given is not None and given is not False:
            raise ValueError(f"{name}: needs {lacks}")
    if o.per_channel_only and arrays.g is None:
        raise ValueError("g: expected [B, T, HV, K], got None")
    if o.lower_bound is not None and o.lower_bound >= 0:
        raise ValueError(f"lower_bound: expected a number below 0, got {o.lower_bound}")
    if arrays.state_indices is not None and o.checkpoint_interval:
        raise ValueError(
            f"checkpoint_interval: expected None with state_indices, got {o.checkpoint_interval}"
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


def _check_g(g: View, B: int, T: int, HV: int, K: int, per_channel_only: bool) -> None:
    expect_float(g, "g")
    per_channel = in_letters("B T HV K", (B, T, HV, K))
    if per_channel_only:
        expect_shape(g, "g", "B T HV K", (B, T, HV, K))
    elif g.shape not in ((B, T, HV), (B, T, HV, K)):
        raise wrong_shape("g", f"{in_letters('B T HV', (B, T, HV))} or {per_channel}", g.shape)


def _check_pool(arrays: Arrays, N: int) -> None:
    """Check the shapes of state_indices and num_accepted_tokens."""
    slots, accepted = arrays.state_indices, arrays.num_accepted_tokens
    if accepted is not None and accepted.shape != (N,):
        raise wrong_shape("num_accepted_tokens", in_letters("N", (N,)), accepted.shape)
    if slots is None:
        return
    one, many = in_letters("N", (N,)), in_letters("N S", (N, "S"))
    if accepted is None and slots.shape != (N,):
        expected = f"{one}, or {many} with num_accepted_tokens"
        raise wrong_shape("state_indices", expected, slots.shape)
    if accepted is not None and (len(slots.shape) != 2 or slots.shape[0] != N):
        expected = f"{many} (with num_accepted_tokens)"
        raise wrong_shape("state_indices", expected, slots.shape)


def _check_state(
    arrays: Arrays, state: View, N: int, shape: tuple[int, int, int], v_first: bool
) -> None:
    """Check dtype and shape of initial_state; `shape` is that of one state."""
    if state.dtype == "float64" and arrays.q.dtype != "float64":
        raise TypeError(f"initial_state: float64 needs float64 inputs, got q in {arrays.q.dtype}")
    if state.dtype not in (*STATE_FLOATS, "float64"):
        raise TypeError(
            f"initial_state: expected {' or '.join(STATE_FLOATS)} (float64 with float64 inputs), "
            f"got {state.dtype}"
        )
    letters = "HV V K" if v_first else "HV K V"
    if arrays.state_indices is None:
        expect_shape(state, "initial_state", f"N {letters}", (N, *shape))
    elif len(state.shape) != 4 or state.shape[1:] != shape:
        expected = in_letters(f"slots {letters}", ("slots", *shape))
        raise wrong_shape("initial_state", expected, state.shape)
