"""Wrong calls: each is an error that names its argument, before anything is written."""

import inspect
import re

import ml_dtypes
import numpy as np
import pytest
import torch

import nbdelta

B, T, H, HV, K, V = 2, 5, 2, 4, 6, 3
SLOTS = 7
KDA = ("chunk_kda", "fused_recurrent_kda")
CHUNKED = ("gated_delta_rule", "chunk_gated_delta_rule", "chunk_kda")
RECURRENT = ("fused_recurrent_gated_delta_rule", "fused_recurrent_kda")
RULES = CHUNKED + RECURRENT
BLOCKS = ("chunk_local_cumsum", "solve_tril", "solve_triangular", "fused_gate")


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def inputs(name="gated_delta_rule", kind="plain"):
    """Arguments of a call that is right; those of a kind can be made wrong in its own ways."""
    if kind == "bare":  # `out` does not say what the others must be
        return {n: x for n, x in inputs(name).items() if n not in ("out", "A_log", "dt_bias")}
    if name == "chunk_local_cumsum":
        return dict(x=ones(B, T, H), chunk_size=2, out=ones(B, T, H))
    if name == "solve_tril":
        return dict(A=ones(1, T, H, 16), cu_seqlens=np.array([0, 2, T]), out=ones(1, T, H, 16))
    if name == "solve_triangular":
        return dict(L=ones(B, 1, 5, 5), b=ones(3, 5, 2), out=ones(B, 3, 5, 2))
    if name == "fused_gate":
        return dict(x=ones(B, T, HV, K), A_log=ones(HV), dt_bias=ones(HV * K), lower_bound=-5.0)
    b, t = (1, B * T) if kind == "packed" else (B, T)
    a = dict(q=ones(b, t, H, K), k=ones(b, t, H, K), v=ones(b, t, HV, V))
    a.update(g=ones(b, t, HV, K) if name in KDA else ones(b, t, HV), beta=ones(b, t, HV))
    a.update(initial_state=ones(B, HV, K, V), output_final_state=True, out=ones(b, t, HV, V))
    if kind == "packed":
        a.update(cu_seqlens=np.array([0, 3, b * t]))
    if kind == "gate":
        a.update(use_gate_in_kernel=True, A_log=ones(HV), dt_bias=ones(HV), lower_bound=-5.0)
        a.update(use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True)
    if kind in ("pool", "draft"):
        a.update(initial_state=ones(SLOTS, HV, K, V), state_indices=np.array([4, 2]))
    if kind == "draft":
        a.update(state_indices=np.arange(2 * 3).reshape(2, 3), num_accepted_tokens=np.array([1, 3]))
        a.update({n: a[n][:, :3] for n in ("q", "k", "v", "g", "beta")}, out=ones(B, 3, HV, V))
    return a


PER_ROW = ("plain", "packed", "gate")  # a state for each sequence


def kinds(name):
    if name in BLOCKS:
        return ("plain", "bare")
    return (*PER_ROW, *(("pool", "draft") if name in RECURRENT else ()))


def call(name, arguments):
    return getattr(nbdelta, name)(**arguments)


def refused(name, arguments, error=(ValueError, TypeError)):
    """Run a wrong call; return the error's text, having seen that no array was touched."""
    before = {n: x.copy() for n, x in arguments.items() if isinstance(x, np.ndarray)}
    with pytest.raises(error) as caught:
        call(name, arguments)
    for n, x in before.items():
        assert arguments[n].tobytes() == x.tobytes(), f"{n} was written to"
    return str(caught.value)


@pytest.mark.parametrize("name", RULES + BLOCKS)
def test_the_calls_are_right_before_they_are_made_wrong(name):
    for kind in kinds(name):
        call(name, inputs(name, kind))


READ_ONLY = ones(B, T, HV, V)
READ_ONLY.flags.writeable = False
SHARED = ones(B, T, HV, K)
POOL_OF_ONE = np.broadcast_to(ones(1, HV, K, V), (SLOTS, HV, K, V))
GRADIENT = torch.ones((B, T, HV), requires_grad=True)

# function, kind of call, what is changed, the error, words of its message
TABLE = [
    # shapes, in letters and numbers
    ("gated_delta_rule", "plain", dict(q=ones(T, H, K)), ValueError,
     "q: expected [B, T, H, K], got [5, 2, 6]"),
    ("gated_delta_rule", "plain", dict(q=ones(B, T, 0, K)), ValueError,
     "q: expected [B, T, H, K] with H >= 1 and K >= 1, got [2, 5, 0, 6]"),
    ("gated_delta_rule", "plain", dict(k=ones(B, T, 4, K)), ValueError,
     "k: expected [B, T, H, K] = [2, 5, 2, 6], got [2, 5, 4, 6]"),
    ("gated_delta_rule", "plain", dict(v=ones(B, 6, HV, V)), ValueError,
     "v: expected [B, T, HV, V] = [2, 5, HV, V], got [2, 6, 4, 3]"),
    ("gated_delta_rule", "plain", dict(v=ones(B, T, 3, V)), ValueError,
     "v: expected [B, T, HV, V] with HV a multiple of H = 2, got [2, 5, 3, 3]"),
    ("gated_delta_rule", "plain", dict(v=ones(B, T, 0, V)), ValueError,
     "v: expected [B, T, HV, V] with HV >= 1 and V >= 1, got [2, 5, 0, 3]"),
    ("gated_delta_rule", "plain", dict(g=ones(B, T, HV, 1)), ValueError,
     "g: expected [B, T, HV] = [2, 5, 4] or [B, T, HV, K] = [2, 5, 4, 6], got [2, 5, 4, 1]"),
    ("chunk_kda", "plain", dict(g=ones(B, T, HV)), ValueError,
     "g: expected [B, T, HV, K] = [2, 5, 4, 6], got [2, 5, 4]"),
    ("fused_recurrent_kda", "plain", dict(g=None), ValueError,
     "g: expected [B, T, HV, K], got None"),
    ("gated_delta_rule", "plain", dict(beta=ones(B, T, H)), ValueError,
     "beta: expected [B, T, HV] = [2, 5, 4], got [2, 5, 2]"),
    ("gated_delta_rule", "plain", dict(initial_state=ones(1, HV, K, V)), ValueError,
     "initial_state: expected [N, HV, K, V] = [2, 4, 6, 3], got [1, 4, 6, 3]"),
    ("gated_delta_rule", "plain", dict(state_v_first=True), ValueError,
     "initial_state: expected [N, HV, V, K] = [2, 4, 3, 6], got [2, 4, 6, 3]"),
    ("gated_delta_rule", "packed", dict(initial_state=ones(1, HV, K, V)), ValueError,
     "initial_state: expected [N, HV, K, V] = [2, 4, 6, 3], got [1, 4, 6, 3]"),
    ("gated_delta_rule", "plain", dict(out=ones(B, T, H, V)), ValueError,
     "out: expected [B, T, HV, V] = [2, 5, 4, 3], got [2, 5, 2, 3]"),
    ("gated_delta_rule", "gate", dict(A_log=ones(HV, 1)), ValueError,
     "A_log: expected [HV] = [4], got [4, 1]"),
    ("gated_delta_rule", "gate", dict(dt_bias=ones(HV * K)), ValueError,
     "dt_bias: expected [HV] = [4], got [24]"),
    ("chunk_kda", "gate", dict(dt_bias=ones(K, HV)), ValueError,
     "dt_bias: expected [HV] = [4] or [HV * K] = [24] or [HV, K] = [4, 6], got [6, 4]"),
    # dtypes and kinds
    ("gated_delta_rule", "plain", dict(q=ones(B, T, H, K, dtype=np.int32)), TypeError,
     "q: expected float32 or float64 or float16 or bfloat16, got int32"),
    ("gated_delta_rule", "plain", dict(k=ones(B, T, H, K, dtype=np.float64)), TypeError,
     "k: expected float32 (as q), got float64"),
    ("gated_delta_rule", "plain", dict(v=ones(B, T, HV, V, dtype=ml_dtypes.bfloat16)), TypeError,
     "v: expected float32 (as q), got bfloat16"),
    ("gated_delta_rule", "plain", dict(g=ones(B, T, HV, dtype=bool)), TypeError,
     "g: expected float32 or float64 or float16 or bfloat16, got bool"),
    ("gated_delta_rule", "plain", dict(g=ones(B, T, HV, dtype=object)), TypeError,
     "g: expected an array of real numbers, got dtype object"),
    ("gated_delta_rule", "plain", dict(beta=ones(B, T, HV, dtype=">f4")), TypeError,
     "beta: byte-swapped '>f4' is not supported"),
    ("gated_delta_rule", "plain", dict(beta=np.ma.ones((B, T, HV))), TypeError,
     "beta: a masked array is not supported"),
    ("gated_delta_rule", "plain", dict(beta=ones(B, T, HV, dtype=complex)), TypeError,
     "beta: expected float32 or float64 or float16 or bfloat16, got complex128"),
    ("gated_delta_rule", "plain", dict(beta=0.5), TypeError,
     "beta: expected an array (NumPy, torch, or one with DLPack), got float"),
    ("gated_delta_rule", "plain", dict(q=None), TypeError, "q: expected an array"),
    ("gated_delta_rule", "plain", dict(initial_state=ones(B, HV, K, V, dtype=np.float64)),
     TypeError, "initial_state: float64 needs float64 inputs, got q in float32"),
    ("gated_delta_rule", "plain", dict(initial_state=ones(B, HV, K, V, dtype=np.int64)),
     TypeError, "initial_state: expected float32 or bfloat16 or float16"),
    ("gated_delta_rule", "plain", dict(out=ones(B, T, HV, V, dtype=np.float64)), TypeError,
     "out: expected float32 (as q), got float64"),
    ("gated_delta_rule", "plain", dict(out=torch.ones((B, T, HV, V))), TypeError,
     "out: expected a numpy array (as q is), got torch"),
    ("gated_delta_rule", "plain", dict(g=GRADIENT), ValueError,
     "g: requires a gradient, and gradients are not available yet; call under torch.no_grad()"),
    # options
    ("gated_delta_rule", "plain", dict(scale=float("nan")), ValueError,
     "scale: expected a finite number, got nan"),
    ("gated_delta_rule", "plain", dict(scale=10**400), ValueError,
     "scale: expected a finite number, got inf"),
    ("gated_delta_rule", "plain", dict(scale=True), TypeError,
     "scale: expected a real number, got True (bool)"),
    ("gated_delta_rule", "plain", dict(scale="1"), TypeError, "scale: expected a real number"),
    ("gated_delta_rule", "plain", dict(output_final_state=1), TypeError,
     "output_final_state: expected True or False, got 1 (int)"),
    ("gated_delta_rule", "plain", dict(use_qk_l2norm_in_kernel=None), TypeError,
     "use_qk_l2norm_in_kernel: expected True or False, got None"),
    ("gated_delta_rule", "plain", dict(head_order="tile"), ValueError,
     "head_order: expected 'interleaved' or 'tiled', got 'tile'"),
    ("gated_delta_rule", "plain", dict(head_order=None), TypeError, "head_order: expected"),
    ("gated_delta_rule", "plain", dict(chunk_size=48), ValueError,
     "chunk_size: expected None or 16 or 32 or 64, got 48"),
    ("gated_delta_rule", "plain", dict(chunk_size=16.0), TypeError,
     "chunk_size: expected an integer, got 16.0 (float)"),
    ("gated_delta_rule", "plain", dict(precision="high"), ValueError,
     "precision: expected None or 'highest', got 'high'"),
    ("gated_delta_rule", "plain", dict(checkpoint_interval=0), ValueError,
     "checkpoint_interval: expected an integer of at least 1, got 0"),
    ("gated_delta_rule", "plain", dict(checkpoint_interval=True), TypeError,
     "checkpoint_interval: expected an integer, got True (bool)"),
    ("gated_delta_rule", "gate", dict(lower_bound=0.0), ValueError,
     "lower_bound: expected a number below 0, got 0.0"),
    # options without what they need
    ("gated_delta_rule", "plain", dict(A_log=ones(HV)), ValueError,
     "A_log: needs use_gate_in_kernel=True, got False"),
    ("gated_delta_rule", "plain", dict(dt_bias=ones(HV)), ValueError,
     "dt_bias: needs use_gate_in_kernel=True, got False"),
    ("gated_delta_rule", "plain", dict(lower_bound=-5), ValueError,
     "lower_bound: needs use_gate_in_kernel=True, got False"),
    ("gated_delta_rule", "gate", dict(g=None), ValueError,
     "use_gate_in_kernel: needs g, got None"),
    ("gated_delta_rule", "gate", dict(beta=None), ValueError,
     "use_beta_sigmoid_in_kernel: needs beta, got None"),
    ("gated_delta_rule", "plain", dict(allow_neg_eigval=True), ValueError,
     "allow_neg_eigval: needs use_beta_sigmoid_in_kernel=True, got False"),
    ("fused_recurrent_kda", "plain", dict(inplace_final_state=True, initial_state=None),
     ValueError, "inplace_final_state: needs initial_state, got None"),
    ("fused_recurrent_kda", "pool", dict(initial_state=None), ValueError,
     "state_indices: needs initial_state, got None"),
    ("fused_recurrent_kda", "draft", dict(state_indices=None), ValueError,
     "num_accepted_tokens: needs state_indices [N, S], got None"),
    ("fused_recurrent_kda", "pool", dict(checkpoint_interval=2), ValueError,
     "checkpoint_interval: expected None with state_indices, got 2"),
    # packed sequences
    ("gated_delta_rule", "plain", dict(cu_seqlens=[0, 5]), ValueError,
     "cu_seqlens: needs B = 1 (packed sequences), got q [2, 5, 2, 6]"),
    ("gated_delta_rule", "packed", dict(cu_seqlens=[1, 3, 10]), ValueError,
     "cu_seqlens: expected to start with 0, got 1"),
    ("gated_delta_rule", "packed", dict(cu_seqlens=[0, 3, 9]), ValueError,
     "cu_seqlens: expected to end with T = 10, got 9"),
    ("gated_delta_rule", "packed",
     dict(cu_seqlens=[0, 7, 3, 10], initial_state=None), ValueError,
     "cu_seqlens: expected no decrease, got 7 before 3"),
    ("gated_delta_rule", "packed",
     dict(cu_seqlens=[0, 2**63 - 1, -(2**63), 10], initial_state=None), ValueError,
     "cu_seqlens: expected no decrease, got 9223372036854775807 before -9223372036854775808"),
    ("gated_delta_rule", "packed", dict(cu_seqlens=[]), ValueError,
     "cu_seqlens: expected [N + 1] with N >= 0, got [0]"),
    ("gated_delta_rule", "packed", dict(cu_seqlens=[[0, 3, 10]]), ValueError,
     "cu_seqlens: expected [N + 1] with N >= 0, got [1, 3]"),
    ("gated_delta_rule", "packed", dict(cu_seqlens=[0, 3.0, 10]), TypeError,
     "cu_seqlens: expected an integer, got 3.0 (float)"),
    ("gated_delta_rule", "packed", dict(cu_seqlens=[False, 3, 10]), TypeError,
     "cu_seqlens: expected an integer, got False (bool)"),
    ("gated_delta_rule", "packed", dict(cu_seqlens=np.array([0.0, 3, 10])), TypeError,
     "cu_seqlens: expected integers, got float64"),
    ("gated_delta_rule", "packed", dict(cu_seqlens=np.array([0, 2**64 - 1, 10], np.uint64)),
     ValueError, "cu_seqlens: 18446744073709551615 is out of range"),
    ("gated_delta_rule", "packed", dict(cu_seqlens=[0, 2**70, 10]), ValueError,
     "cu_seqlens: 1180591620717411303424 is out of range"),
    ("gated_delta_rule", "packed", dict(cu_seqlens=[0, [1, 2], 10]), ValueError,
     "cu_seqlens: rows of different lengths"),
    ("gated_delta_rule", "packed", dict(cu_seqlens=10), TypeError,
     "cu_seqlens: expected an array"),
    # pools
    ("fused_recurrent_gated_delta_rule", "pool", dict(initial_state=ones(SLOTS, HV, V, K)),
     ValueError, "initial_state: expected [slots, HV, K, V] = [slots, 4, 6, 3], got [7, 4, 3, 6]"),
    ("fused_recurrent_gated_delta_rule", "pool", dict(state_indices=[1, 2, 3]), ValueError,
     "state_indices: expected [N] = [2], or [N, S] = [2, S] with num_accepted_tokens, got [3]"),
    ("fused_recurrent_gated_delta_rule", "pool", dict(state_indices=[[1], [2]]), ValueError,
     "state_indices: expected [N] = [2], or [N, S] = [2, S] with num_accepted_tokens, got [2, 1]"),
    ("fused_recurrent_gated_delta_rule", "pool", dict(state_indices=[1, SLOTS]), ValueError,
     "state_indices: expected -1 to 6 (the pool has 7 slots), got 7"),
    ("fused_recurrent_gated_delta_rule", "pool", dict(state_indices=[1, -2]), ValueError,
     "state_indices: expected -1 to 6 (the pool has 7 slots), got -2"),
    ("fused_recurrent_gated_delta_rule", "pool", dict(state_indices=[3, 3]), ValueError,
     "state_indices: slot 3 comes twice"),
    ("fused_recurrent_gated_delta_rule", "draft", dict(state_indices=[[0, 1, 2], [3, 4, 1]]),
     ValueError, "state_indices: slot 1 comes twice"),
    ("fused_recurrent_gated_delta_rule", "draft", dict(state_indices=[1, 2]), ValueError,
     "state_indices: expected [N, S] = [2, S] (with num_accepted_tokens), got [2]"),
    ("fused_recurrent_gated_delta_rule", "draft", dict(state_indices=[[0, 1], [2, 3]]), ValueError,
     "state_indices: expected [N, S] with S >= 3 (tokens of the longest sequence), got [2, 2]"),
    ("fused_recurrent_gated_delta_rule", "draft", dict(num_accepted_tokens=[1, 4]), ValueError,
     "num_accepted_tokens: expected 1 to S = 3, got 4"),
    ("fused_recurrent_gated_delta_rule", "draft", dict(num_accepted_tokens=[0, 1]), ValueError,
     "num_accepted_tokens: expected 1 to S = 3, got 0"),
    ("fused_recurrent_gated_delta_rule", "draft", dict(num_accepted_tokens=[1]), ValueError,
     "num_accepted_tokens: expected [N] = [2], got [1]"),
    ("fused_recurrent_gated_delta_rule", "pool", dict(initial_state=POOL_OF_ONE.copy()[:0]),
     ValueError, "state_indices: expected -1 to -1 (the pool has 0 slots), got 4"),
    # memory that is written to
    ("gated_delta_rule", "plain", dict(out=READ_ONLY), ValueError,
     "out: is written to, but the array is read-only"),
    ("gated_delta_rule", "plain", dict(out=np.broadcast_to(ones(V), (B, T, HV, V)).view()),
     ValueError, "out: is written to"),
    ("fused_recurrent_gated_delta_rule", "pool", dict(initial_state=POOL_OF_ONE), ValueError,
     "initial_state: is written to"),
    ("fused_recurrent_gated_delta_rule", "pool",
     dict(initial_state=torch.ones((1, HV, K, V)).expand(SLOTS, -1, -1, -1)), ValueError,
     "initial_state: is written to, but elements of it share memory (shape [7, 4, 6, 3], byte "
     "strides [0, 72, 12, 4])"),
    ("gated_delta_rule", "plain", dict(v=SHARED[..., :3], out=SHARED[..., 3:]), ValueError,
     "out: is written to, but shares memory with v"),
    # building blocks
    ("chunk_local_cumsum", "plain", dict(axis=3), ValueError,
     "axis: expected -3 to 2 for x [2, 5, 2], got 3"),
    ("chunk_local_cumsum", "plain", dict(x=ones(), axis=0, out=None), ValueError,
     "axis: expected"),
    ("chunk_local_cumsum", "plain", dict(chunk_size=0), ValueError,
     "chunk_size: expected an integer of at least 1, got 0"),
    ("chunk_local_cumsum", "plain", dict(out=ones(B, T)), ValueError,
     "out: expected the shape of x = [2, 5, 2], got [2, 5]"),
    ("chunk_local_cumsum", "plain", dict(out=ones(B, T, H, dtype=np.float64)), TypeError,
     "out: expected float32 for x in float32, got float64"),
    ("solve_tril", "plain", dict(A=ones(1, T, H, 17)), ValueError,
     "A: expected [B, T, H, BT] with BT = 16, 32 or 64, got [1, 5, 2, 17]"),
    ("solve_tril", "plain", dict(A=ones(2, T, H, 16)), ValueError,
     "cu_seqlens: needs B = 1 (packed sequences), got A [2, 5, 2, 16]"),
    ("solve_triangular", "plain", dict(L=ones(5, 4)), ValueError,
     "L: expected [..., n, n], got [5, 4]"),
    ("solve_triangular", "plain", dict(b=ones(5)), ValueError,
     "b: expected [..., n, m] = [..., 5, m], got [5]"),
    ("solve_triangular", "plain", dict(L=ones(B, 2, 5, 5)), ValueError,
     "b: expected batch axes that broadcast with those of L [2, 2, 5, 5], got [3, 5, 2]"),
    ("fused_gate", "plain", dict(x=ones(B, T)), ValueError,
     "x: expected [B, T, HV] or [B, T, HV, K], got [2, 5]"),
    ("fused_gate", "bare", dict(x=ones(B, T, 0)), ValueError,
     "x: expected [B, T, HV] or [B, T, HV, K] with HV >= 1 and K >= 1, got [2, 5, 0]"),
    ("solve_tril", "bare", dict(A=ones(1, T, H, 16, dtype=np.int64)), TypeError,
     "A: expected float32 or float64 or float16 or bfloat16, got int64"),
    ("solve_tril", "bare", dict(cu_seqlens=[0, 6]), ValueError,
     "cu_seqlens: expected to end with T = 5, got 6"),
    ("chunk_local_cumsum", "bare", dict(cu_seqlens=[0, 6], axis=0), ValueError,
     "cu_seqlens: expected to end with T = 2, got 6"),
    ("solve_triangular", "bare", dict(b=ones(5, 2, dtype=np.float64)), TypeError,
     "b: expected float32 (as L), got float64"),
    ("solve_triangular", "bare",
     dict(L=ones(5, 5, dtype=np.int64), b=ones(5, 2, dtype=np.int64)), TypeError,
     "L: expected float32 or float64 or float16 or bfloat16, got int64"),
    ("solve_tril", "plain", dict(A=(A := ones(1, T, H, 16)), out=A), ValueError,
     "out: is written to, but shares memory with A"),
    ("solve_triangular", "plain", dict(b=(b := ones(B, 3, 5, 2)), out=b), ValueError,
     "out: is written to, but shares memory with b"),
    ("fused_gate", "plain", dict(dt_bias=ones(K)), ValueError,
     "dt_bias: expected [HV] = [4] or [HV * K] = [24] or [HV, K] = [4, 6], got [6]"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "changes", "error", "words"),
    TABLE,
    ids=[f"{i}-{'-'.join(row[2])}" for i, row in enumerate(TABLE)],
)
def test_wrong_call(name, kind, changes, error, words):
    assert words in refused(name, inputs(name, kind) | changes, error)


def test_in_place_state_may_not_meet_an_input():
    memory = ones(2 * B * HV * K * V)
    a = inputs("fused_recurrent_kda") | dict(inplace_final_state=True)
    a.update(initial_state=memory[: B * HV * K * V].reshape(B, HV, K, V))
    call("fused_recurrent_kda", a)
    memory[:] = 1
    a.update(v=memory[: B * T * HV * V].reshape(B, T, HV, V))
    words = "initial_state: is written to, but shares memory with v"
    assert words in refused("fused_recurrent_kda", a)


def test_states_are_only_written_when_they_may_be():
    a = inputs("fused_recurrent_kda")
    a["initial_state"].flags.writeable = False
    call("fused_recurrent_kda", a)
    words = "initial_state: is written to, but the array is read-only"
    assert words in refused("fused_recurrent_kda", a | dict(inplace_final_state=True))


def test_indices_may_not_lie_in_what_is_written():
    a = inputs("fused_recurrent_gated_delta_rule", "pool")
    a["state_indices"] = a["initial_state"].reshape(-1)[:4].view(np.int64)
    assert "shares memory with state_indices" in refused("fused_recurrent_gated_delta_rule", a)


def test_cumsum_in_place_is_right_and_half_in_place_is_not():
    x = ones(6)
    assert nbdelta.chunk_local_cumsum(x, 3, axis=0, out=x) is x
    assert x.tolist() == [1, 2, 3, 1, 2, 3]
    words = "out: is written to, but shares memory with x"
    assert words in refused("chunk_local_cumsum", dict(x=x[1:], chunk_size=3, axis=0, out=x[:-1]))


def test_counts_beyond_any_length_are_right():
    for count in (2**31, 2**63, 10**30):
        for name in RULES:
            *_, kept = call(name, inputs(name) | dict(checkpoint_interval=count))
            assert kept.shape[0] == 0
        x = ones(6)
        assert nbdelta.chunk_local_cumsum(x, count, axis=0).tolist() == [1, 2, 3, 4, 5, 6]


def test_an_equal_structure_does_not_hide_a_wrong_option():
    """What passed once is remembered; values that hash alike (True, 1, 1.0) must not pass by it."""
    a = inputs() | dict(chunk_size=16, output_final_state=True)
    call("gated_delta_rule", a)
    for changes in (dict(output_final_state=1), dict(chunk_size=16.0), dict(scale=True)):
        refused("gated_delta_rule", a | changes, TypeError)


@pytest.mark.parametrize("name", RULES)
def test_options_of_the_other_form_are_unknown(name):
    other = ["chunk_size"] if name in RECURRENT else ["state_indices", "inplace_final_state"]
    for option in (*other, "cu_seqlen", "gk", "head_first"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            call(name, inputs(name) | {option: None})


# what may be put in the place of an argument, by what it is; every one of them is wrong
NO_ARRAYS = (3, 1.5, "x", b"x", [], {}, object(), (1.0, 2.0), np.float32(1), range(3))
NO_FLAGS = (None, 0, 1, 1.0, "True", [], np.int64(1), np.ones(1, bool))
NO_NUMBERS = ("1", 1j, [1.0], True, np.ones(1), np.inf, float("nan"), np.bool_(True))
NO_COUNTS = (0, -1, 1.0, "16", True, [16], np.ones(1), np.float32(16), 3 + 2j)
WRONG_OPTIONS = {
    "scale": NO_NUMBERS,
    "lower_bound": (*NO_NUMBERS, 0, 0.0, 1.5),
    "head_order": (None, 0, "", "TILED", "interleaved ", b"tiled", ["tiled"], True),
    "precision": (0, "", "HIGHEST", "medium", b"highest", True, ["highest"]),
    "checkpoint_interval": NO_COUNTS,
    "chunk_size": NO_COUNTS,
    "axis": (3, -4, 1.0, None, "1", True, (1,), 2**70),
}
FLAGS = (
    *("output_final_state", "use_qk_l2norm_in_kernel", "use_gate_in_kernel", "allow_neg_eigval"),
    *("use_beta_sigmoid_in_kernel", "state_v_first", "inplace_final_state", "reverse"),
    "unit_diagonal",
)
INDICES = ("cu_seqlens", "state_indices", "num_accepted_tokens")


def wrong_indices(x):
    """Wrong forms of a right index array."""
    first, last = (0,) * x.ndim, (-1,) * x.ndim
    for value in (-2, 99, 2**62, -(2**62)):
        for place in (first, last):
            bad = x.copy()
            bad[place] = value
            yield f"{value} at {place}", bad
    for dtype in (np.float32, bool, complex, object, "U3", ">i8"):
        yield f"in {dtype}", x.astype(dtype)
    for form, bad in (
        ("one less", x[:-1]),
        ("one more", np.concatenate([x, x[-1:] + 1])),
        ("another axis", x[..., None]),
        ("no axis", x[first]),
        ("an int", 3),
        ("a string", "abc"),
        ("floats", x.astype(float).tolist()),
        ("nothing in rows", [[]]),
        ("masked", np.ma.array(x)),
        ("ragged", [[1, 2], [3]]),
        ("huge", [2**80] * len(x)),
    ):
        yield form, bad


def wrong_arrays(name, argument, x):
    """Wrong forms of a right array."""
    for i, bad in enumerate(NO_ARRAYS):
        yield f"no array {i}", bad
    for dtype in (np.int32, np.uint8, bool, complex, object, ">f4", "U3", np.longdouble):
        yield f"in {np.dtype(dtype)}", x.astype(dtype)
    # a dtype that is right by itself, but not here
    if argument in ("k", "v", "out", "b") or (argument == "initial_state" and name in RULES):
        yield "in float64", x.astype(np.float64)
    yield "masked", np.ma.array(x)
    yield "no axes", x[(0,) * x.ndim].reshape(())[()]
    yield "0-d", np.ones((), np.float32)
    yield "one axis more", x[..., None]
    if x.ndim > 1:
        yield "one axis less", x[0]
        yield "flat", x.reshape(-1)
    for axis in range(x.ndim):
        if not may_vary(name, argument, axis):
            yield f"axis {axis} longer", np.concatenate([x, x], axis)
            yield f"axis {axis} empty", x.take([], axis)
    if argument == "out":
        closed = x.copy()
        closed.flags.writeable = False
        yield "read-only", closed
        yield "one element", np.lib.stride_tricks.as_strided(x.copy(), x.shape, (0,) * x.ndim)
        yield "of torch", torch.from_numpy(x.copy())


def may_vary(name, argument, axis):
    """Whether the axis of this argument alone may have another length."""
    return (argument, axis) in {("v", 3), ("b", 2)} or (
        name == "fused_gate" and argument == "x" and axis < 2
    )


def wrong_calls():
    """Every way to make one argument of a right call wrong."""
    for name in RULES + BLOCKS:
        accepted = inspect.signature(getattr(nbdelta, name)).parameters
        for kind in kinds(name):
            right = inputs(name, kind)
            for argument, x in right.items():
                if argument in INDICES:
                    forms = wrong_indices(x)
                elif isinstance(x, np.ndarray):
                    forms = wrong_arrays(name, argument, x)
                    if kind == "bare":
                        forms = (f for f in forms if f[0].startswith(("no", "in", "masked")))
                else:
                    continue
                for form, bad in forms:
                    # a pool may have any number of slots
                    if (argument, form) != ("initial_state", "axis 0 longer") or kind in PER_ROW:
                        yield name, kind, argument, form, bad
            for argument in accepted:
                values = NO_FLAGS if argument in FLAGS else WRONG_OPTIONS.get(argument, ())
                for i, bad in enumerate(values):
                    yield name, kind, argument, f"option {i}", bad


def test_fuzz(capsys):
    """One argument of a right call made wrong: an error that names an argument, nothing written."""
    count, faults = 0, []
    for name, kind, argument, form, bad in wrong_calls():
        arguments = inputs(name, kind) | {argument: bad}
        written = {
            n: (x, x.tobytes())
            for n in ("out", "initial_state")
            if isinstance(x := arguments.get(n), np.ndarray) and x.dtype != object
        }
        where = f"{name} ({kind}), {argument} {form}"
        count += 1
        try:
            call(name, arguments)
            faults.append(f"{where}: returned")
        except (ValueError, TypeError) as error:
            named = re.match(r"(\w+): ", str(error))
            known = inspect.signature(getattr(nbdelta, name)).parameters
            if not named or named[1] not in known:
                faults.append(f"{where}: names no argument: {error}")
        except Exception as error:
            faults.append(f"{where}: {type(error).__name__}: {error}")
        faults += [
            f"{where}: wrote to {n}" for n, (x, before) in written.items() if x.tobytes() != before
        ]
    with capsys.disabled():
        print(f" [{count} wrong calls]", end="")
    assert not faults, "\n".join(faults)
    assert count >= 400
