"""Toolchains: which environment a format needs, whether it is there, and how it is made.

A toolchain is an extra of exportgate and a lock file beside this module. The default is the interpreter that
exportgate runs in, where it has the extra's packages; otherwise the environment that `exportgate toolchain sync NAME`
made. Only that command installs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from exporters.errors import BadRequest, ExportgateError, ToolchainMissing

LOCKS = Path(__file__).parent / "locks"


@dataclass(frozen=True)
class Toolchain:
    """An extra: its name, the distributions that it must have, and the tox environment that brings it.

    `pytorch` is what exportgate itself needs. `npm` is the folder in locks/ of what npm installs beside them, for
    formats that JavaScript runs.
    """

    name: str
    packages: tuple[str, ...]
    tox: str = "formats"
    npm: str = ""

    @property
    def lock(self) -> Path:
        return LOCKS / f"{self.name}.txt"


# Distributions by toolchain; a selftest holds them against the extras of pyproject.toml. onnxruntime and
# onnxruntime-gpu exclude each other, so either one counts for the other; TensorRT's bindings come under the names of
# the CUDA that they were built with, and TensorRT-RTX does where TensorRT is not.
TOOLCHAINS: Mapping[str, Toolchain] = {
    t.name: t
    for t in (
        Toolchain("pytorch", ("torch", "numpy", "safetensors"), "cpu"),
        Toolchain("onnx", ("onnx", "onnxruntime", "onnxscript", "onnxslim"), "cpu"),
        Toolchain("tensorrt", ("onnx", "onnxruntime", "tensorrt", "pycuda", "nvidia-ml-py"), "trt"),
        Toolchain("openvino", ("openvino", "nncf")),
        Toolchain("mnn", ("mnn",)),
        Toolchain("ncnn", ("ncnn", "pnnx")),
        Toolchain("executorch", ("executorch", "torchao", "torch")),
        Toolchain("coreml", ("coremltools", "scikit-learn", "numpy", "torch")),
        Toolchain("litert", ("litert-torch", "ai-edge-litert", "ai-edge-quantizer", "torch")),
        Toolchain(
            "tensorflow",
            (
                *("tensorflow-cpu", "onnx2tf", "onnx", "tensorflowjs", "tf-keras", "ai-edge-litert", "psutil"),
                *("sng4onnx", "onnx-graphsurgeon"),
            ),
            npm="tfjs",
        ),
        Toolchain("paddle", ("paddlepaddle", "x2paddle", "six", "requests", "torch")),
        Toolchain("rtx", ("onnx", "onnxruntime", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs"), "rtx"),
    )
}
RTX = ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings", "tensorrt-rtx")
EITHER: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime-gpu",),
    "tensorflow-cpu": ("tensorflow",),
    "tensorrt": ("tensorrt-cu13-bindings", "tensorrt-cu12-bindings", "tensorrt-bindings", *RTX),
    "tensorrt-rtx-cu13-bindings": RTX[1:],
    "tensorrt-rtx-cu13-libs": ("tensorrt-rtx-cu12-libs", "tensorrt-rtx"),
}


@dataclass(frozen=True)
class Environment:
    """A toolchain that is there: the interpreter, and the versions of its packages."""

    toolchain: Toolchain
    python: Path
    packages: Mapping[str, str]


def cache_root() -> Path:
    """Where artifacts and toolchains are kept: $EXPORTGATE_CACHE, else the user's cache folder."""
    given = os.environ.get("EXPORTGATE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        if given:
            return Path(given).expanduser().resolve()
        return (Path(base) if base else Path.home() / ".cache") / "exportgate"
    except RuntimeError:
        raise BadRequest(
            "no home folder is known, so there is no place for the cache", "set EXPORTGATE_CACHE to a folder"
        ) from None


def known(name: str) -> Toolchain:
    """The toolchain with this name."""
    if name not in TOOLCHAINS:
        from exporters import formats

        own = next((f.toolchain for f in formats.registry().values() if name in (f.id, *f.aliases)), "")
        fix = f"format '{name}' is made with '{own}'" if own else "toolchains: " + ", ".join(TOOLCHAINS)
        raise BadRequest(f"toolchain '{name}' is not known", fix)
    return TOOLCHAINS[name]


@cache
def resolve(name: str) -> Environment:
    """The environment for a toolchain: this interpreter if it has the packages, else the synced one.

    Raises:
        ToolchainMissing: neither has them; says which package is missing and what brings it.
    """
    toolchain = known(name)
    missing = _missing(toolchain, _version_here)
    if not missing:
        return Environment(toolchain, Path(sys.executable), _versions(toolchain, _version_here))
    python = environment_python(name)
    if python.is_file():
        installed = _versions_of(python, [*toolchain.packages, *(n for names in EITHER.values() for n in names)])
        absent = _missing(toolchain, installed.get)
        if not absent:
            return Environment(toolchain, python, _versions(toolchain, installed.get))
        missing = absent
    raise ToolchainMissing(
        f"toolchain {name}: package {missing[0]} is not installed",
        f"run 'exportgate toolchain sync {name}', or install exportgate[{name}]; tox -e {toolchain.tox} has it",
    )


@cache
def resolve_in(name: str, folder: Path) -> Environment:
    """The environment in this folder, which somebody made, for a toolchain.

    Raises:
        ToolchainMissing: it has no interpreter, or lacks a package.
    """
    toolchain, python = known(name), python_of(folder)
    if not python.is_file():
        raise ToolchainMissing(f"'{folder}' is no environment: it has no {python.name}", "make one with uv venv")
    installed = _versions_of(python, [*toolchain.packages, *(n for names in EITHER.values() for n in names)])
    missing = _missing(toolchain, installed.get)
    if missing:
        raise ToolchainMissing(
            f"environment '{folder}' lacks {missing[0]}, which toolchain {name} needs",
            f"install what {toolchain.lock.name} names into it",
        )
    return Environment(toolchain, python, _versions(toolchain, installed.get))


def environment_python(name: str) -> Path:
    """Interpreter of the environment that `sync` makes."""
    return python_of(cache_root() / "toolchains" / name)


def python_of(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _missing(toolchain: Toolchain, version: Callable[[str], str | None]) -> list[str]:
    return [p for p in toolchain.packages if not any(version(n) for n in (p, *EITHER.get(p, ())))]


def _versions(toolchain: Toolchain, version: Callable[[str], str | None]) -> dict[str, str]:
    found: dict[str, str] = {}
    for package in toolchain.packages:
        name = next((n for n in (package, *EITHER.get(package, ())) if version(n)), package)
        found[name] = version(name) or ""
    return found


def _version_here(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions_of(python: Path, packages: list[str]) -> dict[str, str]:
    """Versions of distributions in another interpreter's environment."""
    code = (
        "import json,sys\nfrom importlib import metadata as m\nfound={}\nfor p in sys.argv[1:]:\n"
        " try: found[p]=m.version(p)\n except m.PackageNotFoundError: pass\nprint(json.dumps(found))"
    )
    try:
        done = subprocess.run(
            [str(python), "-c", code, *packages], capture_output=True, text=True, timeout=60, check=True
        )
        return json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}  # an environment that does not run has no packages


def sync(name: str, tell: Callable[[str], None] = lambda line: None) -> Path:
    """Makes (or repairs) a toolchain's environment from its lock, with uv and, for JavaScript, npm. Needs a network.

    Where npm is not on the PATH it tells so, and the Python part stands.

    Returns:
        The environment's interpreter.

    Raises:
        ExportgateError: uv is missing, or it or npm failed (the message has its last line), or the cache is full.
    """
    toolchain = known(name)
    uv = shutil.which("uv") or _uv_beside_python()
    if uv is None:
        raise ExportgateError("toolchain sync needs uv, which is not on the PATH", "pip install uv")
    folder = cache_root() / "toolchains" / name
    temporary, aside = folder.with_name(f".{name}-{os.getpid()}"), folder.with_name(f".{name}-{os.getpid()}.old")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    root = Path(__file__).parent.parent
    steps = [
        [uv, "venv", "--quiet", "--relocatable", "--python", sys.executable, str(temporary)],
        [uv, "pip", "install", "--quiet", "--no-deps", "--python", str(temporary), "-r", str(toolchain.lock)],
    ]
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, check=False, cwd=root)
            if done.returncode:
                line = (done.stderr.strip().splitlines() or ["no output"])[-1]
                raise ExportgateError(
                    f"toolchain {name} for Python {version}: uv failed: {line}",
                    f"what it installs is in {toolchain.lock}",
                )
        if toolchain.npm:
            _install_packages(LOCKS / toolchain.npm, temporary, tell)
        if folder.exists():
            folder.replace(aside)
        temporary.replace(folder)
    except OSError as error:
        raise ExportgateError(
            f"toolchain {name}: {folder} cannot be written ({error.strerror or error})",
            "make room, or set EXPORTGATE_CACHE to a folder of yours",
        ) from None
    finally:
        with suppress(OSError):
            if aside.exists() and not folder.exists():
                aside.replace(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
    resolve.cache_clear()
    return environment_python(name)


def _install_packages(lock: Path, folder: Path, tell: Callable[[str], None]) -> None:
    """Installs what a package-lock.json says into `folder`/node_modules; no script of a package is run."""
    npm = shutil.which("npm")
    if npm is None:
        tell(
            f"npm is not on the PATH, so what runs {lock.name} is left out: apt-get install nodejs npm, and sync again"
        )
        return
    for name in ("package.json", "package-lock.json"):
        shutil.copy(lock / name, folder / name)
    words = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        lines = [x for x in map(str.strip, done.stderr.splitlines()) if x] or ["no output"]
        told = next((x for x in lines if x.startswith(("npm error", "npm ERR!"))), lines[-1])
        raise ExportgateError(f"npm failed: {told}", f"what it installs is in {lock / 'package-lock.json'}")


def _uv_beside_python() -> str | None:
    """uv installed in this interpreter's environment, which need not be on the PATH."""
    beside = Path(sys.executable).with_name("uv")
    return str(beside) if beside.is_file() else None
