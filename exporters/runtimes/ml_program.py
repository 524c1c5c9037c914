"""An ML Program, computed operator by operator with PyTorch."""
# pyright: reportUnknownMemberType=false
# (torch's from_numpy has no types)

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from exporters.coreml.read import AGAIN, FAILURES, File
from exporters.errors import ArtifactError, NotSupported, first_line
from exporters.runtimes.mil_operators import OPERATORS, Given
from exporters.session import Array

_builtin: Any = importlib.import_module("coremltools.converters.mil.mil.types")
TYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
FAILS = (*FAILURES, ArithmeticError)  # PyTorch and Python, where values do not fit each other
LABELS = "classify"  # which gives probabilities their names, and computes nothing


class Program:
    """The main function of an ML Program.

    Every operator is computed in FP32 and its result then rounded to the type that the program gives it. That is what
    FP16 hardware does at best, which sums up in FP32 and rounds once; PyTorch's own FP16 kernels on a CPU do the same
    for some operators only. So the file is judged, and not one processor's order of sums.

    Raises:
        ArtifactError: see `File.main`.
        NotSupported: an operator that is not known here, by name.
    """

    def __init__(self, file: File) -> None:
        self.file, self.main = file, file.main
        self.constants: dict[int, Any] = {}
        self.operations: list[Any] = []
        for op in self.main.operations:
            if op.op_type == "const" or op.op_type.startswith("constexpr_"):
                self.constants[id(op.outputs[0])] = self._constant(op)
            elif op.op_type != LABELS:
                self.operations.append(op)
        unknown = sorted({op.op_type for op in self.operations} - OPERATORS.keys())
        if unknown:
            raise NotSupported(f"exportgate does not compute the operators {', '.join(unknown)} of '{file.path}'")
        # What is not needed any more after each operator: of a large model all values are many times its outputs.
        wanted = {id(var) for var in self.main.outputs} | {id(self.probabilities(op)) for op in self.main.operations}
        last = {id(var): n for n, op in enumerate(self.operations) for var in _vars(op)}
        self.done: list[list[int]] = [[] for _ in self.operations]
        for key, n in last.items():
            if key not in wanted and key not in self.constants:
                self.done[n].append(key)

    def probabilities(self, op: Any) -> Any:
        """What a classifier's last operator takes; None of any other operator."""
        return op.inputs["probabilities"] if op.op_type == LABELS else None

    def _constant(self, op: Any) -> Any:
        """A constant's value; of weights in 8 bits what they stand for."""
        try:
            value: Any = op.outputs[0].val if op.op_type == "const" else op.materialized_val_inference()
        except FAILURES as error:
            what = f"its constant {op.outputs[0].name} cannot be read ({first_line(error)})"
            raise ArtifactError(f"'{self.file.path}': {what}", AGAIN) from None
        array: Any = np.array(value)
        if array.dtype.kind not in "fiub":  # a word
            return value
        return torch.from_numpy(array.astype(np.int32) if array.dtype == np.uint16 else array)

    @torch.inference_mode()
    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by the program's names, in its types; of a classifier its probabilities, (1, classes).

        Raises:
            ArtifactError: operators that do not fit each other, or give another shape than the program says.
            NotSupported: a form of an operator that is not computed here.
        """
        values: dict[int, Any] = dict(self.constants)
        check_inputs(self.file, self.main.inputs, feeds)
        for name, var in self.main.inputs.items():
            values[id(var)] = torch.from_numpy(np.array(feeds[name])).to(_type(var))
        for op, done in zip(self.operations, self.done, strict=True):
            made = self._computed(op, values)
            for var, value in zip(op.outputs, made, strict=True):
                said = [int(cast("int", n)) if isinstance(n, (int, np.integer)) else None for n in var.shape]
                if len(said) != value.ndim or any(n not in (None, m) for n, m in zip(said, value.shape, strict=True)):
                    raise ArtifactError(
                        f"'{self.file.path}': {op.op_type} {op.name} gives {list(value.shape)}, and says {said}", AGAIN
                    )
                values[id(var)] = value.to(_type(var))
            for key in done:
                del values[key]
        ends = [self.probabilities(op) for op in self.main.operations if op.op_type == LABELS]
        return {str(var.name): values[id(var)].numpy() for var in (ends or self.main.outputs)}

    def _computed(self, op: Any, values: Mapping[int, Any]) -> Sequence[Tensor]:
        given: dict[str, Any] = {}
        for name, var in op.inputs.items():
            if isinstance(var, (list, tuple)):
                given[name] = [values[id(v)] for v in cast("Sequence[Any]", var)]
            elif var is not None:
                given[name] = values[id(var)]
        try:
            made = OPERATORS[op.op_type](Given(op.op_type, given))
        except FAILS as error:
            what = f"{op.op_type} {op.name} cannot be computed ({first_line(error)})"
            raise ArtifactError(f"'{self.file.path}': {what}", AGAIN) from error
        return [made] if isinstance(made, Tensor) else made


def _vars(op: Any) -> list[Any]:
    """All values that an operator takes."""
    found: list[Any] = []
    for var in op.inputs.values():
        found += list(cast("Sequence[Any]", var)) if isinstance(var, (list, tuple)) else [var]
    return [var for var in found if var is not None]


def _type(var: Any) -> torch.dtype:
    name = str(_builtin.builtin_to_string(var.dtype))
    if name not in TYPES:
        raise NotSupported(f"exportgate does not compute values of type {name}, as {var.name} is")
    return TYPES[name]


def check_inputs(file: File, taken: Iterable[str], feeds: Mapping[str, Array]) -> None:
    """Raises ArtifactError where a program takes an input that its description, which feeds fit, does not have."""
    stray = next((name for name in taken if name not in feeds), None)
    if stray is not None:
        raise ArtifactError(f"'{file.path}' takes the input {stray}, and describes {', '.join(feeds)}", AGAIN)
