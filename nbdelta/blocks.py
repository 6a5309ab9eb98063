"""One validated call of each building block: views of the inputs and of the result."""

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
    index_view,
    integer,
    positive_int,
    read_indices,
    wrong_shape,
)
from nbdelta.dispatch import expect_one_device, to_device
from nbdelta.problem import check_cu_seqlens
from nbdelta.structure import expect_dt_bias, see_dt_bias


def prepare_cumsum(
    x: object,
    chunk_size: object,
    axis: object,
    reverse: object,
    scale: object,
    cu_seqlens: object,
    out: object,
) -> tuple[View, View, int, int, bool, float, IndexArray | View | None]:
    """Check a call of `nbdelta.chunk_local_cumsum` and allocate its result.

    Parameters
    ----------
    x, chunk_size, axis, reverse, scale, cu_seqlens, out : object
        As the user gave them.

    Returns
    -------
    tuple
        The arguments of the host function, `out` allocated and `axis` not negative.
    """
    size = positive_int(chunk_size, "chunk_size")
    axis = integer(axis, "axis")
    reverse = flag(reverse, "reverse")
    factor = 1.0 if scale is None else finite_real(scale, "scale")
    source = view(x, "x")
    target = None if out is None else view(out, "out")
    expect_one_device(("x", "out"), (source, target))
    cu = None if cu_seqlens is None else _read_cu_seqlens(cu_seqlens, "x", source)
    expect_float(source, "x")
    ndim = len(source.shape)
    if not ndim:
        raise wrong_shape("x", "an array with at least one axis", source.shape)
    if not -ndim <= axis < ndim:
        raise ValueError(
            f"axis: expected {-ndim} to {ndim - 1} for x {brackets(source.shape)}, got {axis}"
        )
    axis %= ndim
    boundaries = _check_cu_seqlens(cu, source.shape[axis], source)
    if target is not None:
        expect_like(target, "out", source, "x")
        allowed = ("float32", "float64") if source.dtype == "float64" else ("float32",)
        if target.dtype not in allowed:
            raise TypeError(
                f"out: expected {' or '.join(allowed)} for x in {source.dtype}, got {target.dtype}"
            )
        if target.shape != source.shape:
            expected = f"the shape of x = {brackets(source.shape)}"
            raise wrong_shape("out", expected, target.shape)
        expect_writable(target, "out")
        if not _same(source, target):  # in place
            _expect_apart(target, ("x",), (source,))
    else:
        target = empty(source, source.shape, "float32")
    return source, target, size, axis, reverse, factor, boundaries


def prepare_solve_tril(
    A: object, cu_seqlens: object, out: object
) -> tuple[View, View, IndexArray | View | None]:
    """Check a call of `nbdelta.solve_tril` and allocate its result.

    Parameters
    ----------
    A, cu_seqlens, out : object
        As the user gave them.

    Returns
    -------
    tuple
        The arguments of the host function, `out` allocated.
    """
    source = view(A, "A")
    target = None if out is None else view(out, "out")
    expect_one_device(("A", "out"), (source, target))
    cu = None if cu_seqlens is None else _read_cu_seqlens(cu_seqlens, "A", source)
    expect_float(source, "A")
    if len(source.shape) != 4 or source.shape[3] not in (16, 32, 64):
        raise wrong_shape("A", "[B, T, H, BT] with BT = 16, 32 or 64", source.shape)
    if cu is not None and source.shape[0] != 1:
        got = brackets(source.shape)
        raise ValueError(f"cu_seqlens: needs B = 1 (packed sequences), got A {got}")
    boundaries = _check_cu_seqlens(cu, source.shape[1], source)
    target = _result(target, source, "A", "B T H BT", source.shape, ("A",), (source,))
    return source, target, boundaries


def prepare_solve_triangular(
    L: object, b: object, unit_diagonal: object, out: object
) -> tuple[View, View, View, bool]:
    """Check a call of `nbdelta.solve_triangular` and allocate its result.

    Parameters
    ----------
    L, b, unit_diagonal, out : object
        As the user gave them.

    Returns
    -------
    tuple
        The arguments of the host function; `L` and `b` have the result's batch axes, with
        stride 0 where they are repeated.
    """
    unit = flag(unit_diagonal, "unit_diagonal")
    lower, right = view(L, "L"), view(b, "b")
    target = None if out is None else view(out, "out")
    expect_one_device(("L", "b", "out"), (lower, right, target))
    expect_float(lower, "L")
    expect_dtype(right, "b", lower.dtype, "as L")
    if len(lower.shape) < 2 or lower.shape[-1] != lower.shape[-2]:
        raise wrong_shape("L", "[..., n, n]", lower.shape)
    n = lower.shape[-1]
    if len(right.shape) < 2 or right.shape[-2] != n:
        raise wrong_shape("b", in_letters("... n m", ("...", n, "m")), right.shape)
    m = right.shape[-1]
    batch = _broadcast(lower.shape[:-2], right.shape[:-2])
    if batch is None:
        raise ValueError(
            f"b: expected batch axes that broadcast with those of L {brackets(lower.shape)}, "
            f"got {brackets(right.shape)}"
        )
    shape = (*batch, n, m)
    target = _result(target, right, "b", "... n m", shape, ("L", "b"), (lower, right))
    return _repeat(lower, (*batch, n, n)), _repeat(right, shape), target, unit


def prepare_gate(
    x: object, A_log: object, dt_bias: object, lower_bound: object
) -> tuple[View, View, View | None, View | None, float | None]:
    """Check a call of `nbdelta.fused_gate` and allocate its result.

    Parameters
    ----------
    x, A_log, dt_bias, lower_bound : object
        As the user gave them.

    Returns
    -------
    tuple
        The arguments of the host function, with `dt_bias` seen as ``[HV, K or 1]``.
    """
    bound = None if lower_bound is None else finite_real(lower_bound, "lower_bound")
    if bound is not None and bound >= 0:
        raise ValueError(f"lower_bound: expected a number below 0, got {bound}")
    raw = view(x, "x")
    log = None if A_log is None else view(A_log, "A_log")
    bias = None if dt_bias is None else view(dt_bias, "dt_bias")
    expect_one_device(("x", "A_log", "dt_bias"), (raw, log, bias))
    expect_float(raw, "x")
    if len(raw.shape) not in (3, 4):
        raise wrong_shape("x", "[B, T, HV] or [B, T, HV, K]", raw.shape)
    if 0 in raw.shape[2:]:
        raise wrong_shape("x", "[B, T, HV] or [B, T, HV, K] with HV >= 1 and K >= 1", raw.shape)
    HV = raw.shape[2]
    K = raw.shape[3] if len(raw.shape) == 4 else None
    if log is not None:
        expect_float(log, "A_log")
        expect_shape(log, "A_log", "HV", (HV,))
    if bias is not None:
        expect_dt_bias(bias, HV, K)
        bias = see_dt_bias(bias, HV, K)
    out = empty(raw, raw.shape, "float64" if raw.dtype == "float64" else "float32")
    return raw, out, log, bias, bound


def _result(
    out: View | None,
    like: View,
    like_name: str,
    letters: str,
    shape: tuple[int, ...],
    names: tuple[str, ...],
    inputs: tuple[View, ...],
) -> View:
    """Return the user's `out` once it is found fit, else a new array like `like`."""
    if out is None:
        return empty(like, shape, like.dtype)
    expect_like(out, "out", like, like_name)
    expect_dtype(out, "out", like.dtype, f"as {like_name}")
    expect_shape(out, "out", letters, shape)
    expect_writable(out, "out")
    _expect_apart(out, names, inputs)
    return out


def _expect_apart(out: View, names: tuple[str, ...], inputs: tuple[View, ...]) -> None:
    arrays = (out, *inputs)
    expect_apart(("out", *names), arrays, [x.extent() for x in arrays], 0)


def _read_cu_seqlens(x: object, name: str, source: View) -> IndexArray | View:
    """Return the contents, or the view where only the device sees them."""
    seen = index_view(x, "cu_seqlens")
    expect_one_device((name, "cu_seqlens"), (source, seen), host_too=("cu_seqlens",))
    if len(seen.shape) != 1 or seen.shape[0] < 1:
        raise wrong_shape("cu_seqlens", "[N + 1] with N >= 0", seen.shape)
    return read_indices(seen, "cu_seqlens")


def _check_cu_seqlens(
    cu: IndexArray | View | None, length: int, source: View
) -> IndexArray | View | None:
    """Check boundaries that the host sees, and bring them to where `source` is."""
    if cu is None or isinstance(cu, View):
        return cu
    check_cu_seqlens(cu, length)
    return cu if source.device == "cpu" else to_device(cu, source)


def _same(x: View, y: View) -> bool:
    return (x.address, x.shape, x.strides, x.dtype) == (y.address, y.shape, y.strides, y.dtype)


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the common shape of `a` and `b` as NumPy has it, ``None`` when there is none."""
    width = max(len(a), len(b))
    a, b = (1,) * (width - len(a)) + a, (1,) * (width - len(b)) + b
    if any(m != n and 1 not in (m, n) for m, n in zip(a, b, strict=True)):
        return None
    return tuple([n if m == 1 else m for m, n in zip(a, b, strict=True)])


def _repeat(x: View, shape: tuple[int, ...]) -> View:
    """Return `x` seen in a larger shape, with stride 0 along the axes that are repeated."""
    if x.shape == shape:
        return x
    missing = len(shape) - len(x.shape)
    own = (1,) * missing + x.shape
    strides = (0,) * missing + x.strides
    kept = [0 if n == 1 and m != 1 else s for m, n, s in zip(shape, own, strides, strict=True)]
    return x.seen_as(shape, tuple(kept))
