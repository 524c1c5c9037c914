"""Names of a converted program's operators and weights: those of the modules that they belong to.

coremltools names values by TorchScript's counters and weights by their parameters with "_" for ".", so that what a file
holds could not be held against a model. Names there are letters, digits and underscores: here "__" stands for ".".
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exporters.models.spec import belongs
from exporters.session import Array

HEAVY = ("conv", "conv_transpose", "linear", "matmul")  # MIL operators that multiply by weights
LAYERS = ("convolution", "innerProduct", "batchedMatmul")  # the same in a NeuralNetwork
INNER = "inner."  # of a module that `convert` wraps
_SUFFIX = re.compile(r"(_to_fp16|_quantized|_palettized|_cast_fp16|_affine_quantized|_lut)+$")
_passes: Any = importlib.import_module("coremltools.converters.mil.mil.passes.pass_registry")


def written(path: str) -> str:
    """A module's or parameter's path as a name in a file."""
    return re.sub(r"[^A-Za-z0-9_]", "_", path.replace(".", "__"))


def told(name: str) -> str:
    """The path that a name in a file says, without what compression appended to it."""
    return _SUFFIX.sub("", name).replace("__", ".")


def weight_inputs(op: Any) -> list[tuple[str, Any]]:
    """A heavy operator's inputs that hold its weights, as (input's name, its value): constants, compressed or not."""
    names = ("x", "y") if op.op_type == "matmul" else ("weight",)
    found = [(name, op.inputs[name]) for name in names if op.inputs.get(name) is not None]
    return [(name, var) for name, var in found if is_stored(var)]


def is_stored(var: Any) -> bool:
    """Whether a value is a constant of the file."""
    made = getattr(var, "op", None)
    return made is not None and (made.op_type == "const" or made.op_type.startswith("constexpr_"))


class Modules:
    """Which module of a traced model an operator belongs to.

    The parameter that a weight is named by says it exactly. Else the scopes of the trace do, in which lists of modules
    are missing, since nobody calls them: "22/0/0/conv" is of model.22.cv2.0.0.conv or of model.22.cv3.0.0.conv.
    """

    def __init__(self, parameters: Mapping[str, Array]) -> None:
        self.parameters = parameters
        self.short = {re.sub(r"[^A-Za-z0-9_]", "_", name): name for name in parameters}
        scopes: Any = importlib.import_module("coremltools.converters.mil.mil.scope")
        self.made: dict[str, str] = {}  # what heavy operators give, and their names
        self.source = scopes.ScopeSource.TORCHSCRIPT_MODULE_NAME

    def parameter(self, op: Any, var: Any) -> str:
        """The parameter that a weight of an operator is, or was before it was folded; "" where that is not clear."""
        name = re.sub(r"[^A-Za-z0-9_]", "_", _SUFFIX.sub("", var.name)).removeprefix(INNER.replace(".", "_"))
        if name in self.short:
            return self.short[name]
        size, scope = math.prod(int(n) for n in var.shape), self.scope(op)
        some = [
            (n, p)
            for n, p in self.parameters.items()
            if p.ndim > 1 and p.size == size and _is_of(scope, n[: n.rfind(".")])
        ]
        if len(some) > 1 and var.val is not None:
            value = np.asarray(var.val, np.float32).ravel()
            some = [(n, p) for n, p in some if np.allclose(p.ravel(), value, rtol=1e-3, atol=1e-6)]
        return some[0][0] if len(some) == 1 else ""

    def scope(self, op: Any) -> list[str]:
        """Modules that were called, the outermost first."""
        parts = list(op.scopes.get(self.source, []))[:-1]
        return parts[1:] if parts[:1] == [INNER[:-1]] else parts

    def is_kept(self, op: Any, kept: Sequence[str]) -> bool:
        """Whether an operator belongs to one of these modules."""
        for _, var in weight_inputs(op) if op.op_type in HEAVY else ():
            path = self.parameter(op, var)
            if path:
                return belongs(path, kept)
        scope = self.scope(op)
        return any(
            _is_of(scope[:n], path) and scope[n - 1] == path.rpartition(".")[2]
            for path in kept
            for n in range(1, len(scope) + 1)
        )

    def name(self, program: Any, kept: Sequence[str]) -> None:
        """Names heavy operators and their weights by their modules, and whatever else is kept by its module."""
        taken: set[str] = set()
        for op in program.functions["main"].operations:
            if op.op_type in HEAVY:
                for _, var in weight_inputs(op):
                    path = self.parameter(op, var)
                    if not path or path in taken:
                        continue
                    taken.add(path)
                    module = path.rpartition(".")[0]
                    op.name = written(module)
                    self.made[op.outputs[0].name] = op.name
                    _rename(var, written(path))
                    bias = op.inputs.get("bias")
                    if bias is not None and is_stored(bias) and bias.rank == 1:
                        _rename(bias, written(f"{module}.bias"))
            home = written(self.home(op, kept)) if op.op_type != "const" else ""
            if home and not op.name.startswith(f"{home}__"):
                op.name = f"{home}__{op.name}"

    def name_layers(self, network: Any) -> None:
        """Names a NeuralNetwork's layers, which are named by what they give in part."""
        for layer in network.layers:
            if layer.WhichOneof("layer") in LAYERS:
                layer.name = self.made.get(layer.output[0], layer.name)

    def home(self, op: Any, kept: Sequence[str]) -> str:
        """The kept module that an operator belongs to, or ""."""
        return next((path for path in kept if self.is_kept(op, [path])), "")


def _rename(var: Any, name: str) -> None:
    var.name = name
    var.op.name = name


def _is_of(scope: Sequence[str], path: str) -> bool:
    """Whether scopes are parts of a path, in their order."""
    parts = iter(path.split("."))
    return all(part in parts for part in scope)


def add_pass(pipeline: Any, modules: Modules, kept: Sequence[str]) -> None:
    """Appends to a pass pipeline of coremltools the pass that names."""

    class Naming:
        __name__ = "exportgate::names"

        def set_options(self, options: Any) -> None:
            """There are none."""

        def __call__(self, program: Any) -> None:
            modules.name(program, kept)

    _passes.PASS_REGISTRY.passes[Naming.__name__] = Naming()
    pipeline.append_pass(Naming.__name__)
