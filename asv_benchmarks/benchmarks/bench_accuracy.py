"""Relative L2 error to the float64 recurrence."""

import nbdelta

from .common import error_of, inputs
from .shapes import Shape

GATES = ("gda", "kda")
DTYPES = ("float32", "float64")


class Accuracy:
    """Error of 512 tokens of two value heads, K and V of different size."""

    params = (["chunk", "recurrent"], GATES, DTYPES)
    param_names = ("algorithm", "gate", "dtype")
    version = "1"

    def setup(self, algorithm, gate, dtype):
        """Make the inputs."""
        self.arrays = inputs(Shape(gate, 1, 512, 1, 2, 128, 96), dtype)
        self.function = {
            "chunk": nbdelta.chunk_gated_delta_rule,
            "recurrent": nbdelta.fused_recurrent_gated_delta_rule,
        }[algorithm]

    def track_rel_l2(self, algorithm, gate, dtype):
        """Error of all tokens."""
        o, _ = self.function(**self.arrays)
        return error_of(o, self.arrays, tokens=512)

    track_rel_l2.unit = "relative L2"
