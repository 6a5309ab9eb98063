"""Building blocks."""

import numpy as np

from .common import DEVICES, _Timed, host, on_device, product_floor, public, stream_floor


def _cumsum(rng, axis):
    x = rng.standard_normal((64, 1024, 128)).astype(np.float32)

    def expected(x):
        shape = list(x.shape)
        shape[axis : axis + 1] = [shape[axis] // 64, 64]
        return np.cumsum(x.astype(np.float64).reshape(shape), axis=axis + 1).reshape(x.shape)

    return {"x": x}, lambda x: public("chunk_local_cumsum")(x, 64, axis=axis), expected


def _solve_triangular(rng):
    L = np.tril(rng.standard_normal((256, 64, 64)), -1) * 0.1 + 2 * np.eye(64)
    b = rng.standard_normal((256, 64, 64))
    arrays = {"L": L.astype(np.float32), "b": b.astype(np.float32)}
    expected = lambda L, b: np.linalg.solve(*map(np.float64, (L, b)))  # noqa: E731
    return arrays, public("solve_triangular"), expected


def _solve_tril(rng):
    A = rng.standard_normal((1, 64, 128, 64)) * 0.1
    A *= np.tril(np.ones((64, 64)), -1)[None, :, None]

    def expected(A):
        full = np.eye(64) + A.astype(np.float64).swapaxes(1, 2)
        return np.linalg.inv(full).swapaxes(1, 2)

    return {"A": A.astype(np.float32)}, public("solve_tril"), expected


def _fused_gate(rng):
    x = rng.standard_normal((1, 2048, 32, 128)).astype(np.float32)
    arrays = {"x": x, "A_log": rng.standard_normal(32).astype(np.float32)}

    def expected(x, A_log):
        return -np.exp(np.float64(A_log))[:, None] * np.logaddexp(0, np.float64(x))

    return arrays, public("fused_gate"), expected


CASES = {
    "cumsum-axis-1": lambda rng: _cumsum(rng, 1),
    "cumsum-axis-2": lambda rng: _cumsum(rng, 2),
    "solve-triangular-256x64": _solve_triangular,
    "solve-tril-128x64": _solve_tril,
    "fused-gate-kda-2k": _fused_gate,
}


# flops of the solves; the others are a matter of memory
FLOPS = {"solve-triangular-256x64": 256 * 64**3, "solve-tril-128x64": 128 * 64**3 / 3}


class Blocks(_Timed):
    """The functions that people use alone."""

    params = (DEVICES, list(CASES))
    param_names = ("device", "case")

    def setup(self, device, case):
        """Refuse to time a wrong result."""
        arrays, self.function, expected = CASES[case](np.random.default_rng(0))
        reference = expected(**arrays)
        self.case, self.arrays = case, on_device(device, arrays)
        error = host(self.call()) - reference
        assert np.linalg.norm(error) < 2e-6 * np.linalg.norm(reference)

    def call(self):
        """Run it once."""
        return self.function(**self.arrays)

    def floor(self, device):
        """Return a matrix product, or a multiply in place of the first array."""
        size = next(iter(self.arrays.values())).size
        if self.case in FLOPS:
            return product_floor(device, FLOPS[self.case], size)
        return stream_floor(device, size)
