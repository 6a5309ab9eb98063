"""The shapes that are measured, by the labels that the history is kept under.

A label never changes its meaning: another shape gets another label.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """One layer of a model: one gate per value head ("gda") or per key channel ("kda")."""

    gate: str
    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int


def _prefill(label, gate, H, HV, K, V, lengths):
    return {f"{label}-{name}": Shape(gate, 1, T, H, HV, K, V) for name, T in lengths.items()}


def _decode(label, gate, H, batches):
    return {f"{label}-b{B}": Shape(gate, B, 1, H, 32, 128, 128) for B in batches}


PREFILL = {
    **_prefill("qwen3-next", "gda", 16, 32, 128, 128, {"64": 64, "512": 512, "2k": 2048}),
    **_prefill("kimi-linear", "kda", 32, 32, 128, 128, {"64": 64, "512": 512, "2k": 2048}),
    **_prefill("olmo-hybrid", "gda", 30, 30, 96, 192, {"512": 512}),
}
DECODE = {
    **_decode("decode", "gda", 16, (1, 16, 64)),
    **_decode("decode-kda", "kda", 32, (1, 16, 64)),
}
