"""TorchScript: a traced graph with its weights, run by libtorch. Input and output stay FP32 at every precision."""
# pyright: reportUnknownMemberType=false
# (torch.jit and torch.from_numpy have no types)

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any, cast

from exporters.artifact import ALLOW_TF32, Achieved, Artifact
from exporters.errors import ArtifactError, NotSupported, first_line
from exporters.formats import Format, Job, Made, Runtime, Step
from exporters.metadata import Metadata, read_json
from exporters.runtimes.torch_module import TorchSession, kind_of, requested
from exporters.session import Session
from exporters.spec import ExportSpec, Precision

CONFIG = "config.txt"  # the name under which users' loaders look for the metadata


def export(job: Job) -> Made:
    """Traces the model on an example of the request's shapes and saves it with its metadata.

    It is traced on the request's device: what the model makes while it runs is made there for ever after.

    Raises:
        NotSupported: a GPU is asked for and PyTorch finds none.
    """
    import torch

    from exporters.models.build import build, example, for_export, one_thread
    from exporters.models.reference import exact_fp32

    spec = job.spec
    exact_fp32(spec.device)  # whether TF32 is allowed is traced into every convolution
    if spec.device != "cpu" and int(spec.device.partition(":")[2] or 0) >= torch.cuda.device_count():
        found = f"finds {torch.cuda.device_count() or 'no'} GPUs here to trace on"
        raise NotSupported(f"device {spec.device}: PyTorch {torch.__version__} {found}")
    with one_thread(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation of torch.jit, and tracer warnings about shapes that we mean
        module = for_export(build(spec.model), spec.dynamic)
        if spec.precision is Precision.FP16:
            from exporters.models.fp16 import in_fp16

            module = in_fp16(module, tuple(path for path, _ in spec.model.fp32))
        # The trace is not checked here: comparing it with PyTorch is what the suite does.
        inputs = tuple(t.to(spec.device) for t in example(spec))
        graph = cast("Any", torch.jit.trace(module.to(spec.device), inputs, strict=False, check_trace=False))
        name = f"{job.stem}.torchscript"
        extra = {CONFIG: job.metadata.as_json()}
        if spec.optimize:
            from torch.backends import xnnpack
            from torch.utils.mobile_optimizer import optimize_for_mobile

            if not cast("Any", xnnpack).enabled:
                raise NotSupported(
                    f"optimize: this PyTorch ({torch.__version__}) was built without XNNPACK, which its mobile "
                    "optimizer packs weights for"
                )
            mobile = cast("Any", optimize_for_mobile(graph))
            mobile._save_for_lite_interpreter(str(job.folder / name), _extra_files=extra)
        else:
            graph.save(str(job.folder / name), _extra_files=extra)
    return Made(name)


def load(artifact: Artifact, spec: ExportSpec, runtime: Runtime, device: str) -> Session:
    """Opens the file in libtorch."""
    from exporters.models.reference import exact_fp32

    exact_fp32(device)
    return TorchScriptSession(artifact.path, spec, device)


def _open(path: Path, device: str) -> tuple[Any, str]:
    """The module and its config.txt ("" where it has none)."""
    import torch

    extra = {CONFIG: ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = cast("Any", torch.jit.load(str(path), map_location=device, _extra_files=extra))
        text = cast("str | bytes", extra[CONFIG])  # libtorch replaces the text by bytes
        return graph, text.decode() if isinstance(text, bytes) else text
    except (RuntimeError, ValueError, OSError) as error:
        what = f"'{path}' cannot be loaded as TorchScript ({first_line(error)})"
        raise ArtifactError(what, "export it again") from None


class TorchScriptSession(TorchSession):
    """A loaded TorchScript file. The file does not hold names of tensors: they are the request's, in order."""

    runtime = "libtorch"

    def __init__(self, path: Path, spec: ExportSpec, device: str) -> None:
        self.path = path
        self.call, self.config = _open(path, device)
        self.inputs = requested(spec)
        self.begin(spec, device, [o.name for o in spec.model.outputs])

    def metadata(self) -> Metadata:
        if not self.config:
            raise ArtifactError(f"'{self.path}' holds no metadata ({CONFIG})", "export it again")
        return read_json(self.config, str(self.path))


def inspect(path: Path) -> Achieved:
    """Precision of the weights that convolutions and matrix products use, read from the file's graph."""
    graph, _ = _open(path, "cpu")
    counts: Counter[str] = Counter()
    for name, tensor in graph.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim >= 2:
            counts[kind_of(tensor.dtype)] += 1
            if kind_of(tensor.dtype) == "fp32":
                counts[f"fp32 in {name.removeprefix('inner.').rpartition('.')[0]}"] += 1
    inlined = graph.inlined_graph
    if not counts:  # a frozen graph keeps its weights as constants, or packed for mobile (FP32 only)
        for node in inlined.nodes():
            kind = node.kind()
            if "prepacked" in kind and kind.endswith("_run"):
                counts["fp32"] += 1
            elif kind == "prim::Constant" and "value" in node.attributeNames() and node.kindOf("value") == "t":
                tensor = node.t("value")
                if tensor.is_floating_point() and tensor.ndim >= 2:
                    counts[kind_of(tensor.dtype)] += 1
    totals = {k: v for k, v in counts.items() if " in " not in k}
    main = max(totals, key=lambda k: totals[k]) if totals else ""
    others = tuple(sorted(k.partition(" in ")[2] for k in counts if " in " in k)) if main != "fp32" else ()
    found = {f"weights {k}": v for k, v in totals.items()}
    # The last argument of PyTorch's operator says whether a GPU may round the inputs to TF32.
    rounded = sum(bool(list(n.inputs())[-1].toIValue()) for n in inlined.findAllNodes("aten::_convolution"))
    return Achieved(main, found | ({ALLOW_TF32: rounded} if rounded and main == "fp32" else {}), others)


def refusal(spec: ExportSpec) -> str:
    """Why a combination cannot be: the mobile optimizer packs FP32 weights for a CPU."""
    if spec.optimize and spec.precision is not Precision.FP32:
        return f"optimize with {spec.precision}: PyTorch's mobile optimizer packs FP32 weights only"
    if spec.optimize and spec.device != "cpu":
        return f"optimize on {spec.device}: PyTorch's mobile optimizer is for CPUs"
    return ""


def steps(spec: ExportSpec) -> tuple[Step, ...]:
    """One step, in a process with torch."""
    return (Step("export", export, ("exporters.lean_torch",)),)


FORMAT = Format(
    id="torchscript",
    title="TorchScript",
    suffix=".torchscript",
    precisions=(Precision.FP32, Precision.FP16),
    options=frozenset({"batch", "dynamic", "device", "optimize"}),
    toolchain="pytorch",
    runtimes=tuple(
        Runtime("libtorch", device, (Precision.FP32, Precision.FP16), imports=("torch",)) for device in ("cpu", "cuda")
    ),
    steps=steps,
    load=load,
    inspect=inspect,
    refusal=refusal,
    is_code=True,
    keeps_signature=False,
    gone={Precision.INT8: "PyTorch's eager quantization is gone from the exporter's contract; use onnx or engine"},
)
