"""Products of bfloat16 by dot products of pairs and by the matrix unit; emulated elsewhere."""

import ml_dtypes
import numpy as np
import pytest
from cases import use_unit

import nbdelta
from nbdelta import naive
from nbdelta.cpu import chunk
from nbdelta.cpu._matrix_unit import DOTS, FLOATS, SQUARES
from nbdelta.testing import make_inputs, rel_l2

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


units = pytest.mark.parametrize("unit", [DOTS, SQUARES], ids=["dots", "squares"])


def _inputs(gate, H, HV, K, V, T, decay, l2norm):
    x = make_inputs(T + K, 1, T, H, HV, K, V, gate)
    x["g"] = (x["g"] * decay).astype(np.float32)
    if not l2norm:
        for name in ("q", "k"):
            x[name] = x[name] / np.linalg.norm(x[name], axis=-1, keepdims=True)
    for name in ("q", "k", "v"):
        x[name] = x[name].astype(BFLOAT16)
    h0 = np.random.default_rng(1).standard_normal((1, HV, K, V)).astype(np.float32)
    x.update(initial_state=h0, output_final_state=True, use_qk_l2norm_in_kernel=l2norm)
    return x


def _errors(results, x):
    exact = {
        name: value.astype(np.float64) if isinstance(value, np.ndarray) else value
        for name, value in x.items()
    }
    expected = naive.gated_delta_rule(**exact)
    return rel_l2(results[0], expected[0], 2), rel_l2(results[1], expected[1], 1)


@units
@pytest.mark.parametrize("gate", ["gda", "kda"])
@pytest.mark.parametrize("l2norm", [True, False])
@pytest.mark.parametrize("decay", [0.02, 1.0, 100.0])
@pytest.mark.parametrize(
    ("H", "HV", "K", "V", "T"), [(1, 2, 128, 128, 77), (2, 2, 100, 60, 129), (1, 3, 64, 32, 16)]
)
def test_error_is_of_the_size_of_the_rounded_output(
    monkeypatch, unit, gate, l2norm, decay, H, HV, K, V, T
):
    """Within twice the error of float32 products of the same inputs, rounded to bfloat16."""
    x = _inputs(gate, H, HV, K, V, T, decay, l2norm)
    use_unit(monkeypatch, FLOATS)
    error, state_error = _errors(nbdelta.chunk_gated_delta_rule(**x), x)
    use_unit(monkeypatch, unit)
    paired_error, paired_state_error = _errors(nbdelta.chunk_gated_delta_rule(**x), x)
    assert state_error < 2e-6
    assert paired_error < 2 * error
    assert paired_state_error < 2.5e-3
    if decay < 1:
        # the words were used: where the state lives long their rounding shows
        assert paired_state_error > 1e-4


@pytest.mark.parametrize("gate", ["gda", "kda"])
def test_a_state_without_decay_gets_what_rounding_takes_of_u(monkeypatch, gate):
    """On the matrix unit; without it the errors are 2.5e-3 and more."""
    use_unit(monkeypatch, SQUARES)
    x = _inputs(gate, 2, 4, 64, 48, 513, 0.0, True)
    _, error = _errors(nbdelta.chunk_gated_delta_rule(**x), x)
    assert np.max(error) < 1.9e-3


@units
def test_highest_precision_has_no_rounded_products(monkeypatch, unit):
    x = _inputs("gda", 1, 2, 64, 64, 50, 1.0, True)
    use_unit(monkeypatch, FLOATS)
    o, state = nbdelta.chunk_gated_delta_rule(**x)
    use_unit(monkeypatch, unit)
    o_highest, state_highest = nbdelta.chunk_gated_delta_rule(**x, precision="highest")
    assert np.array_equal(o.view(np.uint16), o_highest.view(np.uint16))
    assert np.array_equal(state, state_highest)


@units
@pytest.mark.parametrize("gate", ["gda", "kda"])
def test_bitwise_promises(monkeypatch, unit, gate):
    """Later tokens, a split at 64 and a NaN of a later token change nothing before them."""
    use_unit(monkeypatch, unit)
    x = _inputs(gate, 1, 2, 64, 48, 150, 1.0, True)
    o, state = nbdelta.chunk_gated_delta_rule(**x)

    def part(a, b, h0):
        y = {n: v[:, a:b] if n in ("q", "k", "v", "g", "beta") else v for n, v in x.items()}
        return nbdelta.chunk_gated_delta_rule(**{**y, "initial_state": h0})

    first, between = part(0, 64, x["initial_state"])
    second, end = part(64, 150, between)
    assert np.array_equal(np.concatenate([first, second], 1).view(np.uint16), o.view(np.uint16))
    assert np.array_equal(end, state)
    x["v"][0, 101, 0] = np.nan
    o_nan, _ = nbdelta.chunk_gated_delta_rule(**x)
    assert np.array_equal(o_nan[:, :101].view(np.uint16), o[:, :101].view(np.uint16))
    assert np.array_equal(o_nan[:, :, 1].view(np.uint16), o[:, :, 1].view(np.uint16))
    assert np.isnan(o_nan[0, 101, 0].astype(np.float32)).all()


@units
@pytest.mark.parametrize("gate", ["gda", "kda"])
def test_states_at_checkpoints_are_those_of_a_shorter_sequence(monkeypatch, unit, gate):
    """An update that waits for the next block is made before its state is looked at."""
    use_unit(monkeypatch, unit)
    x = _inputs(gate, 1, 3, 48, 40, 110, 1.0, True)
    o, state, kept = nbdelta.chunk_gated_delta_rule(**x, checkpoint_interval=32)
    o_plain, state_plain = nbdelta.chunk_gated_delta_rule(**x)
    assert np.array_equal(o.view(np.uint16), o_plain.view(np.uint16))
    assert np.array_equal(state, state_plain)
    for i in range(3):
        y = {
            n: v[:, : 32 * (i + 1)] if n in ("q", "k", "v", "g", "beta") else v
            for n, v in x.items()
        }
        assert np.array_equal(nbdelta.chunk_gated_delta_rule(**y)[1][0], kept[i])


@units
@pytest.mark.parametrize("threads", [1, 2])
def test_heads_and_strips_of_few_heads(monkeypatch, unit, threads):
    """Strips that go their own way and grouped heads have the bits of one thread."""
    use_unit(monkeypatch, unit)
    x = _inputs("gda", 1, 2, 64, 96, 70, 1.0, True)
    monkeypatch.setattr(chunk, "thread_count", lambda: threads)
    o, state = nbdelta.chunk_gated_delta_rule(**x)
    monkeypatch.setattr(chunk, "thread_count", lambda: 1)
    o_one, state_one = nbdelta.chunk_gated_delta_rule(**x)
    assert np.array_equal(o.view(np.uint16), o_one.view(np.uint16))
    assert np.array_equal(state, state_one)
    errors = _errors((o, state), x)
    assert errors[0] < 5e-3
    assert errors[1] < 5e-3
