"""Which values of a tensor matter in 8 bits: what a calibration set reaches, less what no output can show."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporters.layout import Layout
from exporters.models.spec import OutputSpec
from exporters.runtimes.tflite_file import Operator, TfliteFile, parsed
from exporters.session import Array, cpus
from exporters.spec import ExportSpec

Range = tuple[float, float]
EVERYTHING: Range = (-math.inf, math.inf)
# LiteRT's sigmoid and softmax in 8 bits give multiples of 1/256: where e^-x is less than half of that, 0 or all of it.
SATURATED = math.log(511)
STEP = 1 / 256
ADD, CONCATENATION, LOGISTIC, RESHAPE, SOFTMAX, TRANSPOSE, SLICE = 0, 2, 14, 22, 25, 39, 65  # BuiltinOperator's numbers
MOVES = (CONCATENATION, RESHAPE, TRANSPOSE, SLICE)  # which compute nothing


def of(data: bytes, spec: ExportSpec, feeds: Sequence[Mapping[str, Array]], layout: Layout) -> dict[str, Range]:
    """The ranges of a file in FP32, by its tensors' names; `layout` is what it has otherwise than the model."""
    file = parsed(data, Path("traced"))
    threads = cpus()
    bounds = {o.name: bounds_of(o, o.name in layout.divisors) for o in spec.model.outputs}
    found = measured(file, spec, feeds, threads, layout)
    expected = {i.name: (i.low, i.high) for i in spec.model.inputs}
    for n in file.inputs:  # a set without white has inputs without it, too: of bytes / 255 each is a step
        low, high = expected[file.tensors[n].name]
        found[n] = min(found[n][0], low), max(found[n][1], high)
    return that_matter(file, found, bounds)


def measured(
    file: TfliteFile, spec: ExportSpec, feeds: Sequence[Mapping[str, Array]], threads: int, layout: Layout
) -> list[Range]:
    """The smallest and largest value of each tensor that is computed, on these feeds; of a softmax's input the smallest
    that is not more than SATURATED below the largest of its row."""
    interpreter: Any = importlib.import_module("ai_edge_litert.interpreter").Interpreter(
        model_content=file.data, experimental_preserve_all_tensors=True, num_threads=threads
    )
    interpreter.allocate_tensors()
    tensors = file.tensors
    computed = [n for n, t in enumerate(tensors) if t.dtype == "float32" and not t.is_constant]
    low, high = np.full(len(tensors), np.inf), np.full(len(tensors), -np.inf)
    rows = {op.inputs[0] for op in file.operators if op.kind == SOFTMAX}
    places = {tensors[n].name: n for n in file.inputs}
    for batch in feeds:
        for entry in spec.model.inputs:
            interpreter.set_tensor(places[entry.name], layout.feed(np.array(batch[entry.name])))
        interpreter.invoke()
        for n in computed:
            values = interpreter.get_tensor(n)
            least = float(values.min())
            if n in rows:
                least = max(least, float(values.max(-1).min()) - SATURATED)
            low[n], high[n] = min(low[n], least), max(high[n], float(values.max()))
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def bounds_of(output: OutputSpec, divided: bool) -> Range:
    """What a detector's output holds once it is divided: places within the image and scores from 0 to 1, which are
    sigmoids, angles from -1/4 to 3/4, and coefficients of at most a quarter."""
    if not divided:
        return EVERYTHING
    return (-0.25 if {"angle", "mask"} & {g.kind for g in output.groups} else 0.0), 1 - STEP


def that_matter(file: TfliteFile, found: Sequence[Range], outputs: Mapping[str, Range]) -> dict[str, Range]:
    """Ranges by tensor's name; `outputs` bounds those of outputs. What only moves, or goes into a sigmoid, has the
    bounds of what becomes of it."""
    users: dict[int, list[Operator]] = {}
    for op in file.operators:
        for n in op.inputs:
            users.setdefault(n, []).append(op)
    bounds = [EVERYTHING] * len(file.tensors)

    def bounds_in(op: Operator, n: int) -> Range:
        if op.kind == LOGISTIC:
            return -SATURATED, SATURATED
        if op.kind == SOFTMAX:
            return found[n][0], math.inf
        if op.kind in MOVES:
            return bounds[op.outputs[0]]
        if op.kind == ADD and all(found[i][0] >= 0 for i in op.inputs if not file.tensors[i].is_constant):
            return -math.inf, bounds[op.outputs[0]][1]
        return EVERYTHING

    for op in reversed(file.operators):  # what is computed later is bounded before
        for n in op.outputs:
            name = file.tensors[n].name
            told = [bounds_in(user, n) for user in users.get(n, [])]
            told += [outputs.get(name, EVERYTHING)] if n in file.outputs else []
            if told:
                bounds[n] = min(low for low, _ in told), max(high for _, high in told)
    made: dict[str, Range] = {}
    for n, tensor in enumerate(file.tensors):
        low, high = found[n]
        if low > high:
            continue
        if n in file.outputs and outputs.get(tensor.name, EVERYTHING) != EVERYTHING:
            made[tensor.name] = bounds[n]
        else:
            made[tensor.name] = min(max(low, bounds[n][0]), high), max(min(high, bounds[n][1]), low)
    return made
