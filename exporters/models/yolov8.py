"""YOLOv8 written from its published architecture: detect, scales n, s, m, l and x.

The parameter names are those of released checkpoints, so that their state loads with `strict=True`. No code of the
Ultralytics package was read or copied. Torch is imported here, so this module is imported by workers only.
"""
# pyright: reportUnknownMemberType=false
# (torch's split has no types)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from exporters.models.yolov8_scales import SCALES, STRIDES, Scale

REG_MAX = 16  # bins of the distribution over each of a box's four distances


@dataclass(frozen=True)
class Layer:
    """One row of the architecture: where the layer takes its inputs from, and the layer."""

    sources: tuple[int, ...]
    module: nn.Module


class Conv(nn.Module):
    """Convolution without bias, batch normalization and SiLU: (B, c1, H, W) -> (B, c2, H/stride, W/stride)."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn: nn.BatchNorm2d | None = nn.BatchNorm2d(c2, eps=1e-3, momentum=0.03)
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


class Bottleneck(nn.Module):
    """Two 3x3 convolutions, plus the input where `shortcut`: (B, c, H, W) -> (B, c, H, W)."""

    def __init__(self, c: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1 = Conv(c, c, 3)
        self.cv2 = Conv(c, c, 3)
        self.add = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class C2f(nn.Module):
    """A split, n chained bottlenecks whose outputs are all kept, a 1x1 convolution: (B, c1, H, W) -> (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, n: int, shortcut: bool) -> None:
        super().__init__()
        self.hidden = c2 // 2
        self.cv1 = Conv(c1, 2 * self.hidden)
        self.cv2 = Conv((2 + n) * self.hidden, c2)
        self.m = nn.ModuleList(Bottleneck(self.hidden, shortcut) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        # Both halves are kept, so they are joined as the one tensor that they are: cut first, each would be copied.
        y = self.cv1(x)
        parts, last = [y], y[:, self.hidden :]
        for bottleneck in self.m:
            last = bottleneck(last)
            parts.append(last)
        return self.cv2(torch.cat(parts, 1))


class SPPF(nn.Module):
    """Three chained 5x5 max-pools whose outputs are all kept: (B, c, H, W) -> (B, c, H, W)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1 = Conv(c, c // 2)
        self.cv2 = Conv(c * 2, c)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(self.m(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class Concat(nn.Module):
    """Concatenation over channels; the current tensor comes first."""

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.cat(xs, 1)


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

    A module of its own, though without parameters, so that graphs name its operators and conversions can leave them in
    FP32: coordinates reach the image size, where FP16 resolves half a pixel only (IEEE 754: 10 bits of fraction).
    """

    def forward(self, distances: Tensor, logits: Tensor, anchors: Tensor, strides: Tensor) -> Tensor:
        left_top, right_bottom = cast("tuple[Tensor, ...]", distances.split((2, 2), 1))
        centre = anchors + (right_bottom - left_top) * 0.5
        boxes = torch.cat((centre, left_top + right_bottom), 1) * strides
        return torch.cat((boxes, logits.sigmoid()), 1)


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
    """Head: three feature maps -> (B, 4 + nc, A): boxes as cx, cy, w, h in pixels, then the classes' scores in 0..1."""

    def __init__(self, nc: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.nc = nc
        box = max(16, channels[0] // 4, 4 * REG_MAX)
        cls = max(channels[0], min(nc, 100))
        self.cv2 = nn.ModuleList(
            nn.Sequential(Conv(c, box, 3), Conv(box, box, 3), nn.Conv2d(box, 4 * REG_MAX, 1)) for c in channels
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(Conv(c, cls, 3), Conv(cls, cls, 3), nn.Conv2d(cls, nc, 1)) for c in channels
        )
        self.dfl = DFL()
        self.decode = Decode()
        self.anchors = Anchors()
        self.dynamic = False

    def forward(self, *xs: Tensor) -> Tensor:
        # Boxes and classes are joined apart: joined together and split again, each value would be copied twice more.
        box = self._flat([branch(x) for x, branch in zip(xs, self.cv2, strict=True)])
        logits = self._flat([branch(x) for x, branch in zip(xs, self.cv3, strict=True)])
        # While a graph is traced a shape is a tensor. Where the size is fixed it is made a number, so that the anchors
        # become constants; where it is dynamic it stays, so that they are computed from the input.
        shapes = [(x.shape[2], x.shape[3]) for x in xs]
        sizes = shapes if self.dynamic else [(int(h), int(w)) for h, w in shapes]
        anchors, strides = self.anchors(sizes, xs[0].device)
        return self.decode(self.dfl(box), logits, anchors, strides)

    def _flat(self, maps: Sequence[Tensor]) -> Tensor:
        """Feature maps (B, C, H, W) of three levels -> (B, C, A)."""
        # flatten() leaves a computation of the shape in an ONNX graph even where the image size is fixed.
        return torch.cat(
            [m.flatten(2) if self.dynamic else m.view(-1, int(m.shape[1]), int(m.shape[2] * m.shape[3])) for m in maps],
            2,
        )


class YOLOv8(nn.Module):
    """YOLOv8 detect: images (B, 3, H, W), float32 RGB in 0..1, H and W multiples of 32 -> (B, 4 + nc, A)."""

    def __init__(self, scale: Scale, nc: int) -> None:
        super().__init__()
        c = scale.channels
        n3, n6 = scale.repeats(3), scale.repeats(6)
        p3, p4, p5 = c(256), c(512), c(1024)
        rows = [
            Layer((-1,), Conv(3, c(64), 3, 2)),
            Layer((-1,), Conv(c(64), c(128), 3, 2)),
            Layer((-1,), C2f(c(128), c(128), n3, True)),
            Layer((-1,), Conv(c(128), p3, 3, 2)),
            Layer((-1,), C2f(p3, p3, n6, True)),
            Layer((-1,), Conv(p3, p4, 3, 2)),
            Layer((-1,), C2f(p4, p4, n6, True)),
            Layer((-1,), Conv(p4, p5, 3, 2)),
            Layer((-1,), C2f(p5, p5, n3, True)),
            Layer((-1,), SPPF(p5)),
            Layer((-1,), nn.Upsample(scale_factor=2.0, mode="nearest")),
            Layer((-1, 6), Concat()),
            Layer((-1,), C2f(p5 + p4, p4, n3, False)),
            Layer((-1,), nn.Upsample(scale_factor=2.0, mode="nearest")),
            Layer((-1, 4), Concat()),
            Layer((-1,), C2f(p4 + p3, p3, n3, False)),
            Layer((-1,), Conv(p3, p3, 3, 2)),
            Layer((-1, 12), Concat()),
            Layer((-1,), C2f(p3 + p4, p4, n3, False)),
            Layer((-1,), Conv(p4, p4, 3, 2)),
            Layer((-1, 9), Concat()),
            Layer((-1,), C2f(p4 + p5, p5, n3, False)),
            Layer((15, 18, 21), Detect(nc, (p3, p4, p5))),
        ]
        self.model = nn.Sequential(*(row.module for row in rows))
        self.sources = tuple(row.sources for row in rows)

    def forward(self, images: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for module, sources in zip(self.model, self.sources, strict=True):
            inputs = [images if i == -1 and not outputs else outputs[i] for i in sources]
            outputs.append(module(*inputs))
        return outputs[-1]

    def fuse(self) -> YOLOv8:
        """Folds every batch normalization, in place, and returns the model; call it on a copy."""
        for module in self.modules():
            if isinstance(module, Conv):
                module.fuse()
        return self


def build(scale: str, nc: int, linear: Sequence[str] = ()) -> YOLOv8:
    """A YOLOv8 detect model of this scale (n, s, m, l, x) and number of classes, with random weights.

    `linear` names the `Conv` blocks that have no activation ("model.9.cv1" in checkpoints of the peer's 8.4.7).
    """
    model = YOLOv8(SCALES[scale], nc)
    for path in linear:
        cast("Conv", model.get_submodule(path)).linear = True
    return model
