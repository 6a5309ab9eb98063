"""What the numbers promise: error bounds per head, exact limits, and the same bits every time."""

import itertools

import numba
import numpy as np
import pytest
from cases import (
    FORWARD,
    GATES,
    arguments,
    assert_matches,
    assert_same_bits,
    cu_seqlens,
)

import nbdelta
from nbdelta import naive
from nbdelta.testing import MIXED_GATES, Shape, as_dtype, make_inputs, rel_l2

pytestmark = pytest.mark.usefixtures("device")
TOKENS = ("q", "k", "v", "g", "beta")
every_rule = pytest.mark.parametrize("rule", FORWARD)
every_gate = pytest.mark.parametrize("gate", GATES)


def run(rule, call, **options):
    return getattr(nbdelta, rule)(**call, output_final_state=True, **options)


def reference(call, **options):
    return naive.gated_delta_rule(**call, output_final_state=True, **options)


def tokens(call, bos, eos):
    """Keep a range of tokens, and everything that has no tokens."""
    return {name: x[:, bos:eos] if name in TOKENS else x for name, x in call.items()}


@every_rule
@every_gate
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_error_at_the_size_of_real_heads(rule, gate, dtype):
    call = make_inputs(0, 1, 200, 1, 2, 128, 128, gate, dtype=dtype, states=1)
    assert_matches(run(rule, call), reference(call), dtype)


@every_rule
@every_gate
def test_error_with_negative_eigenvalues(rule, gate):
    call = make_inputs(1, 1, 200, 1, 2, 96, 192, gate, beta_max=2.0, states=1)
    assert_matches(run(rule, call), reference(call), "float32")


@every_rule
@pytest.mark.parametrize("gate", [None, *GATES])
@pytest.mark.parametrize("beta_max", [1.0, 2.0])
def test_error_without_decay(rule, gate, beta_max):
    call = make_inputs(2, 1, 150, 1, 2, 40, 24, gate, log_decay=0.0, beta_max=beta_max, states=1)
    assert_matches(run(rule, call), reference(call), "float32", hard_gates=True)


@every_rule
@every_gate
@pytest.mark.parametrize("log_decay", [0.0, -20.0, -316.0, -1000.0, -np.inf, "mixed"], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_error_at_any_gate(rule, gate, log_decay, dtype):
    call = make_inputs(3, 2, 83, 1, 2, 40, 24, gate, dtype=dtype, log_decay=log_decay, states=2)
    result = run(rule, call)
    assert np.isfinite(result[0].astype(np.float64)).all() and np.isfinite(result[1]).all()
    assert_matches(result, reference(call), dtype, hard_gates=True)


@every_rule
@every_gate
@pytest.mark.parametrize("before", MIXED_GATES)
@pytest.mark.parametrize("where", [0, 7, 16, 40, 63, 64])
def test_error_with_one_hard_gate(rule, gate, before, where):
    # one strong decay among weak ones: exp of a difference of large sums would lose the small ones
    call = make_inputs(4, 1, 80, 1, 1, 16, 24, gate, states=1)
    call["g"][:, where] = before
    assert_matches(run(rule, call), reference(call), "float32", hard_gates=True)


@every_rule
def test_error_where_channels_decay_differently(rule):
    call = make_inputs(5, 1, 83, 1, 2, 40, 24, "kda", states=1)
    call["g"][..., ::3] = -50.0
    call["g"][..., 1::3] = -1e-4
    call["g"][:, 30:, :, 7] = -np.inf
    assert_matches(run(rule, call), reference(call), "float32", hard_gates=True)


@every_rule
@every_gate
def test_minus_infinity_is_a_reset(rule, gate):
    call = make_inputs(6, 1, 100, 1, 2, 16, 24, gate, states=1)
    call["g"][:, 37] = -np.inf
    result = run(rule, call)
    del call["initial_state"]
    tail = reference(tokens(call, 37, None))
    assert_matches((result[0][:, 37:], result[1]), tail, "float32")


@every_rule
@every_gate
def test_zero_beta_only_decays(rule, gate):
    call = make_inputs(7, 1, 70, 1, 2, 16, 24, gate, log_decay=-0.01, states=1)
    call["beta"][:] = 0.0
    o, state = run(rule, call)
    assert_matches((o, state), reference(call), "float32")


@every_rule
@every_gate
def test_repeated_keys(rule, gate):
    # I + A is as far from the identity as it gets, and beta = 1 overwrites the value each time
    call = make_inputs(8, 1, 100, 1, 2, 16, 24, gate, log_decay=0.0)
    call["k"] = np.repeat(call["k"][:, :1], 100, axis=1)
    call["beta"][:] = 1.0
    o, state = run(rule, call)
    assert_matches((o, state), reference(call), "float32", hard_gates=True)


@every_rule
@every_gate
def test_strongly_correlated_keys(rule, gate):
    call = make_inputs(9, 1, 130, 1, 2, 32, 24, gate, log_decay=-1e-3)
    k = call["k"] + 2.0 * call["k"][:, :1]
    call["k"] = (k / np.linalg.norm(k, axis=-1, keepdims=True)).astype(np.float32)
    assert_matches(run(rule, call), reference(call), "float32", hard_gates=True)


@every_rule
@every_gate
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_large_and_small_values(rule, gate, scale):
    call = make_inputs(10, 1, 70, 1, 2, 16, 24, gate)
    call["v"] *= np.float32(scale)
    assert_matches(run(rule, call), reference(call), "float32")


@every_rule
@every_gate
@pytest.mark.parametrize("growth", [0.5, 5.0, 200.0])
def test_positive_gates_do_not_crash(rule, gate, growth):
    call = make_inputs(11, 1, 40, 1, 2, 16, 24, gate, states=1)
    call["g"][:, ::4] = growth
    o, state = run(rule, call)
    if growth < 1.0:
        # while nothing overflows the numbers are right, too
        expected = reference(call)
        assert rel_l2(o, expected[0]) < 1e-5
        assert rel_l2(state, expected[1], 1) < 1e-5


@every_rule
@every_gate
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_appending_tokens_never_changes_earlier_outputs(rule, gate, dtype):
    call = make_inputs(12, 1, 150, 1, 2, 40, 24, gate, dtype=dtype, states=1)
    o, _ = run(rule, call)
    # a single token takes the recurrent algorithm in gated_delta_rule, more take the other
    for T in (2 if rule == "gated_delta_rule" else 1, 3, 15, 16, 17, 31, 63, 64, 65, 100, 128, 149):
        assert_same_bits(run(rule, tokens(call, 0, T))[0], o[:, :T], f"T = {T}")


@every_rule
@every_gate
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
@pytest.mark.parametrize("bad", [3.0, np.nan, np.inf, -np.inf])
def test_later_tokens_never_change_earlier_outputs(device, rule, gate, name, bad):
    call = make_inputs(13, 1, 90, 1, 2, 40, 24, gate)
    o, _ = run(rule, call)
    # a GPU's tensor cores multiply it with the zeros of its chunk, and that is NaN
    in_chunks = device != "cpu" and "recurrent" not in rule and not np.isfinite(bad)
    chunk = 64 if in_chunks else 1
    for t in (1, 5, 16, 23, 48, 63, 64, 80):
        x = call[name].copy()
        x[:, t:] = bad
        changed, _ = run(rule, {**call, name: x})
        before = t // chunk * chunk
        assert_same_bits(changed[:, :before], o[:, :before], f"changed from token {t} on:")


@every_rule
@every_gate
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "initial_state"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("HV", [1, 3, 4])
def test_bad_numbers_stay_in_their_sequence_and_head(rule, gate, name, bad, HV):
    H = 1 if HV == 1 else HV // (1 if HV == 3 else 2)
    call = make_inputs(14, 3, 50, H, HV, 12, 20, gate, states=3)
    o, state = run(rule, call)
    x = call[name].copy()
    head, t = x.shape[1 if name == "initial_state" else 2] - 1, 21
    if name == "initial_state":
        x[1, head] = bad
        t = 0
    else:
        x[1, t, head] = bad
    bad_o, bad_state = run(rule, {**call, name: x})
    heads = np.arange(HV)
    touched = heads // (HV // H) == head if name in "qk" else heads == head
    assert_same_bits(bad_o[[0, 2]], o[[0, 2]], "other sequences:")
    assert_same_bits(bad_state[[0, 2]], state[[0, 2]], "other sequences:")
    assert_same_bits(bad_o[1][:, ~touched], o[1][:, ~touched], "other heads:")
    assert_same_bits(bad_state[1][~touched], state[1][~touched], "other heads:")
    assert_same_bits(bad_o[1, :t], o[1, :t], "earlier tokens:")
    # and where the recurrence has them the result has them: nothing is hidden
    with np.errstate(invalid="ignore", over="ignore"):
        expected, _ = reference({**call, name: x})
    affected = ~np.isfinite(expected[1, t, touched]).all(-1)
    assert affected.any() or name in ("v", "g", "beta")
    assert (~np.isfinite(bad_o[1, t, touched]).all(-1))[affected].all()


@every_rule
@every_gate
def test_bad_numbers_stay_in_their_packed_sequence(rule, gate):
    call = make_inputs(15, 1, 90, 2, 4, 12, 20, gate, states=4)
    call["cu_seqlens"] = cu_seqlens([20, 0, 33, 37])
    o, state = run(rule, call)
    for name in TOKENS:
        call[name][:, 20:53] = np.nan
    bad_o, bad_state = run(rule, call)
    assert_same_bits(bad_o[:, :20], o[:, :20])
    assert_same_bits(bad_o[:, 53:], o[:, 53:])
    assert_same_bits(bad_state[[0, 1, 3]], state[[0, 1, 3]])


@every_rule
@every_gate
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_bits_alone_and_in_a_batch(rule, gate, dtype):
    call = make_inputs(16, 5, 70, 2, 4, 40, 24, gate, dtype=dtype, states=5)
    o, state = run(rule, call)
    for b in range(5):
        one = {name: x[b : b + 1] for name, x in call.items()}
        alone = run(rule, one)
        assert_same_bits(alone[0], o[b : b + 1], f"sequence {b}")
        assert_same_bits(alone[1], state[b : b + 1], f"sequence {b}")


@every_rule
@every_gate
def test_same_bits_alone_and_packed(rule, gate):
    lengths = [65, 0, 1, 30, 128, 1, 2, 100, 16]
    bounds = cu_seqlens(lengths)
    call = make_inputs(17, 1, sum(lengths), 2, 4, 40, 24, gate, states=len(lengths))
    o, state = run(rule, {**call, "cu_seqlens": bounds})
    for n, (bos, eos) in enumerate(itertools.pairwise(bounds)):
        one = tokens(call, bos, eos)
        one["initial_state"] = call["initial_state"][n : n + 1]
        alone = run(rule, one)
        assert_same_bits(alone[0], o[:, bos:eos], f"sequence {n}")
        assert_same_bits(alone[1], state[n : n + 1], f"sequence {n}")


@every_rule
@every_gate
@pytest.mark.parametrize(
    "shape",
    # more tasks than threads, one task alone, and a decode step large enough for threads
    [Shape(2, 70, 2, 4, 40, 24), Shape(1, 130, 1, 1, 128, 128), Shape(16, 1, 4, 8, 64, 64)],
    ids=str,
)
def test_same_bits_with_any_number_of_threads(rule, gate, shape):
    call = make_inputs(18, *shape, gate, states=shape.B)
    threads = numba.get_num_threads()
    results = []
    try:
        for n in sorted({1, 2, 3, threads}):
            if n <= numba.config.NUMBA_NUM_THREADS:
                numba.set_num_threads(n)
                results.append(run(rule, call))
    finally:
        numba.set_num_threads(threads)
    for other in results[1:]:
        assert_same_bits(other[0], results[0][0])
        assert_same_bits(other[1], results[0][1])


@every_gate
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("gated_delta_rule", {}),
        ("gated_delta_rule", {"chunk_size": 64}),
        ("chunk_gated_delta_rule", {}),
        ("chunk_gated_delta_rule", {"chunk_size": 16}),
        ("chunk_gated_delta_rule", {"chunk_size": 32}),
        ("chunk_gated_delta_rule", {"chunk_size": 64}),
        ("fused_recurrent_gated_delta_rule", {}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(f"{k}-{v}" for k, v in x.items()),
)
@pytest.mark.parametrize("split", [64, 128])
def test_split_at_a_multiple_of_64_and_carry(rule, options, gate, split):
    call = make_inputs(19, 1, 150, 1, 2, 40, 24, gate, states=1)
    o, state = run(rule, call, **options)
    first = run(rule, tokens(call, 0, split), **options)
    rest = tokens(call, split, None)
    rest["initial_state"] = first[1]
    second = run(rule, rest, **options)
    assert_same_bits(np.concatenate([first[0], second[0]], axis=1), o)
    assert_same_bits(second[1], state)


@every_rule
@pytest.mark.parametrize("option", ["everything", "packed-checkpoints"])
def test_same_bits_on_every_call(rule, option):
    call = arguments(option, Shape(2, 37, 2, 6, 20, 28), "kda")
    first, second = (getattr(nbdelta, rule)(**call) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert_same_bits(x, y)


@every_gate
def test_half_precision_products_can_be_refused(gate):
    call = make_inputs(20, 1, 100, 1, 2, 64, 64, gate, dtype="bfloat16", log_decay=0.0)
    k = call["k"].astype(np.float64) + 2.0 * call["k"][:, :1].astype(np.float64)
    call["k"] = as_dtype(k / np.linalg.norm(k, axis=-1, keepdims=True), "bfloat16")
    result = run("chunk_gated_delta_rule", call, precision="highest")
    assert_matches(result, reference(call), "bfloat16", hard_gates=True)
