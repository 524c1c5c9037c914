"""YOLOv8 in all tasks and scales against the peer: its checkpoints load strictly, and our eager models agree."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from exporters.models.catalog import TASKS, from_checkpoint
from exporters.pool import Pool
from exporters.spec import ExportSpec
from suites.peer.bench import Bench, Side
from suites.peer.figures import Figures

SUFFIX = {"detect": "", "segment": "-seg", "pose": "-pose", "obb": "-obb", "classify": "-cls"}
SIZE = 160  # pixels: the decode's arithmetic is that of any size
# Pixels where the values are, else their own unit; relative to the range for what has none (coefficients, prototypes).
LIMITS = {"box": 1e-3, "point": 1e-3, "score": 1e-5, "visibility": 1e-5, "probability": 1e-5, "angle": 1e-5}
RELATIVE = 1e-5


@pytest.fixture(scope="module")
def side(bench: Bench) -> Iterator[Side]:
    with bench.side("variant-theirs") as made:
        yield made


@pytest.fixture(scope="module")
def pool(bench: Bench) -> Iterator[Pool]:
    with Pool(folder=bench.folder("variants")) as made:
        yield made


@pytest.mark.parametrize("scale", "nsmlx")
@pytest.mark.parametrize("task", TASKS)
def test_a_variant_is_the_peers(bench: Bench, side: Side, pool: Pool, figures: Figures, task: str, scale: str) -> None:
    """The checkpoint says what it is, its weights load strictly, and outputs differ by rounding alone."""
    folder = bench.folder(f"{task}-{scale}")
    images = np.random.default_rng(0).random((1, 3, SIZE, SIZE), np.float32)
    np.save(folder / "images.npy", images)
    checkpoint = folder / f"yolov8{scale}{SUFFIX[task]}.pt"
    told = side.call(
        yaml=f"yolov8{scale}{SUFFIX[task]}.yaml", checkpoint=checkpoint, feeds=folder / "images.npy", folder=folder
    )
    model = from_checkpoint(checkpoint)
    assert (model.task, model.arguments["scale"]) == (task, scale)
    assert told["outputs"] >= len(model.outputs)
    spec = ExportSpec(model, "pytorch", imgsz=(SIZE, SIZE))
    session = pool.open(pool.export(spec), spec, "eager", "cpu")
    outputs = session.run({"images": images})
    session.close()
    checkpoint.unlink()
    worst: dict[str, float] = {}
    for number, output in enumerate(model.outputs):
        want, got = np.load(folder / f"output{number}.npy"), outputs[output.name]
        assert got.shape == want.shape, f"{output.name} has shape {got.shape}, the peer's {want.shape}"
        for group in output.groups:
            a, b = want[:, group.channels], got[:, group.channels]
            assert np.ptp(a) > 0, f"{group.name} does not vary, so nothing is compared"
            off = float(np.abs(a - b).max())
            worst[group.name] = off
            allowed = LIMITS.get(group.kind, RELATIVE * float(np.ptp(a)))
            assert off <= allowed, f"{group.name}: differs by {off:.3g}, allowed {allowed:.3g}"
    figures.notes.append(f"variant {task} {scale}: " + ", ".join(f"{k} {v:.2g}" for k, v in worst.items()))
