"""Calls like an earlier one take a short way: it must see all that the long way sees."""

import numba
import numpy as np
import pytest
from cases import assert_same_bits

import nbdelta
from nbdelta import repeat
from nbdelta.testing import Shape, make_inputs

SHAPE = Shape(3, 1, 2, 4, 20, 32)
SLOTS = np.array([4, -1, 0])


@pytest.fixture(autouse=True)
def no_plans(monkeypatch):
    """Let each test begin with calls that nobody has made before."""
    monkeypatch.setattr(repeat, "_step_plans", [])
    monkeypatch.setattr(repeat, "_chunk_plans", [])


@pytest.fixture
def long_ways(monkeypatch):
    """List with an entry for each call that took the long way."""
    taken = []
    remember = repeat.remember
    monkeypatch.setattr(repeat, "remember", lambda *args: (taken.append(args[1]), remember(*args)))
    return taken


def pooled(seed=0, gate="gda"):
    call = make_inputs(seed, *SHAPE, gate, states=5)
    return {**call, "state_indices": SLOTS, "use_qk_l2norm_in_kernel": True}


def copied(call):
    return {name: x.copy() if isinstance(x, np.ndarray) else x for name, x in call.items()}


@pytest.mark.parametrize("gate", ["gda", "kda"])
@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize("form", ["pool", "in place", "new state", "no state"])
def test_both_ways_have_the_same_bits(form, out, gate, long_ways):
    def call(seed):
        made = pooled(seed, gate)
        if form != "pool":
            del made["state_indices"]
            made["initial_state"] = made["initial_state"][:3].copy()
            made["inplace_final_state"] = form == "in place"
            made["output_final_state"] = form != "no state"
        if out:
            made["out"] = np.empty((3, 1, 4, 32), np.float32)
        return made

    expected = []
    for seed in range(3):
        repeat._step_plans.clear()
        expected.append(nbdelta.fused_recurrent_gated_delta_rule(**call(seed)))
    long_ways.clear()
    for seed in range(3):
        given = call(seed)
        result = nbdelta.fused_recurrent_gated_delta_rule(**given)
        assert_same_bits(result[0], expected[seed][0])
        assert result[0] is given.get("out", result[0])
        if form == "new state":
            assert_same_bits(result[1], expected[seed][1])
        elif form == "no state":
            assert result[1] is None
        else:
            assert result[1] is given["initial_state"]
            assert_same_bits(result[1], expected[seed][1])
    assert len(long_ways) == 0


def test_one_token_through_the_function_that_picks(long_ways):
    call = make_inputs(0, *SHAPE, "gda", states=3)
    first = nbdelta.gated_delta_rule(**call, output_final_state=True)
    second = nbdelta.gated_delta_rule(**call, output_final_state=True)
    assert len(long_ways) == 1
    for x, y in zip(first, second, strict=True):
        assert_same_bits(x, y)


def test_what_is_new_takes_the_long_way(long_ways):
    call = pooled()
    for change in (
        {},
        {"scale": 0.5},
        {"q": np.asfortranarray(call["q"]), "beta": call["beta"].astype(np.float64)},
        {"g": None},
        {"k": call["k"][..., ::-1]},
        {"state_indices": SLOTS.tolist()},
        {"state_indices": SLOTS.astype(np.int32)},
        {"head_order": "tiled"},
    ):
        nbdelta.fused_recurrent_gated_delta_rule(**copied(call) | change)
    assert len(long_ways) == 8
    nbdelta.fused_recurrent_gated_delta_rule(**copied(call))
    assert len(long_ways) == 8


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (lambda c: {"state_indices": np.array([4, -1, 5])}, ValueError, "-1 to 4"),
        (lambda c: {"state_indices": np.array([4, -2, 0])}, ValueError, "-1 to 4"),
        (lambda c: {"state_indices": np.array([4, 1, 4])}, ValueError, "comes twice"),
        (lambda c: {"initial_state": read_only(c["initial_state"])}, ValueError, "read-only"),
        (lambda c: {"out": read_only(c["out"])}, ValueError, "read-only"),
        (lambda c: {"out": c["v"]}, ValueError, "shares memory"),
        (lambda c: {"use_qk_l2norm_in_kernel": 1}, TypeError, "True or False"),
        (lambda c: {"output_final_state": 0}, TypeError, "True or False"),
        (lambda c: {"scale": True}, TypeError, "real number"),
        (lambda c: {"head_order": ["tiled"]}, TypeError, "head_order"),
        (lambda c: {"lower_bound": -1.0}, ValueError, "use_gate_in_kernel"),
    ],
)
def test_a_wrong_call_after_right_ones(changes, error, words):
    call = pooled() | {"out": np.empty((3, 1, 4, 32), np.float32), "scale": 1.0}
    for _ in range(2):
        nbdelta.fused_recurrent_gated_delta_rule(**copied(call))
    wrong = copied(call)
    wrong |= changes(wrong)
    before = wrong["initial_state"].copy()
    with pytest.raises(error, match=words):
        nbdelta.fused_recurrent_gated_delta_rule(**wrong)
    assert_same_bits(wrong["initial_state"], before)


def test_a_state_that_meets_an_input():
    memory = np.zeros(2 * 3 * 4 * 20 * 32, np.float32)
    call = pooled()
    del call["state_indices"]
    call["initial_state"] = memory[: memory.size // 2].reshape(3, 4, 20, 32)
    call["inplace_final_state"] = True
    for _ in range(2):
        nbdelta.fused_recurrent_gated_delta_rule(**call)
    call["v"] = memory[: 3 * 4 * 32].reshape(3, 1, 4, 32)
    with pytest.raises(ValueError, match="initial_state: is written to, but shares memory with v"):
        nbdelta.fused_recurrent_gated_delta_rule(**call)


def test_torch(long_ways):
    torch = pytest.importorskip("torch")
    calls = []
    for _ in range(3):
        call = {
            n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in pooled().items()
        }
        calls.append(nbdelta.fused_recurrent_gated_delta_rule(**call))
    assert len(long_ways) == 1
    for o, state in calls[1:]:
        assert type(o) is torch.Tensor and torch.equal(o, calls[0][0])
        assert torch.equal(state, calls[0][1])
    call["q"].requires_grad_()
    with pytest.raises(ValueError, match="gradient"):
        nbdelta.fused_recurrent_gated_delta_rule(**call)


def test_tensors_without_memory_after_right_ones():
    torch = pytest.importorskip("torch")
    call = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in pooled().items()}
    q = call.pop("q")

    def of_q(q):
        return nbdelta.fused_recurrent_gated_delta_rule(q, **call)[0]

    for _ in range(2):
        of_q(q)
    states = call["initial_state"].clone()
    for wrong in (
        lambda: torch.vmap(of_q)(q[None]),
        lambda: torch.func.functionalize(of_q)(q),  # its tensors have the address 0
        lambda: of_q(q.to("meta")),  # torch has no autocast there
    ):
        with pytest.raises(TypeError, match=r"^q: a tensor without memory of its own"):
            wrong()
    assert torch.equal(call["initial_state"], states)


@pytest.mark.parametrize("T", [1, 40])
def test_results_are_where_the_tensors_are(T):
    """Whatever torch's default device is."""
    torch = pytest.importorskip("torch")
    call = make_inputs(0, 2, T, 2, 4, 20, 32, "gda", states=2)
    call = {n: torch.from_numpy(x) for n, x in call.items()} | {"output_final_state": True}
    wanted = nbdelta.gated_delta_rule(**call)
    with torch.device("meta"):
        found = nbdelta.gated_delta_rule(**call)
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)


def test_few_plans_are_kept():
    call = pooled()
    for i in range(70):
        nbdelta.fused_recurrent_gated_delta_rule(**copied(call), scale=1.0 + i)
    assert len(repeat._step_plans) == repeat._STEP_PLANS_AT_MOST


@pytest.mark.parametrize("gate", ["gda", "kda"])
@pytest.mark.parametrize("T", [1, 2, 37])
def test_chunks_have_both_ways(gate, T, long_ways):
    rule = nbdelta.gated_delta_rule if gate == "gda" else nbdelta.chunk_kda

    def call(seed):
        return make_inputs(seed, 2, T, 2, 4, 20, 32, gate)

    expected = []
    for seed in range(3):
        repeat._step_plans.clear()
        repeat._chunk_plans.clear()
        expected.append(rule(**call(seed), output_final_state=True))
    long_ways.clear()
    threads = numba.get_num_threads()
    for seed in range(3):
        numba.set_num_threads(1 if seed == 1 else threads)
        for x, y in zip(rule(**call(seed), output_final_state=True), expected[seed]):
            assert_same_bits(x, y)
    numba.set_num_threads(threads)
    assert not long_ways
    # what the long way sees
    given = call(0)
    with pytest.raises(ValueError, match=r"^out: .*read-only"):
        out = np.zeros((2, T, 4, 32), np.float32)
        out.flags.writeable = False
        rule(**given, output_final_state=True, out=out)
    with pytest.raises(ValueError, match=r"^k: "):
        rule(**{**given, "k": given["k"][:, :, :1]}, output_final_state=True)


def test_few_plans_of_chunks_are_kept():
    for T in range(2, 22):
        nbdelta.chunk_gated_delta_rule(**make_inputs(0, 1, T, 1, 1, 16, 16, "gda"))
    assert len(repeat._chunk_plans) == repeat._CHUNK_PLANS_AT_MOST
