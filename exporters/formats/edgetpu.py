"""Edge TPU: the TensorFlow Lite file that is all in 8 bits, held against its compiler's demands, and compiled."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from exporters.artifact import Achieved, Artifact, TensorInfo
from exporters.errors import ExportError, NotSupported, ToolchainMissing
from exporters.formats import Format, Job, Made, Runtime, Step, needs_data
from exporters.metadata import Metadata
from exporters.session import Session
from exporters.spec import ExportSpec, Precision

MODULE = "exporters.runtimes.tflite_file"
COMPILER = "edgetpu_compiler"
WORDS = ("-s", "-d", "-k", "10")  # show operators; look upstream for where to stop, 10 operators at a time
SUFFIX = "_edgetpu.tflite"
LIMIT = 1800.0  # seconds
GET = "install it as https://coral.ai/docs/edgetpu/compiler/ says, on Linux with x86-64"
BECAUSE = "compiled files run on an Edge TPU alone"
MISSING = f"{COMPILER} is not on the PATH: files are held against its demands, and none is made"


def compiler() -> str:
    """The compiler's path, or ""."""
    return shutil.which(COMPILER) or ""


def compiled(job: Job) -> Made:
    """Tells what the compiler demands and the file lacks, and has it compiled where the compiler is here.

    Raises:
        ExportError: a demand is not met, or the compiler failed, in its own words.
        ToolchainMissing: the compiler is not on the PATH; it says what the demands are.
    """
    from exporters.litert import edgetpu
    from exporters.runtimes import tflite_file

    source = job.parents[0].path
    told = edgetpu.demands(tflite_file.read(source))
    if told.violations:
        raise ExportError(
            f"the Edge TPU's compiler demands what '{source.name}' lacks: {'; '.join(told.violations[:3])}",
            "see the operators and types that Coral lists",
        )
    words = compiler()
    if not words:
        raise ToolchainMissing(f"{COMPILER} is not on the PATH ({'; '.join(told.lines)})", GET)
    folder = job.folder / source.parent.name
    folder.mkdir()
    path = folder / f"{source.stem}{SUFFIX}"
    said = _compile(words, source, folder, path)
    metadata = tflite_file.read_metadata(source)
    if not edgetpu.is_compiled(tflite_file.read(path)):
        raise ExportError(
            f"{COMPILER} made a file without {edgetpu.COMPILED}, or an empty one: nothing of it runs there ({said})",
            "see its log for the reason of each operator",
        )
    path.write_bytes(tflite_file.with_metadata(path.read_bytes(), metadata))
    for log in folder.glob("*.log"):
        log.rename(job.folder / "builder.log")
    return Made(f"{folder.name}/{path.name}", told.lines)


def _compile(compiler: str, source: Path, folder: Path, path: Path) -> str:
    """Runs the compiler, and returns the last line that it printed.

    Raises:
        ExportError: it failed, took too long, or made no file.
    """
    command = [compiler, *WORDS, "-o", str(folder), str(source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False, errors="replace")
    except subprocess.TimeoutExpired:
        raise ExportError(f"{COMPILER} was not done after {LIMIT:g} s", "compile a smaller model") from None
    except OSError as error:
        raise ExportError(f"{COMPILER} cannot be run ({error.strerror})", GET) from None
    print(done.stdout, done.stderr)
    lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    wrong = next((line for line in lines if "rror" in line or "nvalid" in line), (lines or ["no word"])[-1])[:300]
    if done.returncode:
        raise ExportError(f"{COMPILER} failed with exit code {done.returncode} ({wrong})", "see the worker's log")
    if not path.is_file():
        raise ExportError(f"{COMPILER} made no {path.name} ({wrong})", "see the worker's log")
    return (lines or ["no word"])[-1][:300]


def load(artifact: Artifact, spec: ExportSpec, runtime: Runtime, device: str) -> Session:
    """Nothing here runs it."""
    raise NotSupported(BECAUSE)


def inspect(path: Path) -> Achieved:
    """See exporters.litert.edgetpu."""
    from exporters.litert.edgetpu import read_precision

    return read_precision(path)


def metadata(path: Path) -> Metadata:
    """See exporters.runtimes.tflite_file."""
    from exporters.runtimes import tflite_file

    tflite_file.read(path)  # a damaged model is told before what is appended to it
    return tflite_file.read_metadata(path)


def signature(path: Path, spec: ExportSpec) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    """Inputs and outputs as a session would report them: what is in 8 bits stands for FP32."""
    from exporters.litert.signature import signature

    return signature(path, spec)


def parents(spec: ExportSpec) -> tuple[ExportSpec, ...]:
    """The TensorFlow Lite file that is all in 8 bits."""
    return (spec.but(format="tflite", quantization="full_integer"),)


def refusal(spec: ExportSpec) -> str:
    """One picture at a time; and what that file is refused for."""
    from exporters.formats import tflite

    if spec.batch != 1:
        return f"batch {spec.batch}: the Edge TPU takes one picture at a time"
    return needs_data(spec) or tflite.refusal(parents(spec)[0])


def steps(spec: ExportSpec) -> tuple[Step, ...]:
    """One."""
    return (Step("compile", compiled, (MODULE,)),)


FORMAT = Format(
    id="edgetpu",
    title="Edge TPU",
    suffix=SUFFIX,
    precisions=(Precision.INT8,),
    options=frozenset({"batch", "device", "data", "split", "fraction"}),
    toolchain="litert",
    runtimes=(
        Runtime(
            "edgetpu",
            "cpu",
            (),
            BECAUSE if compiler() else MISSING,
            imports=(MODULE,),
            runs=False,
            runs_elsewhere=True,
        ),
    ),
    steps=steps,
    load=load,
    inspect=inspect,
    metadata=metadata,
    signature=signature,
    parents=parents,
    refusal=refusal,
    gone={p: "the Edge TPU computes in 8 bits alone" for p in Precision if p is not Precision.INT8},
)
