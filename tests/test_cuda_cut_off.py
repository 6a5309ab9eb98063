"""Whole calls in float32 on tensor cores, which cut off sums where others round them.

Without decay a state goes through all tokens of a sequence, with what was cut off of it. Bounds are
below what any of the products leaves if it has no sum of its own.
"""

import numpy as np
import pytest
from cases import alike
from test_backward import NAMES, reference

from nbdelta import naive
from nbdelta.testing import make_inputs, rel_l2

pytestmark = pytest.mark.usefixtures("sums_cut_off")
# relative L2 by beta; with beta = 2 no error is ever forgotten
BOUNDS = {1.0: 5e-7, 2.0: 2.5e-6}
GRADIENTS = 1.5e-6


@pytest.fixture
def sums_cut_off(device, monkeypatch):
    if device in ("cpu", "sim"):
        pytest.skip("of tensor cores, and many tokens: --device emu or gpu")
    if device == "emu":
        import cut_off

        cut_off.install(monkeypatch)


def call_without_decay(gate, K, beta, T=512, V=32):
    call = make_inputs(0, 1, T, 1, 1, K, V, gate, log_decay=0.0, states=1)
    return {**call, "beta": np.full_like(call["beta"], beta)}


def errors(call):
    import nbdelta  # as the fixture `device` has it now

    results = nbdelta.chunk_gated_delta_rule(**call, output_final_state=True)
    reference = naive.gated_delta_rule(**call, output_final_state=True)
    return [rel_l2(x, ref, axis) for x, ref, axis in zip(results, reference, (2, 1))]


def test_sums_are_those_of_the_simulator(device):
    """Bit for bit, whatever the factors and the sum before them are."""
    if device != "emu":
        pytest.skip("of the emulator's products: --device emu")
    from numba import cuda

    from nbdelta.cuda import _lanes
    from nbdelta.cuda._ptx import tile
    from nbdelta.cuda._tile_functions import registers, u32

    @tile(registers(4), registers(4), registers(4, u32), registers(2, u32))
    def product(e, acc, a, b):
        return e.mma("bf16", acc, a, b)

    @cuda.jit
    def kernel(acc, a, b):
        i = cuda.blockIdx.x, cuda.threadIdx.x
        x, y, z = acc[i], a[i], b[i]
        x = product((x[0], x[1], x[2], x[3]), (y[0], y[1], y[2], y[3]), (z[0], z[1]))
        for j in range(4):
            acc[i][j] = x[j]

    rng, trials = np.random.default_rng(0), 100

    def numbers(count, exponents):
        shape = trials, 32, count
        x = rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 12, shape)
        x[np.arange(4), np.arange(4), 1] = np.inf, -np.inf, np.nan, 0
        return (x * 2.0 ** exponents[:, None, None]).astype(np.float32)

    # half of them far from 1
    exponents = rng.integers(-60, 60, (2, trials)) * (np.arange(trials) % 2)
    acc = numbers(4, exponents.sum(0))
    factors = [numbers(n, x) for n, x in zip((8, 4), exponents)]
    factors[0][4], acc[4] = 0, 0
    # pairs of bfloat16
    a, b = [(x.view(np.uint32) >> 16).astype(np.uint16).view(np.uint32) for x in factors]
    expected = [_lanes._multiply("bf16", list(zip(*x))) for x in zip(a, b, acc.copy())]
    kernel[trials, 32](acc, a, b)
    np.testing.assert_array_equal(acc, np.array(expected, np.float32))
    assert np.isfinite(acc).mean() > 0.9


@pytest.mark.parametrize("beta", BOUNDS)
@pytest.mark.parametrize(("gate", "K"), [("gda", 128), ("gda", 256), ("kda", 64)])
def test_forward(gate, K, beta):
    call = call_without_decay(gate, K, beta)
    assert max(errors({**call, "k": alike(call["k"])})) < BOUNDS[beta]


def test_forward_of_thousands_of_tokens():
    """The bound is that of any call in float32; V is as large as the emulator is given."""
    assert max(errors(call_without_decay("kda", 64, 2.0, T=4096, V=20))) < 1e-5


def test_backward():
    import nbdelta

    call, rng = call_without_decay("gda", 64, 1.0), np.random.default_rng(1)
    call["k"] = alike(call["k"])
    for name, like in (("do", "v"), ("dht", "initial_state")):
        call[name] = rng.standard_normal(call[like].shape).astype(np.float32)
    expected = reference(call)
    for name, x in zip(NAMES, nbdelta.chunk_gated_delta_rule_bwd(**call)):
        error = rel_l2(x, expected[name], 1 if name == "initial_state" else 2)
        assert error < GRADIENTS, name
