"""Builds the torch module of a ModelSpec, in a worker: imports the factory, calls it, loads the weights strictly."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exporters.errors import BadRequest, CheckpointError
from exporters.models.checkpoint import read_checkpoint
from exporters.models.spec import ModelSpec
from exporters.spec import ExportSpec


def build(model: ModelSpec) -> nn.Module:
    """The module in FP32, in evaluation mode, without gradients.

    Raises:
        BadRequest: the factory cannot be imported or returns no module.
        CheckpointError: the weights do not fit the module.
    """
    factory = _factory(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.seed)
        module: Any = factory(**model.arguments)
    if not isinstance(module, nn.Module):
        raise BadRequest(f"factory '{model.factory}' returned {type(module).__name__}", "it must return a torch.nn.Module")
    if model.weights is not None:
        load_strictly(module, read_checkpoint(model.weights).state, str(model.weights))
    return module.float().eval().requires_grad_(False)


def _factory(model: ModelSpec) -> Any:
    name, _, function = model.factory.partition(":")
    for folder in model.search:
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    try:
        return getattr(importlib.import_module(name), function)
    except (ImportError, AttributeError) as error:
        raise BadRequest(f"factory '{model.factory}' cannot be imported ({error})", "give an importable package.module:function") from None


def load_strictly(module: nn.Module, state: Mapping[str, np.ndarray[Any, Any]], where: str) -> None:
    """Copies every array into the parameter or buffer of its name; each name and shape must fit.

    Raises:
        CheckpointError: names the first key that is missing, extra, of another shape, or not finite.
    """
    expected: dict[str, Tensor] = module.state_dict()
    for key, tensor in expected.items():
        if key not in state:
            # Old checkpoints lack this counter, which inference does not use.
            if key.endswith("num_batches_tracked"):
                continue
            raise CheckpointError(f"{where} has no parameter '{key}', which the model has", "the file is of another architecture")
        array = state[key]
        if tuple(array.shape) != tuple(tensor.shape):
            raise CheckpointError(f"{where}: '{key}' has shape {list(array.shape)}, the model's is {list(tensor.shape)}",
                                  "the file is of another architecture")
        if not np.isfinite(array).all():
            raise CheckpointError(f"{where}: '{key}' holds NaN or infinity", "use a checkpoint that trained without them")
    extra = next((key for key in state if key not in expected), None)
    if extra is not None:
        raise CheckpointError(f"{where}: parameter '{extra}' is not one of the model's", "the file is of another architecture")
    with torch.no_grad():
        for key, array in state.items():
            expected[key].copy_(torch.from_numpy(np.array(array)))


def for_export(module: nn.Module, dynamic: bool) -> nn.Module:
    """A module that `build` made, made ready in place: batch normalizations folded where the model knows how, shapes
    dynamic where it asks. A caller's own module is never here: only its ModelSpec crosses to the worker."""
    fuse = getattr(module, "fuse", None)
    if callable(fuse):
        fuse()
    if dynamic:
        for part in module.modules():
            if hasattr(part, "dynamic"):
                setattr(part, "dynamic", True)
    return module.eval().requires_grad_(False)


def example(spec: ExportSpec) -> tuple[Tensor, ...]:
    """Inputs to trace with, of the request's shapes; a dynamic graph is traced on batch 2 so that no axis is 1 by chance."""
    batch = max(spec.batch, 2) if spec.dynamic and spec.model.has_batch else spec.batch
    generator = np.random.default_rng(0)
    made: list[Tensor] = []
    for entry in spec.model.inputs:
        shape = spec.model.shape(entry, batch, spec.imgsz)
        if np.issubdtype(np.dtype(entry.dtype), np.integer):
            array = generator.integers(int(entry.low), max(int(entry.high), int(entry.low) + 1), shape)
        else:
            array = generator.uniform(entry.low, entry.high, shape)
        made.append(torch.from_numpy(array.astype(entry.dtype)))
    return tuple(made)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """A module's outputs in order: one tensor, a sequence of them, or a mapping."""
    if isinstance(outputs, Tensor):
        return (outputs,)
    if isinstance(outputs, Mapping):
        return tuple(outputs.values())
    return tuple(outputs)
