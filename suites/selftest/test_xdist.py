"""With pytest-xdist: everything in several processes, latency afterwards in one alone, one record of both."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import reports
from reports.events import Measurement
from suites import plugin
from suites.selftest.conftest import ROOT, command_line
from suites.selftest.sabotage_runs import MODULE, PROJECT
from suites.support.acceptance import propose, write
from suites.support.verdict import Verdict

pytest.importorskip("xdist", reason="pytest-xdist is not installed")
LATENCY = {
    "test_p50_within_baseline",
    "test_size_load_and_memory_within_baseline",
    "test_faster_than_the_next_precision",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with one case."""
    place = tmp_path_factory.mktemp("several")
    (place / "small_model.py").write_text(MODULE, encoding="utf-8")
    (place / "exportgate.toml").write_text(PROJECT, encoding="utf-8")
    return place


def test_latency_is_judged_afterwards_and_alone(folder: Path) -> None:
    words = ("qualify", "--report", "out", "--", "-n", "2", "--junitxml", "pytest.xml", "--benchmark-json=times.json")
    done = command_line(folder, *words)
    assert done.returncode == 0, done.stdout[-2000:]
    assert done.stdout.splitlines()[-1].startswith("QUALIFIED: 0 of 35 claims failed"), done.stdout[-2000:]
    assert "automatically disabled" not in done.stdout + done.stderr
    # Files that pytest was asked for: what the processes judged, and what the one alone measured.
    assert (folder / "pytest.xml").read_text(encoding="utf-8").count("<testcase") == 35 - len(LATENCY)
    assert len(json.loads((folder / "times.json").read_text(encoding="utf-8"))["benchmarks"]) == 1
    run = reports.read_record(folder / "out")
    claims = [c.claim for c in run.claims]
    assert len(claims) == len(set(claims)) == 35 and set(claims) >= LATENCY
    assert set(claims[-len(LATENCY) :]) == LATENCY, "they come last"
    assert not (folder / "out" / "latency").exists()
    before = (folder / "out" / "record.jsonl").read_bytes()
    done = command_line(folder, "qualify", "--report", "out", "--", "-n", "2")
    assert done.returncode == 4 and "holds a run already" in done.stderr, done.stdout + done.stderr
    assert (folder / "out" / "record.jsonl").read_bytes() == before

    # A baseline that nothing meets: the run fails, and says by what.
    latency = next(c for c in run.claims if c.measurement)
    assert latency.measurement is not None
    made = Measurement(((1e-4, 1e-4), (1e-4, 1e-4)), None, conditions=latency.measurement.conditions)
    machine = str(latency.measurement.conditions["machine"])
    write([propose(folder / "baselines", machine, latency.case, made, "nothing is so fast")])
    done = command_line(folder, "qualify", "--report", "late", "--", "-n", "2", "-m", "latency")
    assert done.returncode == 1 and "slower than the baseline" in done.stdout, done.stdout[-2000:]
    assert "NOT QUALIFIED: 1 of 3 claims failed" in done.stdout


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_an_interrupted_measurement_leaves_a_whole_report(folder: Path, by: signal.Signals) -> None:
    """Ctrl-C goes to all processes of the command, SIGTERM to the first; what was measured before is in the report."""
    out = folder / by.name
    words = ("qualify", "--format", "pytorch,torchscript,onnx", "--replicates", "9", "--report", str(out))
    process = subprocess.Popen(
        [sys.executable, "-m", "suites.cli", *words, "--", "-n", "2", "-m", "latency"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (no thread runs here)
    )
    record = out / "latency" / "record.jsonl"
    deadline = time.monotonic() + 200
    while not (record.exists() and '"claim"' in record.read_text(encoding="utf-8")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if by is signal.SIGINT:
        os.killpg(process.pid, by)
    else:
        process.send_signal(by)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in text, text
    assert text.splitlines()[-1].startswith("INTERRUPTED: "), text
    run = reports.read_record(out)
    assert run.end and run.end.exit == 2
    assert 0 < len(run.claims) < 9 and any(c.measurement for c in run.claims)
    assert {p.name for p in out.iterdir()} == {"record.jsonl", *(f"report.{e}" for e in ("html", "md", "xml", "json"))}


def test_a_line_that_its_process_did_not_finish_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that did not end when it was told to, and was killed while it wrote."""
    claim = json.dumps({"event": "claim", "case": "a", "claim": "test_a", "verdict": "PASS"})
    told: list[str] = []

    class Child:
        def __init__(self, *given: object, **settings: object) -> None:
            (tmp_path / "latency").mkdir()
            (tmp_path / "latency" / "record.jsonl").write_text(f"{claim}\n{claim[:-9]}", encoding="utf-8")

        def communicate(self, timeout: float | None = None) -> tuple[str, str]:
            told.append(f"wait {timeout}")
            if timeout:
                raise subprocess.TimeoutExpired("pytest", timeout)
            if len(told) == 1:
                raise KeyboardInterrupt
            return "", ""

        def terminate(self) -> None:
            told.append("end")

        def kill(self) -> None:
            told.append("kill")

    events: list[str] = []
    record = SimpleNamespace(write=lambda event, **values: events.append(event))
    state: Any = SimpleNamespace(folder=tmp_path, record=record, verdicts=Counter[Verdict]())
    given = SimpleNamespace(args=(), dir=tmp_path)
    config = SimpleNamespace(invocation_params=given, getoption=lambda *names: None)
    session: Any = SimpleNamespace(config=config, exitstatus=pytest.ExitCode.OK)
    monkeypatch.setattr(plugin.subprocess, "Popen", Child)
    plugin._latency_alone(state, session)
    assert told == ["wait None", "end", "wait 30", "kill", "wait None"]
    assert events == ["claim"] and state.verdicts == {Verdict.PASS: 1}
    assert session.exitstatus == pytest.ExitCode.INTERRUPTED and not (tmp_path / "latency").exists()


def test_a_release_is_judged_by_one_process(folder: Path) -> None:
    done = command_line(folder, "qualify", "--release", "--report", "release", "--", "-n", "2")
    assert done.returncode == 4 and "-n" in done.stderr, done.stdout + done.stderr
