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
IOU_FLOOR: Mapping[Precision, float] = {
    Precision.FP32: 0.99,
    Precision.TF32: 0.9,  # 10 bits of fraction, as FP16
    Precision.FP16: 0.9,
    Precision.BF16: 0.75,  # 7 bits, as the magnitude of an 8-bit integer
    Precision.FP8: 0.75,
    Precision.INT8: 0.75,
}
# A detection this near to the score floor may be on either side of it: the score tolerance of the precision.
MARGIN: Mapping[Precision, float] = {
    Precision.FP32: 1e-3,
    Precision.TF32: 1e-2,
    Precision.FP16: 1e-2,
    Precision.BF16: 0.1,
    Precision.FP8: 0.1,
    Precision.INT8: 0.1,
}


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


def candidates(output: Array, spec: OutputSpec, floor: float = SCORE_FLOOR) -> list[Array]:
    """Per image (N, 6): x1, y1, x2, y2 in pixels, score, class of every anchor from `floor` on, before NMS."""
    boxes = next(g for g in spec.groups if g.kind == "box")
    scores = next(g for g in spec.groups if g.kind == "score")
    found: list[Array] = []
    for image in np.asarray(output, np.float64):
        values = image[scores.start : scores.stop]
        best, label = values.max(0), values.argmax(0)
        keep = best >= floor
        cx, cy, w, h = image[boxes.start : boxes.stop][:, keep]
        corners = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        found.append(np.stack([*corners, best[keep], label[keep].astype(np.float64)], 1))
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
    overlap; every observed one clearly above it must be one of the reference's. One that the other side suppressed for
    another of nearly the same score, or of nearly the least overlap, is found among the candidates before NMS.
    """
    floor, margin = IOU_FLOOR.get(precision, 0.9), MARGIN.get(precision, 1e-2)
    sure = SCORE_FLOOR + margin
    total = matched = 0
    lowest = 1.0
    lost: list[str] = []
    extra: list[str] = []
    # The other side is taken a margin lower, so that a detection that slipped under the floor is still there to match.
    sides = (candidates(side, spec, SCORE_FLOOR - margin) for side in (expected, observed))
    for number, (all_want, all_got) in enumerate(zip(*sides, strict=True)):
        want, got = _nms(all_want), _nms(all_got)
        table = _overlaps(want, got)
        free = np.ones(len(got), bool)
        for i in np.argsort(-want[:, 4], kind="stable"):
            overlaps = np.where(free, table[i], 0.0) if len(got) else np.zeros(1)
            j = int(overlaps.argmax())
            overlap = float(overlaps[j])
            if overlap >= floor:
                free[j] = False
            else:
                overlap = max(overlap, _tied(want[i], all_want, all_got, got, floor, margin))
            if want[i, 4] >= sure:
                total += 1
                matched += overlap >= floor
                if overlap < floor:
                    name = f"image {number}: class {int(want[i, 5])} score {want[i, 4]:.3f}"
                    lost.append(f"{name}, best IoU {overlap:.3f}")
            if overlap >= floor:
                lowest = min(lowest, overlap)
        for row in got[free & (got[:, 4] >= sure)]:
            if _tied(row, all_got, all_want, want, floor, margin) < floor:
                extra.append(f"image {number}: class {int(row[5])} score {row[4]:.3f}")
    return Matching(total, matched, floor, lowest, tuple(lost), tuple(extra))


def _overlaps(a: Array, b: Array) -> Array:
    """IoU of detections (N, 6) and (M, 6) -> (N, M), 0 where the classes differ."""
    return iou(a[:, :4], b[:, :4]) * (a[:, None, 5] == b[None, :, 5])


def _tied(row: Array, own: Array, others: Array, kept: Array, floor: float, margin: float) -> float:
    """IoU with the candidate that is this detection and that NMS dropped by a hair, or 0.

    Two anchors of one object often have scores that differ in the last digit only: which of them suppresses the other
    is rounding, and says nothing of the artifact. So it is whether two that overlap by just NMS_IOU are both kept.

    Args:
        row: a detection (6,) of one side.
        own: candidates of that side.
        others, kept: candidates of the other side, and those that NMS kept.
        floor: IoU from which two boxes are one.
        margin: difference of scores that is a tie.
    """
    same = _overlaps(row[None], others)[0]
    best = 0.0
    for number in np.flatnonzero(same >= floor):
        overlaps = _overlaps(others[number : number + 1], kept)[0]
        over = np.flatnonzero(overlaps > NMS_IOU)
        # A kept candidate overlaps itself wholly: it was there to be matched, and another took it.
        tied = kept[over, 4] - others[number, 4] <= margin
        # On its own side it stays beside the very box that suppresses it on the other.
        beside = [_overlaps(row[None], own[_overlaps(k[None], own)[0] >= floor])[0] for k in kept[over]]
        tied |= np.array([bool(len(b)) and float(b.max()) <= NMS_IOU for b in beside], bool)
        if len(over) and overlaps[over].max() < 1 and tied.all():
            best = max(best, float(same[number]))
    return best
