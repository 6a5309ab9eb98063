"""Key heads that take turns in an item of work: how many, and that nothing else depends on it."""

import numpy as np
import pytest
from cases import assert_same_bits, use_unit

import nbdelta
from nbdelta import repeat
from nbdelta.cpu import chunk
from nbdelta.cpu._matrix_unit import DOTS, FLOATS, SQUARES
from nbdelta.testing import make_inputs

EVERY = 1 << 30


def heaviest(sequences, H, heads, threads):
    """Key heads of the thread that has the most of them."""
    items = sequences * -(-H // heads)
    return -(-items // threads) * heads


@pytest.mark.parametrize("threads", [1, 2, 3, 16, 100])
def test_no_thread_has_more_to_do(threads):
    for sequences in (1, 2, 7):
        for H in range(1, 40):
            for most in (0, 1, 2, 5, 16, EVERY):
                heads = chunk.heads_together(sequences, H, most, threads)
                assert 1 <= heads <= max(1, min(H, most))
                alone = -(-sequences * H // threads)
                assert heaviest(sequences, H, heads, threads) <= alone
                more = range(heads + 1, min(H, most) + 1)
                assert all(heaviest(sequences, H, n, threads) > alone for n in more)


@pytest.fixture
def most(monkeypatch):
    """Function of a call: key heads that may take turns in it, and flops of all of them."""
    jobs, job_of = [], chunk.job_of

    def recording(*args):
        jobs.append(job_of(*args))
        return jobs[-1]

    def most(T, dtype="float32", **options):
        monkeypatch.setattr(repeat, "_chunk_plans", [])
        call = make_inputs(0, 1, T, 32, 32, 16, 32, dtype=dtype)
        nbdelta.chunk_gated_delta_rule(**call, **options)
        return jobs[-1].most, jobs[-1].flops

    monkeypatch.setattr(chunk, "job_of", recording)
    return most


def test_not_more_heads_than_blocks_or_than_the_second_cache_holds(most, monkeypatch):
    assert most(40)[0] == 3
    monkeypatch.setattr(chunk, "STATES", 5 * 4 * (16 + 32) * 32)  # with U and e^(G_last - G) U
    assert most(400)[0] == 5


def test_not_more_heads_of_squares_than_half_of_the_second_cache_holds(most, monkeypatch):
    use_unit(monkeypatch, SQUARES)
    # two strips with words of U, and the keys and decays of the update that waits
    head = 4 * 16 * (2 * (16 + 16) + 16 + 1)
    monkeypatch.setattr(chunk, "STATES_OF_SQUARES", 5 * head)
    assert most(400, "bfloat16")[0] == 5
    assert most(400)[0] > 5


def test_an_item_is_as_much_work_as_an_interrupt_may_wait_for(most, monkeypatch):
    _, flops = most(400)
    monkeypatch.setattr(chunk, "ITEM_FLOPS", 4 * flops // 32)
    assert most(400)[0] == 4
    # one sequence has nearly all tokens
    assert most(400, cu_seqlens=np.array([0, 1, 2, 400]))[0] == 4


@pytest.mark.parametrize("unit", [FLOATS, DOTS, SQUARES])
@pytest.mark.parametrize("order", ["interleaved", "tiled"])
@pytest.mark.parametrize("gate", ["gda", "kda"])
def test_bits_do_not_depend_on_turns(monkeypatch, gate, order, unit):
    # three turns of two key heads and one of one; blocks that end early at checkpoints
    call = make_inputs(0, 1, 150, 7, 14, 24, 40, gate, dtype="bfloat16", states=4)
    call.update(head_order=order, output_final_state=True, use_qk_l2norm_in_kernel=True)
    call.update(cu_seqlens=np.array([0, 70, 70, 71, 150]), checkpoint_interval=23)
    use_unit(monkeypatch, unit)
    results = []
    for heads in (1, 2, 7):
        monkeypatch.setattr(chunk, "heads_together", lambda *_, heads=heads: heads)
        results.append(nbdelta.chunk_gated_delta_rule(**call))
    for several in results[1:]:
        for x, y in zip(several, results[0], strict=True):
            assert_same_bits(x, y)
