"""Peak memory of the process."""

import numpy as np

import nbdelta

from .common import inputs
from .shapes import Shape


class PeakMemory:
    """A prefill of 8192 tokens beside a process that only has its inputs."""

    params = (["gda", "kda"],)
    param_names = ("gate",)
    version = "1"

    def setup(self, gate):
        """Compile, and make inputs that take no more memory while they are made."""
        nbdelta.chunk_gated_delta_rule(**inputs(Shape(gate, 1, 16, 4, 8, 128, 128)))
        keys, values = np.full((1, 8192, 4, 128), 0.1, "f4"), np.full((1, 8192, 8, 128), 0.1, "f4")
        gates = -values if gate == "kda" else -values[..., 0].copy()
        self.arrays = {"q": keys, "k": keys, "v": values, "g": gates, "beta": values[..., 0]}

    def peakmem_reference(self, gate):
        """Hold the inputs alone."""

    def peakmem_prefill(self, gate):
        """Hold inputs, outputs and scratch."""
        nbdelta.chunk_gated_delta_rule(**self.arrays, output_final_state=True)
