"""ncnn: a text of layers and a file of weights, converted from TorchScript by pnnx. Weights in 32 or 16 bits."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.artifact import Achieved, Artifact
from exporters.errors import ArtifactError, ExportError, ToolchainMissing
from exporters.formats import Format, Job, Made, Runtime, Step, fp32_trace
from exporters.metadata import SIDE_CAR
from exporters.models.spec import belongs
from exporters.session import Session
from exporters.spec import ExportSpec, Precision

if TYPE_CHECKING:
    from exporters.runtimes.ncnn_files import Layer, Weights

MODULE = "exporters.runtimes.ncnn"
FOLDER = "_ncnn_model"
NAME = "model.ncnn"  # of both files, whatever the model is called
TYPES = {"float32": "f32", "int32": "i32", "int64": "i64"}  # of inputs, as pnnx says
MOST_AXES = 4  # of an ncnn blob, beside the batch
NO_BATCH = 233  # pnnx's word for it
WEIGHT = re.compile(r"nn\.(?!\w*Norm|PReLU)\w+ +(?P<path>\S+) .*?@weight=\((?P<shape>[\d,]+)\)")  # in pnnx's own graph


def export(job: Job) -> Made:
    """Converts the TorchScript file, in FP16 but for the modules that the model keeps in FP32.

    Raises:
        ExportError: pnnx failed, or made what ncnn cannot run.
    """
    from exporters.runtimes.ncnn_files import aligned, write_param

    spec, scratch, notes = job.spec, job.folder / "pnnx", list[str]()
    half = spec.precision is Precision.FP16
    made = _convert(job, scratch / "whole", half=half)
    layers, parts = _read(made)
    named = _named(layers, parts, _paths(job, made, scratch / "apart"), 2 if half else 4)
    layers = _with_sizes(named or layers, made, spec)
    data = (made / f"{NAME}.bin").read_bytes()
    kept = [path for path, _ in spec.model.fp32]
    if half and kept and not named:
        notes = ["warning: which layers are modules that stay in FP32 is not certain: all weights are in FP16"]
    spared = [bool(part.tagged) and belongs(layer.name, kept) for layer, part in zip(layers, parts, strict=True)]
    if half and any(spared):
        wide = _convert(job, scratch / "kept", half=False)
        _, own = _read(wide)
        whole = (wide / f"{NAME}.bin").read_bytes()
        if len(own) != len(parts):
            raise ExportError(
                f"pnnx makes {len(parts)} layers in FP16 and {len(own)} in FP32: none can be taken for the other",
                "ask for fp32",
            )
        data = b"".join(
            whole[w.start : w.stop] if spare else data[p.start : p.stop]
            for w, p, spare in zip(own, parts, spared, strict=True)
        )
    folder = job.folder / f"{job.stem}{FOLDER}"
    folder.mkdir()
    param, weights = folder / f"{NAME}.param", folder / f"{NAME}.bin"
    write_param(param, layers)
    weights.write_bytes(data)
    aligned(param, weights)
    (folder / SIDE_CAR).write_text(job.metadata.as_yaml(), encoding="utf-8")
    shutil.rmtree(scratch)
    return Made(folder.name, tuple(notes))


def _convert(job: Job, scratch: Path, *, half: bool) -> Path:
    """A folder with the two files, and a dozen more that pnnx leaves beside them.

    Raises:
        ExportError: pnnx failed, or says that it cannot do something.
    """
    code, told = _pnnx(job, scratch, f"fp16={int(half)}")
    wrong = next((line for line in told if "not supported yet" in line), "")
    if code or wrong or not (scratch / f"{NAME}.bin").is_file():
        causes = [line for line in told if re.search(r"[Ee]rror|what\(\)|fail|expect", line)]
        line = wrong or (causes or told or ["it said nothing"])[-1]
        raise ExportError(f"pnnx failed ({line[:300]}, exit code {code})", "export to another format")
    return scratch


def _pnnx(job: Job, scratch: Path, option: str) -> tuple[int, list[str]]:
    """Runs pnnx on the parent in a new folder: its exit code, and the lines that it said."""
    spec = job.spec
    found = importlib.util.find_spec("pnnx")  # not imported: the package brings torch, and the program needs none
    beside = Path(found.origin or "") if found is not None else Path()
    program = next((p for p in (beside.with_name(n) for n in ("pnnx", "pnnx.exe") if beside.name) if p.is_file()), None)
    if program is None:
        raise ToolchainMissing(
            "pnnx's package is not here, or has no program in it: run exportgate toolchain sync ncnn"
        )
    scratch.mkdir(parents=True)
    shutil.copyfile(job.parents[0].path, scratch / "model.pt")
    shapes = (
        f"[{','.join(map(str, spec.model.shape(i, spec.batch, spec.imgsz)))}]{TYPES[i.dtype]}"
        for i in spec.model.inputs
    )
    done = subprocess.run(
        [str(program), "model.pt", f"inputshape={','.join(shapes)}", option],
        cwd=scratch,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    lines = done.stdout.decode(errors="replace").splitlines()
    return done.returncode, [line.strip() for line in lines if line.strip()]


def _read(folder: Path) -> tuple[tuple[Layer, ...], tuple[Weights, ...]]:
    """What pnnx made, which it does whether or not ncnn has the layers for it."""
    from exporters.runtimes.ncnn_files import read_param, read_weights

    param = folder / f"{NAME}.param"
    try:
        layers = read_param(param)
        return layers, read_weights(param, param.with_suffix(".bin"), layers)
    except ArtifactError as error:
        raise ExportError(
            f"ncnn cannot run what pnnx made of the model ({error.what.partition(': ')[2] or error.what})",
            "export to another format, or replace the operator",
        ) from None


def _paths(job: Job, made: Path, scratch: Path) -> list[tuple[str, str]]:
    """(path, shape) of each weight of a module, in order. What pnnx joined of two modules has a name of pnnx's, and
    that of the first in what it makes when it joins nothing."""
    found = _modules(made)
    if any(re.search(r"_\d+$", path) for path, _ in found):
        _pnnx(job, scratch, "optlevel=0")  # it may fail where it writes for ncnn, after the graph that is read here
        before = _modules(scratch)
        own = {path for path, _ in before}
        differs = [path in own - {b} or shape != s for (path, shape), (b, s) in zip(found, before, strict=False)]
        found = before if len(found) == len(before) and not any(differs) else found
    return found


def _modules(made: Path) -> list[tuple[str, str]]:
    """Paths and shapes of the weights in pnnx's own graph."""
    graph = made / "model.pnnx.param"
    lines = graph.read_text(encoding="utf-8").splitlines() if graph.is_file() else []
    return [(m["path"], m["shape"]) for line in lines if (m := WEIGHT.match(line))]


def _named(
    layers: Sequence[Layer], parts: Sequence[Weights], paths: Sequence[tuple[str, str]], width: int
) -> tuple[Layer, ...]:
    """Layers with weights by the names of their modules, instead of conv_59; () where which is whose is not certain."""
    heavy = [n for n, part in enumerate(parts) if part.tagged]
    sizes = [(prod(map(int, shape.split(","))) * width + 3) // 4 * 4 for _, shape in paths]  # whole words
    if sizes != [parts[n].tagged[0][1] for n in heavy] or len({path for path, _ in paths}) < len(paths):
        return ()
    names = dict(zip(heavy, (path for path, _ in paths), strict=True))
    return tuple(replace(layer, name=names.get(n, layer.name)) for n, layer in enumerate(layers))


def _with_sizes(layers: Sequence[Layer], made: Path, spec: ExportSpec) -> tuple[Layer, ...]:
    """Inputs with their sizes, so that the file itself says what it is made for: pnnx leaves them out.

    Raises:
        ExportError: pnnx took another axis than the first for the batch.
    """
    told = (made / "model_ncnn.py").read_text(encoding="utf-8")
    axes = [int(n) for n in re.findall(r"batch_index=(\d+)", told)]
    if len(set(axes)) != 1 or axes[0] not in (0, NO_BATCH):
        raise ExportError(
            f"pnnx takes axes {axes} of the inputs and outputs for the batch", "give all a first axis that is the batch"
        )
    sizes = {
        f"in{n}": spec.model.shape(entry, spec.batch, spec.imgsz)[int(axes[0] == 0) :]
        for n, entry in enumerate(spec.model.inputs)
    }
    return tuple(
        layer.sized(size) if layer.kind == "Input" and (size := sizes.get(layer.tops[0])) else layer for layer in layers
    )


def load(artifact: Artifact, spec: ExportSpec, runtime: Runtime, device: str) -> Session:
    """Opens the two files in ncnn: in FP32 nothing is narrower; in FP16 with its own options."""
    from exporters.runtimes.ncnn import NcnnSession

    return NcnnSession(artifact.path, spec)


def inspect(path: Path) -> Achieved:
    """See exporters.runtimes.ncnn_files."""
    from exporters.runtimes.ncnn_files import read_precision

    return read_precision(path)


def refusal(spec: ExportSpec) -> str:
    """Why a combination cannot be: sizes are numbers in the file, and blobs have few types and axes."""
    if spec.dynamic:
        return "dynamic: a .param file of ncnn holds what depends on the image size (anchors, reshapes) as numbers"
    for entry in spec.model.inputs:
        if entry.dtype not in TYPES:
            return f"input '{entry.name}' is {entry.dtype}: ncnn takes {', '.join(TYPES)}"
        if not 1 <= len(entry.shape) <= MOST_AXES + ("batch" in entry.shape):
            return f"input '{entry.name}' has {len(entry.shape)} axes: ncnn takes 1 to {MOST_AXES} beside the batch"
    return ""


def steps(spec: ExportSpec) -> tuple[Step, ...]:
    """One step: pnnx is a program, and what it made is read with ncnn."""
    return (Step("convert", export, (MODULE,)),)


FORMAT = Format(
    id="ncnn",
    title="ncnn",
    suffix=FOLDER,
    precisions=(Precision.FP32, Precision.FP16),
    options=frozenset({"batch", "dynamic", "device"}),
    toolchain="ncnn",
    runtimes=(
        Runtime(
            "ncnn",
            "cpu",
            (Precision.FP32,),
            "ncnn tells how it holds the values between layers, not in which precision an operator computes",
            imports=(MODULE,),
        ),
    ),
    steps=steps,
    load=load,
    inspect=inspect,
    parents=fp32_trace,  # what pnnx was made for; of ONNX it joins fewer layers
    refusal=refusal,
    gone={
        Precision.INT8: "ncnn's Python package holds none of its quantization tools (ncnn2table, ncnn2int8)",
    },
)
