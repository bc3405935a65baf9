"""Polar factors: orthonormal, nearest, and of smallest norm where the matrix lacks rank."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose.maths.orthogonal import polar_factor
from superpose.maths.svd import SMALL

DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-13)]
SHAPES = [(1, 1), (5, 5), (9, 4), (4, 9), (SMALL, 30), (30, SMALL), (SMALL + 1, 30), (30, SMALL + 1), (300, 200)]
DEFICIENT = [(9, 6), (6, 9), (60, 40), (SMALL + 20, 40), (40, SMALL + 20)]


def polar_by_svd(matrix, cut):
    p, s, qh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    kept = s > cut * s.max(initial=0.0)
    return p[:, kept] @ qh[kept]


def near_orthonormal(out, in_, seed=1):
    """Return unit columns that are orthonormal but for a tenth, as leading vectors of different tasks are."""
    rng = np.random.default_rng(seed)
    tall = np.linalg.qr(rng.standard_normal((max(out, in_), min(out, in_))))[0]
    matrix = tall + 0.1 * rng.standard_normal(tall.shape) / np.sqrt(max(out, in_))
    matrix = matrix if out >= in_ else matrix.T
    return torch.from_numpy(matrix / np.linalg.norm(matrix, axis=0))


def repeated_columns(out, in_, rank, seed=2):
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.standard_normal((out, rank)))[0]
    columns = rng.permutation(np.arange(in_) % rank)
    return torch.from_numpy(vectors[:, columns] * rng.choice([-1.0, 1.0], in_))


def assert_close(actual, expected, tolerance):
    assert np.abs(np.asarray(actual, float) - np.asarray(expected, float)).max(initial=0.0) <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_factor_is_that_of_the_decomposition(out, in_, dtype, tolerance):
    matrix = near_orthonormal(out, in_).to(dtype)
    factor, rank = polar_factor(matrix)
    assert rank == min(out, in_)
    assert factor.dtype == dtype
    assert_close(factor, polar_by_svd(matrix, 1e-6), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_shorter_side_is_orthonormal(out, in_, dtype, tolerance):
    factor = polar_factor(near_orthonormal(out, in_).to(dtype))[0].double()
    gram = factor.T @ factor if out >= in_ else factor @ factor.T
    assert_close(gram, np.eye(min(out, in_)), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("out", "in_"), DEFICIENT)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_lacking_rank_gives_the_factor_of_smallest_norm(rank, out, in_, dtype, tolerance):
    matrix = repeated_columns(out, in_, rank).to(dtype)
    factor, found = polar_factor(matrix)
    assert found == rank
    assert_close(factor, polar_by_svd(matrix, 1e-5), tolerance)
    assert float(factor.double().norm()) == pytest.approx(np.sqrt(rank), rel=1e-6)  # no direction beyond the rank


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("out", [SMALL - 10, SMALL + 10])
def test_factor_of_lacking_rank_stays_in_the_row_and_column_space(out, dtype, tolerance):
    matrix = repeated_columns(out, 20, 6).to(dtype)
    factor = polar_factor(matrix)[0].double().numpy()
    p, _, qh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    p, qh = p[:, :6], qh[:6]
    assert_close(p @ (p.T @ factor), factor, tolerance)
    assert_close(factor @ qh.T @ qh, factor, tolerance)


@pytest.mark.parametrize("rank", [4, 25])
def test_both_routes_of_float32_agree_where_the_size_passes_the_limit(rank):
    """Rows of zeros change no polar factor but the size, and so the route."""
    matrix = repeated_columns(SMALL, 25, rank).float()
    padded = torch.cat([matrix, torch.zeros(20, 25)])
    (small, small_rank), (large, large_rank) = polar_factor(matrix), polar_factor(padded)
    assert small_rank == large_rank == rank
    assert_close(large[:SMALL], small, 2e-7)
    assert_close(large[SMALL:], np.zeros((20, 25)), 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_transpose_has_the_transposed_factor(dtype, tolerance):
    for out, in_ in [(9, 4), (SMALL + 9, 40)]:
        matrix = near_orthonormal(out, in_).to(dtype)
        assert_close(polar_factor(matrix.T)[0].T, polar_factor(matrix)[0], tolerance)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32))
def test_repeated_vectors_have_the_rank_of_the_distinct(out, in_, distinct, seed):
    rank = min(out, in_, distinct)
    for dtype, tolerance in DTYPES:
        matrix = repeated_columns(out, in_, rank, seed).to(dtype)
        factor, found = polar_factor(matrix)
        assert found == rank
        assert_close(factor, polar_by_svd(matrix, 1e-5), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (SMALL + 2, 5), (5, SMALL + 2)])
def test_zero_matrix_has_a_zero_factor(shape, dtype):
    factor, rank = polar_factor(torch.zeros(shape, dtype=dtype))
    assert rank == 0
    assert torch.equal(factor, torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 0), (0, 6), (SMALL, 0), (SMALL + 1, 0), (0, SMALL + 1)])
def test_no_columns_have_no_factor(shape, dtype):
    factor, rank = polar_factor(torch.zeros(shape, dtype=dtype))
    assert rank == 0
    assert factor.shape == shape
    assert factor.dtype == dtype


def test_input_is_not_written_to():
    matrix = near_orthonormal(12, 5)
    before = matrix.clone()
    polar_factor(matrix)
    assert torch.equal(matrix, before)
