"""The real checkpoint against what the peer's own PyTorch model says of it: without this a wrong model passes, since
artifacts are compared with the reference that they were exported from."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from exporters.arrays import Array
from exporters.errors import CheckpointError
from exporters.models.catalog import from_checkpoint
from exporters.pool import Pool
from exporters.spec import ExportSpec

# Held against the peer by `tox -e peer`, which writes a new one where they differ.
STORED = Path(__file__).with_name("peer_outputs.npy")
EVERY = 8  # anchors: one of eight is stored


def blocks() -> Array:
    """An image (1, 3, 320, 320) of random colours in squares of 16 pixels: the same with every version of a library."""
    colours = np.random.default_rng(0).uniform(0, 1, (1, 3, 20, 20))
    return np.kron(colours, np.ones((16, 16))).astype(np.float32)


def test_our_model_is_the_checkpoints_own(trained: Path) -> None:
    """Boxes within 1e-3 px and scores within 1e-5 of the peer's PyTorch model, on every eighth anchor."""
    spec = ExportSpec(from_checkpoint(trained), "pytorch", imgsz=(320, 320))
    with Pool() as pool:
        session = pool.open(pool.export(spec), spec, "eager", "cpu")
        error = np.abs(session.run({"images": blocks()})["output0"][..., ::EVERY] - np.load(STORED))
    assert error[:, :4].max() <= 1e-3, f"a box differs by {error[:, :4].max():.3g} px"
    assert error[:, 4:].max() <= 1e-5, f"a score differs by {error[:, 4:].max():.3g}"


def test_the_stored_outputs_tell_another_activation(trained: Path) -> None:
    """The check above can fail: with SiLU where the file has none, boxes move by far more than is allowed."""
    model = from_checkpoint(trained)
    assert model.arguments["linear"] == ["model.9.cv1"]
    code = (
        "import sys, numpy, torch; from exporters.models.build import build;"
        "from exporters.models.spec import ModelSpec;"
        "from suites.selftest.test_real_checkpoint import EVERY, STORED, blocks; from pathlib import Path;"
        "m = build(ModelSpec('m', 'exporters.models.yolov8:build', {'scale': 'n', 'nc': 6}, Path(sys.argv[1])));"
        "e = abs(m(torch.from_numpy(blocks())).numpy()[..., ::EVERY] - numpy.load(STORED));"
        "print(e[:, :4].max(), e[:, 4:].max())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(trained)], capture_output=True, text=True, check=True)
    boxes, scores = map(float, done.stdout.split())
    assert boxes > 100 and scores > 1e-4


def altered(trained: Path, target: Path, before: bytes, after: bytes, count: int = -1) -> Path:
    """A copy of the checkpoint with another pickle, of the same length; `count` limits how many places are changed."""
    with zipfile.ZipFile(trained) as source, zipfile.ZipFile(target, "w") as made:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert before in content and len(before) == len(after)
                content = content.replace(before, after, count)
            made.writestr(entry, content)
    return target


# 8-byte floats of the pickle: the normalization's epsilon, 1e-3 and 2e-3.
EPSILONS = (b"G" + b"\x3f\x50\x62\x4d\xd2\xf1\xa9\xfc", b"G" + b"\x3f\x60\x62\x4d\xd2\xf1\xa9\xfc")


@pytest.mark.parametrize(
    ("before", "after", "count", "says"),
    [
        (b"activation\nSiLU\n", b"activation\nReLU\n", -1, "activation ReLU in 'model.0'"),
        (*EPSILONS, 1, "has eps 0.002"),
    ],
    ids=["activation", "epsilon"],
)
def test_a_checkpoint_that_computes_otherwise_is_refused(
    trained: Path, tmp_path: Path, before: bytes, after: bytes, count: int, says: str
) -> None:
    path = altered(trained, tmp_path / "best.pt", before, after, count)
    with Pool() as pool, pytest.raises(CheckpointError, match=says):
        pool.export(ExportSpec(from_checkpoint(path), "pytorch"))


def test_an_epsilon_that_all_normalizations_have_is_the_model_s(trained: Path, tmp_path: Path) -> None:
    """The peer's classifiers have another than its detectors: what the file says everywhere is built so."""
    path = altered(trained, tmp_path / "best.pt", *EPSILONS)
    model = from_checkpoint(path)
    assert model.arguments["eps"] == 0.002
    assert "eps" not in from_checkpoint(trained).arguments
    outputs: list[Array] = []
    with Pool() as pool:
        for spec in (ExportSpec(m, "pytorch", imgsz=(320, 320)) for m in (model, from_checkpoint(trained))):
            session = pool.open(pool.export(spec), spec, "eager", "cpu")
            outputs.append(np.array(session.run({"images": blocks()})["output0"]))
            session.close()
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3
