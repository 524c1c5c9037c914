"""The module as torch.export sees it, for formats that are lowered from that in a toolchain of their own."""
# pyright: reportUnknownMemberType=false
# (torch.export leaves types open)

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from exporters.errors import ExportError, first_line
from exporters.models.spec import ModelSpec

if TYPE_CHECKING:
    from torch.export import ExportedProgram

TRACED, SAMPLES = "traced.pt2", "samples"  # the program and the calibration set, until they are used


def exported(
    module: Any, inputs: tuple[Any, ...], model: ModelSpec, shapes: tuple[dict[int, Any], ...] | None = None
) -> ExportedProgram:
    """What torch.export makes of a module, for one shape, or where `shapes` names axes for a range of them.

    Raises:
        ExportError: it cannot.
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ExportError(
            f"torch.export cannot export model '{model.name}' ({first_line(error)})",
            "branches on values and shapes that vary have to be written as torch.export takes them",
        ) from error


def path_of(node: Any) -> str:
    """The module that a node of a graph comes from: "model.22.cv2.0.0.conv", or "" of the model itself."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return path.removeprefix("L['self']").strip(".").removeprefix("inner.")
