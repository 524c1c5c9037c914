"""What PyTorch loads and calls with tensors: a TorchScript graph, an exported program, a compiled library."""
# pyright: reportUnknownMemberType=false
# (torch.from_numpy has no types)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from exporters.artifact import TensorInfo
from exporters.session import Array, Execution, Feeds, OnDevice, Session
from exporters.spec import ExportSpec

if TYPE_CHECKING:
    import torch


class TorchSession(Session):
    """Subclasses load `call`, say which `inputs` it takes, and then `begin`."""

    runtime: str
    call: Callable[..., Any]
    device: str
    names: tuple[str, ...]
    zeros: list[torch.Tensor]

    def begin(self, spec: ExportSpec, device: str, names: Sequence[str]) -> None:
        """Calls it once on zeros to see its outputs, which get these names in order.

        Sizes are those that its inputs have in the file, where that holds any, so that a file made for another request
        says so itself, and else the request's.
        """
        import torch

        self.device, self.timed_on, self.stride = device, "" if device == "cpu" else device, spec.model.stride
        with torch.inference_mode():
            asked = [spec.model.shape(i, spec.batch, spec.imgsz) for i in spec.model.inputs]
            self.zeros = [
                torch.zeros(_sizes(info, asked[n : n + 1]), dtype=getattr(torch, info.dtype), device=device)
                for n, info in enumerate(self.inputs)
            ]
            values = self._outputs(*self.zeros)
        # A surplus output gets a name of its own, so that the claim on names sees it.
        self.names = tuple([*names, *(f"unnamed{i}" for i in range(len(names), len(values)))][: len(values)])
        self.outputs = tuple(
            TensorInfo(n, () if spec.dynamic else tuple(v.shape), str(v.dtype).removeprefix("torch."))
            for n, v in zip(self.names, values, strict=True)
        )

    def _outputs(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from exporters.models.build import as_tuple

        return as_tuple(self.call(*given))

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        import torch

        with torch.inference_mode():
            # Feeds from another process are mapped read-only, and a graph may change its inputs in place.
            writable = [a if a.flags.writeable else a.copy() for a in (feeds[i.name] for i in self.inputs)]
            values = self._outputs(*(torch.from_numpy(array).to(self.device) for array in writable))
        return {n: v.cpu().numpy() for n, v in zip(self.names, values, strict=True)}

    def on_device(self, feeds: Feeds) -> OnDevice:
        import torch

        from exporters.cuda.torch_feeds import TorchFeeds

        tensors = [torch.from_numpy(feeds[i.name].copy()).to(self.device) for i in self.inputs]
        return TorchFeeds(self._outputs, tensors, self.names)

    def execution(self) -> Execution:
        import torch

        from exporters.models.executed import executed

        with torch.inference_mode():
            precision, notes = executed(lambda: self.call(*self.zeros))
        return Execution(
            self.runtime, torch.__version__, self.device, precision, threads=torch.get_num_threads(), notes=notes
        )

    def close(self) -> None:
        del self.call


def _sizes(info: TensorInfo, asked: Sequence[tuple[int, ...]]) -> list[int]:
    """An input's sizes; of axes that vary those of the request, which may have no such input."""
    wanted = asked[0] if asked and len(asked[0]) == len(info.shape) else (1,) * len(info.shape)
    return [own if isinstance(own, int) else size for own, size in zip(info.shape, wanted, strict=True)]


def requested(spec: ExportSpec) -> tuple[TensorInfo, ...]:
    """The request's inputs, of a file that does not hold their names or shapes."""
    return tuple(
        TensorInfo(i.name, i.shape if spec.dynamic else spec.model.shape(i, spec.batch, spec.imgsz), i.dtype)
        for i in spec.model.inputs
    )


def kind_of(dtype: Any) -> str:
    """ "fp16" for torch.float16."""
    names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
    word = str(dtype).removeprefix("torch.")
    return names.get(word, word)
