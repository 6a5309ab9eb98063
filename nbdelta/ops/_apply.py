"""The way of a call of the rule from the public functions on."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from nbdelta import repeat
from nbdelta.arrays import Array, expect_no_tangent
from nbdelta.dispatch import run
from nbdelta.problem import prepare
from nbdelta.structure import Arrays

# the results are arrays of the kind of the first argument; `final_state` may be None all the same,
# as in typeshed's own stubs, so that callers who asked for it need no assertion
ArrayT = TypeVar("ArrayT", bound=Array)
P = ParamSpec("P")
R = TypeVar("R")


def apply(arrays: repeat.Arrays, options: tuple[object, ...]) -> tuple[Any, ...]:
    """Make a call of the rule by the shortest way that it can go.

    `arrays` are in the order of `nbdelta.structure.Arrays`, `options` are the algorithm, the scale,
    and the rest in the order of `nbdelta.structure.Options`.
    """
    torch = sys.modules.get("torch")
    if torch is not None and not isinstance(arrays[0], torch.Tensor):
        if torch.compiler.is_dynamo_compiling():
            return _outside_of_graphs(apply, arrays, options)
        torch = None
    if torch is not None:
        if torch.autograd.forward_ad._current_level >= 0:
            for name, x in zip(Arrays._fields, arrays):
                expect_no_tangent(x, name)
        kind = "cpu" if arrays[0].is_cpu else arrays[0].device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            from nbdelta.torch import autocast

            arrays = autocast(arrays)
        if torch.compiler.is_compiling() or _is_traced(torch):
            return _recorded(arrays, options)
    results = repeat.results_of(arrays, options)
    if results is None:
        if torch is not None and torch.is_grad_enabled():
            if any([isinstance(x, torch.Tensor) and x.requires_grad for x in arrays]):
                return _recorded(arrays, options)
        algorithm, *others = options
        problem = prepare(arrays, others)
        run(problem, str(algorithm))
        repeat.remember(arrays, options, problem)
        results = problem.results()
    return results


def no_operator(function: Callable[P, R]) -> Callable[P, R]:
    """Keep a function that PyTorch does not know of out of its graphs.

    Parameters
    ----------
    function : callable
        A public function whose first argument is an array.

    Returns
    -------
    callable
        The function; where `torch.compile` looks on, it is called between two graphs, and other
        tracers, which would take its results for constants, are refused.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        torch = sys.modules.get("torch")
        if torch is not None:
            if torch.compiler.is_dynamo_compiling():
                return _outside_of_graphs(call, *args, **kwargs)
            if _is_traced(torch):
                for name, x in inspect.signature(function).bind(*args, **kwargs).arguments.items():
                    if isinstance(x, torch.Tensor):
                        raise ValueError(
                            f"{name}: {function.__name__} is no operator of PyTorch and cannot be "
                            "part of a traced graph"
                        )
        return function(*args, **kwargs)

    return call


def _outside_of_graphs(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function while torch.compile looks elsewhere."""
    from nbdelta.torch import outside_of_graphs

    result: R = outside_of_graphs(function, *args, **kwargs)
    return result


def _is_traced(torch: Any) -> bool:
    """Whether torch.jit.trace, make_fx or FakeTensorMode look at what is called."""
    if torch._C._is_tracing():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    key, mode_of = torch._C._TorchDispatchModeKey, torch._C._get_dispatch_mode
    return mode_of(key.PROXY) is not None or mode_of(key.FAKE) is not None


def _recorded(arrays: repeat.Arrays, options: tuple[object, ...]) -> tuple[Any, ...]:
    """Make a call that PyTorch has to know of."""
    from nbdelta.torch import rule

    return rule(arrays, options)
