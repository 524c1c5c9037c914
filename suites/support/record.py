"""The run record: append-only JSON lines (reports/schema.json), written by the controlling process only."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from exporters.artifact import Artifact
from exporters.errors import BadRequest
from exporters.version import __version__
from suites.support.bench import Bench
from suites.support.machine import fingerprint

VERSIONS = (
    "torch",
    "torchvision",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxslim",
    "pytest",
    "pytest-benchmark",
    "hypothesis",
)


def now() -> str:
    """UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def run_id() -> str:
    """Start and a random tail: 20261122-170501-ab12cd."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


class Record:
    """Makes `folder` and `folder`/record.jsonl, to which it appends events; a record is of one run alone.

    Raises:
        BadRequest: the folder or the file cannot be written, or holds a run already.
    """

    def __init__(self, folder: Path, head: Mapping[str, Any]) -> None:
        self.folder = folder
        self.path = folder / "record.jsonl"
        self._add("x", "run", schema=1, **head)  # made here or not at all: another run may have begun meanwhile

    def write(self, event: str, **values: Any) -> None:
        """One line, flushed, so that a killed run loses at most the line being written."""
        self._add("a", event, **values)

    def _add(self, mode: str, event: str, **values: Any) -> None:
        values = {"event": event, "time": now(), **values}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(json.dumps(values, ensure_ascii=False, default=str) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if isinstance(error, FileExistsError) and self.folder.is_dir():  # a file in the folder's place is another
                raise BadRequest(
                    f"--report '{self.folder}' holds a run already", "give another folder, or delete that one"
                ) from None
            raise BadRequest(
                f"the run record {self.path} cannot be written ({error.strerror})",
                "make room, or give another folder with --report",
            ) from None


def run_head(
    identity: str, command: list[str], project: Path | None, release: bool, must_pass: list[str]
) -> dict[str, Any]:
    """The first line's fields."""
    versions: dict[str, str] = {}
    for package in VERSIONS:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "run": identity,
        "command": command,
        "exportgate": __version__,
        "project": str(project) if project else None,
        "release": release,
        "must_pass": must_pass,
        "machine": fingerprint(),
        "versions": versions,
    }


def case_event(bench: Bench) -> dict[str, Any]:
    """A case and how its artifact came about."""
    case, spec = bench.case, bench.spec
    options = {k: v for k, v in spec.to_dict().items() if k not in ("model", "format", "precision", "device")}
    hops: list[dict[str, Any]] = []
    if bench.made is not None:
        hops = [_hop(name, artifact, artifact.key in bench.run.pool.fresh) for name, _, artifact in bench.hops()]
    return {
        "case": case.id,
        "model": spec.model.name,
        "format": spec.format,
        "precision": spec.precision.value,
        "runtime": case.runtime.id,
        "device": case.device,
        "spec": options,
        "hops": hops,
        "artifact": str(bench.made.root) if bench.made else None,
    }


def _hop(name: str, artifact: Artifact, fresh: bool) -> dict[str, Any]:
    achieved = artifact.achieved
    parts = [f"{n} {k}" for k, n in achieved.counts.items()]
    return {
        "name": name,
        "format": artifact.format,
        "precision": str(artifact.spec.get("precision", achieved.precision)),
        "seconds": round(artifact.seconds, 3),
        "cached": not fresh,
        "digest": artifact.key,
        "files": [{"path": f.path, "bytes": f.bytes, "sha256": f.sha256} for f in artifact.files],
        "toolchain": {"name": artifact.toolchain["name"], "packages": artifact.toolchain["packages"]}
        if artifact.toolchain
        else None,
        "achieved": {
            "summary": (f"{achieved.precision}: " if achieved.precision else "") + ", ".join([*parts, *artifact.notes]),
            "counts": dict(achieved.counts),
        },
    }
