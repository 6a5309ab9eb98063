"""Decode: one token of each sequence, states in place."""

import numpy as np

import nbdelta

from .common import DEVICES, _Timed, error_of, host, inputs, on_device, stream_floor
from .shapes import DECODE

OPTIONS = {"use_qk_l2norm_in_kernel": True}


class Decode(_Timed):
    """A layer's decode step on float32 states."""

    params = (DEVICES, list(DECODE))
    param_names = ("device", "shape")

    def setup(self, device, shape):
        """Refuse to time a wrong result."""
        self.shape = DECODE[shape]
        self.arrays = on_device(device, inputs(self.shape))
        before = {name: host(x).copy() for name, x in self.arrays.items()}
        assert error_of(self.call()[0], before, **OPTIONS) < 1e-5

    def call(self):
        """Step once."""
        return nbdelta.fused_recurrent_gated_delta_rule(
            **self.arrays, **OPTIONS, inplace_final_state=True
        )

    def floor(self, device):
        """Return a multiply in place of as many float32 numbers as are in the states."""
        return stream_floor(device, self.shape.state_size)


class DecodeBfloat16State(Decode):
    """The same on a pool of bfloat16 states, over the floor of float32 states."""

    params = (["cpu"], ["decode-b64", "decode-kda-b64"])

    def setup(self, device, shape):
        """Make the pool."""
        import ml_dtypes

        self.shape = DECODE[shape]
        self.arrays = on_device(device, inputs(self.shape))
        self.arrays["initial_state"] = self.arrays["initial_state"].astype(ml_dtypes.bfloat16)
        self.indices = np.arange(self.shape.B)
        before = {name: x.copy() for name, x in self.arrays.items()}
        assert error_of(self.call()[0], before, **OPTIONS) < 1e-5

    def call(self):
        """Step once."""
        return nbdelta.fused_recurrent_gated_delta_rule(
            **self.arrays, **OPTIONS, state_indices=self.indices
        )
