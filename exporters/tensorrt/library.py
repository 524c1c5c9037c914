"""Which TensorRT is here, and what it can do: asked of the module, never concluded from its version."""

from __future__ import annotations

import importlib
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from exporters.errors import ToolchainMissing

MODULES = {"TensorRT": ("tensorrt",), "TensorRT-RTX": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
MOST = 2000  # lines of a log
SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")


@dataclass
class Log:
    """Lines of TensorRT's logger, each with the severity's name; `verbose` keeps INFO and VERBOSE, too."""

    lines: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    verbose: bool = False

    def add(self, severity: str, text: str) -> None:
        if self.verbose or SEVERITIES.index(severity) <= SEVERITIES.index("WARNING"):
            self.lines.append((severity, text))
            if not self.verbose and len(self.lines) > MOST:  # outside a recording nobody empties it
                del self.lines[: MOST // 2]

    def errors(self) -> list[str]:
        """Texts of the errors, without the source positions that TensorRT puts in front."""
        return [clean(text) for severity, text in self.lines if severity.endswith("ERROR")]

    def text(self) -> str:
        return "".join(f"[{severity}] {text}\n" for severity, text in self.lines)


def clean(text: str) -> str:
    """A line of the builder without its source position, internal name and condition."""
    text = re.sub(r"^(Error Code )?\[?\w*\.(cpp|h)::[^\]:]*(::\d+)?\]?:?\s*", "", " ".join(text.split()))
    return re.sub(r"^(IBuilder|ICudaEngine|IRuntime|INetworkDefinition)?::?\w*: ", "", text)


@dataclass(frozen=True)
class Library:
    """A TensorRT module. `name` is TensorRT or TensorRT-RTX; `log` is the one logger that stays in force."""

    module: Any
    name: str
    logger: Any
    log: Log

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def is_rtx(self) -> bool:
        return self.name == "TensorRT-RTX"

    def flag(self, name: str) -> Any:
        """A BuilderFlag, or None where this version does not have it."""
        return getattr(self.module.BuilderFlag, name, None)

    @property
    def has_weak_typing(self) -> bool:
        """Whether the builder may choose precisions by flags (8.6 to 10.x): what implicit quantization needs."""
        return self.flag("INT8") is not None

    @property
    def strongly_typed(self) -> int:
        """Network creation flags that make the graph's types binding; 0 where no such flag is (8.6)."""
        flag = getattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return 0 if flag is None else 1 << int(flag)

    @property
    def explicit_batch(self) -> int:
        """The flag that 8.6 needs and later versions ignore or lack."""
        flag = getattr(self.module.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
        return 0 if flag is None else 1 << int(flag)

    @contextmanager
    def recording(self, verbose: bool = False) -> Generator[Log]:
        """The log of what happens within, from its first line."""
        self.log.lines.clear()
        self.log.verbose = verbose
        try:
            yield self.log
        finally:
            self.log.verbose = False


@cache
def library(on_cpu: bool = False) -> Library:
    """TensorRT, or TensorRT-RTX where that is installed; `on_cpu` asks for the latter, which alone builds there.

    Raises:
        ToolchainMissing: neither can be imported; says why in the importer's own words.
    """
    wanted = [n for n in MODULES if not on_cpu or n == "TensorRT-RTX"]
    said: list[str] = []
    for name in wanted:
        for module_name in MODULES[name]:
            try:
                module: Any = importlib.import_module(module_name)
            except (ImportError, OSError, RuntimeError) as error:  # a library that cannot be loaded, too
                said.append(f"{module_name}: {error}")
                continue
            if hasattr(module, "Builder"):  # stubs for type checking have the same name
                return _library(module, name)
            said.append(f"{module_name}: no Builder in it")
    raise ToolchainMissing(
        f"{' and '.join(wanted)} cannot be imported ({'; '.join(said)})",
        "install exportgate[rtx]" if on_cpu else "install exportgate[tensorrt]",
    )


def _library(module: Any, name: str) -> Library:
    log = Log()

    class Logger(module.ILogger):  # the first logger that is registered stays in force for the process
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            log.add(str(severity).rpartition(".")[2].split(":")[0], msg)

    return Library(module, name, Logger(), log)


@cache
def builder(on_cpu: bool = False) -> Any:
    """The one builder of this process: making one loads 1.4 GB of kernels, 6 to 8 s.

    Raises:
        ToolchainMissing: there is no GPU that it could build for.
    """
    found = library(on_cpu)
    with found.recording() as log:
        try:
            made = found.module.Builder(found.logger)
        except TypeError:  # what the bindings make of a null pointer
            made = None
    if made is None:
        raise ToolchainMissing(
            f"{found.name} {found.version} has no builder here ({'; '.join(log.errors()[:1]) or 'no words'})",
            "run it on a machine with an NVIDIA GPU and driver",
        )
    return made


@cache
def runtime() -> Any:
    """The one runtime of this process."""
    found = library()
    return found.module.Runtime(found.logger)
