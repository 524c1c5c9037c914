"""The further formats: files that are damaged, missing or another's, and exporters that make something else.

Each format of the registry whose toolchain is here is tried in all of its precisions, so that a new one needs no test
of its own for that. `tox -e formats` has the toolchains.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from exporters import formats
from exporters.artifact import Artifact, foreign
from exporters.metadata import SIDE_CAR
from exporters.models.spec import ModelSpec
from exporters.spec import CALIBRATED, ExportSpec, Precision, request
from suites.accuracy import test_accuracy as accuracy
from suites.conformance import test_export as export
from suites.conformance import test_metadata as metadata
from suites.conformance import test_outputs as outputs
from suites.conformance import test_precision as precision
from suites.conformance import test_shapes as shapes
from suites.conformance import test_weights as weights
from suites.selftest.conftest import Claim, judged
from suites.selftest.test_corrupted import CALM, CLAIMS
from suites.support.bench import Bench
from suites.support.cases import MAIN, what_is_missing
from suites.support.verdict import Verdict

if TYPE_CHECKING:
    from suites.selftest.conftest import Workshop

pytestmark = pytest.mark.formats
MODEL = "classify"
FURTHER = [f for f in formats.registry().values() if f.id not in MAIN]
# Where FP16 sums round after each product (ExecuTorch on CPUs that add in FP16), 5 % of noise in one layer of the
# classifier is not beyond what its probabilities move by that: INSENSITIVE. The detector's outputs are surer.
CELLS = [
    f"{'detect' if p is Precision.FP16 and f.runtimes[0].fp16_terms == 1 else MODEL} {f.id} {p}"
    for f in FURTHER
    for p in f.precisions
]


@pytest.fixture(autouse=True)
def toolchain(request: pytest.FixtureRequest) -> None:
    """The formats whose toolchain is not here are skipped."""
    entry = formats.get(request.getfixturevalue("cell").split()[1])
    missing = what_is_missing(entry, "cpu")
    if entry.id == "edgetpu" and not missing:
        from exporters.formats import edgetpu

        missing = "" if edgetpu.compiler() else edgetpu.MISSING
    if missing:
        pytest.skip(missing)


def _files(artifact: Artifact) -> list[Path]:
    """The files that users get, relative to the primary one's place."""
    path = artifact.path
    return [f.relative_to(path.parent) for f in sorted(path.rglob("*") if path.is_dir() else [path]) if f.is_file()]


def _bad(good: bytes, other: bytes) -> Iterator[tuple[str, bytes | None]]:
    yield "missing", None
    yield "empty", b""
    yield "cut", good[: len(good) // 2]
    yield "of another format", other


@pytest.mark.parametrize("cell", CELLS)
def test_bad_files_are_told_in_one_line(workshop: Workshop, tmp_path: Path, cell: str) -> None:
    """Each file of the artifact in turn: missing, empty, cut in half, another format's under this name."""
    case, good = workshop.case(cell), workshop.good(cell)
    assert not _judged_as_brought(workshop, cell, good.path), "something is said against the good one, too"
    other = workshop.good(f"{MODEL} onnx fp32").path.read_bytes()
    entry = formats.get(case.spec.format)
    for name in _files(good):
        for kind, data in _bad((good.path.parent / name).read_bytes(), other):
            place = tmp_path / f"{name.name} {kind}"
            whole = place / good.path.name
            shutil.copytree(good.path, whole) if good.path.is_dir() else _copy(good.path, whole)
            (place / name).unlink() if data is None else (place / name).write_bytes(data)
            said = _judged_as_brought(workshop, cell, whole) if whole.exists() else "is not there"
            print(f"{entry.id} {case.spec.precision}: {name.name} {kind}: {said}")
            assert said, f"{name} {kind}: nothing was noticed"
            shutil.rmtree(place)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True)
    shutil.copy2(source, target)


def _judged_as_brought(workshop: Workshop, cell: str, path: Path) -> str:
    """The first thing that a claim says against a file that somebody else made, in one line; "" where none does."""
    case = workshop.case(cell)
    entry = formats.get(case.spec.format)
    brought = foreign(path, entry.id, case.spec.to_dict(), trust=True, is_code=entry.is_code)
    bench = Bench(workshop.run, case, brought)
    try:
        for claim in (*CLAIMS, weights.test_weights_match_the_checkpoint):
            verdict, because = judged(claim, bench)
            if verdict not in CALM:
                assert verdict in (Verdict.FAIL, Verdict.ERROR), f"{claim.__name__}: {verdict} {because}"
                assert because and "Traceback" not in because and "\n" not in because, because
                return f"{verdict}: {because}"
    finally:
        bench.close()
    return ""


# ---- sabotage ------------------------------------------------------------------------------------------------------

Instead = Callable[[ExportSpec, Path], ExportSpec | None]


def _of_other_weights(spec: ExportSpec, folder: Path) -> ExportSpec | None:
    """Of the checkpoint whose first convolution has the other sign."""
    weights = spec.model.weights
    assert weights is not None
    tensors = load_file(weights)
    first = next(k for k, t in tensors.items() if t.ndim == 4)
    tensors[first] = -tensors[first]
    with safe_open(weights, "pt") as file:
        facts = file.metadata()
    save_file(tensors, folder / weights.name, facts)
    return spec.but(model=replace(spec.model, weights=folder / weights.name))


def _of_other_names(spec: ExportSpec, folder: Path) -> ExportSpec | None:
    """With the class names one further."""
    names = list(spec.model.names.values())
    model: ModelSpec = replace(spec.model, names=dict(enumerate([*names[1:], names[0]])))
    return spec.but(model=model)


def _of_another_precision(spec: ExportSpec, folder: Path) -> ExportSpec | None:
    """In another precision of the format, the one that is nearest in what it costs."""
    others = [p for p in formats.get(spec.format).precisions if p is not spec.precision]
    if not others:
        return None
    other = Precision.FP16 if Precision.FP16 in others else others[0]
    options = {"data": "suites.reference.scenes:training"} if other in CALIBRATED else {}
    options = {k: v for k, v in options.items() if k in formats.get(spec.format).options}
    return request(spec.model, spec.format, precision=other, **options)


def _of_another_size(spec: ExportSpec, folder: Path) -> ExportSpec | None:
    """For pictures of half the size."""
    return spec.but(imgsz=(spec.imgsz[0] // 2, spec.imgsz[1] // 2))


SABOTAGE: dict[str, tuple[Instead, tuple[Claim, ...]]] = {
    "other weights": (
        _of_other_weights,
        (
            outputs.test_outputs_match_reference,
            accuracy.test_detections_agree_without_labels,
            weights.test_weights_match_the_checkpoint,
        ),
    ),
    "other names": (_of_other_names, (metadata.test_class_names_survive_the_round_trip,)),
    "another precision": (_of_another_precision, (precision.test_achieved_precision_is_the_requested,)),
    "another size": (
        _of_another_size,
        (shapes.test_input_signature_is_the_requested, metadata.test_metadata_describes_the_request),
    ),
    "its manifest's file is another": (_of_other_weights, (export.test_files_match_the_manifest,)),
}


@pytest.mark.parametrize("name", SABOTAGE)
@pytest.mark.parametrize("cell", CELLS)
def test_what_an_exporter_made_instead_is_caught(workshop: Workshop, tmp_path: Path, cell: str, name: str) -> None:
    """Each claim passes on the good artifact and fails on what another request's export put in its place."""
    instead, claims = SABOTAGE[name]
    spec = instead(workshop.case(cell).spec, tmp_path)
    if spec is None:
        pytest.skip(f"{cell.split()[1]} has one precision")
    other = workshop.run.pool.export(spec)

    def damage(path: Path, workshop: Workshop) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(other.path, path) if other.path.is_dir() else shutil.copy2(other.path, path)
        if (beside := other.path.with_name(SIDE_CAR)).is_file():
            shutil.copy2(beside, path.with_name(SIDE_CAR))

    whole = name != "its manifest's file is another"
    for claim in claims:
        good, because = workshop.judge(cell, claim)
        assert good in CALM, because
        bad, because = workshop.judge(cell, claim, damage, rewrites_manifest=whole)
        if good is Verdict.PASS:
            assert bad is Verdict.FAIL, f"{claim.__name__} {bad}: {because}"
            return
    pytest.fail(f"no claim of {', '.join(c.__name__ for c in claims)} is made of {cell}")
