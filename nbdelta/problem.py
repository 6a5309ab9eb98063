"""One validated call of the gated delta rule: sizes, gate layout, sequences, options, outputs.

The checks come in two kinds. Structure checks (`nbdelta.structure`) see shapes, strides, dtypes
and options, and are remembered. Value checks see addresses and the contents of the index arrays,
and run every time. Nothing is allocated or written before all have passed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nbdelta.arrays import View, empty, view
from nbdelta.checks import (
    IndexArray,
    expect_apart,
    finite_real,
    flag,
    index_view,
    one_of,
    positive_int,
    read_indices,
    wrong_shape,
)
from nbdelta.dispatch import expect_one_device, to_device
from nbdelta.structure import Arrays, Options, Structure, see_dt_bias, structure_of

HEAD_ORDERS = ("interleaved", "tiled")
CHUNK_SIZES = (None, 16, 32, 64)
PRECISIONS = (None, "highest")


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
    cu_seqlens: IndexArray | View | None  # [N + 1]; in a call on a device these are views of it
    state_indices: IndexArray | View | None  # [N, S]
    num_accepted_tokens: IndexArray | View | None  # [N]
    lengths: IndexArray | None  # [N], of packed sequences if the host knows them
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
    # where the forward pass of the CPU leaves U for the backward pass: an address, 0 for nowhere
    kept_rows: int = 0

    @property
    def per_channel(self) -> bool:
        """Whether the gate is a number per key channel (KDA)."""
        return self.g is not None and len(self.g.shape) == 4

    @property
    def device(self) -> str:
        """The device of every array of the call."""
        return self.q.device

    def results(self) -> "tuple[Any, ...]":
        """Return what the user gets: ``(o, final_state)`` and the checkpoints if asked for."""
        final_state = None if self.final_state is None else self.final_state.owner
        if self.checkpoints is None:
            return self.o.owner, final_state
        return self.o.owner, final_state, self.checkpoints.owner


def check_options(options: Sequence[object]) -> tuple[float | None, Options]:
    """Check the scale and the other options one by one.

    Parameters
    ----------
    options : sequence of object
        The scale, then all of `Options`, as the user gave them; no interval is ``None``.

    Returns
    -------
    float or None, Options
        In types of Python alone.

    Raises
    ------
    TypeError, ValueError
        Where one is not what it should be, whatever the others are.
    """
    scale, *rest = options
    o = Options._make(rest)
    interval = o.checkpoint_interval
    return None if scale is None else finite_real(scale, "scale"), Options(
        flag(o.output_final_state, "output_final_state"),
        flag(o.use_qk_l2norm_in_kernel, "use_qk_l2norm_in_kernel"),
        flag(o.use_gate_in_kernel, "use_gate_in_kernel"),
        None if o.lower_bound is None else finite_real(o.lower_bound, "lower_bound"),
        flag(o.use_beta_sigmoid_in_kernel, "use_beta_sigmoid_in_kernel"),
        flag(o.allow_neg_eigval, "allow_neg_eigval"),
        flag(o.state_v_first, "state_v_first"),
        one_of(o.head_order, "head_order", HEAD_ORDERS),
        None if o.chunk_size is None else one_of(o.chunk_size, "chunk_size", CHUNK_SIZES),
        None if o.precision is None else one_of(o.precision, "precision", PRECISIONS),
        0 if interval is None else positive_int(interval, "checkpoint_interval"),
        flag(o.inplace_final_state, "inplace_final_state"),
        o.per_channel_only,
    )


def prepare(arrays: Sequence[object], options: Sequence[object]) -> Problem:
    """Check a call of one of the five forms of the rule, then allocate its results.

    Parameters
    ----------
    arrays : sequence of object
        What the user gave, in the order of `Arrays`; all but q, k and v may be ``None``.
    options : sequence of object
        As in `check_options`.

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
    scale, checked = check_options(options)
    seen = Arrays._make([_see(x, name) for x, name in zip(arrays, Arrays._fields, strict=True)])
    expect_one_device(Arrays._fields, seen, host_too=_INDICES)
    structure = structure_of(seen, checked)
    indices = _check_values(seen, checked.checkpoint_interval, structure)
    return _allocate(seen, checked, structure, indices, scale)


def _see(x: object, name: str) -> View | None:
    if x is None and name not in _REQUIRED:
        return None
    return index_view(x, name) if name in _INDICES else view(x, name)


class _Indices(NamedTuple):
    """What the index arrays hold."""

    cu_seqlens: IndexArray | View | None
    state_indices: IndexArray | View | None
    num_accepted_tokens: IndexArray | View | None
    lengths: IndexArray | None
    n_checkpoints: int


def _check_values(arrays: Arrays, interval: int, structure: Structure) -> _Indices:
    """Check addresses and the contents of the index arrays."""
    if arrays.out is not None:
        expect_apart(Arrays._fields, arrays, structure.extents, _OUT)
    if structure.in_place:
        expect_apart(Arrays._fields, arrays, structure.extents, _INITIAL_STATE)
    cu = slots = accepted = lengths = None
    longest = structure.T
    n_checkpoints = structure.N * (structure.T // interval) if interval else 0
    if arrays.cu_seqlens is not None:
        cu = read_indices(arrays.cu_seqlens, "cu_seqlens")
        if isinstance(cu, View):
            longest = 0  # nobody knows: the kernels drop what finds no slot
            if interval:
                raise ValueError(
                    f"checkpoint_interval: needs cu_seqlens on the host, got it on {cu.device}; "
                    "how many checkpoints there are depends on it"
                )
        else:
            lengths = check_cu_seqlens(cu, structure.T)
            longest = int(lengths.max(initial=0))
            if interval:
                n_checkpoints = int((lengths // interval).sum())
    if arrays.state_indices is not None:
        assert arrays.initial_state is not None  # the structure was checked
        slots = read_indices(arrays.state_indices, "state_indices")
        if len(slots.shape) == 1:
            slots = _as_column(slots)
        elif slots.shape[1] < max(longest, 1):
            expected = f"[N, S] with S >= {max(longest, 1)} (tokens of the longest sequence)"
            raise wrong_shape("state_indices", expected, slots.shape)
        if not isinstance(slots, View):
            _check_slots(slots, arrays.initial_state.shape[0])
    if arrays.num_accepted_tokens is not None:
        assert slots is not None
        accepted = read_indices(arrays.num_accepted_tokens, "num_accepted_tokens")
        if not isinstance(accepted, View):
            _check_accepted(accepted, slots.shape[1])
    if arrays.q.device != "cpu":
        cu, slots, accepted = (
            to_device(x, arrays.q) if isinstance(x, np.ndarray) else x
            for x in (cu, slots, accepted)
        )
    return _Indices(cu, slots, accepted, lengths, n_checkpoints)


def _as_column(slots: IndexArray | View) -> IndexArray | View:
    if isinstance(slots, View):
        return slots.seen_as((*slots.shape, 1), (*slots.strides, 0))
    return slots[:, None]


_REQUIRED = ("q", "k", "v")
_INDICES = ("cu_seqlens", "state_indices", "num_accepted_tokens")
_OUT = Arrays._fields.index("out")
_INITIAL_STATE = Arrays._fields.index("initial_state")


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


def _check_slots(slots: IndexArray, n_slots: int) -> None:
    """Raise unless every slot is -1 or in the pool, and none comes twice."""
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


def _check_accepted(accepted: IndexArray, S: int) -> None:
    for n in accepted.tolist():
        if not 1 <= n <= S:
            raise ValueError(f"num_accepted_tokens: expected 1 to S = {S}, got {n}")


def _allocate(
    arrays: Arrays,
    options: Options,
    structure: Structure,
    indices: _Indices,
    scale: float | None,
) -> Problem:
    """Allocate the results and lay out the views of a call that passed every check."""
    q, k, v, g, beta, initial_state, A_log, dt_bias, out = arrays[:9]
    B, T, H, HV, K, V, N, state_shape, state_dtype, in_place, _ = structure
    if dt_bias is not None:
        dt_bias = see_dt_bias(dt_bias, HV, K if g is not None and len(g.shape) == 4 else None)
    final_state = checkpoints = None
    if options.output_final_state and not in_place:
        final_state = empty(q, (N, *state_shape), state_dtype)
    if options.checkpoint_interval:
        checkpoints = empty(q, (indices.n_checkpoints, *state_shape), state_dtype)
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
        cu_seqlens=indices.cu_seqlens,
        state_indices=indices.state_indices,
        num_accepted_tokens=indices.num_accepted_tokens,
        lengths=indices.lengths,
        checkpoint_interval=options.checkpoint_interval,
        B=B,
        T=T,
        H=H,
        HV=HV,
        K=K,
        V=V,
        N=N,
        scale=K**-0.5 if scale is None else scale,
        use_qk_l2norm_in_kernel=options.use_qk_l2norm_in_kernel,
        use_gate_in_kernel=options.use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=options.use_beta_sigmoid_in_kernel,
        allow_neg_eigval=options.allow_neg_eigval,
        lower_bound=options.lower_bound,
        head_order=options.head_order,
        chunk_size=options.chunk_size,
        precision=options.precision,
    )
