"""Inputs and outputs of a .tflite file under the model's names, read without running it; and what its integers mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from exporters.artifact import TensorInfo
from exporters.errors import ArtifactError
from exporters.layout import Layout
from exporters.metadata import Metadata
from exporters.runtimes.tflite_file import Tensor, TfliteFile, read, read_metadata
from exporters.session import Array
from exporters.spec import ExportSpec

SCALED = ("int8", "uint8", "int16")  # types whose integers stand for others where they have a scale


def layout_of(file: TfliteFile, spec: ExportSpec, feeds: dict[str, int]) -> Layout:
    """How the file's tensors differ from the model's."""
    try:
        told = read_metadata(file.path)
    except ArtifactError:  # who asks for metadata is told
        told = Metadata()
    return Layout.of(told, spec.model, [file.tensors[n].shape for n in feeds.values()], f"'{file.path}'")


def named(file: TfliteFile, side: int, wanted: list[str]) -> dict[str, int]:
    """The model's names of inputs (side 0) or outputs (1), and the numbers of their tensors, in the model's order.

    By the signature, else by the tensors' own names; where none of those is the model's, by their place.
    """
    numbers = (file.inputs, file.outputs)[side]
    signature, own = file.signature[side], {file.tensors[n].name: n for n in numbers}
    told = signature if set(signature) & set(wanted) else own
    if not set(told) & set(wanted):
        return {(wanted[at] if at < len(wanted) else f"unnamed{at}"): n for at, n in enumerate(numbers)}
    return {name: told[name] for name in wanted if name in told} | {k: n for k, n in told.items() if k not in wanted}


def info(name: str, tensor: Tensor, layout: Layout) -> TensorInfo:
    """A tensor as the session reports it."""
    shape = tuple(size if size >= 0 else f"axis{n}" for n, size in enumerate(tensor.shape))
    return TensorInfo(name, layout.shape(shape), "float32" if is_scaled(tensor) else tensor.dtype)


def signature(path: Path, spec: ExportSpec) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    """Inputs and outputs."""
    file = read(path)
    feeds = named(file, 0, [i.name for i in spec.model.inputs])
    gives = named(file, 1, [o.name for o in spec.model.outputs])
    layout = layout_of(file, spec, feeds)
    ends = [tuple(info(name, file.tensors[n], layout) for name, n in side.items()) for side in (feeds, gives)]
    return ends[0], ends[1]


def is_scaled(tensor: Tensor) -> bool:
    """Whether a tensor's integers stand for numbers of another scale."""
    return tensor.dtype in SCALED and len(tensor.scales) == 1


def as_stored(array: Array, tensor: Tensor) -> Array:
    """An input as the file takes it: rounded to its scale, and cut off at its ends."""
    if not is_scaled(tensor):
        return array
    bounds, zero = np.iinfo(tensor.dtype), tensor.zeros[0] if tensor.zeros else 0
    return np.clip(np.rint(array / np.float32(tensor.scales[0])) + zero, bounds.min, bounds.max).astype(tensor.dtype)


def as_floats(array: Array, tensor: Tensor) -> Array:
    """An output as the numbers that it stands for."""
    if not is_scaled(tensor):
        return array
    zero = tensor.zeros[0] if tensor.zeros else 0
    return (array.astype(np.float32) - np.float32(zero)) * np.float32(tensor.scales[0])
