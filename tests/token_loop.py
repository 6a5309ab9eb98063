"""The rule token by token in PyTorch, for autograd: the judge of gradients."""

from itertools import pairwise

import torch


def torch_rule(x):
    """The rule token by token in float64, for autograd."""
    q, k, v, g, beta = (x[name] for name in ("q", "k", "v", "g", "beta"))
    if x.get("use_qk_l2norm_in_kernel"):
        q, k = (y / ((y * y).sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    heads = torch.arange(HV)
    key_head = heads % H if x.get("head_order") == "tiled" else heads // (HV // H)
    q, k = q[:, :, key_head] * (x.get("scale") or K**-0.5), k[:, :, key_head]
    if x.get("use_gate_in_kernel"):
        rest = (1,) * (g.dim() - 3)
        rate = x["A_log"].exp().view(HV, *rest) if x.get("A_log") is not None else 1.0
        bias = x.get("dt_bias")
        if bias is not None:
            g = g + (bias.view(HV, *rest) if bias.numel() == HV else bias.view(HV, K))
        if x.get("lower_bound") is None:
            g = -rate * torch.nn.functional.softplus(g, threshold=1e9)
        else:
            g = x["lower_bound"] * torch.sigmoid(rate * g)
    if g is None:
        g = torch.zeros(B, T, HV, dtype=q.dtype)
    g = g if g.dim() == 4 else g[..., None].expand(B, T, HV, K)
    beta = torch.ones(B, T, HV, dtype=q.dtype) if beta is None else beta
    if x.get("use_beta_sigmoid_in_kernel"):
        beta = torch.sigmoid(beta) * (2.0 if x.get("allow_neg_eigval") else 1.0)
    rows = [(b, 0, T) for b in range(B)]
    if x.get("cu_seqlens") is not None:
        ends = [int(e) for e in x["cu_seqlens"]]
        rows = [(0, bos, eos) for bos, eos in pairwise(ends)]
    # apart at once: the gradient of an index is as large as what it points into
    q, k, v, g, beta = ([row.unbind(0) for row in x.unbind(0)] for x in (q, k, v, g.exp(), beta))
    outputs, states = [], []
    for n, (b, bos, eos) in enumerate(rows):
        S = torch.zeros(HV, K, V, dtype=v[b][0].dtype)
        if x.get("initial_state") is not None:
            S = x["initial_state"][n]
            S = S.transpose(-1, -2) if x.get("state_v_first") else S
        for t in range(bos, eos):
            S = S * g[b][t][:, :, None]
            error = v[b][t] - (S * k[b][t][:, :, None]).sum(1)
            S = S + k[b][t][:, :, None] * (beta[b][t][:, None] * error)[:, None, :]
            outputs.append((S * q[b][t][:, :, None]).sum(1))
        states.append(S.transpose(-1, -2) if x.get("state_v_first") else S)
    return torch.stack(outputs).view(B, T, HV, V), torch.stack(states)
