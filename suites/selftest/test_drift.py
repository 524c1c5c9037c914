"""What a baseline holds beside latency: metric, size, time to load, memory. Accepted once, then injured."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from reports import events
from suites.accuracy.pictures import shown_to
from suites.accuracy.test_accuracy import test_accuracy_against_labels as against_labels
from suites.accuracy.test_accuracy import test_accuracy_within_baseline as metric_claim
from suites.performance import measuring as how
from suites.performance.test_latency import test_p50_within_baseline as latency
from suites.performance.test_latency import test_size_load_and_memory_within_baseline as size_claim
from suites.selftest.conftest import Workshop, judged
from suites.selftest.test_broken_accuracy import SWAPPED
from suites.support.acceptance import propose, write
from suites.support.baseline import GATED, read_baseline
from suites.support.bench import Bench
from suites.support.config import Latency, Project
from suites.support.machine import baseline_folder
from suites.support.verdict import Verdict

CASE = "blobs onnx fp32"
Damage = Callable[[Path, Workshop], None]


class Replay:
    """Takes the place of pytest-benchmark's fixture, which holds one measurement a test."""

    disabled = False

    def pedantic(self, *_: Any, **__: Any) -> None:
        """Nothing is printed."""


def measuring(workshop: Workshop, folder: Path) -> Project:
    """Gives the workshop's project a folder of baselines of its own, and fast measurements; returns the one before."""
    own = workshop.run.project
    quick = Latency(delta=0.5, processes=2, seconds=0.1)
    workshop.run.project = replace(own, baselines=folder, latency={"cpu": quick})
    return own


def accept_good(workshop: Workshop) -> Path:
    """Accepts the good artifact's measurement and metric, as `exportgate baseline accept` does; the baseline's path."""
    bench = workshop.bench(CASE)
    try:
        judged(lambda one: latency(one, Replay()), bench)
        measurement = bench.evidence["measurement"]
        medians = [float(np.median(p)) for p in measurement["processes"]]
        # As of a quiet machine: two processes that agree.
        processes = tuple((x, x) for x in (float(np.median(medians)), 1.01 * float(np.median(medians))))
        made = events.Measurement(processes, None, conditions=measurement["conditions"])
        judged(against_labels, bench)
        metric = events.Accuracy(**bench.evidence["accuracy"])
        folder, machine = workshop.run.project.baselines, baseline_folder("cpu")
        accepted = propose(folder, machine, bench.case.id, made, "first", metric)
        write([accepted])
        return accepted.now.path
    finally:
        bench.close()


def speed(workshop: Workshop, damage: Damage | None = None) -> tuple[Verdict, str]:
    """What the claim on latency says of the case, damaged or good."""
    return workshop.judge(CASE, lambda case: latency(case, Replay()), damage)


def sizes(workshop: Workshop, damage: Damage | None = None) -> tuple[Verdict, str]:
    """What the claim on size, load time and memory says of the case, damaged or good."""

    def claim(case: Bench) -> None:
        case.run.figures.pop(case.case.id, None)  # those of another file
        size_claim(case)

    return workshop.judge(CASE, claim, damage)


@pytest.fixture(scope="module")
def baseline(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """A workshop in which the good artifact's baseline was accepted."""
    own = measuring(workshop, tmp_path_factory.mktemp("baselines"))
    accept_good(workshop)
    yield workshop
    workshop.run.project = own


def larger(path: Path, workshop: Workshop) -> None:
    """A twentieth more, and more than 10 KiB, that no node reads."""
    model = onnx.load(path)
    size = max(path.stat().st_size // 10, 20_000)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(size // 4, np.float32), "left_over"))
    onnx.save(model, path)


def hungry(path: Path, workshop: Workshop) -> None:
    """A tensor of 256 MiB that depends on the input, and changes nothing."""
    model = onnx.load(path)
    graph, entry, last = model.graph, model.graph.input[0].name, model.graph.output[0].name
    for node in graph.node:
        node.output[:] = [f"{o}_before" if o == last else o for o in node.output]
    constants = {"first": [0], "wide": [1 << 26], "none": [-1]}
    graph.initializer.extend(numpy_helper.from_array(np.array(v, np.int64), k) for k, v in constants.items())
    graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "nothing"))
    graph.node.extend(
        [
            helper.make_node("Reshape", [entry, "none"], ["flat"]),
            helper.make_node("Gather", ["flat", "first"], ["pixel"]),
            helper.make_node("Expand", ["pixel", "wide"], ["many"]),
            helper.make_node("ReduceMax", ["many"], ["largest"], keepdims=0),
            helper.make_node("Mul", ["largest", "nothing"], ["zero"]),
            helper.make_node("Add", [f"{last}_before", "zero"], [last]),
        ]
    )
    assert graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    onnx.save(model, path)


def test_what_was_accepted_is_within_its_baseline(baseline: Workshop) -> None:
    path = next(baseline.run.project.baselines.glob("*/*.json"))
    stored = read_baseline(path)
    assert stored is not None and stored.accuracy is not None
    assert set(stored.figures) == {"artifact MiB", "load ms", "peak memory MiB"}
    assert sizes(baseline) == (Verdict.PASS, "")
    assert baseline.judge(CASE, metric_claim)[0] is Verdict.PASS


def test_what_has_become_slower_is_caught(baseline: Workshop) -> None:
    verdict, because = speed(baseline, hungry)
    assert verdict is Verdict.FAIL and "slower than the baseline" in because, because


@pytest.mark.parametrize(("longest", "rounds"), [(60.0, 5), (0.0, 1)])
def test_a_case_is_measured_for_a_minute_at_most(
    baseline: Workshop, longest: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stays between pass and fail ends as INCONCLUSIVE after five rounds, or when there is no time for another."""
    path = next(baseline.run.project.baselines.glob("*/*.json"))
    kept = path.read_text(encoding="utf-8")
    stored = json.loads(kept)
    middle = stored["p50"]
    monkeypatch.setattr(how, "LONGEST", longest)
    try:
        path.write_text(json.dumps(stored | {"milliseconds": [[middle * 0.1] * 2, [middle * 10.0] * 2]}))
        verdict, because = speed(baseline)
    finally:
        path.write_text(kept, encoding="utf-8")
    assert verdict is Verdict.INCONCLUSIVE and f"after {2 * rounds} processes in " in because, because


@pytest.mark.parametrize(("damage", "word"), [(larger, "artifact MiB"), (hungry, "peak memory MiB")])
def test_what_has_grown_is_caught(baseline: Workshop, damage: Damage, word: str) -> None:
    verdict, because = sizes(baseline, damage)
    assert verdict is Verdict.FAIL and word in because, because


# What a worker finds on its path: a runtime whose sessions take a second more to make, or compute nothing in the end.
RUNTIME = """
import sys
import threading
import time


def _change():
    while not hasattr(sys.modules.get("onnxruntime"), "InferenceSession"):
        time.sleep(0.001)
    module = sys.modules["onnxruntime"]

    class Session(module.InferenceSession):
{body}

    module.InferenceSession = Session


threading.Thread(target=_change, daemon=True).start()
"""
SLOW = """        def __init__(self, *args, **kwargs):
            time.sleep(1.0)
            super().__init__(*args, **kwargs)"""
LAZY = """        def run(self, *args, **kwargs):
            self.calls = getattr(self, "calls", 0) + 1
            found = super().run(*args, **kwargs) if self.calls < 20 else self.kept
            self.kept = found if self.calls < 20 else [f * 0 for f in found]
            return found"""


@contextmanager
def in_workers(folder: Path, body: str) -> Generator[None]:
    """Within it, workers that start have such a runtime."""
    (folder / "sitecustomize.py").write_text(RUNTIME.format(body=body))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        yield


def test_what_takes_longer_to_load_is_caught(baseline: Workshop, tmp_path: Path) -> None:
    with in_workers(tmp_path, SLOW):
        verdict, because = sizes(baseline)
    assert verdict is Verdict.FAIL and "load ms" in because, because


def test_what_no_longer_computes_is_not_fast(baseline: Workshop, tmp_path: Path) -> None:
    with in_workers(tmp_path, LAZY):
        verdict, because = speed(baseline)
    assert verdict is Verdict.ERROR and "changed" in because, because


def test_a_metric_that_fell_is_caught_and_other_pictures_are_not_compared(baseline: Workshop) -> None:
    verdict, because = baseline.judge(CASE, metric_claim, SWAPPED)
    assert verdict is Verdict.FAIL and "mAP50-95" in because and "(PyTorch: " in because, because
    path = next(baseline.run.project.baselines.glob("*/*.json"))
    kept, bench = path.read_text(encoding="utf-8"), baseline.bench(CASE)
    try:
        path.write_text(kept.replace(shown_to(bench).digest, "0" * 64), encoding="utf-8")
        verdict, because = baseline.judge(CASE, metric_claim)
    finally:
        path.write_text(kept, encoding="utf-8")
        bench.close()
    assert verdict is Verdict.NOT_COMPARABLE and because.endswith("was taken on other pictures"), because


def test_without_a_baseline_nothing_is_said(baseline: Workshop) -> None:
    own = baseline.run.project
    baseline.run.project = replace(own, baselines=own.baselines / "none")
    try:
        assert sizes(baseline)[0] is Verdict.NO_BASELINE
        assert baseline.judge(CASE, metric_claim)[0] is Verdict.NO_BASELINE
    finally:
        baseline.run.project = own


@pytest.mark.parametrize(("name", "now", "grown"), [("load ms", 60.0, False), ("load ms", 200.0, True)])
def test_small_figures_have_room(name: str, now: float, grown: bool) -> None:
    """Milliseconds of a small file are not judged by their ratio."""
    assert bool(GATED[name].grown(name, 20.0, now)) is grown
