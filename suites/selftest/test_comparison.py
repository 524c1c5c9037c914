"""Two runs beside each other, from their records: what got worse, better, appeared and vanished."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import reports
from suites.selftest.test_bad_input import assert_refused, run
from suites.selftest.test_report import HOSTILE, case_event, claim_event, end_event, hop, run_event, timed

FP32, FP16, OLD, NEW = (f"best-onnx-{x}-ort-cpu" for x in ("fp32", "fp16", "fp32.b2", "fp16.b2"))
SIZES = {"before": 1_000_000, "after": 1_500_000}


def record(folder: Path, name: str, claims: dict[tuple[str, str], Any], machine: str = "amd-epyc-2c-1a2b3c") -> Path:
    """A run whose claims end with these verdicts, or with (verdict, milliseconds)."""
    lines = [run_event(run=f"20261122-170501-{name}", machine={"id": machine})]
    last = hop("onnx fp32") | {"files": [{"path": "best.onnx", "bytes": SIZES[name], "sha256": "ab" * 32}]}
    lines += [case_event(case, hops=[hop("pytorch fp32"), last]) for case in dict.fromkeys(c for c, _ in claims)]
    for (case, claim), told in claims.items():
        verdict, centre = told if isinstance(told, tuple) else (told, None)
        lines.append(claim_event(case, claim, verdict, f"because {HOSTILE}", **(timed(centre) if centre else {})))
    made = folder / name
    made.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in [*lines, end_event(0)])
    (made / "record.jsonl").write_text(text, encoding="utf-8")
    return made


BEFORE = {
    (FP32, "test_a"): "PASS",
    (FP32, "test_b"): "FAIL",
    (FP32, "test_c"): "SKIPPED",
    (FP32, "test_d"): "FAIL",
    (FP32, "test_p50"): ("PASS", 10.0),
    (FP16, "test_a"): "WAIVED",
    (OLD, "test_a"): "PASS",
}
AFTER = {
    (FP32, "test_a"): "FAIL",
    (FP32, "test_b"): "PASS",
    (FP32, "test_c"): "NOT_SUPPORTED",
    (FP32, "test_d"): "CRASH",
    (FP32, "test_p50"): ("PASS", 12.5),
    (FP16, "test_a"): "PASS",
    (NEW, "test_a"): "PASS",
}


def test_what_changed_is_told_by_kind(tmp_path: Path) -> None:
    before, after = record(tmp_path, "before", BEFORE), record(tmp_path, "after", AFTER)
    found = reports.write_comparison(before, after, tmp_path / "out")
    assert [(c.case, c.claim) for c in found.worse] == [(FP32, "test_a")]
    assert [(c.case, c.claim) for c in found.better] == [(FP32, "test_b")]
    assert {(c.claim, c.after) for c in found.other} == {
        ("test_c", "NOT_SUPPORTED"),
        ("test_d", "CRASH"),
        ("test_a", "PASS"),
    }
    assert [c.case for c in found.appeared] == [NEW] and [c.case for c in found.vanished] == [OLD]
    assert found.headline.endswith("1 worse, 1 better, 3 otherwise, 1 appeared, 1 vanished")
    figures = {(f.case, f.what): (f.before, f.after, round(f.ratio, 3)) for f in found.figures}
    assert figures == {
        (FP32, "p50 ms"): ("10.00", "12.50", 1.25),
        (FP32, "size"): ("1 MB", "1.5 MB", 1.5),
        (FP16, "size"): ("1 MB", "1.5 MB", 1.5),
    }
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    for words in ("Worse", "Vanished", "Better", "Appeared", "+25.0 %", FP32, NEW):
        assert words in page and words in text
    assert "<script>" not in page and "<script>" not in text  # nothing of a record is markup


def test_latencies_of_two_machines_are_not_compared(tmp_path: Path) -> None:
    before, after = record(tmp_path, "before", BEFORE), record(tmp_path, "after", AFTER, "another-machine")
    found = reports.write_comparison(before, after, tmp_path / "out")
    assert not [f for f in found.figures if f.what == "p50 ms"]
    assert "another-machine" in (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("claims", "code"),
    [
        (BEFORE, 0),
        (AFTER, 1),
        ({k: v for k, v in BEFORE.items() if k[0] != OLD}, 1),  # what held is no longer asked
        (BEFORE | {(NEW, "test_a"): "FAIL"}, 0),  # new, so that nothing got worse: `qualify` says that it fails
    ],
    ids=["the same", "worse", "vanished", "appeared"],
)
def test_the_command_fails_where_something_got_worse(tmp_path: Path, claims: dict[Any, Any], code: int) -> None:
    record(tmp_path, "before", BEFORE)
    record(tmp_path, "after", claims)
    done = run(["report", "before", "after", "--compare"], tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
    assert (tmp_path / "after" / "comparison.html").is_file() and "worse" in done.stdout


def test_bad_requests_are_one_line(tmp_path: Path) -> None:
    record(tmp_path, "before", BEFORE)
    assert_refused(run(["report", "before", "--compare"], tmp_path), "--compare takes two runs", "1 given")
    assert_refused(run(["report", "before", "gone", "--compare"], tmp_path), "gone")
    shutil.copytree(tmp_path / "before", tmp_path / "copy")
    done = run(["report", "before", "copy", "--compare"], tmp_path)
    assert_refused(done, "20261122-170501-before is given 2 times", "'before/record.jsonl'", "'copy/record.jsonl'")
