"""Model Stock: between the base and the average, where the angle between the fine-tunes says.

    c      = mean over pairs of cos(tau_i, tau_j)
    t      = T c / (1 + (T - 1) c)
    merged = t * mean_i tuned_i + (1 - t) * base

Per tensor, or per output row (`granularity: row`). The more the fine-tunes agree, the nearer to their average; where
they are orthogonal the base stays. A negative mean cosine gives 0, with a warning. A task vector of zeros is
orthogonal to all.

Cost: one pass; each tensor as a whole. Prefer it for several runs of one task, which it was made for: on fine-tunes for
different tasks, which are nearly orthogonal, it stays near the base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from superpose.maths.sphere import gram_matrix, mean_cosine
from superpose.registry import Caution, Merged, merge_method


@dataclass(frozen=True, kw_only=True)
class ModelStockOptions:
    """Options of Model Stock."""

    granularity: Literal["tensor", "row"] = "tensor"
    """Whether one angle is measured per tensor (the paper's layer-wise) or one per output row (filter-wise)."""


@merge_method(
    "model_stock",
    options=ModelStockOptions,
    source="Jang et al. 2024, arXiv:2403.19522, the interpolation ratio; no official code: mean of cosines for T > 2",
    models=(2, None),
    breaks={"zero": "a model that is the base is orthogonal to all others and pulls towards the base"},
)
def model_stock(task_vectors: Float[Tensor, "tasks *shape"], options: ModelStockOptions) -> Merged:
    """Scale the mean task vector by how far the tasks agree.

    Args:
        task_vectors: tuned minus base, of two tasks or more.
        options: see `ModelStockOptions`.

    Returns:
        The merged task vector, with the mean cosine and the share of the average.
    """
    tasks, shape = len(task_vectors), task_vectors.shape[1:]
    if tasks < 2:
        raise ValueError("Model Stock measures angles between task vectors: it needs two or more")
    mean = task_vectors.mean(dim=0)
    if not mean.numel():
        return Merged(mean)
    by_row = options.granularity == "row" and len(shape) > 1
    rows = task_vectors.reshape(tasks, shape[0] if by_row else 1, -1).transpose(0, 1)
    cosine = mean_cosine(gram_matrix(rows))
    # Below 0 the formula turns the mean round, and at -1 / (T - 1) it divides by zero.
    agreeing = cosine.clamp(0, 1)
    share = tasks * agreeing / (1 + (tasks - 1) * agreeing)
    opposed = int((cosine < 0).sum())
    cautions = ()
    if opposed:
        where = f"{opposed} of {len(cosine)} rows" if by_row else f"mean cosine {float(cosine[0]):.2g}"
        cautions = (Caution(f"the fine-tunes point away from each other ({where}): the base stays there"),)
    merged = mean.reshape(len(cosine), -1) * share.to(mean)[:, None]
    stats = {"cosine": float(cosine.mean()), "share": float(share.mean())}
    return Merged(merged.reshape(shape), stats, cautions)
