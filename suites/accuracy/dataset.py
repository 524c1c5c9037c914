"""Labelled images in the YOLO data set layout: a YAML with splits and label files, or a folder a class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from exporters.calibration.images import SUFFIXES, list_images, read_image
from exporters.errors import BadRequest
from exporters.models.spec import class_names

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Labels:
    """The objects of one image, in its pixels.

    Attributes:
        classes: (N,); of a classifier the one class of the image.
        boxes: (N, 4) x1, y1, x2, y2.
        polygons: of segment (P, 2) an object.
        points: (N, K, 3) of pose: x, y, and 0 absent, 1 hidden, 2 seen.
        turned: (N, 5) of obb: cx, cy, w, h, radians.
        uncertain: (N,) bool: objects that need not be found, and whose detections are no errors; None for none.
    """

    classes: Array
    boxes: Array = field(default_factory=lambda: np.zeros((0, 4)))
    polygons: tuple[Array, ...] = ()
    points: Array = field(default_factory=lambda: np.zeros((0, 0, 3)))
    turned: Array = field(default_factory=lambda: np.zeros((0, 5)))
    uncertain: Array | None = None


@dataclass(frozen=True)
class Item:
    """An image, its (height, width), and what it shows."""

    path: Path
    size: tuple[int, int]
    labels: Labels


@dataclass(frozen=True)
class DataSet:
    """Labelled images of one split, in order of their paths."""

    names: Mapping[int, str]
    items: Sequence[Item]


def read_dataset(data: Path, split: str, task: str, kpt_shape: tuple[int, ...] = ()) -> DataSet:
    """The labelled images of a split.

    Args:
        data: the data set's YAML; for classify a folder with a folder a split and in it a folder a class.
        split: "val", say.
        task: detect, segment, pose, obb or classify.
        kpt_shape: of pose, how many key points and how many values of each.

    Raises:
        BadRequest: what is missing or cannot be read: file, line, value and what to do.
    """
    if task == "classify":
        return _of_folders(data, split)
    if data.is_dir():
        raise BadRequest(f"data '{data}' is a folder without labels", "give the data set's YAML")
    images = list_images(data, split)
    names = _names(data)
    items: list[Item] = []
    for path in images:
        image = read_image(path)
        size = (image.shape[0], image.shape[1])
        items.append(Item(path, size, _labels(label_file(path), size, task, len(names), kpt_shape)))
    return DataSet(names, items)


def _of_folders(data: Path, split: str) -> DataSet:
    root = data / split
    folders = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    if not folders:
        raise BadRequest(
            f"data '{data}' has no folder '{split}' with a folder a class", "lay it out as SPLIT/CLASS/image.jpg"
        )
    # A class may have no image in this split, so names are those of all splits.
    names = sorted({c.name for s in data.iterdir() if s.is_dir() for c in s.iterdir() if c.is_dir()})
    items: list[Item] = []
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
            image = read_image(path)
            items.append(Item(path, (image.shape[0], image.shape[1]), Labels(np.array([names.index(folder.name)]))))
    if not items:
        raise BadRequest(f"data '{root}' has no images", "images are " + ", ".join(sorted(SUFFIXES)))
    return DataSet(dict(enumerate(names)), items)


def _names(data: Path) -> Mapping[int, str]:
    import yaml

    values: Any = yaml.safe_load(data.read_text(encoding="utf-8"))  # list_images has read it before
    if "names" not in values:
        raise BadRequest(f"data '{data}' has no names", "add the classes' names: a list, or a mapping from numbers")
    return class_names(values["names"], f"data '{data}'")


def label_file(image: Path) -> Path:
    """images/SPLIT/NAME.png -> labels/SPLIT/NAME.txt: the last folder named images counts."""
    parts = list(image.parts)
    where = len(parts) - 1 - parts[::-1].index("images") if "images" in parts else None
    if where is not None:
        parts[where] = "labels"
    return Path(*parts).with_suffix(".txt")


def _labels(path: Path, size: tuple[int, int], task: str, count: int, kpt_shape: tuple[int, ...]) -> Labels:
    """The objects of a label file; a file that is not there labels an image without objects."""
    rows: list[list[float]] = []
    if path.is_file():
        for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if text.strip():
                rows.append(_row(text, f"labels '{path}' line {number}", task, count, kpt_shape))
    scale = np.array([size[1], size[0]], float)
    classes = np.array([int(r[0]) for r in rows], int)
    if task == "segment":
        polygons = tuple(np.array(r[1:]).reshape(-1, 2) * scale for r in rows)
        boxes = np.array([[*p.min(0), *p.max(0)] for p in polygons]).reshape(-1, 4)
        return Labels(classes, boxes, polygons)
    if task == "obb":
        corners = [np.array(r[1:]).reshape(4, 2) * scale for r in rows]
        boxes = np.array([[*c.min(0), *c.max(0)] for c in corners]).reshape(-1, 4)
        return Labels(classes, boxes, turned=np.array([rectangle(c) for c in corners]).reshape(-1, 5))
    centred = np.array([r[1:5] for r in rows]).reshape(-1, 4) * np.tile(scale, 2)
    boxes = np.concatenate((centred[:, :2] - centred[:, 2:] / 2, centred[:, :2] + centred[:, 2:] / 2), 1)
    if task != "pose":
        return Labels(classes, boxes)
    points = np.full((len(rows), kpt_shape[0], 3), 2.0)
    for place, row in enumerate(rows):
        points[place, :, : kpt_shape[1]] = np.array(row[5:]).reshape(kpt_shape[0], kpt_shape[1])
    if kpt_shape[1] == 2:  # no visibility: what lies in the corner is absent
        points[..., 2] = np.where((points[..., :2] == 0).all(2), 0, 2)
    points[..., :2] *= scale
    return Labels(classes, boxes, points=points)


def _row(text: str, where: str, task: str, count: int, kpt_shape: tuple[int, ...]) -> list[float]:
    """The numbers of one line: the class, then what the task has, relative to the image's size."""
    words = text.split()
    try:
        values = [float(w) for w in words]
    except ValueError:
        bad = next(w for w in words if not _is_number(w))
        raise BadRequest(f"{where}: '{bad}' is not a number", "write the class and numbers from 0 to 1") from None
    if task == "segment":
        fits, wanted = len(values) >= 7 and len(values) % 2 == 1, "a class and at least three points x y"
    else:
        numbers = {"detect": 5, "obb": 9, "pose": 5 + math.prod(kpt_shape)}[task]
        fits, wanted = len(values) == numbers, f"{numbers} numbers"
    if not fits:
        raise BadRequest(f"{where}: {len(values)} numbers", f"a {task} label has {wanted}")
    if not 0 <= values[0] < count or values[0] != int(values[0]):  # NaN and infinity are beyond either end
        raise BadRequest(f"{where}: class {words[0]}", f"classes are 0 to {count - 1}")
    places = values[1:]
    if task == "pose" and kpt_shape[1] == 3:
        places = [*values[1:5], *(v for n, v in enumerate(values[5:]) if n % 3 < 2)]
        seen = next((v for v in values[7::3] if v not in (0, 1, 2)), None)
        if seen is not None:
            raise BadRequest(f"{where}: visibility {seen:g}", "it is 0 absent, 1 hidden or 2 seen")
    outside = next((v for v in places if not -1e-3 <= v <= 1 + 1e-3), None)
    if outside is not None:
        raise BadRequest(f"{where}: {outside:g} is not from 0 to 1", "coordinates are relative to the image's size")
    return values


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def rectangle(corners: Array) -> Array:
    """cx, cy, w, h and the angle in radians of the least rectangle around points (P, 2)."""
    import shapely

    found: Any = shapely.MultiPoint(corners).minimum_rotated_rectangle
    points = np.array(cast("Any", getattr(found, "exterior", found)).coords)[:4]
    if len(points) < 4:  # all on a line
        points = np.array([points[0], points[-1], points[-1], points[0]])
    along, across = points[1] - points[0], points[2] - points[1]
    return np.array([*points.mean(0), np.hypot(*along), np.hypot(*across), math.atan2(along[1], along[0])])
