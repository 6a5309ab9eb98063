"""What a decode step asks of a GPU's memory, counted by the emulator: states once in, once out."""

import ml_dtypes
import numpy as np
import pytest

from nbdelta import ops
from nbdelta.testing import make_inputs

B, HV, K, V = 2, 2, 128, 128
BLOCKS = B * HV * V // 32


def profile_of(monkeypatch, gate, state, v_first):
    """Profile of a pooled step on states of a dtype and layout."""
    from ptxemu import host

    from nbdelta.cuda._arrays import send

    emulator = host._state
    call = make_inputs(0, B, 1, 1, HV, K, V, gate, dtype="bfloat16")
    arrays = {name: send(x) for name, x in call.items()}
    shape = (B, HV, V, K) if v_first else (B, HV, K, V)
    dtype = ml_dtypes.bfloat16 if state == "bfloat16" else state
    monkeypatch.setitem(emulator.options, "profile", True)
    ops.fused_recurrent_gated_delta_rule(
        **arrays,
        initial_state=send(np.zeros(shape, dtype)),
        state_indices=send(np.arange(B, dtype=np.int32)),
        use_qk_l2norm_in_kernel=True,
        state_v_first=v_first,
    )
    return emulator.last.profile


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("state", ["float32", "bfloat16"])
@pytest.mark.parametrize("gate", ["gda", "kda"])
def test_memory_of_a_decode_step(device, monkeypatch, gate, state, v_first):
    if device != "emu":
        pytest.skip("the emulator counts: --device emu")
    profile = profile_of(monkeypatch, gate, state, v_first)
    states = B * HV * K * V * (4 if state == "float32" else 2)
    for access in ("ld.global", "st.global"):
        counts = profile.memory[access]
        assert counts["sectors"] <= 1.1 * counts["ideal_sectors"]
        # the blocks of a head, of which each has a part of the columns, read k, q and g again
        assert states <= 32 * counts["sectors"] <= 1.2 * states
    shared = [profile.memory[access] for access in ("ld.shared", "st.shared")]
    conflicts = sum(x["wavefronts"] - x["ideal_wavefronts"] for x in shared)
    if state == "float32":
        assert conflicts <= 0.1 * sum(x["ideal_wavefronts"] for x in shared)
        # a full H100: on each multiprocessor a block at a time, its state read and written
        times = profile.times("h100")
        memory = 132 * 2 * states / BLOCKS / 3.35e12
        assert max(t for unit, t in times.items() if unit not in ("HBM", "L2")) <= 1.1 * memory
