"""RegMean: the linear map whose answers to each task's inputs are nearest to those of the task's own map.

    G_i      = mean of x x^T over task i's tokens                             by `superpose statistics gram`
    Gs_i     = alpha G_i + (1 - alpha) diag(G_i)
    merged^T = (sum_i Gs_i + eps I)^-1 (sum_i Gs_i W_i^T + eps Wbar^T),   eps = ridge * mean diagonal

For alpha 1 it minimises sum_i E ||W x - W_i x||^2. Inputs that never fire are zero rows of every G_i: there the ridge
gives the average Wbar. Solved by Cholesky in float64. What is no linear map with a Gram matrix (norms, biases,
embeddings, convolutions, tied heads) is averaged. The authors take alpha 0.1 for T5 and DeBERTa, where 0.9 is unstable.

Cost: one solve of the size of the map's inputs for each linear map, with T Gram matrices of that size read from files.
Prefer it to the average whenever a few hundred unlabelled examples of each task are at hand: forward passes are enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.kinds import Kind
from superpose.maths.combine import weighted_mean
from superpose.options import Range
from superpose.registry import Caution, Cost, Grams, Merged, merge_method

_STRONGEST_RIDGE = 1e-2


@dataclass(frozen=True, kw_only=True)
class RegmeanOptions:
    """Options of RegMean."""

    alpha: Annotated[float, Range(0, 1)] = 0.9
    """Factor on what is off the diagonal of the Gram matrices (0.9 in general, 0.1 where unstable, such as T5)."""
    ridge: Annotated[float, Range(0, 1)] = 1e-6
    """Pull to the average, relative to the mean of the summed matrices' diagonal."""


def regmean_cost(shape: Sequence[int], tasks: int, options: RegmeanOptions) -> Cost:
    """Return what one map takes: the summed matrix, its factor, one task's, and the right-hand sides, in float64."""
    del options
    width = max(shape, default=1)  # of a map that is stored either way
    memory = 8 * (4 * width**2 + 4 * prod(shape))
    return Cost(memory, width**3 / 3 + 2.0 * (tasks + 1) * prod(shape) * width)


@merge_method(
    "regmean",
    options=RegmeanOptions,
    source="Jin et al. 2022, arXiv:2212.09849, the closed form for linear layers",
    acts_on="weights",
    whole_for=(Kind.LINEAR, Kind.HEAD),
    cost=regmean_cost,
    statistics="gram",
    breaks={"zero": "the base counts as another model, like in an average: each update shrinks"},
)
def regmean(
    tuned: Float[Tensor, "tasks *shape"],
    options: RegmeanOptions,
    *,
    statistics: Grams | None = None,
    weights: Float[Tensor, " tasks"] | None = None,
) -> Merged:
    """Solve for the map nearest to all, on each task's inputs; average where there are no Gram matrices.

    Args:
        tuned: the tuned models' weights.
        options: see `RegmeanOptions`.
        statistics: Gram matrices of the map's inputs, one per model.
        weights: one factor per model, on its Gram matrix and in the average, not negative; 1 when not given.

    Returns:
        The merged weight, with the ridge that the solution took where that was more than asked for.
    """
    factors = torch.ones(len(tuned), dtype=torch.float64) if weights is None else weights.cpu()
    average = weighted_mean(tuned, (factors / factors.sum()).tolist())
    if statistics is None or tuned.ndim != 3:
        return Merged(average)
    maps = [task.T if statistics.in_x_out else task for task in tuned]
    start = (average.T if statistics.in_x_out else average).double()
    width = start.shape[1]
    system = torch.zeros(width, width, dtype=torch.float64, device=tuned.device)
    wanted = torch.zeros(width, start.shape[0], dtype=torch.float64, device=tuned.device)
    # Measured from the average: identical maps are then given back exactly, and the ridge pulls to zero.
    for factor, gram, task in zip(factors.tolist(), statistics.matrices, maps, strict=True):
        shrunk = gram.double() * (factor * options.alpha)
        shrunk.diagonal().copy_(gram.diagonal().double() * factor)
        system += shrunk
        wanted += shrunk @ (task.double() - start).T
    found, ridge = _solve(system, wanted, options.ridge)
    if found is None:
        return Merged(average, {"ridge": ridge})
    merged = (start + found.T).to(tuned.dtype)
    cautions = []
    if ridge > max(options.ridge, 1e-6):
        cautions.append(Caution(f"its Gram matrices are nearly singular: a ridge of {ridge:g} was needed; lower alpha"))
    result = merged.T.contiguous() if statistics.in_x_out else merged
    return Merged(result, {"ridge": ridge} if ridge != options.ridge else {}, cautions)


def _solve(
    system: Float[Tensor, "in_ in_"], wanted: Float[Tensor, "in_ out"], ridge: float
) -> tuple[Float[Tensor, "in_ out"] | None, float]:
    """Return (system + ridge * mean diagonal * I)^-1 wanted, and the ridge that made it definite.

    None for the solution where the system is zero.
    """
    size = system.diagonal().mean().item()
    if size <= 0:
        return None, ridge
    while True:
        lifted = system.clone()
        lifted.diagonal().add_(ridge * size)
        factor, failed = torch.linalg.cholesky_ex(lifted)
        if not failed.item():
            return torch.cholesky_solve(wanted, factor), ridge
        if ridge >= _STRONGEST_RIDGE:
            what = "the Gram matrices are no Gram matrices: not positive semidefinite"
            raise torch.linalg.LinAlgError(what)  # pyright: ignore[reportPrivateImportUsage]
        ridge = max(10 * ridge, 1e-12)
