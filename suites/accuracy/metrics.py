"""Metrics: average precision by COCO's own evaluation (pycocotools), first classes, and intervals over images."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# (pycocotools has no types)

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from suites.accuracy.dataset import Item, Labels
from suites.accuracy.deploy import MOST, Detections
from suites.support.detections import point_sigmas, rotated_iou

Array = npt.NDArray[Any]
KINDS = {"detect": "bbox", "segment": "segm", "pose": "keypoints", "obb": "bbox"}
THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
RESAMPLES = 500


@dataclass(frozen=True)
class Evaluation:
    """The metric of one set of detections, and what it was computed from, image by image.

    Attributes:
        metric: mAP50-95 or F1; of a classifier top-1.
        values: mAP50-95, mAP50, precision and recall (where F1 is greatest, at IoU 0.5), or top-1 and top-5.
        classes: average precision by class.
        rows: by class: scores (D,), hits (10, D) of 1 right, 0 wrong and -1 not counted, image (D,), objects an
            image (I,); of a classifier the hits (I,).
    """

    metric: float
    values: Mapping[str, float]
    classes: Mapping[int, float] = field(default_factory=dict[int, float])
    rows: tuple[tuple[Array, Array, Array, Array], ...] = ()
    images: int = 0
    is_f1: bool = False

    def deployed(self, overlap: float, sure: float) -> Evaluation:
        """F1 of what a deployment takes, not of a ranking: whether the objects are found, and nothing else as surely.

        Args:
            overlap: that is enough, of THRESHOLDS.
            sure: what has a lower score and is no object is not counted.
        """
        if self.is_of_classes:
            return self
        place = int(np.abs(THRESHOLDS - overlap).argmin())
        rows = tuple(
            (scores, np.where((hits[place] == 0) & (scores < sure), -1, hits[place])[None], image, objects)
            for scores, hits, image, objects in self.rows
        )
        made = replace(self, rows=rows, is_f1=True)
        value = made.resampled(np.ones(self.images, int))
        return replace(made, metric=value, values={"F1": value, **self.values})

    @property
    def telling(self) -> int:
        """How many images have objects: of a classifier all of them."""
        return self.images if self.is_of_classes else int(np.any([row[3] > 0 for row in self.rows], 0).sum())

    @property
    def is_of_classes(self) -> bool:
        """Whether each image is right or wrong."""
        return len(self.rows) == 1 and not self.rows[0][3].size

    def resampled(self, weights: Array) -> float:
        """The metric of images that count so often each, (I,) whole numbers."""
        if self.is_of_classes:
            return float((self.rows[0][1][0] * weights).sum() / weights.sum())
        if self.is_f1:
            right, wrong = (sum(float(((h[0] == v) * weights[i]).sum()) for _, h, i, _ in self.rows) for v in (1, 0))
            total = sum(float((objects * weights).sum()) for *_, objects in self.rows)
            return 2 * right / max(right + wrong + total, 1e-12)
        found = [average_precision(*row, weights) for row in self._ranked]
        known = [float(f.mean()) for f in found if f is not None]
        return float(np.mean(known)) if known else 0.0

    @cached_property
    def resamples(self) -> Array:
        """(RESAMPLES,) the metric of images drawn with replacement: the same ones for every set of so many images."""
        generator = np.random.default_rng(0)
        drawn = (generator.integers(0, self.images, self.images) for _ in range(RESAMPLES))
        return np.array([self.resampled(np.bincount(d, minlength=self.images)) for d in drawn])

    @cached_property
    def _ranked(self) -> list[tuple[Array, Array, Array, Array]]:
        """What `average_precision` takes of each class: it does not depend on the images that are drawn."""
        orders = [np.argsort(-scores, kind="mergesort") for scores, *_ in self.rows]
        return [
            (hits[:, o] == 1, hits[:, o] == 0, image[o], objects)
            for (_, hits, image, objects), o in zip(self.rows, orders, strict=True)
        ]


def average_precision(right: Array, wrong: Array, image: Array, objects: Array, weights: Array) -> Array | None:
    """(10,) average precision at each threshold of IoU, as COCO takes it at 101 recalls; None without objects.

    Args:
        right: (10, D) of the detections of a class, highest score first.
        wrong: (10, D); what is neither does not count.
        image: (D,) where each was found.
        objects: (I,) how many there are in each image.
        weights: (I,) how often each image counts.
    """
    total = float((objects * weights).sum())
    if total == 0:
        return None
    count = weights[image]
    true = np.cumsum(right * count, 1)
    false = np.cumsum(wrong * count, 1)
    recall = true / total
    precision = true / np.maximum(true + false, 1e-12)
    precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    made = np.zeros((len(right), len(RECALLS)))
    for row in range(len(right)):
        places = np.searchsorted(recall[row], RECALLS, side="left")
        inside = places < recall.shape[1]
        made[row, inside] = precision[row, places[inside]]
    return made.mean(1)


def evaluate(task: str, items: Sequence[Item], found: Sequence[Detections], count: int) -> Evaluation:
    """The metric of detections of labelled images.

    Args:
        items: the labelled images.
        found: the detections of each.
        count: how many classes there are.
    """
    if task == "classify":
        order = [np.argsort(-f.scores, kind="stable")[:5] for f in found]
        hits = np.array(
            [[o[0] == i.labels.classes[0], i.labels.classes[0] in o] for o, i in zip(order, items, strict=True)]
        )
        top = hits.mean(0)
        empty = np.zeros(0)
        values = {"top-1": float(top[0]), "top-5": float(top[1])}
        return Evaluation(float(top[0]), values, rows=((empty, hits.T, empty, empty),), images=len(items))
    judged = _coco(task, items, found, count)
    precision = judged.eval["precision"][..., 0, -1]  # (10, 101, classes)
    known = [k for k in range(count) if (precision[..., k] > -1).any()]
    each = {k: float(precision[..., k].mean()) for k in known}
    rows = _rows(judged, len(items), count)
    at_best = _at_best_confidence([rows[k] for k in known])
    values = {
        "mAP50-95": float(np.mean(list(each.values()))) if each else 0.0,
        "mAP50": float(precision[0][:, known].mean()) if known else 0.0,
        "precision": at_best[0],
        "recall": at_best[1],
    }
    return Evaluation(values["mAP50-95"], values, each, rows, len(items))


def _at_best_confidence(rows: Sequence[tuple[Array, Array, Array, Array]]) -> tuple[float, float]:
    """Mean precision and recall of the classes at IoU 0.5, at the one confidence where their mean F1 is greatest."""
    if not rows:
        return 0.0, 0.0
    confidences = np.linspace(0, 1, 1001)
    means: list[Array] = []
    for all_scores, all_hits, _, objects in rows:
        scores, hits = all_scores[all_hits[0] >= 0], all_hits[0][all_hits[0] >= 0]
        order = np.argsort(-scores, kind="stable")
        count = np.searchsorted(-scores[order], -confidences, side="right")  # detections at least so confident
        true = np.concatenate(([0], np.cumsum(hits[order])))[count]
        # Where nothing is found, nothing is wrong.
        precision, recall = np.where(count > 0, true / np.maximum(count, 1), 1.0), true / objects.sum()
        means.append(np.stack((precision, recall, 2 * precision * recall / np.maximum(precision + recall, 1e-12))))
    mean = np.mean(means, 0)
    best = int(mean[2].argmax())
    return float(mean[0, best]), float(mean[1, best])


def as_labels(found: Detections, polygons: bool = False, sure: float = 0.0) -> Labels:
    """Detections taken as the truth, for agreement without labels: of a classifier its first class.

    Those with a score below `sure` are uncertain: another precision may well not have them.
    """
    if found.boxes.shape[0] == 0 and len(found.scores) and found.points is None and found.turned is None:
        return Labels(np.array([int(found.scores.argmax())]))
    empty = np.zeros((len(found.classes), 0, 3))
    return Labels(
        found.classes,
        found.boxes,
        found.masks if polygons else (),
        empty if found.points is None else np.where(np.arange(3) == 2, 2.0, found.points),
        np.zeros((0, 5)) if found.turned is None else found.turned,
        found.scores < sure,
    )


def _coco(task: str, items: Sequence[Item], found: Sequence[Detections], count: int) -> Any:
    """COCO's evaluation, run and accumulated."""
    from pycocotools import coco, cocoeval

    base: Any = cocoeval.COCOeval
    turned: dict[int, Array] = {}  # by the id that an annotation has

    class Turned(base):
        """IoU of turned boxes instead of upright ones."""

        def computeIoU(self, imgId: int, catId: int) -> Any:  # noqa: N802, N803 (the library's names)
            truth, ours = self._gts[imgId, catId], self._dts[imgId, catId]
            if not truth or not ours:
                return []
            ours = sorted(ours, key=lambda d: -d["score"])[: self.params.maxDets[-1]]
            a, b = (np.array([turned[d["id"]] for d in rows]) for rows in (ours, truth))
            return rotated_iou(a, b)

    truth: Any = coco.COCO()
    ours: Any = coco.COCO()
    images = [{"id": n, "height": i.size[0], "width": i.size[1]} for n, i in enumerate(items)]
    categories = [{"id": k, "name": str(k)} for k in range(count)]
    marks: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for number, (item, here) in enumerate(zip(items, found, strict=True)):
        for is_found, source in enumerate((item.labels, here)):
            for place, label in enumerate(source.classes):
                mark: dict[str, Any] = {
                    # COCO's evaluation takes the id 0 for no match.
                    "id": len(marks[0]) + len(marks[1]) + 1,
                    "image_id": number,
                    "category_id": int(label),
                    "iscrowd": int(not is_found and item.labels.uncertain is not None and item.labels.uncertain[place]),
                }
                x1, y1, x2, y2 = source.boxes[place]
                mark |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                if is_found:
                    mark["score"] = float(here.scores[place])
                if task == "segment":
                    mark["segmentation"] = _runs(source, place, item.size)
                if task == "pose":
                    points = source.points
                    assert points is not None
                    mark["keypoints"] = points[place].ravel().tolist()
                    mark["num_keypoints"] = int((points[place][:, 2] > 0).sum())
                if task == "obb":
                    assert source.turned is not None
                    turned[mark["id"]] = source.turned[place]
                marks[is_found].append(mark)
    with redirect_stdout(io.StringIO()):
        for side, rows in zip((truth, ours), marks, strict=True):
            side.dataset = {"images": images, "categories": categories, "annotations": rows}
            side.createIndex()
        judged: Any = (Turned if task == "obb" else base)(truth, ours, KINDS[task])
        judged.params.maxDets = [MOST]
        judged.params.areaRng, judged.params.areaRngLbl = [[0, 1e10]], ["all"]
        if task == "pose" and marks[0]:
            judged.params.kpt_oks_sigmas = point_sigmas(len(marks[0][0]["keypoints"]) // 3)
        judged.evaluate()
        judged.accumulate()
    return judged


def _runs(source: Labels | Detections, place: int, size: tuple[int, int]) -> Any:
    """A mask's run lengths; of a polygon COCO draws them."""
    from pycocotools import mask as runs

    if isinstance(source, Detections):
        return source.masks[place]
    shape = source.polygons[place]
    if isinstance(shape, dict):  # detections that were taken as labels
        return shape
    return runs.merge(runs.frPyObjects([shape.ravel().tolist()], *size))


def _rows(judged: Any, images: int, count: int) -> tuple[tuple[Array, Array, Array, Array], ...]:
    """By class, what the library found of each image, to be accumulated over other selections of them."""
    made: list[tuple[Array, Array, Array, Array]] = []
    by_class = [judged.evalImgs[k * images : (k + 1) * images] for k in range(count)]
    for entries in by_class:
        scores, hits, image = list[Array](), list[Array](), list[Array]()
        objects = np.zeros(images)
        for number, entry in enumerate(entries):
            if entry is None:
                continue
            objects[number] = int((entry["gtIgnore"] == 0).sum())
            count_here = len(entry["dtScores"])
            scores.append(np.array(entry["dtScores"]))
            matched, ignored = (np.reshape(entry[k], (len(THRESHOLDS), count_here)) for k in ("dtMatches", "dtIgnore"))
            hits.append(np.where(ignored.astype(bool), -1, matched > 0))
            image.append(np.full(count_here, number))
        made.append(
            (
                np.concatenate([np.zeros(0), *scores]),
                np.concatenate([np.zeros((len(THRESHOLDS), 0), int), *hits], 1),
                np.concatenate([np.zeros(0, int), *image]).astype(int),
                objects,
            )
        )
    return tuple(made)
