"""Iso-Share: each direction to the tasks by their share of it, all singular values equal, the strength the tasks' own.

    use       L_i = U_i diag(w_i) U_i^T + background I,  R_i likewise of V_i,  w_i = s_i / mean(s_i)
    share     S = L^-1 (sum_i L_i M_i R_i) R^-1,   L = sum_i L_i,  R = sum_i R_i
    flatten   S = U diag(s) V^T,   F = U V^T
    strength  a = sum_ik s_ik^2 / sum_ik s_ik |u_ik . F v_ik|,   at most the largest s_ik
    merged    base + scaling_factor * a * F;   what is no matrix: scaling_factor * mean_i tau_i

It joins what two methods found: which directions go to whom is decided as in STF by the features of all tasks
together, and how strongly they act as in Iso-C, all alike. Beside them, a scaling factor for each matrix in closed
form: at 1 the tasks' features are answered, on the average weighted by strength, as they were. So there is little to
tune: an encoder of text did best at 1, a convolutional network at 0.7 to 0.85, and 0.85 costs either next to nothing.
The derivation, and what was tried, is in docs/iso-share.md.

Cost: T + 1 decompositions, and two systems of out and of in unknowns. Prefer it for several tasks: it was tried on
full fine-tunes of six and of eight, and on three adapters. With one or two it distorts what it merges, as Iso-C does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from superpose.kinds import MATRIX_KINDS, Kind
from superpose.maths.low_rank import LowRank, total, zero
from superpose.maths.matrices import acts_as_matrix, as_matrices
from superpose.maths.shares import shared_out
from superpose.maths.side_by_side import side_by_side
from superpose.maths.svd import ROUNDING, Features, thin_svd
from superpose.methods.iso_c import isotropic_stats
from superpose.options import Range
from superpose.registry import Breach, Cache, Cost, Factored, Merged, MergedFactors, merge_method, remembered

AVERAGED = frozenset(Kind) - MATRIX_KINDS
NOISE = 2e-12
"""Share of the strongest feature that two solves in float64 can add in any direction."""
MOST_BESIDE = 4
"""Decompositions of one tensor at the same time."""


@dataclass(frozen=True, kw_only=True)
class IsoShareOptions:
    """Options of Iso-Share."""

    scaling_factor: Annotated[float, Range(-10, 10)] = 0.85
    """Factor on the merged task vector; at 1 features are answered with all of their strength."""
    background: Annotated[float, Range(1e-6, 1e6)] = 0.3
    """How much a task uses directions that it has no feature in; its features' mean use is 1."""


def iso_share_cost(shape: Sequence[int], tasks: int, options: object) -> Cost:
    """Return what one matrix takes: T + 1 decompositions, and two systems in float64."""
    del options
    out, in_ = shape[0], prod(shape[1:])
    small = min(out, in_)
    kept = 4 * (tasks * small * (out + in_) + (tasks + 2) * out * in_)
    decomposing = min(tasks, MOST_BESIDE) * (16 * out * in_ + 32 * small**2)
    # Features in float64 are one task's, or all of them where the background asks for it.
    solving = 8 * (2 * max(out, in_) ** 2 + 3 * out * in_ + tasks * small * max(out, in_))
    flops = (tasks + 1) * (2.0 * out * in_ * small + 12.0 * small**3)
    flops += tasks * small * (out + in_) ** 2 + (out**3 + in_**3) / 3 + 2.0 * out * in_ * (out + in_)
    return Cost(kept + max(decomposing, solving), flops)


def _in_factors(tasks: Sequence[LowRank], options: IsoShareOptions, kind: Kind) -> MergedFactors:
    """Merge in bases of the columns and rows that the tasks have together: outside of them is nothing to share."""
    if kind not in MATRIX_KINDS:
        return MergedFactors(total(tasks, [options.scaling_factor / len(tasks)] * len(tasks)))
    found = [features for task in tasks if (features := task.features()).count]
    if not found:
        return MergedFactors(zero(tasks[0].shape, tasks[0].left), {"rank": 0, "singular_value": 0.0})
    columns = torch.linalg.qr(torch.cat([task.u.double() for task in found], dim=1)).Q
    rows = torch.linalg.qr(torch.cat([task.vh.double() for task in found]).T).Q
    inner = [Features(columns.T @ task.u.double(), task.s.double(), task.vh.double() @ rows) for task in found]
    flat = _flattened(inner, options.background, tasks[0].left.dtype)
    level = _strength(inner, flat.u @ flat.vh)
    left = (columns @ flat.u.double()) * (options.scaling_factor * level)
    update = LowRank(left.to(tasks[0].left), (flat.vh.double() @ rows.T).to(tasks[0].left))
    return MergedFactors(update, {"rank": flat.count, "singular_value": level})


@merge_method(
    "iso_share",
    options=IsoShareOptions,
    source="superpose, docs/iso-share.md; after Marczak et al. 2025, arXiv:2502.04959, and Qiu et al. 2025",
    whole_for=MATRIX_KINDS,
    cost=iso_share_cost,
    breaks={
        "single": Breach("the task's singular values are made equal: diag(3, 1) gives diag(2.5, 2.5)", MATRIX_KINDS),
        "same": Breach("of T identical tasks comes what comes of one", MATRIX_KINDS),
        "zero": Breach("what is no matrix is averaged", AVERAGED),
    },
    factored=Factored(_in_factors),
)
def iso_share(
    task_vectors: Float[Tensor, "tasks *shape"], options: IsoShareOptions, *, kind: Kind, cache: Cache | None = None
) -> Merged:
    """Share directions out among the tasks, flatten the spectrum, and give it the tasks' strength.

    Args:
        task_vectors: tuned minus base.
        options: see `IsoShareOptions`.
        kind: linear maps and convolutions that mix channels are matrices (stacks of experts map by map).
        cache: remembers merged matrices before scaling.

    Returns:
        The merged task vector; for matrices with the rank and the singular value.
    """
    if not acts_as_matrix(kind, task_vectors.shape[1:]) or not task_vectors.numel():
        return Merged(options.scaling_factor * task_vectors.mean(dim=0))
    done = f"iso_share {replace(options, scaling_factor=1.0)}"
    merged = [
        remembered(cache, done, matrices, partial(_merge_matrices, matrices, options.background))
        for matrices in as_matrices(task_vectors, kind)
    ]
    tensor = torch.stack([matrix.tensor for matrix in merged]).reshape(task_vectors.shape[1:])
    return Merged(options.scaling_factor * tensor, isotropic_stats(merged))


def _merge_matrices(matrices: Float[Tensor, "tasks out in_"], background: float) -> Merged:
    found = [task for task in side_by_side(thin_svd, list(matrices), most=MOST_BESIDE) if task.count]
    if not found:
        return Merged(torch.zeros_like(matrices[0]), {"rank": 0, "singular_value": 0.0})
    flat = _flattened(found, background, matrices.dtype)
    matrix = flat.u @ flat.vh
    level = _strength(found, matrix)
    return Merged(level * matrix, {"rank": flat.count, "singular_value": level})


def _flattened(tasks: Sequence[Features], background: float, dtype: torch.dtype) -> Features:
    """Return the singular vectors of what is shared out."""
    flat = thin_svd(shared_out(tasks, background).to(dtype))
    # No more directions than the features span; what rounding leaves, of the systems or of tasks that cancel out, would
    # be made as strong as the rest.
    strongest = max(float(one.s[0]) for one in (flat, *tasks) if one.count)
    noise = max(NOISE, ROUNDING * torch.finfo(dtype).eps) * strongest
    count = min(sum(task.count for task in tasks), int((flat.s > noise).sum()))
    return flat.take(0, count)


def _strength(tasks: Sequence[Features], matrix: Float[Tensor, "out in_"]) -> float:
    """Return the factor at which a matrix with a flat spectrum answers the features as strongly as they are."""
    squares = answered = largest = 0.0
    for task in tasks:
        s = task.s.double()
        answers = ((matrix @ task.vh.to(matrix).T) * task.u.to(matrix)).sum(dim=0).double()
        squares += float(s @ s)
        answered += float(s @ answers.abs())
        largest = max(largest, float(s[0]))
    # Tasks that contradict each other leave directions that answer hardly anything.
    return min(squares / answered, largest) if answered > 0 else 0.0
