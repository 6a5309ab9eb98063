"""Tiles of a warp by themselves."""

import numpy as np
import pytest
from devices import Memory

from nbdelta.testing import as_dtype

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from numba import cuda

from nbdelta.cuda._chunk_form import column_lane
from nbdelta.cuda._jit import current_place, kernel
from nbdelta.cuda._ptx import shared_address, tile
from nbdelta.cuda._tile_functions import registers, u32, u64, uint32, uint64, void
from nbdelta.cuda._tiles import make_update

TOKENS, K, UPDATES = 16, 64, 24
U, KEY = np.float32(1 / 700), np.float32(3 / 7)
PLANE = 2 * TOKENS * K  # bytes
SHARED = 3 * PLANE + 4 * 32

update = make_update("bf16", TOKENS, K, 3, 3, False)


@tile(void, u32)
def put_keys(e, address):
    """KEY in all places, and a decay of 1; address + 4 lane."""
    rest = KEY
    for p in range(3):
        rounded = as_dtype(rest, "bfloat16")
        rest -= np.float32(rounded)
        pair = [e.u32(int(rounded.view(np.uint16)) * 0x10001)]
        for i in range(0, PLANE, 4 * 32):
            e.store_shared(address, pair, p * PLANE + i)
    e.store_shared(address, [e.f32(1.0)], 3 * PLANE)


@tile(registers(K // 2))
def ones(e):
    return [e.f32(1.0)] * (K // 2)


@tile(registers(TOKENS // 2))
def values(e):
    return [e.f32(float(U))] * (TOKENS // 2)


@tile(void, registers(K // 2), u64)
def put_state(e, s, address):
    for i, x in enumerate(s):
        e.store_global(address, [x], 4 * i)


@kernel(32)
def update_kernel(desc):
    base, lane = shared_address(cuda.shared.array(0, u32)), uint32(cuda.threadIdx.x)
    put_keys(uint32(base + 4 * lane))
    cuda.syncthreads()
    s = ones()
    for _ in range(UPDATES):
        keys = uint32(base + column_lane(lane, 2 * K))
        s = update(s, values(), keys, uint32(base + 3 * PLANE))
    put_state(s, uint64(desc[0]) + uint64(2 * K) * uint64(lane))


def test_a_float32_state_does_not_fade(device):
    """Without decay it goes through thousands of products, and tensor cores cut off every sum."""
    if device == "cpu":
        pytest.skip("of the kernels for GPUs: --device sim, emu or gpu")
    state = np.zeros((32, K // 2), np.float32)
    memory = Memory(state)
    desc = np.array([memory.address], np.int64)
    update_kernel.launch((1, 1, 1), desc, current_place("numba", "cuda:0"), SHARED)
    memory.bring_back()
    exact = 1 + UPDATES * TOKENS * float(U) * float(KEY)
    assert np.abs(state - exact).max() < 5e-7 * exact
