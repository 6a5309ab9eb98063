"""Building blocks whose boundaries are on the device, where the host does not look at them."""

import devices
import numpy as np
import pytest
from cases import assert_same_bits

import nbdelta

T = 100
BOUNDS = np.array([0, 0, 1, 40, 40, 99, T])


@pytest.fixture(autouse=True)
def cuda_alone(device):
    if device == "cpu":
        pytest.skip("the host reads what is on the CPU: --device sim, emu or gpu")


def cumsum(cu_seqlens, out=None):
    x = np.random.default_rng(0).standard_normal((1, T, 5)).astype(np.float32)
    return nbdelta.chunk_local_cumsum(x, 16, cu_seqlens=cu_seqlens, out=out)


def tril(cu_seqlens, out=None):
    A = np.random.default_rng(0).standard_normal((1, T, 1, 16)).astype(np.float32) / 4
    return nbdelta.solve_tril(A, cu_seqlens=cu_seqlens, out=out)


blocks = pytest.mark.parametrize("block", [cumsum, tril])


@blocks
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("step", [1, 2])
def test_boundaries_on_the_device(block, dtype, step):
    bounds = np.repeat(BOUNDS.astype(dtype), step)[::step]
    assert_same_bits(block(devices.send(bounds)), block(BOUNDS))


@blocks
@pytest.mark.parametrize(
    "bounds",
    [
        [0, 40, 1000, T],
        [0, 40, -5, T],
        [0, 40, 2**31 - 1, -(2**31)],
        [7, 40, 30, 20],
        [0, 40, 40, 40],
        [0, 40],
    ],
    ids=str,
)
def test_boundaries_out_of_range_touch_nothing(block, bounds):
    expected = block(np.array([0, 40, T]))
    out = np.full(expected.shape, 7.0, np.float32)
    block(devices.send(np.array(bounds, np.int32)), out)
    if bounds[0] == 0:
        assert_same_bits(out[:, :40], expected[:, :40])
    else:
        assert (out[:, : bounds[0]] == 7.0).all()


@blocks
def test_no_sequences_on_the_device(block):
    expected = block(BOUNDS)
    out = np.full(expected.shape, 7.0, np.float32)
    block(devices.send(np.array([0], np.int32)), out)
    assert (out == 7.0).all()
