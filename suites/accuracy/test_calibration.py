"""Calibration: the ranges of an INT8 artifact are those of the pictures that it is used on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from exporters import formats
from exporters.calibration.images import prepare_image, read_image
from exporters.errors import NotSupported
from exporters.session import Array
from exporters.spec import CALIBRATED
from suites.accuracy.pictures import shown_to
from suites.accuracy.search import in_onnx
from suites.support.bench import Bench

pytestmark = [pytest.mark.values, pytest.mark.accuracy]
FAR = 21.1  # chi-squared of 3 degrees of freedom is beyond it once in 10,000
PICTURES, COLOURS = 32, 256  # of the evaluation set, evenly chosen: what is run, and what only its colours are taken of
# Of pictures of one kind, one in n + 1 goes beyond the largest of n others, whatever the tensor: at most one in twenty
# asks for a calibration set of twenty, and finds sets of another kind (noise, swapped colours, unscaled values).
BEYOND = 0.05
# A range twice as large as needed costs one of eight bits; a quarter of the tensors may be so by the chance of a set.
WASTED = 0.25
HALF_A_STEP = 0.5 / 127  # of 8 bits: what lies beyond by less is rounded to the largest value all the same


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared distance of the means of two samples (n, 3), in their standard errors: chi-squared of 3 where equal."""
    errors = a.var(0, ddof=1) / len(a) + b.var(0, ddof=1) / len(b)
    return float(((a.mean(0) - b.mean(0)) ** 2 / np.maximum(errors, 1e-12)).sum())


def _pictures(case: Bench, most: int) -> Iterator[Array]:
    """So many of the evaluation pictures (3, h, w), as the deployment prepares them; one at a time in memory."""
    items = shown_to(case).items
    count = min(most, len(items))
    for number in range(count):
        image = read_image(items[number * len(items) // count].path)
        yield prepare_image(image, case.spec.imgsz, case.model.preprocess)


def test_calibration_fits_the_pictures(case: Bench) -> None:
    """The evaluation pictures neither go beyond the calibrated ranges nor leave half of them empty, and are as red."""
    if case.spec.precision not in CALIBRATED:
        raise NotSupported(f"{case.spec.precision} is not calibrated")
    entry = formats.get(case.spec.format)
    if "data" not in entry.options or (case.brought is None and not case.spec.data):
        raise NotSupported(f"{entry.title} takes no calibration set: it has no ranges of activations")
    if case.brought is not None or case.spec.trt_quant_algo:
        raise NotSupported("somebody else took the ranges")
    spec, first = in_onnx(case.case.spec).but(calibrator="max"), case.model.inputs[0]
    images = list(_pictures(case, PICTURES))
    feeds = [{first.name: np.stack([image] * spec.batch).astype(first.dtype)} for image in images]
    found = case.guard(lambda: case.run.pool.reached(spec, feeds))
    names = sorted(found["calibrated"])
    largest = np.array([found["calibrated"][n] for n in names])
    reached = np.array([found["reached"][n] for n in names])  # (tensors, pictures)
    over = reached > largest[:, None] * (1 + HALF_A_STEP)
    assert over.mean() <= BEYOND, (
        f"{over.mean():.1%} of what {len(images)} pictures reach lies beyond the ranges of {found['images']} "
        f"calibration images, allowed {BEYOND:.0%} (most often at {names[int(over.mean(1).argmax())]}): calibrate on "
        "more images, of this kind and prepared alike"
    )
    theirs, ours = np.array(found["means"]), np.array([image.mean((1, 2)) for image in _pictures(case, COLOURS)])
    if len(theirs) > 1 and len(ours) > 1 and theirs.shape[1] == ours.shape[1] == 3:
        as_it_is, swapped = _distance(theirs, ours), _distance(theirs[:, ::-1], ours)
        assert as_it_is <= FAR or swapped > as_it_is / 2, (
            f"the channels' means of the calibration images are those of {len(ours)} pictures with red and blue "
            "changed: prepare them as RGB"
        )
    wasted = reached.max(1) < largest / 2
    assert wasted.mean() <= WASTED, (
        f"{wasted.mean():.0%} of the ranges are more than twice what {len(images)} pictures reach, allowed "
        f"{WASTED:.0%}: the calibration images are of another kind, or prepared otherwise"
    )
