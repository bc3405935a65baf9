"""Iso-C: the sum of the task matrices with all its singular values made equal.

    S      = sum_i M_i = U diag(s) V^T,   M = mean(s) U V^T
    merged = base + scaling_factor * M;   what is not 2-D: scaling_factor * mean_i tau_i

Strong common directions no longer drown the weak ones that single tasks need. Over the numerical rank of S only: where
it is not full (few low-rank updates) the energy would otherwise go to arbitrary directions. The authors leave CLIP's
`text_projection` to the mean: a rule `{match: "*text_projection*", method: average}` does.

Cost: one decomposition, whatever the number of tasks. Prefer it for eight tasks and more; with one or two it distorts
what it merges. Its scaling factor is worth tuning.
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
from superpose.maths.svd import thin_svd
from superpose.methods.tsv import DECOMPOSED, TWO_DIMENSIONAL, Convolutions, is_decomposed, spectral_cost
from superpose.options import Range
from superpose.registry import Breach, Cache, Factored, Merged, MergedFactors, merge_method, remembered

AVERAGED = frozenset(Kind) - TWO_DIMENSIONAL


@dataclass(frozen=True, kw_only=True)
class IsoCOptions:
    """Options of Iso-C."""

    scaling_factor: Annotated[float, Range(-10, 10)] = 1.0
    """Factor on the merged task vector (alpha; searched up to 3 in the code)."""
    convolutions: Convolutions = "average"
    """Whether kernels that mix channels are averaged, as published, or decomposed as out x (in * kernel)."""


def _in_factors(tasks: Sequence[LowRank], options: IsoCOptions, kind: Kind) -> MergedFactors:
    if not is_decomposed(kind, tasks[0].shape, options.convolutions):
        return MergedFactors(total(tasks, [options.scaling_factor / len(tasks)] * len(tasks)))
    features = total(tasks).features()
    level = float(features.s.mean()) if features.count else 0.0
    update = LowRank(features.u * (options.scaling_factor * level), features.vh)
    return MergedFactors(update, {"rank": features.count, "singular_value": level})


@merge_method(
    "iso_c",
    options=IsoCOptions,
    source="Marczak et al. 2025, arXiv:2502.04959, Iso-C",
    whole_for=DECOMPOSED,
    cost=spectral_cost,
    breaks={
        "single": Breach("the task's singular values are made equal: diag(3, 1) gives diag(2, 2)", TWO_DIMENSIONAL),
        "same": Breach("T times the task, with its singular values made equal", TWO_DIMENSIONAL),
        "zero": Breach("what is not 2-D is averaged", AVERAGED),
    },
    factored=Factored(_in_factors),
)
def iso_c(
    task_vectors: Float[Tensor, "tasks *shape"], options: IsoCOptions, *, kind: Kind, cache: Cache | None = None
) -> Merged:
    """Sum the task matrices and flatten the spectrum.

    Args:
        task_vectors: tuned minus base.
        options: see `IsoCOptions`.
        kind: linear maps, embeddings and heads are decomposed where they are 2-D (stacks of experts map by map).
        cache: remembers merged matrices before scaling.

    Returns:
        The merged task vector; for matrices with the rank and the mean singular value.
    """
    if not is_decomposed(kind, task_vectors.shape[1:], options.convolutions):
        return Merged(options.scaling_factor * task_vectors.mean(dim=0))
    done = f"iso_c {replace(options, scaling_factor=1.0)}"
    merged = [
        remembered(cache, done, matrices, partial(_merge_matrices, matrices))
        for matrices in as_matrices(task_vectors, kind)
    ]
    tensor = torch.stack([matrix.tensor for matrix in merged]).reshape(task_vectors.shape[1:])
    return Merged(options.scaling_factor * tensor, isotropic_stats(merged))


def isotropic_stats(merged: Sequence[Merged]) -> dict[str, float]:
    """Return the rank of all maps of a tensor together, and their mean singular value."""
    rank = sum(int(matrix.stats["rank"]) for matrix in merged)
    return {"rank": rank, "singular_value": sum(matrix.stats["singular_value"] for matrix in merged) / len(merged)}


def _merge_matrices(matrices: Float[Tensor, "tasks out in_"]) -> Merged:
    features = thin_svd(matrices.sum(dim=0))
    level = float(features.s.mean()) if features.count else 0.0
    return Merged(level * (features.u @ features.vh), {"rank": features.count, "singular_value": level})
