"""Injuries of latency, of baselines and of the suite itself: what `suites.selftest.sabotage` judges by whole runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from suites.selftest.conftest import Workshop, command_line
from suites.selftest.test_drift import (
    CASE,
    LAZY,
    SLOW,
    accept_good,
    hungry,
    in_workers,
    larger,
    measuring,
    sizes,
    speed,
)
from suites.support.verdict import Verdict

MODULE = """
import torch


def make():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU(), torch.nn.Conv2d(64, 32, 3))
"""
# Latency is let be: these runs share two cores with each other, and what tampers with it is told apart all the same.
PROJECT = """
must_pass = ["small-onnx-fp32-ort-cpu"]
[models.small]
factory = "small_model:make"
imgsz = 32
[matrix]
formats = ["onnx"]
precisions = ["fp32"]
[latency]
delta = 9.0
processes = 2
seconds = 0.05
"""
WAIVER = """
[[waivers]]
case = "small-onnx-fp32-ort-cpu"
claim = "{claim}"
reason = "known"
issue = "https://example.com/1"
owner = "{owner}"
expires = {expires}
"""


@dataclass(frozen=True)
class Found:
    """One injury: whether it was caught, by what, and whether pytest-benchmark's comparison would have."""

    name: str
    of: str
    ours: bool
    by: str
    because: str
    benchmark: bool | None = None


def of_latency(workshop: Workshop, folder: Path) -> Iterator[Found]:
    """Artifacts and runtimes that drift from what was accepted, each through real workers."""
    own = measuring(workshop, folder / "baselines")
    (folder / "path").mkdir()
    try:
        stored = float(np.median(json.loads(accept_good(workshop).read_text(encoding="utf-8"))["milliseconds"]))

        def judge(name: str, seen: tuple[Verdict, str], wanted: Verdict, word: str, claim: str) -> Found:
            measured = workshop.run.measured.pop(workshop.case(CASE).id, [])
            # `--benchmark-compare-fail=median:50%`, the same limit
            slower = bool(measured) and float(np.median(np.concatenate(measured))) > 1.5 * stored
            return Found(name, CASE, seen[0] is wanted and word in seen[1], claim, f"{seen[0]}: {seen[1]}", slower)

        size = "size_load_and_memory_within_baseline"
        yield judge(
            "the graph does needless work", speed(workshop, hungry), Verdict.FAIL, "slower", "p50_within_baseline"
        )
        yield judge("256 MiB more while it runs", sizes(workshop, hungry), Verdict.FAIL, "peak memory MiB", size)
        yield judge("weights that no node reads", sizes(workshop, larger), Verdict.FAIL, "artifact MiB", size)
        with in_workers(folder / "path", SLOW):
            yield judge("a session takes a second more to make", sizes(workshop), Verdict.FAIL, "load ms", size)
        with in_workers(folder / "path", LAZY):
            seen = speed(workshop)
        yield judge("a runtime that stops computing", seen, Verdict.ERROR, "changed", "p50_within_baseline")
    finally:
        workshop.run.project = own


@dataclass(frozen=True)
class Tampering:
    """A way to get a green run: what is changed in a project, or asked for, and the words that have to be printed."""

    name: str
    tamper: Callable[[Path], None]
    word: str
    options: Sequence[str] = ()


def _config(more: str = "", old: str = "", new: str = "") -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        path = folder / "exportgate.toml"
        path.write_text(path.read_text(encoding="utf-8").replace(old, new) + more, encoding="utf-8")

    return tamper


def _baseline(old: str, new: str) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        (path,) = folder.glob("baselines/*/*.json")
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    return tamper


def _faster(folder: Path) -> None:
    (path,) = folder.glob("baselines/*/*.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    data["milliseconds"] = [[x / 100 for x in p] for p in data["milliseconds"]]
    path.write_text(json.dumps(data), encoding="utf-8")


def _smaller(folder: Path) -> None:
    (path,) = folder.glob("baselines/*/*.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    data["conditions"]["artifact MiB"] = 0.0
    path.write_text(json.dumps(data), encoding="utf-8")


def _half(folder: Path) -> None:
    (path,) = folder.glob("baselines/*/*.json")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _no_baseline(folder: Path) -> None:
    shutil.rmtree(folder / "baselines")


def _nothing(folder: Path) -> None:
    """What is asked for does it."""


LOOSE = '[[tolerances]]\nprecision = "fp32"\ngroup = "values"\nmeasure = "max_abs"\nallowed = 1e9\nreason = "green"\n'


def _waived(**other: str) -> Callable[[Path], None]:
    return _config(WAIVER.format(**{**GOOD_WAIVER, **other}))


def _all(*tampers: Callable[[Path], None]) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        for one in tampers:
            one(folder)

    return tamper


MORE = _config("", '"fp32"]\n[latency]', '"fp32", "fp16"]\n[latency]')
GOOD_WAIVER = {"claim": "test_outputs_match_reference", "owner": "jane", "expires": "2099-01-01"}
_of_no_case = _config(WAIVER.format(**GOOD_WAIVER).replace("small-onnx", "smal-onnx"))
TAMPERINGS = (
    Tampering("a tolerance that lets all pass", _config(LOOSE), "does not notice"),
    Tampering("an expired waiver", _waived(expires="2020-01-01"), "expired"),
    Tampering("a waiver of a misspelt claim", _waived(claim="test_otputs"), "test_otputs"),
    Tampering("a waiver that nobody owns", _waived(owner=""), "owner"),
    Tampering(
        "a waiver of a claim that cannot be judged",
        _all(_config("", "delta", "must_detect = 1e-9\ndelta"), _waived(claim="test_p50_within_baseline")),
        "1 ERROR",
    ),
    Tampering("a must-pass case that is misspelt", _config("", "small-onnx-fp32-ort-cpu", "smal-onnx"), "never ran"),
    Tampering("a matrix without its must-pass case", _config("", '["fp32"]', '["fp16"]'), "never ran"),
    Tampering("claims left out by name", _nothing, "-k", ("--", "-k", "not latency")),
    Tampering("claims left out by marker", _nothing, "-m", ("--", "-m", "not latency")),
    Tampering("cases left out", _all(MORE, _config("", "must_pass", "#")), "leaves out 1 of", ("--half",)),
    Tampering("a waiver of no case", _all(MORE, _of_no_case), "no case has this id", ("--precision", "fp32")),
    Tampering("one claim alone", _nothing, "--claim", ("--claim", "test_outputs_are_finite")),
    Tampering("a baseline removed", _no_baseline, "NO_BASELINE"),
    Tampering("a baseline of another machine", _baseline('"cores": ', '"cores": 1'), "NOT_COMPARABLE"),
    Tampering("a baseline cut in the middle", _half, "cannot be read"),
    Tampering("a baseline a hundred times as fast", _faster, "slower than the baseline"),
    Tampering("a baseline of a smaller file", _smaller, "artifact MiB"),
)  # fmt: skip


def of_the_suite(folder: Path) -> Iterator[Found]:
    """Tampered projects, each judged for a release; the first is the good one, which has to qualify."""
    good = folder / "good"
    good.mkdir()
    (good / "small_model.py").write_text(MODULE, encoding="utf-8")
    (good / "exportgate.toml").write_text(PROJECT, encoding="utf-8")
    code, out = _cli(good, "qualify", "--report", "first")
    assert not code, out
    for _ in range(5):  # a noisy machine's measurement is refused
        code, out = _cli(good, "baseline", "accept", "first", "--reason", "first")
        if not code:
            break
        shutil.rmtree(good / "first")
        _cli(good, "qualify", "--report", "first")
    assert not code, out
    code, out = _cli(good, "qualify", "--release", "--report", "second")
    yield Found("(nothing is tampered with)", "a project", not code and "\nQUALIFIED" in out, "", out[-300:])
    for number, one in enumerate(TAMPERINGS):
        place = folder / f"{number}"
        shutil.copytree(good, place, ignore=shutil.ignore_patterns("first", "second"))
        one.tamper(place)
        code, out = _cli(place, "qualify", "--release", "--report", "out", *one.options)
        line = next((x.strip() for x in out.splitlines() if one.word in x), out[-200:])
        caught = code in (1, 4) and one.word in out and "\nQUALIFIED" not in out and "Traceback" not in out
        yield Found(one.name, "a release", caught, f"exit {code}", line)


def _cli(folder: Path, *words: str) -> tuple[int, str]:
    done = command_line(folder, *words)
    return done.returncode, done.stdout + done.stderr
