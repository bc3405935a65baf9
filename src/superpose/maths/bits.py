"""Masks of one bit an entry."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor


def pack(mask: Bool[Tensor, "*shape"]) -> UInt8[Tensor, " bytes"]:
    """Return a mask as bits, eight to a byte, the first entry lowest; the last byte is filled up with zeros."""
    return torch.from_numpy(np.packbits(mask.reshape(-1).numpy(force=True), bitorder="little"))


def unpack(packed: UInt8[Tensor, " bytes"], count: int) -> Bool[Tensor, " count"]:
    """Return the first `count` entries of a packed mask."""
    bits = np.unpackbits(packed.numpy(force=True), count=count, bitorder="little")
    return torch.from_numpy(bits.view(bool))


def packed_bytes(count: int) -> int:
    """Return the bytes that a mask of so many entries takes."""
    return (count + 7) // 8
