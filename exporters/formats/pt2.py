"""PT2: a program of torch.export with its weights, run by PyTorch. Input and output stay FP32 at every precision."""
# pyright: reportUnknownMemberType=false
# (torch.export leaves types open)

from __future__ import annotations

import inspect as code
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from exporters.artifact import Achieved, Artifact
from exporters.errors import ExportError, NotSupported, first_line
from exporters.formats import Format, Job, Made, Runtime, Step
from exporters.session import Session
from exporters.spec import ExportSpec, Precision

if TYPE_CHECKING:
    import torch

MODULE = "exporters.runtimes.pt2"


def export(job: Job) -> Made:
    """Exports the module on an example of the request's shapes and saves the program with its metadata."""
    import torch

    from exporters.runtimes.pt2 import CONFIG

    target = job.folder / f"{job.stem}.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program(job.spec), str(target), extra_files={CONFIG: job.metadata.as_json()})
    return Made(target.name)


def program(spec: ExportSpec) -> Any:
    """The exported program of a request: inputs and outputs have the model's names, axes that vary any size from 1.

    Raises:
        NotSupported: a GPU is asked for and PyTorch finds none.
        ExportError: the model's Python does not make one graph for all inputs.
    """
    import torch
    import torch.fx.experimental._config as symbols

    from exporters.models.build import build, example, for_export, one_thread
    from exporters.models.fp16 import in_fp16
    from exporters.models.reference import exact_fp32

    exact_fp32(spec.device)
    if spec.device != "cpu" and int(spec.device.partition(":")[2] or 0) >= torch.cuda.device_count():
        found = f"finds {torch.cuda.device_count() or 'no'} GPUs here to export on"
        raise NotSupported(f"device {spec.device}: PyTorch {torch.__version__} {found}")
    module = for_export(build(spec.model), spec.dynamic)
    if spec.precision is Precision.FP16:
        module = in_fp16(module, tuple(path for path, _ in spec.model.fp32))
    module = _named(module.to(spec.device), [i.name for i in spec.model.inputs])
    inputs = tuple(t.to(spec.device) for t in example(_not_square(spec)))
    # Without the option a size of 1 is a case of its own that the graph is not made for, one row of cells say.
    oblivious = cast("Any", symbols).patch(backed_size_oblivious=True)
    with one_thread(), torch.no_grad(), warnings.catch_warnings(), oblivious:
        warnings.simplefilter("ignore")
        try:
            made = torch.export.export(module, inputs, dynamic_shapes=_varying(spec), strict=False)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ExportError(
                f"torch.export cannot make a graph of model '{spec.model.name}' ({first_line(error)})",
                "see that its forward runs and depends on no tensor's values"
                + (", or leave --dynamic out" if spec.dynamic else ""),
            ) from error
    _name_outputs(made, [o.name for o in spec.model.outputs])
    for node in made.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine have no place in a file that is shipped
    return made


def _named(module: torch.nn.Module, names: list[str]) -> torch.nn.Module:
    """The module with a forward whose parameters have these names, which the program's inputs get."""
    forward = module.forward

    def named(*inputs: Any) -> Any:
        return forward(*inputs)

    parameters = [code.Parameter(name, code.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    cast("Any", named).__signature__ = code.Signature(parameters)
    module.forward = named
    return module


def _name_outputs(made: Any, names: list[str]) -> None:
    """Renames what the program gives to the model's outputs; what is an input too, or given twice, keeps its name."""
    values = list(next(node for node in made.graph.nodes if node.op == "output").args[0])
    taken = {node.name for node in made.graph.nodes}
    for name, node in zip(names, values, strict=False):
        if node.op == "call_function" and values.count(node) == 1 and name not in taken:
            made.graph_signature.replace_all_uses(node.name, name)
            node.name = name
    made.graph_module.recompile()


def _not_square(spec: ExportSpec) -> ExportSpec:
    """What varies is exported on an image whose sides differ, so that none is taken for the other."""
    height, width = spec.imgsz
    varies = spec.dynamic and spec.model.has_images and height == width
    return spec.but(imgsz=(height, width + spec.model.stride)) if varies else spec


def _varying(spec: ExportSpec) -> Any:
    """For each input the axes that vary: height and width by the stride."""
    if not spec.dynamic:
        return None
    from torch.export import Dim

    found: dict[str, Any] = {}
    for name in (d for entry in spec.model.inputs for d in entry.shape if isinstance(d, str)):
        dim = found.get(name) or Dim(name, min=1)
        strided = name in ("height", "width") and spec.model.stride > 1 and name not in found
        found[name] = dim * spec.model.stride if strided else dim
    return tuple({n: found[d] for n, d in enumerate(i.shape) if isinstance(d, str)} for i in spec.model.inputs)


def load(artifact: Artifact, spec: ExportSpec, runtime: Runtime, device: str) -> Session:
    """Loads the program on the device."""
    from exporters.models.reference import exact_fp32
    from exporters.runtimes.pt2 import ProgramSession

    exact_fp32(device)
    return ProgramSession(artifact.path, spec, device)


def inspect(path: Path) -> Achieved:
    """See exporters.runtimes.pt2."""
    from exporters.runtimes.pt2 import read_precision

    return read_precision(path)


def steps(spec: ExportSpec) -> tuple[Step, ...]:
    """One step, in a process with torch."""
    return (Step("export", export, ("torch", MODULE)),)


FORMAT = Format(
    id="pt2",
    title="torch.export",
    suffix=".pt2",
    precisions=(Precision.FP32, Precision.FP16),
    options=frozenset({"batch", "dynamic", "device"}),
    toolchain="pytorch",
    runtimes=tuple(
        Runtime("eager", device, (Precision.FP32, Precision.FP16), imports=("torch", MODULE))
        for device in ("cpu", "cuda")
    ),
    steps=steps,
    load=load,
    inspect=inspect,
    is_code=True,
    gone={Precision.INT8: "PyTorch quantizes exported programs for back ends of their own; use onnx or openvino"},
)
