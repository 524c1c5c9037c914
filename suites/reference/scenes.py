"""Labelled pictures, always the same ones: textured shapes at varied sizes over parts of two photographs.

Each object has a class (its shape), a bright spot at its front, so that its direction can be seen, four key points, a
polygon of what is visible of it, and the turned box of the whole. One data set so serves every task. `write` lays it
out as the YOLO data set format does; a training makes its pictures in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exporters.calibration.images import prepare_image, read_image
from exporters.models.spec import ModelSpec
from exporters.spec import ExportSpec
from exporters.toolchain import cache_root
from suites.reference.photographs import folder

Array = npt.NDArray[Any]
SIZE = 256  # pixels of a side
COUNT = 400  # pictures that accuracy is judged on: INT8 may lose 1 % of the metric, whose interval is 1 % wide then
CALIBRATED = 320  # pictures that INT8 is calibrated on: above the 300 below which a report warns
# Outlines around the origin, front to the right, in units of the length (1 from tail to front); the widths are theirs.
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "arrow": [(0.5, 0), (0.1, 0.3), (0.1, 0.12), (-0.5, 0.12), (-0.5, -0.12), (0.1, -0.12), (0.1, -0.3)],
    "wedge": [(0.5, 0), (-0.5, 0.28), (-0.5, -0.28)],
    "hammer": [(0.5, 0.3), (0.2, 0.3), (0.2, 0.1), (-0.5, 0.1), (-0.5, -0.1), (0.2, -0.1), (0.2, -0.3), (0.5, -0.3)],
    "leaf": [
        (0.5 * math.cos(t), 0.26 * math.sin(t) * (1 + 0.4 * math.cos(t)))
        for t in np.linspace(0, 2 * math.pi, 24, endpoint=False).tolist()
    ],
    "brick": [(0.5, 0.27), (-0.5, 0.27), (-0.5, -0.27), (0.5, -0.27)],
    "fish": [(0.5, 0), (0.25, 0.22), (-0.2, 0.1), (-0.5, 0.3), (-0.4, 0), (-0.5, -0.3), (-0.2, -0.1), (0.25, -0.22)],
}
NAMES = dict(enumerate(OUTLINES))
KPT_SHAPE = (4, 3)  # front, tail, left, right; x, y and whether it can be seen
FLIP = (0, 1, 3, 2)  # which key point each is in a mirrored picture
SMALL, LARGE = 48, 128  # pixels of a longer side: six cells of the finest scale, and what the coarsest alone learns
MANY = 4  # objects in one picture
LEAST_VISIBLE = 0.4  # of an object's area: one of which less can be seen has no label
SPLITS = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Thing:
    """One object of a picture, in pixels.

    Attributes:
        label: number of its class.
        outline: (P, 2) polygon of what is visible of it.
        points: (4, 3) x, y and 2 seen, 1 hidden by another object, 0 outside (x = y = 0 then).
        turned: cx, cy, width along its direction, height, and the direction's angle in radians of the whole shape.
    """

    label: int
    outline: Array
    points: Array
    turned: Array

    @property
    def box(self) -> Array:
        """x1, y1, x2, y2 of what is visible."""
        return np.concatenate((self.outline.min(0), self.outline.max(0)))


@dataclass(frozen=True)
class Picture:
    """(SIZE, SIZE, 3) uint8 RGB and its objects."""

    image: npt.NDArray[np.uint8]
    things: tuple[Thing, ...]


def picture(split: str, number: int, task: str) -> Picture:
    """The picture of this number: for a classifier one large object, for turned boxes objects that lie wholly in it."""
    single, whole = task == "classify", task == "obb"
    generator = np.random.default_rng((SPLITS[split], number, int(single), int(whole)))
    canvas = _background(generator)
    placed: list[tuple[int, Array, Array, Array]] = []  # class, outline, key points, turned box of the whole
    for _ in range(1 if single else int(generator.integers(1, 9))):
        made = _placed(generator, single, whole, [p[1] for p in placed])
        if made is not None:
            placed.append(made)
            _paint(generator, canvas, made[1], made[2])
    canvas *= generator.uniform(0.75, 1.2)
    canvas += generator.normal(0, generator.uniform(1, 9), canvas.shape)
    return Picture(np.clip(canvas, 0, 255).astype(np.uint8), tuple(_visible(placed)))


@cache
def _photographs() -> tuple[npt.NDArray[np.uint8], ...]:
    return tuple(read_image(folder() / name) for name in ("china.jpg", "flower.jpg"))


def _background(generator: np.random.Generator) -> Array:
    """A part of a photograph, mirrored, darkened and tinted at random; (SIZE, SIZE, 3) float64."""
    from PIL import Image

    source = _photographs()[int(generator.integers(2))]
    side = int(generator.integers(160, min(source.shape[:2])))
    top, left = (int(generator.integers(0, n - side + 1)) for n in source.shape[:2])
    part = np.ascontiguousarray(source[top : top + side, left : left + side])
    shown = np.asarray(Image.fromarray(part).resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float64)
    for axis in (0, 1):
        if generator.random() < 0.5:
            shown = np.flip(shown, axis)
    return np.clip(shown * generator.uniform(0.5, 1.1, 3), 0, 255)


def _placed(
    generator: np.random.Generator, single: bool, whole: bool, others: list[Array]
) -> tuple[int, Array, Array, Array] | None:
    """A shape somewhere: class, outline (P, 2), key points (4, 2), turned box (5,).

    None where it would hide too much of another or, though it has to be `whole`, lie partly outside.
    """
    from shapely import Polygon

    label = int(generator.integers(len(OUTLINES)))
    length = float(np.exp(generator.uniform(math.log(110), math.log(200)) if single else generator.uniform(3.4, 5.2)))
    angle = float(generator.uniform(-math.pi, math.pi))
    wide = float(generator.uniform(0.85, 1.15))
    shape = np.array(list(OUTLINES.values())[label]) * (length, length * wide)
    low, high = shape.min(0), shape.max(0)
    middle = (low + high) / 2
    corner = np.array([[high[0], middle[1]], [low[0], middle[1]], [middle[0], low[1]], [middle[0], high[1]]])
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    margin = SIZE * (0.4 if single else 0.06)
    centre = generator.uniform(margin, SIZE - margin, 2)
    outline = (shape - middle) @ turn + centre
    region = Polygon(outline)
    if any(Polygon(o).intersection(region).area > 0.35 * min(Polygon(o).area, region.area) for o in others):
        return None
    turned = np.array([*centre, *(high - low), angle])
    if whole and (corners(turned).min() < 0 or corners(turned).max() > SIZE):
        return None
    return label, outline, (corner - middle) @ turn + centre, turned


def _paint(generator: np.random.Generator, canvas: Array, outline: Array, points: Array) -> None:
    """Fills the outline with a texture of two colours, a spot of a third near the front, with soft edges, in place."""
    first, second = (generator.uniform(20, 235, 3) for _ in range(2))
    cover, window = _filled(outline)
    y, x = np.mgrid[window]
    direction, period = generator.uniform(0, math.pi), generator.uniform(4, 14)
    wave = np.sin((x * math.cos(direction) + y * math.sin(direction)) * 2 * math.pi / period)
    kind = int(generator.integers(4))
    if kind == 0:
        share = np.zeros(cover.shape)
    elif kind == 1:
        share = (wave > 0).astype(float)
    elif kind == 2:
        share = (wave + 1) / 2
    else:
        across = np.sin((y * math.cos(direction) - x * math.sin(direction)) * 2 * math.pi / period)
        share = (wave * across > 0).astype(float)
    colours = first + share[..., None] * (second - first) * 0.6
    part = canvas[window]
    part += cover[..., None] * (colours - part)
    front, tail = points[0], points[1]
    spot = front + 0.22 * (tail - front)
    radius = 0.06 * float(np.hypot(*(front - tail)))
    bright = np.full(3, 250.0) if first.mean() < 140 else np.full(3, 10.0)
    disc = np.clip(radius + 0.5 - np.hypot(x - spot[0], y - spot[1]), 0, 1)
    part += np.minimum(disc, cover)[..., None] * (bright - part)


def _filled(outline: Array) -> tuple[Array, tuple[slice, slice]]:
    """The share of each pixel that a polygon covers, in 0..1, of four times as many in each direction, and the rows
    and columns of the picture that it is of: nothing is covered outside."""
    from PIL import Image, ImageDraw

    mask = Image.new("L", (SIZE * 4, SIZE * 4))
    # A pixel's centre lies half a pixel from its corner, where Pillow counts from.
    ImageDraw.Draw(mask).polygon([(px * 4 + 1.5, py * 4 + 1.5) for px, py in outline.tolist()], fill=255)
    left, top = np.clip(np.floor(outline.min(0)).astype(int) - 2, 0, SIZE - 1).tolist()
    right, bottom = np.clip(np.ceil(outline.max(0)).astype(int) + 3, 1, SIZE).tolist()
    part = mask.crop((left * 4, top * 4, right * 4, bottom * 4))
    small = part.resize((right - left, bottom - top), Image.Resampling.BOX)
    return np.asarray(small, np.float64) / 255, (slice(top, bottom), slice(left, right))


def _visible(placed: list[tuple[int, Array, Array, Array]]) -> Iterator[Thing]:
    """What later shapes and the picture's edge leave of each."""
    from shapely import MultiPolygon, Point, Polygon, box

    frame = box(0, 0, SIZE, SIZE)
    shapes = [Polygon(outline) for _, outline, _, _ in placed]
    for number, (label, _, points, turned) in enumerate(placed):
        left: Any = shapes[number].intersection(frame)
        for later in shapes[number + 1 :]:
            left = left.difference(later)
        parts = [p for p in (left.geoms if isinstance(left, MultiPolygon) else [left]) if isinstance(p, Polygon)]
        largest = max(parts, key=lambda p: p.area, default=Polygon())
        if largest.area < LEAST_VISIBLE * shapes[number].area:
            continue
        seen = np.zeros(KPT_SHAPE)
        for row, (px, py) in zip(seen, points, strict=True):
            if 0 <= px < SIZE and 0 <= py < SIZE:
                hidden = any(s.contains(Point(px, py)) for s in shapes[number + 1 :])
                row[:] = (px, py, 1 if hidden else 2)
        yield Thing(label, np.array(largest.exterior.coords)[:-1], seen, turned)


def corners(turned: Array) -> Array:
    """(4, 2) corners of a turned box cx, cy, w, h, angle."""
    cos, sin = math.cos(turned[4]), math.sin(turned[4])
    ends = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * turned[2:4] / 2
    return ends @ np.array([[cos, sin], [-sin, cos]]) + turned[:2]


def write(target: Path, task: str, counts: dict[str, int]) -> Path:
    """Writes a data set: target/images/SPLIT/NUMBER.bmp, labels beside it and data.yaml; of classify class folders.

    Returns:
        The YAML, or for classify `target`.
    """
    from PIL import Image

    for split, count in counts.items():
        for number in range(count):
            made = picture(split, number, task)
            name = f"{number:05}.bmp"  # noise does not compress, and PNG takes 20 times as long
            if task == "classify":
                path = target / split / NAMES[made.things[0].label] / name
            else:
                path = target / "images" / split / name
                labels = target / "labels" / split / f"{number:05}.txt"
                labels.parent.mkdir(parents=True, exist_ok=True)
                labels.write_text("".join(line(thing, task) + "\n" for thing in made.things), encoding="utf-8")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(made.image).save(path)
    if task == "classify":
        return target
    lines = ["path: .", *(f"{s}: images/{s}" for s in counts), "names:", *(f"  {i}: {n}" for i, n in NAMES.items())]
    lines += [f"kpt_shape: {list(KPT_SHAPE)}", f"flip_idx: {list(FLIP)}"] if task == "pose" else []
    (target / "data.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target / "data.yaml"


def data(model: ModelSpec) -> Path:
    """COUNT labelled pictures of the model's task in the cache, written once: `evaluate` of the reference models."""
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    target = cache_root() / "reference" / f"{model.task}-{COUNT}-{source}"
    name = "." if model.task == "classify" else "data.yaml"
    if not target.exists():
        temporary = target.with_name(f".{uuid.uuid4().hex}")
        write(temporary, model.task, {"val": COUNT})
        try:
            temporary.rename(target)
        except OSError:  # another process was faster
            shutil.rmtree(temporary)
    return target / name


def training(spec: ExportSpec) -> Iterator[dict[str, Array]]:
    """Pictures of the training split, one by one: `data` of the reference models' INT8."""
    for number in range(CALIBRATED):
        yield _batch(spec, [picture("train", number, spec.model.task).image])


def feeds(spec: ExportSpec) -> Iterator[dict[str, Array]]:
    """Pictures of the test split in four batches: `feeds` of the reference models. The first of each tells most."""
    task = spec.model.task
    for first in _telling(task):
        numbers = range(first, first + spec.batch)
        yield _batch(spec, [picture("test", n, task).image for n in numbers])


@cache
def _telling(task: str) -> tuple[int, ...]:
    """Numbers of four pictures with many objects, small and large ones, so that every scale of a detector has what to
    find; of a classifier the first four."""

    def sides(number: int) -> Array:
        boxes = np.array([thing.box for thing in picture("test", number, task).things]).reshape(-1, 4)
        return (boxes[:, 2:] - boxes[:, :2]).max(1)

    def is_one(number: int) -> bool:
        found = sides(number)
        return task == "classify" or bool(len(found) >= MANY and found.min() < SMALL and found.max() > LARGE)

    return tuple(itertools.islice((n for n in itertools.count() if is_one(n)), 4))


def _batch(spec: ExportSpec, images: Iterable[npt.NDArray[np.uint8]]) -> dict[str, Array]:
    """(B, 3, h, w) as the deployment prepares them, by the input's name."""
    entry, how = spec.model.inputs[0], spec.model.preprocess
    return {entry.name: np.stack([prepare_image(i, spec.imgsz, how) for i in images]).astype(entry.dtype)}


def line(thing: Thing, task: str) -> str:
    """An object's line of a label file: the class, then numbers relative to the picture's size."""
    x1, y1, x2, y2 = np.clip(thing.box, 0, SIZE) / SIZE
    values = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
    if task == "segment":
        values = [float(v) for v in np.clip(thing.outline / SIZE, 0, 1).ravel()]
    if task == "pose":
        scaled = thing.points / (SIZE, SIZE, 1)
        values += [float(v) for v in scaled.ravel()]
    if task == "obb":
        values = [float(v) for v in (corners(thing.turned) / SIZE).ravel()]
    return " ".join([str(thing.label), *(f"{v:.6f}".rstrip("0").rstrip(".") for v in values)])
