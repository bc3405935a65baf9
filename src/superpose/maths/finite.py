"""Whether a tensor holds NaN or infinity."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Return whether no entry is NaN or infinite."""
    # One sum is a fourth of the cost of asking every entry; only a sum that is not finite needs the answer.
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())
