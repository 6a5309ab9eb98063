"""Tiles of a warp by themselves."""

import numpy as np
import pytest
from devices import Memory

from nbdelta.testing import as_dtype

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from numba import cuda

from nbdelta.cuda._chunk_form import column_lane
from nbdelta.cuda._gram_tiles import make_gram
from nbdelta.cuda._jit import current_place, kernel
from nbdelta.cuda._ptx import shared_address, tile
from nbdelta.cuda._tile_functions import registers, u32, u64, uint32, uint64, void
from nbdelta.cuda._tiles import make_update

TOKENS, K, UPDATES, PRODUCTS = 16, 64, 24, 16
U, KEY = np.float32(1 / 700), np.float32(3 / 7)
PLANE = 2 * TOKENS * K  # bytes
SHARED = 3 * PLANE + 4 * K


@tile(void, u32)
def put_keys(e, address):
    """KEY in all places, and decays of 1; address + 4 lane."""
    rest = KEY
    for p in range(3):
        rounded = as_dtype(rest, "bfloat16")
        rest -= np.float32(rounded)
        pair = [e.u32(int(rounded.view(np.uint16)) * 0x10001)]
        for i in range(0, PLANE, 4 * 32):
            e.store_shared(address, pair, p * PLANE + i)
    for i in range(0, 4 * K, 4 * 32):
        e.store_shared(address, [e.f32(1.0)], 3 * PLANE + i)


@tile(registers(K // 2))
def ones(e):
    return [e.f32(1.0)] * (K // 2)


@tile(registers(TOKENS // 2))
def values(e):
    return [e.f32(float(U))] * (TOKENS // 2)


@tile(registers(16))
def zeros(e):
    return [e.f32(0.0)] * 16


def make_put(n):
    @tile(void, registers(n), u64)
    def put(e, x, address):
        for i, number in enumerate(x):
            e.store_global(address, [number], 4 * i)

    return put


def make_update_kernel(per_channel):
    update, put_state = make_update("bf16", TOKENS, K, 3, 3, per_channel, 2 * K), make_put(K // 2)

    @kernel(32)
    def update_kernel(desc):
        base, lane = shared_address(cuda.shared.array(0, u32)), uint32(cuda.threadIdx.x)
        put_keys(uint32(base + 4 * lane))
        cuda.syncthreads()
        decays = uint32(base + 3 * PLANE)
        if per_channel:
            decays = uint32(decays + 8 * (lane & 3))
        s = ones()
        for _ in range(UPDATES):
            s = update(s, values(), uint32(base + column_lane(lane, 2 * K)), decays)
        put_state(s, uint64(desc[0]) + uint64(2 * K) * uint64(lane))

    return update_kernel


def make_gram_kernel():
    gram, put_products = make_gram("bf16", K, 3, PLANE), make_put(16)

    @kernel(32)
    def gram_kernel(desc):
        base, lane = shared_address(cuda.shared.array(0, u32)), uint32(cuda.threadIdx.x)
        put_keys(uint32(base + 4 * lane))
        cuda.syncthreads()
        keys, x = uint32(base + column_lane(lane, 2 * K)), zeros()
        for _ in range(PRODUCTS):
            x = gram(x, keys, keys, keys)
        put_products(x, uint64(desc[0]) + uint64(64) * uint64(lane))

    return gram_kernel


def run(kernel, device, numbers):
    """What every lane of a warp puts out."""
    if device == "cpu":
        pytest.skip("of the kernels for GPUs: --device sim, emu or gpu")
    out = np.zeros((32, numbers), np.float32)
    memory = Memory(out)
    desc = np.array([memory.address], np.int64)
    kernel.launch((1, 1, 1), desc, current_place("numba", "cuda:0"), SHARED)
    memory.bring_back()
    return out


@pytest.mark.parametrize("per_channel", [False, True], ids=["gda", "kda"])
def test_a_float32_state_does_not_fade(device, per_channel):
    """Without decay it goes through thousands of products, and tensor cores cut off every sum."""
    state = run(make_update_kernel(per_channel), device, K // 2)
    exact = 1 + UPDATES * TOKENS * float(U) * float(KEY)
    assert np.abs(state - exact).max() < 5e-7 * exact


def test_products_of_tokens_are_as_exact_as_float32(device):
    """Here as many channels as four heads of 256 have, so that what is cut off adds up."""
    products = run(make_gram_kernel(), device, 16)
    exact = PRODUCTS * K * float(KEY) ** 2
    assert np.abs(products - exact).max() < 5e-7 * exact
