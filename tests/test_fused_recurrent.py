"""The token-by-token algorithm: options, decode steps, pools of states, speculative decode."""

import numpy as np
import pytest
from cases import (
    DTYPES,
    GATES,
    LAYOUTS,
    OPTIONS,
    SHAPES,
    arguments,
    assert_matches,
    assert_same_bits,
    cu_seqlens,
    relayout,
)

import nbdelta
from nbdelta import naive
from nbdelta.testing import Shape, allowed_error, as_dtype, make_inputs, rel_l2

pytestmark = pytest.mark.usefixtures("device")
ODD = Shape(2, 37, 2, 6, 20, 28)
DECODE = Shape(3, 1, 2, 6, 20, 28)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.T < 200], ids=str)
def test_shapes(shape, gate):
    call = make_inputs(0, *shape, gate, states=shape.B)
    reference = naive.gated_delta_rule(**call, output_final_state=True)
    result = nbdelta.fused_recurrent_gated_delta_rule(**call, output_final_state=True)
    assert_matches(result, reference, "float32")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("T", [1, 37])
def test_options(option, gate, T):
    call = arguments(option, ODD._replace(T=T), gate)
    assert_matches(
        nbdelta.fused_recurrent_gated_delta_rule(**call),
        naive.gated_delta_rule(**call),
        "float32",
        # a raw gate or beta adds an error of its own
        hard_gates="raw" in option or option == "everything",
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("option", ["initial-state", "packed", "everything"])
def test_dtypes(option, gate, dtype):
    call = arguments(option, ODD, gate, dtype)
    assert_matches(
        nbdelta.fused_recurrent_gated_delta_rule(**call),
        naive.gated_delta_rule(**call),
        dtype,
        hard_gates=option == "everything",
    )


@pytest.mark.parametrize("gate_dtype", DTYPES)
def test_gate_dtypes(gate_dtype):
    call = make_inputs(1, *ODD, "kda", dtype="bfloat16", gate_dtype=gate_dtype)
    reference = naive.gated_delta_rule(**call, output_final_state=True)
    result = nbdelta.fused_recurrent_gated_delta_rule(**call, output_final_state=True)
    assert_matches(result, reference, "bfloat16")


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("T", [1, 5])
def test_low_precision_states(dtype, state_dtype, T):
    call = make_inputs(
        2, *DECODE._replace(T=T), "gda", dtype=dtype, states=3, state_dtype=state_dtype
    )
    call.update(output_final_state=True, checkpoint_interval=2)
    result = nbdelta.fused_recurrent_gated_delta_rule(**call)
    assert_matches(result, naive.gated_delta_rule(**call), dtype, state_dtype=state_dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", GATES)
def test_layouts_have_the_same_bits(gate, layout):
    call = make_inputs(3, *ODD._replace(T=5), gate, states=2)
    call["output_final_state"] = True
    expected = nbdelta.fused_recurrent_gated_delta_rule(**call)
    names = ("q", "k", "v", "g", "beta", "initial_state")
    other = {name: relayout(call[name], layout) for name in names}
    result = nbdelta.fused_recurrent_gated_delta_rule(**{**call, **other})
    for x, y in zip(result, expected, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("gate", GATES)
def test_tokens_one_by_one_have_the_bits_of_one_call(gate):
    call = make_inputs(4, *ODD._replace(T=9), gate, states=2)
    o, state = nbdelta.fused_recurrent_gated_delta_rule(**call, output_final_state=True)
    carried = call.pop("initial_state")
    for t in range(9):
        token = {name: x[:, t : t + 1] for name, x in call.items()}
        step, carried = nbdelta.fused_recurrent_gated_delta_rule(
            **token, initial_state=carried, output_final_state=True
        )
        assert_same_bits(step, o[:, t : t + 1])
    assert_same_bits(carried, state)


@pytest.mark.parametrize("T", [1, 5])
def test_final_state_in_place(T):
    call = make_inputs(5, *DECODE._replace(T=T), "kda", states=3)
    expected = nbdelta.fused_recurrent_gated_delta_rule(**call, output_final_state=True)
    o, state = nbdelta.fused_recurrent_gated_delta_rule(**call, inplace_final_state=True)
    assert state is call["initial_state"]
    assert_same_bits(o, expected[0])
    assert_same_bits(state, expected[1])


def test_out():
    call = make_inputs(6, *DECODE, "gda", states=3)
    out = np.full((3, 1, 6, 28), 7.0, np.float32)
    o, _ = nbdelta.fused_recurrent_gated_delta_rule(**call, out=out)
    assert o is out
    assert_same_bits(o, nbdelta.fused_recurrent_gated_delta_rule(**call)[0])


def pooled(shape, gate, slots, dtype="float32", state_dtype="float32", seed=7):
    call = make_inputs(seed, *shape, gate, dtype=dtype, states=slots, state_dtype=state_dtype)
    return call, call.pop("initial_state")


def assert_pool(result, reference, pool, touched, dtype, state_dtype="float32"):
    """Compare a pooled call with the reference; slots that nobody owns keep their bits."""
    o, new = result
    ref_o, ref_pool = reference
    assert rel_l2(o, ref_o) <= allowed_error(ref_o, dtype)
    ref = ref_pool[touched]
    assert rel_l2(new[touched], ref, 1) <= allowed_error(ref, state_dtype, 1)
    untouched = [slot for slot in range(len(pool)) if slot not in touched]
    assert_same_bits(new[untouched], pool[untouched])


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("T", [1, 4])
def test_pool_with_padded_rows(gate, dtype, state_dtype, T):
    shape = Shape(5, T, 2, 6, 20, 28)
    call, pool = pooled(shape, gate, 8, dtype, state_dtype)
    before = pool.copy()
    slots = np.array([6, -1, 0, 3, -1], np.int32)
    reference = naive.fused_recurrent_gated_delta_rule(
        **call, initial_state=pool, state_indices=slots
    )
    o, new = nbdelta.fused_recurrent_gated_delta_rule(
        **call, initial_state=pool, state_indices=slots
    )
    assert new is pool
    assert_pool((o, new), reference, before, [6, 0, 3], dtype, state_dtype)
    assert not np.asarray(o[[1, 4]]).astype(np.float32).any()


@pytest.mark.parametrize("sequence", [list, tuple])
def test_slots_in_a_sequence(sequence):
    call = make_inputs(5, 2, 1, 1, 2, 16, 16, "gda")
    pool = make_inputs(6, 1, 1, 1, 2, 16, 16, "gda", states=3)["initial_state"]
    expected = naive.fused_recurrent_gated_delta_rule(
        **call, initial_state=pool, state_indices=[2, -1]
    )
    result = nbdelta.fused_recurrent_gated_delta_rule(
        **call, initial_state=pool, state_indices=sequence([2, -1])
    )
    assert_matches(result, expected, "float32")


def test_padded_rows_with_nan_inputs_are_zero():
    call, pool = pooled(Shape(2, 1, 1, 2, 8, 8), "gda", 2)
    for x in call.values():
        x[1] = np.nan
    o, _ = nbdelta.fused_recurrent_gated_delta_rule(
        **call, initial_state=pool, state_indices=np.array([1, -1])
    )
    assert np.isfinite(o[0]).all() and not o[1].any()
    assert np.isfinite(pool).all()


@pytest.mark.parametrize("layout", ["transposed", "padded", "fortran", "reversed"])
@pytest.mark.parametrize("state_v_first", [False, True])
def test_strided_pools(layout, state_v_first):
    call, pool = pooled(Shape(3, 1, 2, 6, 20, 28), "gda", 5)
    slots = np.array([4, 0, 2])
    expected = nbdelta.fused_recurrent_gated_delta_rule(
        **call, initial_state=pool.copy(), state_indices=slots
    )
    if state_v_first:
        pool = pool.swapaxes(-1, -2)
    strided = relayout(pool, layout)
    o, new = nbdelta.fused_recurrent_gated_delta_rule(
        **call, initial_state=strided, state_indices=slots, state_v_first=state_v_first
    )
    assert new is strided
    assert_same_bits(o, expected[0])
    assert_same_bits(new.swapaxes(-1, -2) if state_v_first else new, expected[1])
    if layout == "padded":
        gaps = np.ones(strided.base.shape, bool)
        gaps[tuple(slice(1, 1 + 2 * n, 2) for n in pool.shape)] = False
        assert np.isnan(strided.base[gaps]).all()


def test_pool_whose_slots_hold_other_things_too():
    # engines keep the convolution state and the recurrent state in one page
    call, pool = pooled(Shape(2, 1, 1, 2, 8, 6), "gda", 3)
    pages = np.full((3, 2 * 8 * 6 + 40), 5.0, np.float32)
    states = pages[:, 40:].reshape(3, 2, 8, 6)
    assert states.base is not None
    states[...] = pool
    slots = np.array([2, 0])
    reference = naive.fused_recurrent_gated_delta_rule(
        **call, initial_state=pool, state_indices=slots
    )
    result = nbdelta.fused_recurrent_gated_delta_rule(
        **call, initial_state=states, state_indices=slots
    )
    assert_pool(result, reference, pool, [2, 0], "float32")
    assert (pages[:, :40] == 5.0).all()


def test_packed_sequences_with_a_pool():
    lengths = [3, 0, 1, 5]
    call, pool = pooled(Shape(1, 9, 2, 6, 20, 28), "kda", 6)
    before = pool.copy()
    call.update(cu_seqlens=cu_seqlens(lengths), state_indices=np.array([5, 1, -1, 2]))
    reference = naive.fused_recurrent_gated_delta_rule(**call, initial_state=pool)
    result = nbdelta.fused_recurrent_gated_delta_rule(**call, initial_state=pool)
    assert_pool(result, reference, before, [5, 2], "float32")
    assert not result[0][0, 3].any()


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("state_v_first", [False, True])
def test_speculative(gate, state_dtype, state_v_first):
    call, pool = pooled(Shape(4, 3, 2, 6, 20, 28), gate, 14, state_dtype=state_dtype)
    if state_v_first:
        pool = np.ascontiguousarray(pool.swapaxes(-1, -2))
    before = pool.copy()
    # row 1 starts from a slot that its own tokens overwrite, row 2 is padded, row 3 stores one less
    slots = np.array([[0, 1, 2], [7, 6, 5], [-1, 13, 12], [9, 8, -1]], np.int32)
    call.update(
        state_indices=slots,
        num_accepted_tokens=np.array([1, 3, 1, 2], np.int32),
        state_v_first=state_v_first,
    )
    reference = naive.fused_recurrent_gated_delta_rule(**call, initial_state=pool)
    o, new = nbdelta.fused_recurrent_gated_delta_rule(**call, initial_state=pool)
    assert new is pool
    assert_pool((o, new), reference, before, [0, 1, 2, 7, 6, 5, 9, 8], "float32", state_dtype)
    assert not o[2].any()


def test_speculative_with_packed_sequences_of_unequal_length():
    lengths = [2, 3, 0, 1]
    call, pool = pooled(Shape(1, 6, 1, 2, 8, 12), "gda", 16)
    before = pool.copy()
    slots = np.arange(16).reshape(4, 4)
    call.update(
        cu_seqlens=cu_seqlens(lengths),
        state_indices=slots,
        num_accepted_tokens=np.array([4, 1, 2, 3]),
    )
    reference = naive.fused_recurrent_gated_delta_rule(**call, initial_state=pool)
    result = nbdelta.fused_recurrent_gated_delta_rule(**call, initial_state=pool)
    assert_pool(result, reference, before, [0, 1, 4, 5, 6, 12], "float32")


def test_rejected_drafts_roll_back():
    # draft three tokens, accept one, go on from its state: as if the others had never been
    call, pool = pooled(Shape(1, 3, 1, 2, 8, 12), "gda", 3)
    slots, state = np.array([[0, 1, 2]]), pool[:1].copy()
    nbdelta.fused_recurrent_gated_delta_rule(
        **call, initial_state=pool, state_indices=slots, num_accepted_tokens=np.array([1])
    )
    other = make_inputs(8, 1, 1, 1, 2, 8, 12, "gda")
    after = {name: np.concatenate([x[:, :1], other[name]], 1) for name, x in call.items()}
    expected, _ = nbdelta.fused_recurrent_gated_delta_rule(**after, initial_state=state)
    o, _ = nbdelta.fused_recurrent_gated_delta_rule(
        **other, initial_state=pool, state_indices=slots, num_accepted_tokens=np.array([1])
    )
    assert_same_bits(o, expected[:, 1:])


def test_many_decode_steps_in_a_bfloat16_pool():
    # each step rounds the state once; the rounding must not be biased
    steps, sizes = 50, (1, 2, 16, 24)
    call, pool = pooled(Shape(1, steps, *sizes), "gda", 1, state_dtype="bfloat16")
    rounded = pool.copy()
    for t in range(steps):
        token = {name: x[:, t : t + 1] for name, x in call.items()}
        o, _ = nbdelta.fused_recurrent_gated_delta_rule(
            **token, initial_state=pool, state_indices=np.array([0])
        )
        ref_o, state = naive.gated_delta_rule(
            **token, initial_state=rounded, output_final_state=True
        )
        rounded = as_dtype(state, "bfloat16")
    # a value that lies near the middle of two may go either way, and then stays different
    assert rel_l2(pool, rounded, 1) < 2e-3
    assert rel_l2(o, ref_o) < 2e-3


def test_fused_recurrent_kda_is_the_same_function():
    call = make_inputs(9, *DECODE, "kda", states=3)
    call["output_final_state"] = True
    for x, y in zip(
        nbdelta.fused_recurrent_kda(**call),
        nbdelta.fused_recurrent_gated_delta_rule(**call),
        strict=True,
    ):
        assert_same_bits(x, y)


def test_inputs_are_not_changed():
    call = arguments("everything", ODD, "kda")
    before = {name: x.copy() for name, x in call.items() if isinstance(x, np.ndarray)}
    nbdelta.fused_recurrent_gated_delta_rule(**call)
    for name, x in before.items():
        assert_same_bits(call[name], x, name)


def test_work_in_several_batches_has_the_same_bits(monkeypatch):
    """A long call comes back to Python between batches of heads: what they hold changes nothing."""
    from nbdelta.cpu import recurrent

    call = make_inputs(0, 3, 40, 2, 6, 24, 20, "kda", states=3)
    whole = nbdelta.fused_recurrent_kda(**call, output_final_state=True)
    monkeypatch.setattr(recurrent, "BATCH_BYTES", 1)
    parts = nbdelta.fused_recurrent_kda(**call, output_final_state=True)
    for x, y in zip(whole, parts, strict=True):
        assert_same_bits(x, y)
