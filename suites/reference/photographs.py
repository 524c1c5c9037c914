"""A calibration set of real photographs, for checkpoints that come without pictures: crops of scikit-learn's two."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from exporters.calibration.images import prepare_image, read_image
from exporters.errors import ToolchainMissing
from exporters.session import Array
from exporters.spec import ExportSpec

COUNT = 320  # above the 300 below which a report warns


def folder() -> Path:
    """Where scikit-learn keeps its photographs, found without importing it.

    Raises:
        ToolchainMissing: it is not installed.
    """
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise ToolchainMissing(
            "the photographs of scikit-learn are not installed", "install scikit-learn, or give the model feeds"
        )
    return Path(next(iter(found.submodule_search_locations))) / "datasets" / "images"


def crops(spec: ExportSpec) -> Iterator[dict[str, Array]]:
    """COUNT crops of 40 to 100 % of a side, half of them mirrored, half brighter or darker; always the same ones."""
    generator = np.random.default_rng(0)
    images = [read_image(folder() / name) for name in ("china.jpg", "flower.jpg")]
    for number in range(COUNT):
        image = images[number % len(images)]
        share = generator.uniform(0.4, 1.0)
        height, width = (int(side * share) for side in image.shape[:2])
        top = int(generator.integers(0, image.shape[0] - height + 1))
        left = int(generator.integers(0, image.shape[1] - width + 1))
        part = image[top : top + height, left : left + width]
        if generator.random() < 0.5:
            part = part[:, ::-1]
        if generator.random() < 0.5:
            part = np.clip(part * generator.uniform(0.5, 1.5), 0, 255).astype(np.uint8)
        entry = spec.model.inputs[0]
        made = prepare_image(np.ascontiguousarray(part), spec.imgsz, spec.model.preprocess)
        yield {entry.name: made[None].astype(entry.dtype)}
