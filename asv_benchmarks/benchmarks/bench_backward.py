"""Gradients of a layer's prefill."""

import numpy as np

import nbdelta

from .common import _Timed, inputs, on_device, product_floor, public
from .shapes import PREFILL, Shape

OPTIONS = {"use_qk_l2norm_in_kernel": True}


class Backward(_Timed):
    """The backward pass alone, its own run of the forward pass included."""

    params = (["cpu", "cpu-1-thread"], ["qwen3-next-2k", "kimi-linear-512"])
    param_names = ("device", "shape")

    def setup(self, device, shape):
        """Refuse to time a wrong gradient."""
        self.function = public("chunk_gated_delta_rule_bwd")
        _check(self.function, PREFILL[shape].gate)
        self.shape = PREFILL[shape]
        self.arrays = on_device(device, inputs(self.shape))
        self.do = np.random.default_rng(1).random(self.arrays["v"].shape, np.float32)

    def call(self):
        """Run it once."""
        return self.function(**self.arrays, do=self.do, **OPTIONS)

    def floor(self, device):
        """Return twice the forward pass's products with the state."""
        return product_floor(device, 2 * self.shape.flops, 0)


def _check(function, gate):
    """Compare with a central difference, in float64, along one direction of all the inputs."""
    arrays = inputs(Shape(gate, 1, 40, 1, 2, 24, 16), "float64")
    rng = np.random.default_rng(2)
    ways = {name: rng.standard_normal(x.shape) for name, x in arrays.items()}
    do = rng.standard_normal(arrays["v"].shape)
    names = ("q", "k", "v", "g", "beta", "initial_state")
    gradients = dict(zip(names, function(**arrays, do=do, **OPTIONS), strict=True))
    slope = sum(np.vdot(ways[name], gradients[name]) for name in names)
    ends = []
    for step in (1e-5, -1e-5):
        moved = {name: x + step * ways[name] for name, x in arrays.items()}
        ends.append(np.vdot(do, nbdelta.chunk_gated_delta_rule(**moved, **OPTIONS)[0]))
    assert abs((ends[0] - ends[1]) / 2e-5 - slope) < 1e-6 * abs(slope)
