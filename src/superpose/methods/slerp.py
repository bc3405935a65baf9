"""SLERP: the point between two models on the arc of the sphere, tensor by tensor.

    c = <a, b> / (|a| |b|),  angle = arccos c
    merged = [ sin((1 - t) angle) a + sin(t angle) b ] / sin(angle)

a and b are the weights of two fine-tunes, or of the base and one fine-tune. Nearly parallel tensors (|c| > 0.9995) and
those of norm below 1e-8 are interpolated along the straight line. Fine-tunes of one base are nearly parallel as
weights, so that most of their tensors end there: close to an average.

Cost: one pass; each tensor as a whole. Prefer it for two models of like quality, to find a blend between them by `t`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from jaxtyping import Float
from torch import Tensor

from superpose.maths import sphere
from superpose.options import Range
from superpose.registry import merge_method


@dataclass(frozen=True, kw_only=True)
class SlerpOptions:
    """Options of SLERP."""

    t: Annotated[float, Range(0, 1)] = 0.5
    """Share of the way from the first model to the second (usual: the middle)."""


@merge_method(
    "slerp",
    options=SlerpOptions,
    source="Shoemake 1985, Animating rotation with quaternion curves; on weights as popularised by mergekit",
    acts_on="weights",
    models=(1, 2),
    breaks={
        "single": "one fine-tune is interpolated with the base; t = 1 returns it",
        "scale": "the angle is between weights, not between task vectors",
    },
)
def slerp(
    tuned: Float[Tensor, "tasks *shape"], options: SlerpOptions, *, base: Float[Tensor, "*shape"] | None = None
) -> Float[Tensor, "*shape"]:
    """Interpolate two tensors on the sphere.

    Args:
        tuned: the weights of one or two fine-tunes.
        options: see `SlerpOptions`.
        base: the base's weights; the first model where there is one fine-tune.

    Returns:
        The merged weights.
    """
    if len(tuned) > 2 or (len(tuned) == 1 and base is None):
        raise ValueError("slerp is between two models")
    first = tuned[0] if len(tuned) == 2 else base
    assert first is not None
    return sphere.slerp(first, tuned[-1], options.t)
