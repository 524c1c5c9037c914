"""What a baseline holds beside latency: metric, size, time to load, memory. Accepted once, then injured."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
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
from suites.performance.test_latency import test_p50_within_baseline as latency
from suites.performance.test_latency import test_size_load_and_memory_within_baseline as size_claim
from suites.selftest.conftest import Workshop, judged
from suites.selftest.test_broken_accuracy import SWAPPED
from suites.support.baseline import GATED, Accuracy, accept, baseline_path, read_baseline
from suites.support.bench import Bench
from suites.support.config import Latency
from suites.support.machine import baseline_folder
from suites.support.verdict import Verdict

CASE = "blobs onnx fp32"
Damage = Callable[[Path, Workshop], None]


class Replay:
    """Takes the place of pytest-benchmark's fixture, which holds one measurement a test."""

    disabled = False

    def pedantic(self, *_: Any, **__: Any) -> None:
        """Nothing is printed."""


@pytest.fixture(scope="module")
def accepted(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """A workshop whose project has a folder of baselines of its own, and measures fast."""
    own = workshop.run.project
    quick = Latency(delta=0.5, processes=2, seconds=0.1)
    workshop.run.project = replace(own, baselines=tmp_path_factory.mktemp("baselines"), latency={"cpu": quick})
    yield workshop
    workshop.run.project = own


def _measured(workshop: Workshop, damage: Damage | None = None) -> tuple[Verdict, str]:
    """What the claim on sizes says right after a measurement of the case, damaged or good."""

    def claim(case: Bench) -> None:
        case.run.figures.pop(case.case.id, None)
        judged(lambda one: latency(one, Replay()), case)
        size_claim(case)

    return workshop.judge(CASE, claim, damage)


@pytest.fixture
def baseline(accepted: Workshop) -> Workshop:
    """The good artifact's figures and metric, accepted as `exportgate baseline accept` does."""
    bench = accepted.bench(CASE)
    path = baseline_path(accepted.run.project.baselines, baseline_folder("cpu"), bench.case.id)
    try:
        if not path.is_file():
            judged(lambda one: latency(one, Replay()), bench)
            conditions = bench.evidence["measurement"]["conditions"]
            quiet = events.Measurement(((1.0, 1.0), (1.01, 1.01)), None, conditions=conditions)
            judged(against_labels, bench)
            metric = bench.evidence["accuracy"]
            held = Accuracy(
                metric["metric"],
                metric["artifact"][metric["metric"]],
                metric["reference"][metric["metric"]],
                metric["pictures"],
            )
            accept(
                accepted.run.project.baselines,
                baseline_folder("cpu"),
                bench.case.id,
                quiet,
                "first",
                held,
            )
    finally:
        bench.close()
    return accepted


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
    assert _measured(baseline) == (Verdict.PASS, "")
    assert baseline.judge(CASE, metric_claim)[0] is Verdict.PASS


@pytest.mark.parametrize(("damage", "word"), [(larger, "artifact MiB"), (hungry, "peak memory MiB")])
def test_what_has_grown_is_caught(baseline: Workshop, damage: Damage, word: str) -> None:
    verdict, because = _measured(baseline, damage)
    assert verdict is Verdict.FAIL and word in because, because


SLOW = """
# Put on a worker's path by a test: a session takes 0.3 s more to make.
import sys
import threading
import time


def _slow():
    while not hasattr(sys.modules.get("onnxruntime"), "InferenceSession"):
        time.sleep(0.001)
    module = sys.modules["onnxruntime"]
    own = module.InferenceSession

    def made(*args, **kwargs):
        time.sleep(0.3)
        return own(*args, **kwargs)

    module.InferenceSession = made


threading.Thread(target=_slow, daemon=True).start()
"""


def test_what_takes_longer_to_load_is_caught(
    baseline: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    verdict, because = _measured(baseline)
    assert verdict is Verdict.FAIL and "load ms" in because, because


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


def test_without_a_baseline_nothing_is_said(accepted: Workshop) -> None:
    own = accepted.run.project
    accepted.run.project = replace(own, baselines=own.baselines / "none")
    try:
        assert _measured(accepted)[0] is Verdict.NO_BASELINE
        assert accepted.judge(CASE, metric_claim)[0] is Verdict.NO_BASELINE
    finally:
        accepted.run.project = own


@pytest.mark.parametrize(("name", "now", "grown"), [("load ms", 60.0, False), ("load ms", 200.0, True)])
def test_small_figures_have_room(name: str, now: float, grown: bool) -> None:
    """Milliseconds of a small file are not judged by their ratio."""
    assert bool(GATED[name].grown(name, 20.0, now)) is grown
