"""The float64 reference: every public function, written from the mathematics, in plain NumPy.

The rule per token, with the state ``S`` of shape ``[K, V]``::

    S <- e^g S
    d <- beta (v - S^T k)
    S <- S + k d^T
    o <- scale S^T q

Everything here is slow, small and independent of the kernels. Arguments are those of the public
functions, but nothing is validated, every input is read as float64, every result is a new float64
array, and nothing is changed in place: a pool of states is returned as a new array.
"""

from itertools import pairwise

import numpy as np


def _float64(x):
    return None if x is None else np.asarray(x).astype(np.float64)


def _softplus(x):
    return np.logaddexp(0.0, x)


def _sigmoid(x):
    return np.exp(-_softplus(-x))


def _l2norm(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def _tokens(q, k, v, g, beta, S, chunk_size, keep):
    """One sequence token by token; ``keep(t, S)`` sees the state after ``t`` tokens."""
    o = np.empty(v.shape)
    decay = np.exp(g)
    for t in range(len(v)):
        S = S * decay[t][:, :, None]
        d = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", S, k[t]))
        S = S + k[t][:, :, None] * d[:, None, :]
        o[t] = np.einsum("hkv,hk->hv", S, q[t])
        keep(t + 1, S)
    return o, S


def _chunks(q, k, v, g, beta, S, chunk_size, keep):
    """One sequence chunk by chunk: a triangular solve inside, the state carried between.

    With ``D[i, j] = e^(g_{j+1} + ... + g_i)`` and ``D[i, start] = e^(g_first + ... + g_i)``::

        A[i, j] = beta_i k_i^T (D[i, j] k_j)      j < i
        P[i, j] =        q_i^T (D[i, j] k_j)      j <= i
        (I + A) U = beta (V - (D[:, start] K) S)
        O = (D[:, start] Q) S + P U
        S <- D[last, start] S + (D[last, :] K)^T U
    """
    T = len(v)
    o, U = np.empty(v.shape), np.empty(v.shape)
    for first in range(0, T, chunk_size):
        S0, D = S, np.ones((0, *g.shape[1:]))
        start = np.ones(g.shape[1:])
        for i in range(first, min(first + chunk_size, T)):
            # products of factors, not exp of a difference of sums: a gate of -inf is then exact
            decay = np.exp(g[i])
            D = np.concatenate([D * decay, np.ones((1, *decay.shape))])
            start = start * decay
            seen, before = slice(first, i + 1), slice(first, i)
            A = beta[i] * np.einsum("hk,jhk,jhk->jh", k[i], D[:-1], k[before])
            P = np.einsum("hk,jhk,jhk->jh", q[i], D, k[seen])
            error = v[i] - np.einsum("hkv,hk->hv", S0, start * k[i])
            U[i] = beta[i][:, None] * error - np.einsum("jh,jhv->hv", A, U[before])
            o[i] = np.einsum("hkv,hk->hv", S0, start * q[i])
            o[i] += np.einsum("jh,jhv->hv", P, U[seen])
            S = start[:, :, None] * S0 + np.einsum("jhk,jhv->hkv", D * k[seen], U[seen])
            keep(i + 1, S)
    return o, S


def _bounds(shape, axis, cu_seqlens):
    """First and last token of each sequence along an axis."""
    ends = [0, shape[axis]] if cu_seqlens is None else [int(e) for e in np.asarray(cu_seqlens)]
    return list(pairwise(ends))


def _rule(form):
    """Build the public function that runs one of the two forms over all sequences."""

    def rule(
        q,
        k,
        v,
        g,
        beta,
        scale=None,
        initial_state=None,
        output_final_state=False,
        use_qk_l2norm_in_kernel=False,
        *,
        use_gate_in_kernel=False,
        A_log=None,
        dt_bias=None,
        lower_bound=None,
        use_beta_sigmoid_in_kernel=False,
        allow_neg_eigval=False,
        state_v_first=False,
        cu_seqlens=None,
        head_order="interleaved",
        chunk_size=None,
        precision=None,
        checkpoint_interval=None,
        state_indices=None,
        num_accepted_tokens=None,
        inplace_final_state=False,
        out=None,
    ):
        q, k, v, g, beta = (_float64(x) for x in (q, k, v, g, beta))
        B, T, H, K = q.shape
        HV, V = v.shape[2:]

        if use_qk_l2norm_in_kernel:
            q, k = _l2norm(q), _l2norm(k)
        value_head = np.arange(HV)
        key_head = value_head % H if head_order == "tiled" else value_head // (HV // H)
        q = q[:, :, key_head] * (K**-0.5 if scale is None else scale)
        k = k[:, :, key_head]

        if use_gate_in_kernel:
            g = fused_gate(g, A_log, dt_bias, lower_bound=lower_bound)
        g = np.zeros((B, T, HV)) if g is None else g
        g = g if g.ndim == 4 else np.repeat(g[..., None], K, axis=-1)
        beta = np.ones((B, T, HV)) if beta is None else beta
        if use_beta_sigmoid_in_kernel:
            beta = _sigmoid(beta) * (2.0 if allow_neg_eigval else 1.0)

        if cu_seqlens is None:
            sequences = [(b, 0, T) for b in range(B)]
        else:
            sequences = [(0, bos, eos) for bos, eos in _bounds(v.shape, 1, cu_seqlens)]

        states = _float64(initial_state)
        if states is None:
            states = np.zeros((len(sequences), HV, K, V))
        elif state_v_first:
            states = states.swapaxes(-1, -2)
        final = states.copy()
        slots = None
        if state_indices is not None:
            slots = np.asarray(state_indices)
            slots = slots[:, None] if slots.ndim == 1 else slots

        o = np.zeros(v.shape)
        checkpoints = []
        for n, (b, bos, eos) in enumerate(sequences):
            start = n
            if slots is not None:
                start = slots[n, 0 if num_accepted_tokens is None else num_accepted_tokens[n] - 1]
            if start < 0:
                continue

            def keep(t, S, n=n):
                if checkpoint_interval and t % checkpoint_interval == 0:
                    checkpoints.append(S)
                if num_accepted_tokens is not None and slots[n, t - 1] >= 0:
                    final[slots[n, t - 1]] = S

            inputs = (x[b, bos:eos] for x in (q, k, v, g, beta))
            with np.errstate(over="ignore", invalid="ignore"):
                o[b, bos:eos], S = form(*inputs, states[start], chunk_size or 64, keep)
            if num_accepted_tokens is None:
                final[start] = S

        if out is not None:
            out[...] = o
            o = out
        kept = np.array(checkpoints).reshape(-1, HV, K, V)
        if state_v_first:
            final, kept = final.swapaxes(-1, -2), kept.swapaxes(-1, -2)
        wanted = output_final_state or inplace_final_state or slots is not None
        result = (o, final if wanted else None)
        return (*result, kept) if checkpoint_interval else result

    return rule


gated_delta_rule = _rule(_tokens)
fused_recurrent_gated_delta_rule = _rule(_tokens)
fused_recurrent_kda = _rule(_tokens)
chunk_gated_delta_rule = _rule(_chunks)
chunk_kda = _rule(_chunks)


def _tokens_backward(q, k, v, g, beta, S, do, dS):
    """Gradients of one sequence: the states token by token, then the same steps in reverse."""
    T = len(v)
    decay = np.exp(g)
    decayed, errors = [], []
    for t in range(T):
        decayed.append(S * decay[t][:, :, None])
        errors.append(v[t] - np.einsum("hkv,hk->hv", decayed[t], k[t]))
        S = decayed[t] + k[t][:, :, None] * (beta[t][:, None] * errors[t])[:, None, :]
    dq, dk, dv, dg, dbeta = (np.empty(x.shape) for x in (q, k, v, g, beta))
    for t in reversed(range(T)):
        d = beta[t][:, None] * errors[t]
        dS = dS + q[t][:, :, None] * do[t][:, None, :]
        dq[t] = np.einsum("hkv,hv->hk", decayed[t], do[t]) + k[t] * (d * do[t]).sum(-1)[:, None]
        dd = np.einsum("hkv,hk->hv", dS, k[t])
        dbeta[t] = (dd * errors[t]).sum(-1)
        dv[t] = beta[t][:, None] * dd
        dk[t] = np.einsum("hkv,hv->hk", dS, d) - np.einsum("hkv,hv->hk", decayed[t], dv[t])
        dS = dS - k[t][:, :, None] * dv[t][:, None, :]
        dg[t] = (dS * decayed[t]).sum(-1)
        dS = dS * decay[t][:, :, None]
    return dq, dk, dv, dg, dbeta, dS


def chunk_gated_delta_rule_bwd(
    q,
    k,
    v,
    g,
    beta,
    do,
    dht=None,
    scale=None,
    initial_state=None,
    use_qk_l2norm_in_kernel=False,
    *,
    use_gate_in_kernel=False,
    A_log=None,
    dt_bias=None,
    lower_bound=None,
    use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False,
    state_v_first=False,
    cu_seqlens=None,
    head_order="interleaved",
    precision=None,
):
    """Gradients of ``sum(do * o) + sum(dht * final_state)`` of the rule."""
    raw_q, raw_k, v, raw_g, raw_beta, do = (_float64(x) for x in (q, k, v, g, beta, do))
    B, T, H, K = raw_q.shape
    HV, V = v.shape[2:]
    scale = K**-0.5 if scale is None else scale
    value_head = np.arange(HV)
    key_head = value_head % H if head_order == "tiled" else value_head // (HV // H)
    q, k = raw_q, raw_k
    if use_qk_l2norm_in_kernel:
        q, k = _l2norm(q), _l2norm(k)
    decay = raw_g
    if use_gate_in_kernel:
        decay = fused_gate(raw_g, A_log, dt_bias, lower_bound=lower_bound)
    decay = np.zeros((B, T, HV)) if raw_g is None else decay
    per_channel = decay.ndim == 4
    if not per_channel:
        decay = np.repeat(decay[..., None], K, axis=-1)
    strength = np.ones((B, T, HV)) if raw_beta is None else raw_beta
    if use_beta_sigmoid_in_kernel:
        strength = _sigmoid(raw_beta) * (2.0 if allow_neg_eigval else 1.0)

    ends = _bounds(v.shape, 1, cu_seqlens)
    sequences = [(b, *ends[0]) for b in range(B)] if cu_seqlens is None else [(0, *e) for e in ends]
    do = np.zeros(v.shape) if do is None else do
    given, dht = _float64(initial_state), _float64(dht)
    S = np.zeros((len(sequences), HV, K, V))
    dh0 = S.copy()
    if given is not None:
        S = given.swapaxes(-1, -2) if state_v_first else given
    if dht is not None:
        dh0 = (dht.swapaxes(-1, -2) if state_v_first else dht).copy()

    heads = (q[:, :, key_head] * scale, k[:, :, key_head], v, decay, strength)
    dq, dk, dv, dg, dbeta = (np.zeros(x.shape) for x in heads)
    for n, (b, bos, eos) in enumerate(sequences):
        at = b, slice(bos, eos)
        *grads, dh0[n] = _tokens_backward(*(x[at] for x in heads), S[n], do[at], dh0[n])
        dq[at], dk[at], dv[at], dg[at], dbeta[at] = grads

    dq, dk = (np.stack([x[:, :, key_head == h].sum(2) for h in range(H)], 2) for x in (dq, dk))
    dq *= scale
    if use_qk_l2norm_in_kernel:
        dq, dk = _l2norm_backward(raw_q, dq), _l2norm_backward(raw_k, dk)
    if not per_channel:
        dg = dg.sum(-1)
    if use_beta_sigmoid_in_kernel:
        dbeta *= strength * _sigmoid(-raw_beta)
    result = [dq, dk, dv, dg, dbeta, dh0.swapaxes(-1, -2) if state_v_first else dh0]
    for i, x in enumerate((raw_g, raw_beta, initial_state)):
        if x is None:
            result[3 + i] = None
    if use_gate_in_kernel:
        result[3], *more = _gate_backward(raw_g, dg, A_log, dt_bias, lower_bound)
        result += more
    return tuple(result)


def _l2norm_backward(x, dy):
    norm = np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)
    y = x / norm
    return (dy - y * (y * dy).sum(-1, keepdims=True)) / norm


def _gate_backward(x, dg, A_log, dt_bias, lower_bound):
    """Gradients of a raw gate, of A_log and of dt_bias (None where they are)."""
    HV = x.shape[2]
    per_head = (HV,) + (1,) * (x.ndim - 3)
    rate = np.exp(np.zeros(HV) if A_log is None else _float64(A_log)).reshape(per_head)
    bias = np.zeros(HV) if dt_bias is None else _float64(dt_bias)
    x = x + bias.reshape(per_head if bias.size == HV else (HV, *x.shape[3:]))
    if lower_bound is None:
        slope, by_rate = -rate * _sigmoid(x), -rate * _softplus(x)
    else:
        slope = lower_bound * rate * _sigmoid(rate * x) * _sigmoid(-rate * x)
        by_rate = slope * x
    dx, dA = dg * slope, dg * by_rate
    dA = dA.sum(axis=(0, 1, *range(3, x.ndim)))
    dbias = dx.sum(axis=(0, 1))
    if bias.size == HV:
        dbias = dbias.reshape(HV, -1).sum(1)
    shape = None if dt_bias is None else np.shape(dt_bias)
    return dx, None if A_log is None else dA, None if shape is None else dbias.reshape(shape)


def chunk_local_cumsum(
    x, chunk_size, *, axis=1, reverse=False, scale=None, cu_seqlens=None, out=None
):
    """Cumulative sum that starts anew at each chunk."""
    x = np.moveaxis(_float64(x), axis, 0)
    y = np.empty_like(x)
    direction = -1 if reverse else 1
    for bos, eos in _bounds(x.shape, 0, cu_seqlens):
        for first in range(bos, eos, chunk_size):
            chunk = slice(first, min(first + chunk_size, eos))
            y[chunk] = x[chunk][::direction].cumsum(0)[::direction]
    y = np.moveaxis(y, 0, axis) * (1.0 if scale is None else scale)
    if out is not None:
        out[...] = y
        return out
    return y


def solve_triangular(L, b, *, unit_diagonal=False, out=None):
    """Solve ``L x = b`` by forward substitution, reading the lower triangle alone."""
    L, b = _float64(L), _float64(b)
    shape = np.broadcast_shapes(L.shape[:-2], b.shape[:-2]) + b.shape[-2:]
    x = np.broadcast_to(b, shape).copy()
    for i in range(shape[-2]):
        x[..., i, :] -= np.einsum("...j,...jm->...m", L[..., i, :i], x[..., :i, :])
        if not unit_diagonal:
            x[..., i, :] /= L[..., i, i, None]
    if out is not None:
        out[...] = x
        return out
    return x


def solve_tril(A, *, cu_seqlens=None, out=None):
    """``(I + A)^-1`` of each chunk, for the strictly lower triangle of ``A`` ``[B, T, H, BT]``."""
    A = _float64(A)
    BT = A.shape[-1]
    Ai = np.zeros_like(A)
    for bos, eos in _bounds(A.shape, 1, cu_seqlens):
        for first in range(bos, eos, BT):
            rows = min(BT, eos - first)
            chunk = A[:, first : first + rows, :, :rows].swapaxes(1, 2)
            inverse = solve_triangular(chunk, np.eye(rows), unit_diagonal=True)
            Ai[:, first : first + rows, :, :rows] = inverse.swapaxes(1, 2)
    if out is not None:
        out[...] = Ai
        return out
    return Ai


def fused_gate(x, A_log=None, dt_bias=None, *, lower_bound=None):
    """Compute the log decay of a raw gate ``[B, T, HV]`` or ``[B, T, HV, K]``."""
    x = _float64(x)
    HV = x.shape[2]
    per_head = (HV,) + (1,) * (x.ndim - 3)
    rate = np.exp(np.zeros(HV) if A_log is None else _float64(A_log)).reshape(per_head)
    if dt_bias is not None:
        dt_bias = _float64(dt_bias)
        x = x + dt_bias.reshape(per_head if dt_bias.size == HV else (HV, *x.shape[3:]))
    if lower_bound is not None:
        return lower_bound * _sigmoid(rate * x)
    return -rate * _softplus(x)
