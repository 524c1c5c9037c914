"""What users type for TensorRT's options, made values of the request; each mistake is one line."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from exporters.errors import BadRequest

ALGORITHMS = ("LEGACY_CALIBRATION", "ENTROPY_CALIBRATION", "ENTROPY_CALIBRATION_2", "MINMAX_CALIBRATION")
COMPATIBILITIES = ("none", "ampere_plus", "same_compute_capability")
LEVELS = range(6)

Shape = tuple[int, int, int]


def parse_workspace(value: Any) -> float:
    """Memory for the builder's tactics in GiB, above 0."""
    try:
        gib = float(value)
    except (TypeError, ValueError):
        gib = 0.0
    if isinstance(value, bool) or not 0.0 < gib <= 1024.0:  # NaN fails, too
        raise BadRequest(f"workspace '{value}' is no size in GiB", "give a number above 0, up to 1024, as in 4 or 0.5")
    return gib


def parse_profiles(value: Any) -> tuple[tuple[Shape, Shape, Shape], ...]:
    """Optimization profiles from "1x320x320:4x640x640:8x1280x1280", several separated by commas, or lists of such.

    Each is min:opt:max, and each of these batch x height x width.

    Raises:
        BadRequest: not three shapes of three positive numbers, or min > opt or opt > max.
    """
    entries = value.split(",") if isinstance(value, str) else cast("Sequence[Any]", value)
    if not entries or not isinstance(entries, (list, tuple)):
        raise BadRequest(f"profiles {value!r}", "give min:opt:max, as in 1x320x320:4x640x640:8x1280x1280")
    return tuple(_profile(entry) for entry in cast("Sequence[Any]", entries))


def _profile(entry: Any) -> tuple[Shape, Shape, Shape]:
    parts: Any = entry.split(":") if isinstance(entry, str) else entry
    shapes = [_shape(p, entry) for p in cast("Sequence[Any]", parts)] if isinstance(parts, (list, tuple)) else []
    if len(shapes) != 3:
        raise BadRequest(
            f"profile '{entry}' has {len(shapes)} shapes", "give min:opt:max, as in 1x320x320:4x640x640:8x1280x1280"
        )
    low, best, high = shapes
    for name, a, b in (("batch", 0, 0), ("height", 1, 1), ("width", 2, 2)):
        if not low[a] <= best[b] <= high[a]:
            raise BadRequest(
                f"profile '{entry}': {name} is {low[a]} at least, {best[a]} at best and {high[a]} at most",
                "make min <= opt <= max",
            )
    return low, best, high


def _shape(part: Any, entry: Any) -> Shape:
    numbers = re.split(r"\s*x\s*", part.strip()) if isinstance(part, str) else list(cast("Sequence[Any]", part))
    try:
        batch, height, width = (int(n) for n in numbers)
    except (TypeError, ValueError):
        batch = height = width = 0
    if min(batch, height, width) < 1:
        raise BadRequest(f"profile '{entry}': '{part}' is no shape", "write batch x height x width, as in 4x640x640")
    return batch, height, width


def parse_builder_level(value: Any) -> int:
    """TensorRT's builder optimization level, 0 (fast build) to 5 (fast engine); 3 is its default."""
    text = str(value).strip()
    if not text.isdecimal() or int(text) not in LEVELS:
        raise BadRequest(f"builder_level '{value}' is none", f"give {LEVELS[0]} to {LEVELS[-1]}")
    return int(text)


def parse_timing_cache(value: Any) -> str:
    """A timing cache to begin with, as an absolute path, or "off" to build without any."""
    return "off" if str(value).strip().lower() == "off" else _file(value, "timing_cache", "or off")


def parse_calibration_cache(value: Any) -> str:
    """A calibration cache that another export left, as an absolute path."""
    return _file(value, "calibration_cache", "as an engine's export leaves beside it")


def _file(value: Any, name: str, more: str) -> str:
    path = Path(str(value)).expanduser()
    try:
        there = path.is_file()
    except OSError:
        there = False
    if not there:
        raise BadRequest(f"{name} '{value}' is no file", f"name one, {more}")
    return str(path.resolve())


def parse_hardware_compatibility(value: Any) -> str:
    """Which other GPUs the engine shall run on."""
    text = str(value).strip().lower()
    if text not in COMPATIBILITIES:
        raise BadRequest(f"hardware_compatibility '{value}' is not known", "use " + ", ".join(COMPATIBILITIES))
    return text


def parse_dla(value: Any) -> int:
    """Number of a DLA core (Jetson)."""
    text = str(value).strip()
    if not re.fullmatch(r"\d{1,3}", text):
        raise BadRequest(f"dla '{text:.20}' is no core", "give its number, from 0")
    return int(text)


def parse_algorithm(value: Any) -> str:
    """A calibrator of implicit quantization, by TensorRT's name or without its middle: ENTROPY_2, MINMAX."""
    text = str(value).strip().upper()
    if "_CALIBRATION" not in text:
        text = f"{text[:-2]}_CALIBRATION_2" if text.endswith("_2") else f"{text}_CALIBRATION"
    if text not in ALGORITHMS:
        raise BadRequest(f"trt_quant_algo '{value}' is not known", "use " + ", ".join(ALGORITHMS))
    return text


def parse_compute_capability(value: Any) -> str:
    """Compute capabilities that TensorRT-RTX builds for: "8.6,8.9,12.0"."""
    parts = [p.strip() for p in str(value).split(",")]
    wrong = next((p for p in parts if not re.fullmatch(r"\d{1,2}\.\d", p) or not math.isfinite(float(p))), None)
    if wrong is not None:
        raise BadRequest(f"compute_capability '{wrong}' is none", "write major.minor, as in 8.9 or 8.6,12.0")
    return ",".join(dict.fromkeys(parts))
