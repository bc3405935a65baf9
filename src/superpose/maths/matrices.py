"""Tensors as matrices: which tensors act as one, and the stack of task matrices that they hold."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from jaxtyping import Float
from torch import Tensor

from superpose.kinds import Kind


def is_depthwise(kind: Kind, shape: Sequence[int]) -> bool:
    """A kernel with one input channel per group is no matrix that acts on one input."""
    return kind is Kind.CONV and shape[1] == 1


def acts_as_matrix(kind: Kind, shape: Sequence[int]) -> bool:
    """Whether a tensor is a linear map, a stack of them, or a convolution that mixes channels."""
    return kind in (Kind.LINEAR, Kind.CONV) and len(shape) > 1 and not is_depthwise(kind, shape)


def as_matrices(stack: Float[Tensor, "tasks *shape"], kind: Kind) -> Float[Tensor, "maps tasks out in_"]:
    """Return task matrices, one stack per map that the tensor holds.

    A stack of experts (linear, 3-D) holds as many maps; a convolution is one, out x (in * kernel). The merged maps,
    reshaped to the tensor's shape, are the merged tensor.
    """
    shape = stack.shape[1:]
    if kind is Kind.LINEAR and len(shape) == 3:
        return stack.transpose(0, 1)
    return stack.reshape(1, len(stack), shape[0], prod(shape[1:]))
