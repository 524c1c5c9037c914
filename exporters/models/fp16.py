"""A torch module in FP16, as TorchScript and exported programs hold it: FP32 outside, and where the model says so."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from exporters.errors import BadRequest
from exporters.models.build import as_tuple


class HalfBetweenFloats(nn.Module):
    """FP32 inputs and outputs around a module in FP16."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Any:
        outputs = as_tuple(self.inner(*(x.half() if x.is_floating_point() else x for x in inputs)))
        floats = tuple(o.float() if o.is_floating_point() else o for o in outputs)
        return floats[0] if len(floats) == 1 else floats


def in_fp16(module: nn.Module, kept: tuple[str, ...]) -> nn.Module:
    """The module in FP16 between FP32 inputs and outputs; `kept` modules stay FP32 and take their inputs as FP32.

    Raises:
        BadRequest: `kept` names what is no module.
    """

    def to_float(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)

    module.half()
    for path in kept:
        try:
            part = module.get_submodule(path)
        except AttributeError:
            raise BadRequest(f"fp32 names '{path}', which is no module of the model", "correct the path") from None
        part.float()
        part.register_forward_pre_hook(to_float)
    return HalfBetweenFloats(module)
