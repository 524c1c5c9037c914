"""Metadata: one schema, and every format's encoding of it both ways.

Field names are those that users of the Ultralytics exporter know. JSON turns the integer keys of `names` into strings
and `str()` makes Python literals of everything: reading normalizes both, by ast.literal_eval and json only.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from exporters.errors import ArtifactError, BadRequest, first_line, shown
from exporters.models.spec import class_names
from exporters.spec import NMS, ExportSpec, Precision
from exporters.version import __version__

SIDE_CAR = "metadata.yaml"  # in the folder, or beside the file, of formats that hold no metadata
LARGEST = 16 << 20  # bytes of a side-car
MOST_VALUES = 1 << 20  # that it holds: a YAML alias stands for all that it names, and those may stand in each other


@dataclass(frozen=True)
class Metadata:
    """What an artifact says of itself. `imgsz` is (height, width) in pixels; `args` the options it was made with;
    `kpt_shape` of pose how many key points and values of each. `layout` is "NHWC" where tensors of four axes have their
    channels last, `divisors` maps an output to what each of its channels was divided by, in formats that do so."""

    description: str = ""
    author: str = ""
    date: str = ""
    version: str = ""
    license: str = ""
    docs: str = ""
    stride: int = 1
    task: str = ""
    batch: int = 1
    imgsz: tuple[int, int] = (0, 0)
    names: Mapping[int, str] = field(default_factory=dict[int, str])
    args: Mapping[str, Any] = field(default_factory=dict[str, Any])
    kpt_shape: tuple[int, ...] = ()
    layout: str = ""
    divisors: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])

    @staticmethod
    def of(spec: ExportSpec) -> Metadata:
        """The metadata that an artifact of this request has to carry; the owner's fields come from the model."""
        owner = spec.model.owner
        args: dict[str, Any] = {
            "batch": spec.batch,
            "precision": spec.precision.value,
            "half": spec.precision is Precision.FP16,
            "int8": spec.precision is Precision.INT8,
            "dynamic": spec.dynamic,
            "simplify": spec.simplify,
            "opset": spec.opset,
            "optimize": spec.optimize,
            **({name: getattr(spec, name) for name in NMS} if spec.nms else {}),
        }
        return Metadata(
            description=owner.get("description", spec.model.name),
            author=owner.get("author", ""),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            version=__version__,
            license=owner.get("license", ""),
            docs=owner.get("docs", ""),
            stride=spec.model.stride,
            task=spec.model.task,
            batch=spec.batch,
            imgsz=spec.imgsz,
            names=dict(spec.model.names),
            args=args,
            kpt_shape=spec.model.kpt_shape,
        )

    def values(self) -> dict[str, Any]:
        """Fields in their order as plain values: names dict[int, str], imgsz [height, width]."""
        return {
            "description": self.description,
            "author": self.author,
            "date": self.date,
            "version": self.version,
            "license": self.license,
            "docs": self.docs,
            "stride": self.stride,
            "task": self.task,
            "batch": self.batch,
            "imgsz": list(self.imgsz),
            "names": dict(self.names),
            "args": dict(self.args),
            **({"kpt_shape": list(self.kpt_shape)} if self.kpt_shape else {}),  # of pose alone
            **({"layout": self.layout} if self.layout else {}),
            **({"divisors": {name: list(v) for name, v in self.divisors.items()}} if self.divisors else {}),
        }

    def as_json(self) -> str:
        """TorchScript's config.txt and the engine's header: JSON, where the keys of names become strings."""
        return json.dumps(self.values(), ensure_ascii=False)

    def as_strings(self) -> dict[str, str]:
        """ONNX's metadata_props and CoreML's user_defined_metadata: each value as Python's str()."""
        return {key: str(value) for key, value in self.values().items()}

    def as_yaml(self) -> str:
        """The side-car's text."""
        import yaml

        return yaml.safe_dump(self.values(), sort_keys=False, allow_unicode=True)


# What PyYAML, json, literals and conversions raise of text that is wrong, beside errors of their own.
UNREADABLE = (ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError)


def read_up_to(largest: int, path: Path, again: str) -> bytes:
    """A file of at most so many bytes.

    Raises:
        ArtifactError: it cannot be read, or is larger; `again` says what to do then.
    """
    try:
        with path.open("rb") as file:
            text = file.read(largest + 1)
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read ({error.strerror})", again) from None
    if len(text) > largest:
        raise ArtifactError(f"'{path}' is larger than {largest >> 20} MiB", again)
    return text


def read_yaml(path: Path) -> Metadata:
    """Metadata from a side-car.

    Raises:
        ArtifactError: it is missing, or no YAML of metadata.
    """
    import yaml

    again = "export the artifact again"
    text = read_up_to(LARGEST, path, again)
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, *UNREADABLE) as error:
        raise ArtifactError(f"'{path}' is not YAML ({first_line(error)})", again) from None
    left, stack = MOST_VALUES, [values]
    while stack and left > 0:
        one: Any = stack.pop()
        left -= 1
        stack += _inside(one)
    if stack:
        raise ArtifactError(f"'{path}' holds more than {MOST_VALUES} values, its aliases counted", again)
    return normalize(values, str(path))


def read_json(text: str, where: str) -> Metadata:
    """Metadata from JSON text, as TorchScript's config.txt holds it."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        told = first_line(error)
        raise ArtifactError(f"{where}: the metadata is not JSON ({told})", "export the artifact again") from None
    return normalize(values, where)


def normalize(values: Any, where: str) -> Metadata:
    """Metadata from any encoding's mapping: strings are read as Python literals or numbers; missing fields stay empty.

    Raises:
        ArtifactError: the metadata is no mapping, or a field cannot be read.
    """
    if not isinstance(values, Mapping):
        raise ArtifactError(
            f"{where}: the metadata is {type(values).__name__}, expected a mapping", "export the artifact again"
        )
    values = cast("Mapping[Any, Any]", values)
    read: dict[str, Any] = {}
    for key in ("description", "author", "date", "version", "license", "docs", "task"):
        read[key] = str(values.get(key, ""))
    try:
        for key in ("stride", "batch"):
            if key in values:
                read[key] = _whole(values[key], key)
        if "imgsz" in values:
            size = _literal(values["imgsz"])
            pair = _inside(size) if isinstance(size, (list, tuple)) else [size, size]
            if len(pair) != 2:
                raise ValueError(f"imgsz is {shown(size)}, expected height and width")
            read["imgsz"] = (_whole(pair[0], "imgsz"), _whole(pair[1], "imgsz"))
        if "names" in values:
            read["names"] = class_names(_literal(values["names"]), where)
        if "args" in values:  # older artifacts of the peer lack it
            read["args"] = dict(_literal(values["args"]))
        if values.get("kpt_shape"):
            read["kpt_shape"] = tuple(_whole(v, "kpt_shape") for v in _literal(values["kpt_shape"]))
        if values.get("layout"):
            read["layout"] = _layout(values["layout"])
        if values.get("divisors"):
            read["divisors"] = {str(k): _divisors(v, str(k)) for k, v in dict(_literal(values["divisors"])).items()}
    except (SyntaxError, MemoryError, *UNREADABLE) as error:
        told = f"{type(error).__name__}: {first_line(error)}"
        raise ArtifactError(f"{where}: the metadata cannot be read ({told})", "export the artifact again") from None
    except BadRequest as error:  # of class names, with the place
        raise ArtifactError(error.what, "export the artifact again") from None
    return Metadata(**read)


def _inside(value: Any) -> list[Any]:
    """What a mapping, list or tuple holds."""
    if isinstance(value, dict):
        both = cast("dict[Any, Any]", value)
        return [*both, *both.values()]
    return list(cast("list[Any]", value)) if isinstance(value, (list, tuple)) else []


def _whole(value: Any, key: str) -> int:
    """A whole number, or the text of one."""
    found = _literal(value)
    if type(found) is not int:
        raise ValueError(f"{key} is {shown(value)}, expected a whole number")
    return found


def _layout(value: Any) -> str:
    if value not in ("NCHW", "NHWC"):
        raise ValueError(f"layout is {shown(value)}, expected NCHW or NHWC")
    return str(value)


def _divisors(values: Any, name: str) -> tuple[float, ...]:
    """Positive, finite numbers."""
    found = _inside(values)
    wrong = next((v for v in found if type(v) not in (int, float) or not 0 < v < math.inf), None)
    if not found or wrong is not None:
        told = shown(values if wrong is None else wrong)
        raise ValueError(f"divisors of {name} hold {told}, expected positive numbers")
    return tuple(float(v) for v in found)


def _literal(value: Any) -> Any:
    """A value that an encoding may have turned into text."""
    return ast.literal_eval(value) if isinstance(value, str) else value
