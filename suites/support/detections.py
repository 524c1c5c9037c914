"""A detector's outputs as detections, and one-to-one matching of two sets of them by class and likeness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from exporters.models.spec import ModelSpec, OutputSpec, classifier_output, detector_output
from exporters.spec import Precision
from suites.support.compare import SCORE_FLOOR

Array = npt.NDArray[Any]
Outputs = Mapping[str, Array]
NMS_IOU = 0.7  # the contract's default
PROTOTYPE_STRIDE = 4.0  # pixels of the image a pixel of the mask prototypes
# Of the 17 key points of COCO (its evaluation's constants).
COCO_SIGMAS = (
    *(0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072),
    *(0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089),
)
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


class Candidates:
    """Anchors of one image from a score on, of both sides, the reference's first; numbered, before any suppression.

    Attributes:
        rows: (N, 6): x1, y1, x2, y2 in pixels (of a turned box before it is turned), score, class.
        count: how many are the reference's.
    """

    def __init__(self, images: Sequence[Outputs], model: ModelSpec, spec: OutputSpec, floor: float) -> None:
        anchors = [np.asarray(i[spec.name], np.float64) for i in images]
        groups = {g.kind: g.channels for g in spec.groups}
        best = [a[groups["score"]].max(0) for a in anchors]
        kept = [a[:, s >= floor] for a, s in zip(anchors, best, strict=True)]
        self.count = kept[0].shape[1]
        joined = np.concatenate(kept, 1)
        cx, cy, w, h = joined[groups["box"]]
        scores = joined[groups["score"]]
        corners = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        self.rows = np.stack([*corners, scores.max(0), scores.argmax(0).astype(np.float64)], 1).reshape(-1, 6)
        self.turned = np.stack((cx, cy, w, h, joined[groups["angle"]][0]), 1) if "angle" in groups else None
        self.area = w * h
        coordinates = [joined[g.channels] for g in spec.groups if g.kind == "point"]
        self.points = np.stack(coordinates, 2).transpose(1, 0, 2) if coordinates else None  # (N, K, 2)
        self.coefficients = joined[groups["mask"]].T if "mask" in groups else None
        self.prototypes = [
            np.asarray(i[o.name], np.float64)
            for i in images
            for o in model.outputs
            if o is not spec and "mask" in groups
        ]
        self.masks: dict[int, Array] = {}

    def kept(self, ids: Array) -> Array:
        """Greedy suppression within classes, highest score first: the ids that stay, in that order."""
        left = ids[np.argsort(-self.rows[ids, 4], kind="stable")]
        chosen: list[int] = []
        while len(left):
            chosen.append(int(left[0]))
            left = left[1:][self.overlap(left[:1], left[1:])[0] <= NMS_IOU]
        return np.array(chosen, int)

    def overlap(self, a: Array, b: Array) -> Array:
        """IoU of the boxes of candidates a (N,) and b (M,) -> (N, M), 0 where the classes differ."""
        same = self.rows[a, None, 5] == self.rows[None, b, 5]
        if self.turned is not None:
            return rotated_iou(self.turned[a], self.turned[b], same)
        return iou(self.rows[a, :4], self.rows[b, :4]) * same

    def similar(self, a: Array, b: Array) -> Array:
        """The least of the overlap and what the task adds: object key point similarity, IoU of masks -> (N, M)."""
        table = self.overlap(a, b)
        if self.points is not None and table.size:
            table = np.minimum(table, oks(self.points[a], self.points[b], self.area[a]))
        if self.coefficients is not None and table.size:
            ours, theirs = (np.stack([self._mask(int(i)).ravel() for i in ids]).astype(np.float32) for ids in (a, b))
            both = ours @ theirs.T
            either = ours.sum(1)[:, None] + theirs.sum(1)[None] - both
            # Two masks without a pixel are equal.
            table = np.minimum(table, np.where(either > 0, both / np.maximum(either, 1), 1.0))
        return table

    def _mask(self, number: int) -> Array:
        """The binary mask of a candidate at the prototypes' size, cut at its box."""
        if number not in self.masks:
            assert self.coefficients is not None
            prototypes = self.prototypes[0 if number < self.count else 1]
            logits = np.tensordot(self.coefficients[number], prototypes, 1)
            # The prototypes have a quarter of the image's size in each direction.
            x1, y1, x2, y2 = self.rows[number, :4] / PROTOTYPE_STRIDE
            y, x = (np.arange(n) for n in logits.shape)
            inside = ((x >= x1) & (x < x2))[None] & ((y >= y1) & (y < y2))[:, None]
            self.masks[number] = (logits > 0) & inside
        return self.masks[number]


def iou(a: Array, b: Array) -> Array:
    """Intersection over union of boxes (N, 4) and (M, 4) given by corners -> (N, M)."""
    top_left = np.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = np.prod(np.clip(bottom_right - top_left, 0, None), 2)
    area = lambda x: np.prod(x[:, 2:] - x[:, :2], 1)  # noqa: E731
    return inter / np.maximum(area(a)[:, None] + area(b)[None] - inter, 1e-9)


def rotated_iou(a: Array, b: Array, wanted: Array | None = None) -> Array:
    """IoU of turned boxes (N, 5) and (M, 5), each cx, cy, w, h and an angle in radians -> (N, M).

    Args:
        wanted: (N, M), false where 0 will do.
    """
    import shapely

    def polygons(boxes: Array) -> Any:
        cos, sin = np.cos(boxes[:, 4:]), np.sin(boxes[:, 4:])
        x = np.array([-0.5, 0.5, 0.5, -0.5]) * boxes[:, 2:3]
        y = np.array([-0.5, -0.5, 0.5, 0.5]) * boxes[:, 3:4]
        return shapely.polygons(np.stack((boxes[:, :1] + x * cos - y * sin, boxes[:, 1:2] + x * sin + y * cos), 2))

    reach = np.hypot(a[:, None, 2], a[:, None, 3]) + np.hypot(b[None, :, 2], b[None, :, 3])
    near = 2 * np.hypot(a[:, None, 0] - b[None, :, 0], a[:, None, 1] - b[None, :, 1]) < reach
    rows, columns = np.nonzero(near if wanted is None else near & wanted)
    ours, theirs = polygons(a), polygons(b)
    inter = shapely.area(shapely.intersection(ours[rows], theirs[columns]))
    areas = a[rows, 2] * a[rows, 3] + b[columns, 2] * b[columns, 3]
    table = np.zeros((len(a), len(b)))
    table[rows, columns] = inter / np.maximum(areas - inter, 1e-9)
    return table


def point_sigmas(count: int) -> Array:
    """(K,) how far each of so many key points is placed by people, in roots of the object's area."""
    if count == len(COCO_SIGMAS):
        return np.array(COCO_SIGMAS)
    return np.full(count, min(1 / count, max(COCO_SIGMAS)))  # 1 / K is the peer's; few points would all be alike by it


def oks(a: Array, b: Array, area: Array) -> Array:
    """Object key point similarity (COCO) of points (N, K, 2) and (M, K, 2) -> (N, M); `area` (N,) in square pixels."""
    sigmas = point_sigmas(a.shape[1])
    squares = ((a[:, None] - b[None]) ** 2).sum(3)
    return np.exp(-squares / (2 * np.maximum(area, 1e-9)[:, None, None] * (2 * sigmas) ** 2)).mean(2)


def same_objects(expected: Outputs, observed: Outputs, model: ModelSpec, precision: Precision) -> Matching | None:
    """`match` of a detector, the first class of a classifier; None for a model that is neither."""
    if detector_output(model) is not None:
        return match(expected, observed, model, precision)
    spec = classifier_output(model)
    return None if spec is None else _first_classes(expected[spec.name], observed[spec.name], precision)


def _first_classes(expected: Array, observed: Array, precision: Precision) -> Matching:
    """Rows (B, classes) whose most probable class is the same; two that are as likely may take each other's place."""
    margin = MARGIN.get(precision, 1e-2)
    lost: list[str] = []
    for number, (want, got) in enumerate(zip(np.asarray(expected), np.asarray(observed), strict=True)):
        first, here = int(want.argmax()), int(got.argmax())
        if want[first] - want[here] > margin:
            lost.append(f"image {number}: class {first} ({want[first]:.3f}), observed class {here} ({got[here]:.3f})")
    return Matching(len(expected), len(expected) - len(lost), 1.0, 1.0, tuple(lost))


def match(expected: Outputs, observed: Outputs, model: ModelSpec, precision: Precision) -> Matching:
    """Matches the detections of two sides' raw outputs, image by image.

    Every reference detection that is clearly above the score floor must be found with the same class and enough
    likeness: IoU of the boxes (turned ones of obb), and of the masks, and similarity of the key points where there are
    such. Every observed one clearly above it must be one of the reference's. One that the other side suppressed for
    another of nearly the same score, or of nearly the least overlap, is found among the candidates before NMS.

    Args:
        expected: by name, output0 (B, C, A) and what else the model has.
    """
    spec = detector_output(model)
    assert spec is not None
    floor, margin = IOU_FLOOR.get(precision, 0.9), MARGIN.get(precision, 1e-2)
    sure = SCORE_FLOOR + margin
    total = matched = 0
    lowest = 1.0
    lost: list[str] = []
    extra: list[str] = []
    for number in range(len(expected[spec.name])):
        sides = [{o.name: np.asarray(side[o.name])[number] for o in model.outputs} for side in (expected, observed)]
        # Both are taken a margin lower, so that a detection that slipped under the floor is still there to match.
        found = Candidates(sides, model, spec, SCORE_FLOOR - margin)
        scores, classes = found.rows[:, 4], found.rows[:, 5].astype(int)
        all_want, all_got = np.arange(found.count), np.arange(found.count, len(scores))
        want, got = found.kept(all_want), found.kept(all_got)
        table = found.similar(want, got)
        free = np.ones(len(got), bool)
        for place, row in enumerate(want):  # highest score first
            likeness = np.where(free, table[place], 0.0) if len(got) else np.zeros(1)
            best = int(likeness.argmax())
            like = float(likeness[best])
            if like >= floor:
                free[best] = False
            else:
                like = max(like, _tied(found, int(row), all_want, all_got, got, floor, margin))
            if scores[row] >= sure:
                total += 1
                matched += like >= floor
                if like < floor:
                    name = f"image {number}: class {classes[row]} score {scores[row]:.3f}"
                    lost.append(f"{name}, best IoU {like:.3f}")
            if like >= floor:
                lowest = min(lowest, like)
        for row in got[free & (scores[got] >= sure)]:
            if _tied(found, int(row), all_got, all_want, want, floor, margin) < floor:
                extra.append(f"image {number}: class {classes[row]} score {scores[row]:.3f}")
    return Matching(total, matched, floor, lowest, tuple(lost), tuple(extra))


def _tied(found: Candidates, row: int, own: Array, others: Array, kept: Array, floor: float, margin: float) -> float:
    """Likeness to the candidate that is this detection and that NMS dropped by a hair, or 0.

    Two anchors of one object often have scores that differ in the last digit only: which of them suppresses the other
    is rounding, and says nothing of the artifact. So it is whether two that overlap by just NMS_IOU are both kept.

    Args:
        found: the candidates that the ids are of.
        row: a detection of one side.
        own: candidates of that side.
        others, kept: candidates of the other side, and those that NMS kept.
        floor: likeness from which two detections are one.
        margin: difference of scores that is a tie.
    """
    scores = found.rows[:, 4]
    one = np.array([row])
    same = found.similar(one, others)[0] if len(others) else np.zeros(0)
    best = 0.0
    for place in np.flatnonzero(same >= floor):
        overlaps = found.overlap(others[place : place + 1], kept)[0]
        over = np.flatnonzero(overlaps > NMS_IOU)
        # A kept candidate overlaps itself wholly: it was there to be matched, and another took it.
        tied = scores[kept[over]] - scores[others[place]] <= margin
        # On its own side it stays beside the very box that suppresses it on the other.
        beside = [found.overlap(one, own[found.similar(np.array([k]), own)[0] >= floor])[0] for k in kept[over]]
        tied |= np.array([bool(len(b)) and float(b.max()) <= NMS_IOU for b in beside], bool)
        if len(over) and overlaps[over].max() < 1 and tied.all():
            best = max(best, float(same[place]))
    return best
