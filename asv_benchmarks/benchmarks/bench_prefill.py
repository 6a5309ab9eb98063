"""Chunked prefill: milliseconds of a layer, states in and out, l2norm in the kernel."""

import nbdelta

from .common import DEVICES, best_ms, error_of, inputs, on_device
from .shapes import PREFILL

OPTIONS = {"use_qk_l2norm_in_kernel": True}


class Prefill:
    """A layer's prefill."""

    params = (DEVICES, list(PREFILL))
    param_names = ("device", "shape")
    version, timeout = "1", 600

    def setup(self, device, shape):
        """Refuse to time a wrong result."""
        self.arrays = on_device(device, inputs(PREFILL[shape]))
        assert error_of(self.call()[0], self.arrays, **OPTIONS) < 1e-5

    def call(self):
        """Run the layer once."""
        return nbdelta.chunk_gated_delta_rule(**self.arrays, output_final_state=True, **OPTIONS)

    def track_best(self, device, shape):
        """Fastest of many calls."""
        return best_ms(self.call, device)

    track_best.unit = "ms"


class PrefillBfloat16:
    """The same with bfloat16 inputs."""

    params = (["qwen3-next-2k", "kimi-linear-2k"],)
    param_names = ("shape",)
    version, timeout = "1", 600

    def setup(self, shape):
        """Refuse to time a wrong result."""
        import ml_dtypes

        self.arrays = inputs(PREFILL[shape])
        for name in ("q", "k", "v"):
            self.arrays[name] = self.arrays[name].astype(ml_dtypes.bfloat16)
        assert error_of(self.call()[0], self.arrays, **OPTIONS) < 5e-3

    def call(self):
        """Run the layer once."""
        return nbdelta.chunk_gated_delta_rule(**self.arrays, output_final_state=True, **OPTIONS)

    def track_best(self, shape):
        """Fastest of many calls."""
        return best_ms(self.call)

    track_best.unit = "ms"
