"""Key heads that take turns in an item of work: how many, and that nothing else depends on it."""

import numpy as np
import pytest
from cases import assert_same_bits, use_unit

import nbdelta
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


def test_the_states_of_a_turn_fit_the_second_cache_and_its_work_a_second(monkeypatch):
    jobs, job_of = [], chunk.job_of

    def recording(*args):
        jobs.append(job_of(*args))
        return jobs[-1]

    monkeypatch.setattr(chunk, "job_of", recording)
    for T in (40, 20_000):
        call = make_inputs(0, 1, T, 32, 32, 16, 16)
        nbdelta.chunk_gated_delta_rule(**call)
    short, long = jobs[0], jobs[-1]
    assert short.most == 3  # blocks of a sequence
    assert 3 < long.most <= chunk.STATES // (4 * 16 * 16)
    assert long.most * long.flops <= 32 * chunk.ITEM_FLOPS


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
