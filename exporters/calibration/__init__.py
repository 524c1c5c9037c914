"""Calibration sets: which inputs the ranges of an INT8 artifact are taken from, prepared as the deployment does."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from exporters.artifact import digest
from exporters.calibration.images import list_images, prepare_image, read_image
from exporters.errors import BadRequest
from exporters.session import Array
from exporters.spec import ExportSpec

SMALL = 300  # below, a warning: NVIDIA's guides recommend 500 images for calibration
CALIBRATION_BATCH = 8  # images a calibration batch where the artifact's batch is 1


def calibration_batch(batch: int) -> int:
    """Images in a calibration batch: twice the artifact's batch, 8 for batch 1."""
    return CALIBRATION_BATCH if batch == 1 else 2 * batch


def is_factory(data: str) -> bool:
    """Whether `data` names a `module:factory` of feeds rather than a path."""
    return ":" in data and not Path(data).exists()


def images_of(spec: ExportSpec) -> list[Path]:
    """The images of the calibration set, in order, thinned evenly to `fraction` of them.

    Raises:
        BadRequest: the path does not exist, the YAML cannot be read, the split is missing, or there are no images.
    """
    images = list_images(Path(spec.data), spec.split)
    count = max(1, round(len(images) * spec.fraction))
    return [images[i * len(images) // count] for i in range(count)]


def digest_of(spec: ExportSpec) -> str:
    """Digest of the calibration set: of every image's bytes in order, or of the factory's source."""
    if is_factory(spec.data):
        from exporters.keys import factory_digest
        from exporters.models.spec import ModelSpec

        return factory_digest(ModelSpec("calibration", spec.data, search=spec.model.search))
    total = hashlib.sha256()
    for path in images_of(spec):
        total.update(digest(path).encode())
    return total.hexdigest()


def samples(spec: ExportSpec) -> Iterator[dict[str, Array]]:
    """Feeds of batch 1, one an image (or what the factory yields): name -> array with the model's shape and dtype."""
    entry = spec.model.inputs[0]
    if not is_factory(spec.data):
        for path in images_of(spec):
            yield {entry.name: prepare_image(read_image(path), spec.imgsz, spec.model.preprocess)[None].astype(entry.dtype)}
        return
    yield from feeds_from(spec.data, spec)


def feeds_from(factory: str, spec: ExportSpec) -> Iterator[dict[str, Array]]:
    """What `module:factory` yields when called with the request, as arrays by input name."""
    module, _, name = factory.partition(":")
    added = [str(p) for p in spec.model.search if str(p) not in sys.path]
    sys.path[:0] = added
    try:
        made: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise BadRequest(f"feeds '{factory}' cannot be imported ({error})", "give an importable module:factory") from None
    finally:
        for path in added:
            sys.path.remove(path)
    for feeds in made(spec):
        yield {key: np.asarray(value) for key, value in feeds.items()}


def batches(spec: ExportSpec, size: int) -> Iterator[dict[str, Array]]:
    """`samples` joined along axis 0 into batches of `size`; the last may be short."""
    held: list[dict[str, Array]] = []
    for sample in samples(spec):
        held.append(sample)
        if len(held) == size:
            yield {k: np.concatenate([s[k] for s in held]) for k in held[0]}
            held = []
    if held:
        yield {k: np.concatenate([s[k] for s in held]) for k in held[0]}
