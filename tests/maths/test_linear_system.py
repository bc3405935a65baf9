"""Positive semidefinite systems: known solutions, then singular ones, by every route, small and large."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpose.maths import linear_system
from superpose.maths.linear_system import SMALL, SymmetricOperator, solve_psd

DTYPES = [torch.float32, torch.float64]
SOLVERS = ["auto", "cg", "direct", "eigh"]
SIZES = [40, SMALL + 60]
ACCURACY = {torch.float32: 2e-6, torch.float64: 1e-12}

every_route = pytest.mark.parametrize("solver", SOLVERS)
every_size = pytest.mark.parametrize("size", SIZES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def orthonormal(rng, size):
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


def system_with(rng, eigenvalues):
    """Return a matrix with these eigenvalues, and its eigenvectors."""
    q = orthonormal(rng, len(eigenvalues))
    gram = (q * eigenvalues) @ q.T
    return (gram + gram.T) / 2, q


def solve(gram, right, dtype, **options):
    return solve_psd(torch.from_numpy(gram).to(dtype), torch.from_numpy(right).to(dtype), **options)


def relative_error(found, expected):
    return np.linalg.norm(found.double().numpy() - expected) / np.linalg.norm(expected)


@every_dtype
@every_size
@every_route
@pytest.mark.parametrize("condition", [1.0, 5.0, 300.0])
def test_known_solution_is_found(solver, size, dtype, condition):
    rng = np.random.default_rng(size)
    eigenvalues = np.geomspace(1, 1 / condition, size)
    gram, _ = system_with(rng, eigenvalues / eigenvalues.mean())
    x = rng.standard_normal(size)
    solution = solve(gram, gram @ x, dtype, solver=solver)
    assert solution.x.dtype == dtype
    assert relative_error(solution.x, x) < 3 * condition * ACCURACY[dtype]
    assert solution.rank == size
    assert solution.residual < ACCURACY[dtype] * 1.01
    assert 0.3 * condition < solution.condition < 1.01 * condition
    if solver != "auto":
        assert solution.solver == solver


@every_size
@every_route
def test_ill_conditioned_systems_are_solved_where_iterations_do_not_suffice(solver, size):
    rng = np.random.default_rng(size)
    gram, _ = system_with(rng, np.geomspace(1e-6, 1, size))
    x = rng.standard_normal(size)
    solution = solve(gram, gram @ x, torch.float64, solver=solver)
    assert relative_error(solution.x, x) < 1e6 * ACCURACY[torch.float64]
    assert np.linalg.norm(gram @ (solution.x.numpy() - x)) < 3 * ACCURACY[torch.float64] * np.linalg.norm(gram @ x)


@every_dtype
def test_auto_decomposes_small_systems_and_iterates_on_large_ones(dtype):
    for size, solver in ((SMALL, "eigh"), (SMALL + 1, "cg")):
        assert solve(np.eye(size), np.ones(size), dtype).solver == solver


@every_dtype
@every_size
@every_route
def test_consistent_singular_system_has_its_shortest_solution(solver, size, dtype):
    """Three eigenvalues are zero and the right side has nothing along their vectors."""
    rng = np.random.default_rng(size)
    gram, q = system_with(rng, np.r_[np.zeros(3), np.linspace(0.5, 1.5, size - 3)])
    x = q[:, 3:] @ rng.standard_normal(size - 3)
    solution = solve(gram, gram @ x, dtype, solver=solver)
    assert relative_error(solution.x, x) < 10 * ACCURACY[dtype]
    assert solution.rank == size - 3
    assert solution.residual < 10 * ACCURACY[dtype]


@every_dtype
@every_size
@every_route
def test_inconsistent_system_has_its_shortest_least_squares_solution(solver, size, dtype):
    rng = np.random.default_rng(size)
    gram, q = system_with(rng, np.r_[np.zeros(3), np.linspace(0.5, 1.5, size - 3)])
    x = q[:, 3:] @ rng.standard_normal(size - 3)
    outside = q[:, :3] @ rng.standard_normal(3)
    right = gram @ x + outside
    solution = solve(gram, right, dtype, solver=solver)
    assert solution.solver == "eigh"  # no other route gives it
    assert relative_error(solution.x, x) < 10 * ACCURACY[dtype]
    assert solution.rank == size - 3
    assert solution.residual == pytest.approx(np.linalg.norm(outside) / np.linalg.norm(right), rel=1e-4)


@every_dtype
@every_size
@every_route
@pytest.mark.parametrize("outside", [0.0, 1.0])
def test_one_zero_among_evenly_spread_eigenvalues_is_not_divided_by(outside, solver, size, dtype):
    """No gap sets the zero apart, so a few steps of an iteration cannot tell it from its neighbours."""
    rng = np.random.default_rng(size)
    gram, q = system_with(rng, np.linspace(0, 2, size))
    x = q[:, 1:] @ rng.standard_normal(size - 1)
    solution = solve(gram, gram @ x + outside * q[:, 0], dtype, solver=solver)
    answers = gram @ solution.x.double().numpy()
    assert np.linalg.norm(answers - gram @ x) < 30 * ACCURACY[dtype] * np.linalg.norm(gram @ x)
    assert np.linalg.norm(solution.x.double().numpy()) < 1.1 * np.linalg.norm(x)


@every_dtype
@every_size
@every_route
def test_repeated_unknown_gets_half_the_answer_each(solver, size, dtype):
    """Two unknowns that enter alike: with right sides that agree, and with right sides that do not."""
    rng = np.random.default_rng(1)
    gram, _ = system_with(rng, np.linspace(0.5, 1.5, size - 1))
    gram = np.block([[gram, gram[:, :1]], [gram[:1], gram[:1, :1]]])
    right = rng.standard_normal(size)
    for last in (right[0], right[0] + 1):
        right[-1] = last
        solution = solve(gram, right, dtype, solver=solver)
        assert relative_error(solution.x, np.linalg.pinv(gram, rcond=1e-8, hermitian=True) @ right) < 1e-5
        assert float(solution.x[0]) == pytest.approx(float(solution.x[-1]), rel=1e-4)
        assert solution.rank == size - 1


@every_dtype
@every_size
@every_route
@pytest.mark.parametrize("ridge", [1e-3, 0.1, 1.0])
def test_ridge_solves_the_shifted_system(solver, size, dtype, ridge):
    rng = np.random.default_rng(size)
    gram, _ = system_with(rng, np.r_[np.zeros(size // 2), np.linspace(0.5, 3, size - size // 2)])
    right = rng.standard_normal(size)
    solution = solve(gram, right, dtype, solver=solver, ridge=ridge)
    expected = np.linalg.solve(gram + ridge * np.eye(size), right)
    assert relative_error(solution.x, expected) < 2 * ACCURACY[dtype] / ridge
    assert solution.rank == size
    missed = np.linalg.norm(gram @ expected - right) / np.linalg.norm(right)
    assert solution.residual == pytest.approx(missed, rel=1e-4)  # of the system as it was put
    if solver != "auto" and dtype == torch.float64:  # in float32 cg may fall short, and leave it to direct
        assert solution.solver == solver


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32), st.sampled_from(SOLVERS))
def test_gram_matrices_of_unit_vectors_equal_the_pseudo_inverse(size, dimension, seed, solver):
    """More unknowns than dimensions give a singular system."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((dimension, size))
    vectors /= np.linalg.norm(vectors, axis=0)
    gram = vectors.T @ vectors
    right = rng.uniform(0.1, 2, size)
    values = np.linalg.eigvalsh(gram) / size
    solution = solve(gram, right, torch.float64, solver=solver)
    if not ((values > 1e-13) & (values < 1e-6)).any():  # where the rank is beyond doubt
        expected = np.linalg.pinv(gram, rcond=1e-10, hermitian=True) @ right
        np.testing.assert_allclose(solution.x.numpy(), expected, atol=1e-8 * np.abs(expected).max())
        assert solution.rank == int((values > 1e-10).sum())


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_unknown(solver):
    solution = solve(np.ones((1, 1)), np.array([3.0]), torch.float64, solver=solver)
    assert solution.x.tolist() == pytest.approx([3.0])
    assert (solution.rank, solution.condition) == (1, pytest.approx(1.0))


@every_size
@every_route
def test_right_side_of_zeros_has_the_solution_zero(solver, size):
    solution = solve(np.eye(size), np.zeros(size), torch.float64, solver=solver)
    assert torch.equal(solution.x, torch.zeros(size, dtype=torch.float64))
    assert solution.residual == 0


def test_inputs_stay_as_they_are():
    gram, right = torch.eye(5, dtype=torch.float64), torch.arange(5.0, dtype=torch.float64)
    for solver in SOLVERS:
        solve_psd(gram, right, ridge=0.5, solver=solver)
    assert torch.equal(gram, torch.eye(5, dtype=torch.float64))
    assert torch.equal(right, torch.arange(5.0, dtype=torch.float64))


class Product:
    """A matrix A^T A that is never written out: asking for it fails."""

    def __init__(self, vectors):
        self.vectors, self.size, self.dtype = vectors, vectors.shape[1], vectors.dtype
        self.products = 0

    def times(self, columns):
        self.products += 1
        return self.vectors.T @ (self.vectors @ columns)

    def dense(self):
        raise AssertionError("written out")


@every_dtype
@pytest.mark.parametrize("consistent", [True, False])
def test_systems_too_large_to_write_out_are_solved_by_products_alone(consistent, dtype, monkeypatch):
    monkeypatch.setattr(linear_system, "MOST_DENSE", SMALL)
    rng, size = np.random.default_rng(0), SMALL + 100
    gram, q = system_with(rng, np.r_[np.zeros(50), np.linspace(0.5, 1.5, size - 50)])
    x = q[:, 50:] @ rng.standard_normal(size - 50)
    right = gram @ x + (0 if consistent else q[:, :50] @ rng.standard_normal(50))
    root = (q * np.sqrt(np.r_[np.zeros(50), np.linspace(0.5, 1.5, size - 50)])).T
    operator = Product(torch.from_numpy(root).to(dtype))
    assert isinstance(operator, SymmetricOperator)
    solution = solve_psd(operator, torch.from_numpy(right).to(dtype))
    assert solution.solver == "cr"
    assert relative_error(solution.x, x) < 30 * ACCURACY[dtype]
    missed = np.linalg.norm(gram @ x - right) / np.linalg.norm(right)
    assert solution.residual == pytest.approx(missed, abs=5 * ACCURACY[dtype])


def test_well_conditioned_systems_take_few_products():
    """Ten or so: the probe of the spectrum rides on those of the solution."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((60000 // 8, SMALL + 88))
    operator = Product(torch.from_numpy(vectors / np.linalg.norm(vectors, axis=0)))
    solution = solve_psd(operator, torch.from_numpy(rng.uniform(0.5, 1, operator.size)))
    assert solution.solver == "cg"
    assert operator.products < 30
    assert 1.8 < solution.condition < 3.3  # in the limit ((1 + sqrt(0.08)) / (1 - sqrt(0.08)))^2 = 3.2


@every_dtype
def test_right_side_that_the_system_cannot_answer_at_all_has_the_answer_zero(dtype, monkeypatch):
    """Opposite tasks: whatever one asks for, the other forbids. Its image is rounding, not to be divided by."""
    monkeypatch.setattr(linear_system, "MOST_DENSE", SMALL)
    half = np.eye(100)
    gram = torch.from_numpy(np.block([[half, -half], [-half, half]])).to(dtype)
    right = torch.from_numpy(np.tile(np.random.default_rng(0).uniform(0.1, 2, 100), 2)).to(dtype)
    solution = solve_psd(gram, right)
    assert solution.converged
    answer = gram @ solution.x
    assert float(answer.norm()) < 1e-5 * float(right.norm())
    assert solution.residual == pytest.approx(1, rel=1e-5)


def test_iteration_that_is_given_up_is_said(monkeypatch):
    monkeypatch.setattr(linear_system, "MOST_DENSE", SMALL)
    monkeypatch.setattr(linear_system, "MOST_RESIDUAL_ITERATIONS", 3)
    rng = np.random.default_rng(0)
    gram, _ = system_with(rng, np.geomspace(1e-9, 1, SMALL + 40))
    assert not solve(gram, rng.standard_normal(SMALL + 40), torch.float64).converged
