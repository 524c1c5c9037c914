"""Builds the torch module of a ModelSpec, in a worker: imports the factory, calls it, loads the weights strictly."""
# pyright: reportUnknownMemberType=false
# (torch's from_numpy, manual_seed and fork_rng have no types)

from __future__ import annotations

import hashlib
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from exporters.errors import BadRequest, CheckpointError, ExportError
from exporters.lean_torch import complete  # torch is imported whole above, unless a worker did so before
from exporters.models.checkpoint import read_checkpoint
from exporters.models.factory import import_function, telling
from exporters.models.spec import ModelSpec
from exporters.models.tensors import Array
from exporters.spec import ExportSpec


def build(model: ModelSpec) -> nn.Module:
    """The module in FP32, in evaluation mode, without gradients.

    Raises:
        BadRequest: the factory cannot be imported, raises, or returns no module.
        CheckpointError: the weights do not fit the module.
    """
    own = model.factory.startswith("exporters.models.")
    if not own:
        complete()
    factory = import_function(model.factory, model.search, "factory")
    # For what the factory itself imports when it is called; this process is the model's own.
    sys.path += [str(p) for p in model.search if str(p) not in sys.path]
    with torch.random.fork_rng(devices=[]), _unfilled() if own and model.weights is not None else nullcontext():
        torch.manual_seed(model.seed)
        with telling(model.factory, "factory"):
            module: Any = factory(**model.arguments)
    if not isinstance(module, nn.Module):
        raise BadRequest(
            f"factory '{model.factory}' returned {type(module).__name__}", "it must return a torch.nn.Module"
        )
    if model.weights is not None:
        checkpoint = read_checkpoint(model.weights)
        if _is_fused(checkpoint.state):
            _fuse(module.eval())
        load_strictly(module, checkpoint.state, str(model.weights))
        agree(module, checkpoint.modules, str(model.weights))
    return module.float().eval().requires_grad_(False)


@contextmanager
def _unfilled() -> Generator[None]:
    """Convolutions are made without random weights: a checkpoint's replace every tensor of our own models at once."""
    own = nn.Conv2d.reset_parameters
    nn.Conv2d.reset_parameters = lambda self: None
    try:
        yield
    finally:
        nn.Conv2d.reset_parameters = own


def _is_fused(state: Mapping[str, Array]) -> bool:
    """Whether batch normalizations were folded into the convolutions before the weights were saved."""
    return "model.0.conv.bias" in state and "model.0.bn.weight" not in state


def _fuse(module: nn.Module) -> None:
    """Folds batch normalizations where the model knows how, in place; it has to be in evaluation mode."""
    fuse = getattr(module, "fuse", None)
    if callable(fuse) and not isinstance(fuse, nn.Module):  # a model may have a layer of that name
        fuse()


def load_strictly(module: nn.Module, state: Mapping[str, Array], where: str) -> None:
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
            raise CheckpointError(
                f"{where} has no parameter '{key}', which the model has", "the file is of another architecture"
            )
        array = state[key]
        if tuple(array.shape) != tuple(tensor.shape):
            raise CheckpointError(
                f"{where}: '{key}' has shape {list(array.shape)}, the model's is {list(tensor.shape)}",
                "the file is of another architecture",
            )
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"{where}: '{key}' holds NaN or infinity", "use a checkpoint that trained without them"
            )
    extra = next((key for key in state if key not in expected), None)
    if extra is not None:
        raise CheckpointError(
            f"{where}: parameter '{extra}' is not one of the model's", "the file is of another architecture"
        )
    made = {
        key: torch.from_numpy(state[key]).to(tensor.dtype, copy=True) if key in state else torch.zeros_like(tensor)
        for key, tensor in expected.items()
    }
    module.load_state_dict(made, assign=True)


def agree(module: nn.Module, pickled: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """What stands in no tensor is the checkpoint's too: strides, paddings, the epsilon of a normalization.

    Raises:
        CheckpointError: names the first setting of a pickled module that the model's of the same path has otherwise.
    """

    def plain(value: Any) -> Any:
        return tuple(cast("Sequence[float]", value)) if isinstance(value, tuple | list) else value

    for path, settings in pickled.items():
        try:
            part = module.get_submodule(path)
        except AttributeError:  # of the peer's own making, without tensors: `load_strictly` compared those
            continue
        for key, value in settings.items():
            own = getattr(part, key, None)
            if isinstance(own, (bool, int, float, str, tuple, list)) and plain(own) != plain(value):
                raise CheckpointError(
                    f"{where}: '{path}' has {key} {value}, the model's is {own}",
                    "name the model's own factory in exportgate.toml: factory = 'package.module:function'",
                )


def for_export(module: nn.Module, dynamic: bool) -> nn.Module:
    """A module that `build` made, made ready in place: batch normalizations folded where the model knows how, shapes
    dynamic where it asks. A caller's own module is never here: only its ModelSpec crosses to the worker."""
    _fuse(module)
    if dynamic:
        for part in module.modules():
            if isinstance(getattr(part, "dynamic", None), bool):
                setattr(part, "dynamic", True)  # noqa: B010 (nn.Module declares that its attributes are tensors or modules)
    return module.eval().requires_grad_(False)


def state_digest(model: ModelSpec) -> str:
    """SHA-256 of a module: its printed form, the plain attributes of its parts, and all tensors that they hold."""
    module = build(model)
    total = hashlib.sha256(repr(module).encode())
    tensors: dict[str, Any] = dict(module.state_dict()) | dict(module.named_buffers())
    for path, part in cast("Iterable[tuple[str, nn.Module]]", module.named_modules()):
        for key, value in sorted(vars(part).items()):
            if isinstance(value, Tensor):
                tensors[f"{path}.{key}"] = value
            elif not key.startswith("_") and isinstance(value, (bool, int, float, str, tuple, list)):
                total.update(f"{path}.{key} {value!r}".encode())
    for name, value in tensors.items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def example(spec: ExportSpec) -> tuple[Tensor, ...]:
    """Inputs to trace with, of the request's shapes; a dynamic graph is traced on batch 2: no axis is 1 by chance."""
    varies = spec.dynamic or spec.batch_axis
    batch = max(spec.batch, 2) if varies and spec.model.has_batch else spec.batch
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


@contextmanager
def one_thread() -> Generator[None]:
    """Torch on one thread: an export runs the model once, on one image, where a second thread gains some 30 ms at best.

    On a machine whose cores others use too, the threads of OpenMP wait for each other at the end of every operator: an
    export took 4.4 s instead of 0.5 s there (2 cores, one of them busy; seen).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """A module's outputs in order: one tensor, a sequence of them, or a mapping.

    Raises:
        ExportError: something else is among them.
    """
    if isinstance(outputs, Mapping):
        parts = tuple(cast("Mapping[Any, Any]", outputs).values())
    elif isinstance(outputs, (list, tuple)):
        parts = tuple(cast("list[Any]", outputs))
    else:
        parts = (outputs,)
    for part in parts:
        if not isinstance(part, Tensor):
            raise ExportError(
                f"the model returned {type(part).__name__} where a tensor is expected",
                "let it return one tensor, or a flat sequence or mapping of tensors",
            )
    return parts
