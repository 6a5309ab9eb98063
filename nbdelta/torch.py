"""The rule as operators of PyTorch: automatic gradients, compilation, export, autocast.

Imported by the public functions for calls that PyTorch has to know of: a gradient is recorded, a
graph is traced, or autocast is on. Any other call goes by without it.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from nbdelta.arrays import empty, view
from nbdelta.dispatch import run, stage
from nbdelta.gradients import (
    fill_gradients,
    keep_states,
    most_states,
    prepare_gradients,
    room_for_rows,
)
from nbdelta.ops._apply import apply
from nbdelta.problem import Problem, check_options, prepare
from nbdelta.structure import Arrays, Options

# in the order of `Arrays` and `Options`, without what no gradient goes through
_ARRAYS = (
    "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor? initial_state, Tensor? A_log, "
    "Tensor? dt_bias, Tensor? cu_seqlens"
)
_OPTIONS = (
    "float? scale, bool output_final_state, bool use_qk_l2norm_in_kernel, bool use_gate_in_kernel, "
    "float? lower_bound, bool use_beta_sigmoid_in_kernel, bool allow_neg_eigval, "
    "bool state_v_first, str head_order, int? chunk_size, str? precision, bool per_channel_only"
)
_N_ARRAYS, _N_OPTIONS = _ARRAYS.count(",") + 1, _OPTIONS.count(",") + 1
_WITHOUT_GRADIENT = ("out", "state_indices", "num_accepted_tokens")


def autocast(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast q, k and v as autocast casts the factors of a product; gates and states stay."""
    dtype = torch.get_autocast_dtype(arrays[0].device.type)
    return (*[_cast(x, dtype) for x in arrays[:3]], *arrays[3:])


def _cast(x: Any, dtype: torch.dtype) -> Any:
    eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(dtype) if eligible else x


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


# calls a function while torch.compile looks elsewhere, between two graphs
_disable: Any = torch.compiler.disable
outside_of_graphs = _disable(reason="nbdelta has no operator for this call")(_call)


def rule(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    """Apply the gated delta rule so that PyTorch knows of it.

    Parameters
    ----------
    arrays : tuple
        What the user gave, in the order of `nbdelta.structure.Arrays`.
    options : tuple
        The algorithm, the scale, then the others in the order of `nbdelta.structure.Options`.

    Returns
    -------
    o, final_state : tensor
        The final state is ``None`` where it was not asked for.
    """
    a: Any = Arrays._make(arrays)
    algorithm, scale, *others = options
    checked = Options._make(others)
    compiling = torch.compiler.is_compiling()
    if not compiling:  # else options may be symbols; the operator checks them when it runs
        scale, checked = check_options((scale, *others))
    for name, given in (
        *[(name, getattr(a, name) is not None) for name in _WITHOUT_GRADIENT],
        ("checkpoint_interval", checked.checkpoint_interval),
        ("inplace_final_state", checked.inplace_final_state),
    ):
        if given and torch.compiler.is_dynamo_compiling():
            results: tuple[Any, Any] = outside_of_graphs(apply, arrays, options)
            return results
        if given:
            raise ValueError(
                f"{name}: has no gradient and is not part of a traced graph; leave it out, or call "
                "under torch.no_grad() and uncompiled"
            )
    if not compiling and torch._C._are_functorch_transforms_active():
        raise ValueError("q: torch.func (vmap, grad, jvp, ...) is not supported; use autograd")
    cu_seqlens = a.cu_seqlens
    if cu_seqlens is not None and not isinstance(cu_seqlens, Tensor):
        cu_seqlens = torch.as_tensor(cu_seqlens, device="cpu")  # not the default device
    tensors = (*a[: _N_ARRAYS - 1], cu_seqlens)
    for name, x in zip(Arrays._fields, tensors):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, as q is, got {type(x).__name__}")
    keep = torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in tensors])
    shared = (scale, *checked[: _N_OPTIONS - 2], checked.per_channel_only)
    o, final_state, _ = _forward(*tensors, *shared, algorithm, keep)
    return o, final_state if checked.output_final_state else None


def _arguments(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the first arguments of an operator as those of `nbdelta.problem.prepare`."""
    *tensors, cu_seqlens = args[:_N_ARRAYS]
    *options, per_channel_only = args[_N_ARRAYS : _N_ARRAYS + _N_OPTIONS]
    return (*tensors, None, cu_seqlens, None, None), (*options, None, False, per_channel_only)


@custom_op(
    "nbdelta::gated_delta_rule",
    mutates_args=(),
    schema=f"({_ARRAYS}, {_OPTIONS}, str algorithm, bool keep) -> (Tensor, Tensor, Tensor)",
)
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return o, the final states and what the backward pass wants; empty where not wanted."""
    arrays, options = _arguments(args)
    *_, algorithm, keep = args
    problem = prepare(arrays, options)
    like = view(arrays[0], "q")
    shape = _shape_of_states(arrays, _what_to_keep(keep, algorithm), like.device)
    kept = empty(like, shape, "float64" if like.dtype == "float64" else "float32")
    states: Any = kept.owner
    if keep:
        keep_states(problem, kept)
        if kept.device == "cpu":
            _clear_the_rest(problem, states)
        elif problem.cu_seqlens is not None and problem.lengths is None:
            # only the device knows how many there are
            stage("chunk_backward", problem.device).clear_unused_states(problem)
        elif problem.lengths is not None:
            states[int((problem.lengths // problem.checkpoint_interval).sum()) :] = 0
    run(problem, algorithm)
    final_state = problem.final_state
    o: Any = problem.o.owner
    last: Any = states.new_empty(0) if final_state is None else final_state.owner
    return o, last, states


NOTHING, STATES, ROWS_TOO = range(3)


def _what_to_keep(keep: bool, algorithm: str) -> int:
    """Token by token there is no U to keep."""
    if not keep:
        return NOTHING
    return STATES if algorithm == "recurrent" else ROWS_TOO


def _clear_the_rest(problem: Problem, states: Tensor) -> None:
    """Clear what the forward pass may leave as it is, where shapes alone ask for too much.

    By one thread: those of PyTorch would go on watching for work beside the kernels'.
    """
    p, count = problem, states.shape[0]
    address, size = states.data_ptr(), states.nbytes // max(count, 1)
    most, short = most_states("cpu", p.B, p.T), p.T <= 1
    if p.lengths is not None:
        first = int((p.lengths // p.checkpoint_interval).sum())
        short = bool((p.lengths <= 1).any())
        ctypes.memset(address + first * size, 0, (most - first) * size)
    if p.kept_rows:
        first = most if short else count - 1
        ctypes.memset(address + first * size, 0, (count - first) * size)


def _shape_of_states(arrays: tuple[Any, ...], keep: int, device: str) -> tuple[int, ...]:
    q, v = arrays[0], arrays[2]
    B, T, _, K = q.shape
    HV, V = v.shape[2:]
    n = most_states(device, B, T) if keep else 0
    if keep == ROWS_TOO:
        n += room_for_rows(device, str(q.dtype).rpartition(".")[2], B, T, K, V)
    return n, HV, K, V


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@_forward.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    arrays, options = _arguments(args)
    a: Any = Arrays._make(arrays)
    o = Options._make(options[1:])
    B, T, _, K = a.q.shape
    HV, V = a.v.shape[2:]
    state = a.q.new_empty(0)
    if o.output_final_state:
        N = B if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
        dtype = _state_dtype(a.q) if a.initial_state is None else a.initial_state.dtype
        state = a.q.new_empty((N, HV, V, K) if o.state_v_first else (N, HV, K, V), dtype=dtype)
    *_, algorithm, keep = args
    shape = _shape_of_states(arrays, _what_to_keep(keep, algorithm), str(a.q.device))
    states = a.q.new_empty(shape, dtype=_state_dtype(a.q))
    return a.q.new_empty((B, T, HV, V)), state, states


@custom_op(
    "nbdelta::gated_delta_rule_bwd",
    mutates_args=(),
    schema=f"({_ARRAYS}, {_OPTIONS}, Tensor? do, Tensor? dht, Tensor states) -> Tensor[]",
)
def _backward(*args: Any) -> list[Tensor]:
    """Return the gradients of all tensors that are given but cu_seqlens, in their order."""
    *_, do, dht, states = args
    gradients = prepare_gradients(*_arguments(args), do, dht)
    keep_states(gradients.problem, view(states, "states"))
    fill_gradients(gradients)
    results: Any = gradients.results()
    return [dx for dx in results if dx is not None]


@_backward.register_fake
def _(*args: Any) -> list[Tensor]:
    tensors = args[: _N_ARRAYS - 1]
    return [x.new_empty(x.shape) for x in tensors if x is not None]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, final_state, states = output
    ctx.options = inputs[_N_ARRAYS : _N_ARRAYS + _N_OPTIONS]
    ctx.count = len(inputs)
    ctx.save_for_backward(*inputs[:_N_ARRAYS], states)
    without = [states] if final_state.dim() > 1 else [states, final_state]
    ctx.mark_non_differentiable(*without)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, do: Tensor | None, dht: Tensor | None, _: None) -> tuple[Any, ...]:
    nothing: tuple[None, ...] = (None,) * ctx.count
    if do is None and dht is None:
        return nothing
    *tensors, states = ctx.saved_tensors
    found = iter(_backward(*tensors, *ctx.options, do, dht, states))
    gradients = [None if x is None else next(found) for x in tensors[:-1]]
    return (*gradients, *nothing[len(gradients) :])


def _no_second_derivative(ctx: Any, *args: Any) -> None:
    raise RuntimeError("nbdelta: the gradients of the rule have no gradients (create_graph=True)")


_forward.register_autograd(_gradients, setup_context=_keep_for_backward)
_backward.register_autograd(_no_second_derivative)
