"""Lower bounds of the time on an H100, from what the emulator counts in a few blocks.

The kernels are launched at (32, 32) heads x 128 and four blocks of each are executed. What they ask
of each unit is scaled to the grid and divided by what the unit does in a second; no latency is
in it. ``pytest --device emu tests/test_cuda_profile.py -s`` prints the table of
docs/performance.md.
"""

import ml_dtypes
import numpy as np
import pytest

from nbdelta import ops

HEADS, K, V = 32, 128, 128
BLOCKS = 4  # of a scan or a decode step: all columns of a value head
# prefill, measured on the first quarter of its tokens: everything is proportional to them
T, QUARTERS = 8192, 4
BANDWIDTH = 3.35e12  # bytes per second
# seconds of a prefill, and of a backward pass of GDA at the same shape
PREFILL = {
    ("gda", "bfloat16"): 0.25e-3,
    ("kda", "bfloat16"): 0.40e-3,
    ("gda", "float32"): 0.9e-3,
    ("kda", "float32"): 1.3e-3,
}
BACKWARD = {"bfloat16": 4.3e-3, "float32": 4.8e-3}
# those of the table; of the others, integer arithmetic comes near them
UNITS = {
    "shared memory": "shared memory",
    "L2": "L2",
    "HBM": "HBM",
    "issue": "instruction issue",
    "tensor (mma.sync)": "tensor cores",
}


@pytest.fixture
def emulator(device, monkeypatch):
    if device != "emu":
        pytest.skip("the emulator counts: --device emu")
    from ptxemu import host

    for name, value in (("profile", True), ("check", False), ("blocks", (0, BLOCKS))):
        monkeypatch.setitem(host._state.options, name, value)
    results = []
    monkeypatch.setattr(host._state, "on_launch", lambda *launch: results.append(launch))
    return results


def inputs(B, T, gate, dtype="bfloat16"):
    """Arrays on the device; what is in them does not show in the counts."""
    from numba import cuda

    def array(*shape, dtype=np.float32):
        return cuda.device_array(shape, np.dtype(dtype))

    dtype = getattr(ml_dtypes, dtype, dtype)
    q, k = (array(B, T, HEADS, K, dtype=dtype) for _ in range(2))
    v = array(B, T, HEADS, V, dtype=dtype)
    g = array(B, T, HEADS, *[K] * (gate == "kda"))
    return {"q": q, "k": k, "v": v, "g": g, "beta": array(B, T, HEADS)}


def profiles(emulator):
    """Profiles of the launches so far, by the name of the kernel."""
    return {name: result.profile for name, _, _, result in emulator}


def assert_no_conflicts(profile):
    shared = [(x["wavefronts"], x["ideal_wavefronts"]) for x in profile.memory.values()]
    sectors = [(x["sectors"], x["ideal_sectors"]) for x in profile.memory.values()]
    for counts in (shared, sectors):
        found, ideal = map(sum, zip(*counts))
        assert found <= 1.1 * ideal


def bounds(profile, scale=1):
    """Seconds of every unit, at the least."""
    times = profile.times("h100")
    return {unit: scale * times[unit] for unit in UNITS}


def show(what, profile, times):
    """Print a row of the tables, and what was counted in the blocks that ran."""
    numbers = [f"{name} {1e3 * times[unit]:.3f}" for unit, name in UNITS.items()]
    print(f"\n{what}: {', '.join(numbers)} ms, largest {1e3 * max(times.values()):.3f}")
    mma = sum(count for op, count in profile.counts.items() if op.startswith("mma"))
    waves, ideal = (
        sum(x[key] for x in profile.memory.values()) for key in ("wavefronts", "ideal_wavefronts")
    )
    print(
        f"    {BLOCKS} blocks: mma {mma}, instructions {profile.machine_instructions:.0f}, "
        f"wavefronts {waves} ({ideal}), sectors {profile.sectors()}"
    )


@pytest.mark.parametrize(("gate", "dtype"), PREFILL)
def test_prefill(emulator, gate, dtype):
    call = inputs(1, T // QUARTERS, gate, dtype)
    ops.chunk_gated_delta_rule(**call, use_qk_l2norm_in_kernel=True)
    found = [(name, result.profile) for name, _, _, result in emulator]
    # numbers of q, k and v in float32 are packed into three of bfloat16 first
    packs = ["chunkpack_kernel"] * 3 if dtype == "float32" else []
    assert [name for name, _ in found] == [*packs, "chunk_intra_kernel", "chunk_scan_kernel"]
    total = 0.0
    for name, profile in found:
        assert_no_conflicts(profile)
        times = bounds(profile, QUARTERS)
        show(f"{gate} {dtype} {name}", profile, times)
        total += max(times.values())
    print(f"    all {1e3 * total:.3f} ms")
    bound = PREFILL[gate, dtype]
    assert 0.25 * bound < total <= bound


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_copies_of_tokens_side_by_side(emulator, dtype):
    """As behind the short convolution of a model."""
    from numba import cuda

    call, tokens = inputs(1, T // QUARTERS, "gda", dtype), T // QUARTERS
    for name in ("q", "k", "v"):
        memory = cuda.device_array((1, HEADS, K, tokens), call[name].dtype)
        call[name] = memory.transpose((0, 3, 1, 2))
    ops.chunk_gated_delta_rule(**call, use_qk_l2norm_in_kernel=True)
    found = [result.profile for name, _, _, result in emulator if name == "chunkturn_kernel"]
    assert len(found) == 3
    for profile in found:
        assert_no_conflicts(profile)
        times = bounds(profile, QUARTERS)
        show(f"turned {dtype}", profile, times)
        assert max(times.values()) <= 1.6 * times["HBM"]


@pytest.mark.parametrize(("gate", "dtype"), [("gda", "bfloat16"), ("gda", "float32")])
def test_backward(emulator, gate, dtype):
    """The kernels of the backward pass on a few chunks; all of them are proportional to tokens."""
    from numba import cuda

    tokens = 256
    call = {**inputs(1, tokens, gate, dtype), "use_qk_l2norm_in_kernel": True}
    states = cuda.device_array((1, HEADS, K, V), np.float32)
    ops.chunk_gated_delta_rule_bwd(**call, do=call["v"], initial_state=states)
    total = 0.0
    for name, profile in profiles(emulator).items():
        if not name.startswith("backward"):
            continue
        times = bounds(profile, T / tokens)
        show(f"{gate} {dtype} {name}", profile, times)
        total += max(times.values())
    print(f"    all {1e3 * total:.2f} ms")
    assert total <= BACKWARD[dtype]


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
@pytest.mark.parametrize("gate", ["gda", "kda"])
def test_decode(emulator, gate, state):
    from numba import cuda

    B = 64
    states = cuda.device_array((B, HEADS, K, V), np.dtype(getattr(ml_dtypes, state, state)))
    slots = cuda.to_device(np.arange(B, dtype=np.int32))
    ops.fused_recurrent_gated_delta_rule(
        **inputs(B, 1, gate),
        initial_state=states,
        state_indices=slots,
        use_qk_l2norm_in_kernel=True,
    )
    (profile,) = profiles(emulator).values()
    assert_no_conflicts(profile)
    times = bounds(profile)
    # states are read and written, and the blocks of a head each read its q, k and g
    times["HBM"] = 32 * profile.sectors() * B * HEADS / BANDWIDTH
    show(f"decode {gate} {state}", profile, times)
    ideal = 2 * B * HEADS * K * V * states.dtype.itemsize / BANDWIDTH
    print(f"    the states alone {1e3 * ideal:.3f} ms")
    assert max(times.values()) <= 1.1 * ideal
