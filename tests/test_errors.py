"""Wrong calls: each is an error that names its argument, before anything is written."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from wrong_calls import (
    BLOCKS,
    HV,
    RECURRENT,
    RULES,
    SLOTS,
    B,
    H,
    K,
    T,
    V,
    inputs,
    kinds,
    ones,
)

import nbdelta


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
     "g: requires a gradient, and none is recorded here; call under torch.no_grad()"),
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
     "x: expected an array with at least one axis, got []"),
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


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_fuzz(device, capsys):
    """Wrong calls by the thousand: an error that names an argument, nothing written, no crash."""
    if device == "sim" and importlib.util.find_spec("numba_cuda") is None:
        pytest.skip("the simulator of a GPU is a part of numba-cuda, which is not installed")
    command = [sys.executable, str(Path(__file__).with_name("wrong_calls.py")), device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    count = int(done.stdout)
    with capsys.disabled():
        print(f" [{count} wrong calls]", end="")
    assert count >= 2000
