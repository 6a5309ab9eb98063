"""solve_tril and solve_triangular."""

import itertools

import numpy as np
import pytest
from cases import DTYPES, LAYOUTS, assert_same_bits, relayout

import nbdelta
from nbdelta import naive
from nbdelta.testing import allowed_error, as_dtype, make_inputs, rel_l2

pytestmark = pytest.mark.usefixtures("device")


def gram(seed, B, T, H, BT, *, bounds=None, junk=True):
    """Strictly lower ``beta k k^T`` of each chunk, as the delta rule makes it, and junk above."""
    rng = np.random.default_rng(seed)
    call = make_inputs(seed, B, T, H, H, 24, 1, None, dtype="float64")
    A = np.full((B, T, H, BT), np.nan) if junk else np.zeros((B, T, H, BT))
    for bos, eos in zip([0], [T]) if bounds is None else itertools.pairwise(bounds):
        for first in range(bos, eos, BT):
            rows = slice(first, min(first + BT, eos))
            k, beta = call["k"][:, rows], call["beta"][:, rows]
            A[:, rows, :, : rows.stop - first] = np.einsum(
                "bihk,bjhk,bih->bihj", k, k + 0.3 * rng.standard_normal(k.shape), beta
            )
    return A


@pytest.mark.parametrize("BT", [16, 32, 64])
@pytest.mark.parametrize("T", [1, 15, 16, 17, 64, 100, 130])
def test_solve_tril(T, BT):
    A = gram(0, 2, T, 3, BT).astype(np.float32)
    Ai = nbdelta.solve_tril(A)
    reference = naive.solve_tril(np.nan_to_num(A))
    assert Ai.dtype == np.float32 and Ai.shape == A.shape
    assert rel_l2(Ai, reference) <= 1e-6
    # exact structure: zeros above, ones on the diagonal, zeros past a short last chunk
    np.testing.assert_array_equal(Ai[reference == 0.0], 0.0)
    np.testing.assert_array_equal(Ai[reference == 1.0], 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_solve_tril_dtypes(dtype):
    A = as_dtype(gram(1, 1, 100, 2, 64), dtype)
    reference = naive.solve_tril(np.nan_to_num(A.astype(np.float64)))
    Ai = nbdelta.solve_tril(A)
    assert Ai.dtype == A.dtype
    assert rel_l2(Ai, reference) <= allowed_error(reference, dtype)


@pytest.mark.parametrize("BT", [16, 64])
def test_solve_tril_packed(BT):
    bounds = np.array([0, 0, 1, 70, 70, 99, 130])
    A = gram(2, 1, 130, 2, BT, bounds=bounds).astype(np.float32)
    Ai = nbdelta.solve_tril(A, cu_seqlens=bounds)
    reference = naive.solve_tril(np.nan_to_num(A), cu_seqlens=bounds)
    assert rel_l2(Ai, reference) <= 1e-6
    for bos, eos in itertools.pairwise(bounds):
        if eos > bos:
            assert_same_bits(Ai[:, bos:eos], nbdelta.solve_tril(A[:, bos:eos]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_solve_tril_layouts(layout):
    A = gram(3, 2, 50, 3, 32).astype(np.float32)
    expected = nbdelta.solve_tril(A)
    assert_same_bits(nbdelta.solve_tril(relayout(A, layout)), expected)
    out = relayout(np.zeros_like(A), None if layout == "readonly" else layout)
    assert nbdelta.solve_tril(A, out=out) is out
    assert_same_bits(out, expected)


def test_solve_tril_repeated_keys():
    # the same key at every token and beta = 1: the inverse is bidiagonal, exactly
    A = np.tril(np.ones((64, 64), np.float32), -1).reshape(1, 64, 1, 64)
    expected = np.eye(64) - np.eye(64, k=-1)
    np.testing.assert_array_equal(nbdelta.solve_tril(A)[0, :, 0], expected)


def test_solve_tril_strong_coupling():
    # entries of the inverse reach 1e3; substitution stays accurate
    rng = np.random.default_rng(4)
    A = (1.2 * rng.uniform(-1, 1, (1, 64, 2, 64)) / 4).astype(np.float32)
    reference = naive.solve_tril(A)
    assert rel_l2(nbdelta.solve_tril(A), reference) <= 1e-5


def test_solve_tril_bad_numbers_stay_in_their_chunk_and_after_their_row():
    A = gram(5, 1, 100, 2, 32, junk=False).astype(np.float32)
    clean = nbdelta.solve_tril(A)
    A[0, 40, 1, 3] = np.nan
    Ai = nbdelta.solve_tril(A)
    assert_same_bits(Ai[:, :, 0], clean[:, :, 0])
    assert_same_bits(Ai[:, :40, 1], clean[:, :40, 1])
    assert_same_bits(Ai[:, 64:, 1], clean[:, 64:, 1])
    assert np.isnan(Ai[0, 40, 1, 3])


def triangular(seed, n, batch=(), dtype=np.float64):
    """Well-conditioned lower triangle, NaN above it."""
    rng = np.random.default_rng(seed)
    L = rng.standard_normal((*batch, n, n)) / max(1.0, 2.0 * np.sqrt(n)) + np.eye(n)
    L[..., np.triu(np.ones((n, n), bool), 1)] = np.nan
    return L.astype(dtype)


@pytest.mark.parametrize("unit_diagonal", [False, True])
@pytest.mark.parametrize("m", [1, 5, 16, 33])
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 64, 65, 100])
def test_solve_triangular(n, m, unit_diagonal):
    L = triangular(n, n, (3,), np.float32)
    b = np.random.default_rng(m).standard_normal((3, n, m)).astype(np.float32)
    x = nbdelta.solve_triangular(L, b, unit_diagonal=unit_diagonal)
    reference = naive.solve_triangular(np.tril(np.nan_to_num(L)), b, unit_diagonal=unit_diagonal)
    assert x.dtype == np.float32 and x.shape == b.shape
    assert rel_l2(x, reference, 0) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_solve_triangular_dtypes(dtype):
    L = as_dtype(triangular(0, 40, (2, 3)), dtype)
    b = as_dtype(np.random.default_rng(1).standard_normal((2, 3, 40, 7)), dtype)
    reference = naive.solve_triangular(np.tril(np.nan_to_num(L.astype(np.float64))), b)
    x = nbdelta.solve_triangular(L, b)
    assert x.dtype == b.dtype
    assert rel_l2(x, reference, 1) <= allowed_error(reference, dtype, 1)


@pytest.mark.parametrize(
    ("L_batch", "b_batch"),
    [
        ((), ()),
        ((), (4,)),
        ((4,), ()),
        ((2, 1), (3,)),
        ((1, 3), (2, 1)),
        ((2, 2, 2), (2,)),
        ((0,), ()),
    ],
    ids=str,
)
def test_solve_triangular_broadcasts(L_batch, b_batch):
    L = triangular(1, 9, L_batch, np.float32)
    b = np.random.default_rng(2).standard_normal((*b_batch, 9, 4)).astype(np.float32)
    x = nbdelta.solve_triangular(L, b)
    reference = naive.solve_triangular(np.tril(np.nan_to_num(L)), b)
    assert x.shape == reference.shape
    np.testing.assert_allclose(x, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_solve_triangular_layouts(layout):
    L = triangular(3, 20, (2,), np.float32)
    b = np.random.default_rng(3).standard_normal((2, 20, 6)).astype(np.float32)
    expected = nbdelta.solve_triangular(L, b)
    assert_same_bits(nbdelta.solve_triangular(relayout(L, layout), relayout(b, layout)), expected)
    out = relayout(np.zeros_like(b), None if layout == "readonly" else layout)
    assert nbdelta.solve_triangular(L, b, out=out) is out
    assert_same_bits(out, expected)


def test_solve_triangular_against_numpy_and_no_columns():
    L, b = triangular(4, 30), np.random.default_rng(4).standard_normal((30, 3))
    expected = np.linalg.solve(np.tril(np.nan_to_num(L)), b)
    np.testing.assert_allclose(nbdelta.solve_triangular(L, b), expected, rtol=1e-9, atol=1e-12)
    assert nbdelta.solve_triangular(L, b[:, :0]).shape == (30, 0)


def test_solve_triangular_bad_numbers_stay_in_their_column_and_below():
    L = triangular(5, 40, (2,), np.float32)
    b = np.random.default_rng(5).standard_normal((2, 40, 6)).astype(np.float32)
    clean = nbdelta.solve_triangular(L, b)
    b[1, 20, 2] = np.nan
    x = nbdelta.solve_triangular(L, b)
    touched = np.zeros(b.shape, bool)
    touched[1, 20:, 2] = True
    assert_same_bits(x[~touched], clean[~touched])
    assert np.isnan(x[touched]).all()


def test_inputs_are_not_changed():
    L = triangular(6, 20, (2,), np.float32)
    b = np.random.default_rng(6).standard_normal((2, 20, 6)).astype(np.float32)
    A = gram(6, 1, 20, 1, 16).astype(np.float32)
    before = [x.copy() for x in (L, b, A)]
    nbdelta.solve_triangular(L, b)
    nbdelta.solve_tril(A)
    for x, y in zip((L, b, A), before, strict=True):
        assert_same_bits(x, y)
