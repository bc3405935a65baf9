"""Localize-and-Stitch: each task's part of the weights, averaged where parts overlap.

    localise  mask_i = the `density` entries of tau_i of largest magnitude, those that are zero left out, or
              mask_i = round(sigma(S_i)),  S_i minimising  loss_i(base + sigma(S_i) o tau_i) + l1 sum sigma(S_i)
    stitch    merged = base + sum_i ( mask_i / max(1, sum_j mask_j) ) o tau_i

`masks: learned` is the second, from labelled examples of each task. S_i begins at +5 on the `initial_density` largest
entries and at -5 elsewhere; a step over all examples takes

    learning_rate (dloss/dtheta o tau_i o sigma') + l1 sigma'

from S_i, with `l1` in the authors' units (the objective's is l1 / learning_rate). Theirs has the last term with the
sign of -S_i instead (`regulariser: binarise`), which pushes away from 0 and does not shrink the mask. A threshold is
one per task over the whole model. Where one task alone has a mask its update is copied in full; an entry outside all
masks stays at the base.

Cost: one streaming pass as a rule and the merge, piece by piece. Learning holds the model, its gradient, S_i and tau_i
of a task at a time: `epochs` passes over its examples, forward and back. Prefer it for many tasks whose updates are
sparse: it leaves most of the base untouched, and interferes little.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from superpose.maths.sparsify import Cuts, apply_cuts, keep_largest
from superpose.maths.streaming import MagnitudeSurvey, TensorChunks
from superpose.options import Range
from superpose.registry import merge_method


@dataclass(frozen=True, kw_only=True)
class LocalizeAndStitchOptions:
    """Options of Localize-and-Stitch."""

    masks: Literal["magnitude", "learned"] = "magnitude"
    """Whether masks are the largest entries, without data, or learned from labelled examples of each task."""
    density: Annotated[float, Range(0, 1)] = 0.05
    """Fraction of each task vector's entries in its mask (the authors' code: 0.05 language, 0.1 vision)."""
    density_scope: Literal["model", "tensor"] = "model"
    """Whether the masked entries are counted over the whole model (the authors') or in each tensor."""
    initial_density: Annotated[float, Range(0, 1)] = 1e-5
    """Fraction of each task vector's entries in its mask when learning begins (the authors' code)."""
    epochs: Annotated[int, Range(0, 10_000)] = 10
    """Steps of learning, each over all examples of the task."""
    learning_rate: Annotated[float, Range(0, 1e12)] = 1e8
    """Of gradient descent on S_i, for the mean loss (the authors' code: 1e7 for the sum over its 8 to 64 batches)."""
    l1: Annotated[float, Range(0, 1e6)] = 1.0
    """Pull of every entry out of the mask (the authors' code: 1 vision, 10 language)."""
    regulariser: Literal["shrink", "binarise"] = "shrink"
    """Whether that pull is the paper's, out of the mask, or the authors' code's, away from 0."""

    def initial(self) -> LocalizeAndStitchOptions:
        """Return the options of the masks that learning begins with."""
        return replace(self, masks="magnitude", density=self.initial_density, density_scope="model")


class LocalizeAndStitchSurvey(MagnitudeSurvey):
    """The thresholds of the largest entries; none where masks are learned."""

    def passes(self, options: LocalizeAndStitchOptions, dtype: torch.dtype) -> int:
        """Return the passes for the thresholds."""
        return 0 if options.masks == "learned" else super().passes(options, dtype)

    def reads(self, options: LocalizeAndStitchOptions, dtype: torch.dtype) -> int:
        """Return how often the model is read as a rule."""
        return 0 if options.masks == "learned" else super().reads(options, dtype)

    def for_tensor(self, name: str, chunks: TensorChunks, state, options: LocalizeAndStitchOptions) -> Cuts | None:
        """Return the cuts of one tensor; None where masks are learned."""
        return None if options.masks == "learned" else super().for_tensor(name, chunks, state, options)


@merge_method(
    "localize_and_stitch",
    options=LocalizeAndStitchOptions,
    source="He et al. 2024, arXiv:2408.13656, localisation with and without data, and stitching",
    whole_for=(),
    survey=LocalizeAndStitchSurvey(),
    learns=lambda options: options.masks == "learned",
)
def localize_and_stitch(
    task_vectors: Float[Tensor, "tasks *shape"],
    options: LocalizeAndStitchOptions,
    *,
    survey: Cuts | None = None,
    learned: Bool[Tensor, "tasks *shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Average, entry by entry, the task vectors that have the entry in their mask.

    Args:
        task_vectors: tuned minus base.
        options: see `LocalizeAndStitchOptions`.
        survey: this tensor's cuts; when not given, the tensor is taken for the whole model.
        learned: the masks, where they are to be learned; empty ones when not given.

    Returns:
        The merged task vector.
    """
    if options.masks == "learned":
        masked = torch.zeros_like(task_vectors) if learned is None else torch.where(learned, task_vectors, 0.0)
    else:
        masked = apply_cuts(task_vectors, survey) if survey else keep_largest(task_vectors, options.density)
    overlaps = (masked != 0).sum(dim=0).clamp_min(1)
    return masked.sum(dim=0) / overlaps.to(masked.dtype)
