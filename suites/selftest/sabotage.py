"""`tox -e sabotage`: every named injury of a good export, the claim that must catch it, and what peers make of it.

Beside ours stand a check that the file is there and runs, which is what peers' own tests do, and Polygraphy's
comparison with the undamaged FP32 file in ONNX Runtime, with its default tolerances; beside injuries of latency
pytest-benchmark's comparison of medians. Ends with the line `caught N of N,
false alarms A of M`: a false alarm is a claim that does not hold of a good artifact.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from suites.accuracy import test_accuracy, test_calibration
from suites.conformance import (
    test_dynamic,
    test_export,
    test_metadata,
    test_outputs,
    test_precision,
    test_robustness,
    test_shapes,
)
from suites.selftest import sabotage_runs
from suites.selftest.conftest import Claim, Workshop, judged, small_ones, trained_checkpoint
from suites.selftest.test_broken_accuracy import AGREEMENT, ELEMENTS, LABELS, LOW_SHUFFLED, MATCHING, MOVED, SWAPPED
from suites.selftest.test_broken_exporters import BROKEN, Broken
from suites.selftest.test_nms import changed
from suites.selftest.test_references import FLAT, SCORES_LOWER, SHARPER, boxes_moved, dead, scores_times
from suites.support.bench import Bench
from suites.support.verdict import Verdict

CHAPTERS = (
    test_export,
    test_outputs,
    test_shapes,
    test_metadata,
    test_precision,
    test_dynamic,
    test_robustness,
    test_accuracy,
    test_calibration,
)
CLAIMS: tuple[Claim, ...] = tuple(
    getattr(chapter, name) for chapter in CHAPTERS for name in sorted(vars(chapter)) if name.startswith("test_")
)
# Those of accuracy, whose tests have forms of their own.
CATALOGUE = (
    *BROKEN,
    *(Broken(f"stride {s} dead, INT8", "detect onnx int8", dead(s), LABELS, "mAP50-95") for s in (8, 16, 32)),
    Broken("scores a fifth, INT8", "detect onnx int8", scores_times(0.2), AGREEMENT, "share"),
    Broken("scores half, INT8", "detect onnx int8", scores_times(0.5), AGREEMENT, "scores differ by"),
    Broken("scores twice, INT8", "detect onnx int8", scores_times(2), AGREEMENT, "none is more than 1"),
    Broken("boxes moved by 4 px, INT8", "detect onnx int8", boxes_moved(4), AGREEMENT, "boxes are moved by"),
    Broken("NMS at 0.99", "detect onnx int8 nms", changed("NonMaxSuppression", 3, 0.99), AGREEMENT, "share"),
    Broken("flat probabilities, INT8", "classify onnx int8", FLAT, AGREEMENT, "scores differ by"),
    Broken("scores 0.05 % lower", "detect onnx fp32", SCORES_LOWER, ELEMENTS, "scores"),
    Broken("logits 1 % larger", "classify onnx fp16", SHARPER, ELEMENTS, "probabilities"),
    Broken("scores shuffled among low anchors", "blobs onnx int8", LOW_SHUFFLED, LABELS, "mAP50-95"),
    Broken("two classes swapped, by labels", "blobs onnx fp32", SWAPPED, LABELS, "mAP50-95"),
    Broken("two classes swapped, by matching", "blobs onnx fp32", SWAPPED, MATCHING, "lost"),
    Broken("boxes moved by 0.02 px", "blobs onnx fp32", MOVED, ELEMENTS, "boxes"),
)


@dataclass(frozen=True)
class Row:
    """What was made of one injury; of peers None where they have nothing for this file."""

    broken: Broken
    ours: bool
    because: str
    runs: bool | None  # caught by "it is there and runs"
    polygraphy: bool | None


def main() -> int:
    """Prints the table; 0 where all are caught and nothing good is."""
    trained = trained_checkpoint()
    if trained is None:
        print("the package smartrail-obstacle-detector, which holds the trained checkpoint, is not installed")
        return 4
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    ort.set_default_logger_severity(4)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "small").mkdir()
        workshop = Workshop(trained, small_ones(place / "small"), place)
        try:
            rows = [_row(workshop, broken, place / "looked-at") for broken in CATALOGUE]
            others = [_other(found) for found in sabotage_runs.of_latency(workshop, _made(place / "latency"))]
            tampered = [_other(found) for found in sabotage_runs.of_the_suite(_made(place / "suite"))]
            alarms, clean = _false_alarms(workshop)
            peers = [_polygraphy(workshop, cell, workshop.good(cell).path) for cell in _onnx_cells()]
        finally:
            workshop.run.close()
    seen = [row.polygraphy for row in rows if row.polygraphy is not None]
    ran = [row.runs for row in rows if row.runs is not None]
    print(
        f"Polygraphy caught {sum(seen)} of {len(seen)}, false alarms {sum(map(bool, peers))} of {len(peers)} good files"
    )
    print(f"'it is there and runs' caught {sum(ran)} of {len(ran)}")
    compared = [found.benchmark for found in others if found.benchmark is not None]
    print(f"pytest-benchmark's comparison caught {sum(compared)} of {len(compared)}")
    good, *tampered = tampered
    alarms += [] if good.ours else [f"false alarm: a release of a good project: {good.because}"]
    print(*alarms, sep="\n", end="\n" if alarms else "")
    made = [*(row.ours for row in rows), *(found.ours for found in (*others, *tampered))]
    print(f"caught {sum(made)} of {len(made)}, false alarms {len(alarms)} of {clean + 1}")
    return 0 if all(made) and not alarms else 1


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _other(found: sabotage_runs.Found) -> sabotage_runs.Found:
    words = {True: "caught", False: "passed", None: "-"}
    print(
        f"{found.name:48.48} {found.of:26.26} {words[found.ours]} by {found.by:44.44} "
        f"pytest-benchmark: {words[found.benchmark]}" + ("" if found.ours else f"  <- {found.because}"),
        flush=True,
    )
    return found


def _row(workshop: Workshop, broken: Broken, kept: Path) -> Row:
    shutil.rmtree(kept, ignore_errors=True)

    def damage(path: Path, workshop: Workshop) -> None:
        broken.damage(path, workshop)
        kept.mkdir()
        if path.is_file():
            shutil.copy2(path, kept)

    verdict, because = workshop.judge(broken.case, broken.claim, damage, broken.rewrites_manifest)
    ours = verdict is broken.verdict and broken.word in because
    file = next(iter(kept.glob("*")), None)
    runs = _runs(file, workshop.case(broken.case).spec.imgsz)
    row = Row(broken, ours, f"{verdict}: {because}", runs, _polygraphy(workshop, broken.case, file))
    words = {True: "caught", False: "passed", None: "-"}
    print(
        f"{broken.name:48.48} {broken.case:26.26} {words[ours]} by {broken.claim.__name__.removeprefix('test_'):44.44} "
        f"runs: {words[row.runs]:7} polygraphy: {words[row.polygraphy]}" + ("" if ours else f"  <- {row.because}"),
        flush=True,
    )
    return row


def _runs(file: Path | None, imgsz: tuple[int, int]) -> bool | None:
    """Whether a check that the file is there, loads and gives something would have failed."""
    if file is None:
        return True
    try:
        if file.suffix == ".onnx":
            session: Any = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
            inputs = session.get_inputs()
            session.run(None, {i.name: np.zeros(_shape(i.shape, imgsz), _dtype(i.type)) for i in inputs})
        elif file.suffix == ".torchscript":
            import torch

            torch.jit.load(str(file))(torch.zeros(1, 3, *imgsz))
        else:
            return None
    except Exception:  # noqa: BLE001 (whatever a runtime raises: the check fails)
        return True
    return False


def _shape(shape: Any, imgsz: tuple[int, int]) -> list[int]:
    named = {"batch": 1, "height": imgsz[0], "width": imgsz[1]}
    return [d if isinstance(d, int) else named.get(str(d), 1) for d in shape]


def _dtype(kind: str) -> Any:
    return {"tensor(float16)": np.float16, "tensor(double)": np.float64}.get(kind, np.float32)


def _polygraphy(workshop: Workshop, cell: str, file: Path | None) -> bool | None:
    """Whether Polygraphy's comparison with the good FP32 file fails, on the feeds that our claims use."""
    words = cell.split()
    if "onnx" not in words:
        return None
    if file is None or file.suffix != ".onnx":
        return True
    source = workshop.good(" ".join("fp32" if w in ("fp16", "int8") else w for w in words)).path
    bench = workshop.bench(cell)
    feeds = dict(bench.run.feeds(bench.spec, bench.spec.batch, bench.spec.imgsz)[0].arrays)
    try:
        runners = [OnnxrtRunner(SessionFromOnnx(str(p)), name=n) for p, n in ((source, "good"), (file, "judged"))]
        found = Comparator.run(runners, data_loader=[feeds])
        return not bool(Comparator.compare_accuracy(found))
    except Exception:  # noqa: BLE001 (what it cannot load or feed it has caught)
        return True


def _onnx_cells() -> list[str]:
    return [cell for cell in dict.fromkeys(b.case for b in CATALOGUE) if "onnx" in cell.split()]


def _false_alarms(workshop: Workshop) -> tuple[list[str], int]:
    """Claims that do not hold of good artifacts, and how many were judged (PASS or a failure)."""
    found: list[str] = []
    clean = 0
    for cell in dict.fromkeys(b.case for b in CATALOGUE):
        for claim, verdict, because in _all_claims(workshop, cell):
            said = verdict not in (Verdict.NOT_SUPPORTED, Verdict.NO_BASELINE)
            clean += said
            if said and verdict is not Verdict.PASS:
                found.append(f"false alarm: {cell} {claim.__name__} {verdict}: {because}")
    return found, clean


def _all_claims(workshop: Workshop, cell: str) -> Iterator[tuple[Callable[..., None], Verdict, str]]:
    bench: Bench = workshop.bench(cell)
    try:
        for claim in CLAIMS:
            yield claim, *judged(claim, bench)
    finally:
        bench.close()


if __name__ == "__main__":
    sys.exit(main())
