"""Paddle: FP32, converted from TorchScript by X2Paddle. Run by Paddle Inference on a CPU."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.artifact import Achieved, Artifact
from exporters.errors import ArtifactError, ExportError
from exporters.formats import Format, Job, Made, Runtime, Step, fp32_trace
from exporters.metadata import SIDE_CAR
from exporters.session import Session
from exporters.spec import ExportSpec, Precision

if TYPE_CHECKING:
    from exporters.runtimes.paddle_program import Program

MODULE = "exporters.runtimes.paddle"
FOLDER = "_paddle_model"
NAME = "model"  # of both files, whatever the model is called
NOT_CONVERTED = re.compile(r"=+ (\w+::\w+) =+")  # as X2Paddle prints an operator that it does not know


def export(job: Job) -> Made:
    """Converts the TorchScript file, and gives inputs and outputs the model's names.

    Raises:
        ExportError: X2Paddle or Paddle failed, or left out an input.
    """
    from exporters.runtimes.paddle_program import PARAMETERS, PROGRAM, read, read_program, rename

    model, scratch = job.spec.model, job.folder / "x2paddle"
    _convert(job, scratch)
    made = scratch / "inference_model"
    try:
        program = read_program(made / f"{NAME}{PROGRAM}")
    except ArtifactError as error:
        raise ExportError(f"Paddle saved no program of model '{model.name}' ({error.what})", "see its log") from error
    rename(made / f"{NAME}{PROGRAM}", *_names(job.spec, program))
    folder = job.folder / f"{job.stem}{FOLDER}"
    folder.mkdir()
    for suffix in (PROGRAM, PARAMETERS):
        (made / f"{NAME}{suffix}").replace(folder / f"{NAME}{suffix}")
    (folder / SIDE_CAR).write_text(job.metadata.as_yaml(), encoding="utf-8")
    shutil.rmtree(scratch)
    read(folder)
    return Made(folder.name)


def _convert(job: Job, scratch: Path) -> None:
    """Runs X2Paddle, which writes Python code of the network, imports it, and lets Paddle trace that.

    Raises:
        ExportError: it failed, in its own words.
    """
    from exporters.runtimes import x2paddle_run
    from exporters.runtimes.paddle_program import said

    spec = job.spec
    inputs = [(spec.model.shape(i, spec.batch, spec.imgsz), i.dtype) for i in spec.model.inputs]
    done = subprocess.run(
        # -P: a neighbour of the program is called as Paddle's package is
        [sys.executable, "-P", x2paddle_run.__file__, str(job.parents[0].path), str(scratch), json.dumps(inputs)],
        cwd=job.folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    log = done.stdout.decode(errors="replace")
    print(log, file=sys.stderr)
    missing, raised = NOT_CONVERTED.findall(log), log.partition(x2paddle_run.WRONG)[2]
    if done.returncode < 0:
        told = f"it ended with {signal.Signals(-done.returncode).name}"
    elif missing:
        told = f"it has no {', '.join(sorted(missing))}"
    elif raised:
        told = said(raised)
    elif done.returncode or not (scratch / "inference_model" / f"{NAME}.json").is_file():
        told = said(log)  # it prints what Paddle raises, and exits with 0
    else:
        return
    raise ExportError(
        f"X2Paddle cannot convert model '{spec.model.name}' ({told})", "replace the operator, or export to onnx"
    )


def _names(spec: ExportSpec, program: Program) -> tuple[dict[str, str], dict[str, str]]:
    """The model's names by those that X2Paddle gave: x0, x1 ... for inputs in the trace's order, and outputs by place.

    Raises:
        ExportError: there are not as many.
    """
    inputs, outputs = ([t.name for t in tensors] for tensors in (spec.model.inputs, spec.model.outputs))
    found = {name: int(number) for name in program.inputs if (number := name.removeprefix("x")).isdecimal()}
    lost = [name for n, name in enumerate(inputs) if n not in found.values()]
    if lost or len(found) != len(inputs):
        raise ExportError(
            f"X2Paddle leaves out input {', '.join(lost) or list(found)} of model '{spec.model.name}', which nothing "
            "is computed from",
            "take it out of the model, or export to onnx",
        )
    outputs += [f"unnamed{n}" for n in range(len(outputs), len(program.outputs))]
    return {name: inputs[n] for name, n in found.items()}, dict(zip(program.outputs, outputs, strict=False))


def load(artifact: Artifact, spec: ExportSpec, runtime: Runtime, device: str) -> Session:
    """Opens the folder in Paddle Inference."""
    from exporters.runtimes.paddle import PaddleSession

    return PaddleSession(artifact.path, spec, named=artifact.has_manifest)


def inspect(path: Path) -> Achieved:
    """See exporters.runtimes.paddle_program."""
    from exporters.runtimes.paddle_program import read_precision

    return read_precision(path)


def refusal(spec: ExportSpec) -> str:
    """Sizes are numbers in the code that X2Paddle writes."""
    if spec.dynamic:
        return "dynamic: X2Paddle writes the sizes of the traced example into the program as numbers"
    return ""


def steps(spec: ExportSpec) -> tuple[Step, ...]:
    """One step: what runs is the trace, and no code of the user's."""
    return (Step("convert", export),)


FORMAT = Format(
    id="paddle",
    title="Paddle",
    suffix=FOLDER,
    precisions=(Precision.FP32,),
    options=frozenset({"batch", "dynamic", "device"}),
    toolchain="paddle",
    runtimes=(Runtime("paddle", "cpu", (Precision.FP32,), imports=(MODULE,)),),
    steps=steps,
    load=load,
    inspect=inspect,
    parents=fp32_trace,  # of ONNX, X2Paddle 1.6 reads files of old releases alone
    refusal=refusal,
    gone={
        Precision.FP16: "X2Paddle converts FP32, and Paddle has no FP16 kernels for convolutions on a CPU",
        Precision.INT8: "X2Paddle converts FP32, and what quantizes Paddle's models is another package (PaddleSlim)",
    },
    # A program names operators that Paddle was built with, and holds no code; of those that write or read files, or run
    # what a file holds (save_combine, tensorrt_engine, py_func ...), none is opened: see paddle_program.REFUSED.
    is_code=False,
)
