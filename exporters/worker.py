"""The process that exports, runs and measures, with its toolchain's interpreter: `python -m exporters.worker`.

It reads one JSON object a line from its standard input and answers with one on what was its standard output; anything
that a library prints goes to the log. Arrays travel as .npy files, memory-mapped on both sides, never as pickles.
"""

from __future__ import annotations

import errno
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from exporters import formats
from exporters.arrays import load, save
from exporters.artifact import Artifact
from exporters.errors import ArtifactError, ExportgateError
from exporters.formats import Job
from exporters.measure import MeasurementPlan, measure
from exporters.metadata import Metadata
from exporters.session import Session
from exporters.spec import ExportSpec

Json = dict[str, Any]


class Server:
    """Holds sessions and answers calls. `--in-process` uses one directly, without a child process."""

    def __init__(self) -> None:
        self.sessions: dict[int, Session] = {}
        self.count = 0

    def answer(self, call: Json) -> Json:
        """The result of one call; every exception becomes an error object. The one place that catches them all."""
        try:
            operation = {
                "export": self.export,
                "state": self.state,
                "samples": self.samples,
                "open": self.open,
                "build": self.open,
                "run": self.run,
                "measure": self.measure,
                "describe": self.describe,
                "inspect": self.inspect,
                "weights": self.weights,
                "parameters": self.parameters,
                "damaged": self.damaged,
                "rounded": self.rounded,
                "excite": self.excite,
                "inside": self.inside,
                "sensitivity": self.sensitivity,
                "reached": self.reached,
                "close": self.close,
            }[call["op"]]
            return {"result": operation(call)}
        except ExportgateError as error:
            told = {"type": type(error).__name__, "what": error.what, "fix": error.fix}
            # Where another error is behind it (a library's, the user's model's) its traceback is worth keeping.
            return {"error": told | ({"trace": traceback.format_exc()} if error.__cause__ else {})}
        except Exception as error:  # noqa: BLE001 (the worker's boundary)
            line = " ".join(str(error).split())[:600]
            if isinstance(error, MemoryError):
                return {"error": {"type": "BadRequest", "what": line, "fix": "ask for a smaller batch or image size"}}
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                fix = "make room, or set EXPORTGATE_CACHE to a folder with room"
                return {"error": {"type": "BadRequest", "what": f"the cache cannot be written ({line})", "fix": fix}}
            told = {"type": "", "what": f"{type(error).__name__}: {line}", "fix": ""}
            return {"error": told | {"trace": traceback.format_exc()}}

    def export(self, call: Json) -> Json:
        spec = ExportSpec.from_dict(call["spec"])
        entry = formats.get(spec.format)
        parents = tuple(Artifact.from_dict(p) for p in call["parents"])
        folder = Path(call["folder"])
        steps, number = entry.steps(spec), int(call["step"])
        start = time.perf_counter()
        collecting = gc.isenabled()
        gc.disable()  # a trace makes many objects that all live until its end
        try:
            made = steps[number].run(Job(spec, folder, parents, Metadata.of(spec)))
        finally:
            if collecting:
                gc.enable()
        seconds = time.perf_counter() - start
        last = number == len(steps) - 1
        return {
            "primary": made.primary,
            "notes": list(made.notes),
            "seconds": seconds,
            "achieved": asdict(entry.inspect(folder / made.primary)) if last else None,
        }

    def sensitivity(self, call: Json) -> Json:
        """How much each module of an ONNX file suffers from the request's 8 bits."""
        from exporters.graph.sensitivity import sensitivity

        spec = ExportSpec.from_dict(call["spec"])
        return sensitivity(Artifact.from_dict(call["parent"]).path, Path(call["folder"]), spec)

    def reached(self, call: Json) -> Json:
        """The calibrated range of each tensor that is quantized, and what these feeds reach of it."""
        from exporters.graph.sensitivity import reach

        feeds = [{k: np.array(v) for k, v in load(f).items()} for f in call["feeds"]]
        parent = Artifact.from_dict(call["parent"]).path
        return reach(parent, Path(call["folder"]), ExportSpec.from_dict(call["spec"]), feeds)

    def state(self, call: Json) -> Json:
        """Digest of the module that a factory makes."""
        from exporters.models.build import state_digest

        return {"digest": state_digest(ExportSpec.from_dict(call["spec"]).model)}

    def samples(self, call: Json) -> Json:
        """Digest of the first feeds that a calibration set's factory yields."""
        from exporters.calibration import first_digest

        return {"digest": first_digest(ExportSpec.from_dict(call["spec"]))}

    def open(self, call: Json) -> Json:
        spec = ExportSpec.from_dict(call["spec"])
        artifact = Artifact.from_dict(call["artifact"])
        entry = formats.get(spec.format)
        start = time.perf_counter()
        session = entry.load(artifact, spec, entry.runtime(call["runtime"], call["device"]), call["device"])
        self.count += 1
        self.sessions[self.count] = session
        return {
            "session": self.count,
            "inputs": [asdict(i) for i in session.inputs],
            "stride": session.stride,
            "outputs": [asdict(o) for o in session.outputs],
            "seconds": time.perf_counter() - start,
        }

    def run(self, call: Json) -> Json:
        return save(self.sessions[call["session"]].run(load(call["feeds"])), Path(call["folder"]))

    def measure(self, call: Json) -> Json:
        # Copies, so that the page cache of a mapped file is not part of what is timed.
        feeds = [{k: np.array(v) for k, v in load(f).items()} for f in call["feeds"]]
        return asdict(measure(self.sessions[call["session"]], feeds, MeasurementPlan(**call["plan"])))

    def describe(self, call: Json) -> Json:
        session = self.sessions[call["session"]]
        return {"execution": asdict(session.execution()), **self._facts(call, session.metadata)}

    def inspect(self, call: Json) -> Json:
        """What the files of an artifact say that nothing here can run."""
        path, entry = Path(call["path"]), formats.get(call["format"])
        facts = self._facts(call, lambda: entry.metadata(path))
        if entry.signature is not None:
            try:
                told = entry.signature(path, ExportSpec.from_dict(call["spec"]))
                facts["signature"] = [[asdict(t) for t in tensors] for tensors in told]
            except ArtifactError as error:
                facts["signature_error"] = str(error)
        return facts

    def weights(self, call: Json) -> Json:
        """The weights that are in a file, and how far each may be from what it was made of."""
        read = formats.get(call["format"]).weights
        assert read is not None
        found, folder = read(Path(call["path"])), Path(call["folder"])
        return {
            "values": save({k: w.values for k, w in found.items()}, folder / "values"),
            "step": save({k: w.step for k, w in found.items()}, folder / "step"),
            "rounding": save({k: w.rounding for k, w in found.items()}, folder / "rounding"),
            "table": save({k: w.table for k, w in found.items() if w.table is not None}, folder / "table"),
        }

    def parameters(self, call: Json) -> Json:
        """The reference's parameters as exporters fold them."""
        from exporters.models.reference import Reference

        session = self.sessions[call["session"]]
        assert isinstance(session, Reference)
        found, folder = session.parameters(), Path(call["folder"])
        values, slack = save(found.values, folder / "values"), save(found.slack, folder / "slack")
        told = {"used": found.used, "others": found.others, "counts": dict(found.counts)}
        return {"values": values, "slack": slack} | told

    def _facts(self, call: Json, read: Callable[[], Metadata]) -> Json:
        entry = formats.get(call["format"])
        metadata, wrong = None, ""
        if entry.keeps_metadata:
            try:
                metadata = read().values()
            except ArtifactError as error:  # told beside the rest, which can be judged all the same
                wrong = str(error)
        achieved = asdict(entry.inspect(Path(call["path"])))
        return {"metadata": metadata, "metadata_error": wrong, "achieved": achieved}

    def damaged(self, call: Json) -> Json:
        from exporters.models.reference import Damage, Reference

        session = self.sessions[call["session"]]
        assert isinstance(session, Reference)
        if "damage" not in call:
            return {"layers": session.layers()}
        return save(session.run_damaged(load(call["feeds"]), Damage(**call["damage"])), Path(call["folder"]))

    def rounded(self, call: Json) -> Json:
        from exporters.models.reference import Reference

        session = self.sessions[call["session"]]
        assert isinstance(session, Reference)
        made = session.run_rounded(load(call["feeds"]), call["bits"], call["seed"], call["terms"])
        return save(made, Path(call["folder"]))

    def inside(self, call: Json) -> Json:
        session = self.sessions[call["session"]]
        if "modules" not in call:
            return {"modules": session.modules()}
        return save(session.run_inside(load(call["feeds"]), call["modules"], call["row"]), Path(call["folder"]))

    def excite(self, call: Json) -> Json:
        from exporters.models.reference import Reference

        session = self.sessions[call["session"]]
        assert isinstance(session, Reference)
        return save(session.excite(load(call["feeds"]), call["steps"], call["floor"]), Path(call["folder"]))

    def close(self, call: Json) -> Json:
        session = self.sessions.pop(call["session"], None)
        if session is not None:
            session.close()
            del session
            gc.collect()
        return {}


def _follow(parent: int) -> None:
    """Ends this process and its children when who started it is gone, even killed: a call may take minutes more."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Serves calls until standard input ends. Arguments: modules to import before the first call."""
    if os.name != "nt" and os.getpgrp() == os.getpid():
        threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    # Libraries print; what they print must not get between the answers, so they get the log's descriptor.
    channel: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if os.name != "nt":  # functions of shared libraries are bound when first called: 4 % of torch's import time
        sys.setdlopenflags(os.RTLD_LAZY)
    gc.disable()  # importing torch makes many objects and no garbage: 5 % of its import time
    importlib.import_module("exporters.formats").registry()
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()  # and what was imported never becomes garbage, so later collections need not walk it
    gc.enable()
    server = Server()
    for line in sys.stdin:
        call = json.loads(line)
        answer = server.answer(call)
        if "trace" in answer.get("error", {}):
            print(answer["error"]["trace"], file=sys.stderr, flush=True)
        answer["id"] = call["id"]
        channel.write(json.dumps(answer) + "\n")
        channel.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
