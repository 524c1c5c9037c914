"""ExecuTorch: the module exported by torch.export and lowered to XNNPACK, INT8 by PT2E quantization. Run on a CPU."""
# pyright: reportUnknownMemberType=false
# (torch.export leaves types open)

from __future__ import annotations

import importlib
import json
import platform
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from exporters import calibration
from exporters.artifact import Achieved, Artifact
from exporters.errors import ExportError, NotSupported, first_line
from exporters.formats import Format, Job, Made, Runtime, Step, heads, needs_data
from exporters.models.spec import belongs
from exporters.models.traced import SAMPLES, TRACED, path_of
from exporters.runtimes.instruction_set import of_this_cpu
from exporters.session import Session
from exporters.spec import ExportSpec, Precision

if TYPE_CHECKING:
    from torch.export import ExportedProgram

MODULE = "exporters.runtimes.executorch"
LARGER, MOST = 2, 4  # times the size and batch, and images at least, that a dynamic program's memory is planned for


def trace(job: Job) -> Made:
    """Writes the module as torch.export sees it, and for INT8 the calibration set: both may be the user's code.

    Raises:
        ExportError: torch.export cannot export the model.
    """
    import torch

    from exporters.models.build import build, example, for_export, one_thread

    spec = job.spec
    module = for_export(build(spec.model), spec.dynamic)
    if spec.precision is Precision.FP16:
        from exporters.models.fp16 import in_fp16

        module = in_fp16(module, tuple(path for path, _ in spec.model.fp32))
    with one_thread(), torch.no_grad():
        program = _exported(module, example(spec), spec)
        torch.export.save(program, job.folder / TRACED)
    if spec.precision is Precision.INT8:
        calibration.keep_batches(spec, job.folder / SAMPLES)
    return Made(TRACED)


def _exported(module: Any, inputs: tuple[Any, ...], spec: ExportSpec) -> ExportedProgram:
    """What torch.export makes of a module, for one shape or for a range of them."""
    from torch.export import Dim

    from exporters.models.traced import exported

    model = spec.model
    shapes: tuple[dict[int, Any], ...] | None = None
    if spec.dynamic:
        varies: dict[str, Any] = {"batch": Dim("batch", min=1, max=_most(spec))}
        for name, size in zip(("height", "width"), spec.imgsz, strict=True):
            cells = Dim(f"{name}_cells", min=1, max=LARGER * size // model.stride)
            varies[name] = cells * model.stride if model.stride > 1 else cells
        other = next((d for i in model.inputs for d in i.shape if isinstance(d, str) and d not in varies), None)
        if other is not None:
            raise NotSupported(
                f"dynamic: axis '{other}' varies, and memory is planned for batch, height and width alone"
            )
        shapes = tuple({n: varies[d] for n, d in enumerate(i.shape) if isinstance(d, str)} for i in model.inputs)
    return exported(module, inputs, model, shapes)


def _most(spec: ExportSpec) -> int:
    """Images that one inference takes at most."""
    return max(MOST, LARGER * spec.batch) if spec.dynamic else spec.batch


def lower(job: Job) -> Made:
    """Quantizes (INT8), gives XNNPACK what it can run, and writes the program with its constants.

    Raises:
        ExportError: torchao or ExecuTorch failed.
    """
    import torch

    from exporters.models.build import example, one_thread
    from exporters.runtimes.executorch import INPUTS, METADATA, OUTPUTS
    from exporters.runtimes.pte import METHOD, MODULES

    exir: Any = importlib.import_module("executorch.exir")
    xnnpack: Any = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    configs: Any = importlib.import_module("executorch.backends.xnnpack.utils.configs")
    folding: Any = importlib.import_module("executorch.exir.passes.constant_prop_pass")
    spec, notes = job.spec, list[str]()
    with one_thread(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:  # also of another torch's program, where exportgate's own environment has another one
            program = torch.export.load(job.folder / TRACED)
            if spec.dynamic:  # of sizes that are multiples, a stored program cannot be decomposed
                program = _exported(program.module(), example(spec), spec)
            if spec.precision is Precision.FP16:
                _without_silu(program)
                notes = ["weights, rounded to FP16, lie in the file as FP32: XNNPACK packs them when it loads"]
            program = folding.constant_prop_pass(program)  # anchors, of a fixed size
            if spec.precision is Precision.INT8:
                program, notes = _quantized(program, job)
            # The default would check types of arguments, and make a batch that varies that of the example meanwhile.
            config = configs.get_xnnpack_edge_compile_config()
            edge = exir.to_edge_transform_and_lower(
                program, partitioner=[xnnpack.XnnpackPartitioner()], compile_config=config
            )
            if spec.dynamic:
                _still_varies(edge.exported_program(), spec)
            constants = {
                METADATA: job.metadata.as_json(),
                INPUTS: json.dumps([i.name for i in spec.model.inputs]),
                OUTPUTS: json.dumps([o.name for o in spec.model.outputs]),
                MODULES: json.dumps(_modules(edge.exported_program().graph_module)),
            }
            # Which node has which number is known when all is lowered, and constants are given before.
            whole = exir.EdgeProgramManager({METHOD: edge.exported_program()}, constants, config)
            made = whole.to_executorch().buffer
        except (RuntimeError, ValueError, TypeError, AssertionError, KeyError, NotImplementedError) as error:
            raise ExportError(
                f"ExecuTorch cannot lower model '{spec.model.name}' ({type(error).__name__}: {first_line(error)})",
                "see its log for the operator",
            ) from error
    (job.folder / TRACED).unlink()
    (job.folder / f"{job.stem}.pte").write_bytes(made)
    return Made(f"{job.stem}.pte", tuple(notes))


def _still_varies(program: Any, spec: ExportSpec) -> None:
    """Raises ExportError where lowering made a constant of an axis that was asked to vary."""
    import torch

    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    for entry, name in zip(spec.model.inputs, program.graph_signature.user_inputs, strict=True):
        for axis, size in zip(entry.shape, values[name].shape, strict=True):
            if isinstance(axis, str) and not isinstance(size, torch.SymInt):
                raise ExportError(
                    f"ExecuTorch made axis {axis} of input '{entry.name}' the constant {size}",
                    "export it without dynamic",
                )


def _without_silu(program: ExportedProgram) -> None:
    """Writes x * sigmoid(x) for SiLU, in place: of FP16, torch computes SiLU in FP32, and XNNPACK would get FP16 for
    the convolutions alone, each between two conversions by portable kernels."""
    import torch

    aten = cast("Any", torch.ops.aten)
    graph = program.graph
    for node in list(graph.nodes):
        if node.target not in (aten.silu.default, aten.silu_.default):
            continue
        with graph.inserting_before(node):
            gate = graph.call_function(aten.sigmoid.default, (node.args[0],))
            product = graph.call_function(aten.mul.Tensor, (node.args[0], gate))
        gate.meta, product.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    program.graph_module.recompile()


def _quantized(program: ExportedProgram, job: Job) -> tuple[ExportedProgram, list[str]]:
    """The program in 8 bits but for the head and what the request keeps: activations per tensor, weights per channel.

    Raises:
        BadRequest: `keep` names no module.
    """
    import torch

    from exporters.models.build import example

    torchao: Any = importlib.import_module("torchao.quantization.pt2e.quantizer")
    pt2e: Any = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    xnnpack: Any = importlib.import_module("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    spec, module = job.spec, cast("Any", program.module())
    paths = {path_of(node) for node in module.graph.nodes}
    spec.check_keep(paths, "operator")
    kept = [*heads(spec), *(path for path, _ in spec.model.fp32), *spec.keep]
    for node in module.graph.nodes:
        if belongs(path_of(node), kept):  # as annotated already: the quantizer's own filter is not asked about joins
            node.meta["quantization_annotation"] = torchao.QuantizationAnnotation(_annotated=True)
    quantizer = xnnpack.XNNPACKQuantizer()
    quantizer.set_global(xnnpack.get_symmetric_quantization_config(is_per_channel=True))
    prepared = pt2e.prepare_pt2e(module, quantizer)
    feeds = calibration.kept_batches(spec, job.folder / SAMPLES)
    for batch in feeds:
        count = len(batch[spec.model.inputs[0].name])
        rows = min(count, _most(spec)) if spec.model.has_batch else count
        for start in range(0, count, rows):
            one = (batch[i.name][start : start + rows] for i in spec.model.inputs)
            prepared(*(torch.from_numpy(np.array(array)) for array in one))
    notes = calibration.notes(feeds, "PT2E, HistogramObserver", kept)
    del feeds
    shutil.rmtree(job.folder / SAMPLES)
    return _exported(pt2e.convert_pt2e(prepared), example(spec), spec), notes


def _modules(graph: Any) -> dict[str, str]:
    """The module of each convolution and product that XNNPACK runs, by the number that the node has in the file."""
    lowered: Any = importlib.import_module("executorch.exir.lowered_backend_module")
    found: dict[str, str] = {}
    for part in lowered.get_lowered_backend_modules(graph):
        for node in part.original_module.graph.nodes:
            if "debug_handle" in node.meta and any(word in str(node.target) for word in ("conv", "linear", "mm")):
                found[str(node.meta["debug_handle"])] = path_of(node) or str(node)
    return found


def load(artifact: Artifact, spec: ExportSpec, runtime: Runtime, device: str) -> Session:
    """Opens the program in ExecuTorch's runtime."""
    from exporters.runtimes.executorch import ExecuTorchSession

    return ExecuTorchSession(artifact.path, spec)


def inspect(path: Path) -> Achieved:
    """See exporters.runtimes.pte."""
    from exporters.runtimes.pte import read_precision

    return read_precision(path)


def steps(spec: ExportSpec) -> tuple[Step, ...]:
    """What runs the user's code has exportgate's own environment."""
    return (Step("trace", trace, ("torch",), toolchain="pytorch"), Step("lower", lower, (MODULE,)))


FORMAT = Format(
    id="executorch",
    title="ExecuTorch",
    suffix=".pte",
    precisions=(Precision.FP32, Precision.FP16, Precision.INT8),
    options=frozenset({"batch", "dynamic", "device", "data", "split", "fraction", "keep"}),
    toolchain="executorch",
    runtimes=(
        Runtime(
            "xnnpack",
            "cpu",
            (Precision.FP32, Precision.FP16, Precision.INT8),
            imports=(MODULE,),
            # XNNPACK's FP16 kernels sum up in FP16 on Arm and where x86 has instructions for it (2048 + 2048 x 0.5 is
            # 2048, seen on a Xeon with AVX512-FP16), and in FP32 on other x86 (3072, seen on an EPYC without). Either
            # way by fused multiply-adds (FMLA, VFMADD231PH), whose definition is to round after each product.
            fp16_terms=int(platform.machine().lower() in ("aarch64", "arm64") or "avx512fp16" in of_this_cpu()),
        ),
    ),
    steps=steps,
    load=load,
    inspect=inspect,
    refusal=needs_data,
    keeps=heads,
    # Nothing in a .pte file is executed by the processor: it lists calls of kernels that the runtime was built with,
    # and graphs for a delegate that it was built with, and can neither name a library nor a file.
    is_code=False,
)
