"""One validated call of the backward pass: the forward call, gradients in and out."""

from collections.abc import Sequence
from dataclasses import dataclass

from nbdelta.arrays import View, empty, view
from nbdelta.checks import expect_float, expect_shape
from nbdelta.dispatch import expect_one_device, stage
from nbdelta.problem import Problem, prepare
from nbdelta.structure import Arrays, Options, see_dt_bias


@dataclass(slots=True, eq=False)
class Gradients:
    """One validated call. States are seen as ``[N, HV, K, V]``, as in `Problem`.

    The gradient of v is where the forward pass would have put o. The problem's checkpoints are the
    states at the starts of chunks, kept by the forward pass.
    """

    problem: Problem
    do: View | None  # [B, T, HV, V]
    dht: View | None  # [N, HV, K, V]
    dq: View
    dk: View
    dg: View | None
    dbeta: View | None
    dh0: View | None
    dA_log: View | None
    ddt_bias: View | None  # [HV, K or 1]

    def arrays(self) -> "tuple[View | None, ...]":
        """Return all gradients, first those that come in."""
        own = self.do, self.dht, self.dq, self.dk, self.dg, self.dbeta, self.dh0
        return (*own, self.dA_log, self.ddt_bias)

    def results(self) -> "tuple[object, ...]":
        """Return what the user gets, None for every input that was None."""
        found = [self.dq, self.dk, self.problem.o, self.dg, self.dbeta, self.dh0]
        if self.problem.use_gate_in_kernel:
            found += [self.dA_log, self.ddt_bias]
        return tuple([None if x is None else x.owner for x in found])


def most_states(device: str, B: int, T: int) -> int:
    """Return how many states the forward pass keeps for the backward pass, at the most.

    Packed sequences have as many as they have whole chunks.
    """
    return B * (T // int(stage("chunk_backward", device).CHUNK))


def room_for_rows(device: str, dtype: str, B: int, T: int, K: int, V: int) -> int:
    """Return how many states' room the rows take that the forward pass keeps behind the states."""
    room: int = stage("chunk_backward", device).room_for_rows(B * T, K, V, dtype)
    return room


def keep_states(problem: Problem, states: View | None = None) -> View:
    """Let the forward pass keep what the backward pass wants, or take what it kept.

    These are the states at the starts of chunks and, on the CPU, U of every token behind them.

    Parameters
    ----------
    problem : Problem
        A call without checkpoints.
    states : View, optional
        ``[n, HV, K, V]``, with `most_states` or as many as there are, and with or without
        `room_for_rows`: to be filled, or what an equal call kept. ``None`` allocates them.

    Returns
    -------
    View
        The states.
    """
    p = problem
    chunk = p.checkpoint_interval = int(stage("chunk_backward", p.device).CHUNK)
    most, room = (
        most_states(p.device, p.B, p.T),
        room_for_rows(p.device, p.q.dtype, p.B, p.T, p.K, p.V),
    )
    if states is None:
        if p.lengths is not None:
            most = int((p.lengths // chunk).sum())
        dtype = "float64" if p.q.dtype == "float64" else "float32"
        room = room if most else 0  # no forward pass runs
        states = empty(p.q, (most + room, p.HV, p.K, p.V), dtype)
    if room and states.shape[0] == most + room:
        p.kept_rows = states.address + most * states.strides[0]
    p.checkpoints = states
    return states


def fill_gradients(gradients: Gradients) -> None:
    """Compute the gradients of a call whose problem has the states that were kept."""
    device = gradients.problem.device
    stage("chunk_backward", device).chunk_gated_delta_rule_bwd(gradients)


def prepare_gradients(
    arrays: Sequence[object], options: Sequence[object], do: object, dht: object
) -> Gradients:
    """Check a call of the backward pass, then allocate its results.

    Parameters
    ----------
    arrays, options : sequence of object
        As in `nbdelta.problem.prepare`.
    do, dht : object
        As in `nbdelta.chunk_gated_delta_rule_bwd`.

    Returns
    -------
    Gradients
        With its results allocated and not yet filled, and without states.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `nbdelta.problem.prepare` does.
    """
    p = prepare(arrays, options)
    v_first = Options._make(options[1:]).state_v_first
    if do is None and dht is None:
        raise ValueError("do: needs a gradient of o, of the final state (dht), or both, got None")
    given, last = None, None
    if do is not None:
        given = view(do, "do")
        expect_float(given, "do")
        expect_shape(given, "do", "B T HV V", (p.B, p.T, p.HV, p.V))
    if dht is not None:
        last = view(dht, "dht")
        expect_float(last, "dht")
        if v_first:
            expect_shape(last, "dht", "N HV V K", (p.N, p.HV, p.V, p.K))
            last = last.swap_last()
        else:
            expect_shape(last, "dht", "N HV K V", (p.N, p.HV, p.K, p.V))
    expect_one_device(("q", "do", "dht"), (p.q, given, last))
    dh0 = _like(p.q, p.initial_state)
    if p.initial_state is not None and v_first:
        dh0 = _like(p.q, p.initial_state.swap_last())
        assert dh0 is not None
        dh0 = dh0.swap_last()
    ddt_bias = None
    if p.dt_bias is not None:
        raw = view(arrays[Arrays._fields.index("dt_bias")], "dt_bias")
        made = empty(p.q, raw.shape, raw.dtype)
        ddt_bias = see_dt_bias(made, p.HV, p.K if p.per_channel else None)
    dq, dk = empty(p.q, p.q.shape, p.q.dtype), empty(p.q, p.k.shape, p.k.dtype)
    dg, dbeta, dA_log = _like(p.q, p.g), _like(p.q, p.beta), _like(p.q, p.A_log)
    return Gradients(p, given, last, dq, dk, dg, dbeta, dh0, dA_log, ddt_bias)


def _like(q: View, x: View | None) -> View | None:
    """Allocate the gradient of an argument."""
    return None if x is None else empty(q, x.shape, x.dtype)
