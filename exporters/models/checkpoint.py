"""Reads a weights file safely: the tensors, and what the checkpoint says about its model. Runs nothing of the file.

Two kinds are read, told apart by their content and never by their suffix: archives of torch.save (the Ultralytics
package's checkpoints with pickled modules, or plain state dicts) and safetensors. Neither torch nor the package is
imported: this runs on the command line and while pytest collects.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from exporters.errors import CheckpointError
from exporters.models.archive import Archive, other_kind
from exporters.models.facts import literal, normalized
from exporters.models.refusal import AGAIN, RESAVE, RefusalError, shown
from exporters.models.stand_ins import Storage, Stub, Tensor
from exporters.models.tensors import NUMPY, Array, array, widened
from exporters.models.unpickle import unpickle

# The peer's classes of YOLOv8 and their tasks; the class decides, since the `task` beside it may be a default.
_TASKS = {
    "DetectionModel": "detect", "SegmentationModel": "segment", "PoseModel": "pose", "OBBModel": "obb",
    "ClassificationModel": "classify",
}  # fmt: skip
# Where the weights may be, in the peer's order: the moving average is what a training is judged by.
# Attributes of torch's layers, and of the peer's Bottleneck (`add`: a shortcut), that no tensor's shape shows.
SETTINGS = ("add", "ceil_mode", "dilation", "eps", "groups", "kernel_size", "mode", "padding", "scale_factor", "stride")
_WEIGHTS = ("ema", "model", "state_dict", "model_state_dict")
_MAX_MODULES = 2**16
_MAX_DEPTH = 64
# Views may overlap or, expanded, repeat an element: a few bytes of a file could claim any amount of memory. More than
# this many times the file's size is no honest checkpoint.
_MAX_OVERLAP = 4

_SAFETENSORS = {
    "F32": "float32", "F16": "float16", "F64": "float64", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool",
    "C64": "complex64",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a weights file holds. `state` is that of `state_dict()`: parameters and persistent buffers, in its order.

    Attributes:
        path: the file.
        sha256: hex digest of the whole file.
        state: name -> contiguous array in the file's dtype, except bfloat16, which becomes float32 (exact). Names that
            share one tensor in the file share one array.
        layers: class name of each layer of the sequential `model`; empty for a plain state dict.
        family: class name of the pickled module, or "".
        names: class index -> name, every index from 0.
        stride: the largest stride in pixels.
        task: detect, segment, pose, obb or classify, or what the file says.
        imgsz: pixels of the training, one number or (height, width).
        scale: n, s, m, l or x.
        kpt_shape: (number of keypoints, values of each), for pose.
        author: as the file says; so are `license` and `version` (of the software that wrote it).
        info: description, date and docs, where the file has them.
        modules: path of each pickled module -> what its computation depends on besides its tensors: its class (key
            "class"), and those of `SETTINGS` that it has. They differ between versions of the peer (the SPPF of 8.4.7
            has no activation after its first convolution, that of 8.4.190 has SiLU), so they are read, never assumed.
            Empty for a plain state dict.
    """

    path: Path
    sha256: str
    state: Mapping[str, Array] = field(repr=False)
    layers: tuple[str, ...]
    family: str
    names: Mapping[int, str] | None
    stride: int | None
    task: str | None
    imgsz: int | tuple[int, int] | None
    scale: str | None
    kpt_shape: tuple[int, int] | None
    author: str | None
    license: str | None
    version: str | None
    info: Mapping[str, str]
    modules: Mapping[str, Mapping[str, Any]]


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads weights and metadata without executing anything of the file.

    Args:
        path: an archive of torch.save or a safetensors file, of any suffix.

    Raises:
        UnsafeFile: its pickle names something that would run code.
        CheckpointError: it is missing, damaged, of another kind, or holds layers that exportgate does not know.
        BadRequest: the class names have gaps.
    """
    try:
        # Before opening: opening a pipe would wait for ever.
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise CheckpointError(f"{path} is a directory", "name the weights file in it")
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path} is no regular file", "copy the weights into a file")
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            state, layers, family, facts = _read(file, before.st_size)
            after = os.fstat(file.fileno())
    except RefusalError as refusal:
        raise refusal.of(path.name) from None
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist", "give the path of a checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error})", "check the path and its permissions") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CheckpointError(f"{path} was written to while it was read", "wait until it is complete")
    return Checkpoint(path, digest, state, layers, family, **normalized(path.name, facts))


_Found = tuple[dict[str, Array], tuple[str, ...], str, dict[str, Any]]


def _read(file: BinaryIO, size: int) -> _Found:
    file.seek(0)
    head = file.read(4096)
    if head.startswith(b"PK\x03\x04"):
        return _read_torch(Archive(file, size))
    if len(head) > 8 and head[8:9] == b"{":
        return _read_safetensors(file, int.from_bytes(head[:8], "little"), size)
    what, fix = other_kind(head)
    raise RefusalError(what, fix)


def _read_torch(archive: Archive) -> _Found:
    root = unpickle(archive.pickle())
    top: dict[Any, Any] = cast("dict[Any, Any]", root) if isinstance(root, dict) else {}
    weights = _weights(root, top)
    facts = {key: top[key] for key in ("author", "license", "version", "description", "date", "docs") if key in top}
    facts["imgsz"] = _attributes(top.get("train_args")).get("imgsz")
    if isinstance(weights, dict):
        return _arrays(weights, archive), (), "", facts
    model, family = weights.attrs, weights.origin.name
    layers = tuple(
        layer.origin.name for layer in _children(_children(model).get("model")).values() if isinstance(layer, Stub)
    )
    stride = model.get("stride")
    if isinstance(stride, Tensor):
        stride = _arrays({"stride": stride}, archive)["stride"].ravel().tolist()
    yaml, arguments = _attributes(model.get("yaml")), _attributes(model.get("args"))
    task = model.get("task") or arguments.get("task") or _attributes(top.get("train_args")).get("task")
    facts |= {
        "names": model.get("names"),
        "stride": stride,
        "task": _TASKS.get(family, task),
        "scale": yaml.get("scale"),
        "kpt_shape": model.get("kpt_shape") or yaml.get("kpt_shape"),
    }
    tensors, facts["modules"] = _state_dict(weights)
    return _arrays(tensors, archive), layers, family, facts


def _weights(root: Any, top: dict[Any, Any]) -> Stub | dict[str, Tensor]:
    for candidate in (*(top.get(key) for key in _WEIGHTS), root):
        if isinstance(candidate, Stub) and "_modules" in candidate.attrs:
            return candidate
        if isinstance(candidate, dict):
            values = cast("dict[Any, Any]", candidate)
            if values and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in values.items()):
                return cast("dict[str, Tensor]", values)
    kind = root.origin.name if isinstance(root, Stub) else type(root).__name__
    has = ", ".join(shown(str(key)) for key in list(top)[:6]) or f"a {shown(kind)}"
    what = (
        f"holds no weights: no module and no dict of tensors, at the top or under {', '.join(_WEIGHTS)} (it has {has})"
    )
    raise RefusalError(what, RESAVE)


def _attributes(value: Any) -> dict[Any, Any]:
    """A mapping, or the attributes of a namespace object; anything else has none."""
    return cast("dict[Any, Any]", value) if isinstance(value, dict) else value.attrs if isinstance(value, Stub) else {}


def _children(value: Any) -> dict[Any, Any]:
    return _attributes(_attributes(value).get("_modules"))


def _state_dict(model: Stub) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Names and tensors as `torch.nn.Module.state_dict` orders them: parameters, buffers, then those of each child.

    Also what each module computes with besides them, by its path.
    """
    state: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Any]] = {}
    waiting: list[tuple[str, Stub, int]] = [("", model, 0)]
    visited = 0
    while waiting:
        prefix, module, depth = waiting.pop()
        visited += 1
        # A module may be its own child, and one may be shared so often that the names never end.
        if visited > _MAX_MODULES or depth > _MAX_DEPTH:
            raise RefusalError(f"has more than {_MAX_MODULES} modules, or nests them deeper than {_MAX_DEPTH}", RESAVE)
        hidden: Any = module.attrs.get("_non_persistent_buffers_set")
        hidden = cast("set[Any]", hidden) if isinstance(hidden, set) else set[Any]()
        own = {**_attributes(module.attrs.get("_parameters"))}
        own |= {key: value for key, value in _attributes(module.attrs.get("_buffers")).items() if key not in hidden}
        for key, value in own.items():
            if isinstance(value, Tensor):
                state[f"{prefix}{key}"] = value
            elif value is not None:
                raise RefusalError(f"is damaged: {shown(f'{prefix}{key}')} is no tensor", AGAIN)
        modules[prefix.removesuffix(".")] = _settings(module)
        children = [(key, child) for key, child in _children(module).items() if isinstance(child, Stub)]
        waiting += [(f"{prefix}{key}.", child, depth + 1) for key, child in reversed(children)]
    if not state:
        raise RefusalError("holds a model without any weights", RESAVE)
    return state, modules


def _settings(module: Stub) -> dict[str, Any]:
    """The class of a module and its attributes among `SETTINGS` that are numbers, words or tuples of numbers."""
    plain = (bool, int, float, str)
    found: dict[str, Any] = {"class": module.origin.name}
    for key in SETTINGS:
        value = module.attrs.get(key)
        items = cast("tuple[Any, ...]", value) if isinstance(value, tuple | list) else (value,)
        if items and all(type(item) in plain for item in items):
            found[key] = tuple(items) if isinstance(value, tuple | list) else value
    return found


def _arrays(tensors: Mapping[str, Tensor], archive: Archive) -> dict[str, Array]:
    distinct = set(tensors.values())
    total = sum(math.prod(tensor.shape) * np.dtype(NUMPY[tensor.dtype]).itemsize for tensor in distinct)
    if total > _MAX_OVERLAP * archive.size:
        raise RefusalError(f"has tensors of {total} bytes in a file of {archive.size}, as views that overlap", RESAVE)
    uses = Counter(tensor.storage for tensor in distinct)
    raw: dict[Storage, bytes] = {}
    made: dict[Tensor, Array] = {}
    for tensor in tensors.values():
        if tensor not in made:
            data = raw.get(tensor.storage)
            if data is None:
                data = archive.storage(tensor.storage)
            if uses[tensor.storage] > 1:
                raw[tensor.storage] = data
            made[tensor] = array(tensor, data)
    return {name: made[tensor] for name, tensor in tensors.items()}


def _read_safetensors(file: BinaryIO, header: int, size: int) -> _Found:
    # Not safetensors.numpy, which has no bfloat16; the same library checks the file here. Its stub lacks types.
    from safetensors import SafetensorError
    from safetensors import deserialize as untyped  # pyright: ignore[reportUnknownVariableType]

    deserialize = cast("Callable[[bytes], list[tuple[str, dict[str, Any]]]]", untyped)

    if header > size - 8:
        raise RefusalError(f"is a truncated safetensors file: a header of {header} bytes in a file of {size}", AGAIN)
    file.seek(0)
    content = file.read()
    try:
        entries = deserialize(content)
    except SafetensorError as error:
        what = f"is a damaged or truncated safetensors file of {size} bytes ({shown(str(error))})"
        raise RefusalError(what, AGAIN) from error
    if not entries:
        raise RefusalError("holds no weights: a safetensors file without tensors", RESAVE)
    state: dict[str, Array] = {}
    for key, entry in sorted(entries):
        dtype = _SAFETENSORS.get(entry["dtype"])
        if dtype is None:
            raise RefusalError(
                f"holds a tensor of {shown(entry['dtype'])}, which numpy has not", "save it in FP16 or FP32"
            )
        state[key] = widened(entry["data"], dtype).reshape(entry["shape"])
    metadata: dict[str, str] = json.loads(content[8 : 8 + header]).get("__metadata__") or {}
    literals = ("names", "stride", "imgsz", "kpt_shape")
    return state, (), "", {key: literal(key, text) if key in literals else text for key, text in metadata.items()}
