"""The short way of a call like an earlier one: same shapes, strides, dtypes and options.

What such a call will do was found out, and found to be right, the first time. What is left are the
checks that see addresses and slots, the allocation of the results and the kernel. Whatever is not
as expected takes the long way (`nbdelta.problem`), which knows how to say so.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from nbdelta.arrays import numpy_address, view
from nbdelta.problem import Problem

Key = tuple[Any, ...]

# places of arguments in a call's arrays, which come in the order of `nbdelta.structure.Arrays`
INITIAL_STATE, OUT, CU_SEQLENS, STATE_INDICES, ACCEPTED = 5, 8, 9, 10, 11
FINAL_STATE = 12

_plans: dict[Key, "_Plan"] = {}
_PLANS_AT_MOST = 256


def key_of(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Key | None:
    """Return what decides how a call goes, but for addresses and contents.

    Parameters
    ----------
    arrays : tuple
        What the user gave, in the order of `nbdelta.structure.Arrays`.
    options : tuple
        All other arguments. Equal ones of different types (1 and True) are not the same.

    Returns
    -------
    tuple or None
        ``None``: such a call has no short way.
    """
    if arrays[CU_SEQLENS] is not None or arrays[ACCEPTED] is not None:
        return None
    looks = [
        (x.dtype, x.shape, x.strides, x.flags.writeable)
        if type(x) is np.ndarray
        else 0
        if x is None
        else _look_of(x)
        for x in arrays
    ]
    return None if None in looks else (options, *map(type, options), *looks)


def _look_of(x: Any) -> Key | None:
    torch = sys.modules.get("torch")
    if torch is None or type(x) is not torch.Tensor or x.requires_grad or x.is_neg():
        return None
    return x.dtype, x.shape, x.stride(), x.layout, x.device


def results_of(key: Key | None, arrays: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Make a call the short way; ``None``: nothing was done, it has to go the long way."""
    try:
        plan = _plans.get(key)  # type: ignore[arg-type]
    except TypeError:  # an option that cannot be hashed is none
        return None
    return None if plan is None else plan.run(arrays)


def remember(key: Key | None, arrays: tuple[Any, ...], problem: Problem) -> None:
    """Keep the plan of a call that went the long way, token by token."""
    p = problem
    if key is None or p.device != "cpu" or p.checkpoints is not None or 0 in (p.B, p.T):
        return
    if arrays[STATE_INDICES] is not None and view(arrays[STATE_INDICES], "").dtype == "uint64":
        return  # its numbers may not be those of an int64
    if len(_plans) >= _PLANS_AT_MOST:
        _plans.clear()
    _plans[key] = _Plan(arrays, problem)


class _Plan:
    """What is known of a call before its arrays."""

    def __init__(self, arrays: tuple[Any, ...], problem: Problem) -> None:
        from nbdelta.cpu import recurrent

        self.start, self.places = recurrent.start, recurrent.PLACES
        self.job = recurrent.job_of(problem)
        given = [i for i, x in enumerate(arrays) if x is not None]
        self.given = [(i, self.places[i], _address_of(arrays[i])) for i in given]
        self.n_slots = -1
        if arrays[STATE_INDICES] is not None:
            self.n_slots = arrays[INITIAL_STATE].shape[0]
        final = problem.final_state
        self.in_place = final is not None and final.owner is arrays[INITIAL_STATE]
        self.new_o = None if arrays[OUT] is not None else _maker(problem.o.owner)
        self.new_state = None if final is None or self.in_place else _maker(final.owner)
        # the bytes of those that are written to must not meet those of any other one
        extents = {i: view(arrays[i], "").extent() for i in given}
        written = [i for i in (OUT, INITIAL_STATE) if i in given and (i == OUT or self.in_place)]
        self.apart = [
            (self.places[i], *extents[i], [(self.places[j], *extents[j]) for j in given if j != i])
            for i in written
        ]

    def run(self, arrays: tuple[Any, ...]) -> tuple[Any, ...] | None:
        desc, places = self.job.desc[:], self.places
        for i, place, address_of in self.given:
            desc[place] = address_of(arrays[i])
        for place, low, high, others in self.apart:
            low, high = low + desc[place], high + desc[place]
            for other, start, end in others:
                if desc[other] + start < high and low < desc[other] + end:
                    return None
        if self.n_slots >= 0:
            slots = np.array(arrays[STATE_INDICES], np.int64, order="C")
            if not _are_slots(slots.tolist(), self.n_slots):
                return None
            desc[places[STATE_INDICES]] = numpy_address(slots)
        o, state = arrays[OUT], None
        if self.new_o is not None:
            o, desc[places[OUT]] = self.new_o()
        if self.in_place:
            state, desc[places[FINAL_STATE]] = arrays[INITIAL_STATE], desc[places[INITIAL_STATE]]
        elif self.new_state is not None:
            state, desc[places[FINAL_STATE]] = self.new_state()
        self.start(self.job, desc)
        return o, state


def _are_slots(slots: list[int], n_slots: int) -> bool:
    """Whether each one is -1 or in the pool, and none comes twice."""
    taken = [slot for slot in slots if slot != -1]
    if not taken:
        return True
    return min(taken) >= 0 and max(taken) < n_slots and len(set(taken)) == len(taken)


def _address_of(x: Any) -> Callable[[Any], int]:
    """Return the function that gives the address of an array like `x`."""
    return numpy_address if isinstance(x, np.ndarray) else type(x).data_ptr  # type: ignore[no-any-return]


def _maker(x: Any) -> Callable[[], tuple[Any, int]]:
    """Return the function that makes an array like `x`, C-contiguous, and gives its address."""
    shape, dtype, address_of = tuple(x.shape), x.dtype, _address_of(x)
    empty = np.empty if isinstance(x, np.ndarray) else sys.modules["torch"].empty

    def make() -> tuple[Any, int]:
        made = empty(shape, dtype=dtype)
        return made, address_of(made)

    return make
