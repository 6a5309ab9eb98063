"""The mode of rounding that kernels run in, and that the one of the caller stays as it was."""

import ctypes
import platform
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cases import GATES, assert_same_bits
from numba import types

import nbdelta
from nbdelta.cpu import _atomic as atomic
from nbdelta.cpu import _team
from nbdelta.cpu._call import LENGTH
from nbdelta.cpu._float_mode import FLUSHING, begin_flushing, end_flushing
from nbdelta.cpu._jit import kernel
from nbdelta.testing import make_inputs

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc",
    reason="modes are those of x86-64, and read by a function of glibc",
)
# to nearest; what torch.set_flush_denormal sets; downwards, exceptions being recorded
PLAIN, TORCHS, DOWNWARDS, RECORDED = 0x1F80, 0x9FC0, 0x3F80, 0x3F
MODES = pytest.mark.parametrize("mode", [PLAIN, TORCHS, DOWNWARDS], ids=hex)
MODE_FIELD = 7  # of the environment: 28 bytes of older instructions' state, then MXCSR


def read_mode():
    environment = (ctypes.c_uint32 * 8)()
    assert ctypes.CDLL("libm.so.6").fegetenv(environment) == 0
    return environment[MODE_FIELD]


def write_mode(mode):
    environment = (ctypes.c_uint32 * 8)()
    library = ctypes.CDLL("libm.so.6")
    assert library.fegetenv(environment) == 0
    environment[MODE_FIELD] = mode
    assert library.fesetenv(environment) == 0


@pytest.fixture
def set_mode():
    before = read_mode()
    yield write_mode
    write_mode(before)


def calls(gate):
    """Every function, with denormals among the inputs and the results."""
    call = make_inputs(0, 2, 150, 2, 4, 40, 24, gate, log_decay=-1.0, states=2)
    call["v"][:, ::3] *= np.float32(1e-39)
    call["q"][:, ::5] *= np.float32(1e-39)
    # the default is computed by Python, in the caller's mode
    call["scale"] = 0.25
    step = make_inputs(0, 2, 1, 2, 4, 32, 32, gate, states=2)
    step["initial_state"] *= np.float32(1e-38)
    step["scale"] = 0.25
    gradients = {"do": call["v"], "dht": call["initial_state"]}
    x = call["v"]
    L = np.eye(24, dtype=np.float32) + np.tril(call["initial_state"][0, 0, :24] * 1e-38, -1)
    return [
        lambda: nbdelta.chunk_gated_delta_rule(**call, output_final_state=True),
        lambda: nbdelta.fused_recurrent_gated_delta_rule(**call, output_final_state=True),
        lambda: nbdelta.fused_recurrent_gated_delta_rule(**step, output_final_state=True),
        lambda: nbdelta.chunk_gated_delta_rule_bwd(**call, **gradients),
        lambda: [nbdelta.chunk_local_cumsum(x, 16)],
        lambda: [nbdelta.fused_gate(x)],
        lambda: [nbdelta.solve_tril(x[..., :16])],
        lambda: [nbdelta.solve_triangular(L, x[0, :24, 0])],
    ]


@pytest.mark.parametrize("gate", GATES)
@MODES
def test_functions_do_not_know_the_callers_mode_and_leave_it(set_mode, mode, gate):
    for function in calls(gate):
        expected = function()
        set_mode(mode)
        results = function()
        after = read_mode()
        set_mode(PLAIN)
        assert after & ~RECORDED == mode
        for x, y in zip(results, expected, strict=True):
            assert_same_bits(x, y)


@MODES
def test_other_threads_keep_their_mode(mode):
    function = calls("gda")[0]

    def on_its_own_thread(_):
        write_mode(mode)
        function()
        return read_mode()

    with ThreadPoolExecutor(2) as pool:
        assert [m & ~RECORDED for m in pool.map(on_its_own_thread, range(4))] == [mode] * 4


def test_torchs_setting():
    torch = pytest.importorskip("torch")
    small = torch.full((64,), 1e-30)
    call = make_inputs(0, 1, 80, 1, 1, 16, 16, log_decay=-2.0)
    tensors = {name: torch.from_numpy(x) for name, x in call.items()}
    expected = nbdelta.gated_delta_rule(**call, output_final_state=True)
    for flush in (True, False):
        torch.set_flush_denormal(flush)
        try:
            results = nbdelta.gated_delta_rule(**tensors, output_final_state=True)
            assert ((small * 1e-10 == 0.0).all()) == flush
            assert (np.full(64, 1e-30, np.float32) * np.float32(1e-10) == 0.0).all() == flush
        finally:
            torch.set_flush_denormal(False)
        for x, y in zip(results, expected):
            assert_same_bits(x.numpy(), y)


# words behind a descriptor: workers that have come, those to wait for, a result, modes by worker
COME, AWAITED, RESULT, MODE_OF = range(LENGTH, LENGTH + 4)


@pytest.fixture(scope="module")
def probe():
    @kernel(LENGTH)
    def probe_kernel(desc, worker):
        """Write down the mode of this worker, and wait a while for another one."""
        mode = begin_flushing()
        end_flushing(mode)
        desc[MODE_OF + worker] = mode
        # neither exact nor normal
        desc[RESULT] = types.int64(types.float64(desc[MODE_OF + worker]) / 3e305 / 7e10)
        atomic.add(desc, COME, 1)
        rounds = 0
        while atomic.get(desc, COME) < desc[AWAITED] and rounds < 10**8:
            rounds += 1
            atomic.pause()

    return probe_kernel


@pytest.mark.parametrize("mode", [PLAIN, TORCHS, DOWNWARDS | RECORDED], ids=hex)
def test_a_kernel_leaves_every_bit(probe, set_mode, mode):
    desc = np.zeros(MODE_OF + 2, np.int64)
    address = desc.ctypes.data
    set_mode(mode)
    probe(address, 0)
    after = read_mode()
    set_mode(PLAIN)
    assert after == mode
    assert desc[MODE_OF] == FLUSHING


def test_helpers_flush_too(probe, set_mode):
    for _ in range(20):  # a busy core may bring no helper in time
        desc = np.zeros(MODE_OF + 2, np.int64)
        desc[AWAITED] = 2
        set_mode(TORCHS)
        _team.run(probe, desc, 2, 0, 2)
        after = read_mode()
        set_mode(PLAIN)
        assert after & ~RECORDED == TORCHS
        assert desc[MODE_OF] == FLUSHING
        if desc[MODE_OF + 1]:
            break
    assert desc[MODE_OF + 1] == FLUSHING
