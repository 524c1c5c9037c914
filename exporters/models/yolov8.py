"""YOLOv8 written from its published architecture: detect, segment, pose, obb and classify, scales n, s, m, l and x.

The parameter names are those of released checkpoints, so that their state loads with `strict=True`. No code of the
Ultralytics package was read or copied. Torch is imported here, so this module is imported by workers only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from exporters.models.yolov8_heads import OBB, Classify, Conv, Detect, Pose, Segment
from exporters.models.yolov8_scales import BN_EPS, CLASSIFY_LARGEST, SCALES, Scale


@dataclass(frozen=True)
class Layer:
    """One row of the architecture: where the layer takes its inputs from, and the layer."""

    sources: tuple[int, ...]
    module: nn.Module


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


class YOLOv8(nn.Module):
    """YOLOv8: images (B, 3, H, W), float32 RGB in 0..1, H and W multiples of 32 -> what its head says."""

    def __init__(self, rows: Sequence[Layer]) -> None:
        super().__init__()
        self.model = nn.Sequential(*(row.module for row in rows))
        self.sources = tuple(row.sources for row in rows)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
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


def _backbone(scale: Scale) -> list[Layer]:
    """Layers 0 to 8."""
    c = scale.channels
    n3, n6 = scale.repeats(3), scale.repeats(6)
    return [
        Layer((-1,), Conv(3, c(64), 3, 2)),
        Layer((-1,), Conv(c(64), c(128), 3, 2)),
        Layer((-1,), C2f(c(128), c(128), n3, True)),
        Layer((-1,), Conv(c(128), c(256), 3, 2)),
        Layer((-1,), C2f(c(256), c(256), n6, True)),
        Layer((-1,), Conv(c(256), c(512), 3, 2)),
        Layer((-1,), C2f(c(512), c(512), n6, True)),
        Layer((-1,), Conv(c(512), c(1024), 3, 2)),
        Layer((-1,), C2f(c(1024), c(1024), n3, True)),
    ]


def _neck(scale: Scale) -> list[Layer]:
    """Layers 9 to 21, whose outputs 15, 18 and 21 the heads read."""
    n3 = scale.repeats(3)
    p3, p4, p5 = (scale.channels(width) for width in (256, 512, 1024))
    return [
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
    ]


def build(
    scale: str,
    nc: int,
    linear: Sequence[str] = (),
    task: str = "detect",
    kpt_shape: Sequence[int] = (17, 3),
    eps: float | None = None,
) -> YOLOv8:
    """A YOLOv8 model of this scale (n, s, m, l, x), number of classes and task, with random weights.

    Args:
        scale: key of SCALES.
        nc: number of classes.
        linear: names of the `Conv` blocks that have no activation ("model.9.cv1" in checkpoints of the peer's 8.4.7).
        task: detect, segment, pose, obb or classify.
        kpt_shape: of pose: how many key points, and values of each (2, or 3 with the visibility).
        eps: of the batch normalizations; None takes the task's (BN_EPS).
    """
    chosen = SCALES[scale]
    if task == "classify":
        chosen = replace(chosen, largest=CLASSIFY_LARGEST)
        rows = [*_backbone(chosen), Layer((-1,), Classify(chosen.channels(1024), nc))]
    else:
        channels = [chosen.channels(width) for width in (256, 512, 1024)]
        heads: dict[str, Callable[[], Detect]] = {
            "detect": lambda: Detect(nc, channels),
            "segment": lambda: Segment(nc, channels, chosen.channels(256)),
            "pose": lambda: Pose(nc, channels, (kpt_shape[0], kpt_shape[1])),
            "obb": lambda: OBB(nc, channels),
        }
        rows = [*_backbone(chosen), *_neck(chosen), Layer((15, 18, 21), heads[task]())]
    model = YOLOv8(rows)
    for path in linear:
        cast("Conv", model.get_submodule(path)).linear = True
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = BN_EPS[task] if eps is None else eps
    return model
