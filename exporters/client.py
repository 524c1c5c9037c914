"""The other end of a worker: starts it, calls it within time and memory limits, replaces it after a crash."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters import errors
from exporters.errors import ExportError, ExportgateError, WorkerCrash, WorkerTimeout

Json = dict[str, Any]
PACKAGE = Path(__file__).parent
ENDING = 5.0  # seconds from the end of a worker's pipe to its own, which may have a GPU to let go of
# Imports exportgate's package from its own folder without adding that folder's neighbours (another environment's
# site-packages) to the import path. Not isolated (-I): PYTHONPATH may carry TensorRT. -P: no surprises from the folder.
# numpy first, with one thread for its OpenBLAS: starting one for each core is half of its import time, and nothing here
# multiplies matrices with numpy. What is imported later (torch on ARM has an OpenBLAS too) sees the user's setting.
BOOTSTRAP = """import importlib.util as u, os, sys
v = "OPENBLAS_NUM_THREADS"
given = os.environ.get(v)
os.environ.setdefault(v, "1")
import numpy
if given is None:
    del os.environ[v]
s = u.spec_from_file_location("exporters", sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]])
m = sys.modules["exporters"] = u.module_from_spec(s)
s.loader.exec_module(m)
del sys.argv[1]
from exporters.worker import main
sys.exit(main())"""


@dataclass(frozen=True)
class Limits:
    """Seconds a call may take, by operation, and GiB of resident memory a worker may hold (sampled).

    `run` is of one inference; what runs the reference again and again (`excite`) has the time of an export, and so has
    the opening of what its runtime builds then (`build`).
    """

    export: float = 900.0
    open: float = 180.0
    run: float = 180.0
    measure: float = 180.0
    memory: float = 16.0

    def key(self, operation: str) -> str:
        """Which limit holds for an operation."""
        named = {
            "export": "export",
            "excite": "export",
            "build": "export",
            "sensitivity": "export",
            "reached": "export",
            "open": "open",
            "measure": "measure",
        }
        return named.get(operation, "run")

    def seconds(self, operation: str) -> float:
        return float(getattr(self, self.key(operation)))


class Caller(ABC):
    """Something that answers a worker's calls."""

    @abstractmethod
    def call(self, operation: str, **arguments: Any) -> Json:
        """The result of one call.

        Raises:
            WorkerCrash, WorkerTimeout: the worker died or was killed.
            ExportgateError: what the worker raised.
        """

    @property
    def alive(self) -> bool:
        return True

    def kill(self) -> None:
        """Begins to end the worker, without waiting."""

    def close(self) -> None:
        """Ends the worker."""


class InProcess(Caller):
    """Calls answered in this process, for a debugger: a crash takes the run with it."""

    def __init__(self) -> None:
        from exporters.worker import Server  # with numpy, which a process that only starts workers does not need

        self.server = Server()

    def call(self, operation: str, **arguments: Any) -> Json:
        # Through JSON, as a worker would get it.
        answer = json.loads(json.dumps(self.server.answer({"op": operation, **arguments})))
        if "error" in answer:
            raise error_from(answer["error"])
        return answer["result"]


class Worker(Caller):
    """A child process. Its log is a file; its answers come through a pipe that nothing else writes to."""

    def __init__(
        self,
        name: str,
        python: Path,
        imports: Sequence[str],
        log: Path,
        limits: Limits,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.log, self.limits = name, log, limits
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                [str(python), "-P", "-c", BOOTSTRAP, str(PACKAGE), *imports],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                encoding="utf-8",
                errors="replace",  # what is no UTF-8 is no answer either, and is told as such
                cwd=log.parent,
                env={**os.environ, **(variables or {})},
                start_new_session=os.name != "nt",
            )
        self.answers: queue.Queue[str] = queue.Queue()
        self.count = 0
        self.turn = threading.Lock()  # a worker does one thing at a time: calls of several threads take turns
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        """Moves lines from the pipe to the queue; "" stands for its end."""
        assert self.process.stdout
        with suppress(ValueError, OSError):
            for line in self.process.stdout:
                self.answers.put(line)
        self.answers.put("")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def call(self, operation: str, **arguments: Any) -> Json:
        with self.turn:
            self.count += 1
            try:
                assert self.process.stdin
                self.process.stdin.write(json.dumps({"op": operation, "id": self.count, **arguments}) + "\n")
                self.process.stdin.flush()
            except (BrokenPipeError, OSError, ValueError):
                raise self._crashed(operation) from None
            try:
                return self._wait(operation, self.limits.seconds(operation))
            except KeyboardInterrupt:  # it would go on with this call, and who closes its sessions would wait for it
                self.close()
                raise

    def _wait(self, operation: str, seconds: float) -> Json:
        deadline = time.monotonic() + seconds
        dead = False
        while True:
            with suppress(queue.Empty):
                line = self.answers.get(timeout=0.2)
                if not line:
                    raise self._crashed(operation)
                answer = _answer(line, self.count)
                if answer is None:
                    self.close()
                    raise WorkerCrash(
                        f"worker {self.name} answered {operation} with {line[:80]!r}, which is no answer",
                        f"its log is {self.log}",
                    )
                if "error" in answer:
                    raise error_from(answer["error"], self.log)
                return answer["result"]
            if not self.alive:  # a child of it may still hold the pipe open; what it wrote last may be on its way
                if dead:
                    raise self._crashed(operation)
                dead = True
            self._check_memory(operation)
            if time.monotonic() > deadline:
                self.close()
                raise WorkerTimeout(
                    f"worker {self.name}: {operation} took longer than {seconds:g} s and was stopped",
                    f"its log is {self.log}; raise {self.limits.key(operation)} in [limits] of exportgate.toml if that "
                    "is too short",
                )

    def _check_memory(self, operation: str) -> None:
        """Sampled, since a limit on address space (RLIMIT_AS) breaks CUDA. What it started (a compiler) counts."""
        import psutil

        with suppress(psutil.Error):
            worker = psutil.Process(self.process.pid)
            used = worker.memory_info().rss
            for child in worker.children(recursive=True):
                with suppress(psutil.Error):  # ended meanwhile
                    used += child.memory_info().rss
            if used > self.limits.memory * 2**30:
                self.close()
                raise WorkerCrash(
                    f"worker {self.name}: {operation} held {used / 2**30:.1f} GiB, more than its limit of "
                    f"{self.limits.memory:g} GiB, and was stopped",
                    "raise [limits] memory in exportgate.toml",
                )

    def _crashed(self, operation: str) -> WorkerCrash:
        """What a worker died of whose pipe has ended; one that lives on without it is stopped."""
        try:
            code = self.process.wait(ENDING)
        except subprocess.TimeoutExpired:
            self.close()
            return WorkerCrash(
                f"worker {self.name} closed its pipe during {operation}, went on and was stopped",
                f"its log is {self.log}",
            )
        cause = f"exit code {code}"
        if code < 0:
            with suppress(ValueError):
                cause = f"signal {signal.Signals(-code).name}"
        last: list[str] = []
        with suppress(OSError):
            last = self.log.read_text(errors="replace").strip().splitlines()
        if last:
            cause += f", last line of its log: {last[-1][:200]}"
        fix = f"its log is {self.log}" if last else "it wrote no log; was it killed, or out of memory?"
        return WorkerCrash(f"worker {self.name} died during {operation}: {cause}", fix)

    def kill(self) -> None:
        """Kills the process and its children; a session that it held is gone."""
        if not self.alive:
            return
        if os.name != "nt":  # it leads a session of its own, so its children are in its group
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            return
        import psutil

        with suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    child.kill()
        self.process.kill()

    def close(self) -> None:
        """Kills the process and waits for its end."""
        self.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError, ValueError):
                if pipe:
                    pipe.close()


def _answer(line: str, number: int) -> Json | None:
    """What a worker wrote, if it is the answer to the call of this number: a result, or an error in our words."""
    try:
        answer: Any = json.loads(line)
        failed = "error" in answer
        body = answer["error" if failed else "result"]
        told = not failed or all(isinstance(body[word], str) for word in ("type", "what", "fix"))
        return answer if answer["id"] == number and isinstance(body, dict) and told else None
    except (ValueError, RecursionError, KeyError, TypeError):
        return None


def error_from(data: Mapping[str, Any], log: Path | None = None) -> ExportgateError:
    """The exception that a worker's error object stands for; an error that is not ours becomes an ExportError."""
    kind = getattr(errors, data["type"], None) if data["type"] else None
    fix = data["fix"]
    if "trace" in data and log is not None:
        fix += ("; " if fix else "") + f"the traceback is in {log}"
    if isinstance(kind, type) and issubclass(kind, ExportgateError):
        return kind(data["what"], fix)
    return ExportError(data["what"], fix)


def environment_note(packages: Mapping[str, str]) -> str:
    """ "torch 2.13.0, numpy 2.4.6" """
    return ", ".join(f"{k} {v}" for k, v in packages.items())
