"""Many runs from their records: trends by case, machines apart, bad input in one line."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import reports
from exporters.errors import BadRequest
from reports import events, findings, history, trend
from reports.decode import build
from reports.record import merge, read_record
from suites.selftest.test_bad_input import assert_refused, run
from suites.selftest.test_report import (
    HOSTILE,
    Event,
    case_event,
    claim_event,
    comparison,
    end_event,
    hop,
    hostile_record,
    run_event,
    timed,
    write_record,
)

HERE, THERE = "amd-epyc-2c-1a2b3c", "another-machine"
FP32, FP16 = "best-onnx-fp32-ort-cpu", "best-onnx-fp16-ort-cpu"


def accuracy(value: float) -> Event:
    """The part of a claim that judges a metric."""
    return {
        "accuracy": {
            "metric": "F1",
            "artifact": {"F1": value, "mAP": 0.5},
            "reference": {"F1": 0.9, "mAP": 0.5},
            "change": value - 0.9,
            "low": value - 0.91,
            "high": value - 0.89,
            "allowed": 0.005,
            "share": False,
            "images": 400,
        }
    }


def record(
    root: Path, day: int, p50: float | None, machine: str = HERE, error: float = 0.4, verdict: str = "PASS"
) -> Path:
    """A run of one day with a case that is measured, compared and judged by a metric, and one that is neither."""
    last = hop("onnx fp32") | {
        "files": [{"path": "best.onnx", "bytes": 1_000_000 + day * 100_000, "sha256": "ab" * 32}]
    }
    compared = [
        comparison(observed=error, passed=error <= 1),
        comparison(measure="cosine", observed=1.0, allowed=0.999),
    ]
    lines = [
        run_event(run=f"run-{day}", time=f"2026-11-{day:02}T17:05:01Z", machine={"id": machine}),
        case_event(FP32, hops=[hop("pytorch fp32"), last]),
        claim_event(FP32, "test_outputs_match_reference", verdict, comparisons=compared),
        claim_event(FP32, "test_accuracy_against_labels", "PASS", **accuracy(0.9 - day / 1000)),
        claim_event(FP32, "test_p50_within_baseline", "PASS", **(timed(p50) if p50 else {})),
        case_event(FP16, hops=[]),
        claim_event(FP16, "test_outputs_match_reference", "SKIPPED"),
        end_event(0),
    ]
    return write_record(root / f"day{day}", lines)


def figures(course: history.Course) -> dict[str, list[float | None]]:
    return {entry.what: [point.value if point else None for point in entry.points] for entry in course.figures}


def lines(found: history.History, what: str) -> list[tuple[str, ...]]:
    """The trend lines of the first case's figure: their style, and from which to which place."""
    course = found.cases[0]
    (figure,) = [entry for entry in course.figures if entry.what == what]
    drawn = trend.picture(found, course, figure)
    return re.findall(r'<line class="trend (line\d)" x1="([\d.]+)" x2="([\d.]+)"', drawn)


def test_figures_go_by_the_time_in_the_record(tmp_path: Path) -> None:
    paths = [record(tmp_path, 3, 12.0, error=1.5, verdict="FAIL"), record(tmp_path, 1, 10.0), record(tmp_path, 2, 11.0)]
    found = reports.write_history(paths, tmp_path / "out")
    assert [side.runs[0].start.run for side in found.runs] == ["run-1", "run-2", "run-3"]
    assert figures(found.cases[0]) == {
        "p50 ms": [10.0, 11.0, 12.0],
        history.ERROR: [0.4, 0.4, 1.5],  # a cosine of 1 has no error, and not the share 0.999
        "F1, accuracy against labels": pytest.approx([0.899, 0.898, 0.897]),
        history.BYTES: [1_100_000, 1_200_000, 1_300_000],
    }
    assert found.cases[1].case == FP16 and found.cases[1].figures == ()
    assert found.headline == (
        "QUALIFIED -> NOT QUALIFIED: 3 runs on 1 machine, 2026-11-01 17:05 UTC to 2026-11-03 17:05 UTC"
    )
    page = (tmp_path / "out" / "history.html").read_text(encoding="utf-8")
    told = (tmp_path / "out" / "history.md").read_text(encoding="utf-8")
    assert FP16 in page and FP16 not in told  # it has no figure
    for words in (FP32, "run-2", "10.00", "NOT QUALIFIED", "F1, accuracy against labels"):
        assert words in page and words in told
    assert page.count("<svg") == 4 and "10.00 (9.900 to 10.10)" in page and "<script" not in page
    assert "10.00 → 11.00 → 12.00 | +20.0 % |" in told and "1 FAIL" in told


def test_a_line_joins_every_run_of_one_machine(tmp_path: Path) -> None:
    paths = [record(tmp_path, day, 10.0 + day) for day in (1, 2, 3)]
    found = reports.write_history(paths, tmp_path / "out")
    assert lines(found, "p50 ms") == [("line0", "84.0", "302.0"), ("line0", "302.0", "520.0")]


def test_runs_on_two_machines_are_never_joined(tmp_path: Path) -> None:
    places = (HERE, THERE, HERE, THERE, THERE)
    paths = [record(tmp_path, day + 1, 10.0, machine) for day, machine in enumerate(places)]
    found = reports.write_history(paths, tmp_path / "out")
    assert found.machines == (HERE, THERE) and [found.letter(name) for name in found.machines] == ["A", "B"]
    assert lines(found, "p50 ms") == [
        ("line0", "84.0", "302.0"),
        ("line1", "193.0", "411.0"),
        ("line1", "411.0", "520.0"),
    ]
    told = (tmp_path / "out" / "history.md").read_text(encoding="utf-8")
    assert f"| p50 ms | {HERE} | 10.00 → 10.00 |" in told and f"| p50 ms | {THERE} | 10.00 → 10.00 → 10.00 |" in told


def test_a_run_that_measured_nothing_breaks_the_line(tmp_path: Path) -> None:
    paths = [record(tmp_path, 1, 10.0), record(tmp_path, 2, None), record(tmp_path, 3, 11.0), record(tmp_path, 4, 11.0)]
    found = reports.write_history(paths, tmp_path / "out")
    assert lines(found, "p50 ms") == [("line0", "374.7", "520.0")]
    assert len(lines(found, history.BYTES)) == 3


def test_a_gpu_is_the_machine_of_what_runs_on_it(tmp_path: Path) -> None:
    paths = [record(tmp_path, day, 10.0, f"host-{day}") for day in (1, 2)]
    for path in paths:
        told = (path / "record.jsonl").read_text(encoding="utf-8")
        told = told.replace('"unit": "ms"', '"unit": "ms", "conditions": {"machine": "nvidia-h100"}')
        (path / "record.jsonl").write_text(told, encoding="utf-8")
    found = reports.write_history(paths, tmp_path / "out")
    assert found.machines == ("nvidia-h100",) and len(lines(found, "p50 ms")) == 1


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({"observed": 0.5, "allowed": 2.0, "passed": True}, 0.25),
        ({"observed": 3.0, "allowed": 2.0, "passed": False}, 1.5),
        ({"observed": 0.0, "allowed": 0.0, "passed": True}, 0.0),
        ({"observed": "NaN", "allowed": 2.0, "passed": False}, float("inf")),
        ({"observed": None, "allowed": 2.0, "passed": False}, float("inf")),
        ({"measure": "cosine", "observed": 0.9995, "allowed": 0.999, "passed": True}, 0.5),
        ({"measure": "snr_db", "observed": 60.0, "allowed": 40.0, "passed": True}, 0.1),
        ({"measure": "map", "observed": 0.95, "allowed": 0.9, "passed": True}, None),
    ],
)
def test_an_error_is_a_share_of_what_is_allowed(changes: Event, share: float | None) -> None:
    found = findings.share(build(events.Comparison, comparison(**changes), "comparison"))
    assert found == (pytest.approx(share) if share is not None else None)


@given(st.lists(st.floats() | st.sampled_from([0.0, 1e-320, 1e308, -1e308]), min_size=2, max_size=5))
def test_no_values_break_the_page(values: list[float]) -> None:
    runs = []
    for day, value in enumerate(values):
        start = build(events.Start, run_event(run=str(day)), "run")
        case = build(events.Case, case_event(FP32), "case")
        point = events.Percentile(value, value, value)
        compared = build(events.Comparison, comparison(), "comparison")
        odd = events.Comparison(**{**vars(compared), "observed": value, "allowed": values[0]})
        judged = events.Claim(
            start.time, FP32, "test_x", "PASS", measurement=events.Measurement(((value,),), point), comparisons=(odd,)
        )
        runs.append(reports.Run(Path(), start, (case,), (judged,), None, torn=False))
    found = history.history(runs)
    assert not re.search(r'="-?(nan|inf)', reports.html.render_history(found))
    assert history.render(found)


def test_nothing_of_a_record_is_markup(tmp_path: Path) -> None:
    one, other = hostile_record(), hostile_record()
    other[0] |= {"run": "another", "time": "2026-11-23T17:05:01Z"}
    paths = [write_record(tmp_path / "a", one), write_record(tmp_path / "b", other)]
    reports.write_history(paths, tmp_path / "out")
    page = (tmp_path / "out" / "history.html").read_text(encoding="utf-8")
    told = (tmp_path / "out" / "history.md").read_text(encoding="utf-8")
    assert "<script" not in page and "<!--" not in page
    assert "<script" not in re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "CODE", told)
    assert "javascript:" in HOSTILE and 'href="javascript' not in page


def test_the_markdown_of_many_runs_stays_small(tmp_path: Path) -> None:
    def many(day: int) -> list[Event]:
        cases = [f"model{index}-onnx-fp16-ort-cpu" for index in range(300)]
        start: list[Event] = [run_event(run=f"run-{day}", time=f"2026-11-{day:02}T17:05:01Z")]
        return start + [
            event
            for case in cases
            for event in (case_event(case), claim_event(case, "test_x", "PASS", comparisons=[comparison()]))
        ]

    found = history.history([read_record(write_record(tmp_path / str(day), many(day))) for day in range(1, 13)])
    told = history.render(found)
    assert len(told.encode()) < 60_000 and "more figures; the HTML report has all of them" in told
    assert " → … → " in told


def test_the_command_writes_both_pages_and_ends_with_0(tmp_path: Path) -> None:
    record(tmp_path, 1, 10.0)
    record(tmp_path, 2, 10.0, error=2.0, verdict="FAIL")
    done = run(["report", "day1", "day2", "--history"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "day2" / "history.html").is_file() and (tmp_path / "day2" / "history.md").is_file()
    assert "QUALIFIED -> NOT QUALIFIED: 2 runs on 1 machine" in done.stdout


def test_bad_requests_are_one_line(tmp_path: Path) -> None:
    record(tmp_path, 1, 10.0)
    shutil.copytree(tmp_path / "day1", tmp_path / "copy")
    (tmp_path / "empty").mkdir()
    assert_refused(run(["report", "day1", "--history"], tmp_path), "--history takes two runs or more", "day1")
    assert_refused(run(["report", "day1", "empty", "--history"], tmp_path), "empty/record.jsonl", "a run's folder")
    assert_refused(
        run(["report", "day1", "copy", "--history"], tmp_path), "run-1 is given 2 times", "'copy/record.jsonl'"
    )
    assert_refused(run(["report", "day1", "copy", "--history", "--compare"], tmp_path), "--compare", "--history")
    assert not list(tmp_path.rglob("history.*"))


@pytest.mark.parametrize("when", ["", "yesterday", "2026-13-01T00:00:00Z"])
def test_a_run_without_a_time_is_refused(tmp_path: Path, when: str) -> None:
    other: dict[str, Any] = run_event(run="other", time=when)
    paths = [record(tmp_path, 1, 10.0), write_record(tmp_path / "other", [other])]
    with pytest.raises(BadRequest, match=rf"other.record\.jsonl:1: the run's time is '{when}'"):
        reports.write_history(paths, tmp_path / "out")


def test_times_of_several_zones_are_ordered(tmp_path: Path) -> None:
    times = {"a": "2026-11-22T17:00:00+02:00", "b": "2026-11-22T15:30:00Z", "c": "2026-11-22T15:45:00"}
    runs = [
        read_record(write_record(tmp_path / name, [run_event(run=name, time=told)])) for name, told in times.items()
    ]
    found = history.history(runs[::-1])
    assert [side.runs[0].start.run for side in found.runs] == ["a", "b", "c"]
    assert merge([runs[0]]).headline in found.runs[0].headline
