"""Symmetric positive semidefinite systems with unit diagonal: fast when regular, least squares when not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Solver = Literal["auto", "cg", "direct", "eigh"]

SMALL = 512
"""Up to this size a full eigendecomposition is cheap, and tells rank and conditioning exactly."""
CUTOFF = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Eigenvalues below this share of the largest count as zero."""
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
"""Relative residual at which a solution is accepted."""
MOST_ITERATIONS = 300
LANCZOS_STEPS = 24
INVERSE_ITERATIONS = 8


@dataclass(frozen=True)
class Solution:
    """Solution of a system, and what was learnt about the matrix on the way.

    Args:
        x: solution, or the least-squares solution of minimum norm.
        rank: eigenvalues that count as nonzero; from `cg` the size, which a consistent singular system can pass for.
        residual: ||gram x - right side|| / ||right side||, of the system without ridge.
        condition: largest over smallest nonzero eigenvalue of gram + ridge; exact from `eigh`, else an estimate that
            can be too small.
        solver: which route gave x.
    """

    x: Float[Tensor, " size"]
    rank: int
    residual: float
    condition: float
    solver: str


def solve_psd(
    gram: Float[Tensor, "size size"],
    right: Float[Tensor, " size"],
    *,
    ridge: float = 0.0,
    solver: Solver = "auto",
) -> Solution:
    """Solve (gram + ridge I) x = right.

    "auto": small systems by eigendecomposition; others by conjugate gradients (the spectrum sits near 1 unless tasks
    share features), checked by the true residual; then Cholesky; then, for a singular or inconsistent system, the
    truncated eigendecomposition, which gives the least-squares solution of minimum norm.

    Args:
        gram: symmetric, positive semidefinite, diagonal near 1.
        right: right side.
        ridge: added to the diagonal, at least 0.
        solver: "auto", or one route alone; "cg" and "direct" still end in "eigh" where they fail.

    Returns:
        The solution in the dtype of `right`.
    """
    size, dtype = len(right), right.dtype
    if size <= SMALL or solver in ("direct", "eigh"):
        gram, right = gram.double(), right.double()
    if solver == "eigh" or (solver == "auto" and size <= SMALL):
        return _by_eigh(gram, right, ridge, dtype)
    low, high = _extreme_eigenvalues(gram)
    condition = (high + ridge) / max(low + ridge, CUTOFF[dtype] * high)
    if low + ridge > CUTOFF[dtype] * (high + ridge):
        if solver != "direct":
            x = _by_conjugate_gradients(gram, right, ridge)
            if x is not None:
                return Solution(x.to(dtype), size, _residual(gram, x, right), condition, "cg")
        found = _by_cholesky(gram.double(), right.double(), ridge, CUTOFF[dtype] * (high + ridge), TOLERANCE[dtype])
        if found is not None:
            x, lowest = found
            residual = _residual(gram.double(), x, right.double())
            return Solution(x.to(dtype), size, residual, (high + ridge) / lowest, "direct")
    return _by_eigh(gram.double(), right.double(), ridge, dtype)


def _by_eigh(gram: Tensor, right: Tensor, ridge: float, dtype: torch.dtype) -> Solution:
    """Least squares of minimum norm: eigenvalues below the cut-off count as zero and are left out."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values + ridge > CUTOFF[dtype] * (values[-1] + ridge)
    values, vectors = values[kept] + ridge, vectors[:, kept]
    x = vectors @ ((vectors.T @ right) / values)
    condition = float(values[-1] / values[0])
    return Solution(x.to(dtype), int(kept.sum()), _residual(gram, x, right), condition, "eigh")


def _by_conjugate_gradients(gram: Tensor, right: Tensor, ridge: float) -> Tensor | None:
    """Return the solution, or None where the iteration does not reach the tolerance."""
    tolerance = TOLERANCE[right.dtype]
    norm = float(right.norm())
    x = torch.zeros_like(right)
    residual = right.clone()
    direction = residual.clone()
    squared = float(residual.dot(residual))
    for _ in range(MOST_ITERATIONS):
        if math.sqrt(squared) <= 0.1 * tolerance * norm:
            break
        image = gram @ direction + ridge * direction
        curvature = float(direction.dot(image))
        if curvature <= 0:
            return None
        step = squared / curvature
        x += step * direction
        residual -= step * image
        before, squared = squared, float(residual.dot(residual))
        direction = residual + (squared / before) * direction
    # The recurrence drifts from the truth; what is accepted is the residual computed afresh.
    true = float((right - gram @ x - ridge * x).norm())
    return x if true <= tolerance * norm else None


def _by_cholesky(
    gram: Tensor, right: Tensor, ridge: float, cutoff: float, tolerance: float
) -> tuple[Tensor, float] | None:
    """Return the solution, refined once, and the smallest eigenvalue; None where that is below the cut-off."""
    shifted = gram + ridge * torch.eye(len(right), dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if int(info) != 0:
        return None
    # A matrix that rounding has made regular still factorises: the smallest eigenvalue, by inverse iteration, tells.
    vector, lowest = _start_vector(gram), float("inf")
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


def _start_vector(gram: Tensor) -> Tensor:
    """Return a unit vector that is the same for every matrix of this size, and special to none."""
    vector = torch.randn(len(gram), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (vector / vector.norm()).to(gram)


def _extreme_eigenvalues(gram: Tensor) -> tuple[float, float]:
    """Estimate the smallest and largest eigenvalue from inside, by Lanczos steps from a fixed random vector."""
    size = len(gram)
    basis, diagonal, off_diagonal = [_start_vector(gram)], [], []
    for _ in range(min(LANCZOS_STEPS, size)):
        image = gram @ basis[-1]
        diagonal.append(float(basis[-1].dot(image)))
        known = torch.stack(basis)
        for _ in range(2):  # once loses orthogonality, twice is enough
            image = image - known.T @ (known @ image)
        length = float(image.norm())
        if length < 1e-6:
            break
        off_diagonal.append(length)
        basis.append(image / length)
    steps = len(diagonal)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if steps > 1:
        beside = torch.tensor(off_diagonal[: steps - 1], dtype=torch.float64)
        tridiagonal += torch.diag(beside, 1) + torch.diag(beside, -1)
    values = torch.linalg.eigvalsh(tridiagonal)
    return float(values[0]), float(values[-1])


def _residual(gram: Tensor, x: Tensor, right: Tensor) -> float:
    norm = float(right.norm())
    return float((gram @ x - right).norm()) / norm if norm else 0.0
