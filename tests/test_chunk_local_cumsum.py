import numpy as np
import pytest
from cases import DTYPES, LAYOUTS, assert_same_bits, relayout

import nbdelta
from nbdelta import naive
from nbdelta.testing import as_dtype

pytestmark = pytest.mark.usefixtures("device")


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_cumsum(y, x, chunk_size, **options):
    reference = naive.chunk_local_cumsum(x, chunk_size, **options)
    assert y.shape == x.shape
    # each sum is bounded by its rounding errors: terms times their absolute sum
    size = naive.chunk_local_cumsum(np.abs(x.astype(np.float64)), chunk_size, **options)
    epsilon = np.finfo(y.dtype).eps
    assert (np.abs(y - reference) <= 2 * epsilon * np.sqrt(chunk_size) * np.abs(size)).all()


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("chunk_size", [1, 3, 16, 64, 100])
@pytest.mark.parametrize("T", [0, 1, 15, 64, 65, 200])
def test_lengths(T, chunk_size, reverse):
    x = random(2, T, 3)
    y = nbdelta.chunk_local_cumsum(x, chunk_size, reverse=reverse)
    assert y.dtype == np.float32
    assert_cumsum(y, x, chunk_size, reverse=reverse)


@pytest.mark.parametrize("axis", range(-4, 4))
def test_any_axis(axis):
    x = random(3, 20, 5, 7)
    y = nbdelta.chunk_local_cumsum(x, 4, axis=axis, scale=-1.5)
    assert_cumsum(y, x, 4, axis=axis, scale=-1.5)


@pytest.mark.parametrize("shape", [(37,), (37, 2), (2, 3, 4, 5, 6)])
def test_any_number_of_axes(shape):
    x = random(*shape)
    assert_cumsum(nbdelta.chunk_local_cumsum(x, 4, axis=0), x, 4, axis=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    x = as_dtype(random(2, 70, 3), dtype)
    y = nbdelta.chunk_local_cumsum(x, 64)
    assert y.dtype == np.float32
    assert_cumsum(y, x, 64)


def test_float64_out():
    x = random(2, 70, 3).astype(np.float64)
    out = np.full(x.shape, np.nan)
    assert nbdelta.chunk_local_cumsum(x, 64, out=out) is out
    assert_cumsum(out, x, 64)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, reverse):
    x = random(2, 70, 3, 5)
    y = nbdelta.chunk_local_cumsum(relayout(x, layout), 16, reverse=reverse)
    assert_same_bits(y, nbdelta.chunk_local_cumsum(x, 16, reverse=reverse))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("lanes", [1, 5, 15, 16, 17, 47, 127, 130])
def test_lanes(lanes, reverse):
    # dense rows of few lanes are summed from copies of several steps
    x = random(2, 290, lanes)
    y = nbdelta.chunk_local_cumsum(x, 140, reverse=reverse)
    assert_cumsum(y, x, 140, reverse=reverse)
    assert_same_bits(y, nbdelta.chunk_local_cumsum(relayout(x, "transposed"), 140, reverse=reverse))
    # in place the numbers around a chunk are at stake
    nbdelta.chunk_local_cumsum(x, 140, reverse=reverse, out=x)
    assert_same_bits(x, y)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("lanes", [5, 24, 32])
def test_large_results(lanes, reverse, device):
    if device != "cpu":
        pytest.skip("only the CPU writes large results in another way")
    x = random(1, (9 << 20) // (4 * lanes), lanes)
    y = nbdelta.chunk_local_cumsum(x, 64, reverse=reverse)
    assert_cumsum(y, x, 64, reverse=reverse)


def test_broadcast_input():
    x = np.broadcast_to(np.float32(0.25), (2, 10, 3))
    assert_cumsum(nbdelta.chunk_local_cumsum(x, 4), x, 4)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_packed(reverse):
    x = random(1, 100, 3, 5)
    bounds = np.array([0, 0, 1, 40, 40, 99, 100])
    y = nbdelta.chunk_local_cumsum(x, 16, reverse=reverse, cu_seqlens=bounds)
    assert_cumsum(y, x, 16, reverse=reverse, cu_seqlens=bounds)


def test_packed_along_another_axis():
    x = random(4, 3, 30)
    bounds = np.array([0, 11, 30], np.int32)
    y = nbdelta.chunk_local_cumsum(x, 8, axis=-1, cu_seqlens=bounds)
    assert_cumsum(y, x, 8, axis=-1, cu_seqlens=bounds)


def test_reverse_is_a_true_suffix_sum():
    # total minus prefix would lose the small tail
    x = np.concatenate([np.full(32, 1e8), np.ones(32)]).astype(np.float32)
    y = nbdelta.chunk_local_cumsum(x, 64, axis=0, reverse=True)
    np.testing.assert_array_equal(y[32:], np.arange(32, 0, -1))


def test_in_place():
    x = random(2, 70, 3)
    expected = nbdelta.chunk_local_cumsum(x, 16, reverse=True)
    assert nbdelta.chunk_local_cumsum(x, 16, reverse=True, out=x) is x
    assert_same_bits(x, expected)


@pytest.mark.parametrize("layout", ["transposed", "reversed", "padded"])
def test_out(layout):
    x = random(2, 70, 3)
    out = relayout(np.zeros_like(x), layout)
    nbdelta.chunk_local_cumsum(x, 16, out=out)
    assert_same_bits(out, nbdelta.chunk_local_cumsum(x, 16))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_bad_numbers_stay_in_their_row_and_chunk(reverse):
    x = random(2, 40, 3)
    clean = nbdelta.chunk_local_cumsum(x, 16, reverse=reverse)
    x[1, 20, 1] = -np.inf
    x[0, 5, 2] = np.nan
    y = nbdelta.chunk_local_cumsum(x, 16, reverse=reverse)
    bad = np.zeros(x.shape, bool)
    bad[1, slice(16, 21) if reverse else slice(20, 32), 1] = True
    bad[0, slice(0, 6) if reverse else slice(5, 16), 2] = True
    np.testing.assert_array_equal(np.isfinite(y), ~bad)
    assert_same_bits(y[~bad], clean[~bad])
    assert (y[1, 16 if reverse else 20, 1]) == -np.inf


def test_input_is_not_changed():
    x = random(2, 40, 3)
    before = x.copy()
    nbdelta.chunk_local_cumsum(x, 16)
    assert_same_bits(x, before)
