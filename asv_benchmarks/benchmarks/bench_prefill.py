"""Chunked prefill of a layer: states in and out, l2norm in the kernel."""

import nbdelta

from .common import DEVICES, _Timed, error_of, inputs, on_device, product_floor
from .shapes import PREFILL

OPTIONS = {"use_qk_l2norm_in_kernel": True}


class _Prefill(_Timed):
    params = (DEVICES, list(PREFILL))
    param_names = ("device", "shape")
    dtype, largest_error = "float32", 1e-5

    def setup(self, device, shape):
        """Refuse to time a wrong result."""
        self.shape = PREFILL[shape]
        self.arrays = on_device(device, self.converted(inputs(self.shape)))
        assert error_of(self.call()[0], self.arrays, **OPTIONS) < self.largest_error

    def converted(self, arrays):
        """Return the arrays in the dtype of the class."""
        return arrays

    def call(self):
        """Run the layer once."""
        return nbdelta.chunk_gated_delta_rule(**self.arrays, output_final_state=True, **OPTIONS)

    def floor(self, device):
        """Return the products with the state at the speed of a matrix product."""
        return product_floor(device, self.shape.flops, self.shape.token_bytes() // 4)


class Prefill(_Prefill):
    """In float32."""


class PrefillBfloat16(_Prefill):
    """q, k, v and o in bfloat16."""

    params = (["cpu"], ["qwen3-next-2k", "kimi-linear-2k"])
    largest_error = 5e-3

    def converted(self, arrays):
        """Return q, k and v in bfloat16."""
        import ml_dtypes

        return {n: x.astype(ml_dtypes.bfloat16) if n in "qkv" else x for n, x in arrays.items()}
