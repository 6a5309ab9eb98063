"""Decode: milliseconds of one token of each sequence, states in place."""

import numpy as np

import nbdelta

from .common import DEVICES, best_ms, error_of, host, inputs, on_device
from .shapes import DECODE


class Decode:
    """A layer's decode step on float32 states."""

    params = (DEVICES, list(DECODE))
    param_names = ("device", "shape")
    version, timeout = "1", 600

    def setup(self, device, shape):
        """Refuse to time a wrong result."""
        self.arrays = on_device(device, inputs(DECODE[shape]))
        before = {name: host(x).copy() for name, x in self.arrays.items()}
        assert error_of(self.call()[0], before, use_qk_l2norm_in_kernel=True) < 1e-5

    def call(self):
        """Step once."""
        return nbdelta.fused_recurrent_gated_delta_rule(
            **self.arrays, use_qk_l2norm_in_kernel=True, inplace_final_state=True
        )

    def track_best(self, device, shape):
        """Fastest of many steps."""
        return best_ms(self.call, device)

    track_best.unit = "ms"


class DecodeBfloat16State:
    """The same on a pool of bfloat16 states."""

    params = (["decode-b64", "decode-kda-b64"],)
    param_names = ("shape",)
    version, timeout = "1", 600

    def setup(self, shape):
        """Make the pool."""
        import ml_dtypes

        self.arrays = inputs(DECODE[shape])
        self.arrays["initial_state"] = self.arrays["initial_state"].astype(ml_dtypes.bfloat16)
        self.indices = np.arange(DECODE[shape].B)
        before = {name: x.copy() for name, x in self.arrays.items()}
        assert error_of(self.call()[0], before, use_qk_l2norm_in_kernel=True) < 1e-5

    def call(self):
        """Step once."""
        return nbdelta.fused_recurrent_gated_delta_rule(
            **self.arrays, state_indices=self.indices, use_qk_l2norm_in_kernel=True
        )

    def track_best(self, shape):
        """Fastest of many steps."""
        return best_ms(self.call)

    track_best.unit = "ms"
