"""Ten lines: a prefill and a decode step with NumPy arrays."""

import numpy as np

import nbdelta

rng = np.random.default_rng(0)
B, T, H, HV, K, V = 1, 100, 2, 4, 64, 96
q, k = rng.standard_normal((2, B, T, H, K), dtype=np.float32)
v = rng.standard_normal((B, T, HV, V), dtype=np.float32)
g = -rng.random((B, T, HV), dtype=np.float32)  # the natural logarithm of the decay
beta = rng.random((B, T, HV), dtype=np.float32)

options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
o, state = nbdelta.gated_delta_rule(q, k, v, g, beta, **options)

# the next token goes on from the state: here the last one again, so that both can be compared
_, state = nbdelta.gated_delta_rule(
    q[:, :-1], k[:, :-1], v[:, :-1], g[:, :-1], beta[:, :-1], **options
)
last = slice(T - 1, T)
o_last, state = nbdelta.fused_recurrent_gated_delta_rule(
    q[:, last], k[:, last], v[:, last], g[:, last], beta[:, last], initial_state=state, **options
)
print(o.shape, state.shape, np.abs(o_last - o[:, last]).max() < 1e-6)
