"""ncnn on a CPU: the two files of a model and what they say of themselves, and a session that runs them."""
# pyright: reportUntypedBaseClass=false
# (the library has no types, and its reader is meant to be subclassed)

from __future__ import annotations

import ctypes
import importlib
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporters.artifact import Achieved, TensorInfo
from exporters.errors import ArtifactError, FeedError
from exporters.metadata import SIDE_CAR, Metadata, read_yaml
from exporters.models.spec import InputSpec
from exporters.session import Array, Execution, Feeds, Session
from exporters.spec import ExportSpec, Precision

library: Any = importlib.import_module("ncnn")

MAGIC = "7767517"  # of a .param file
LARGEST = 64 << 20  # bytes of one
AGAIN = "export it again"
# What stands before a layer's weights in the .bin file; anything else is a table of 256 values that bytes choose from.
TAGS = {0: "fp32", 0x0002C056: "fp32", 0x01306B47: "fp16", 0x000D4B38: "int8"}
HEAVY = re.compile(r"(De)?[Cc]onvolution\w*|DeformableConv2D|InnerProduct|Gemm|LSTM|GRU|RNN|MultiHeadAttention|Embed")
# Options that let ncnn store or compute in 16 bits. It is an operator's affair whether it does on this CPU.
NARROW = ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_packed", "bf16_storage")
TAKEN = {"float32": "float32", "int32": "int32", "int64": "int32"}  # an input's type -> what ncnn takes
CAPSULE = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


@dataclass(frozen=True)
class Layer:
    """One line of a .param file. `values` are its parameters by number, as text."""

    kind: str
    name: str
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]
    values: Mapping[int, str]

    def line(self) -> str:
        """The line again."""
        head = f"{self.kind:<24} {self.name:<24} {len(self.bottoms)} {len(self.tops)}"
        return " ".join([head, *self.bottoms, *self.tops, *(f"{k}={v}" for k, v in self.values.items())])

    @property
    def sizes(self) -> tuple[int, ...]:
        """What an Input says of its shape without the batch, slowest axis first; () where it says nothing."""
        w, h, d, c = (int(self.values.get(number, "0")) for number in (0, 1, 11, 2))
        return tuple(size for size in (c, d, h, w) if size)


@dataclass(frozen=True)
class Weights:
    """A layer's part of the .bin file: bytes start:stop, and (type, bytes) of each array that has a tag."""

    start: int
    stop: int
    tagged: tuple[tuple[str, int], ...]


def files_of(path: Path) -> tuple[Path, Path]:
    """The one .param file of a model's folder (or the file itself) and its .bin file.

    Raises:
        ArtifactError: there is none, or more than one; or it has no .bin beside it.
    """
    found = sorted(path.glob("*.param")) if path.is_dir() else [path]
    if len(found) != 1:
        names = ", ".join(f.name for f in found) or "none"
        raise ArtifactError(f"'{path}' holds {len(found)} .param files ({names}), expected one", AGAIN)
    weights = found[0].with_suffix(".bin")
    if not weights.is_file():
        raise ArtifactError(f"'{found[0]}' has no weights: {weights.name} is missing", AGAIN)
    return found[0], weights


def read_param(path: Path) -> tuple[Layer, ...]:
    """The layers of a .param file, in order. ncnn itself tells nothing of what is wrong with one, or crashes.

    Raises:
        ArtifactError: it cannot be read, is no such file, is incomplete, or has a layer that ncnn does not know.
    """
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST).decode()
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read ({error.strerror})", AGAIN) from None
    except UnicodeDecodeError:
        raise ArtifactError(f"'{path}' is no .param file of ncnn: it is not text", AGAIN) from None
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if not lines or lines[0] != [MAGIC]:
        raise ArtifactError(f"'{path}' is no .param file of ncnn: it does not begin with {MAGIC}", AGAIN)
    try:
        layers, blobs = (int(n) for n in lines[1])
    except (ValueError, IndexError):
        raise ArtifactError(f"'{path}': its second line is not the numbers of layers and blobs", AGAIN) from None
    made = tuple(_layer(path, line) for line in lines[2:])
    tops = [top for layer in made for top in layer.tops]
    if len(made) != layers or len(tops) != blobs:
        what = f"has {len(made)} layers and {len(tops)} blobs, and says that it has {layers} and {blobs}"
        raise ArtifactError(f"'{path}' {what}", AGAIN)
    _check_graph(path, made)
    return made


def _layer(path: Path, words: Sequence[str]) -> Layer:
    """One line: kind, name, how many blobs go in and out, these, and numbered parameters."""
    try:
        kind, name, inputs, outputs = words[0], words[1], int(words[2]), int(words[3])
        blobs, rest = words[4 : 4 + inputs + outputs], words[4 + inputs + outputs :]
        values = {int(number): value for number, value in (word.split("=", 1) for word in rest)}
        if len(blobs) != inputs + outputs or min(inputs, outputs) < 0 or "" in values.values():
            raise ValueError
        if kind == "Input":
            values = {number: str(int(value)) for number, value in values.items()}
    except (ValueError, IndexError):
        raise ArtifactError(f"'{path}': this line is no layer: {' '.join(words)[:120]!r}", AGAIN) from None
    return Layer(kind, name, tuple(blobs[:inputs]), tuple(blobs[inputs:]), values)


def _check_graph(path: Path, layers: Sequence[Layer]) -> None:
    """Every layer is of a kind that ncnn knows, and every blob is made once, before one layer reads it."""
    made, read = set[str](), set[str]()
    for layer in layers:
        if library.layer_to_index(layer.kind) < 0:
            raise ArtifactError(f"'{path}': ncnn has no layer {layer.kind} ('{layer.name}')", AGAIN)
        stray = next((blob for blob in layer.bottoms if blob not in made or blob in read), None)
        if stray is not None:
            what = "is read twice" if stray in made else "is read before it is made"
            raise ArtifactError(f"'{path}': blob '{stray}' {what} (layer '{layer.name}')", AGAIN)
        read.update(layer.bottoms)
        twice = next((blob for blob in layer.tops if blob in made), None)
        if twice is not None:
            raise ArtifactError(f"'{path}': blob '{twice}' is made twice (layer '{layer.name}')", AGAIN)
        made.update(layer.tops)


class Reader(library.DataReader):
    """Gives ncnn the bytes of a .bin file and keeps what it asked for: (place, size) of each piece."""

    def __init__(self, data: bytes) -> None:
        library.DataReader.__init__(self)
        self.data, self.at, self.pieces = data, 0, list[tuple[int, int]]()

    def scan(self, format: str, target: Any) -> int:  # noqa: A002 (ncnn's name)
        """Of .param files only."""
        return 0

    def read(self, target: Any, size: int) -> int:
        """Copies the next bytes to ncnn's memory; fewer where the file ends."""
        part = self.data[self.at : self.at + size]
        ctypes.memmove(CAPSULE(target, None), part, len(part))
        self.pieces.append((self.at, size))
        self.at += len(part)
        return len(part)


def read_weights(param: Path, weights: Path, layers: Sequence[Layer]) -> tuple[Weights, ...]:
    """Each layer's part of the .bin file, as ncnn itself reads it.

    Raises:
        ArtifactError: ncnn does not take a file, the .bin file is too short, or bytes are left over.
    """
    net = library.Net()
    if net.load_param(str(param)):
        raise ArtifactError(f"'{param}' cannot be read by ncnn", AGAIN)
    try:
        reader = Reader(weights.read_bytes())
    except OSError as error:
        raise ArtifactError(f"'{weights}' cannot be read ({error.strerror})", AGAIN) from None
    model, made = library.ModelBinFromDataReader(reader), list[Weights]()
    for layer, own in zip(layers, net.layers(), strict=True):
        start, first = reader.at, len(reader.pieces)
        code = own.load_model(model)
        pieces = reader.pieces[first:]
        short = any(place + size > len(reader.data) for place, size in pieces)
        if code or short:
            why = f"it ends at byte {len(reader.data)}" if short else f"code {code}"
            raise ArtifactError(f"'{weights}' does not hold the weights of layer '{layer.name}': {why}", AGAIN)
        made.append(Weights(start, reader.at, _tagged(reader.data, pieces) if HEAVY.fullmatch(layer.kind) else ()))
    if reader.at != len(reader.data):
        what = f"has {len(reader.data)} bytes, and the layers of {param.name} take {reader.at}"
        raise ArtifactError(f"'{weights}' {what}", AGAIN)
    return tuple(made)


def _tagged(data: bytes, pieces: Sequence[tuple[int, int]]) -> tuple[tuple[str, int], ...]:
    """Types and sizes of the arrays behind a tag: 4 bytes, and more to read. (A bias may be one zero, the last one.)"""
    found: list[tuple[str, int]] = []
    here = 0
    while here + 1 < len(pieces):
        place, size = pieces[here]
        tag = struct.unpack_from("<I", data, place)[0] if size == 4 else None
        if tag is None or (tag not in TAGS and pieces[here + 1][1] != 1024):
            here += 1
            continue
        found.append((TAGS.get(tag, "table"), pieces[here + 1][1]))
        here += 2 if tag in TAGS else 3
    return tuple(found)


def read_precision(path: Path) -> Achieved:
    """Each layer with weights by the type that they are stored in.

    A constant beside the layers, as a matrix product may read, is always stored in 32 bits: such a product is counted
    by what its values need. `exceptions` names what differs from most of the others.
    """
    param, weights = files_of(path)
    layers = read_param(param)
    parts, data = read_weights(param, weights, layers), weights.read_bytes()
    kinds = {layer.name: found for layer, part in zip(layers, parts, strict=True) if (found := _kind(part))}
    counts = Counter(kinds.values())
    main = counts.most_common(1)[0][0] if counts else ""
    stored = {layer.tops[0]: part for layer, part in zip(layers, parts, strict=True) if layer.kind == "MemoryData"}
    exact = 0
    for layer in layers:
        constant = next((stored[b] for b in layer.bottoms if b in stored), None) if layer.kind == "MatMul" else None
        if constant is None:
            continue
        values = np.frombuffer(data[constant.start : constant.stop], np.float32)
        with np.errstate(over="ignore"):
            fits = main == "fp16" and bool((values.astype(np.float16).astype(np.float32) == values).all())
        exact += fits
        kinds |= {} if fits else {layer.name: "fp32"}
    counts = Counter(kinds.values())
    main = main or (counts.most_common(1)[0][0] if counts else "")
    evidence = {f"operators {kind}": count for kind, count in counts.items()}
    evidence |= {"matrix products by constants that FP16 holds exactly": exact} if exact else {}
    return Achieved(main, evidence, tuple(sorted(name for name, kind in kinds.items() if kind != main)))


def _kind(part: Weights) -> str:
    """One word for a layer's weights; "" where it has none."""
    return "+".join(sorted({kind for kind, _ in part.tagged}))


class NcnnSession(Session):
    """A loaded model. The files name its blobs in0, out0 and so on: the names are the request's, in order."""

    def __init__(self, path: Path, spec: ExportSpec) -> None:
        self.folder, self.spec = path if path.is_dir() else path.parent, spec
        self.param, weights = files_of(path)
        self.stride = spec.model.stride
        layers = read_param(self.param)
        read_weights(self.param, weights, layers)
        self.net = library.Net()
        if spec.precision is Precision.FP32:
            for option in NARROW:
                setattr(self.net.opt, f"use_{option}", False)
        if self.net.load_param(str(self.param)) or self.net.load_model(str(weights)):
            raise ArtifactError(f"'{self.param}' and {weights.name} cannot be loaded by ncnn", AGAIN)
        self.sizes = {layer.tops[0]: layer.sizes for layer in layers if layer.kind == "Input"}
        self.feeding, self.giving = _ordered(self.net.input_names()), _ordered(self.net.output_names())
        self.inputs = tuple(self._input(blob, number) for number, blob in enumerate(self.feeding))
        # ncnn keeps a batch apart from the axes of a blob, and gives each output the one of what it was made of.
        self.batched = any(len(self.sizes[b] or i.shape[1:]) < len(i.shape) for b, i in self._pairs())
        zeros = {i.name: np.zeros([int(s) for s in i.shape], i.dtype) for i in self.inputs}
        self.bits = self._try(layers, zeros)
        names = [o.name for o in spec.model.outputs]
        names += [f"unnamed{number}" for number in range(len(names), len(self.giving))]
        self.names = tuple(names[: len(self.giving)])
        self.outputs = tuple(TensorInfo(n, a.shape, str(a.dtype)) for n, a in self._run(zeros).items())

    def _pairs(self) -> zip[tuple[str, TensorInfo]]:
        return zip(self.feeding, self.inputs, strict=True)

    def _input(self, blob: str, number: int) -> TensorInfo:
        """An input's signature: sizes as the .param file says, the batch (and, where it says none, sizes) as the
        metadata do."""
        known = self.spec.model.inputs
        entry = known[number] if number < len(known) else InputSpec(f"unnamed{number}", ())
        sizes, dtype = self.sizes[blob], entry.dtype if entry.dtype in TAKEN else "float32"
        if number >= len(known) or len(sizes) == len(entry.shape):
            return TensorInfo(entry.name, sizes, dtype)
        found = Metadata()
        with suppress(ArtifactError):  # that claims about metadata tell
            found = read_yaml(self.folder / SIDE_CAR)
        whole = self.spec.model.shape(entry, found.batch, found.imgsz)
        if not sizes and all(whole):
            return TensorInfo(entry.name, whole, dtype)
        if len(sizes) + 1 != len(whole):
            what = f"has the sizes {list(sizes)}" if sizes else f"has no size, and {SIDE_CAR} says no imgsz"
            raise ArtifactError(f"'{self.param}': input {blob} {what}, expected {list(entry.shape)}", AGAIN)
        return TensorInfo(entry.name, (whole[0], *sizes), dtype)

    def _try(self, layers: Sequence[Layer], feeds: Feeds) -> Counter[int]:
        """Computes each blob once, in order: in how many bits ncnn holds them.

        Raises:
            ArtifactError: a layer fails, or reshapes to a size that its input has not, which ncnn does not notice.
        """
        extractor, counts, bits = self._extractor(feeds), dict[str, int](), Counter[int]()
        for layer in layers:
            for blob in layer.tops:
                code, mat = extractor.extract(blob, type=1)  # as it is held
                if code or mat.empty():
                    raise ArtifactError(
                        f"'{self.param}': ncnn gives nothing for layer '{layer.name}' (code {code})", AGAIN
                    )
                counts[blob] = mat.w * mat.h * mat.d * mat.c * mat.elempack
                bits[int(mat.elembits())] += layer.kind != "Input"
            if layer.kind == "Reshape" and counts[layer.tops[0]] != counts[layer.bottoms[0]]:
                given = ", ".join(f"{i.name} {list(i.shape)}" for i in self.inputs)
                what = f"layer '{layer.name}' makes {counts[layer.tops[0]]} values of {counts[layer.bottoms[0]]}"
                raise ArtifactError(f"'{self.param}' is made for another size than {given}: {what}", AGAIN)
        return bits

    def _extractor(self, feeds: Feeds) -> Any:
        """One inference, fed."""
        extractor = self.net.create_extractor()
        for blob, info in self._pairs():
            array = feeds[info.name]
            if info.dtype == "int64" and array.size and max(-int(array.min()) - 1, int(array.max())) >= 2**31:
                raise FeedError(
                    f"input '{info.name}' holds {array.min()} to {array.max()}: expected 32 bits, which ncnn takes",
                    "feed smaller numbers",
                )
            array = np.ascontiguousarray(array, TAKEN[info.dtype])
            has_batch = len(self.sizes[blob] or info.shape[1:]) < len(info.shape)
            # A copy: layers that work in place would write into the feeds.
            mat = (library.Mat(array, batch_index=0) if has_batch else library.Mat(array)).clone()
            code = extractor.input(blob, mat)
            if code:
                raise ArtifactError(f"'{self.param}': ncnn does not take input {blob} (code {code})", AGAIN)
        return extractor

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        extractor, made = self._extractor(feeds), dict[str, Array]()
        for blob, name in zip(self.giving, self.names, strict=True):
            code, mat = extractor.extract(blob)
            if code or mat.empty():
                raise ArtifactError(f"'{self.param}': ncnn gives nothing for output {blob} (code {code})", AGAIN)
            made[name] = np.array(mat.numpy(batch_index=0) if self.batched else mat.numpy())
        return made

    def execution(self) -> Execution:
        allowed = [option for option in NARROW if getattr(self.net.opt, f"use_{option}")]
        notes = (
            ", ".join(f"{n} values between layers in {bits} bits" for bits, n in self.bits.items()),
            f"options that allow 16 bits: {', '.join(allowed) or 'none'}",
        )
        is_wide = not allowed and set(self.bits) == {32}
        threads = int(self.net.opt.num_threads)
        return Execution(
            "ncnn", str(library.__version__), "cpu", "fp32" if is_wide else "", threads=threads, notes=notes
        )

    def metadata(self) -> Metadata:
        found = read_yaml(self.folder / SIDE_CAR)
        axes = self.spec.model.inputs[0].shape
        own = self.inputs[0].shape
        if self.spec.model.has_images and len(own) == len(axes):
            size = tuple(own[axes.index(axis)] for axis in ("height", "width"))
            if size != found.imgsz:
                what = f"says imgsz {list(found.imgsz)}, and {self.param.name} is made for {list(size)}"
                raise ArtifactError(f"'{self.folder / SIDE_CAR}' {what}", AGAIN)
        return found

    def close(self) -> None:
        del self.net


def _ordered(names: Sequence[str]) -> list[str]:
    """in0, in1 ... by their numbers, as pnnx calls them; others' as they stand."""
    found = [re.fullmatch(r"(?:in|out)(\d+)", name) for name in names]
    if not all(found):
        return list(names)
    return sorted(names, key=lambda name: int(re.sub(r"\D", "", name)))
