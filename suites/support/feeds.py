"""Feeds: what the outputs are compared on. Real photographs that make the model respond, plain ones, and noise."""

from __future__ import annotations

import hashlib
import io
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporters import calibration, toolchain
from exporters.cache import place, writing
from exporters.calibration.images import list_images, prepare_image, read_image
from exporters.models.spec import ModelSpec, classifier_output
from exporters.pool import RemoteSession
from exporters.session import Array
from exporters.spec import ExportSpec
from suites.reference.photographs import folder
from suites.support.compare import SCORE_FLOOR

EXCITE_STEPS = 60
UNDECIDED = 4  # sets between two classes
HALVINGS = 16  # of the way between two images: 2^-16 of a logit's difference of 100 is 0.002
# What numpy and zipfile raise for files that are damaged.
DAMAGED = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    TypeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
)


@dataclass(frozen=True)
class FeedSet:
    """Feeds with a name for the report. `fires`: the model is known to respond, so that power can be proven on them.

    `undecided`: a classifier finds two classes as probable, which no 8 bits keep.
    """

    name: str
    arrays: dict[str, Array]
    fires: bool
    undecided: bool = False

    def rows(self, which: slice, name: str) -> FeedSet:
        """Some rows of every input."""
        return FeedSet(
            f"{self.name}, {name}",
            {k: v[which] for k, v in self.arrays.items()},
            self.fires,
            self.undecided,
        )


def photographs(model: ModelSpec) -> list[Path]:
    """The model's own images, or the two photographs that scikit-learn ships (found without importing it).

    Raises:
        ToolchainMissing: scikit-learn is not installed and the model brings no feeds.
    """
    if model.feeds:
        return list_images(Path(model.feeds), "val")
    return [folder() / "china.jpg", folder() / "flower.jpg"]


def make_feeds(spec: ExportSpec, reference: RemoteSession, batch: int, imgsz: tuple[int, int]) -> list[FeedSet]:
    """Sets of feeds of one shape, whose rows differ. Deterministic; the excited photographs are kept in the cache."""
    made = _made(spec, reference, batch, imgsz)
    return made + _undecided(spec.model, reference, made)


def _made(spec: ExportSpec, reference: RemoteSession, batch: int, imgsz: tuple[int, int]) -> list[FeedSet]:
    model = spec.model
    if ":" in model.feeds and not Path(model.feeds).exists():
        made = calibration.feeds_from(model.feeds, spec.but(batch=batch, imgsz=imgsz))
        return [FeedSet(f"{model.feeds.partition(':')[2]} {n}", f, True) for n, f in zip(range(4), made, strict=False)]
    sets = [FeedSet("noise", _noise(model, batch, imgsz), False)]
    if not model.has_images or len(model.inputs) != 1:
        return [FeedSet("noise", sets[0].arrays, True), FeedSet("other noise", _noise(model, batch, imgsz, 1), True)]
    entry = model.inputs[0]
    images = np.stack([prepare_image(read_image(p), imgsz, model.preprocess) for p in photographs(model)[:2]]).astype(
        entry.dtype
    )
    scored = any(g.kind == "score" for o in model.outputs for g in o.groups)
    if scored and not model.feeds:
        excited = _excited(reference, images, entry.name, imgsz)
        sets.insert(0, FeedSet("excited photographs", {entry.name: _rows(excited, batch, model.stride)}, True))
        if batch == 1 and len(excited) > 1:
            sets.insert(1, FeedSet("excited photograph 2", {entry.name: excited[1:2]}, True))
    sets.insert(
        0 if not scored or model.feeds else len(sets) - 1,
        FeedSet("photographs", {entry.name: _rows(images, batch, model.stride)}, not scored or bool(model.feeds)),
    )
    return sets


def _undecided(model: ModelSpec, reference: RemoteSession, sets: list[FeedSet]) -> list[FeedSet]:
    """Of a classifier of images: between one image and another of another class, just before the class changes.

    Where a class is certain, softmax hides what happens before it: damage moves its probability hundreds of times less
    than here, where two of them are alike.
    """
    output = classifier_output(model)
    if output is None or not model.has_images or len(model.inputs) != 1:
        return []
    name, batch = model.inputs[0].name, len(next(iter(sets[0].arrays.values())))

    def classes(images: Array) -> Array:
        return np.asarray(reference.run({name: images})[output.name]).reshape(batch, -1).argmax(1)

    rows = np.concatenate([s.arrays[name] for s in sets])
    first = np.concatenate([classes(s.arrays[name]) for s in sets])
    found: list[FeedSet] = []
    for number in range(min(UNDECIDED, len(sets))):
        own = np.arange(number * batch, (number + 1) * batch)
        # The next row of another class; around the end, so that rows have different ones.
        others = np.array([next((i for i in np.roll(range(len(rows)), -n) if first[i] != first[n]), n) for n in own])
        if (own == others).any():
            break  # all rows are of one class
        low, high = np.zeros(batch), np.ones(batch)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            stays = classes(_mixed(rows[own], rows[others], middle)) == first[own]
            low, high = np.where(stays, middle, low), np.where(stays, high, middle)
        found.append(FeedSet(f"undecided {number}", {name: _mixed(rows[own], rows[others], low)}, True, undecided=True))
    return found


def _mixed(one: Array, other: Array, shares: Array) -> Array:
    """Rows between two others; `shares` (B,) of the other."""
    weights = shares.reshape(-1, *[1] * (one.ndim - 1))
    return ((1 - weights) * one + weights * other).astype(one.dtype)


def _rows(images: Array, batch: int, stride: int) -> Array:
    """`batch` different images from a few: each again rolled by multiples of the stride, so that it still fires."""
    rows = [np.roll(images[i % len(images)], (i // len(images)) * stride, axis=2) for i in range(batch)]
    return np.ascontiguousarray(np.stack(rows))


def _noise(model: ModelSpec, batch: int, imgsz: tuple[int, int], seed: int = 0) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for entry in model.inputs:
        shape = model.shape(entry, batch, imgsz)
        if np.issubdtype(np.dtype(entry.dtype), np.integer):
            made[entry.name] = generator.integers(
                int(entry.low), max(int(entry.high), int(entry.low) + 1), shape
            ).astype(entry.dtype)
        else:
            made[entry.name] = generator.uniform(entry.low, entry.high, shape).astype(entry.dtype)
    return made


def _excited(reference: RemoteSession, images: Array, name: str, imgsz: tuple[int, int]) -> Array:
    """The images after some steps towards higher scores of the reference; kept by what the reference was made of.

    They are kept in a zip file, whose checksum tells when it is damaged.
    """
    key = hashlib.sha256(f"{reference.artifact.key} {imgsz} {EXCITE_STEPS}".encode() + images.tobytes()).hexdigest()
    path = toolchain.cache_root() / "feeds" / f"{key[:32]}.npz"
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as kept:
                found = kept["images"]
            if found.shape == images.shape and found.dtype == images.dtype:
                return found
        except DAMAGED:
            pass
        path.unlink(missing_ok=True)
    made = np.array(reference.excite({name: images}, EXCITE_STEPS, SCORE_FLOOR)[name])
    packed = io.BytesIO()
    np.savez(packed, images=made)
    with writing():
        place(packed.getvalue(), path)
    return made
