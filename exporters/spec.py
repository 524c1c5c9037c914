"""ExportSpec: the request. It is met, or refused with an error that names the value and the fix; never altered."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, cast

from exporters.errors import BadRequest
from exporters.models.spec import ModelSpec, belongs
from exporters.tensorrt import options as engine


class Precision(StrEnum):
    """Numeric precision of weights and arithmetic. FP32 means TF32 off; TF32 is a precision of its own."""

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"

    @staticmethod
    def parse(text: str) -> Precision:
        try:
            return Precision(str(text).strip().lower())
        except ValueError:
            raise BadRequest(
                f"precision '{text}' is not known{near(text, [p.value for p in Precision])}",
                "precisions: " + ", ".join(p.value for p in Precision),
            ) from None


Shape = tuple[int, int, int]  # batch, height, width
Profiles = tuple[tuple[Shape, Shape, Shape], ...]
MOST_DETECTIONS = 3840  # of which TensorRT's TopK chooses at most
CALIBRATORS = ("max", "entropy", "percentile")
QUANTIZATIONS = ("dynamic", "integer", "full_integer")
INSIDE = "inside/"  # see ExportSpec.inside
INTERNAL = ("batch_axis", "inside")  # fields of ExportSpec that are no options
OPSETS = (17, 20)  # oldest and newest that were verified with torch 2.13 and ONNX Runtime 1.31


@dataclass(frozen=True)
class ExportSpec:
    """What is asked for: contract options with their names and defaults. Sizes in pixels, workspace in GiB.

    `imgsz` is (height, width), a multiple of the model's stride; `batch` the (largest) batch size; `data` the
    calibration set: a data set YAML, a folder of images or classes, or `module:factory`; `keep` the module paths that
    INT8 and FP8 leave in floating point. With `nms` a detector's anchors are suppressed in the graph, from the score
    `conf` on, where they overlap by more than `iou`, and `max_det` detections a picture come out. With `palettize` INT8
    has weights that are indices of tables of 256 values, where a format has the choice; `quantization` is what TFLite's
    INT8 is: weights alone, by which activations are quantized as they come (dynamic), all but inputs and outputs
    (integer), or those too (full_integer). With `keras` a SavedModel is one that Keras 2 loads as a model, too.

    Two are asked for by our own code alone: `batch_axis`, of the ONNX file that an engine is made from, and `inside`,
    the modules whose outputs an artifact gives as well, in FP32, each as an output of its name behind INSIDE.
    """

    model: ModelSpec
    format: str
    precision: Precision = Precision.FP32
    imgsz: tuple[int, int] = (640, 640)
    batch: int = 1
    dynamic: bool = False
    device: str = "cpu"
    simplify: bool = True
    opset: int = OPSETS[1]
    optimize: bool = False
    verbose: bool = False
    data: str = ""
    split: str = "val"
    fraction: float = 1.0
    calibrator: str = "max"
    keep: tuple[str, ...] = ()
    nms: bool = False
    conf: float = 0.25
    iou: float = 0.7
    max_det: int = 300
    agnostic_nms: bool = False
    palettize: bool = False
    quantization: str = "dynamic"
    keras: bool = False
    batch_axis: bool = False
    inside: tuple[str, ...] = ()
    workspace: float = 4.0
    profiles: Profiles = ()
    builder_level: int = 3
    timing_cache: str = ""
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    refit: bool = False
    dla: int | None = None
    trt_quant_algo: str = ""
    calibration_cache: str = ""
    compute_capability: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` is its inverse."""
        data = asdict(self)
        data["model"] = self.model.to_dict()
        return data

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ExportSpec:
        values = dict(data)
        values["model"] = ModelSpec.from_dict(values["model"])
        values["precision"] = Precision(values["precision"])
        values["imgsz"] = (values["imgsz"][0], values["imgsz"][1])
        values["keep"], values["inside"] = tuple(values["keep"]), tuple(values["inside"])
        values["profiles"] = tuple(tuple((s[0], s[1], s[2]) for s in p) for p in values["profiles"])
        return ExportSpec(**values)

    def changed(self) -> tuple[str, ...]:
        """Names of the options that differ from their defaults, in the order of their declaration."""
        own = {"model", "format", "precision", "imgsz", *INTERNAL}
        return tuple(f.name for f in fields(self) if f.name not in own and getattr(self, f.name) != f.default)

    def but(self, **changes: Any) -> ExportSpec:
        """A copy with other values."""
        return replace(self, **changes)

    def check_keep(self, names: Collection[str], what: str) -> None:
        """Raises BadRequest where `keep` names a module in which none of these operators is; `what` says which."""
        stray = next((k for k in self.keep if not any(belongs(n, [k]) for n in names)), None)
        if stray is not None:
            raise BadRequest(
                f"keep '{stray}': model '{self.model.name}' has no {what} in a module of that name",
                "name modules as PyTorch does, as in model.0.conv",
            )


def near(text: str, known: list[str]) -> str:
    """' (did you mean x?)' where a known word is close, else ''. Only an error's hint: nothing is matched fuzzily."""
    close = difflib.get_close_matches(str(text).strip().lower(), known, 1, 0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def user_path(text: str) -> Path:
    """A path as a user types it, where ~ is a home folder if there is one of that name.

    Raises:
        BadRequest: no file can have this name.
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        path = Path(text)
    try:
        path.exists()
    except OSError as error:
        raise BadRequest(f"path '{text[:80]}' is none ({error.strerror})", "name a file or folder") from None
    return path


def parse_imgsz(value: Any, stride: int) -> tuple[int, int]:
    """(height, width) from 640, "640", "640,480" or a pair; each a positive multiple of `stride`.

    Raises:
        BadRequest: not one or two whole numbers, not positive, or no multiple of the stride (names the two nearest).
    """
    pair = isinstance(value, (list, tuple))
    parts = list(cast("list[Any]", value)) if pair else str(value).strip().strip("[]()").split(",")
    try:
        sizes = [int(str(p).strip()) for p in parts]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2):
        raise BadRequest(
            f"imgsz '{value}' is not a size in pixels", "give one whole number, or height,width, as in 640 or 480,640"
        )
    for size in sizes:
        if size <= 0 or size % stride:
            below = max(size // stride, 1) * stride
            fit = str(stride) if size < stride else f"{below} or {below + stride}"
            raise BadRequest(f"imgsz {size} is not a positive multiple of the model's stride {stride}", f"use {fit}")
    return (sizes[0], sizes[-1])


def parse_batch(value: Any) -> int:
    """A batch size of at least 1."""
    try:
        batch = int(str(value).strip())
    except ValueError:
        batch = 0
    if batch < 1:
        raise BadRequest(f"batch '{value}' is not a batch size", "give a whole number from 1")
    return batch


def parse_opset(value: Any) -> int:
    """An ONNX operator set that was verified."""
    low, high = OPSETS
    try:
        opset = int(str(value).strip())
    except ValueError:
        opset = 0
    if not low <= opset <= high:
        why = (
            f"older ones lack operators that quantization needs (below {low})"
            if opset < low
            else "newer ones were not verified"
        )
        raise BadRequest(f"opset '{value}' is not supported: {why}", f"use {low} to {high}")
    return opset


def parse_fraction(value: Any) -> float:
    """A share of the calibration set, in (0, 1]."""
    try:
        fraction = float(value)
    except (TypeError, ValueError):
        fraction = 0.0
    if not 0.0 < fraction <= 1.0:
        raise BadRequest(f"fraction '{value}' is not a share of the data", "give a number above 0, up to 1")
    return fraction


def parse_precision(precision: Any = None, half: bool = False, int8: bool = False) -> Precision:
    """The one precision asked for; half means fp16. Two that disagree are refused: the peer drops one silently."""
    asked = [("precision", Precision.parse(precision))] if precision is not None else []
    asked += [("half", Precision.FP16)] if half else []
    asked += [("int8", Precision.INT8)] if int8 else []
    if len({p for _, p in asked}) > 1:
        raise BadRequest(
            "two precisions are asked for: " + ", ".join(f"{n} ({p.value})" for n, p in asked), "ask for one of them"
        )
    return asked[0][1] if asked else Precision.FP32


def parse_share(value: Any, name: str) -> float:
    """A score or an overlap, in [0, 1]."""
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = -1.0
    if isinstance(value, bool) or not 0.0 <= share <= 1.0:
        raise BadRequest(f"{name} '{value}' is no number from 0 to 1", "give one, 0.5 say")
    return share


def parse_max_det(value: Any) -> int:
    """How many detections a picture has at most."""
    text = str(value).strip()
    if not text.isdecimal() or not 1 <= int(text) <= MOST_DETECTIONS:
        raise BadRequest(f"max_det '{value}' is no number of detections", f"give 1 to {MOST_DETECTIONS}")
    return int(text)


def parse_calibrator(value: Any) -> str:
    """How ranges are taken from the calibration set."""
    text = str(value).strip().lower()
    if text not in CALIBRATORS:
        raise BadRequest(f"calibrator '{value}' is not known", "use " + ", ".join(CALIBRATORS))
    return text


def parse_quantization(value: Any) -> str:
    """What of a TFLite file is in 8 bits."""
    text = str(value).strip().lower()
    if text not in QUANTIZATIONS:
        raise BadRequest(f"quantization '{value}' is not known", "use " + ", ".join(QUANTIZATIONS))
    return text


def parse_keep(value: Any) -> tuple[str, ...]:
    """Module paths that stay in floating point, from "model.0.conv,model.22.cv3" or a list."""
    parts = value.split(",") if isinstance(value, str) else cast("Sequence[Any]", value)
    if not isinstance(parts, (list, tuple)) or not all(isinstance(p, str) and p.strip() for p in parts):
        raise BadRequest(f"keep {value!r}", "give module paths, comma-separated, as in model.0.conv,model.22.cv3")
    return tuple(dict.fromkeys(p.strip() for p in parts))


def parse_switch(value: Any, name: str) -> bool:
    """An option that is on or off."""
    if not isinstance(value, bool):
        raise BadRequest(f"option '{name}' is {value!r}", "give true or false")
    return value


def parse_text(value: Any, name: str) -> str:
    """An option that is a name or a path."""
    if not isinstance(value, (str, Path)):
        raise BadRequest(f"option '{name}' is {value!r}", "give text")
    return str(value)


def parse_device(value: Any) -> str:
    """'cpu', or 'cuda:N'; the contract's plain number N means cuda:N."""
    text = str(value).strip().lower()
    if text == "cpu":
        return text
    number = text.removeprefix("cuda").removeprefix(":") or "0"
    if not text or not number.isdecimal():
        raise BadRequest(f"device '{value}' is not known", "use cpu, cuda, or a GPU's number")
    return f"cuda:{int(number)}"


def request(model: ModelSpec, format_id: str, **options: Any) -> ExportSpec:
    """The validated request for one artifact from options as users type them (strings or values).

    Args:
        model: the model.
        format_id: a format's id (see `exporters.formats.canonical` for aliases).
        options: fields of ExportSpec, and `half`, `int8`; None means the default.

    Raises:
        BadRequest: a value that cannot be used, an option that does not exist or that the format does not take.
        NotSupported: the format does not have this precision or combination.
    """
    from exporters import formats

    given = {k: v for k, v in options.items() if v is not None}
    known = {f.name for f in fields(ExportSpec)} - {"model", "format", *INTERNAL} | {"half", "int8"}
    unknown = next((k for k in given if k not in known), None)
    if unknown:
        raise BadRequest(
            f"option '{unknown}' is not known{near(unknown, sorted(known))}", "options: " + ", ".join(sorted(known))
        )
    half, int8 = (parse_switch(given.pop(name, False), name) for name in ("half", "int8"))
    precision = parse_precision(given.pop("precision", None), half, int8)
    imgsz = given.pop("imgsz", None)
    if imgsz is not None and not model.has_images:
        raise BadRequest(f"imgsz {imgsz}: model '{model.name}' takes no image size", "leave imgsz out")
    size = parse_imgsz(imgsz, model.stride) if imgsz is not None else model.imgsz
    if model.has_images and 0 in size:
        raise BadRequest(f"model '{model.name}' has no image size of its own and none is given", "give imgsz")
    values = {name: _PARSERS[name](value) for name, value in given.items()}
    if values.get("batch", 1) != 1 and not model.has_batch:
        raise BadRequest(
            f"batch {values['batch']}: model '{model.name}' has no batch axis", "name an axis of its input 'batch'"
        )
    unused = next((k for k in EIGHT_BITS if k in values), None) if precision not in CALIBRATED else None
    if unused:
        raise BadRequest(
            f"option '{unused}' ({given[unused]}) with {precision.value}: it is of INT8 and FP8 alone",
            "leave it out, or ask for int8",
        )
    of_nms = next((k for k in NMS[1:] if k in values), None)
    if of_nms and not values.get("nms"):
        raise BadRequest(f"option '{of_nms}' ({given[of_nms]}) without nms", "add --nms, or leave it out")
    chosen = formats.canonical(format_id)
    spec = ExportSpec(model, chosen, precision, size, **values)
    formats.get(chosen).check(spec)
    if spec.data:
        from exporters import calibration

        spec = spec.but(data=_absolute(spec.data))
        calibration.check(spec)
    return spec


CALIBRATED = (Precision.INT8, Precision.FP8)
EIGHT_BITS = (
    "data",
    "split",
    "fraction",
    "calibrator",
    "keep",
    "trt_quant_algo",
    "calibration_cache",
    "palettize",
    "quantization",
)  # options of those alone

NMS = ("nms", "conf", "iou", "max_det", "agnostic_nms")

# What makes an option's value of what a user typed; precision and imgsz need the model too, and stand in `request`.
_PARSERS: Mapping[str, Callable[[Any], Any]] = {
    "batch": parse_batch,
    "opset": parse_opset,
    "fraction": parse_fraction,
    "device": parse_device,
    "conf": partial(parse_share, name="conf"),
    "iou": partial(parse_share, name="iou"),
    "max_det": parse_max_det,
    "calibrator": parse_calibrator,
    "quantization": parse_quantization,
    "keep": parse_keep,
    **{name: partial(parse_text, name=name) for name in ("data", "split")},
    **{
        name: partial(parse_switch, name=name)
        for name in (
            *("dynamic", "simplify", "optimize", "verbose", "version_compatible", "refit"),
            *("nms", "agnostic_nms", "palettize", "keras"),
        )
    },
    "workspace": engine.parse_workspace,
    "profiles": engine.parse_profiles,
    "builder_level": engine.parse_builder_level,
    "timing_cache": engine.parse_timing_cache,
    "hardware_compatibility": engine.parse_hardware_compatibility,
    "dla": engine.parse_dla,
    "trt_quant_algo": engine.parse_algorithm,
    "calibration_cache": engine.parse_calibration_cache,
    "compute_capability": engine.parse_compute_capability,
}


def is_factory(data: str) -> bool:
    """Whether a calibration set is named as `module:factory` rather than by a path."""
    return ":" in data and not user_path(data).exists()


def _absolute(data: str) -> str:
    """A calibration set's path made absolute, since workers run elsewhere; `module:factory` stays."""
    return data if is_factory(data) else str(user_path(data).resolve())
