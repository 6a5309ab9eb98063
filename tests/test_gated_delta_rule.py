"""The function that picks the algorithm by itself."""

import itertools

import pytest
from cases import GATES, OPTIONS, arguments, assert_matches, assert_same_bits, cu_seqlens

import nbdelta
from nbdelta import naive
from nbdelta.testing import Shape, make_inputs, rel_l2

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, gate):
    call = arguments(option, Shape(2, 21, 2, 4, 12, 20), gate)
    assert_matches(
        nbdelta.gated_delta_rule(**call),
        naive.gated_delta_rule(**call),
        "float32",
        hard_gates="raw" in option or option == "everything",
    )


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("T", [1, 2, 3, 15, 16, 17, 63, 64, 65, 130])
def test_both_algorithms_agree(T, gate):
    call = make_inputs(1, 2, T, 2, 4, 40, 24, gate, states=2)
    call["output_final_state"] = True
    chunked = nbdelta.chunk_gated_delta_rule(**call)
    recurrent = nbdelta.fused_recurrent_gated_delta_rule(**call)
    either = nbdelta.gated_delta_rule(**call)
    assert rel_l2(chunked[0], recurrent[0]) < 4e-6
    assert rel_l2(chunked[1], recurrent[1], 1) < 4e-6
    expected = recurrent if T == 1 else chunked
    for x, y in zip(either, expected, strict=True):
        assert_same_bits(x, y)


def test_single_tokens_among_packed_sequences():
    call = make_inputs(2, 1, 40, 2, 4, 40, 24, "gda", states=5)
    call["output_final_state"] = True
    bounds = cu_seqlens([1, 20, 0, 1, 18])
    o, state = nbdelta.gated_delta_rule(**call, cu_seqlens=bounds)
    for n, (bos, eos) in enumerate(itertools.pairwise(bounds)):
        alone = {name: x[:, bos:eos] for name, x in call.items() if name in ("q", "k", "v")}
        alone |= {"g": call["g"][:, bos:eos], "beta": call["beta"][:, bos:eos]}
        alone |= {"initial_state": call["initial_state"][n : n + 1], "output_final_state": True}
        expected = nbdelta.gated_delta_rule(**alone)
        assert_same_bits(o[:, bos:eos], expected[0], f"sequence {n}")
        assert_same_bits(state[n : n + 1], expected[1], f"sequence {n}")


def test_positional_arguments():
    call = make_inputs(3, 1, 5, 1, 2, 8, 12, "gda", states=1)
    expected = naive.gated_delta_rule(
        **call, scale=0.5, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    result = nbdelta.gated_delta_rule(
        call["q"],
        call["k"],
        call["v"],
        call["g"],
        call["beta"],
        0.5,
        call["initial_state"],
        True,
        True,
    )
    assert_matches(result, expected, "float32")
