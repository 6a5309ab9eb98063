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
            slots = np.asarray(state_indices).reshape(len(sequences), -1)

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
