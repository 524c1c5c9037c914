"""Corrupted artifacts: bits flipped, ends cut, pieces swapped, another model's file. None is called right that is not.

With a manifest every one is refused. Brought by somebody, without one, it ends in one line, a failure, or a pass, and a
pass only where what it computes is within the tolerance all the same. `tox -e sabotage` tries over 500 of each format.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporters import formats
from exporters.artifact import foreign
from exporters.errors import ArtifactError
from exporters.tensorrt.header import read_engine
from suites.conformance import test_export as export
from suites.conformance import test_metadata as metadata
from suites.conformance import test_outputs as outputs
from suites.conformance import test_precision as precision
from suites.conformance import test_shapes as shapes
from suites.selftest.conftest import is_long, judged
from suites.selftest.test_ahead_of_time import is_here
from suites.support.bench import Bench
from suites.support.cases import what_is_missing
from suites.support.verdict import Verdict

if TYPE_CHECKING:
    from suites.selftest.conftest import Workshop

pytest.importorskip("onnx", reason="the toolchain onnx is not installed")

ENGINE = "twins engine fp16"  # of TensorRT-RTX, which nothing here runs
CELLS = ("twins onnx fp32", "twins onnx fp16", "twins torchscript fp32", "twins pytorch fp32", ENGINE)
# Whose toolchains `tox -e formats` has. Not Core ML: without macOS nothing shows that what passes is right.
MADE = ("openvino", "mnn", "ncnn", "executorch", "pt2", "aotinductor", "tflite", "paddle")
FURTHER = tuple(f"twins {name} fp32" for name in MADE)
CLAIMS = (
    export.test_artifact_loads_from_its_files_alone,
    shapes.test_input_signature_is_the_requested,
    shapes.test_output_names_match_reference,
    shapes.test_output_shapes_match_reference,
    shapes.test_outputs_are_finite,
    outputs.test_outputs_match_reference,
    metadata.test_class_names_survive_the_round_trip,
    metadata.test_metadata_describes_the_request,
    precision.test_achieved_precision_is_the_requested,
)
EXAMPLES = 600 if is_long() else 12
CALM = (Verdict.PASS, Verdict.NOT_SUPPORTED, Verdict.SKIPPED)  # nothing is said against the file
# What is done to a file: a kind, two places as shares of its length, and a byte; and which file of several.
DAMAGES = st.tuples(
    st.sampled_from(["flip", "flip many", "cut", "cut the front", "swap", "zeros", "insert", "twice", "other"]),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 255),
)
WHICH = st.integers(0, 5)


def damaged(data: bytes, other: bytes, damage: tuple[str, float, float, int]) -> bytes:
    """The file's bytes after the damage."""
    kind, one, two, byte = damage
    low, high = sorted((int(one * len(data)), int(two * len(data))))
    made = bytearray(data)
    if kind == "flip":
        made[low] ^= byte
    elif kind == "flip many":
        for place in range(low, len(made), max(len(made) // 50, 1)):
            made[place] ^= byte
    elif kind == "cut":
        del made[high:]
    elif kind == "cut the front":
        del made[: low + 1]
    elif kind == "swap":
        size = min(high - low, len(made) - high, 256)
        made[low : low + size], made[high : high + size] = made[high : high + size], made[low : low + size]
    elif kind == "zeros":
        made[low:high] = bytes(high - low)
    elif kind == "insert":
        made[low:low] = bytes([byte] * 16)
    elif kind == "twice":
        made = made * 2
    else:
        made = bytearray(other)
    return bytes(made)


@pytest.fixture(scope="module")
def counted() -> Iterator[dict[str, Counter[str]]]:
    """How the corrupted files of each format ended."""
    found = {cell: Counter[str]() for cell in (*CELLS, *FURTHER)}
    yield found
    print(*(f"{cell}: {dict(counts)}" for cell, counts in found.items() if counts), sep="\n")


@pytest.mark.parametrize("cell", [*CELLS, *(pytest.param(cell, marks=pytest.mark.formats) for cell in FURTHER)])
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType] (its metaclass hides the type)
)
@given(damage=DAMAGES, which=WHICH)
def test_a_corrupted_artifact_is_never_called_right(
    workshop: Workshop, counted: dict[str, Counter[str]], tmp_path_factory: pytest.TempPathFactory, cell: str,
    damage: tuple[str, float, float, int], which: int,
) -> None:  # fmt: skip
    case = workshop.case(cell)
    entry = formats.get(case.spec.format)
    if cell == ENGINE and not is_here():
        pytest.skip("TensorRT-RTX is not installed: exportgate[rtx] brings it")
    if cell in FURTHER and (missing := what_is_missing(entry, "cpu")):
        pytest.skip(missing)
    # ncnn has no layer for an operator of `mixed`, and X2Paddle no view_as.
    stranger = "classify" if entry.id in ("ncnn", "paddle") else "mixed"
    good, other = workshop.good(cell), workshop.good(cell.replace("twins", stranger))
    name, data = _file_of(good.path, which)
    made = damaged(data, _file_of(other.path, which)[1], damage)
    if made == data:
        return
    path = tmp_path_factory.mktemp("corrupted") / good.path.name
    shutil.copytree(good.path, path) if good.path.is_dir() else None
    (path / name).write_bytes(made)
    _refused_with_a_manifest(workshop, cell, name, made)
    brought = foreign(path, entry.id, case.spec.to_dict(), trust=True, is_code=entry.is_code)
    bench = Bench(workshop.run, case, brought)
    try:
        found = {claim.__name__: judged(claim, bench) for claim in CLAIMS}
        for name, (verdict, because) in found.items():
            assert "Traceback" not in because and "\n" not in because, f"{damage} {name}: {because}"
            assert verdict in CALM or because, f"{damage} {name}: {verdict} without a word"
        bad = [str(verdict) for verdict, _ in found.values() if verdict not in CALM]
        counted[cell][bad[0] if bad else "passes, and is right"] += 1
        if not bad:
            _is_right(bench, good.path)
    finally:
        bench.close()
        shutil.rmtree(path.parent)


def _file_of(artifact: Path, which: int) -> tuple[Path, bytes]:
    """One of an artifact's files, by its place in it, and its bytes."""
    files = sorted(f for f in artifact.rglob("*") if f.is_file()) if artifact.is_dir() else [artifact]
    file = files[which % len(files)]
    return file.relative_to(artifact), file.read_bytes()


def _refused_with_a_manifest(workshop: Workshop, cell: str, name: Path, made: bytes) -> None:
    """The same file in the place of the one that its manifest describes."""

    def damage(path: Path, workshop: Workshop) -> None:
        (path / name).write_bytes(made)

    def claim(bench: Bench) -> None:
        with pytest.raises(ArtifactError):
            bench.artifact().verify()

    verdict, because = workshop.judge(cell, claim, damage, rewrites_manifest=False)
    assert verdict is Verdict.PASS, because


def _is_right(bench: Bench, good: Path) -> None:
    """What passed computes what the reference does, seen without our comparison; of an engine the plan is the same."""
    if not bench.case.runtime.runs:
        assert read_engine(bench.artifact().path).plan() == read_engine(good).plan()
        return
    feeds = bench.feeds()[0]
    expected, observed = bench.expected(feeds), bench.outputs(feeds)
    limit = 1e-2 if bench.spec.precision.value == "fp16" else 1e-3
    for name, want in expected.items():
        assert np.max(np.abs(np.asarray(observed[name], np.float64) - want)) <= limit * np.ptp(want)
