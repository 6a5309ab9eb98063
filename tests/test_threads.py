"""Calls from several threads at once, and after a fork."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cases import FORWARD, assert_same_bits

import nbdelta
from nbdelta.testing import make_inputs

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("rule", FORWARD)
def test_concurrent_calls_have_the_bits_of_calls_alone(rule):
    rule = getattr(nbdelta, rule)
    # different sizes, so that the threads' scratch memory differs in layout
    calls = [
        make_inputs(n, 1 + n % 3, 40 + 11 * n, 2, 4, 16 + 8 * n, 40, gate)
        for n in range(4)
        for gate in ("gda", "kda")
    ]
    expected = [rule(**call)[0] for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = pool.map(lambda call: rule(**call)[0], calls)
            for x, y in zip(results, expected, strict=True):
                assert_same_bits(x, y)


def _calls():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 150, 5, 32)).astype(np.float32)
    L = np.tril(rng.standard_normal((11, 40, 40)), -1) / 9 + np.eye(40)
    call = make_inputs(0, 3, 40, 3, 6, 24, 20, "kda", states=3)
    yield "solve_tril", lambda: nbdelta.solve_tril(x / 9)
    yield "solve_triangular", lambda: nbdelta.solve_triangular(L, L)
    yield "fused_gate", lambda: nbdelta.fused_gate(x)
    yield "chunk_local_cumsum", lambda: nbdelta.chunk_local_cumsum(x, 16)
    yield "chunk_kda", lambda: nbdelta.chunk_kda(**call)[0]
    yield (
        "chunk_gated_delta_rule_bwd",
        lambda: nbdelta.chunk_gated_delta_rule_bwd(**call, do=call["v"])[0],
    )


@pytest.mark.parametrize(("name", "call"), [pytest.param(*c, id=c[0]) for c in _calls()])
def test_work_in_batches_has_the_same_bits(monkeypatch, name, call):
    """A long call comes back to Python between its batches; every worker then has one item each."""
    from nbdelta.cpu import _team

    whole = call()
    monkeypatch.setattr(_team, "BATCH_FLOPS", 1)
    assert_same_bits(call(), whole)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="of Linux")
def test_helpers_find_the_job_that_they_are_woken_for(monkeypatch):
    """On one core a helper that wakes runs at once, while the caller stands still."""
    from nbdelta.cpu import _atomic as atomic
    from nbdelta.cpu import _team
    from nbdelta.cpu._call import LENGTH
    from nbdelta.cpu._jit import kernel

    @kernel(LENGTH)
    def wait_for_another(desc, worker):
        rounds = 0
        atomic.add(desc, LENGTH, 1)
        while atomic.get(desc, LENGTH) < 2 and rounds < 10**7:
            rounds += 1
            atomic.pause()

    monkeypatch.setattr(_team, "_team", None)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [min(cores)])
    come = []
    try:
        for _ in range(20):
            desc = np.zeros(LENGTH + 1, np.int64)
            _team.run(wait_for_another, desc, 2, 0, 2)
            come.append(desc.item(LENGTH))
            time.sleep(0.001)  # the helper goes to sleep
    finally:
        _team._the_team().stop()
        os.sched_setaffinity(0, cores)
    # a few may still be on their way to sleep
    assert come.count(2) >= 15, come


AFTER_FORK = """
import os
import nbdelta
from nbdelta.testing import make_inputs

call = make_inputs(0, 4, 130, 4, 8, 32, 32, "gda")
expected = nbdelta.gated_delta_rule(**call)[0].tobytes()
child = os.fork()
if child == 0:
    same = nbdelta.gated_delta_rule(**call)[0].tobytes() == expected
    os._exit(0 if same else 1)
_, status = os.waitpid(child, 0)
assert nbdelta.gated_delta_rule(**call)[0].tobytes() == expected
raise SystemExit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_can_call():
    # -W: newer Pythons warn of any fork in a process with threads, which is what is tested here
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", AFTER_FORK]
    subprocess.run(command, check=True, timeout=120)
