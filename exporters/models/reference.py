"""The reference: eager FP32 PyTorch, a session like any other. It can also be damaged on purpose, and excite feeds."""
# pyright: reportUnknownMemberType=false
# (torch's from_numpy, backward and optimizers have no types)

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from exporters.artifact import TensorInfo
from exporters.errors import BadRequest, ExportError
from exporters.metadata import Metadata
from exporters.models.build import as_tuple
from exporters.session import Array, Execution, Feeds, Session
from exporters.spec import ExportSpec


@dataclass(frozen=True)
class Damage:
    """Noise on the weights of one layer: normal, with `size` times the standard deviation of the layer's weights."""

    layer: str
    size: float
    seed: int = 0


class Reference(Session):
    """Eager PyTorch in FP32 with TF32 off."""

    def __init__(self, module: nn.Module, spec: ExportSpec, device: str) -> None:
        self.module = module.to(device)
        self.spec, self.device = spec, device
        self.stride = spec.model.stride
        # Eager PyTorch takes any size: every named axis varies.
        self.inputs = tuple(TensorInfo(i.name, i.shape, i.dtype) for i in spec.model.inputs)
        self.outputs = tuple(TensorInfo(o.name, (), "float32") for o in spec.model.outputs)

    @torch.inference_mode()
    def _run(self, feeds: Feeds) -> dict[str, Array]:
        tensors = [torch.from_numpy(np.array(feeds[i.name])).to(self.device) for i in self.inputs]
        values = as_tuple(self.module(*tensors))
        if len(values) != len(self.outputs):
            raise ExportError(
                f"model '{self.spec.model.name}' returned {len(values)} outputs and {len(self.outputs)} are named: "
                + ", ".join(o.name for o in self.outputs),
                "name every output in exportgate.toml",
            )
        return {o.name: v.cpu().numpy() for o, v in zip(self.outputs, values, strict=True)}

    def execution(self) -> Execution:
        return Execution("eager", torch.__version__, self.device, "fp32", threads=torch.get_num_threads())

    def metadata(self) -> Metadata:
        return Metadata.of(self.spec)

    def layers(self) -> list[str]:
        """Names of the modules with a weight of two or more axes, in the model's order, but those kept in FP32."""
        kept = tuple(f"{path}." for path, _ in self.spec.model.fp32)
        found: list[str] = []
        for name, part in cast("Iterable[tuple[str, nn.Module]]", self.module.named_modules()):
            weight: Any = getattr(part, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim >= 2 and not f"{name}.".startswith(kept):
                found.append(name)
        return found

    def run_damaged(self, feeds: Feeds, damage: Damage) -> dict[str, Array]:
        """Outputs with the damage; the weights are put back afterwards."""
        weight = self.module.get_submodule(damage.layer).weight
        assert isinstance(weight, Tensor)
        kept = weight.detach().clone()
        generator = torch.Generator().manual_seed(damage.seed)
        noise = torch.randn(kept.shape, generator=generator).to(kept.device)
        try:
            with torch.no_grad():
                weight.add_(noise * (float(kept.std()) * damage.size))
            return self.run(feeds)
        finally:
            with torch.no_grad():
                weight.copy_(kept)

    def excite(self, feeds: Feeds, steps: int, floor: float) -> dict[str, Array]:
        """Feeds whose pixels were changed by Adam until scores rise: anchors of several classes above `floor`.

        Only models with a score group can be excited. The steps are deterministic.

        Raises:
            BadRequest: the model has no scores.
        """
        groups = [(o, g) for o, spec in enumerate(self.spec.model.outputs) for g in spec.groups if g.kind == "score"]
        if not groups:
            raise BadRequest(
                f"model '{self.spec.model.name}' has no scores that feeds could excite", "give feeds of your own"
            )
        entry = self.spec.model.inputs[0]
        pixels = torch.from_numpy(np.array(feeds[entry.name])).to(self.device).requires_grad_(True)
        optimizer = torch.optim.Adam([pixels], lr=0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            outputs = as_tuple(self.module(pixels.clone()))  # a model may change its input in place
            losses: list[Tensor] = []
            reached = True
            for index, group in groups:
                scores = outputs[index][:, group.start : group.stop]
                # A classifier's (B, classes) has one place.
                scores = scores.flatten(2) if scores.ndim > 2 else scores.unsqueeze(2)
                # The same number of places for each class, so that several classes fire and swapping two shows.
                best = scores.topk(min(8, scores.shape[2]), 2).values
                losses.append(-(best.clamp_min(1e-6)).log().mean())
                reached = reached and bool((best[..., -1] > 2 * floor).all())
            if reached:
                break
            torch.stack(losses).sum().backward()
            optimizer.step()
            with torch.no_grad():
                pixels.clamp_(entry.low, entry.high)
        return {
            entry.name: pixels.detach().cpu().numpy(),
            **{k: np.array(v) for k, v in feeds.items() if k != entry.name},
        }

    def close(self) -> None:
        del self.module


def exact_fp32(device: str) -> None:
    """Turns TF32 off in this (worker) process, so that FP32 means FP32; CUDA's workspace is made deterministic."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if device != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
