"""Engines of our ONNX file and of the peer's, built several times each from an empty timing cache, measured in turns.

`python -m suites.peer.engines THEIRS.onnx --output builds.json` on a GPU host, after which the spread between builds is
known apart from the spread between processes, and so is what our graph gains or loses by itself. Ours and theirs are
built by the same function with the same flags, one after the other in a cache that begins empty with every pair: a
layer that both have is timed once, so that its luck is no difference between them, and who goes first takes turns.
Beside them stands the artifact that the exporter keeps. INT8 is held against implicit quantization of the same graph
(ENTROPY_2, where this TensorRT has it), built once, with the kept timing cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exporters.errors import ExportgateError
from exporters.models.catalog import from_checkpoint, locate
from exporters.pool import Pool
from exporters.spec import ExportSpec, Precision, request
from suites.peer.bench import CHECKPOINT, REQUIRES

DATA = "suites.reference.photographs:crops"
ROUNDS, PROCESSES, SECONDS = 5, 3, 0.4  # of each engine: rounds in each of so many processes
IMPLICIT = "ENTROPY_CALIBRATION_2"
PAIRS = (("ours fp32", "theirs fp32", 1.03), ("ours fp16", "theirs fp16", 1.03), ("kept int8", "implicit int8", 1.0))


@dataclass(frozen=True)
class Side:
    """What is built `builds` times from one ONNX file; without one, the exporter's own artifact of the request."""

    name: str  # "ours fp16"
    spec: ExportSpec
    onnx: Path | None = None
    builds: int = 1


def main(words: list[str] | None = None) -> int:
    """Builds, measures, prints and writes; 1 where a side of ours is slower than 1.03 of the peer's (INT8: than 1)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("theirs", type=Path, help="the peer's ONNX file of the same checkpoint, FP32")
    parser.add_argument("--output", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--precision", default="fp32,fp16,int8", help="default: %(default)s")
    parser.add_argument("--builds", type=int, default=3, help="of each side, without a timing cache")
    parser.add_argument(
        "--at-once", type=int, default=1, help="builders that run at a time: beside others they choose worse kernels"
    )
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds after which a build is given up")
    asked = parser.parse_args(words)
    unknown = next((p for p in asked.precision.split(",") if p not in ("fp32", "fp16", "int8")), None)
    if unknown is not None:
        parser.error(f"--precision '{unknown}': choose among fp32, fp16, int8")
    with tempfile.TemporaryDirectory(prefix="exportgate-") as name, Pool() as pool:
        folder = Path(name)
        sides = [s for p in asked.precision.split(",") for s in _sides(pool, Precision(p), asked, folder)]
        with ThreadPoolExecutor(asked.at_once) as executor:
            made = list(executor.map(lambda chain: _built(chain, folder, asked.limit), _chains(sides)))
        engines = {name: path for chain in made for name, path in chain.items()}
        engines |= {f"{side.name} 0": str(pool.export(side.spec).path) for side in sides if not side.onnx}
        found: list[dict[str, Any]] = []
        for number in range(PROCESSES):
            order = list(engines) if number % 2 == 0 else list(reversed(engines))
            found.append(_child("measure", {"engines": {n: engines[n] for n in order}, "spec": sides[0].spec}))
    medians = {
        side.name: [
            [round(statistics.median(p["ms"][key]), 5) for p in found]
            for n in range(side.builds)
            if (key := f"{side.name} {n}") in engines
        ]
        for side in sides
    }
    result = {"machine": found[0]["machine"], "median ms by side, build and process": medians}
    result["samples ms of the last round, by engine and process"] = {
        name: [p["samples"][name] for p in found] for name in engines
    }
    result["ratios"], beyond = _ratios(medians)
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
    asked.output.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    for side, builds in medians.items():
        print(f"{side}: builds {_between(builds)}")
    print("; ".join(f"{k} {v:.3f}" for k, v in result["ratios"].items()))
    return int(beyond > 0)


def _sides(pool: Pool, precision: Precision, asked: argparse.Namespace, folder: Path) -> list[Side]:
    """Ours and what it is held against, in one precision."""
    model = replace(from_checkpoint(locate(CHECKPOINT, folder, REQUIRES), "obstacles"), imgsz=(640, 640))
    data = {"data": DATA} if precision is Precision.INT8 else {}
    spec = request(model, "engine", precision=precision, device="0", **data)
    kept = Side(f"kept {precision}", spec)
    if precision is Precision.INT8:
        return [
            Side("implicit int8", spec.but(trt_quant_algo=IMPLICIT), pool.export(request(model, "onnx")).path),
            kept,
        ]
    theirs = asked.theirs.resolve()
    if precision is Precision.FP16:  # by the converter that makes ours
        import onnx

        from exporters.graph.fp16 import to_fp16

        target = folder / "theirs-fp16.onnx"
        onnx.save(to_fp16(onnx.load(theirs), [path for path, _ in model.fp32]), target)
        theirs = target
    ours = pool.export(request(model, "onnx", precision=precision)).path
    return [
        Side(f"ours {precision}", spec, ours, asked.builds),
        Side(f"theirs {precision}", spec, theirs, asked.builds),
        kept,
    ]


def _chains(sides: list[Side]) -> list[list[tuple[Side, int]]]:
    """What is built one after the other in a cache of its own: the sides of a precision, once for each build."""
    chains: list[list[tuple[Side, int]]] = []
    for precision in dict.fromkeys(side.spec.precision for side in sides):
        built = [side for side in sides if side.onnx and side.spec.precision is precision]
        for number in range(max((side.builds for side in built), default=0)):
            pair = [(side, number) for side in built if number < side.builds]
            chains.append(pair if number % 2 == 0 else pair[::-1])
    return chains


def _built(chain: list[tuple[Side, int]], folder: Path, limit: float) -> dict[str, str]:
    """The engines of a chain by name, each built in a process of its own; one that failed is told and left out."""
    made: dict[str, str] = {}
    for side, number in chain:
        target = folder / f"{side.name.replace(' ', '-')}-{number}.engine"
        # Implicit quantization has one build, with what is known already: from nothing it takes ten minutes.
        cache = (
            {} if side.spec.trt_quant_algo else {"EXPORTGATE_CACHE": str(folder / f"{side.spec.precision}-{number}")}
        )
        begun = time.monotonic()
        _child("build", {"onnx": str(side.onnx), "spec": side.spec, "target": str(target)}, cache, limit)
        if target.is_file():
            made[f"{side.name} {number}"] = str(target)
        state = "built" if target.is_file() else "no engine"
        print(f"{side.name} {number}: {state} in {time.monotonic() - begun:.0f} s", flush=True)
    return made


def _child(
    what: str, task: dict[str, Any], environment: dict[str, str] | None = None, limit: float | None = None
) -> dict[str, Any]:
    """This module as a worker: the task by its standard input, the answer as the last line of its output."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "suites.peer.engines", f"--{what}"],
            input=json.dumps(task, default=lambda spec: spec.to_dict()),
            text=True,
            stdout=subprocess.PIPE,
            check=False,
            env={**os.environ, **(environment or {})},
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return {}
    if done.returncode and what == "measure":
        sys.exit("the engines could not be measured")
    return {} if done.returncode else json.loads(done.stdout.splitlines()[-1])


def _build(task: dict[str, Any]) -> dict[str, Any]:
    from exporters.cuda.context import enter
    from exporters.tensorrt.build import build
    from exporters.tensorrt.header import write_engine

    target = Path(task["target"])
    with tempfile.TemporaryDirectory(prefix="exportgate-") as folder:
        spec = ExportSpec.from_dict(task["spec"])
        made = build(Path(task["onnx"]), spec, enter("cuda:0"), Path(folder))
    write_engine(target.with_suffix(".part"), {"plan": made.facts}, made.plan)
    target.with_suffix(".part").rename(target)  # a builder that was killed has made none
    return {}


def _measure(task: dict[str, Any]) -> dict[str, Any]:
    """Median milliseconds of each engine in each round, all of them open in this process and measured in turns.

    Beside them the single samples of each engine's last round.
    """
    from itertools import islice

    from exporters import calibration
    from exporters.measure import MeasurementPlan, measure
    from exporters.runtimes.tensorrt import TensorRtSession
    from suites.support.machine import baseline_folder, comparable

    spec = ExportSpec.from_dict(task["spec"])
    feeds = [dict(f) for f in islice(calibration.feeds_from(DATA, spec), 2)]
    sessions = {name: TensorRtSession(Path(path), spec, "cuda:0") for name, path in task["engines"].items()}
    ms: dict[str, list[float]] = {name: [] for name in sessions}
    samples: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, session in sessions.items():
            found = measure(session, feeds, MeasurementPlan(seconds=SECONDS)).milliseconds
            ms[name].append(statistics.median(found))
            samples[name] = [round(s, 5) for s in found]
    for session in sessions.values():
        session.close()
    return {"ms": ms, "samples": samples, "machine": {"folder": baseline_folder("cuda:0"), **comparable("cuda:0", {})}}


def _between(builds: list[list[float]]) -> str:
    """Each build's median of processes, and how far builds and processes differ, as coefficients of variation."""
    each = [statistics.median(b) for b in builds]
    words = ", ".join(f"{m:.4f}" for m in each) + " ms"
    if len(each) > 1:
        within = statistics.mean(statistics.pstdev(b) / statistics.mean(b) for b in builds)
        words += (
            f"; between builds {statistics.stdev(each) / statistics.mean(each):.2%}, between processes {within:.2%}"
        )
    return words


def _ratios(medians: dict[str, list[list[float]]]) -> tuple[dict[str, float], float]:
    """Ours over theirs, medians of builds; and by how much the worst goes beyond what is allowed."""
    middle = {
        side: statistics.median(statistics.median(b) for b in builds) for side, builds in medians.items() if builds
    }
    ratios: dict[str, float] = {}
    beyond = -1.0
    for ours, theirs, allowed in PAIRS:
        if ours in middle and theirs in middle:
            ratios[f"{ours} / {theirs}"] = round(middle[ours] / middle[theirs], 4)
            beyond = max(beyond, middle[ours] / middle[theirs] - allowed)
        elif ours in medians:  # a side that could not be built is no success
            beyond = 1.0
    return ratios, beyond


if __name__ == "__main__":
    work = {"--build": _build, "--measure": _measure}.get(sys.argv[1] if len(sys.argv) == 2 else "")
    try:
        sys.exit(main() if work is None else print(json.dumps(work(json.load(sys.stdin)))))
    except ExportgateError as error:
        sys.exit(f"error: {error}")
