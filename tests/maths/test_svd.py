"""Singular features: orthonormal, exact, and no more of them than the numerical rank."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose.maths import svd
from superpose.maths.svd import (
    Features,
    _add_up_columns,
    _by_double_gram,
    _by_single_gram,
    _is_flat,
    leading,
    leading_by_energy,
    leading_svd,
    numerical_rank,
    svd_of_product,
    thin_svd,
    without_ends,
)

DTYPES = [torch.float32, torch.float64]
SHAPES = [(1, 1), (1, 9), (9, 1), (12, 12), (40, 7), (7, 40), (64, 50), (90, 96)]
SMALLEST = {torch.float32: 1e-5, torch.float64: 1e-12}


def orthonormal(rng, rows, columns):
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def matrix_with(rng, shape, s):
    """Return a float64 matrix with these singular values."""
    return (orthonormal(rng, shape[0], len(s)) * s) @ orthonormal(rng, shape[1], len(s)).T


def assert_decomposes(features, matrix, tolerance):
    """Assert orthonormal directions, ordered strengths as in NumPy's decomposition, and the product."""
    u, s, vh = (part.double().numpy() for part in (features.u, features.s, features.vh))
    exact = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    assert np.abs(u.T @ u - np.eye(len(s))).max() < tolerance
    assert np.abs(vh @ vh.T - np.eye(len(s))).max() < tolerance
    assert (np.diff(s) <= 0).all()
    assert np.abs(s - exact[: len(s)]).max() <= tolerance * exact[0]
    assert np.abs((u * s) @ vh - matrix.double().numpy()).max() <= tolerance * exact[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_random_matrices_are_decomposed(shape, dtype):
    matrix = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    features = thin_svd(matrix)
    assert features.count == min(shape)
    assert {features.u.dtype, features.s.dtype, features.vh.dtype} == {dtype}
    assert_decomposes(features, matrix, 2e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(60, 25), (25, 60), (40, 40)])
def test_strengths_spread_over_the_usable_range_are_decomposed(shape, dtype):
    s = np.geomspace(1, SMALLEST[dtype], min(shape))
    matrix = torch.from_numpy(matrix_with(np.random.default_rng(2), shape, s)).to(dtype)
    features = thin_svd(matrix)
    assert features.count == min(shape)
    assert_decomposes(features, matrix, 5e-6 if dtype == torch.float32 else 1e-13)
    exact = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    error = np.abs(features.s.double().numpy() / exact - 1).max()  # of each strength, also the weakest
    assert error < (1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_weakest_features_above_the_cut_are_accurate_in_float32(size):
    s = np.geomspace(1, 2 * size * torch.finfo(torch.float32).eps, size)
    matrix = torch.from_numpy(matrix_with(np.random.default_rng(size), (size, size), s)).float()
    features = thin_svd(matrix)
    assert features.count == size
    exact = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    assert np.abs(features.s.double().numpy() / exact - 1).max() < 5e-6
    assert_decomposes(features, matrix, 5e-6)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_rank_deficient_matrices_have_no_more_features_than_rank(out, in_, data):
    rank = data.draw(st.integers(1, min(out, in_)))
    dtype = data.draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    matrix = torch.from_numpy(matrix_with(rng, (out, in_), np.geomspace(1, 0.1, rank))).to(dtype)
    features = thin_svd(matrix)
    assert features.count == rank
    assert_decomposes(features, matrix, 2e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1e9, 1e18])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rank_does_not_depend_on_scale(scale, dtype):
    matrix = torch.from_numpy(scale * matrix_with(np.random.default_rng(3), (20, 15), np.ones(4))).to(dtype)
    assert thin_svd(matrix).count == 4


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_matrix_has_no_features(shape):
    features = thin_svd(torch.zeros(shape))
    assert features.count == 0
    assert features.u.shape == (shape[0], 0)
    assert features.vh.shape == (0, shape[1])
    assert torch.equal(features.matrix(), torch.zeros(shape))


@pytest.mark.parametrize(
    ("dtype", "size", "factor"),
    [(torch.float64, 50, 50), (torch.float32, 50, 16), (torch.float32, 5, 5), (torch.float32, 4096, 16)],
)
def test_rank_counts_what_exceeds_the_rounding_of_the_largest(dtype, size, factor):
    """In float64 size * eps, what a decomposition leaves; in float32 at most 16 eps, what rounding entries moves."""
    eps = torch.finfo(dtype).eps
    s = torch.tensor([2.0, 1.0, 2 * 1.01 * factor * eps, 2 * 0.99 * factor * eps, 0.0], dtype=dtype)
    assert numerical_rank(s, size, dtype) == 3
    assert numerical_rank(s[4:], size, dtype) == 0
    assert numerical_rank(s[:0], size, dtype) == 0


def test_weak_features_of_a_large_matrix_are_no_rounding_noise():
    """Rounding to float32 moves singular values by less than an eps of the largest, however large the matrix."""
    exact = np.random.default_rng(7).standard_normal((300, 20)) @ np.random.default_rng(8).standard_normal((20, 400))
    s = np.linalg.svd(exact.astype(np.float32).astype(np.float64), compute_uv=False)
    assert s[20] < np.finfo(np.float32).eps * s[0]
    assert thin_svd(torch.from_numpy(exact).float()).count == 20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "inner", "in_"), [(40, 3, 30), (30, 8, 41), (5, 9, 30), (30, 9, 4), (6, 1, 6)])
def test_product_is_decomposed_as_its_dense_matrix(out, inner, in_, dtype):
    generator = torch.Generator().manual_seed(4)
    left = torch.randn(out, inner, dtype=dtype, generator=generator)
    right = torch.randn(inner, in_, dtype=dtype, generator=generator)
    features = svd_of_product(left, right)
    assert features.count == min(out, inner, in_)
    assert features.s.dtype == dtype
    assert_decomposes(features, left.double() @ right.double(), 5e-6 if dtype == torch.float32 else 1e-13)


def test_product_of_dependent_factors_has_the_rank_of_the_product():
    left = torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    right = torch.tensor([[1.0, 0.0, 3.0, 1.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    features = svd_of_product(left, right)
    assert features.count == 1
    assert_decomposes(features, left @ right, 1e-14)
    assert svd_of_product(left, torch.zeros(2, 4, dtype=torch.float64)).count == 0


def test_rank_of_a_product_is_judged_by_the_size_of_the_product():
    """The second singular value is above 2 eps, the cut of the 2 x 2 core, and below 400 eps."""
    rng, eps = np.random.default_rng(5), torch.finfo(torch.float64).eps
    left = torch.from_numpy(orthonormal(rng, 400, 2))
    right = torch.from_numpy(np.diag([1.0, 100 * eps]) @ orthonormal(rng, 300, 2).T)
    assert svd_of_product(left, right).count == 1


def four_features():
    return thin_svd(torch.diag(torch.tensor([4.0, 2.0, 2.0 * 0.75, 0.5], dtype=torch.float64)))


@pytest.mark.parametrize(("rank", "count"), [(None, 4), (1, 1), (3, 3), (4, 4), (9, 4)])
def test_leading_keeps_at_most_rank_features(rank, count):
    features = leading(four_features(), rank, 1.0)
    assert features.s.tolist() == [4.0, 2.0, 1.5, 0.5][:count]


@pytest.mark.parametrize(("energy", "count"), [(0.0, 1), (0.5, 1), (0.8, 2), (0.9, 3), (0.98, 3), (0.995, 4), (1.0, 4)])
def test_leading_keeps_the_fewest_features_that_hold_the_energy(energy, count):
    """Squares 16, 4, 2.25, 0.25 of 22.5: shares 0.711, 0.889, 0.989, 1."""
    assert leading(four_features(), None, energy).count == count
    assert leading(four_features(), 2, energy).count == min(2, count)


def test_removing_the_ends_removes_by_number_and_rounds_down():
    features = four_features()
    assert without_ends(features, 0.5, 0.0).s.tolist() == [4.0, 2.0]
    assert without_ends(features, 0.0, 0.49).s.tolist() == [2.0, 1.5, 0.5]
    assert without_ends(features, 0.25, 0.25).s.tolist() == [2.0, 1.5]
    assert without_ends(features, 0.75, 0.75).count == 0
    assert without_ends(features, 1.0, 0.0).count == 0
    assert without_ends(features, 0.0, 1.0).count == 0


def test_removing_the_ends_counts_exactly():
    """0.29 of 100 is 29, although the product in binary is 28.999999999999996."""
    for count in (1, 7, 20, 100):
        features = Features(torch.zeros(1, count), torch.zeros(count), torch.zeros(count, 1))
        for percent in range(101):
            left = count - percent * count // 100
            assert without_ends(features, percent / 100, 0.0).count == left
            assert without_ends(features, 0.0, percent / 100).count == left


def test_features_add_up_to_their_matrix():
    matrix = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    features = thin_svd(matrix)
    torch.testing.assert_close(features.matrix(), matrix)
    torch.testing.assert_close(features.take(0, 2).matrix() + features.take(2, 5).matrix(), matrix)


# Matrices beyond the size up to which LAPACK's decomposition is used.


def spread(kind, shape, seed=0):
    """Return a float32 matrix whose singular values lie close together, fall off, or sink to nothing."""
    rng, size = np.random.default_rng(seed), min(shape)
    s = {
        "flat": lambda: np.linalg.svd(rng.standard_normal(shape), compute_uv=False),
        "decaying": lambda: 1 / np.arange(1, size + 1),
        "steep": lambda: np.geomspace(1, 1e-5, size),
        "spiky": lambda: np.r_[np.geomspace(40, 4, 8), np.linspace(1, 0.01, size - 8)],
        "gap": lambda: np.r_[np.linspace(1, 0.7, size // 2), np.linspace(2e-3, 5e-6, size - size // 2)],
        "singular": lambda: np.r_[np.linspace(1, 0.5, size - 40), np.zeros(40)],
    }[kind]()
    return torch.from_numpy(matrix_with(rng, shape, s)).float()


LARGE = [(160, 160), (150, 400), (400, 150)]


@pytest.fixture(autouse=True)
def _both_routes_from_small_sizes_on(monkeypatch):
    monkeypatch.setattr(svd, "LARGE", 150)


@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("kind", ["flat", "decaying", "steep", "spiky", "gap", "singular"])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e15])
def test_large_matrices_are_decomposed_whatever_their_spectrum(scale, kind, shape):
    matrix = spread(kind, shape) * scale
    features = thin_svd(matrix)
    assert features.count == min(shape) - 40 * (kind == "singular")
    assert_decomposes(Features(features.u, features.s / scale, features.vh), matrix.double() / scale, 3e-5)
    exact = np.linalg.svd(matrix.double().numpy(), compute_uv=False)[: features.count]
    assert np.abs(features.s.double().numpy() / exact - 1).max() < 1e-3 * exact[0] / exact[-1] * 2e-3 + 1e-5


@pytest.mark.parametrize(("route", "tolerance"), [(_by_single_gram, 5e-6), (_by_double_gram, 2e-6)])
@pytest.mark.parametrize("shape", [(160, 160), (150, 400)])
def test_features_answer_as_the_matrix_does_by_either_route(route, tolerance, shape):
    """What STF asks of features: that each direction is answered by its strength along its partner."""
    matrix = spread("flat", shape)
    features = route(matrix)
    u, s, vh = (part.double() for part in (features.u, features.s, features.vh))
    exact = matrix.double()
    assert float((exact @ vh.T - u * s).norm(dim=0).max()) < tolerance * float(s[0])
    assert float((u.T @ exact - s[:, None] * vh).norm(dim=1).max()) < tolerance * float(s[0])


def test_flat_matrices_are_told_from_others():
    assert _is_flat(spread("flat", (160, 160)))
    for kind in ("decaying", "steep", "spiky"):
        assert not _is_flat(spread(kind, (160, 160)))


@pytest.mark.parametrize(
    "matrix",
    [
        torch.cat([torch.zeros(120, 500), torch.randn(420, 500, generator=torch.Generator().manual_seed(0))]),
        torch.cat([torch.randn(420, 500, generator=torch.Generator().manual_seed(0)), torch.zeros(120, 500)]),
        torch.diag(torch.cat([torch.ones(450), torch.zeros(150)])),
        torch.kron(torch.eye(150), torch.ones(4, 4)),
        torch.kron(torch.eye(64), torch.tensor([[1.0, 1.0], [1.0, -1.0]])).repeat(5, 5)[:600, :640],
    ],
    ids=["zeros first", "zeros last", "projection", "equal values", "Hadamard blocks"],
)
def test_zeros_and_equal_strengths_by_the_hundred_are_decomposed(matrix):
    """Sizes at which float32's Gram matrix is used: its weak end has nothing left to tell apart."""
    features = thin_svd(matrix)
    assert features.count == np.linalg.matrix_rank(matrix.double().numpy())
    assert_decomposes(features, matrix, 2e-5)


@pytest.mark.parametrize("shape", [(40, 50), (200, 300), (300, 300)])
def test_denormal_matrices_are_decomposed_as_exactly_as_they_are_known(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-41
    for features in (thin_svd(matrix), leading_svd(matrix, 10)):
        assert features.count >= 10
        exact = np.linalg.svd(matrix.double().numpy() * 2.0**130, compute_uv=False)
        assert float(features.s[0].double()) * 2.0**130 == pytest.approx(exact[0], rel=0.2)


# Leading features.


@pytest.mark.parametrize("shape", [(300, 300), (300, 700), (700, 300)])
@pytest.mark.parametrize(("kind", "held"), [("flat", 0.8), ("decaying", 0.995), ("spiky", 0.97), ("steep", 0.999)])
def test_leading_features_hold_nearly_as_much_as_the_strongest(kind, held, shape):
    matrix, count = spread(kind, shape), 60
    features = leading_svd(matrix, count)
    exact = np.linalg.svd(matrix.double().numpy(), compute_uv=False)[:count]
    assert features.count == count
    assert float(features.s.double().square().sum()) > held * (exact**2).sum()
    u, s, vh = (part.double() for part in (features.u, features.s, features.vh))
    assert float((u.T @ u - torch.eye(count)).abs().max()) < 5e-6
    assert float((vh @ vh.T - torch.eye(count)).abs().max()) < 5e-6
    answers = torch.einsum("ia,ij,aj->a", u, matrix.double(), vh)
    assert float((answers - s).abs().max()) < 3e-6 * float(s[0])  # each answers as the matrix does
    assert (s[1:] <= s[:-1]).all()


def test_leading_features_are_the_strongest_where_a_sketch_saves_little():
    matrix = spread("flat", (300, 320))
    for found, count in ((leading_svd(matrix, 100), 100), (leading_svd(matrix[:200], 20), 20)):
        exact = np.linalg.svd(matrix[: len(found.u)].double().numpy(), compute_uv=False)
        np.testing.assert_allclose(found.s.numpy(), exact[:count], rtol=1e-5)


def test_leading_features_of_a_matrix_of_less_rank_are_all_there_are():
    matrix = torch.from_numpy(matrix_with(np.random.default_rng(9), (400, 300), np.linspace(2, 1, 12))).float()
    features = leading_svd(matrix, 50)
    assert features.count == 12
    assert_decomposes(features, matrix, 5e-6)
    assert leading_svd(torch.zeros(300, 400), 20).count == 0


@pytest.mark.parametrize("kind", ["flat", "decaying", "spiky"])
@pytest.mark.parametrize("energy", [0.0, 0.3, 0.9, 0.9999])
def test_features_that_hold_an_energy_hold_it(energy, kind):
    matrix = spread(kind, (300, 400))
    features = leading_by_energy(matrix, energy)
    total = float(matrix.double().square().sum())
    assert float(features.s.double().square().sum()) >= energy * total * (1 - 1e-6)
    exact = leading(thin_svd(matrix), None, energy)
    assert exact.count <= features.count <= 1.5 * exact.count + 8


@pytest.mark.parametrize("last", [1e-3, 1e-4])
def test_leading_features_are_found_to_the_last_where_strengths_fall_far(last):
    """Multiplied three times without being told apart in between, the weak would drown in the strong's rounding."""
    s = np.r_[np.geomspace(1, last, 60), np.full(240, last / 100)]
    matrix = torch.from_numpy(matrix_with(np.random.default_rng(0), (300, 300), s)).float()
    np.testing.assert_allclose(leading_svd(matrix, 60).s.numpy(), s[:60], rtol=0.01)


@pytest.mark.parametrize(("columns", "count"), [(300, 72), (700, 72), (350, 176), (150, 128)])
def test_no_direction_of_a_sketch_is_wasted(columns, count):
    matrix = torch.randn(300, columns, generator=torch.Generator().manual_seed(0))
    assert float(torch.linalg.cond(_add_up_columns(matrix, count))) < 100


def test_features_of_sparse_matrices_are_told_apart():
    """Single entries, of which a sketch that adds up columns could mix some for good."""
    places = torch.randperm(600, generator=torch.Generator().manual_seed(0))[:40]
    matrix = torch.zeros(600, 700)
    matrix[places, places] = 1
    assert leading_svd(matrix, 64).count == 40
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(1024, 1024, generator=generator) * (torch.rand(1024, 1024, generator=generator) < 5e-4)
    exact = np.linalg.svd(matrix.double().numpy(), compute_uv=False)[:200]
    assert float(leading_svd(matrix, 200).s.double().square().sum()) > 0.97 * (exact**2).sum()


@pytest.mark.parametrize("sign", [1, -1])
def test_periodic_columns_do_not_cancel_in_a_sketch(sign):
    """Columns j and j + period alike or opposite, whatever the width of the sketch."""
    half = torch.randn(400, 72, generator=torch.Generator().manual_seed(0))
    matrix = torch.cat([half, sign * half, half, sign * half, half], dim=1)
    exact = np.linalg.svd(matrix.double().numpy(), compute_uv=False)[:64]
    assert float(leading_svd(matrix, 64).s.double().square().sum()) > 0.95 * (exact**2).sum()
