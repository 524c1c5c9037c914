"""A library that AOTInductor compiled: what its package says, whether this CPU can run it, and a session."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch

from exporters.artifact import Achieved, TensorInfo, main_precision
from exporters.errors import ArtifactError, NotSupported, first_line, shown
from exporters.metadata import Metadata, normalize
from exporters.runtimes.instruction_set import lacking
from exporters.runtimes.pt2_archive import AGAIN, LIBRARY, Pt2Archive
from exporters.runtimes.torch_module import TorchSession, kind_of, requested
from exporters.spec import ExportSpec

# Beside the fields of Metadata, in the package's own metadata; PyTorch adds AOTI_MACHINE, AOTI_CPU_ISA and others.
FLAGS, INPUTS = "instruction_set", "inputs"
CHECKS = "AOTI_RUNTIME_CHECK_INPUTS"
NATIVE: Any = getattr(torch._C, "_aoti", None)  # pyright: ignore[reportPrivateUsage] (the loader has no other name)


def told_by(archive: Pt2Archive) -> dict[str, str]:
    """The package's metadata.

    Raises:
        ArtifactError: there are none, or they are no mapping of text.
    """
    names = [n for n in archive.names if n.startswith(LIBRARY) and n.endswith("_metadata.json")]
    name = next((n for n in sorted(names) if n.endswith("wrapper_metadata.json")), names[0] if names else "")
    if not name:
        raise ArtifactError(f"'{archive.path}' says nothing of what it was compiled for (no *_metadata.json)", AGAIN)
    values = archive.read_json(name)
    if not all(isinstance(v, str) for v in values.values()):
        raise ArtifactError(f"'{archive.path}': '{name}' is no mapping from text to text", AGAIN)
    return values


def check_cpu(archive: Pt2Archive) -> None:
    """Raises ArtifactError where this machine cannot run the library; nothing of it was run before."""
    told = told_by(archive)
    device = told.get("AOTI_DEVICE_KEY", "")
    if device != "cpu":
        raise ArtifactError(
            f"'{archive.path}' is compiled for the device '{device}', and aotinductor runs on a CPU here",
            "export it for the CPU",
        )
    if not told.get("AOTI_MACHINE") and not told.get(FLAGS):
        raise ArtifactError(f"'{archive.path}' does not say for which CPU it was compiled", "export it on this machine")
    lacks = lacking(told.get("AOTI_MACHINE", ""), told.get("AOTI_CPU_ISA", ""), told.get(FLAGS, ""))
    if lacks:
        raise ArtifactError(f"'{archive.path}' was compiled for another CPU: {lacks}", "export it on this machine")


def open_library(path: Path) -> tuple[Pt2Archive, Any]:
    """The archive and the loaded library, by the class that torch._inductor.aoti_load_package wraps.

    That one unpacks into /tmp, where a killed process leaves it; and it compiles C++ to find out what CPU this is.

    Raises:
        ArtifactError: it is no package, damaged, for another CPU, or not loadable.
    """
    archive = Pt2Archive.open(path, "aotinductor")
    check_cpu(archive)
    with tempfile.TemporaryDirectory() as folder:  # what is loaded stays mapped
        library = [f for f in archive.extract(Path(folder)) if f.suffix == ".so"]
        wrapper = next((f for f in library if ".wrapper." in f.name), library[0] if library else None)
        if wrapper is None:
            raise ArtifactError(f"'{path}' holds no compiled library (.so)", AGAIN)
        if NATIVE is None:
            raise NotSupported(f"PyTorch {torch.__version__} cannot load what AOTInductor compiled")
        _check_whole(path, wrapper)
        try:
            return archive, NATIVE.AOTIModelContainerRunnerCpu(str(wrapper), 1)
        except (RuntimeError, ValueError, AttributeError) as error:
            told = first_line(error).replace(folder, "")
            raise ArtifactError(f"'{path}': its library cannot be loaded ({told})", AGAIN) from None


def _check_whole(path: Path, library: Path) -> None:
    """Raises ArtifactError where a library was cut off: the process that loads such a one dies of SIGBUS."""
    data = library.read_bytes()
    if data[:5] != b"\x7fELF\x02" or len(data) < 64:  # of 64 bits; other systems have libraries of their own
        return
    (sections,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    if sections + size * count > len(data):
        what = f"its library {library.name} has {len(data)} bytes of at least {sections + size * count}"
        raise ArtifactError(f"'{path}' was cut off: {what}", AGAIN)


class LibrarySession(TorchSession):
    """A loaded library. It checks shapes and types itself; names of inputs are those of the package's metadata."""

    runtime = "aotinductor"

    def __init__(self, path: Path, spec: ExportSpec, device: str) -> None:
        os.environ[CHECKS] = "1"  # of this worker: without it the library reads what lies behind the feeds
        self.path = path
        self.archive, self.runner = open_library(path)
        self.inputs = _inputs(self.archive) or requested(spec)
        self.call = lambda *given: self.runner.run(list(given))
        try:
            self.begin(spec, device, [o.name for o in spec.model.outputs])
        except RuntimeError as error:
            wanted = ", ".join(f"{i.name} {i.dtype} {list(i.shape)}" for i in self.inputs)
            raise ArtifactError(
                f"'{path}' does not run on {wanted} ({first_line(error)})",
                "ask for the batch and image size that it was compiled for",
            ) from None

    def metadata(self) -> Metadata:
        told = told_by(self.archive)
        if "names" not in told:
            raise ArtifactError(f"'{self.path}' holds no metadata of the model", AGAIN)
        return normalize(told, str(self.path))

    def close(self) -> None:
        super().close()
        del self.runner


def _inputs(archive: Pt2Archive) -> tuple[TensorInfo, ...]:
    """Names, shapes and types as the exported program had them; none where another exporter made the package."""
    text = told_by(archive).get(INPUTS)
    if text is None:
        return ()
    try:
        found = tuple(TensorInfo(str(n), tuple(int(d) for d in shape), str(t)) for n, shape, t in json.loads(text))
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ArtifactError(
            f"'{archive.path}': its list of inputs cannot be read ({first_line(error)})", AGAIN
        ) from None
    for info in found:
        sizes = [d for d in info.shape if isinstance(d, int)]
        if not isinstance(getattr(torch, info.dtype, None), torch.dtype) or min(sizes, default=1) < 1:
            what = f"input '{shown(info.name)}' of type {shown(info.dtype)} and shape {shown(sizes)}"
            raise ArtifactError(f"'{archive.path}' says that it takes an {what}, which cannot be", AGAIN)
    return found


def read_precision(path: Path) -> Achieved:
    """The types of the constants that the loaded library holds: weights of two or more axes."""
    _, runner = open_library(path)
    constants = cast("dict[str, torch.Tensor]", runner.extract_constants_map(False))
    named = cast("dict[str, str]", runner.get_constant_names_to_original_fqns())
    kinds = {
        named.get(name, name).removeprefix("inner."): kind_of(tensor.dtype)
        for name, tensor in constants.items()
        if tensor.is_floating_point() and tensor.ndim >= 2
    }
    counts = Counter(kinds.values())
    main = main_precision(counts)
    others = tuple(sorted(name for name, kind in kinds.items() if kind != main))
    return Achieved(main, {f"weights {k}": n for k, n in counts.items()}, others)
