"""The reference: eager FP32 PyTorch, a session like any other. It can also be damaged on purpose, and excite feeds."""
# pyright: reportUnknownMemberType=false
# (torch's from_numpy, backward and optimizers have no types)

from __future__ import annotations

import copy
import math
import operator
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode

from exporters.artifact import TensorInfo
from exporters.errors import BadRequest, ExportError
from exporters.metadata import Metadata
from exporters.models.build import as_tuple, example, for_export
from exporters.models.spec import belongs
from exporters.session import Array, Execution, Feeds, OnDevice, Session
from exporters.spec import ExportSpec
from exporters.weights import COUNTED, Parameters

UNIT = 2.0**-24  # by which FP32 arithmetic rounds a result, at most
NORMALIZATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Damage:
    """Noise on the weights of one layer: normal, with `size` times the standard deviation of the layer's weights."""

    layer: str
    size: float
    seed: int = 0


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    return {name: tensor.float().cpu().numpy() for name, tensor in tensors.items()}


class Reference(Session):
    """Eager PyTorch in FP32 with TF32 off."""

    def __init__(self, module: nn.Module, spec: ExportSpec, device: str) -> None:
        self.module = module.to(device)
        self.spec, self.device = spec, device
        self.timed_on = "" if device == "cpu" else device
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

    def on_device(self, feeds: Feeds) -> OnDevice:
        from exporters.cuda.torch_feeds import TorchFeeds

        tensors = [torch.from_numpy(np.array(feeds[i.name])).to(self.device) for i in self.inputs]
        return TorchFeeds(lambda *given: as_tuple(self.module(*given)), tensors, [o.name for o in self.outputs])

    def execution(self) -> Execution:
        from exporters.models.executed import executed

        inputs = [tensor.to(self.device) for tensor in example(self.spec)]
        with torch.inference_mode():
            precision, notes = executed(lambda: self.module(*inputs))
        return Execution(
            "eager", torch.__version__, self.device, precision, threads=torch.get_num_threads(), notes=notes
        )

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

    def parameters(self) -> Parameters:
        """Parameters of the folded module.

        What a model does not fold itself an exporter does: a batch normalization into the convolution before it.
        """
        module = for_export(copy.deepcopy(self.module), dynamic=False)
        made: dict[int, tuple[str, Tensor]] = {}
        folded: dict[str, tuple[str, nn.Module]] = {}
        layers: list[str] = []

        def after(path: str, output: Any) -> None:
            layers.append(path)
            if isinstance(output, Tensor):
                made[id(output)] = (path, output)  # which holds it, so that no other gets its id

        def before(path: str, part: nn.Module, inputs: Any) -> None:
            if inputs and id(inputs[0]) in made:
                folded[made[id(inputs[0])][0]] = path, part

        for path, part in cast("Iterable[tuple[str, nn.Module]]", module.named_modules()):
            weight: Any = getattr(part, "weight", None)
            if isinstance(part, NORMALIZATIONS):
                part.register_forward_pre_hook(lambda part, inputs, path=path: before(str(path), part, inputs))
            elif isinstance(weight, Tensor) and weight.ndim > 1 and not isinstance(part, nn.Embedding):
                part.register_forward_hook(lambda _part, _inputs, output, path=path: after(path, output))
        slack: dict[str, Tensor] = {}
        counting = _Counting()
        with torch.inference_mode():
            inputs = [i.to(self.device) for i in example(self.spec)]
            with counting:
                module(*inputs)
            found = {k: v for k, v in module.state_dict().items() if v.is_floating_point() and v.ndim}
            for path, (_, norm) in folded.items():
                layer, bn = cast("Any", module.get_submodule(path)), cast("Any", norm)
                turned = bool(getattr(layer, "transposed", False))
                parts = (layer.weight, layer.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
                weight, bias = fuse_conv_bn_weights(*parts, transpose=turned)
                found[f"{path}.weight"], found[f"{path}.bias"] = weight, bias
                # weight / sqrt(variance + eps), and the product with it: four roundings, ours and the exporter's.
                slack[f"{path}.weight"] = 8 * UNIT * weight.abs()
                # (bias - mean) * gain + shift: six roundings of what is summed up, which may cancel.
                gain = (bn.running_var + bn.eps).rsqrt() * (1 if bn.weight is None else bn.weight.abs())
                moved = bn.running_mean.abs() + (0 if layer.bias is None else layer.bias.abs())
                shift = torch.zeros_like(gain) if bn.bias is None else bn.bias.abs()
                slack[f"{path}.bias"] = 12 * UNIT * (moved * gain + shift)
        layers = list(dict.fromkeys(layers))
        used = [f"{path}.weight" for path in layers]
        used += [f"{p}.bias" for p in layers if f"{p}.bias" in found and bool(found[f"{p}.bias"].any())]
        gone = tuple(f"{path}." for path, _ in folded.values())
        names = (n for n, _ in module.named_parameters())
        known = {f"{path}.{what}" for path in layers for what in ("weight", "bias")}
        others = tuple(n for n in names if n not in known and not n.startswith(gone))
        return Parameters(_arrays(found), tuple(used), _arrays(slack), others, counting.counts)

    def modules(self) -> dict[str, str]:
        """Modules without parts of their own, as an exporter folds them."""
        module = for_export(copy.deepcopy(self.module), dynamic=False)
        parts = cast("Iterable[tuple[str, nn.Module]]", module.named_modules())
        return {path: path for path, part in parts if path and not list(part.children())}

    def run_inside(self, feeds: Feeds, modules: Sequence[str], row: int) -> dict[str, Array]:
        """Outputs of modules that give one tensor and are called once an inference."""
        module = for_export(copy.deepcopy(self.module), dynamic=False)
        seen: dict[str, list[Any]] = {path: [] for path in modules}

        def keep(path: str, output: Any) -> None:
            # A copy: what comes next may change it in place.
            seen[path].append(output[row : row + 1].clone() if isinstance(output, Tensor) else output)

        for path in modules:
            module.get_submodule(path).register_forward_hook(
                lambda _part, _inputs, output, path=path: keep(path, output)
            )
        folded = copy.copy(self)
        folded.module = module
        folded.run(feeds)
        return {k: v[0].cpu().numpy() for k, v in seen.items() if len(v) == 1 and isinstance(v[0], Tensor)}

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

    def run_rounded(self, feeds: Feeds, bits: int, seed: int, terms: int) -> dict[str, Array]:
        """Outputs of Monte Carlo arithmetic: weights and every operator's result rounded at random.

        The module is folded as exporters fold it, and what the request keeps in FP32 is not rounded. Rounding up or
        down with the probability that keeps the mean is that of D. S. Parker, Monte Carlo Arithmetic (1997); its error
        has a little more than the variance of rounding to nearest. Exponents are those of FP32: nothing overflows.

        Args:
            bits: of the stored fraction: 10 for FP16 and TF32, 7 for BF16.
            terms: after every so many products convolutions and matrix products also round what they have summed up
                so far; 0: only the whole sum.
        """
        rounding = _Rounding(bits, seed, self.device, terms)
        module = for_export(copy.deepcopy(self.module), dynamic=False)
        kept = tuple(path for path, _ in self.spec.model.fp32)
        for path in kept:
            part = module.get_submodule(path)
            part.register_forward_pre_hook(rounding.enter)
            part.register_forward_hook(rounding.leave)
        for name, weight in module.named_parameters():
            if not belongs(name, kept) and weight.dtype == torch.float32:
                weight.data = rounding.rounded(weight.data)
        rounded = copy.copy(self)
        rounded.module = module
        floats = {k: v.dtype == np.float32 for k, v in feeds.items()}
        with torch.inference_mode():
            inputs = {k: torch.from_numpy(np.array(v)).to(self.device) for k, v in feeds.items()}
            inputs = {k: rounding.rounded(v) if floats[k] else v for k, v in inputs.items()}
        with rounding:
            return rounded.run({k: v.cpu().numpy() for k, v in inputs.items()})

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
                scores = outputs[index][:, group.channels]
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


SUMS = (
    torch.ops.aten.convolution.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
)
# E[unit^2 f (1 - f)] / x^2, unit of the last bit of x over 2^-bits: 0.541 with log-uniform fractions, and 1/6. How
# tensor cores round is not told; a fused multiply-add rounds to nearest (IEEE 754), which has 1/12.
ROUNDED = 0.541 / 6
NEAREST = 0.541 / 12


class _Counting(TorchDispatchMode):
    """Counts what is in COUNTED; the same of the same values once, since exporters join those."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()
        self.seen: list[tuple[str, list[Tensor]]] = []  # which holds the values, so that no others get their place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        word = COUNTED.get(func.overloadpacket.__name__.removesuffix("_"))
        of = list(args[:2] if word == "convolution" else args[:1])  # with its weights
        if word and not any(word == w and all(map(operator.is_, of, values)) for w, values in self.seen):
            self.seen.append((word, of))
            self.counts[word] += 1
        return func(*args, **(kwargs or {}))


class _Rounding(TorchDispatchMode):
    """Rounds the FP32 result of every operator at random; what is representable already (views, copies) stays.

    With `terms` a convolution and a matrix product get the error of rounding what they have summed after every so many
    products, too: of n partial sums S of terms t in random order the k-th has the mean square (k/n)^2 S^2 +
    (k/n)(1 - k/n) sum(t^2), so that all have n (S^2/3 + sum(t^2)/6) together, and rounding one adds ROUNDED of its
    square in units of the last bit, or NEAREST after each product.
    """

    def __init__(self, bits: int, seed: int, device: str, terms: int) -> None:
        super().__init__()
        self.dropped = 23 - bits  # of the 23 bits of FP32's fraction
        self.unit, self.terms = 2.0**-bits, terms
        self.generator = torch.Generator(device).manual_seed(seed)
        self.paused = 0

    def enter(self, module: nn.Module, inputs: Any) -> None:
        """Before a module that stays in FP32."""
        self.paused += 1

    def leave(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        """After it."""
        self.paused -= 1

    def rounded(self, values: Tensor) -> Tensor:
        """A number below one unit of the last kept bit is added to the integer that the bits make; the rest is cut."""
        values = values.contiguous()
        bits = values.view(torch.int32)
        noise = torch.empty_like(bits).random_(0, 1 << self.dropped, generator=self.generator)
        return ((bits + noise) & -(1 << self.dropped)).view(torch.float32)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # An operator that others make up (in inference mode `conv2d` arrives, not `convolution`): those are rounded.
        with self:
            made = func.decompose(*args, **(kwargs or {}))
        if made is not NotImplemented:
            return made
        result = func(*args, **(kwargs or {}))
        if self.paused or not isinstance(result, Tensor) or result.dtype != torch.float32 or func.is_view:
            return result
        if self.terms and func in SUMS:
            result = result + self._of_sums(func, args, result)
        return self.rounded(result)

    def _of_sums(self, func: Any, args: Any, result: Tensor) -> Tensor:
        """The error of rounded partial sums, normal since it is a sum of many; the last one's is the result's."""
        at = 1 if func in (torch.ops.aten.addmm.default, torch.ops.aten.baddbmm.default) else 0
        a, b = args[at], args[at + 1]
        if func is torch.ops.aten.convolution.default:
            bias, squares = args[2], func(a * a, b * b, None, *args[3:])
            total = result if bias is None else result - bias.view(-1, *[1] * (result.ndim - 2))
            # Of a transposed convolution (rows are its inputs) a stride's share of the kernel meets a place.
            terms = b[0].numel() if not args[6] else b.shape[0] // args[8] * b[0, 0].numel() // math.prod(args[3])
        else:
            total, squares, terms = a @ b, (a * a) @ (b * b), a.shape[-1]
        partial = -(-terms // self.terms) - 1
        mean_square = partial * (total * total / 3 + squares / 6)
        noise = torch.empty_like(result).normal_(generator=self.generator)
        return noise * ((NEAREST if self.terms == 1 else ROUNDED) * mean_square).sqrt() * self.unit


def exact_fp32(device: str) -> None:
    """Turns TF32 off in this (worker) process, so that FP32 means FP32; CUDA's workspace is made deterministic."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if device != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
