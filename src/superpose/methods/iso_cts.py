"""Iso-CTS: Iso-C's common directions, and beside them some of each task's own.

    S      = sum_i M_i = U diag(s) V^T;  the c leading triplets are the common ones
    own    = the p leading triplets of (I - U_c U_c^T) M_i, for every task i
    M      = mean(all kept singular values) * polar(all left vectors) polar(all right vectors)^T
    merged = base + scaling_factor * M;   what is not 2-D: scaling_factor * mean_i tau_i

c is about `common_fraction` of min(out, in), such that T p are the rest. Directions of numerical rank only, and where
vectors of several tasks coincide, the polar factor of smallest norm. The authors leave CLIP's `text_projection` to the
mean: a rule `{match: "*text_projection*", method: average}` does.

Cost: T + 1 decompositions and two of out x min(out, in) and in x min(out, in). Prefer it over Iso-C for many diverse
tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.kinds import Kind
from superpose.maths.low_rank import LowRank, total
from superpose.maths.matrices import as_matrices
from superpose.maths.orthogonal import polar_factor
from superpose.maths.svd import Features, thin_svd
from superpose.methods.tsv import DECOMPOSED, TWO_DIMENSIONAL, Convolutions, is_decomposed, spectral_cost
from superpose.options import Range
from superpose.registry import Breach, Cache, Factored, Merged, MergedFactors, merge_method, remembered


@dataclass(frozen=True, kw_only=True)
class IsoCtsOptions:
    """Options of Iso-CTS."""

    scaling_factor: Annotated[float, Range(-10, 10)] = 1.0
    """Factor on the merged task vector (alpha; searched up to 3 in the code)."""
    common_fraction: Annotated[float, Range(0, 1)] = 0.8
    """Fraction of the directions that are taken from the sum of all tasks (0.8 in the paper)."""
    convolutions: Convolutions = "average"
    """Whether kernels that mix channels are averaged, as published, or decomposed as out x (in * kernel)."""


def _in_factors(tasks: Sequence[LowRank], options: IsoCtsOptions, kind: Kind) -> MergedFactors:
    if not is_decomposed(kind, tasks[0].shape, options.convolutions):
        return MergedFactors(total(tasks, [options.scaling_factor / len(tasks)] * len(tasks)))
    shape = tasks[0].shape
    common_count, own_count = share_directions(min(shape), len(tasks), options.common_fraction)
    common = total(tasks).features().take(0, common_count)
    parts = [common]
    for task in tasks:
        rest = LowRank(task.left - common.u @ (common.u.T @ task.left), task.right)
        parts.append(_above_rounding(rest.features(), max(shape), task.norm(), own_count))
    s, left, right, stats = _together(parts)
    level = options.scaling_factor * float(s.mean()) if len(s) else 0.0
    return MergedFactors(LowRank(level * left, right.T), stats)


@merge_method(
    "iso_cts",
    options=IsoCtsOptions,
    source="Marczak et al. 2025, arXiv:2502.04959, Iso-CTS",
    whole_for=DECOMPOSED,
    cost=spectral_cost,
    breaks={
        "single": Breach("the task's singular values are made equal: diag(3, 1) gives diag(2, 2)", TWO_DIMENSIONAL),
        "same": Breach("the mean runs over singular values of T times the task, made equal", TWO_DIMENSIONAL),
        "zero": "one task more leaves fewer directions to each; what is not 2-D is averaged",
    },
    factored=Factored(_in_factors),
)
def iso_cts(
    task_vectors: Float[Tensor, "tasks *shape"], options: IsoCtsOptions, *, kind: Kind, cache: Cache | None = None
) -> Merged:
    """Put common and task-specific directions together, and flatten the spectrum.

    Args:
        task_vectors: tuned minus base.
        options: see `IsoCtsOptions`.
        kind: linear maps, embeddings and heads are decomposed where they are 2-D (stacks of experts map by map).
        cache: remembers merged matrices before scaling.

    Returns:
        The merged task vector; for matrices with the number of common and of own directions.
    """
    if not is_decomposed(kind, task_vectors.shape[1:], options.convolutions):
        return Merged(options.scaling_factor * task_vectors.mean(dim=0))
    done = f"iso_cts {replace(options, scaling_factor=1.0)}"
    merged = [
        remembered(cache, done, matrices, partial(_merge_matrices, matrices, options))
        for matrices in as_matrices(task_vectors, kind)
    ]
    tensor = torch.stack([matrix.tensor for matrix in merged]).reshape(task_vectors.shape[1:])
    stats = {name: sum(int(matrix.stats[name]) for matrix in merged) for name in merged[0].stats}
    return Merged(options.scaling_factor * tensor, stats)


def share_directions(directions: int, tasks: int, common_fraction: float) -> tuple[int, int]:
    """Return how many directions are common, and how many each task gets of its own, for min(out, in) of them."""
    # The 1e-9 undoes binary rounding: 0.29 * 100 is 28.999999999999996.
    rest = directions - int(common_fraction * directions + 1e-9)
    own = min(round(rest / tasks), directions // tasks)
    return directions - own * tasks, own


def _merge_matrices(matrices: Float[Tensor, "tasks out in_"], options: IsoCtsOptions) -> Merged:
    common_count, own_count = share_directions(min(matrices.shape[1:]), len(matrices), options.common_fraction)
    common = thin_svd(matrices.sum(dim=0)).take(0, common_count)
    parts = [common, *(_own(matrix, common, own_count) for matrix in matrices)]
    s, left, right, stats = _together(parts)
    if not len(s):
        return Merged(torch.zeros_like(matrices[0]), stats)
    return Merged(float(s.mean()) * (left @ right.T), stats)


def _together(
    parts: Sequence[Features],
) -> tuple[Float[Tensor, " k"], Float[Tensor, "out k"], Float[Tensor, "in_ k"], dict[str, int]]:
    """Return the strengths of common (first) and own features, their vectors made orthonormal, and how many."""
    s = torch.cat([part.s for part in parts])
    left, _ = polar_factor(torch.cat([part.u for part in parts], dim=1))
    right, _ = polar_factor(torch.cat([part.vh for part in parts]).T)
    return s, left, right, {"common": parts[0].count, "own": len(s) - parts[0].count}


def _own(matrix: Float[Tensor, "out in_"], common: Features, count: int) -> Features:
    """Return the leading features of what the common left directions leave of a task matrix."""
    rest = matrix - common.u @ (common.u.T @ matrix)
    return _above_rounding(thin_svd(rest), max(matrix.shape), float(torch.linalg.matrix_norm(matrix)), count)


def _above_rounding(features: Features, size: int, norm: float, count: int) -> Features:
    """Return the leading features that are more than what rounding leaves of a matrix of this size and norm.

    What it leaves of a matrix that lies in the common directions is no feature of the task.
    """
    noise = size * torch.finfo(features.s.dtype).eps * norm
    return features.take(0, min(count, int((features.s > noise).sum())))
