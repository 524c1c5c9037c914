"""Ranges of tensors on the calibration set, by ONNX Runtime's calibrators; kept, as a search asks again and again."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (onnxruntime.quantization has no types, and onnx.load leaves the type of a path open)

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx

from exporters import calibration
from exporters.artifact import digest
from exporters.cache import place, touch, writing
from exporters.errors import ExportError, ExportgateError, first_line
from exporters.session import Array
from exporters.spec import ExportSpec, is_factory
from exporters.toolchain import cache_root

# Bins of the histograms that entropy and percentile are taken from, and the share that the percentile keeps.
BINS = {"entropy": 1024, "percentile": 2048}
PERCENTILE = 99.99
TOGETHER = 4  # batches whose tensors a histogram holds at a time: ONNX Runtime's own takes the whole set


@dataclass(frozen=True)
class Ranges:
    """The magnitude up to which each tensor is represented, by its name, and how many images told it."""

    largest: Mapping[str, float]
    images: int


class _Feeds:
    """ONNX Runtime's CalibrationDataReader over our calibration set."""

    def __init__(self, batches: Iterator[dict[str, Array]]) -> None:
        self.batches = batches
        self.images = 0

    def get_next(self) -> dict[str, Array] | None:
        feeds = next(self.batches, None)
        if feeds is not None:
            self.images += len(next(iter(feeds.values())))
        return feeds

    def __len__(self) -> int:
        return 0


def calibrated(parent: Path, folder: Path, spec: ExportSpec, tensors: Sequence[str]) -> Ranges:
    """The ranges of these tensors of an FP32 file on the request's calibration set, measured or kept from before.

    Raises:
        ExportError: the calibrator failed.
    """
    size, batches = calibration.whole_batches(spec, varies=spec.dynamic or spec.batch_axis)
    path = _kept_path(parent, spec, tensors, size)
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        kept = Ranges({k: float(found["largest"][k]) for k in tensors}, int(found["images"]))
    except (OSError, ValueError, LookupError, TypeError):
        kept = None  # none yet, or damaged
    if kept is not None:
        touch(path)
        return kept
    made = _measured(parent, folder, spec.calibrator, tensors, _Feeds(batches))
    with writing():
        place(json.dumps({"largest": dict(made.largest), "images": made.images}).encode(), path)
    return made


def reached(parent: Path, tensors: Sequence[str], feeds: Sequence[Mapping[str, Array]]) -> dict[str, list[float]]:
    """The largest magnitude of each of these tensors of an FP32 file, on each feed.

    Args:
        parent: the ONNX file.
        tensors: names of its inputs or of outputs of its nodes.
        feeds: of the batch that it takes.
    """
    import onnxruntime as ort

    model = onnx.load(parent)
    inputs, outputs = ({t.name for t in side} for side in (model.graph.input, model.graph.output))
    for name in tensors:
        if name not in inputs | outputs:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    session: Any = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = [n for n in tensors if n not in inputs]
    found: dict[str, list[float]] = {n: [] for n in tensors}
    for feed in feeds:
        values = dict(feed) | dict(zip(wanted, session.run(wanted, dict(feed)), strict=True))
        for name in tensors:
            found[name].append(float(np.abs(np.asarray(values[name], np.float32)).max()))
    return found


def _kept_path(parent: Path, spec: ExportSpec, tensors: Sequence[str], size: int) -> Path:
    """Where the ranges for this file, set, preprocessing, batch, method and version of ONNX Runtime are kept."""
    import onnxruntime as ort

    how = spec.model.preprocess
    facts = [
        digest(parent),
        calibration.first_digest(spec) if is_factory(spec.data) else calibration.digest_of(spec),
        [how.resize, how.pad, list(how.mean), list(how.std), list(spec.imgsz), size],
        [spec.data if is_factory(spec.data) else "", spec.split, spec.fraction, spec.calibrator],
        sorted(tensors),
        str(ort.__version__),
    ]
    return cache_root() / "ranges" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.json"


def _measured(parent: Path, folder: Path, calibrator: str, tensors: Sequence[str], feeds: _Feeds) -> Ranges:
    import onnxruntime as ort
    from onnxruntime.quantization import calibrate

    base: Any = {
        "max": calibrate.MinMaxCalibrater,
        "entropy": calibrate.EntropyCalibrater,
        "percentile": calibrate.PercentileCalibrater,
    }[calibrator]
    options: dict[str, Any] = {} if calibrator == "max" else {"symmetric": True, "num_bins": BINS[calibrator]}
    options |= {"percentile": PERCENTILE} if calibrator == "percentile" else {}

    class Calibrater(base):
        """Measures the tensors of the placement instead of every one."""

        def select_tensors_to_calibrate(self, model: onnx.ModelProto) -> tuple[set[str], dict[str, Any]]:
            _, known = super().select_tensors_to_calibrate(model)
            return set(tensors), cast("dict[str, Any]", known)

        def create_inference_session(self) -> None:
            options = ort.SessionOptions()
            options.graph_optimization_level = (
                ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            )  # as its own: all tensors stay
            # Exports may run at once, each with a thread a core: threads that spin while they wait starve the others
            # (seen: three calibrations on 32 cores took minutes instead of seconds).
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            self.infer_session = ort.InferenceSession(
                self.augmented_model_path, options, providers=self.execution_providers
            )

    calibrate.CalibrationDataReader.register(_Feeds)
    augmented = folder / "augmented.onnx"
    images = 0
    try:
        calibrater: Any = Calibrater(str(parent), augmented_model_path=str(augmented), **options)
        calibrater.augment_graph()
        calibrater.create_inference_session()
        if calibrator == "max":
            calibrater.collect_data(feeds)
            images = feeds.images
        else:
            while part := list(islice(feeds.batches, TOGETHER)):
                images += sum(len(next(iter(b.values()))) for b in part)
                calibrater.collect_data(_Feeds(iter(part)))
        found: Any = calibrater.compute_data()
    except ExportgateError:
        raise  # of the calibration set, which is read meanwhile
    except Exception as error:
        # ONNX Runtime raises what it likes while it calibrates.
        what = f"the calibrator failed: {type(error).__name__}: {first_line(error)}"
        raise ExportError(what, "check the calibration set") from error
    finally:
        augmented.unlink(missing_ok=True)
    return Ranges({k: float(np.max(np.abs(np.asarray(d.range_value)))) for k, d in found.items()}, images)
