"""Reads a weights file safely: the tensors, and what the checkpoint says about its model. Runs nothing of the file.

Two kinds are read, told apart by their content and never by their suffix: archives of torch.save (the Ultralytics
package's checkpoints with pickled modules, or plain state dicts) and safetensors. Neither torch nor the package is
imported: this runs on the command line and while pytest collects.
"""

from __future__ import annotations

import ast
import codecs
import hashlib
import json
import math
import os
import reprlib
import stat
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from exporters.errors import BadRequest, CheckpointError
from exporters.models.unpickle import (
    MAX_PICKLE,
    NUMPY,
    Array,
    RefusalError,
    Storage,
    Stub,
    Tensor,
    array,
    shown,
    unpickle,
    widened,
)

# The peer's classes of YOLOv8 and their tasks; the class decides, since the `task` beside it may be a default.
_TASKS = {
    "DetectionModel": "detect", "SegmentationModel": "segment", "PoseModel": "pose", "OBBModel": "obb",
    "ClassificationModel": "classify",
}  # fmt: skip
# Where the weights may be, in the peer's order: the moving average is what a training is judged by.
_WEIGHTS = ("ema", "model", "state_dict", "model_state_dict")
_MAX_ENTRIES = 2**17
_MAX_MODULES = 2**16
_MAX_DEPTH = 64
# Views may overlap or, expanded, repeat an element: a few bytes of a file could claim any amount of memory. More than
# this many times the file's size is no honest checkpoint.
_MAX_OVERLAP = 4
_MAX_LITERAL = 2**20

_AGAIN = "copy or download the file again"
_RESAVE = "save model.state_dict() with a current torch.save, or as .safetensors"
_CHECK = "it is an exported model, not weights: check it with `exportgate check FILE`"
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
    return Checkpoint(path, digest, state, layers, family, **_normalized(path.name, facts))


_Found = tuple[dict[str, Array], tuple[str, ...], str, dict[str, Any]]


def _read(file: BinaryIO, size: int) -> _Found:
    file.seek(0)
    head = file.read(4096)
    if head.startswith(b"PK\x03\x04"):
        return _read_torch(_Archive(file, size))
    if len(head) > 8 and head[8:9] == b"{":
        return _read_safetensors(file, int.from_bytes(head[:8], "little"), size)
    what, fix = _other_kind(head)
    raise RefusalError(what, fix)


def _other_kind(head: bytes) -> tuple[str, str]:
    """What a file is that is neither a zip nor safetensors, by its first 4 KiB, and what to do about it."""
    if not head.strip(b"\0"):
        return ("is empty" if not head else "holds only zeros"), _AGAIN
    # The magic number with which torch.save began its files until 1.6, as a pickled integer.
    if head.startswith(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."):
        return "is in torch.save's old format, from before torch 1.6", "load and save it again with a current torch"
    if head[0] == 0x80 and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "is a bare pickle, not an archive of torch.save", _RESAVE
    if head.startswith((b"ftrt", b"ptrt")) or head[4:6] == b'{"':
        return "is a TensorRT engine", _CHECK
    # ModelProto: ir_version, then producer, version, domain, graph or opset_import.
    if head[0] == 0x08 and 0 < head[1] < 0x20 and head[2] in (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42):
        return "is an ONNX model", _CHECK
    if head[4:8] == b"TFL3":
        return "is a TFLite model", _CHECK
    if head.startswith(b"\x89HDF"):
        return "is an HDF5 file (Keras weights?)", "give a PyTorch checkpoint"
    if head.startswith(b"\x1f\x8b"):
        return "is compressed with gzip", "unpack it first"
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head).lstrip("\ufeff \t\r\n")
    except UnicodeDecodeError:
        return "is neither an archive of torch.save nor safetensors", "give a .pt checkpoint or a .safetensors file"
    if text.startswith("version https://git-lfs"):
        return "is a Git LFS pointer, not the weights", "fetch them with `git lfs pull`"
    if text[:64].lower().startswith(("<!doctype html", "<html", "<head", "<?xml")):
        return "is a web page, not weights", "download the file itself, not the page that links to it"
    if all(character.isprintable() or character.isspace() for character in text):
        return f"is a text file (it begins {shown(text[:24])!r})", "give a .pt checkpoint or a .safetensors file"
    return "is neither an archive of torch.save nor safetensors", "give a .pt checkpoint or a .safetensors file"


class _Archive:
    """A zip file of torch.save, checked before anything is read from it."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.size = size
        try:
            self._zip = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OSError, struct.error) as error:
            what = f"is damaged: a zip archive of {size} bytes whose table of contents is missing or broken"
            raise RefusalError(f"{what} ({shown(str(error))})", _AGAIN) from error
        entries = self._zip.infolist()
        if len(entries) > _MAX_ENTRIES:
            raise RefusalError(f"has {len(entries)} entries, the limit is {_MAX_ENTRIES}", _RESAVE)
        for entry in entries:
            _check_entry(entry)
        self._entries = {entry.filename: entry for entry in entries}
        if len(self._entries) != len(entries):
            twice = Counter(entry.filename for entry in entries).most_common(1)[0][0]
            raise RefusalError(f"has two entries named {shown(twice)}", _RESAVE)
        # Overlapping entries, a kind of zip bomb, add up to more than the file.
        if sum(entry.file_size for entry in entries) > size:
            raise RefusalError(f"has entries of more than its own {size} bytes", _RESAVE)
        self._prefix = self._root()
        order = self._entries.get(f"{self._prefix}/byteorder")
        if order is not None and self._bytes(order) != b"little":
            raise RefusalError("was saved in big-endian byte order", _RESAVE)

    def _root(self) -> str:
        pickles = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if any("/code/" in name or name.endswith("/constants.pkl") for name in self._entries):
            raise RefusalError("is a TorchScript archive, whose weights cannot be taken apart from its code", _CHECK)
        if any(name.endswith("archive_format") for name in self._entries):
            raise RefusalError("is a torch.export archive (.pt2)", _CHECK)
        if len(pickles) != 1:
            listed = ", ".join(shown(name) for name in list(self._entries)[:3]) or "nothing"
            what = f"is a zip with {len(pickles) or 'no'} data.pkl (it holds {listed}), not an archive of torch.save"
            raise RefusalError(what, "give a .pt checkpoint or a .safetensors file")
        return pickles[0].removesuffix("/data.pkl")

    def _bytes(self, entry: zipfile.ZipInfo) -> bytes:
        try:
            return self._zip.read(entry)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OSError, struct.error) as error:
            raise RefusalError(f"is damaged: {shown(str(error)) or 'an entry cannot be read'}", _AGAIN) from error

    def pickle(self) -> bytes:
        """The pickle; refused unread when it is larger than any checkpoint's."""
        entry = self._entries[f"{self._prefix}/data.pkl"]
        if entry.file_size > MAX_PICKLE:
            limit = f"{entry.file_size / 2**20:.0f} MiB, the limit is {MAX_PICKLE // 2**20}"
            raise RefusalError(f"has a data.pkl of {limit}", _RESAVE)
        return self._bytes(entry)

    def storage(self, storage: Storage) -> bytes:
        """The bytes of a storage, exactly as many as its dtype and size say."""
        name = f"{self._prefix}/data/{storage.key}"
        entry = self._entries.get(name)
        if entry is None:
            raise RefusalError(f"is damaged: the entry {shown(name)} is missing", _AGAIN)
        itemsize = np.dtype(NUMPY.get(storage.dtype, "u1")).itemsize
        if entry.file_size != storage.size * itemsize:
            expected = f"{storage.size} elements of {storage.dtype}"
            raise RefusalError(f"is damaged: {shown(name)} has {entry.file_size} bytes, not {expected}", _AGAIN)
        return self._bytes(entry)


def _check_entry(entry: zipfile.ZipInfo) -> None:
    name = entry.orig_filename
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        what = f"has a compressed entry, {shown(name)}, which torch.save never writes and which may unpack to any size"
        raise RefusalError(what, "unpack it and zip it again without compression (zip -0), or save it again")
    if entry.flag_bits & 1:
        raise RefusalError(f"has an encrypted entry, {shown(name)}", "unpack it, or save it again")
    odd = "\0" in name or "\\" in name or name[1:3] == ":/"
    if odd or not {"", ".", ".."}.isdisjoint(name.removesuffix("/").split("/")):
        raise RefusalError(f"has an entry with an unsafe path, {shown(name)}", _RESAVE)
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise RefusalError(f"has a symbolic link in it, {shown(name)}", _RESAVE)


def _read_torch(archive: _Archive) -> _Found:
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
    return _arrays(_state_dict(weights), archive), layers, family, facts


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
    raise RefusalError(what, _RESAVE)


def _attributes(value: Any) -> dict[Any, Any]:
    """A mapping, or the attributes of a namespace object; anything else has none."""
    return cast("dict[Any, Any]", value) if isinstance(value, dict) else value.attrs if isinstance(value, Stub) else {}


def _children(value: Any) -> dict[Any, Any]:
    return _attributes(_attributes(value).get("_modules"))


def _state_dict(model: Stub) -> dict[str, Tensor]:
    """Names and tensors as `torch.nn.Module.state_dict` orders them: parameters, buffers, then those of each child."""
    state: dict[str, Tensor] = {}
    waiting: list[tuple[str, Stub, int]] = [("", model, 0)]
    visited = 0
    while waiting:
        prefix, module, depth = waiting.pop()
        visited += 1
        # A module may be its own child, and one may be shared so often that the names never end.
        if visited > _MAX_MODULES or depth > _MAX_DEPTH:
            raise RefusalError(f"has more than {_MAX_MODULES} modules, or nests them deeper than {_MAX_DEPTH}", _RESAVE)
        hidden: Any = module.attrs.get("_non_persistent_buffers_set")
        hidden = cast("set[Any]", hidden) if isinstance(hidden, set) else set[Any]()
        own = {**_attributes(module.attrs.get("_parameters"))}
        own |= {key: value for key, value in _attributes(module.attrs.get("_buffers")).items() if key not in hidden}
        for key, value in own.items():
            if isinstance(value, Tensor):
                state[f"{prefix}{key}"] = value
            elif value is not None:
                raise RefusalError(f"is damaged: {shown(f'{prefix}{key}')} is no tensor", _AGAIN)
        children = [(key, child) for key, child in _children(module).items() if isinstance(child, Stub)]
        waiting += [(f"{prefix}{key}.", child, depth + 1) for key, child in reversed(children)]
    if not state:
        raise RefusalError("holds a model without any weights", _RESAVE)
    return state


def _arrays(tensors: Mapping[str, Tensor], archive: _Archive) -> dict[str, Array]:
    distinct = set(tensors.values())
    total = sum(math.prod(tensor.shape) * np.dtype(NUMPY[tensor.dtype]).itemsize for tensor in distinct)
    if total > _MAX_OVERLAP * archive.size:
        raise RefusalError(f"has tensors of {total} bytes in a file of {archive.size}, as views that overlap", _RESAVE)
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
        raise RefusalError(f"is a truncated safetensors file: a header of {header} bytes in a file of {size}", _AGAIN)
    file.seek(0)
    content = file.read()
    try:
        entries = deserialize(content)
    except SafetensorError as error:
        what = f"is a damaged or truncated safetensors file of {size} bytes ({shown(str(error))})"
        raise RefusalError(what, _AGAIN) from error
    if not entries:
        raise RefusalError("holds no weights: a safetensors file without tensors", _RESAVE)
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
    return state, (), "", {key: _literal(key, text) if key in literals else text for key, text in metadata.items()}


def _literal(key: str, text: str) -> Any:
    """The value of a metadata string: JSON, or a Python literal, as the peer's `str()` writes them."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        if len(text) > _MAX_LITERAL:
            raise ValueError
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        what = f"has the metadata {key} {shown(text)!r}, which is neither JSON nor a Python literal"
        raise RefusalError(what, "write it with json.dumps") from None


def _normalized(file: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Checkpoint that are facts, from whatever form the file gives them."""

    def refused(key: str, expected: str) -> CheckpointError:
        shape = shown(reprlib.repr(facts[key]))
        return CheckpointError(f"{file} has {key} {shape}, not {expected}", "correct it in the checkpoint")

    def whole(key: str, expected: str, *lengths: int) -> list[int] | None:
        value: Any = facts.get(key)
        if value is None:
            return None
        numbers = cast("list[Any]", value if isinstance(value, list | tuple) else [value])
        for number in numbers:
            if type(number) not in (int, float) or not 0 < number < 2**31 or number != int(number):
                raise refused(key, expected)
        if not numbers or (lengths and len(numbers) not in lengths):
            raise refused(key, expected)
        return [int(number) for number in numbers]

    stride = whole("stride", "whole numbers of pixels")
    imgsz = whole("imgsz", "one or two whole numbers of pixels", 1, 2)
    kpt_shape = whole("kpt_shape", "two whole numbers", 2)
    text = {key: value for key, value in facts.items() if isinstance(value, str) and value}
    return {
        "names": _class_names(file, facts.get("names")),
        "stride": max(stride) if stride else None,
        "task": text.get("task"),
        "imgsz": tuple(imgsz) if imgsz and len(imgsz) == 2 else imgsz and imgsz[0],
        "scale": text.get("scale"),
        "kpt_shape": kpt_shape and tuple(kpt_shape),
        "author": text.get("author"),
        "license": text.get("license"),
        "version": text.get("version"),
        "info": {key: text[key] for key in ("description", "date", "docs") if key in text},
    }


def _class_names(file: str, value: Any) -> dict[int, str] | None:
    """Class names by index, from a list or a mapping whose keys are numbers or, as JSON writes them, digits."""
    if value is None:
        return None
    fix = "give every class a name, with the indices 0 to N-1"
    if isinstance(value, list | tuple):
        value = dict(enumerate(cast("list[Any]", value)))
    names: dict[int, str] = {}
    for key, name in cast("dict[Any, Any]", value).items() if isinstance(value, dict) else ():
        index = int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 10 else key
        if type(index) is not int or not isinstance(name, str | int):
            raise BadRequest(f"{file} has the class name {shown(reprlib.repr((key, name)))}", fix)
        names[index] = str(name)
    if not names:
        raise BadRequest(f"{file} has class names that name no class", fix)
    missing = next(index for index in range(len(names) + 1) if index not in names)
    if missing < len(names):
        raise BadRequest(f"{file} has {len(names)} class names up to index {max(names)} but none for {missing}", fix)
    return dict(sorted(names.items()))
