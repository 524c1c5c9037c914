"""YOLOv8's heads, written from the published architecture: detect, segment, pose, obb and classify.

Parameter names are those of released checkpoints. No code of the Ultralytics package was read or copied.
"""
# pyright: reportUnknownMemberType=false
# (torch's split has no types)

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from exporters.models.yolov8_scales import STRIDES

REG_MAX = 16  # bins of the distribution over each of a box's four distances
MASKS = 32  # coefficients of an anchor, and prototypes that they weigh


class Conv(nn.Module):
    """Convolution without bias, batch normalization and SiLU: (B, c1, H, W) -> (B, c2, H/stride, W/stride)."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn: nn.BatchNorm2d | None = nn.BatchNorm2d(c2, momentum=0.03)
        self.linear = False

    def forward(self, x: Tensor) -> Tensor:
        # Neither SiLU nor a folded normalization is a module: TorchScript's tracer takes 1 ms for each.
        y = self.conv(x)
        if self.bn is not None:
            y = self.bn(y)
        return y if self.linear else functional.silu(y)

    def fuse(self) -> None:
        """Folds the batch normalization into the convolution, in place: (w·x - mean)·gain/sqrt(var + eps) + bias."""
        bn = self.bn
        if bn is not None:
            assert bn.running_mean is not None
            assert bn.running_var is not None
            # Not fuse_conv_bn_eval, which copies the convolution first.
            self.conv.weight, self.conv.bias = torch.nn.utils.fuse_conv_bn_weights(
                self.conv.weight, None, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
            )
            self.bn = None


class DFL(nn.Module):
    """Expectation of the distribution over distances: (B, 64, A) -> (B, 4, A), in cells."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(REG_MAX, 1, 1, bias=False)
        self.conv.weight.data[:] = torch.arange(REG_MAX, dtype=torch.float32).view(1, REG_MAX, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        # A product and not the convolution that holds the weights: that one wants the bins in front, a transposition.
        a = x.shape[2]
        return torch.matmul(self.conv.weight.view(1, REG_MAX), x.view(-1, 4, REG_MAX, a).softmax(2)).view(-1, 4, a)


class Decode(nn.Module):
    """Distances (B, 4, A) in cells and class logits (B, nc, A) -> (B, 4 + nc, A): cx, cy, w, h in pixels, and scores.

    What else an anchor has (B, n, A), decoded already, follows as it is.

    A module of its own, though without parameters, so that graphs name its operators and conversions can leave them in
    FP32: coordinates reach the image size, where FP16 resolves half a pixel only (IEEE 754: 10 bits of fraction).
    """

    def forward(self, distances: Tensor, logits: Tensor, anchors: Tensor, strides: Tensor, *more: Tensor) -> Tensor:
        left_top, right_bottom = cast("tuple[Tensor, ...]", distances.split((2, 2), 1))
        centre = anchors + (right_bottom - left_top) * 0.5
        boxes = torch.cat((centre, left_top + right_bottom), 1) * strides
        return torch.cat((boxes, logits.sigmoid(), *more), 1)


class DecodeRotated(nn.Module):
    """As Decode, of boxes turned by an angle (B, 1, A) in radians, which follows the scores."""

    def forward(self, distances: Tensor, logits: Tensor, anchors: Tensor, strides: Tensor, angle: Tensor) -> Tensor:
        left_top, right_bottom = cast("tuple[Tensor, ...]", distances.split((2, 2), 1))
        x, y = cast("tuple[Tensor, ...]", ((right_bottom - left_top) * 0.5).split((1, 1), 1))
        cos, sin = angle.cos(), angle.sin()
        centre = anchors + torch.cat((x * cos - y * sin, x * sin + y * cos), 1)
        boxes = torch.cat((centre, left_top + right_bottom), 1) * strides
        return torch.cat((boxes, logits.sigmoid(), angle), 1)


class Points(nn.Module):
    """Key points (B, K * D, A) -> the same with x, y in pixels and, where D is 3, the visibility in 0..1."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.count, self.values = shape

    def forward(self, raw: Tensor, anchors: Tensor, strides: Tensor) -> Tensor:
        points = raw.view(-1, self.count, self.values, raw.shape[2])
        xy = (points[:, :, :2] * 2.0 + (anchors - 0.5)) * strides
        parts = (xy, points[:, :, 2:].sigmoid()) if self.values == 3 else (xy,)
        return torch.cat(parts, 2).view(-1, self.count * self.values, raw.shape[2])


class Anchors(nn.Module):
    """Sizes (height, width) of three levels -> cell centres (1, 2, A) in cells, and strides (1, A) in pixels a cell.

    Row-major, P3 to P5. A module of its own for the reason that Decode has: where sizes vary, it computes.
    """

    def forward(self, sizes: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
        points: list[Tensor] = []
        strides: list[Tensor] = []
        for (h, w), stride in zip(sizes, STRIDES, strict=True):
            # Arithmetic in FP32 even for an FP16 model: with half-integers up to 2048 FP16 would still be exact, but
            # the sums in Decode would not.
            gx = torch.arange(w, device=device, dtype=torch.float32) + 0.5
            gy = torch.arange(h, device=device, dtype=torch.float32) + 0.5
            cells = torch.stack((gx.view(1, -1).expand(h, w), gy.view(-1, 1).expand(h, w))).view(1, 2, -1)
            points.append(cells)
            strides.append(torch.ones_like(cells[:, :1, :]) * stride)
        return torch.cat(points, 2), torch.cat(strides, 2)


class Detect(nn.Module):
    """Head: three feature maps -> (B, 4 + nc, A): boxes as cx, cy, w, h in pixels, then the classes' scores in 0..1.

    Args:
        nc: number of classes.
        channels: of the feature maps P3, P4, P5.
        extra: values of an anchor beside box and classes, which a subclass gives a meaning.
    """

    def __init__(self, nc: int, channels: Sequence[int], extra: int = 0) -> None:
        super().__init__()
        self.nc = nc
        self.cv2 = self._branches(channels, max(16, channels[0] // 4, 4 * REG_MAX), 4 * REG_MAX)
        self.cv3 = self._branches(channels, max(channels[0], min(nc, 100)), nc)
        if extra:
            self.cv4 = self._branches(channels, max(channels[0] // 4, extra), extra)
        self.dfl = DFL()
        self.decode: nn.Module = Decode()
        self.anchors = Anchors()
        self.dynamic = False

    @staticmethod
    def _branches(channels: Sequence[int], hidden: int, outputs: int) -> nn.ModuleList:
        """For each feature map two 3x3 convolutions and a plain 1x1: (B, C, H, W) -> (B, outputs, H, W)."""
        return nn.ModuleList(
            nn.Sequential(Conv(c, hidden, 3), Conv(hidden, hidden, 3), nn.Conv2d(hidden, outputs, 1)) for c in channels
        )

    def forward(self, *xs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.decode(*self.raw(xs))

    def raw(self, xs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Distances (B, 4, A) in cells, class logits (B, nc, A), cell centres (1, 2, A) and strides (1, A)."""
        # Boxes and classes are joined apart: joined together and split again, each value would be copied twice more.
        box = self.flat(xs, self.cv2)
        logits = self.flat(xs, self.cv3)
        # While a graph is traced a shape is a tensor. Where the size is fixed it is made a number, so that the anchors
        # become constants; where it is dynamic it stays, so that they are computed from the input.
        shapes = [(x.shape[2], x.shape[3]) for x in xs]
        sizes = shapes if self.dynamic else [(int(h), int(w)) for h, w in shapes]
        anchors, strides = self.anchors(sizes, xs[0].device)
        return self.dfl(box), logits, anchors, strides

    def flat(self, xs: Sequence[Tensor], branches: nn.ModuleList) -> Tensor:
        """What the branches make of the three levels, joined: (B, C, A)."""
        maps = [branch(x) for x, branch in zip(xs, branches, strict=True)]
        # flatten() leaves a computation of the shape in an ONNX graph even where the image size is fixed.
        return torch.cat(
            [m.flatten(2) if self.dynamic else m.view(-1, int(m.shape[1]), int(m.shape[2] * m.shape[3])) for m in maps],
            2,
        )


class Proto(nn.Module):
    """Mask prototypes: P3 (B, c1, H, W) -> (B, 32, 2 H, 2 W)."""

    def __init__(self, c1: int, hidden: int) -> None:
        super().__init__()
        self.cv1 = Conv(c1, hidden, 3)
        self.upsample = nn.ConvTranspose2d(hidden, hidden, 2, 2)
        self.cv2 = Conv(hidden, hidden, 3)
        self.cv3 = Conv(hidden, MASKS)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(self.cv2(self.upsample(self.cv1(x))))


class Segment(Detect):
    """(B, 4 + nc + 32, A) with the masks' coefficients, and prototypes (B, 32, H / 4, W / 4).

    A mask is the sigmoid of the prototypes weighed by the coefficients, cut at its box.
    """

    def __init__(self, nc: int, channels: Sequence[int], hidden: int) -> None:
        super().__init__(nc, channels, MASKS)
        self.proto = Proto(channels[0], hidden)

    def forward(self, *xs: Tensor) -> tuple[Tensor, Tensor]:
        return self.decode(*self.raw(xs), self.flat(xs, self.cv4)), self.proto(xs[0])


class Pose(Detect):
    """(B, 4 + nc + K * D, A): key points follow, each x, y in pixels and, where D is 3, its visibility in 0..1."""

    def __init__(self, nc: int, channels: Sequence[int], kpt_shape: tuple[int, int]) -> None:
        super().__init__(nc, channels, kpt_shape[0] * kpt_shape[1])
        self.points = Points(kpt_shape)

    def forward(self, *xs: Tensor) -> Tensor:
        distances, logits, anchors, strides = self.raw(xs)
        points = self.points(self.flat(xs, self.cv4), anchors, strides)
        return self.decode(distances, logits, anchors, strides, points)


class OBB(Detect):
    """(B, 4 + nc + 1, A): boxes are turned by the angle in radians, -pi/4 to 3 pi/4, that follows the scores."""

    def __init__(self, nc: int, channels: Sequence[int]) -> None:
        super().__init__(nc, channels, 1)
        self.decode = DecodeRotated()

    def forward(self, *xs: Tensor) -> Tensor:
        return self.decode(*self.raw(xs), (self.flat(xs, self.cv4).sigmoid() - 0.25) * math.pi)


class Classify(nn.Module):
    """(B, c, H, W) -> probabilities (B, nc)."""

    def __init__(self, c: int, nc: int) -> None:
        super().__init__()
        self.conv = Conv(c, 1280)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(1280, nc)
        self.softmax = nn.Softmax(1)  # a module, so that it has a name to keep it in FP32 by

    def forward(self, x: Tensor) -> Tensor:
        return self.softmax(self.linear(self.pool(self.conv(x)).flatten(1)))
