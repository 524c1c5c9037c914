"""A process that runs JavaScript and answers frames: arrays behind a header in JSON, as js/inference.js has them."""

from __future__ import annotations

import json
import math
import os
import queue
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np

from exporters.arrays import Array
from exporters.errors import ArtifactError, WorkerCrash, WorkerTimeout

Json = dict[str, Any]
DTYPES = {"float32": "<f4", "int32": "<i4", "bool": "?", "uint8": "u1"}
STARTING = 60.0  # seconds until a process has to say that its backend runs
ENDING = 5.0  # seconds that it has to end
# Of a process that leaves nothing behind but in its folder.
VARIABLES = {"HOME": "home", "XDG_CONFIG_HOME": "config", "XDG_CACHE_HOME": "cache", "TMPDIR": "tmp"}


class ScriptError(Exception):
    """What JavaScript raised, in its own words."""


def pack(header: Json, arrays: Sequence[Array] = ()) -> list[bytes | memoryview]:
    """The parts of a frame: length of the header (4 bytes, little-endian), header, the bytes of each array."""
    kept = [np.ascontiguousarray(a) for a in arrays]
    described = [{"shape": list(a.shape), "dtype": str(a.dtype)} for a in kept]
    text = json.dumps({**header, "arrays": described}).encode()
    return [struct.pack("<I", len(text)) + text, *(a.reshape(-1).view(np.uint8).data for a in kept if a.size)]


def unpack(frame: bytes) -> tuple[Json, list[Array]]:
    """Header and arrays of a frame.

    Raises:
        ValueError: it is none.
    """
    try:
        at = 4 + struct.unpack_from("<I", frame)[0]
        header: Any = json.loads(frame[4:at])
        arrays: list[Array] = []
        for told in header["arrays"]:
            shape, dtype = [int(n) for n in told["shape"]], np.dtype(DTYPES[told["dtype"]])
            count = math.prod(shape)
            arrays.append(np.frombuffer(frame, dtype, count, at).reshape(shape) if count else np.zeros(shape, dtype))
            at += count * dtype.itemsize
        if at != len(frame):
            raise ValueError("its length is not what its header says")
        return cast("Json", header), arrays
    except (struct.error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{len(frame)} bytes that are no frame ({error})") from None


class Place:
    """A process in a folder of its own, where it leaves what it leaves.

    Args:
        before: done before the process is ended.
        options: of subprocess.Popen.
    """

    def __init__(
        self,
        words: Sequence[str],
        before: Callable[[], None] = lambda: None,
        folder: Path | None = None,
        **options: Any,
    ) -> None:
        self.folder, self.before = folder or new_folder(), before
        try:
            for name in VARIABLES.values():
                (self.folder / name).mkdir(exist_ok=True)
            # A path from its folder for what is temporary: sockets lie there, whose paths have 107 letters at most.
            variables = {**{k: str(self.folder / v) for k, v in VARIABLES.items()}, "TMPDIR": VARIABLES["TMPDIR"]}
            with (self.folder / "log").open("wb") as log:
                self.process = subprocess.Popen(
                    words, stderr=log, env={**os.environ, **variables}, cwd=self.folder, **options
                )
        except OSError as error:
            before()
            shutil.rmtree(self.folder, ignore_errors=True)
            raise WorkerCrash(f"'{words[0]}' cannot be started ({error.strerror or error})") from None

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    def cause(self) -> str:
        """What the process died of, and the last words that it said."""
        code = self.process.poll()
        cause = f"exit code {code}"
        if code is not None and code < 0:
            with suppress(ValueError):
                cause = f"signal {signal.Signals(-code).name}"
        return cause + self.last_words()

    def last_words(self) -> str:
        """The last line of its log, in brackets; Chromium complains of what a server lacks."""
        lines: list[str] = []
        with suppress(OSError):
            lines = (self.folder / "log").read_text(errors="replace").splitlines()
        lines = [x.strip() for x in lines if x.strip() and "dbus" not in x and "crashpad" not in x]
        # Node.js writes its version below a traceback, whose line with the error is what is to be told.
        told = next((x for x in reversed(lines) if "Error" in x), lines[-1] if lines else "")
        return f" ({told[:300]})" if told else ""

    def end(self) -> None:
        """Ends the process, at first kindly so that it waits for processes of its own, and removes the folder."""
        with suppress(OSError, ValueError):
            self.before()
        if self.runs:
            self.process.terminate()
            try:
                self.process.wait(ENDING)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError, ValueError):
                if pipe:
                    pipe.close()
        for _ in range(20):  # processes of a process that was killed may write until they notice
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                break
            time.sleep(0.1)


def new_folder() -> Path:
    """A temporary folder, in the run's, which is removed even if this process is killed."""
    return Path(tempfile.mkdtemp(prefix="exportgate-tfjs-"))


class Child(ABC):
    """A process that answers frames. It is ended when this is closed, and when this process ends.

    Attributes:
        title: what it is called in messages.
        facts: what it said of itself when its backend was started.
        ended: what ended it, or "".
    """

    title: str
    facts: Json

    def __init__(self, place: Place, answers: queue.Queue[bytes | str]) -> None:
        """Waits until the process says that its backend runs.

        Args:
            answers: where its frames come, or why there will be none.

        Raises:
            WorkerCrash, WorkerTimeout: it does not.
        """
        self.place, self.answers, self.ended = place, answers, ""
        self._end = weakref.finalize(self, place.end)  # also when the interpreter ends
        try:
            self.facts, _ = self._receive("start", STARTING)
        except ScriptError as error:
            self.close()
            raise WorkerCrash(f"TensorFlow.js does not start in {self.title} ({line(error)})") from None

    @abstractmethod
    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Gives the process a frame; what becomes of it is seen when an answer is waited for."""

    def call(self, header: Json, arrays: Sequence[Array] = ()) -> tuple[Json, list[Array]]:
        """The answer to a frame. How long it may take is for the worker's limits to say.

        Raises:
            ScriptError: JavaScript raised something.
            WorkerCrash: the process is gone.
        """
        if self.ended:
            raise WorkerCrash(self.ended)
        self.send(pack(header, arrays))
        return self._receive(str(header["op"]), math.inf)

    def _receive(self, operation: str, seconds: float) -> tuple[Json, list[Array]]:
        deadline = time.monotonic() + seconds
        while True:
            try:
                got = self.answers.get(timeout=0.5)
            except queue.Empty:
                got = b""
            if not got and not self.place.runs:
                got = self.place.cause()
            if isinstance(got, str):
                self.ended = f"{self.title} died during {operation}: {got}"
                self.close()
                raise WorkerCrash(self.ended)
            if not got and time.monotonic() > deadline:
                self.ended = (
                    f"{self.title} did not {operation} within {seconds:g} s{self.place.last_words()}, and was stopped"
                )
                self.close()
                raise WorkerTimeout(self.ended)
            if got:
                break
        try:
            answer, arrays = unpack(got)
        except ValueError as error:
            self.ended = f"{self.title} answered {operation} with {error}"
            self.close()
            raise WorkerCrash(self.ended) from None
        if "error" in answer:
            raise ScriptError(answer["error"])
        return answer, arrays

    def close(self) -> None:
        """Ends the process and removes its folder."""
        self.ended = self.ended or f"{self.title} is closed"
        self._end()


def line(error: ScriptError) -> str:
    """Its text in one line."""
    return " ".join(str(error).split())[:300] or "without a word"


def told(error: ScriptError, path: Path, what: str) -> ArtifactError:
    """The error that a file is, on which JavaScript raised something."""
    return ArtifactError(f"'{path}' cannot be {what} by TensorFlow.js ({line(error)})", "export it again")
