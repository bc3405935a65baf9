"""EfficientNet-lite0: inverted residuals without attention, under the tensor names that its published weights have.

Architecture: Tan and Le 2019, arXiv:1905.11946, table 1; the lite variant has ReLU6 and no squeeze-and-excitation.
Convolutions pad as TensorFlow does, the odd pixel at the far end.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320))  # fmt: skip
"""Blocks, kernel, stride of the first, expansion, channels that come out."""
STEM, FEATURES = 32, 1280
"""Channels that the stem makes, and features of an image."""


class SameConv2d(nn.Conv2d):
    """A convolution without bias whose output has ceil(side / stride) pixels a side."""

    def __init__(self, in_: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_, out, kernel, stride, groups=groups, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the convolution of images, shape (images, out, ceil(height / stride), ceil(width / stride))."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = []
        for side in (images.shape[3], images.shape[2]):
            lacking = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
            pads += [lacking // 2, lacking - lacking // 2]
        return super().forward(nn.functional.pad(images, pads) if any(pads) else images)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """An inverted residual: expanded, filtered channel by channel, projected."""

    def __init__(self, in_: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = in_ * expansion
        self.adds = stride == 1 and in_ == out
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv, self._bn0 = SameConv2d(in_, wide, 1), _norm(wide)
        self._depthwise_conv, self._bn1 = SameConv2d(wide, wide, kernel, stride, groups=wide), _norm(wide)
        self._project_conv, self._bn2 = SameConv2d(wide, out, 1), _norm(out)

    def forward(self, images: Tensor) -> Tensor:
        """Return the block's output."""
        inner = images
        if self.expands:
            inner = nn.functional.relu6(self._bn0(self._expand_conv(inner)))
        inner = nn.functional.relu6(self._bn1(self._depthwise_conv(inner)))
        inner = self._bn2(self._project_conv(inner))
        return inner + images if self.adds else inner


class Body(nn.Module):
    """EfficientNet-lite0 without its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv2d(3, STEM, 3, 2), _norm(STEM)
        blocks, channels = [], STEM
        for count, kernel, stride, expansion, out in STAGES:
            for number in range(count):
                blocks.append(Block(channels, out, kernel, stride if number == 0 else 1, expansion))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv2d(channels, FEATURES, 1), _norm(FEATURES)

    def forward(self, images: Tensor) -> Tensor:
        """Return features of images, shape (images, 1280), from shape (images, 3, height, width) about -1 to 1."""
        inner = nn.functional.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            inner = block(inner)
        return nn.functional.relu6(self._bn1(self._conv_head(inner))).mean(dim=(2, 3))


def published(file: Path) -> dict[str, Tensor]:
    """Return the published weights of the body, without the classifier."""
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("_fc.")}
