"""LiteRT on a CPU: a session of its interpreter with XNNPACK, whose feeds and outputs are the model's."""

from __future__ import annotations

import importlib
from collections import Counter
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

import numpy as np

from exporters.artifact import main_precision
from exporters.errors import ArtifactError, first_line
from exporters.litert.signature import as_floats, as_stored, info, layout_of, named
from exporters.metadata import Metadata
from exporters.runtimes import tflite_file
from exporters.runtimes.rounding import rounding
from exporters.runtimes.tflite_file import AGAIN, Operator, TfliteFile
from exporters.session import Array, Execution, Feeds, Session, cpus
from exporters.spec import ExportSpec

library: Any = importlib.import_module("ai_edge_litert.interpreter")

MOST_TERMS = 256  # of a sum that is looked at: the bound grows with them


class LiteRtSession(Session):
    """A .tflite file. Names of tensors are the signature's, or, in files of others, the tensors' own; where none of
    those is the model's, the place counts. Inputs and outputs in 8 bits are fed and given as the numbers they stand
    for."""

    def __init__(self, path: Path, spec: ExportSpec) -> None:
        self.path, self.spec, self.stride = path, spec, spec.model.stride
        self.file = tflite_file.read(path)
        self.threads = cpus()
        self.interpreter = _opened(path, self.threads)
        self.feeds = named(self.file, 0, [i.name for i in spec.model.inputs])
        self.gives = named(self.file, 1, [o.name for o in spec.model.outputs])
        self.layout = layout_of(self.file, spec, self.feeds)
        self.inputs = tuple(info(name, self.file.tensors[n], self.layout) for name, n in self.feeds.items())
        self.outputs = tuple(info(name, self.file.tensors[n], self.layout) for name, n in self.gives.items())

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        self._invoke(self.interpreter, feeds)
        return {
            name: self.layout.output(name, as_floats(self.interpreter.get_tensor(n), self.file.tensors[n]))
            for name, n in self.gives.items()
        }

    def _invoke(self, interpreter: Any, feeds: Feeds) -> None:
        try:
            for name, number in self.feeds.items():
                array = as_stored(self.layout.feed(feeds[name]), self.file.tensors[number])
                if -1 in self.file.tensors[number].shape:
                    interpreter.resize_tensor_input(number, array.shape)
                    interpreter.allocate_tensors()
                interpreter.set_tensor(number, array)
        except (RuntimeError, ValueError) as error:
            raise ArtifactError(f"'{self.path}' does not take these feeds ({first_line(error)})", AGAIN) from None
        try:
            interpreter.invoke()
        except RuntimeError as error:
            raise ArtifactError(f"'{self.path}' does not run ({first_line(error)})", AGAIN) from None

    def execution(self) -> Execution:
        found, shown = tflite_file.precisions(self.file), self._rounding()
        kinds, notes = Counter[str](), list[str]()
        for _, kind, form in found:  # weights of 16 bits, and what is made of 8, are multiplied as FP32
            kinds["int8" if kind == "int8" and form != "as weights alone" else "fp32" if kind else ""] += 1
        if shown is not None:
            name, error, bound = shown
            notes.append(f"{name} rounds by {error:.1g} of its terms, FP32's bound is {bound:.1g}")
            exact, eight = error <= bound, any(kind == "int8" for of, kind, _ in found if of == name)
            if exact == eight:  # it does not compute as its file has it
                kinds = Counter({"fp32" if exact else "less than fp32": kinds.total()})
        notes += [f"{n} of the convolutions and matrix products in {k}" for k, n in kinds.items() if k]
        taken = sum(d["op_name"] == "DELEGATE" for d in self.interpreter._get_ops_details())
        notes += [f"{taken} parts of the graph by XNNPACK"] if taken else ["XNNPACK has none of it"]
        return Execution(
            "litert",
            distributions.version("ai-edge-litert"),
            "cpu",
            main_precision({k: n for k, n in kinds.items() if k}),
            threads=self.threads,
            notes=tuple(notes),
            operators={k: n for k, n in kinds.items() if k},
        )

    def _rounding(self) -> tuple[str, float, float] | None:
        """What an operator on floating point shows of its arithmetic: its name, how far it rounds, FP32's bound.

        LiteRT does not tell in which precision it computes, but shows what goes in and what comes out.
        """
        candidates = _pointwise(self.file)
        shapes = {i.name: self.spec.model.shape(i, self.spec.batch, self.spec.imgsz) for i in self.spec.model.inputs}
        if not candidates or any(i.name not in shapes for i in self.inputs):
            return None
        interpreter, random = _opened(self.path, self.threads, seen=True), np.random.default_rng(0)
        self._invoke(interpreter, {i.name: random.random(shapes[i.name]).astype(i.dtype) for i in self.inputs})
        for op in candidates:
            given, made = (np.moveaxis(interpreter.get_tensor(n), -1, 1) for n in (op.inputs[0], op.outputs[0]))
            found = rounding(given, made)
            if found is not None:
                return self.file.name(op), *found
        return None

    def metadata(self) -> Metadata:
        return tflite_file.read_metadata(self.path)

    def close(self) -> None:
        del self.interpreter


def _opened(path: Path, threads: int, seen: bool = False) -> Any:
    """An interpreter; `seen` keeps what its operators compute."""
    try:
        made = library.Interpreter(str(path), num_threads=threads, experimental_preserve_all_tensors=seen)
        made.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise ArtifactError(f"'{path}' cannot be loaded by LiteRT ({first_line(error)})", AGAIN) from None
    return made


def _pointwise(file: TfliteFile) -> list[Operator]:
    """Convolutions over one point, of floating point in and out, without an activation: those in 8 bits first, then
    the largest, since XNNPACK computes very small ones (of 4 channels, seen) in FP32."""
    eight = {name for name, kind, _ in tflite_file.precisions(file) if kind == "int8"}
    found: list[tuple[bool, int, Operator]] = []
    for op in file.operators:
        if op.kind != tflite_file.CONVOLUTIONS[0] or op.options is None:
            continue
        weight = file.tensors[op.inputs[1]]
        ends = {file.tensors[n].dtype for n in (op.inputs[0], op.outputs[0])}
        strides = {op.options.number(n, "i", 1) for n in (1, 2)}
        if ends != {"float32"} or len(weight.shape) != 4 or weight.shape[1:3] != (1, 1) or strides != {1}:
            continue
        if op.options.number(3, "b") or weight.shape[3] > MOST_TERMS:  # a fused activation
            continue
        found.append((file.name(op) not in eight, -weight.shape[0] * weight.shape[3], op))
    return [op for _, _, op in sorted(found, key=lambda one: one[:2])]
