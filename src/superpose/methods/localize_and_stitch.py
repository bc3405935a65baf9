"""Localize-and-Stitch, dataless form: each task's strongest entries, averaged where they overlap.

    localise  mask_i = the `density` entries of tau_i of largest magnitude, those that are zero left out
    stitch    merged = base + sum_i ( mask_i / max(1, sum_j mask_j) ) o tau_i

The threshold is one per task over the whole model. Where one task alone has a mask its update is copied in full; an
entry outside all masks stays at the base. The paper's other form learns the masks from a few examples.

Cost: one streaming pass as a rule and the merge, piece by piece. Prefer it for many tasks whose updates are sparse: it
leaves most of the base untouched, and interferes little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from jaxtyping import Float
from torch import Tensor

from superpose.maths.sparsify import Cuts, apply_cuts, keep_largest
from superpose.maths.streaming import MagnitudeSurvey
from superpose.options import Range
from superpose.registry import merge_method


@dataclass(frozen=True, kw_only=True)
class LocalizeAndStitchOptions:
    """Options of dataless Localize-and-Stitch."""

    density: Annotated[float, Range(0, 1)] = 0.05
    """Fraction of each task vector's entries in its mask (the authors' code: 0.05 language, 0.1 vision)."""
    density_scope: Literal["model", "tensor"] = "model"
    """Whether the masked entries are counted over the whole model (the authors') or in each tensor."""


@merge_method(
    "localize_and_stitch",
    options=LocalizeAndStitchOptions,
    source="He et al. 2024, arXiv:2408.13656, dataless localisation and stitching",
    whole_for=(),
    survey=MagnitudeSurvey(),
)
def localize_and_stitch(
    task_vectors: Float[Tensor, "tasks *shape"], options: LocalizeAndStitchOptions, *, survey: Cuts | None = None
) -> Float[Tensor, "*shape"]:
    """Average, entry by entry, the task vectors that have the entry in their mask.

    Args:
        task_vectors: tuned minus base.
        options: see `LocalizeAndStitchOptions`.
        survey: this tensor's cuts; when not given, the tensor is taken for the whole model.

    Returns:
        The merged task vector.
    """
    masked = apply_cuts(task_vectors, survey) if survey else keep_largest(task_vectors, options.density)
    overlaps = (masked != 0).sum(dim=0).clamp_min(1)
    return masked.sum(dim=0) / overlaps.to(masked.dtype)
