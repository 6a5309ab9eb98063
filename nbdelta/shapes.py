"""The layers and shapes that ``bench``, ``explain`` and the benchmark history measure.

A label never changes its meaning: another shape gets another label. The standard library alone is
imported, since the benchmark history reads this file beside older versions of the package.
"""

from typing import NamedTuple


class Layer(NamedTuple):
    """Heads of a model's layer: one gate per value head ("gda") or per key channel ("kda")."""

    gate: str
    H: int
    HV: int
    K: int
    V: int

    def shape(self, B, T):
        """Return the shape of a call with B sequences of T tokens."""
        return Shape(self.gate, B, T, *self[1:])


class Shape(NamedTuple):
    """Gate and sizes of a call."""

    gate: str
    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int

    @property
    def flops(self):
        """Of the three products with the state, which no algorithm can do without."""
        return 6 * self.K * self.V * self.HV * self.B * self.T

    @property
    def state_size(self):
        """Numbers in the states."""
        return self.B * self.HV * self.K * self.V

    def token_bytes(self, size=4):
        """Bytes of q, k, v and o with `size` bytes a number, of beta and the gates in float32."""
        gates = self.HV * (self.K + 1 if self.gate == "kda" else 2)
        numbers = 2 * self.H * self.K + 2 * self.HV * self.V
        return self.B * self.T * (size * numbers + 4 * gates)


LAYERS = {
    "qwen3-next": Layer("gda", 16, 32, 128, 128),
    "kimi-linear": Layer("kda", 32, 32, 128, 128),
    "olmo-hybrid": Layer("gda", 30, 30, 96, 192),
}


def _prefill(name, lengths):
    return {f"{name}-{label}": LAYERS[name].shape(1, T) for label, T in lengths.items()}


def _decode(label, name, batches):
    return {f"{label}-b{B}": LAYERS[name].shape(B, 1) for B in batches}


PREFILL = {
    **_prefill("qwen3-next", {"64": 64, "512": 512, "2k": 2048}),
    **_prefill("kimi-linear", {"64": 64, "512": 512, "2k": 2048}),
    **_prefill("olmo-hybrid", {"512": 512}),
}
DECODE = {
    **_decode("decode", "qwen3-next", (1, 16, 64)),
    **_decode("decode-kda", "kimi-linear", (1, 16, 64)),
}
