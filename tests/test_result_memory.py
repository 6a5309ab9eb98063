"""Memory of large results is used again, and never while somebody holds it."""

import gc
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from cases import assert_same_bits

import nbdelta
from nbdelta import arrays, result_memory
from nbdelta.arrays import view
from nbdelta.testing import Shape, make_inputs

LARGE = result_memory.LARGE
ARRAY = np.zeros(1)


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    result_memory._free.clear()


def new(nbytes, like=ARRAY):
    return arrays.empty(view(like, "x"), (nbytes // 4,), "float32").owner


def address(x):
    return x.ctypes.data if isinstance(x, np.ndarray) else x.data_ptr()


@pytest.mark.parametrize("like", [ARRAY, torch.zeros(1)])
def test_dead_arrays_leave_their_memory_to_the_next(like):
    first = new(LARGE, like)
    place = address(first)
    assert place % 64 == 0
    del first
    assert address(new(LARGE, like)) == place


@pytest.mark.parametrize("like", [ARRAY, torch.zeros(1)])
@pytest.mark.parametrize("part", [lambda x: x[3:5], lambda x: x.reshape(2, -1), lambda x: x[::-2]])
def test_a_view_holds_the_memory(part, like):
    if isinstance(like, torch.Tensor):
        whole = new(LARGE, like)
        held = part(whole.numpy())  # of NumPy: torch has no negative steps
    else:
        whole = new(LARGE, like)
        held = part(whole)
    held[...] = 7
    del whole
    others = [new(LARGE, like) for _ in range(3)]
    for other in others:
        other[...] = 0
    assert (held == 7).all()


def test_a_tensor_holds_the_memory_of_an_array():
    whole = new(LARGE)
    whole[...] = 7
    held = torch.from_numpy(whole)
    del whole
    new(LARGE)[...] = 0
    assert (held == 7).all()


def test_other_sizes_give_the_memory_back():
    first = new(LARGE)
    del first
    assert result_memory._free
    kept = new(2 * LARGE)
    assert not result_memory._free
    del kept
    assert [size for size, _ in result_memory._free] == [2 * LARGE]


def test_bound():
    many = [new(result_memory.KEPT_AT_MOST // 2) for _ in range(4)]
    del many
    assert sum(size for size, _ in result_memory._free) <= result_memory.KEPT_AT_MOST
    large = new(result_memory.KEPT_AT_MOST + 4)
    result_memory._free.clear()
    del large
    assert not result_memory._free


def test_small_arrays_own_their_memory():
    assert new(LARGE - 4).flags.owndata


def test_threads_get_memory_of_their_own():
    wrong = []

    def work(number):
        for _ in range(300):
            mine = new(LARGE)
            mine[::64] = number
            if (mine[::64] != number).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=[i]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("gate", ["gda", "kda"])
def test_results_that_are_held_stay(gate):
    """The second and third calls take the short way, with memory of their own."""
    rule = nbdelta.chunk_gated_delta_rule if gate == "gda" else nbdelta.chunk_kda
    shape = Shape(1, 600, 1, 2, 40, 64)
    calls = [make_inputs(seed, *shape, gate) for seed in range(3)]
    expected = []
    for call in calls:
        o, state = rule(**call, output_final_state=True)
        expected.append((o.copy(), state.copy()))
    del o, state
    held = [rule(**call, output_final_state=True) for call in calls]
    assert held[0][0].nbytes >= LARGE
    for results, copies in zip(held, expected):
        for x, y in zip(results, copies):
            assert_same_bits(x, y)


def test_a_result_outlives_the_modules():
    code = """
import builtins
import numpy as np
from nbdelta import result_memory

class Holder:
    pass

builtins.held = Holder()  # which Python lets go of last
builtins.held.array = result_memory.new_bytes(result_memory.LARGE)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
