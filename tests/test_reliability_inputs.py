"""Hostile inputs of all functions: every case in a process of its own."""

import textwrap
from pathlib import Path

import pytest
from processes import finish, start

CALLS = """
import numpy as np, nbdelta
from cases import LAYOUTS, relayout, repeat
from nbdelta.testing import as_dtype, make_inputs

def calls(dtype):
    # of every public function: its name, its arrays, what else it takes
    rng = np.random.default_rng(0)
    def normal(*shape, size=1.0):
        return as_dtype(rng.standard_normal(shape) * size, dtype)
    for gate, names in (
        ("gda", ("gated_delta_rule", "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")),
        ("kda", ("chunk_kda", "fused_recurrent_kda")),
    ):
        arrays = make_inputs(1, 3, 37, 2, 4, 20, 18, gate, dtype=dtype, states=3)
        for name in names:
            yield name, arrays, {"output_final_state": True}
        gradients = {"do": normal(3, 37, 4, 18), "dht": normal(3, 4, 20, 18)}
        yield "chunk_gated_delta_rule_bwd", arrays | gradients, {}
    step = make_inputs(2, 3, 1, 2, 4, 32, 32, "gda", dtype=dtype, states=3)
    yield "fused_recurrent_gated_delta_rule", step, {"output_final_state": True}
    yield "chunk_local_cumsum", {"x": normal(3, 37, 4)}, {"chunk_size": 16}
    yield "solve_tril", {"A": normal(3, 37, 4, 16, size=0.1)}, {}
    L = as_dtype(np.tril(rng.standard_normal((3, 20, 20))) / 8 + 2 * np.eye(20), dtype)
    yield "solve_triangular", {"L": L, "b": normal(3, 20, 9)}, {}
    yield "fused_gate", {"x": normal(3, 37, 4, 18)}, {"lower_bound": -5.0}

def results(name, arrays, options):
    found = getattr(nbdelta, name)(**arrays, **options)
    found = found if isinstance(found, tuple) else (found,)
    return [np.ascontiguousarray(x) for x in found if x is not None]

def same(found, expected):
    return all(x.tobytes() == y.tobytes() for x, y in zip(found, expected, strict=True))

assert {name for name, _, _ in calls("float32")} == set(nbdelta.__all__)
"""
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])


def run_here(code, dtype):
    run_long(f"dtype = {dtype!r}\n" + CALLS + textwrap.dedent(code))


def run_long(code):
    """Kernels of all kinds are compiled, where the cache has none of them."""
    finish(start(code, cwd=Path(__file__).parent), timeout=900)


def test_what_hypothesis_tries():
    """A few examples of every property of the other files."""
    code = """
        import cases
        from hypothesis import HealthCheck, settings
        from nbdelta.dispatch import stage
        import test_properties, test_properties_backward

        cases.multiplies_halves = stage("chunk", "cpu").multiplies_halves
        slow = [HealthCheck.too_slow]
        few = settings(
            max_examples=12, derandomize=True, deadline=None, suppress_health_check=slow
        )
        properties = [
            x
            for module in (test_properties, test_properties_backward)
            for name, x in vars(module).items()
            if name.startswith("test_")
        ]
        assert len(properties) >= 7
        for test in properties:
            few(test)()
        """
    run_long(code)


@every_dtype
def test_strides(dtype):
    """Negative ones, those of 0, Fortran order: the bits of contiguous copies, array by array."""
    run_here(
        """
        for name, arrays, options in calls(dtype):
            expected = results(name, arrays, options)
            for which, x in arrays.items():
                for layout in LAYOUTS:
                    changed = arrays | {which: relayout(x, layout)}
                    assert same(results(name, changed, options), expected), (name, which, layout)
                for axis in range(x.ndim):
                    view = repeat(x, axis)
                    assert view.strides[axis] == 0 or x.shape[axis] == 1
                    found, alone = (
                        results(name, arrays | {which: y}, options) for y in (view, view.copy())
                    )
                    assert same(found, alone), (name, which, axis)
        """,
        dtype,
    )


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_swapped_bytes_are_refused(dtype):
    run_here(
        """
        for name, arrays, options in calls(dtype):
            for which, x in arrays.items():
                swapped = x.astype(x.dtype.newbyteorder())
                before = swapped.tobytes()
                try:
                    results(name, arrays | {which: swapped}, options)
                except TypeError as error:
                    assert str(error).startswith(f"{which}: byte-swapped"), (name, error)
                else:
                    raise AssertionError((name, which))
                assert swapped.tobytes() == before
        """,
        dtype,
    )


@every_dtype
def test_numbers_of_any_size(dtype):
    """One in the first sequence: the bits of the others stay, NaN and infinities do not vanish."""
    run_here(
        """
        for name, arrays, options in calls(dtype):
            expected = results(name, arrays, options)
            for which, x in arrays.items():
                place = tuple(min(i, n - 1) for i, n in zip((0, 5, 1, 0), x.shape))
                for value in (np.nan, np.inf, -np.inf, 1e-310, 1e-40, -1e-7, 6e4, -3e38, 1e300):
                    changed = x.copy()
                    changed[place] = as_dtype(value, x.dtype)
                    found = results(name, arrays | {which: changed}, options)
                    for y, ref in zip(found, expected):
                        assert y[1:].tobytes() == ref[1:].tobytes(), (name, which, value)
                    # a gate of minus infinity is a reset
                    if np.isnan(value) or (np.isinf(value) and which not in ("g", "x")):
                        bad = [~np.isfinite(y[0].astype(float)) for y in found]
                        assert any(y.any() for y in bad), (name, which, value)
                    # and all of them of that size
                    everywhere = np.full_like(x, as_dtype(value, x.dtype))
                    results(name, arrays | {which: everywhere}, options)
        """,
        dtype,
    )
