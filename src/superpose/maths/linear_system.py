"""Symmetric positive semidefinite systems with unit diagonal: fast when regular, least squares when not.

The matrix is anything that can be multiplied by vectors; only small systems, and those that iterations do not solve,
are ever written out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Solver = Literal["auto", "cg", "direct", "eigh"]

SMALL = 128
"""Up to this size a full eigendecomposition is cheap, and tells rank and conditioning exactly."""
CUTOFF = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Eigenvalues below this share of the largest count as zero."""
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
"""Relative residual at which a solution is accepted."""
MOST_DENSE = 6144
"""Up to this size a system that iterations do not solve is written out in float64, and takes 1.2 GiB."""
MOST_ITERATIONS = 300
MOST_RESIDUAL_ITERATIONS = 2000
FEWEST_PROBES = 8
MOST_PROBES = 24
INVERSE_ITERATIONS = 8


@runtime_checkable
class SymmetricOperator(Protocol):
    """A symmetric matrix, written out or not."""

    size: int
    dtype: torch.dtype

    def times(self, vectors: Float[Tensor, "size columns"]) -> Float[Tensor, "size columns"]:
        """Return the matrix times each column, in new memory."""
        ...

    def dense(self) -> Float[Tensor, "size size"]:
        """Return the matrix written out."""
        ...


class Dense:
    """A symmetric matrix that is written out."""

    def __init__(self, matrix: Float[Tensor, "size size"]) -> None:
        self.matrix, self.size, self.dtype = matrix, len(matrix), matrix.dtype

    def times(self, vectors: Float[Tensor, "size columns"]) -> Float[Tensor, "size columns"]:
        """Return the matrix times each column."""
        return self.matrix @ vectors

    def dense(self) -> Float[Tensor, "size size"]:
        """Return the matrix."""
        return self.matrix


@dataclass(frozen=True)
class Solution:
    """Solution of a system, and what was learnt about the matrix on the way.

    Args:
        x: solution, or the least-squares solution of minimum norm.
        rank: eigenvalues that count as nonzero; from an iteration the size, which a consistent singular system can
            pass for.
        residual: ||gram x - right side|| / ||right side||, of the system without ridge.
        condition: largest over smallest nonzero eigenvalue of gram + ridge; exact from `eigh`, else an estimate that
            can be too small.
        solver: which route gave x.
        converged: whether it came to its end; only conjugate residuals can be given up before.
    """

    x: Float[Tensor, " size"]
    rank: int
    residual: float
    condition: float
    solver: str
    converged: bool = True


def solve_psd(
    gram: Float[Tensor, "size size"] | SymmetricOperator,
    right: Float[Tensor, " size"],
    *,
    ridge: float = 0.0,
    solver: Solver = "auto",
) -> Solution:
    """Solve (gram + ridge I) x = right.

    "auto": small systems by eigendecomposition; others by conjugate gradients (the spectrum sits near 1 unless tasks
    share features), checked by the true residual; then Cholesky; then, for a singular or inconsistent system, the
    truncated eigendecomposition, which gives the least-squares solution of minimum norm. Beyond `MOST_DENSE` unknowns
    conjugate residuals take the place of both: they end in a least-squares solution, slower and in constant memory.

    Args:
        gram: symmetric, positive semidefinite, diagonal near 1.
        right: right side.
        ridge: added to the diagonal, at least 0.
        solver: "auto", or one route alone; "cg" and "direct" still end in "eigh" where they fail.

    Returns:
        The solution in the dtype of `right`.
    """
    operator = Dense(gram) if isinstance(gram, Tensor) else gram
    size, dtype = len(right), right.dtype
    cutoff = CUTOFF[dtype]
    if solver == "eigh" or (solver == "auto" and size <= SMALL):
        return _by_eigh(operator, right.double(), ridge, dtype)
    exact = size <= SMALL or solver == "direct"
    tried = _iterate(Dense(operator.dense().double()) if exact else operator, right.double() if exact else right, ridge)
    low, high = tried.low, tried.high
    condition = (high + ridge) / max(low + ridge, cutoff * high)
    regular = low + ridge > cutoff * (high + ridge)
    if regular and solver != "direct" and tried.x is not None:
        residual = _residual(operator, tried.x.to(operator.dtype), right.to(operator.dtype))
        return Solution(tried.x.to(dtype), size, residual, condition, "cg")
    if size > MOST_DENSE and solver in ("auto", "cg"):
        x, converged = _by_conjugate_residuals(operator, right, ridge, high)
        return Solution(x, size, _residual(operator, x, right), condition, "cr", converged)
    if regular:
        matrix = operator.dense().double()
        found = _by_cholesky(matrix, right.double(), ridge, cutoff * (high + ridge), TOLERANCE[dtype])
        if found is not None:
            x, lowest = found
            residual = _residual(Dense(matrix), x, right.double())
            return Solution(x.to(dtype), size, residual, (high + ridge) / lowest, "direct")
    return _by_eigh(operator, right.double(), ridge, dtype)


def _by_eigh(operator: SymmetricOperator, right: Tensor, ridge: float, dtype: torch.dtype) -> Solution:
    """Least squares of minimum norm: eigenvalues below the cut-off count as zero and are left out."""
    matrix = operator.dense().double()
    values, vectors = torch.linalg.eigh(matrix)
    kept = values + ridge > CUTOFF[dtype] * (values[-1] + ridge)
    values, vectors = values[kept] + ridge, vectors[:, kept]
    x = vectors @ ((vectors.T @ right) / values)
    condition = float(values[-1] / values[0])
    return Solution(x.to(dtype), int(kept.sum()), _residual(Dense(matrix), x, right), condition, "eigh")


@dataclass(frozen=True)
class _Tried:
    """What conjugate gradients came to: the solution, if they reached it, and the ends of the spectrum."""

    x: Tensor | None
    low: float
    high: float


def _iterate(gram: SymmetricOperator, right: Tensor, ridge: float) -> _Tried:
    """Run conjugate gradients, and Lanczos steps from a fixed random vector on the same products.

    The probe of the spectrum ends with the solution, after a few steps where that is easy. It sees what the right side
    may have nothing of: a direction in which the system is singular.
    """
    tolerance, norm = TOLERANCE[right.dtype], float(right.norm())
    probe = _Lanczos(gram.size, right)
    x = torch.zeros_like(right)
    residual, direction = right.clone(), right.clone()
    squared = float(residual.dot(residual))
    solved = squared == 0
    for step in range(MOST_ITERATIONS):
        probing = not probe.ended and step < MOST_PROBES
        if solved and (step >= FEWEST_PROBES or not probing):
            break
        vectors = [direction] * (not solved) + [probe.vector] * probing
        images = gram.times(torch.stack(vectors, dim=1))
        if probing:
            probe.add(images[:, -1])
        if solved:
            continue
        image = images[:, 0] + ridge * direction
        curvature = float(direction.dot(image))
        if curvature <= 0:
            return _Tried(None, *probe.ends())
        length = squared / curvature
        x += length * direction
        residual -= length * image
        before, squared = squared, float(residual.dot(residual))
        direction = residual + (squared / before) * direction
        solved = math.sqrt(squared) <= 0.1 * tolerance * norm
        if step == MOST_PROBES:
            low, high = probe.ends()
            if low + ridge <= CUTOFF[right.dtype] * (high + ridge):
                return _Tried(None, low, high)  # singular, and no longer hoped for
    # The recurrence drifts from the truth; what is accepted is the residual computed afresh.
    true = float((right - gram.times(x[:, None])[:, 0] - ridge * x).norm())
    return _Tried(x if true <= tolerance * norm else None, *probe.ends())


class _Lanczos:
    """Lanczos steps from a fixed random vector: the ends of the spectrum, estimated from inside."""

    def __init__(self, size: int, like: Tensor) -> None:
        self.vector = _start_vector(size, like)
        self.ended = False
        self._basis, self._diagonal, self._beside = [self.vector], [], []

    def add(self, image: Tensor) -> None:
        """Take the matrix times the last vector."""
        self._diagonal.append(float(self.vector.dot(image)))
        known = torch.stack(self._basis)
        for _ in range(2):  # once loses orthogonality, twice is enough
            image = image - known.T @ (known @ image)
        length = float(image.norm())
        if length < 1e-6 or len(self._basis) == len(image):
            self.ended = True
            return
        self._beside.append(length)
        self.vector = image / length
        self._basis.append(self.vector)

    def ends(self) -> tuple[float, float]:
        """Return the smallest and the largest eigenvalue as far as they are known."""
        steps = len(self._diagonal)
        if steps == 0:
            return 1.0, 1.0
        tridiagonal = torch.diag(torch.tensor(self._diagonal, dtype=torch.float64))
        if steps > 1:
            beside = torch.tensor(self._beside[: steps - 1], dtype=torch.float64)
            tridiagonal += torch.diag(beside, 1) + torch.diag(beside, -1)
        values = torch.linalg.eigvalsh(tridiagonal)
        return float(values[0]), float(values[-1])


def _by_conjugate_residuals(gram: SymmetricOperator, right: Tensor, ridge: float, high: float) -> tuple[Tensor, bool]:
    """Return a least-squares solution, and whether it was reached.

    Stiefel 1955: of all vectors in the Krylov space, the one with the smallest residual. What the right side has
    outside the range is what is left as residual; as much of it as got into x is taken out again, which makes the
    solution the shortest (Liu, Milzarek and Roosta 2023, arXiv:2309.17096, "lifting"). It is reached when the residual
    is gone, or lies where eigenvalues count as zero; rounding makes those a little negative, from where the iteration
    would leave for anywhere, so that it ends at the smallest image of a residual.
    """

    def times(vector: Tensor) -> Tensor:
        return gram.times(vector[:, None])[:, 0] + ridge * vector

    tolerance, norm = TOLERANCE[right.dtype], float(right.norm())
    x, residual = torch.zeros_like(right), right.clone()
    image = times(residual)
    direction, direction_image = residual.clone(), image.clone()
    energy = float(residual.dot(image))
    best, best_residual, smallest, quotient = x.clone(), residual.clone(), float(image.norm()), 1.0
    for _ in range(MOST_RESIDUAL_ITERATIONS):
        size = float(image.norm())
        if size <= smallest:
            best.copy_(x)
            best_residual.copy_(residual)
            smallest, quotient = size, abs(energy) / max(float(residual.dot(residual)), 1e-300)
        if size <= tolerance * (high + ridge) * norm or energy <= 0 or size > 10 * smallest:
            break
        length = energy / float(direction_image.dot(direction_image))
        x += length * direction
        residual -= length * direction_image
        image = times(residual)
        before, energy = energy, float(residual.dot(image))
        direction = residual + (energy / before) * direction
        direction_image = image + (energy / before) * direction_image
    left = float(best_residual.norm())
    if left <= 10 * tolerance * norm:
        return best, True
    best -= (float(best.dot(best_residual)) / left**2) * best_residual
    return best, quotient <= CUTOFF[right.dtype] * (high + ridge)


def _by_cholesky(
    gram: Tensor, right: Tensor, ridge: float, cutoff: float, tolerance: float
) -> tuple[Tensor, float] | None:
    """Return the solution, refined once, and the smallest eigenvalue; None where that is below the cut-off."""
    shifted = gram + ridge * torch.eye(len(right), dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if int(info) != 0:
        return None
    # A matrix that rounding has made regular still factorises: the smallest eigenvalue, by inverse iteration, tells.
    vector, lowest = _start_vector(len(gram), gram), float("inf")
    for _ in range(INVERSE_ITERATIONS):
        image = torch.cholesky_solve(vector[:, None], factor)[:, 0]
        lowest = 1 / float(image.norm())
        vector = image * lowest
    if lowest <= cutoff:
        return None
    x = torch.cholesky_solve(right[:, None], factor)[:, 0]
    x = x + torch.cholesky_solve((right - shifted @ x)[:, None], factor)[:, 0]
    accepted = float((right - shifted @ x).norm()) <= tolerance * float(right.norm())
    return (x, lowest) if accepted else None


def _start_vector(size: int, like: Tensor) -> Tensor:
    """Return a unit vector that is the same for every matrix of this size, and special to none."""
    vector = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (vector / vector.norm()).to(like)


def _residual(gram: SymmetricOperator, x: Tensor, right: Tensor) -> float:
    norm = float(right.norm())
    return float((gram.times(x[:, None])[:, 0] - right).norm()) / norm if norm else 0.0
