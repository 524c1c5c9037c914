"""ncnn's two files: the text of layers and the weights, read as ncnn reads them; their precision; and one repair."""
# pyright: reportUntypedBaseClass=false
# (the library has no types, and its reader is meant to be subclassed)

from __future__ import annotations

import ctypes
import importlib
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from exporters.artifact import Achieved, main_precision
from exporters.errors import ArtifactError

library: Any = importlib.import_module("ncnn")

MAGIC = "7767517"  # of a .param file
LARGEST = 64 << 20  # bytes of one
AGAIN = "export it again"
# What stands before a layer's weights in the .bin file; anything else is a table of 256 values that bytes choose from.
TAGS = {0: "fp32", 0x0002C056: "fp32", 0x01306B47: "fp16", 0x000D4B38: "int8"}
HEAVY = re.compile(r"(De)?[Cc]onvolution\w*|DeformableConv2D|InnerProduct|Gemm|LSTM|GRU|RNN|MultiHeadAttention|Embed")
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
        """An Input's or a constant's shape without the batch, slowest axis first; () where the file says nothing."""
        w, h, d, c = (int(self.values.get(number, "0")) for number in (0, 1, 11, 2))
        return tuple(size for size in (c, d, h, w) if size)

    def sized(self, sizes: Sequence[int]) -> Layer:
        """The same Input, or another layer that is given its sizes so, with these."""
        numbers = {1: (0,), 2: (1, 0), 3: (2, 1, 0), 4: (2, 11, 1, 0)}[len(sizes)]  # of c, d, h, w
        return replace(self, values=dict(zip(numbers, map(str, sizes), strict=True)))


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


def write_param(path: Path, layers: Sequence[Layer]) -> None:
    """The inverse of `read_param`."""
    counts = f"{len(layers)} {sum(len(layer.tops) for layer in layers)}"
    path.write_text("\n".join([MAGIC, counts, *(layer.line() for layer in layers)]) + "\n", encoding="utf-8")


def aligned(param: Path, weights: Path) -> None:
    """Gives constants that meet a blob of more or fewer axes as many, ones in front, as PyTorch does, in place.

    ncnn aligns the axes of two blobs at their front. pnnx reshapes what differs, but not a constant that several
    operators read: then shapes, or values where sizes agree by chance, are wrong, and ncnn says nothing.
    """
    while True:
        layers = read_param(param)
        found = _unaligned(param, weights, layers)
        if found is None:
            return
        number, which, sizes = found
        layer = layers[number]
        blob = f"{layer.bottoms[which]}_{number}"
        reshape = Layer("Reshape", f"{layer.name}_constant", (layer.bottoms[which],), (blob,), {}).sized(sizes)
        bottoms = tuple(blob if n == which else bottom for n, bottom in enumerate(layer.bottoms))
        write_param(param, [*layers[:number], reshape, replace(layer, bottoms=bottoms), *layers[number + 1 :]])


def _unaligned(param: Path, weights: Path, layers: Sequence[Layer]) -> tuple[int, int, tuple[int, ...]] | None:
    """The first operator with such a constant: its number, which of its inputs, and the sizes that this should have."""
    net = library.Net()
    if net.load_param(str(param)) or net.load_model(str(weights)):
        raise ArtifactError(f"'{param}' and {weights.name} cannot be loaded by ncnn", AGAIN)
    extractor = net.create_extractor()
    constants, ranks = dict[str, tuple[int, ...]](), dict[str, int]()
    for number, layer in enumerate(layers):
        if layer.kind == "Input":
            extractor.input(layer.tops[0], library.Mat(np.zeros(layer.sizes, np.float32)).clone())
        known = layer.sizes if layer.kind == "MemoryData" else None
        known = constants.get(layer.bottoms[0]) if layer.kind == "Split" else known
        if layer.kind == "BinaryOp" and len(layer.bottoms) == 2:
            for which, other in ((0, 1), (1, 0)):
                sizes, rank = constants.get(layer.bottoms[which]), ranks[layer.bottoms[other]]
                if sizes is None or len(sizes) == rank or layer.bottoms[other] in constants:
                    continue
                front, last = sizes[: max(len(sizes) - rank, 0)], sizes[-rank:]
                if set(front) <= {1}:
                    return number, which, (*(1 for _ in range(rank - len(last))), *last)
        for blob in layer.tops:
            code, mat = extractor.extract(blob, type=1)
            if code or mat.empty():
                return None  # whoever opens it is told
            ranks[blob] = int(mat.dims)
            if known is not None:
                constants[blob] = known
    return None


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
    kinds = [(layer.name, found) for layer, part in zip(layers, parts, strict=True) if (found := _kind(part))]
    counts = Counter(kind for _, kind in kinds)
    main = main_precision(counts)
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
        kinds += [] if fits else [(layer.name, "fp32")]
    counts = Counter(kind for _, kind in kinds)
    main = main or main_precision(counts)
    evidence = {f"operators {kind}": count for kind, count in counts.items()}
    evidence |= {"matrix products by constants that FP16 holds exactly": exact} if exact else {}
    return Achieved(main, evidence, tuple(sorted(name for name, kind in kinds if kind != main)))


def _kind(part: Weights) -> str:
    """One word for a layer's weights; "" where it has none."""
    return "+".join(sorted({kind for kind, _ in part.tagged}))
