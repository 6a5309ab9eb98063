"""Hand-written Numba kernels for the gated delta rule (Gated DeltaNet, Kimi Delta Attention)."""

import typing as _typing

from nbdelta.ops import (
    chunk_gated_delta_rule,
    chunk_gated_delta_rule_bwd,
    chunk_kda,
    chunk_local_cumsum,
    fused_gate,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_kda,
    gated_delta_rule,
    solve_triangular,
    solve_tril,
)

__version__ = "0.1.0"

__all__ = [
    "chunk_gated_delta_rule",
    "chunk_gated_delta_rule_bwd",
    "chunk_kda",
    "chunk_local_cumsum",
    "fused_gate",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_kda",
    "gated_delta_rule",
    "solve_triangular",
    "solve_tril",
]

if _typing.TYPE_CHECKING:
    from nbdelta import naive as naive
    from nbdelta import torch as torch
    from nbdelta import transformers as transformers
else:

    def __getattr__(name):
        """Import a module of the package that not everybody needs when it is used."""
        if name not in ("naive", "torch", "transformers"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return import_module(f"{__name__}.{name}")
