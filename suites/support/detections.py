"""A detector's output as detections, and one-to-one matching of two sets of them by class and IoU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from exporters.models.spec import ModelSpec, OutputSpec
from exporters.spec import Precision
from suites.support.compare import SCORE_FLOOR

Array = npt.NDArray[Any]
NMS_IOU = 0.7  # the contract's default
IOU_FLOOR: Mapping[Precision, float] = {Precision.FP32: 0.99, Precision.FP16: 0.9, Precision.INT8: 0.75}
# A detection this near to the score floor may be on either side of it: the score tolerance of the precision.
MARGIN: Mapping[Precision, float] = {Precision.FP32: 1e-3, Precision.FP16: 1e-2, Precision.INT8: 0.1}


@dataclass(frozen=True)
class Matching:
    """Detections of the reference and how many were found again; `lost` and `extra` name the worst of the others."""

    reference: int
    matched: int
    iou_floor: float
    lowest_iou: float
    lost: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.lost and not self.extra


def detector_output(model: ModelSpec) -> OutputSpec | None:
    """The output that has both boxes and scores, if any."""
    return next((o for o in model.outputs if {"box", "score"} <= {g.kind for g in o.groups}), None)


def detections(output: Array, spec: OutputSpec, floor: float = SCORE_FLOOR) -> list[Array]:
    """Per image (N, 6): x1, y1, x2, y2 in pixels, score, class, after NMS within each class."""
    boxes = next(g for g in spec.groups if g.kind == "box")
    scores = next(g for g in spec.groups if g.kind == "score")
    found: list[Array] = []
    for image in np.asarray(output, np.float64):
        values = image[scores.start : scores.stop]
        best, label = values.max(0), values.argmax(0)
        keep = best >= floor
        cx, cy, w, h = image[boxes.start : boxes.stop][:, keep]
        rows = np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2, best[keep], label[keep].astype(np.float64)], 1)
        found.append(_nms(rows))
    return found


def _nms(rows: Array) -> Array:
    """Greedy suppression within classes, highest score first."""
    rows = rows[np.argsort(-rows[:, 4], kind="stable")]
    kept: list[Array] = []
    for row in rows:
        if not any(k[5] == row[5] and float(iou(k[None, :4], row[None, :4])[0, 0]) > NMS_IOU for k in kept):
            kept.append(row)
    return np.array(kept).reshape(-1, 6)


def iou(a: Array, b: Array) -> Array:
    """Intersection over union of boxes (N, 4) and (M, 4) given by corners -> (N, M)."""
    top_left = np.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = np.prod(np.clip(bottom_right - top_left, 0, None), 2)
    area = lambda x: np.prod(x[:, 2:] - x[:, :2], 1)  # noqa: E731
    return inter / np.maximum(area(a)[:, None] + area(b)[None] - inter, 1e-9)


def match(expected: Array, observed: Array, spec: OutputSpec, precision: Precision) -> Matching:
    """Matches the detections of two raw outputs (B, C, A), image by image.

    Every reference detection that is clearly above the score floor must be found with the same class and enough
    overlap; every observed one clearly above it must be one of the reference's.
    """
    floor, margin = IOU_FLOOR.get(precision, 0.9), MARGIN.get(precision, 1e-2)
    total = matched = 0
    lowest = 1.0
    lost: list[str] = []
    extra: list[str] = []
    # The other side is taken a margin lower, so that a detection that slipped under the floor is still there to match.
    for number, (want, got) in enumerate(
        zip(
            detections(expected, spec, SCORE_FLOOR - margin),
            detections(observed, spec, SCORE_FLOOR - margin),
            strict=True,
        )
    ):
        table = iou(want[:, :4], got[:, :4]) * (want[:, None, 5] == got[None, :, 5])
        free = np.ones(len(got), bool)
        for i in np.argsort(-want[:, 4], kind="stable"):
            sure = want[i, 4] >= SCORE_FLOOR + margin
            total += bool(sure)
            candidates = np.where(free, table[i], 0.0) if len(got) else np.zeros(1)
            j = int(candidates.argmax())
            if candidates[j] >= floor:
                free[j] = False
                matched += bool(sure)
                lowest = min(lowest, float(candidates[j]))
            elif sure:
                lost.append(
                    f"image {number}: class {int(want[i, 5])} score {want[i, 4]:.3f}, best IoU {candidates[j]:.3f}"
                )
        extra += [
            f"image {number}: class {int(r[5])} score {r[4]:.3f}" for r in got[free] if r[4] >= SCORE_FLOOR + margin
        ]
    return Matching(total, matched, floor, lowest, tuple(lost), tuple(extra))
