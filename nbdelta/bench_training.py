"""Forward and backward pass through torch, beside transformers with autograd."""

import importlib.util

from nbdelta import bench_clock as clock
from nbdelta import bench_peers as peers
from nbdelta import console as out
from nbdelta.shapes import LAYERS
from nbdelta.testing import make_inputs, rel_l2

CASES = (("qwen3-next", 2048), ("kimi-linear", 512))
SECONDS = 2.0
# of a head's gradients, relative, to those of nbdelta
LARGEST_DIFFERENCE = 1e-3


def rows(threads, step):
    """Compare the gradients of both, then let the two take turns.

    Parameters
    ----------
    threads : int
        Of the calls.
    step : callable
        Is told each case.

    Returns
    -------
    list of dict
        Empty where torch or transformers is missing.
    """
    if not importlib.util.find_spec("torch"):
        return []
    rivals = [Ours(), *peers.if_there(Theirs)]
    if len(rivals) == 1:
        return []
    made = []
    for model, T in CASES:
        shape = LAYERS[model].shape(1, T)
        name = f"forward + backward {shape.gate.upper()}, T = {T}"
        step(name, 0)
        inputs = make_inputs(0, *shape[1:], gate=shape.gate, states=1)
        calls = {rival.name: rival.prepare(shape, inputs) for rival in rivals}
        ours, theirs = ([x.numpy() for x in call()] for call in calls.values())
        # the gradient of the initial state has its heads on axis 1
        pairs = list(zip(ours, theirs, strict=True))
        differences = [rel_l2(*pair) for pair in pairs[:-1]]
        difference = max(*differences, rel_l2(*pairs[-1], head_axis=1))
        row = {"name": name, **shape._asdict(), "threads": threads, "difference": difference}
        row["agrees"] = bool(difference < LARGEST_DIFFERENCE)
        if row["agrees"]:
            times = clock.race(calls, SECONDS)
            row["min_ms"] = {name: 1e3 * times[name].min for name in calls}
        made.append(row)
        step("")
    return made


def table(made):
    """Return the rows as a table."""
    threads = made[0]["threads"]
    found = out.table(
        "forward + backward through torch, float32, "
        f"{threads} thread{'s' if threads > 1 else ''}: least ms",
        *("case", ">nbdelta", ">torch", ">x", ">difference"),
    )
    for row in made:
        cells = ["differs", "", ""]
        if row["agrees"]:
            ours, theirs = row["min_ms"].values()
            cells = [f"{ours:.1f}", f"{theirs:.0f}", f"{theirs / ours:.1f}"]
        found.add_row(row["name"], *cells, f"{row['difference']:.0e}")
    return found


class Ours:
    """The public function on tensors that require gradients."""

    name = "nbdelta"

    def __init__(self):
        self.torch = importlib.import_module("torch")
        self.function = importlib.import_module("nbdelta").chunk_gated_delta_rule

    def prepare(self, shape, inputs):
        """Return a call that returns all gradients."""
        torch = self.torch
        tensors = {name: torch.from_numpy(x).requires_grad_() for name, x in inputs.items()}
        state = tensors["initial_state"].detach()
        do, dht = torch.ones_like(tensors["v"].detach()), torch.ones_like(state)
        function = self.choose(shape)

        def call():
            q, k, v, *_ = tensors.values()
            rest = {name: x for name, x in tensors.items() if name not in "qkv"}
            results = function(q, k, v, **rest, **peers.OPTIONS)
            return torch.autograd.grad(results, list(tensors.values()), [do, dht])

        return call

    def choose(self, shape):
        """Return the function of a gate."""
        return self.function


class Theirs(Ours):
    """The PyTorch functions of transformers."""

    name = "torch"

    def __init__(self):
        super().__init__()
        self.functions = peers.Transformers().functions

    def choose(self, shape):
        """Return the function of a gate."""
        return self.functions[shape.gate, True]
