"""TensorFlow.js' wasm backend in Node.js and in headless Chromium: a session whose process computes in FP32."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median

from exporters.artifact import TensorInfo
from exporters.errors import ArtifactError
from exporters.layout import Layout
from exporters.metadata import SIDE_CAR, Metadata, normalize, read_yaml
from exporters.session import Array, Execution, Feeds, Session
from exporters.spec import ExportSpec
from exporters.tfjs import places, read
from exporters.tfjs.child import Child, ScriptError, told
from exporters.tfjs.chromium import Chromium
from exporters.tfjs.node import Node

FED = ("float32", "int32", "bool")  # types of inputs that TensorFlow.js has


class TfjsSession(Session):
    """A folder with a model.json in `runtime`, "node" or "chromium".

    `named` is whether its tensors must have names of ours: others' may have any. `modules` is the folder node_modules.
    """

    def __init__(self, path: Path, spec: ExportSpec, runtime: str, *, named: bool, modules: Path | None = None) -> None:
        self.file, self.stride = read.read(path), spec.model.stride
        self.folder = self.file.folder
        alien = next((i for i in self.file.inputs if i.dtype not in FED), None)
        if alien is not None:
            raise ArtifactError(
                f"'{self.folder}': input '{alien.name}' is of type {alien.dtype}",
                f"TensorFlow.js takes {', '.join(FED)}",
            )
        # What the file calls a tensor, by what the session does.
        self.fed = _names(self.file.inputs, [i.name for i in spec.model.inputs], named=named)
        self.given = _names(self.file.outputs, [o.name for o in spec.model.outputs], named=named)
        shapes = {i.name: i.shape for i in self.file.inputs}
        order = [shapes[self.fed[i.name]] for i in spec.model.inputs if i.name in self.fed]
        self.layout = Layout.of(self._said(), spec.model, order, f"'{self.folder}'")
        self.inputs, self.outputs = (
            tuple(TensorInfo(n, self.layout.shape(t.shape), t.dtype) for n, t in zip(names, tensors, strict=True))
            for names, tensors in ((self.fed, self.file.inputs), (self.given, self.file.outputs))
        )
        self.moving: deque[float] = deque(maxlen=64)  # milliseconds of inferences that were not JavaScript's
        modules = modules or places.node_modules()
        self.child: Child = (
            Node(modules, self.folder / read.MODEL)
            if runtime == "node"
            else Chromium(modules, self.folder, self.file.names)
        )
        try:
            self.child.call({"op": "load"})
        except ScriptError as error:
            self.child.close()
            raise told(error, self.folder, "loaded") from None
        except BaseException:
            self.child.close()
            raise

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        begun = time.perf_counter()
        header = {"op": "run", "inputs": list(self.fed.values()), "outputs": list(self.given.values())}
        try:
            answer, arrays = self.child.call(header, [self.layout.feed(feeds[name]) for name in self.fed])
        except ScriptError as error:
            raise told(error, self.folder, "run") from None
        made = {name: self.layout.output(name, array) for name, array in zip(self.given, arrays, strict=True)}
        self.moving.append(1e3 * (time.perf_counter() - begun) - float(answer["ms"]))
        return made

    def show(self, image: Array, names: Sequence[str], conf: float, iou: float, title: str) -> tuple[Array, bytes]:
        """Runs a detector on one picture and shows it on the page with what is detected; in Chromium alone.

        Args:
            image: (1, 3, H, W) of values from 0 to 1.

        Returns:
            (N, 6) left, top, right, bottom in pixels, score, class, after suppression; and the picture as PNG.
        """
        header = {"op": "show", "inputs": list(self.fed.values()), "outputs": list(self.given.values())[:1]}
        header |= {"names": list(names), "conf": conf, "iou": iou, "title": title}
        try:
            _, (boxes, picture) = self.child.call(header, [self.layout.feed(image)])
        except ScriptError as error:
            raise told(error, self.folder, "shown") from None
        return boxes, picture.tobytes()

    def execution(self) -> Execution:
        facts = self.child.facts
        notes = [f"wasm backend {'with' if facts['simd'] else 'without'} SIMD in {facts['host']}"]
        if self.moving:
            notes.append(f"{median(self.moving):.1f} ms of an inference move arrays between the processes")
        return Execution(
            "tfjs",
            str(facts["version"]),
            "cpu",
            f"fp{facts['bits']}",
            threads=int(facts["threads"]),
            notes=tuple(notes),
        )

    def _said(self) -> Metadata:
        """What the file says of itself, nothing where that cannot be read."""
        if self.file.metadata is not None:
            with suppress(ArtifactError):
                return normalize(self.file.metadata, str(self.folder))
        with suppress(ArtifactError):
            return read_yaml(self.folder / SIDE_CAR)
        return Metadata()

    def metadata(self) -> Metadata:
        return read_metadata(self.file)

    def close(self) -> None:
        self.child.close()


def _names(tensors: Sequence[TensorInfo], ours: Sequence[str], *, named: bool) -> dict[str, str]:
    """The file's names by those of the session: of somebody else's file, which has none of ours, the place counts."""
    theirs = [t.name for t in tensors]
    by_place = not named and len(theirs) == len(ours) and not set(theirs) & set(ours)
    return dict(zip(ours if by_place else theirs, theirs, strict=True))


def read_metadata(file: read.TfjsFile) -> Metadata:
    """Metadata of metadata.yaml, which userDefinedMetadata repeats.

    Raises:
        ArtifactError: one cannot be read, or they differ.
    """
    found = read_yaml(file.folder / SIDE_CAR)
    if file.metadata is None:  # of others
        return found
    inside = normalize(file.metadata, f"'{file.folder / read.MODEL}'").values()
    # One has what the other lacks, or another value.
    differs = next(
        (k for k, v in found.values().items() if inside.get(k) != v),
        next(iter(inside.keys() - found.values().keys()), ""),
    )
    if differs:
        raise ArtifactError(
            f"'{file.folder}': {differs} in userDefinedMetadata of {read.MODEL} is not that of {SIDE_CAR}",
            "export it again",
        )
    return found
