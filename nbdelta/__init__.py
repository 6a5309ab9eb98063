"""Hand-written Numba kernels for the gated delta rule (Gated DeltaNet, Kimi Delta Attention)."""

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
