"""The bench of the comparison: one environment, one checkpoint, folders empty each time, a process for each side."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from exporters.models.catalog import locate

CHECKPOINT = "package:railway_obstacle_detector/best.pt"
REQUIRES = "smartrail-obstacle-detector==0.1.1"
DROPPED = ("PYTEST_", "COV_", "YOLO_", "EXPORTGATE_", "PYTHONDONTWRITE", "PYTHONPYCACHE")
LONGEST = 600.0  # seconds that one command may take


class Bench:
    """Where the comparison runs. `root` is a temporary folder; each command gets a folder of its own in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.count = 0
        self.checkpoint = locate(CHECKPOINT, root, REQUIRES)
        # A plain process: nothing of pytest's, of a coverage run or of the user's settings. Bytecode is written, by the
        # run of each side that does not count: without it both sides mostly compile torch's source.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(DROPPED)}
        # The peer never installs or downloads.
        self.environment = {
            **kept,
            "YOLO_OFFLINE": "1",
            "YOLO_AUTOINSTALL": "false",
            "YOLO_VERBOSE": "false",
            "YOLO_CONFIG_DIR": str(self.folder("yolo")),
            "EXPORTGATE_CACHE": str(root / "cache"),
        }

    def folder(self, name: str) -> Path:
        """A new, empty folder."""
        self.count += 1
        made = self.root / f"{self.count:03}-{name}"
        made.mkdir(parents=True)
        return made

    def copy(self, folder: Path) -> Path:
        """The checkpoint in a folder, since the peer writes beside it."""
        return Path(shutil.copy(self.checkpoint, folder / self.checkpoint.name))

    def command(
        self, words: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
    ) -> tuple[float, subprocess.CompletedProcess[str]]:
        """Runs a console script that lies beside this interpreter; (seconds of the whole process, what it said)."""
        script = shutil.which(words[0], path=str(Path(sys.executable).parent))
        if script is None:
            pytest.fail(f"command '{words[0]}' is not beside {sys.executable}: install its package here")
        start = time.perf_counter()
        done = subprocess.run(
            [script, *words[1:]],
            cwd=folder,
            env={**self.environment, **(environment or {})},
            text=True,
            capture_output=True,
            timeout=LONGEST,
            check=False,
        )
        return time.perf_counter() - start, done

    @contextmanager
    def side(self, role: str) -> Iterator[Side]:
        """A process of `sides.py` in this role."""
        made = Side(role, self.folder(role), self.environment)
        try:
            yield made
        finally:
            made.close()


class Side:
    """A process of `sides.py`: `call` asks it and waits."""

    def __init__(self, role: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.role, self.log = role, folder / "log.txt"
        with self.log.open("wb") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("sides.py")), role],
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                encoding="utf-8",
            )

    def call(self, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps(arguments, default=str) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = self.log.read_text(errors="replace").strip().splitlines()
            pytest.fail(f"side {self.role} died: {said[-1] if said else 'it said nothing'}")
        return json.loads(line)

    def close(self) -> None:
        for child in psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []:
            child.kill()
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()
