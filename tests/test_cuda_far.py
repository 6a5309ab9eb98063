"""Arrays whose numbers are gigabytes apart: no address of a kernel is computed in 32 bits."""

import functools

import devices
import numpy as np
import pytest
from cases import assert_same_bits

from nbdelta import ops
from nbdelta.testing import as_dtype, make_inputs

# bytes from one index of an axis to the next: twice of it is more than 32 bits hold
STEP = 3 * 2**30 + 4096
ROOM = 2**16  # bytes of an array at each of these places


SIZE = 2 * STEP + 64 * ROOM


@functools.cache
def region(which):
    """The first byte of reserved memory for arrays that lie between each other; two of them."""
    from ptxemu import memory

    arena = memory.arena()
    arena.top += SIZE
    return arena.top - SIZE


@pytest.fixture
def far(device):
    """A function that puts an array on the device, along some axes far apart."""
    if device != "emu":
        pytest.skip("memory that is reserved and hardly used: --device emu")
    from ptxemu import memory

    arena, used = memory.arena(), []

    def put(array, *axes, written=False):
        strides, step = [0] * array.ndim, array.itemsize
        for axis in reversed(range(array.ndim)):
            strides[axis] = STEP if axis in axes else step
            step *= 1 if axis in axes else array.shape[axis]
        assert step <= ROOM and sum(array.shape[axis] - 1 for axis in axes) <= 2
        start = region(written) + ROOM * len(used)
        there = np.ndarray(array.shape, array.dtype, arena.data, start, strides)
        valid = (*array.shape, array.itemsize), np.uint8, arena.valid, start, (*strides, 1)
        used.append(np.ndarray(*valid))
        there[...], used[-1][...] = array, 1
        on_device = devices.OnDevice(there, arena.base + start)
        on_device.numbers = there
        return on_device

    yield put
    for valid in used:
        valid[...] = 0


def near(array, *axes, written=False):
    return devices.send(np.ascontiguousarray(array))


def numbers(result):
    results = result if isinstance(result, tuple) else (result,)
    return [x.copy_to_host() for x in results if hasattr(x, "copy_to_host")]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("gate", ["gda", "kda"])
@pytest.mark.parametrize("name", ["chunk", "fused_recurrent"])
def test_rule(far, name, gate, dtype):
    """Tokens of q, k, v, g, beta and o, heads of states."""
    call = make_inputs(0, 1, 3, 1, 2, 32, 16, gate, dtype=dtype, gate_dtype="float32", states=1)
    function = getattr(ops, f"{name}_gated_delta_rule")
    results = []
    for put in (near, far):
        arrays = {key: put(x, 1) for key, x in call.items()}
        arrays["out"] = out = put(np.zeros_like(call["v"]), 1, written=True)
        _, state = function(**arrays, output_final_state=True)
        if put is near:
            out.memory.bring_back()
        results.append((out.memory.array if put is near else out.numbers, *numbers(state)))
    for x, y in zip(*results, strict=True):
        assert np.any(x)
        assert_same_bits(np.ascontiguousarray(y), x)


def test_states_in_a_pool(far):
    """Slots of a pool and its heads; they are written where they are."""
    call = make_inputs(1, 2, 1, 1, 2, 32, 32, "gda", states=2)
    pool, results = call.pop("initial_state"), []
    for put, axes in ((near, ()), (far, (0,)), (far, (1,))):
        states = put(pool.copy(), *axes)
        arrays = {key: near(x) for key, x in call.items()}
        o, _ = ops.fused_recurrent_gated_delta_rule(
            **arrays, initial_state=states, state_indices=np.array([1, 0])
        )
        if put is near:
            states.memory.bring_back()
        results.append((*numbers(o), states.memory.array if put is near else states.numbers))
    assert not np.array_equal(results[0][1], pool)
    for found in results[1:]:
        for x, y in zip(results[0], found, strict=True):
            assert_same_bits(np.ascontiguousarray(y), x)


@pytest.mark.parametrize("gate", ["gda", "kda"])
def test_gradients(far, gate):
    call = make_inputs(2, 1, 3, 1, 2, 20, 12, gate, states=1)
    call["do"], call["dht"] = call["v"][::-1] + 1, call["initial_state"] + 1
    results = [
        numbers(ops.chunk_gated_delta_rule_bwd(**{key: put(x, 1) for key, x in call.items()}))
        for put in (near, far)
    ]
    for x, y in zip(*results, strict=True):
        assert np.any(x)
        assert_same_bits(y, x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_building_blocks(far, dtype):
    rng = np.random.default_rng(3)
    x = as_dtype(rng.standard_normal((1, 3, 5)), dtype)
    A = as_dtype(rng.standard_normal((1, 3, 2, 16)) / 16, dtype)
    L = as_dtype(rng.standard_normal((3, 5, 5)) + 4 * np.eye(5), dtype)
    b = as_dtype(rng.standard_normal((3, 5, 2)), dtype)
    calls = (
        lambda put: ops.chunk_local_cumsum(put(x, 1), 16),
        lambda put: ops.chunk_local_cumsum(put(x, 1), 16, axis=2),
        lambda put: ops.solve_tril(put(A, 1)),
        lambda put: ops.solve_triangular(put(L, 0), put(b, 0)),
        lambda put: ops.solve_triangular(put(L[:, :3, :3], 2), put(b[:, :3], 1)),
        lambda put: ops.fused_gate(put(x, 1)),
    )
    for call in calls:
        (expected,), (found,) = (numbers(call(put)) for put in (near, far))
        assert np.any(expected)
        assert_same_bits(found, expected)
