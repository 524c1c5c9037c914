"""What a deployment makes of a model's outputs: a confidence, suppression, and places in the original image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from exporters.calibration.images import fitted
from exporters.models.spec import ModelSpec
from suites.support.detections import NMS_IOU, detector_output, iou, rotated_iou

Array = npt.NDArray[Any]
MOST = 300  # detections of an image, the contract's default
CANDIDATES = 3000  # of the highest scores, that suppression looks at


@dataclass(frozen=True)
class Detections:
    """What was found in one image, highest score first, in pixels of the original image.

    Attributes:
        scores: (N,) in 0..1; of a classifier the probabilities of all classes, in their order.
        classes: (N,).
        boxes: (N, 4) x1, y1, x2, y2.
        points: (N, K, 3) of pose.
        turned: (N, 5) of obb: cx, cy, w, h, radians.
        masks: of segment, run lengths as COCO encodes them.
    """

    scores: Array
    classes: Array
    boxes: Array
    points: Array | None = None
    turned: Array | None = None
    masks: tuple[Any, ...] = ()


def deploy(
    outputs: Mapping[str, Array],
    row: int,
    model: ModelSpec,
    imgsz: tuple[int, int],
    size: tuple[int, int],
    conf: float,
    suppress: bool = True,
) -> Detections:
    """The detections of one row of a batch of raw outputs.

    Args:
        outputs: by name, as `model.outputs` describes.
        imgsz: height and width that the network was given.
        size: height and width of the original image.
        conf: anchors below this score are dropped.
        suppress: not where the graph has done it.
    """
    spec = detector_output(model)
    if spec is None:
        scores = np.asarray(outputs[model.outputs[0].name][row], np.float64)
        return Detections(scores, np.arange(len(scores)), np.zeros((0, 4)))
    values = np.asarray(outputs[spec.name][row], np.float64)
    groups = {g.kind: g.channels for g in spec.groups}
    best = values[groups["score"]].max(0)
    kept = np.flatnonzero(best >= conf)
    kept = kept[np.argsort(-best[kept], kind="stable")][:CANDIDATES]
    values, best = values[:, kept], best[kept]
    classes = values[groups["score"]].argmax(0)
    cx, cy, w, h = values[groups["box"]]
    boxes = np.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), 1)
    turned = np.stack((cx, cy, w, h, values[groups["angle"]][0]), 1) if "angle" in groups else None
    left = _suppressed(boxes, turned, classes) if suppress else np.arange(len(boxes))
    inner, (top, start) = fitted(size, imgsz, model.preprocess)
    scale = np.array([size[1] / inner[1], size[0] / inner[0]])
    offset = np.array([start, top])

    def back(places: Array) -> Array:
        return (places - offset) * scale

    found = np.concatenate((back(boxes[left, :2]), back(boxes[left, 2:])), 1)
    points = None
    if "point" in groups:
        x, y = (back_axis for back_axis in (values[g.channels][:, left].T for g in spec.groups if g.kind == "point"))
        seen = values[groups["visibility"]][:, left].T if "visibility" in groups else np.ones_like(x)
        points = np.concatenate((back(np.stack((x, y), 2)), seen[..., None]), 2)
    if turned is not None:
        sides = turned[left, 2:4] * scale.mean()  # a letterbox scales both alike
        turned = np.concatenate((back(turned[left, :2]), sides, turned[left, 4:]), 1)
    masks: tuple[Any, ...] = ()
    if "mask" in groups:
        prototypes = next(np.asarray(outputs[o.name][row], np.float64) for o in model.outputs if o is not spec)
        masks = _masks(values[groups["mask"]][:, left].T, prototypes, found, imgsz, (inner, (top, start)), size)
    bounds = np.array([size[1], size[0]] * 2)
    return Detections(best[left], classes[left], np.clip(found, 0, bounds), points, turned, masks)


def above(found: Detections, conf: float, task: str) -> Detections:
    """Those of at least this confidence; a classifier's probabilities as they are."""
    if task == "classify":
        return found
    kept = found.scores >= conf
    return Detections(
        found.scores[kept],
        found.classes[kept],
        found.boxes[kept],
        None if found.points is None else found.points[kept],
        None if found.turned is None else found.turned[kept],
        tuple(m for m, k in zip(found.masks, kept, strict=False) if k),
    )


def _suppressed(boxes: Array, turned: Array | None, classes: Array) -> Array:
    """Places of what suppression within classes leaves, highest score first; the arrays are sorted so."""
    left, chosen = np.arange(len(boxes)), list[int]()
    while len(left) and len(chosen) < MOST:
        first, rest = left[:1], left[1:]
        chosen.append(int(first[0]))
        same = classes[first, None] == classes[None, rest]
        overlap = (
            iou(boxes[first], boxes[rest]) * same if turned is None else rotated_iou(turned[first], turned[rest], same)
        )
        left = rest[overlap[0] <= NMS_IOU]
    return np.array(chosen, int)


def _masks(
    coefficients: Array,
    prototypes: Array,
    boxes: Array,
    imgsz: tuple[int, int],
    place: tuple[tuple[int, int], tuple[int, int]],
    size: tuple[int, int],
) -> tuple[Any, ...]:
    """Run lengths of each mask in the original image, cut at its box."""
    from pycocotools import mask as runs

    (height, width), (top, left) = place
    # Resizing is linear, and along each axis for itself: what becomes of a mask is a matrix on either side of it, and
    # only the part within the box is needed.
    down = _resampling(prototypes.shape[1], imgsz[0], top, height, size[0])
    across = _resampling(prototypes.shape[2], imgsz[1], left, width, size[1])
    # A pixel belongs to the box that its middle lies in.
    ends = np.clip(np.ceil(np.nan_to_num(boxes) - 0.5), 0, np.array([size[1], size[0]] * 2)).astype(int)
    made: list[Any] = []
    for weights, (x1, y1, x2, y2) in zip(coefficients, ends, strict=True):
        drawn = np.zeros(size, np.uint8, order="F")
        drawn[y1:y2, x1:x2] = down[y1:y2] @ np.tensordot(weights, prototypes, 1) @ across[x1:x2].T > 0
        made.append(cast("Any", runs).encode(drawn))
    return tuple(made)


@lru_cache(maxsize=16)
def _resampling(prototypes: int, network: int, start: int, length: int, size: int) -> Array:
    """(size, prototypes): along one axis, prototypes resized to the network's input, cut and resized to the image."""
    import torch
    from torch.nn.functional import interpolate

    whole = interpolate(torch.eye(prototypes, dtype=torch.float64)[None], network, mode="linear")
    return interpolate(whole[..., start : start + length], size, mode="linear")[0].numpy().T
