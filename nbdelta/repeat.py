"""The short way of a call like an earlier one: same shapes, strides, dtypes and options.

What such a call will do was found out, and found to be right, the first time. What is left are the
checks that see addresses and slots, the allocation of the results and the kernel. Whatever is not
as expected takes the long way (`nbdelta.problem`), which knows how to say so.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import is_
from typing import Any

import numpy as np

from nbdelta.arrays import empty as new_array
from nbdelta.arrays import numpy_address, view
from nbdelta.dispatch import stage
from nbdelta.problem import Problem
from nbdelta.result_memory import LARGE

Arrays = tuple[Any, ...]
# places of arguments in a call's arrays, which come in the order of `nbdelta.structure.Arrays`
INITIAL_STATE, OUT, CU_SEQLENS, STATE_INDICES, ACCEPTED, FINAL_STATE = 5, 8, 9, 10, 11, 12

# the newest first; steps of one loop have few structures, and chunks as many as lengths
_step_plans: list["_Plan"] = []
_chunk_plans: list["_Plan"] = []
_STEP_PLANS_AT_MOST, _CHUNK_PLANS_AT_MOST = 64, 8


def results_of(arrays: Arrays, options: tuple[object, ...]) -> tuple[Any, ...] | None:
    """Make a call the short way, if it has one.

    Parameters
    ----------
    arrays : tuple
        What the user gave, in the order of `nbdelta.structure.Arrays`.
    options : tuple
        All other arguments, and what tells the functions apart.

    Returns
    -------
    tuple or None
        What the user gets. ``None``: nothing was done, the call has to go the long way.
    """
    for plans in (_step_plans, _chunk_plans):
        for plan in plans:
            if plan.fits(options):
                results = plan.run(arrays)
                if results is not None:
                    return results
    return None


def remember(arrays: Arrays, options: tuple[object, ...], problem: Problem) -> None:
    """Keep the plan of a call that went the long way.

    Packed sequences and checkpoints have none, nor have arrays of unusual kinds, nor chunks on a
    GPU.
    """
    p = problem
    chunked = options[0] == "chunk" or (options[0] == "auto" and p.T > 1)
    unfit = arrays[CU_SEQLENS] is not None or arrays[ACCEPTED] is not None or p.checkpoints
    if unfit or 0 in (p.B, p.T) or (chunked and p.device != "cpu"):
        return
    readers: dict[int, Reader] = {}
    for i, x in enumerate(arrays):
        if x is not None:
            read = _reader(x)
            if read is None:
                return
            readers[i] = read
    slots = arrays[STATE_INDICES]
    if p.device != "cpu" and slots is not None and view(slots, "").device == "cpu":
        return
    if chunked:
        _chunk_plans.insert(0, _Plan(arrays, options, readers, problem, "chunk"))
        del _chunk_plans[_CHUNK_PLANS_AT_MOST:]
    else:
        _step_plans.insert(0, _Plan(arrays, options, readers, problem, "recurrent"))
        del _step_plans[_STEP_PLANS_AT_MOST:]


class _Plan:
    """What is known of a call before its arrays."""

    def __init__(
        self,
        arrays: Arrays,
        options: tuple[object, ...],
        readers: "dict[int, Reader]",
        problem: Problem,
        name: str,
    ) -> None:
        room, places = stage(name, problem.device), stage("recurrent", problem.device).PLACES
        self.options, self.types = options, [*map(type, options)]
        self.start, self.job = room.start, room.job_of(problem)
        self.given = [(i, places[i], read) for i, read in readers.items()]
        self.absent = [i for i, x in enumerate(arrays) if x is None]
        self.state_place, self.final_place = places[INITIAL_STATE], places[FINAL_STATE]
        self.out_place, self.slots_place = places[OUT], places[STATE_INDICES]
        self.n_slots = -1
        if arrays[STATE_INDICES] is not None and problem.device == "cpu":
            # (those on a device are not read by the host)
            self.n_slots = arrays[INITIAL_STATE].shape[0]
        final = problem.final_state
        self.in_place = final is not None and final.owner is arrays[INITIAL_STATE]
        self.new_out = None if arrays[OUT] is not None else _maker(problem.o.owner)
        self.new_state = None if final is None or self.in_place else _maker(final.owner)
        # the bytes of those that are written to must not meet those of any other one
        extents = {i: view(arrays[i], "").extent() for i in readers}
        self.written = [OUT] * (arrays[OUT] is not None) + [INITIAL_STATE] * self.in_place
        self.apart = [
            (places[i], *extents[i], [(places[j], *extents[j]) for j in extents if j != i])
            for i in self.written
        ]

    def fits(self, options: tuple[object, ...]) -> bool:
        """Whether the options are the same; equal ones of other types (1 for True) are not."""
        if all(map(is_, options, self.options)):
            return True
        return options == self.options and [*map(type, options)] == self.types

    def run(self, arrays: Arrays) -> tuple[Any, ...] | None:
        """Return the results for other arrays, or ``None`` if they are not as expected."""
        desc = self.job.desc[:]
        for i, place, read in self.given:
            at = desc[place] = read(arrays[i])
            if at < 0:
                return None
        for i in self.absent:
            if arrays[i] is not None:
                return None
        for place, low, high, others in self.apart:
            low, high = low + desc[place], high + desc[place]
            for other, start, end in others:
                if desc[other] + start < high and low < desc[other] + end:
                    return None
        for i in self.written:
            if type(arrays[i]) is np.ndarray and not arrays[i].flags.writeable:
                return None
        if self.n_slots >= 0:
            given = arrays[STATE_INDICES]
            given = given if isinstance(given, np.ndarray) else given.numpy()
            slots = np.array(given, np.int64, order="C")
            if not _are_slots(slots.tolist(), self.n_slots):
                return None
            desc[self.slots_place] = numpy_address(slots)
        out, state = arrays[OUT], None
        if self.new_out is not None:
            out, desc[self.out_place] = self.new_out()
        if self.in_place:
            state, desc[self.final_place] = arrays[INITIAL_STATE], desc[self.state_place]
        elif self.new_state is not None:
            state, desc[self.final_place] = self.new_state()
        self.start(self.job, desc)
        return out, state


def _are_slots(slots: list[int], n_slots: int) -> bool:
    """Whether each one is -1 or in the pool, and none comes twice."""
    taken = [slot for slot in slots if slot != -1]
    if not taken:
        return True
    return min(taken) >= 0 and max(taken) < n_slots and len(set(taken)) == len(taken)


# gives the address of an array, or OTHER if it is not what a plan is for
Reader = Callable[[Any], int]
OTHER = -1


def _reader(x: Any) -> Reader | None:
    """Return the reader of arrays that look like `x`; ``None``: `x` is of an unusual kind."""
    if type(x) is np.ndarray:
        return None if x.dtype == np.uint64 else _numpy_reader(x.dtype, x.shape, x.strides)
    torch = sys.modules.get("torch")
    if torch is not None and type(x) is torch.Tensor:
        return _torch_reader(torch.Tensor, x.dtype, x.shape, x.stride(), x.layout, x.device)
    return None


def _numpy_reader(dtype: Any, shape: Any, strides: Any) -> Reader:
    ndarray, address_of = np.ndarray, numpy_address

    def read(x: Any) -> int:
        if type(x) is ndarray and x.shape == shape and x.strides == strides and x.dtype == dtype:
            return address_of(x)  # type: ignore[no-any-return]
        return OTHER

    return read


def _torch_reader(Tensor: Any, *look: Any) -> Reader:
    def read(x: Any) -> int:
        if type(x) is not Tensor or x.requires_grad or x.is_neg():
            return OTHER
        if (x.dtype, x.shape, x.stride(), x.layout, x.device) != look:
            return OTHER
        # tensors under a transform of torch.func have no memory: their address is 0, or an error
        try:
            return x.data_ptr() or OTHER
        except RuntimeError:
            return OTHER

    return read


def _maker(x: Any) -> Callable[[], tuple[Any, int]]:
    """Return the function that makes an array like `x`, C-contiguous, and gives its address."""
    like = replace(view(x, ""), owner=None)  # the plan must not keep an array
    shape, dtype = tuple(x.shape), x.dtype
    if like.device == "cpu" and x.nbytes >= LARGE:

        def make_large() -> tuple[Any, int]:
            made = new_array(like, like.shape, like.dtype)
            return made.owner, made.address

        return make_large
    if isinstance(x, np.ndarray):
        empty, address_of = np.empty, numpy_address
    else:
        torch = sys.modules["torch"]
        # the device is named on the CPU too: the default one may be another
        device = torch.device(like.device)
        empty, address_of = partial(torch.empty, device=device), torch.Tensor.data_ptr

    def make() -> tuple[Any, int]:
        made = empty(shape, dtype=dtype)
        return made, address_of(made)

    return make
