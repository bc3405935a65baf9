"""What a tensor is in its network: the kinds that methods tell apart."""

from __future__ import annotations

from enum import Enum


class Kind(str, Enum):
    """What a tensor is in its network."""

    LINEAR = "linear"
    """Weight of a linear map, 2-D (or a stack of such weights, 3-D)."""
    CONV = "conv"
    """Weight of a convolution, 3-D or more: out, in / groups, kernel."""
    NORM = "norm"
    """Scale or shift of a LayerNorm, RMSNorm, BatchNorm or GroupNorm."""
    BIAS = "bias"
    """1-D additive term of a linear map or convolution."""
    EMBEDDING = "embedding"
    """Lookup table or free vector: tokens, positions, class token."""
    HEAD = "head"
    """Output projection to a vocabulary or to classes."""
    SCALAR = "scalar"
    """Learned value with one element, such as CLIP's logit scale."""
    BUFFER = "buffer"
    """Not a parameter: running statistics, position ids, masks."""

    def __str__(self) -> str:
        return self.value


MATRIX_KINDS = frozenset({Kind.LINEAR, Kind.CONV})
"""Kinds whose tensors act as matrices."""
