"""AOTInductor: an exported program compiled to a library for this machine's CPU. Input and output stay FP32."""

from __future__ import annotations

import importlib
import json
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporters.artifact import Achieved, Artifact
from exporters.errors import ExportError, first_line
from exporters.formats import Format, Job, Made, Runtime, Step
from exporters.runtimes.instruction_set import compiled_for, compiler
from exporters.session import Session
from exporters.spec import ExportSpec, Precision

MODULE = "exporters.runtimes.aotinductor"
SUFFIX = "_aotinductor.pt2"  # PyTorch wants .pt2, which is the name of programs, too


def depends(spec: ExportSpec) -> Mapping[str, str]:
    """The library is this CPU's, and its compiler's.

    Raises:
        ToolchainMissing: there is no C++ compiler.
    """
    flags, version = compiled_for()
    return {"machine": platform.machine(), "instruction_set": flags, "compiler": version}


def export(job: Job) -> Made:
    """Exports the module as pt2 does and compiles the program.

    Raises:
        ToolchainMissing: there is no C++ compiler.
        ExportError: PyTorch could not compile it.
    """
    from exporters.formats.pt2 import program
    from exporters.runtimes.aotinductor import FLAGS, INPUTS
    from exporters.runtimes.pt2 import signature

    flags, version = compiled_for()
    target = job.folder / f"{job.stem}{SUFFIX}"
    inductor: Any = importlib.import_module("torch._inductor")
    config: Any = importlib.import_module("torch._inductor.config")
    made = program(job.spec)
    inputs = [(i.name, i.shape, i.dtype) for i in signature(made)[0]]
    options: dict[str, Any] = {
        "aot_inductor.metadata": {**job.metadata.as_strings(), FLAGS: flags, INPUTS: json.dumps(inputs)},
        "compile_threads": 1,
    }
    if hasattr(config.aot_inductor, "precompile_headers"):  # 280 MB, for one file that is compiled once
        options["aot_inductor.precompile_headers"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            inductor.aoti_compile_and_package(made, package_path=str(target), inductor_configs=options)
        except RuntimeError as error:
            raise ExportError(
                f"AOTInductor failed ({first_line(error)})", "see whether the compiler runs: $CXX, or g++"
            ) from error
    return Made(target.name, (f"compiled by {version} for {platform.machine()}: {flags}",))


def load(artifact: Artifact, spec: ExportSpec, runtime: Runtime, device: str) -> Session:
    """Loads the library, which is native code: callers have checked where it comes from."""
    from exporters.runtimes.aotinductor import LibrarySession

    return LibrarySession(artifact.path, spec, device)


def inspect(path: Path) -> Achieved:
    """See exporters.runtimes.aotinductor."""
    from exporters.runtimes.aotinductor import read_precision

    return read_precision(path)


def refusal(spec: ExportSpec) -> str:
    """What the library cannot do, or is not made for here."""
    if spec.dynamic:
        return (
            "dynamic: where sizes vary AOTInductor's C++ for sums ends in a store of a whole vector, which lies beyond "
            "the tensor and kills the process (valgrind, YOLOv8's head; PyTorch 2.11 and 2.13); pt2 has sizes that vary"
        )
    if spec.device != "cpu":
        return f"device {spec.device}: libraries are compiled for CPUs here; pt2, torchscript and engine run on GPUs"
    return ""


def steps(spec: ExportSpec) -> tuple[Step, ...]:
    """One step, in a process with torch."""
    return (Step("compile", export, ("torch", MODULE)),)


FORMAT = Format(
    id="aotinductor",
    title="AOTInductor",
    aliases=("aoti",),
    suffix=SUFFIX,
    precisions=(Precision.FP32, Precision.FP16),
    options=frozenset({"batch", "dynamic", "device"}),
    toolchain="pytorch",
    runtimes=(
        Runtime(
            "aoti",
            "cpu",
            (Precision.FP32, Precision.FP16),
            imports=("torch", MODULE),
            untold="PyTorch sees the convolutions that a compiled library calls, and this model has none: matrix "
            "products pass its dispatcher by",
        ),
    ),
    steps=steps,
    load=load,
    inspect=inspect,
    refusal=refusal,
    depends=depends,
    needs=compiler,
    is_code=True,
    gone={Precision.INT8: "AOTInductor compiles what was quantized before, and programs of pt2 are not"},
)
