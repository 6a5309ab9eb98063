"""The public functions: docstring, validation, dispatch."""

from nbdelta.ops.blocks import chunk_local_cumsum, fused_gate, solve_triangular, solve_tril
from nbdelta.ops.chunk import chunk_gated_delta_rule, chunk_gated_delta_rule_bwd, chunk_kda
from nbdelta.ops.recurrent import fused_recurrent_gated_delta_rule, fused_recurrent_kda
from nbdelta.ops.rule import gated_delta_rule

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
