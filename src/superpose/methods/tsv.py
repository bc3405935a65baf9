"""TSV-Merge: the leading singular triplets of every task, their vectors made orthonormal together.

    k      = floor(min(out, in) / T)
    Uc     = [U_1 ... U_T], Vc = [V_1 ... V_T], sc: the k leading triplets of every task matrix
    M      = polar(Uc) diag(sc) polar(Vc)^T,   polar(P diag(.) Q^T) = P Q^T
    merged = base + scaling_factor * M;   what is not 2-D: scaling_factor * mean_i tau_i

STF keeps the vectors and corrects the coefficients; TSV keeps the coefficients and corrects the vectors. Where Uc or Vc
lack rank (identical tasks, low-rank updates) the factor of smallest norm is taken: the others are arbitrary. With more
tasks than min(out, in), k is 0 and the mean is taken. The authors leave CLIP's `text_projection` to the mean: a rule
`{match: "*text_projection*", method: average}` does.

Cost: T decompositions and two of out x min(out, in) and in x min(out, in). Prefer it for many tasks with quickly
falling singular values: each task gets 1/T of the directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.kinds import Kind
from superpose.maths.low_rank import LowRank, total, zero
from superpose.maths.matrices import acts_as_matrix, as_matrices
from superpose.maths.orthogonal import polar_factor
from superpose.maths.svd import Features, thin_svd
from superpose.options import Range
from superpose.registry import Breach, Cache, Cost, Factored, Merged, MergedFactors, merge_method, remembered

TWO_DIMENSIONAL = frozenset({Kind.LINEAR, Kind.EMBEDDING, Kind.HEAD})
"""Kinds whose tensors can be 2-D."""
DECOMPOSED = TWO_DIMENSIONAL | {Kind.CONV}
"""Kinds that can be decomposed, by choice or always: read as a whole."""
Convolutions = Literal["average", "matrix"]


@dataclass(frozen=True, kw_only=True)
class TsvOptions:
    """Options of TSV-Merge."""

    scaling_factor: Annotated[float, Range(-10, 10)] = 1.0
    """Factor on the merged task vector (alpha; 1 in the paper, searched up to 3 in the code)."""
    convolutions: Convolutions = "average"
    """Whether kernels that mix channels are averaged, as published, or decomposed as out x (in * kernel)."""


def spectral_cost(shape: Sequence[int], tasks: int, options: object) -> Cost:
    """Return what one matrix takes: T decompositions, and the two that make vectors orthonormal."""
    del options
    out, in_ = shape[0], prod(shape[1:])
    small = min(out, in_)
    numbers = 3 * out * in_ + 4 * small**2 + 3 * small * (out + in_)
    flops = (tasks + 2) * (2.0 * out * in_ * small + 12.0 * small**3)
    return Cost(8 * numbers + 4 * (tasks + 1) * out * in_, flops)


def _in_factors(tasks: Sequence[LowRank], options: TsvOptions, kind: Kind) -> MergedFactors:
    count = min(tasks[0].shape) // len(tasks)
    if not is_decomposed(kind, tasks[0].shape, options.convolutions) or count == 0:
        return MergedFactors(total(tasks, [options.scaling_factor / len(tasks)] * len(tasks)))
    if len(tasks) == 1:
        return MergedFactors(tasks[0].times(options.scaling_factor))
    found = _orthonormal([task.features().take(0, count) for task in tasks])
    if found is None:
        return MergedFactors(zero(tasks[0].shape, tasks[0].left), {"triplets": 0, "rank": 0})
    left, s, right, stats = found
    return MergedFactors(LowRank(left * (s * options.scaling_factor), right.T), stats)


@merge_method(
    "tsv",
    options=TsvOptions,
    source="Gargiulo et al. 2024, arXiv:2412.00081, TSV-M",
    whole_for=DECOMPOSED,
    cost=spectral_cost,
    breaks={
        "same": Breach("of T identical tasks the leading 1/T of the triplets comes back", TWO_DIMENSIONAL),
        "zero": "one task more leaves fewer triplets to each; what is not 2-D is averaged",
    },
    factored=Factored(_in_factors),
)
def tsv(
    task_vectors: Float[Tensor, "tasks *shape"], options: TsvOptions, *, kind: Kind, cache: Cache | None = None
) -> Merged:
    """Merge the leading triplets of every task, with orthonormal vectors.

    Args:
        task_vectors: tuned minus base.
        options: see `TsvOptions`.
        kind: linear maps, embeddings and heads are decomposed where they are 2-D (stacks of experts map by map).
        cache: remembers merged matrices before scaling.

    Returns:
        The merged task vector; for matrices with the triplets per task and the rank of their vectors.
    """
    if not is_decomposed(kind, task_vectors.shape[1:], options.convolutions):
        return Merged(options.scaling_factor * task_vectors.mean(dim=0))
    done = f"tsv {replace(options, scaling_factor=1.0)}"
    merged = [
        remembered(cache, done, matrices, partial(_merge_matrices, matrices))
        for matrices in as_matrices(task_vectors, kind)
    ]
    tensor = torch.stack([matrix.tensor for matrix in merged]).reshape(task_vectors.shape[1:])
    stats = {name: sum(int(matrix.stats[name]) for matrix in merged) for name in merged[0].stats}
    return Merged(options.scaling_factor * tensor, stats)


def is_decomposed(kind: Kind, shape: Sequence[int], convolutions: Convolutions) -> bool:
    """Whether the spectral methods decompose a tensor: 2-D ones, stacks of linear maps, kernels if that is chosen."""
    matrix = len(shape) == 2 and kind in TWO_DIMENSIONAL
    kernel = convolutions == "matrix" and kind is Kind.CONV and acts_as_matrix(kind, shape)
    return (matrix or kernel or (len(shape) == 3 and kind is Kind.LINEAR)) and prod(shape) > 0


def _merge_matrices(matrices: Float[Tensor, "tasks out in_"]) -> Merged:
    count = min(matrices.shape[1:]) // len(matrices)
    if count == 0:
        return Merged(matrices.mean(dim=0), {"triplets": 0, "rank": 0})
    if len(matrices) == 1:
        return Merged(matrices[0], {"triplets": count, "rank": count})  # without the rounding of a decomposition
    tasks = [thin_svd(matrix).take(0, count) for matrix in matrices]
    found = _orthonormal(tasks)
    if found is None:
        return Merged(torch.zeros_like(matrices[0]), {"triplets": 0, "rank": 0})
    left, s, right, stats = found
    return Merged((left * s) @ right.T, stats)


def _orthonormal(
    tasks: Sequence[Features],
) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "in_ k"], dict[str, int]] | None:
    """Return all tasks' vectors made orthonormal together, their strengths, and how many; None without any."""
    s = torch.cat([task.s for task in tasks])
    if not len(s):
        return None
    left, left_rank = polar_factor(torch.cat([task.u for task in tasks], dim=1))
    right, right_rank = polar_factor(torch.cat([task.vh for task in tasks]).T)
    return left, s, right, {"triplets": len(s), "rank": min(left_rank, right_rank)}
