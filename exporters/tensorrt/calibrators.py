"""Implicit quantization of TensorRT 8.6 to 10.x: the four calibrators over our calibration set, and their cache."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exporters import calibration
from exporters.artifact import digest
from exporters.cache import place, writing
from exporters.errors import BadRequest, ExportError, ExportgateError, first_line
from exporters.session import Array
from exporters.spec import ExportSpec, is_factory
from exporters.tensorrt.library import Library
from exporters.tensorrt.timing import slug
from exporters.toolchain import cache_root

BASES = {
    "LEGACY_CALIBRATION": "IInt8LegacyCalibrator",
    "ENTROPY_CALIBRATION": "IInt8EntropyCalibrator",
    "ENTROPY_CALIBRATION_2": "IInt8EntropyCalibrator2",
    "MINMAX_CALIBRATION": "IInt8MinMaxCalibrator",
}
SUFFIX = ".calibration"
LEGACY_LINE = re.compile(r"\d+ [0-9a-f]{16} [0-9a-f]{16}")  # LEGACY_CALIBRATION writes quantile and cutoff (10.6)


@dataclass
class Calibration:
    """A calibrator at work: TensorRT's object, lines for the record, and what went wrong inside its callbacks."""

    object: Any = None
    notes: list[str] = field(default_factory=list[str])
    error: ExportgateError | None = None
    images: int = 0


def kept_path(found: Library, spec: ExportSpec, onnx: Path, gpu: Mapping[str, str]) -> Path:
    """The calibration cache for this ONNX file, images, algorithm, batch, preprocessing, TensorRT version and GPU."""
    preprocess = spec.model.preprocess
    facts = {
        "schema": 2,  # before, a part of each batch was read
        "onnx": digest(onnx),
        "images": calibration.first_digest(spec) if is_factory(spec.data) else calibration.digest_of(spec),
        "algorithm": spec.trt_quant_algo,
        "batch": size_of(spec),
        "preprocessing": [preprocess.resize, preprocess.pad, list(preprocess.mean), list(preprocess.std)],
        "imgsz": list(spec.imgsz),
        "tensorrt": found.version,
        "gpu": gpu.get("name", ""),
        "split": spec.split,
        "fraction": spec.fraction,
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache_root() / "calibration" / f"{slug(spec.model.name)[:40]}-{key[:32]}{SUFFIX}"


def size_of(spec: ExportSpec) -> int:
    """Images in a calibration batch: one where the network takes no other number."""
    return calibration.calibration_batch(spec.batch) if spec.batch > 1 or spec.dynamic else 1


def is_cache(data: bytes) -> bool:
    """Whether these bytes are a calibration cache: a line on the algorithm, then "tensor: hexadecimal scale"."""
    lines = data.decode("ascii", errors="replace").splitlines()
    if not lines or not (lines[0].startswith("TRT-") or LEGACY_LINE.fullmatch(lines[0])):
        return False
    for line in lines[1:]:
        name, _, value = line.rpartition(":")
        try:
            ok = bool(name) and len(bytes.fromhex(value.strip())) == 4
        except ValueError:
            ok = False
        if not ok:
            return False
    return len(lines) > 1


def algorithm_of(data: bytes) -> str:
    """The algorithm of a calibration cache, by its first line ("TRT-100600-EntropyCalibration2"); "" where none."""
    line = data.partition(b"\n")[0].decode("ascii", errors="replace").strip()
    if LEGACY_LINE.fullmatch(line):
        return "LEGACY_CALIBRATION"
    word = line.rpartition("-")[2].lower()
    return next((a for a in BASES if a.replace("_", "").lower() == word), "")


def calibrator(found: Library, spec: ExportSpec, onnx: Path, gpu: Mapping[str, str], folder: Path) -> Calibration:
    """The calibrator of a request. Its cache is used only if it was made for exactly this request.

    Args:
        folder: gets a copy of the cache, beside the engine, for who wants to name it with `calibration_cache`.

    Raises:
        BadRequest: the calibration cache that the request names is none, or one of another algorithm.
    """
    state = Calibration()
    # Who brings scales need not have images, which the path depends on.
    path = Path() if spec.calibration_cache else kept_path(found, spec, onnx, gpu)
    cached = b""
    if spec.calibration_cache:
        cached = Path(spec.calibration_cache).read_bytes()
        if not is_cache(cached):
            raise BadRequest(
                f"calibration_cache '{spec.calibration_cache}' is no calibration cache of TensorRT", "name another"
            )
        if (other := algorithm_of(cached)) not in ("", spec.trt_quant_algo):
            raise BadRequest(
                f"calibration_cache '{spec.calibration_cache}' holds scales of {other}, and {spec.trt_quant_algo} is "
                "asked for",
                f"name another, or ask for --trt-quant-algo {other}",
            )
        state.notes.append(f"scales of {spec.calibration_cache} reused: they were not calibrated for these weights")
    elif path.is_file():
        told, _, cached = path.read_bytes().partition(b"\n")
        if told.decode("ascii", errors="replace") != hashlib.sha256(cached).hexdigest():
            state.notes.append(f"the calibration cache {path} is damaged and was made anew")
            cached = b""
        else:  # TensorRT reads it and writes none
            state.notes.append(f"scales of {path}, calibrated for this very request, reused")
            _leave(cached, folder, spec)
    state.object = _implementation(found, spec, size_of(spec), cached, path, folder, state)
    return state


def _leave(data: bytes, folder: Path, spec: ExportSpec) -> None:
    """Puts a cache beside the engine."""
    with writing():
        place(data, folder / f"{spec.trt_quant_algo.lower()}{SUFFIX}")


def filled(feeds: Mapping[str, Array], size: int) -> dict[str, Array]:
    """A batch of `size` from a short one, whose images come again: TensorRT always reads a whole batch."""
    return {k: v if len(v) == size else np.take(v, np.arange(size) % len(v), 0) for k, v in feeds.items()}


def _implementation(
    found: Library, spec: ExportSpec, size: int, cached: bytes, path: Path, folder: Path, state: Calibration
) -> Any:
    """An object of the calibrator's class; what its callbacks raise is kept, since TensorRT would swallow it."""
    base: Any = getattr(found.module, BASES[spec.trt_quant_algo])
    names = [i.name for i in spec.model.inputs]

    class Calibrator(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.batches: Iterator[dict[str, Array]] = calibration.batches(spec, size)
            self.buffers: dict[str, Any] = {}

        def get_batch_size(self) -> int:
            return size

        def get_algorithm(self) -> Any:
            return getattr(found.module.CalibrationAlgoType, spec.trt_quant_algo)

        def get_batch(self, wanted: Sequence[str]) -> list[int] | None:
            try:
                feeds = next(self.batches, None)
                if feeds is None:
                    return None
                state.images += len(next(iter(feeds.values())))
                whole = filled(feeds, size) if spec.model.has_batch else feeds
                return [self._upload(name, whole[name]) for name in wanted if name in names]
            except ExportgateError as error:
                state.error = error
            except Exception as error:  # noqa: BLE001 (called from C++, where an exception would be lost)
                state.error = ExportError(f"calibration failed: {type(error).__name__}: {first_line(error)}", "")
            return None

        def _upload(self, name: str, array: Array) -> int:
            from exporters.cuda.memory import Buffer

            buffer = self.buffers.setdefault(name, Buffer())
            return buffer.fill(array)

        def read_calibration_cache(self) -> bytes | None:
            return cached or None

        def write_calibration_cache(self, cache: Any) -> None:
            data = bytes(cache)
            try:
                with writing():
                    _leave(data, folder, spec)
                    if spec.calibration_cache:
                        return
                    # The digest in front tells a whole cache from one that was cut at the end of a line.
                    place(hashlib.sha256(data).hexdigest().encode() + b"\n" + data, path)
            except ExportgateError as error:  # called from C++, where an exception would be lost
                state.error = error
                return
            state.notes.append(f"calibrated on {state.images} images ({spec.trt_quant_algo})")
            if state.images < calibration.SMALL:
                state.notes.append(f"warning: fewer than {calibration.SMALL} calibration images; NVIDIA recommends 500")

        # Of the legacy calibrator: the share of values below the largest, and how regression weighs them.
        def get_quantile(self) -> float:
            return 0.9999

        def get_regression_cutoff(self) -> float:
            return 1.0

        def read_histogram_cache(self, length: int) -> None:
            return None

        def write_histogram_cache(self, data: Any, length: int) -> None:
            return None

    return Calibrator()
