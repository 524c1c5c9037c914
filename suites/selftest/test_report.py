"""The reports: every verdict counted, nothing from a record believed, four files from the record alone."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree as ET

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reports
from exporters.errors import BadRequest
from reports import events, findings, html, latency, markdown, picture, wording
from reports.decode import build
from reports.events import FAILING, GOOD, NEUTRAL, Claim, Comparison, Verdict
from reports.record import EXITS, Summary, Word, merge, read_record
from suites.selftest.conftest import command_line

SCHEMA = json.loads((Path(reports.__file__).parent / "schema.json").read_text(encoding="utf-8"))
VERDICTS: tuple[str, ...] = get_args(Verdict)
WHEN = "2026-11-22T17:05:01Z"
Event = dict[str, Any]

# What a checkpoint made by a stranger may be named; each piece is markup in at least one of the reports.
HOSTILE = (
    '"><script>alert(1)</script> a|b `c` *d* [e](javascript:f) \x00\x08\x1b[31m\ud800\u202e @team #12 ]]> & <!--\n| - |'
)


# ---- synthetic records ---------------------------------------------------------------------------------------------


def run_event(**changes: Any) -> Event:
    return {
        "event": "run",
        "schema": 1,
        "run": "20261122-170501-ab12cd",
        "time": WHEN,
        "command": ["exportgate", "qualify", "best.pt", "--format", "onnx"],
        "exportgate": "0.1.0",
        "project": "/work/exportgate.toml",
        "release": False,
        "must_pass": [],
        "machine": {"id": "amd-epyc-2c-1a2b3c", "cpu": "AMD EPYC 7B13", "cores": 2, "memory_gib": 23.4, "gpu": None},
        "versions": {"torch": "2.13.0", "onnx": "1.23.2", "onnxruntime": "1.26.0"},
    } | changes


def case_event(case: str, **changes: Any) -> Event:
    _, form, precision, runtime, device = case.split("-")
    chain = ["pytorch fp32"] if form == "pytorch" else ["pytorch fp32", f"{form} {precision}"]
    return {
        "event": "case",
        "time": WHEN,
        "case": case,
        "model": "best",
        "format": form,
        "precision": precision,
        "runtime": runtime,
        "device": device,
        "spec": {"imgsz": [640, 640], "batch": 1, "dynamic": False},
        "hops": [hop(name) for name in chain],
        "artifact": "/work/.cache/artifacts/5f1c09aa",
    } | changes


def hop(name: str) -> Event:
    form, precision = name.split()
    return {
        "name": name,
        "format": form,
        "precision": precision,
        "seconds": 2.4,
        "cached": form == "pytorch",
        "digest": "sha256:" + "5f1c09aa" * 8,
        "files": [{"path": f"best.{form}", "bytes": 12_263_004, "sha256": "9d41c2be" * 8}],
        "toolchain": {"name": "default", "packages": {"torch": "2.13.0"}},
        "achieved": {"summary": f"{precision} weights (63 of 63 convolutions)", "counts": {precision: 63}},
    }


def claim_event(case: str, claim: str, verdict: str, because: str = "", **more: Any) -> Event:
    reproduce = f"exportgate qualify best.pt --case {case} --claim {claim}"
    return {
        "event": "claim",
        "time": WHEN,
        "case": case,
        "claim": claim,
        "verdict": verdict,
        "because": because,
        "seconds": 1.2,
        "reproduce": reproduce,
    } | more


def end_event(code: int, **changes: Any) -> Event:
    end = {"event": "end", "time": WHEN, "exit": code, "seconds": 92.1, "selftest": {"passed": 12, "failed": 0}}
    return end | changes


def comparison(**changes: Any) -> Event:
    return {
        "hop": "pytorch fp32 -> onnx fp16",
        "feeds": "photographs",
        "output": "output0",
        "group": "boxes",
        "unit": "px",
        "count": 33_600,
        "max_abs": 3.21,
        "mean_abs": 0.012,
        "p99_abs": 0.31,
        "max_rel": 0.4,
        "mean_rel": 0.001,
        "fraction_outside": 0.0007,
        "cosine": 0.99998,
        "snr_db": 61.3,
        "worst_index": [0, 2, 811],
        "measure": "max_abs",
        "observed": 3.21,
        "allowed": 1.0,
        "reason": "1 px on boxes that fire",
        "passed": False,
    } | changes


def latencies(centre: float, seed: int, processes: int = 5, each: int = 60) -> list[list[float]]:
    dice = random.Random(seed)
    return [
        [round(centre * drift * dice.lognormvariate(0, 0.025), 5) for _ in range(each)]
        for drift in (dice.gauss(1, 0.008) for _ in range(processes))
    ]


def timed(centre: float, seed: int = 1, baseline: float | None = None, each: int = 60) -> Event:
    """The part of a claim that a latency test adds."""
    point = {"value": centre, "low": centre * 0.99, "high": centre * 1.01}
    found: Event = {
        "measurement": {
            "unit": "ms",
            "processes": latencies(centre, seed, each=each),
            "p50": point,
            "p90": {"value": centre * 1.04, "low": centre * 1.03, "high": centre * 1.05},
            "p95": {"value": centre * 1.05, "low": centre * 1.04, "high": centre * 1.07},
            "p99": None,
            "warm_up": 37,
            "timer": "time.perf_counter_ns",
            "threads": 2,
            "throttled": False,
            "notes": ["p99 needs 662 inferences, got 300"],
        }
    }
    if baseline is not None:
        ratio = centre / baseline
        found["baseline"] = {
            "path": "baselines/amd-epyc-2c-1a2b3c/best.json",
            "date": "2026-11-02",
            "processes": latencies(baseline, seed + 1, each=each),
            "p50": baseline,
            "reason": "first baseline",
        }
        gate = {"ratio": ratio, "low": ratio - 0.012, "high": ratio + 0.012, "delta": 0.02, "mde": 0.045}
        found["gate"] = gate | {"must_detect": None}
    return found


POWER: Event = {
    "statement": "notices noise of 0.5 % of a layer's standard deviation",
    "sensitive": True,
    "damages": [
        {
            "kind": "noise",
            "layer": "model.0.conv",
            "size": 0.005,
            "cap": 0.05,
            "rejected": True,
            "by": "boxes max_abs 3 > 1",
        },
        {"kind": "swapped classes", "layer": None, "size": None, "cap": None, "rejected": True, "by": "scores max_abs"},
    ],
}
BLIND: Event = {
    "statement": "no anchor fires: 5 % of noise changes nothing that is judged",
    "sensitive": False,
    "damages": [{"kind": "noise", "layer": "model.22.cv3", "size": 0.05, "cap": 0.05, "rejected": False, "by": None}],
}
WAIVER: Event = {
    "reason": "names are cut at 64 characters by the runtime",
    "issue": "https://example.org/issues/7",
    "owner": "jo",
    "expires": "2027-01-01",
}
LAYERS: list[Event] = [
    {"name": "/model.0/conv/Conv + SiLU", "kind": "CaskConvolution", "precision": "int8", "milliseconds": 0.021,
     "parts": ["/model.0/conv/Conv"]},
    {"name": "/model.22/dfl/conv/Conv", "kind": "CaskConvolution", "precision": "fp16", "milliseconds": 0.011,
     "parts": ["/model.22/dfl/conv/Conv"]},
    {"name": "Reformatting CopyNode", "kind": "Reformat", "precision": "int8", "milliseconds": 0.004},
]  # fmt: skip
# What each verdict's claim carries beside its word.
DETAILS: dict[str, Event] = {
    "PASS": {
        "comparisons": [comparison(observed=0.4, passed=True)],
        "power": POWER,
        "layers": LAYERS,
        "because": "",
    },
    "FAIL": {
        "comparisons": [
            comparison(hop="pytorch fp32 -> onnx fp32", observed=0.001, allowed=0.064, passed=True),
            comparison(),
            comparison(group="scores", unit="", measure="cosine", observed=0.98, allowed=0.999),
        ],
        "power": POWER,
        "matching": {"reference": 87, "matched": 85, "iou_floor": 0.9, "lowest_iou": 0.91},
    },
    "WAIVED": {"waiver": WAIVER},
    "NO_BASELINE": timed(24.1, 3),
    "NOT_COMPARABLE": timed(24.1, 5, baseline=20.0),
    "INCONCLUSIVE": timed(24.1, 7, baseline=23.7),
    "INSENSITIVE": {"power": BLIND, "comparisons": [comparison(observed=0.0, passed=True)]},
}


def every_verdict() -> list[Event]:
    """A whole record in which each of the twelve verdict words occurs once."""
    case = "best-onnx-fp16-ort-cpu"
    claims = [
        claim_event(
            case, f"test_claim_{word.lower()}", word, **{"because": f"what {word} says"} | DETAILS.get(word, {})
        )
        for word in VERDICTS
    ]
    return [run_event(), case_event(case), *claims, end_event(1)]


def write_record(folder: Path, lines: Iterable[Event]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "record.jsonl").write_text(text, encoding="utf-8")
    return folder


def summarize(folder: Path, lines: Iterable[Event]) -> Summary:
    return merge([read_record(write_record(folder, lines))])


def one_case(*verdicts: str, code: int, **start: Any) -> list[Event]:
    case = "best-onnx-fp32-ort-cpu"
    claims = [claim_event(case, f"test_{index}", verdict, "why") for index, verdict in enumerate(verdicts)]
    return [run_event(**start), case_event(case), *claims, end_event(code)]


# ---- the schema ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hostile", [False, True], ids=["plain", "hostile"])
def test_every_line_follows_the_schema(hostile: bool) -> None:
    check = jsonschema.Draft202012Validator(SCHEMA)
    check.check_schema(SCHEMA)
    for line in hostile_record() if hostile else every_verdict():
        check.validate(line)


def test_a_misspelt_field_is_refused_by_the_schema() -> None:
    line = claim_event("c", "test_x", "PASS", mesurement=None)
    assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(line)


def test_the_schema_and_the_reader_know_the_same_fields() -> None:
    kinds = {name: kind for name, kind in vars(events).items() if is_dataclass(kind) and isinstance(kind, type)}
    kinds["Run"] = kinds.pop("Start")
    for name, kind in kinds.items():
        described = SCHEMA["$defs"][name.lower()]
        known = {entry.name for entry in fields(kind)}
        required = {
            entry.name for entry in fields(kind) if entry.default is MISSING and entry.default_factory is MISSING
        }
        assert set(described["properties"]) - {"event"} == known, name
        assert set(described["required"]) - {"event"} == required, name


def test_the_schema_and_the_reader_know_the_same_verdicts() -> None:
    assert SCHEMA["$defs"]["verdict"]["enum"] == list(VERDICTS)
    assert sorted([*FAILING, *NEUTRAL, *GOOD]) == sorted(VERDICTS)
    assert set(VERDICTS) < set(wording.MEANING)
    assert set(VERDICTS) - GOOD < set(wording.ADVICE)


# ---- reading -------------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    folder = write_record(tmp_path, every_verdict())
    record = folder / "record.jsonl"
    record.write_bytes(record.read_bytes()[:-30])
    run = read_record(folder)
    assert run.torn and run.end is None and len(run.claims) == len(VERDICTS)
    summary = merge([run])
    assert summary.verdict == "INTERRUPTED"
    assert any("torn" in remark for remark in summary.remarks)


def test_a_last_line_torn_inside_a_character_is_left_out(tmp_path: Path) -> None:
    folder = write_record(tmp_path, every_verdict()[:3])
    with (folder / "record.jsonl").open("ab") as record:
        record.write('{"event": "claim", "because": "é'.encode()[:-1])
    assert read_record(folder).torn


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"event": "claim", "cas', "not a JSON line"),
        ("[" * 100_000, "not a JSON line"),
        ('{"event": "clam"}', "unknown event 'clam'"),
        ("12", "unknown event 'None'"),
        ('{"event": "run", "schema": 1}', "the run event comes first, once"),
        ('{"event": "claim", "time": "", "case": "c", "claim": "t"}', "claim lacks verdict"),
        ('{"event": "claim", "time": "", "case": "c", "claim": "t", "verdict": "OK"}', "claim.verdict is 'OK'"),
        ('{"event": "end", "time": "", "exit": "0"}', "end.exit is '0', not a whole number"),
    ],
)
def test_any_other_bad_line_is_refused_with_its_place(tmp_path: Path, line: str, says: str) -> None:
    record = tmp_path / "record.jsonl"
    lines = [json.dumps(event) for event in every_verdict()]
    record.write_text("\n".join([*lines[:3], line, *lines[3:]]) + "\n", encoding="utf-8")
    with pytest.raises(BadRequest) as caught:
        read_record(tmp_path)
    assert f"{record}:4: " in str(caught.value) and says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_record_of_another_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"record\.jsonl:1: the record has schema 2, this exportgate reads 1"):
        read_record(write_record(tmp_path, [run_event(schema=2)]))


def test_a_folder_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="cannot read the run record"):
        read_record(tmp_path)


def test_an_empty_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="holds no run event"):
        read_record(write_record(tmp_path, []))


def test_a_claim_judged_twice_keeps_its_worse_verdict(tmp_path: Path) -> None:
    lines = one_case("FAIL", code=0)
    lines.insert(3, claim_event("best-onnx-fp32-ort-cpu", "test_0", "PASS"))
    assert summarize(tmp_path, lines).counts == {"FAIL": 1}


# ---- the verdict and the headline ----------------------------------------------------------------------------------


def test_the_headline_counts_every_verdict(tmp_path: Path) -> None:
    summary = summarize(tmp_path, every_verdict())
    for word in VERDICTS:
        assert f"1 {word}" in summary.headline
    assert summary.headline.startswith("NOT QUALIFIED: 6 of 12 claims failed (")
    assert summary.headline.endswith("; 1 case")


@pytest.mark.parametrize(
    ("verdicts", "code", "headline"),
    [
        (
            ["PASS", "WAIVED", "NO_BASELINE"],
            0,
            "QUALIFIED: 0 of 3 claims failed; 1 PASS, 1 WAIVED, 1 NO_BASELINE; 1 case",
        ),
        (["PASS", "CRASH"], 1, "NOT QUALIFIED: 1 of 2 claims failed (1 CRASH); 1 PASS; 1 case"),
        (["SKIPPED", "NOT_SUPPORTED"], 5, "NOTHING JUDGED: 0 of 2 claims failed; 1 SKIPPED, 1 NOT_SUPPORTED; 1 case"),
        ([], 5, "NOTHING JUDGED: 0 of 0 claims failed; 1 case"),
        (["PASS"], 2, "INTERRUPTED: 0 of 1 claim failed; 1 PASS; 1 case; run 20261122-170501-ab12cd was interrupted"),
    ],
)
def test_the_overall_verdict(tmp_path: Path, verdicts: list[str], code: int, headline: str) -> None:
    assert summarize(tmp_path, one_case(*verdicts, code=code)).headline.startswith(headline)


def test_each_verdict_has_an_exit_code_of_its_own() -> None:
    assert set(EXITS) == set(get_args(Word)) and len(set(EXITS.values())) == len(EXITS)


def test_a_run_without_an_end_is_interrupted(tmp_path: Path) -> None:
    summary = summarize(tmp_path, one_case("PASS", code=0)[:-1])
    assert summary.headline.startswith("INTERRUPTED: ") and "has no end event" in summary.headline


def test_an_exit_code_that_no_claim_explains_does_not_qualify(tmp_path: Path) -> None:
    summary = summarize(tmp_path, one_case("PASS", code=1))
    assert summary.verdict == "NOT QUALIFIED"
    assert "ended with exit 1 although none of its claims failed" in summary.headline


def test_a_run_that_goes_on_after_its_end_is_not_finished(tmp_path: Path) -> None:
    lines = one_case("PASS", code=0)
    lines.append(claim_event("best-onnx-fp32-ort-cpu", "test_later", "PASS"))
    assert summarize(tmp_path, lines).verdict == "INTERRUPTED"


def test_failed_tests_of_the_suite_itself_do_not_qualify(tmp_path: Path) -> None:
    lines = [*one_case("PASS", code=0)[:-1], end_event(0, selftest={"passed": 3, "failed": 1})]
    assert summarize(tmp_path, lines).verdict == "NOT QUALIFIED"


def test_a_release_fails_must_pass_claims_that_lack_a_pass(tmp_path: Path) -> None:
    case = "best-onnx-fp32-ort-cpu"
    wanted = [f"{case}::test_0", f"{case}::test_1", f"{case}::test_2", "best-engine-fp16-trt-cuda::test_0"]
    lines = one_case("PASS", "NO_BASELINE", "WAIVED", "SKIPPED", code=1, release=True, must_pass=wanted)
    summary = summarize(tmp_path, lines)
    assert summary.headline.startswith(
        "NOT QUALIFIED (release): 0 of 4 claims failed, "
        "2 more on the must-pass list without PASS (1 NO_BASELINE, 1 never ran);"
    )
    assert [(entry.verdict, entry.claims) for entry in findings.findings(summary)] == [
        ("NO_BASELINE", ("test_1",)),
        ("NEVER RAN", ("test_0",)),
    ]


def test_a_release_without_a_list_wants_every_claim(tmp_path: Path) -> None:
    lines = one_case("PASS", "SKIPPED", code=1, release=True)
    assert summarize(tmp_path, lines).verdict == "NOT QUALIFIED"


# ---- several machines ----------------------------------------------------------------------------------------------


def second_machine(*verdicts: str, code: int = 0, **start: Any) -> list[Event]:
    machine = {"id": "nvidia-h100", "gpu": "NVIDIA H100"}
    return one_case(*verdicts, code=code, run="20261122-180000-ffee00", machine=machine, **start)


def test_two_machines_become_one_matrix(tmp_path: Path) -> None:
    one = read_record(write_record(tmp_path / "a", one_case("PASS", code=0)))
    two = read_record(write_record(tmp_path / "b", second_machine("PASS", "FAIL", code=1)))
    summary = merge([one, two])
    assert [row.where for row in summary.rows] == ["amd-epyc-2c-1a2b3c", "nvidia-h100"]
    assert summary.columns == ("test_0", "test_1")
    assert summary.headline == "NOT QUALIFIED: 1 of 3 claims failed (1 FAIL); 2 PASS; 2 cases on 2 machines"


def test_a_machine_that_judged_nothing_does_not_hide_behind_another(tmp_path: Path) -> None:
    one = read_record(write_record(tmp_path / "a", one_case("PASS", code=0)))
    two = read_record(write_record(tmp_path / "b", second_machine("SKIPPED", code=5)))
    summary = merge([one, two])
    assert summary.verdict == "NOT QUALIFIED" and "on nvidia-h100 judged nothing" in summary.headline


def test_a_whole_case_is_let_by_what_its_format_cannot_have(tmp_path: Path) -> None:
    whole = ["best-onnx-fp32-ort-cpu::*"]
    lines = one_case("PASS", "NOT_SUPPORTED", "NO_BASELINE", code=1, release=True, must_pass=whole)
    summary = summarize(tmp_path, lines)
    assert [entry.verdict for entry in summary.unmet] == ["NO_BASELINE"]


def test_a_whole_case_that_its_format_cannot_have_is_not_let_by(tmp_path: Path) -> None:
    whole = ["best-onnx-fp32-ort-cpu::*", "other::*"]
    lines = one_case("NOT_SUPPORTED", "NOT_SUPPORTED", code=1, release=True, must_pass=whole)
    summary = summarize(tmp_path, lines)
    assert len(summary.unmet) == 3
    assert "1 never ran" in summary.headline


def test_a_must_pass_claim_may_run_on_another_machine(tmp_path: Path) -> None:
    wanted = ["best-onnx-fp32-ort-cpu::test_0", "best-onnx-fp32-ort-cpu::test_1"]
    start = {"release": True, "must_pass": wanted}
    one = read_record(write_record(tmp_path / "a", one_case("PASS", code=1, **start)))
    two = read_record(write_record(tmp_path / "b", second_machine("PASS", "PASS", **start)))
    assert merge([one]).verdict == "NOT QUALIFIED"
    assert merge([one, two]).verdict == "QUALIFIED"


def two_releases(tmp_path: Path, mine: list[str], other: list[str], entries: str = "listed", **second: Any) -> Summary:
    """Release runs of two machines, whose claims end with these verdicts; the first one wants all or what is listed."""
    case = "best-onnx-fp32-ort-cpu"
    listed = [f"{case}::test_{index}" for index in range(len(mine))] if entries == "listed" else [entries]
    start = {"release": True, "must_pass": listed}
    codes = [0 if {"PASS", "WAIVED", "NOT_SUPPORTED"}.issuperset(verdicts) else 1 for verdicts in (mine, other)]
    one = read_record(write_record(tmp_path / "a", one_case(*mine, code=codes[0], **start)))
    two = read_record(write_record(tmp_path / "b", second_machine(*other, code=codes[1], **(start | second))))
    return merge([one, two])


@pytest.mark.parametrize("entries", ["listed", "best-onnx-fp32-ort-cpu::*"])
@pytest.mark.parametrize("shown", ["PASS", "WAIVED"])
def test_what_one_release_run_skipped_another_may_show(tmp_path: Path, shown: str, entries: str) -> None:
    summary = two_releases(tmp_path, ["PASS", "SKIPPED"], ["PASS", shown], entries)
    assert summary.verdict == "QUALIFIED" and not summary.unmet, summary.headline
    assert summary.must_pass == 2


@pytest.mark.parametrize("entries", ["listed", "best-onnx-fp32-ort-cpu::*"])
@pytest.mark.parametrize(
    ("mine", "other", "unmet"),
    [
        ("SKIPPED", "SKIPPED", ["SKIPPED", "SKIPPED"]),
        ("SKIPPED", "NOT_COMPARABLE", ["SKIPPED", "NOT_COMPARABLE"]),
        ("SKIPPED", "FAIL", ["SKIPPED"]),
        ("FAIL", "PASS", []),  # a failure of its own
        ("NO_BASELINE", "PASS", ["NO_BASELINE"]),  # how fast this machine is another one does not show
        ("NOT_COMPARABLE", "PASS", ["NOT_COMPARABLE"]),
    ],
)
def test_what_a_release_run_answered_no_other_replaces(
    tmp_path: Path, mine: str, other: str, unmet: list[str], entries: str
) -> None:
    summary = two_releases(tmp_path, ["PASS", mine], ["PASS", other], entries)
    assert summary.verdict == "NOT QUALIFIED"
    assert [entry.verdict for entry in summary.unmet] == unmet


def test_a_run_that_is_no_release_shows_nothing(tmp_path: Path) -> None:
    summary = two_releases(tmp_path, ["PASS", "SKIPPED"], ["PASS", "PASS"], release=False)
    assert [entry.verdict for entry in summary.unmet] == ["SKIPPED"]


def test_what_another_run_does_not_want_is_shown_by_a_pass_alone(tmp_path: Path) -> None:
    """The second run's list names neither claim: that it met them without a verdict shows nothing."""
    case = "best-onnx-fp32-ort-cpu"
    start = {"release": True, "must_pass": [f"{case}::test_0", f"{case}::test_1"]}
    one = read_record(write_record(tmp_path / "a", one_case("PASS", code=1, **start)))
    lines = second_machine("PASS", "SKIPPED", code=1, release=True, must_pass=[f"{case}::test_0"])
    two = read_record(write_record(tmp_path / "b", lines))
    assert [(entry.claim, entry.verdict) for entry in merge([one, two]).unmet] == [("test_1", "SKIPPED")]


def test_a_format_without_a_claim_is_let_by_where_its_toolchain_is_missing_too(tmp_path: Path) -> None:
    whole = "best-onnx-fp32-ort-cpu::*"
    elsewhere = case_event("best-onnx-fp16-ort-cpu")
    summary = two_releases(tmp_path, ["NOT_SUPPORTED", "SKIPPED", "PASS"], ["NOT_SUPPORTED", "PASS", "PASS"], whole)
    assert summary.verdict == "QUALIFIED", summary.headline
    lines = one_case("NOT_SUPPORTED", "SKIPPED", code=1, release=True, must_pass=[whole])
    claim = claim_event(elsewhere["case"], "test_0", "PASS")
    one = read_record(write_record(tmp_path / "c", [*lines[:-1], elsewhere, claim, lines[-1]]))
    assert merge([one, summary.runs[1]]).verdict == "QUALIFIED"


def test_a_whole_case_without_any_claim_never_ran(tmp_path: Path) -> None:
    lines = one_case("PASS", code=1, release=True, must_pass=["best-onnx-fp16-ort-cpu::*"])
    lines.insert(2, case_event("best-onnx-fp16-ort-cpu"))
    assert [entry.verdict for entry in summarize(tmp_path, lines).unmet] == ["NEVER RAN"]


def test_a_release_run_that_judged_nothing_does_not_hide_behind_another(tmp_path: Path) -> None:
    summary = two_releases(tmp_path, ["SKIPPED"], ["PASS"])
    assert not summary.unmet
    assert summary.verdict == "NOT QUALIFIED" and "on amd-epyc-2c-1a2b3c judged nothing" in summary.headline


def test_a_run_given_twice_is_refused(tmp_path: Path) -> None:
    run = read_record(write_record(tmp_path, one_case("PASS", code=0)))
    with pytest.raises(BadRequest, match="run 20261122-170501-ab12cd is given 2 times"):
        merge([run, run])


@pytest.mark.parametrize(
    ("mine", "other", "code", "verdict"),
    [
        (one_case("PASS", code=0), second_machine("PASS"), 0, "QUALIFIED"),
        (one_case("PASS", code=0), second_machine("FAIL", code=1), 1, "NOT QUALIFIED"),
        (one_case("PASS", code=0), second_machine("PASS")[:-1], 2, "INTERRUPTED"),
        (one_case("FAIL", code=1), None, 1, "NOT QUALIFIED"),
        (one_case("PASS", code=0)[:-1], None, 2, "INTERRUPTED"),
        (one_case("SKIPPED", code=5), None, 5, "NOTHING JUDGED"),
    ],
)
def test_the_command_exits_as_the_verdict_says(
    tmp_path: Path, mine: list[Event], other: list[Event] | None, code: int, verdict: str
) -> None:
    names = [write_record(tmp_path / name, lines).name for name, lines in (("a", mine), ("b", other)) if lines]
    done = command_line(tmp_path, "report", *names, "--output", "out")
    assert (done.returncode, done.stdout.splitlines()[-1].partition(":")[0]) == (code, verdict), done.stderr
    assert (tmp_path / "out" / "report.html").is_file()


# ---- what decided --------------------------------------------------------------------------------------------------


def claim(**more: Any) -> Claim:
    return build(Claim, claim_event("c", "test_x", more.pop("verdict", "FAIL"), **more), "claim")


def test_the_first_hop_that_fails_is_the_culprit() -> None:
    first = comparison(hop="onnx fp32 -> onnx fp16", observed=2.0)
    later = comparison(hop="onnx fp16 -> engine fp16", observed=90.0)
    judged = claim(comparisons=[first, later])
    assert findings.culprit(judged) == "onnx fp32 → onnx fp16"
    assert findings.evidence(judged) == findings.Evidence(
        "max abs of boxes (output0)", "2 px", "≤ 1 px", "2 × the allowed"
    )


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({"observed": 3.2, "allowed": 1.0, "passed": False}, "≤"),
        ({"observed": 0.5, "allowed": 1.0, "passed": True}, "≤"),
        ({"measure": "map", "observed": 0.5, "allowed": 0.9, "passed": False}, "≥"),
        ({"measure": "map", "observed": 0.95, "allowed": 0.9, "passed": True}, "≥"),
        ({"measure": "cosine", "observed": "NaN", "allowed": 0.999, "passed": False}, "≥"),
        ({"observed": "NaN", "allowed": 1.0, "passed": False}, "≤"),
    ],
)
def test_the_direction_of_a_bound_shows_in_its_verdict(changes: Event, bound: str) -> None:
    assert findings.bound(build(Comparison, comparison(**changes), "comparison")) == bound


def test_claims_that_fail_for_one_reason_are_one_finding(tmp_path: Path) -> None:
    summary = summarize(tmp_path, one_case("ERROR", "ERROR", "CRASH", code=1))
    assert [entry.claims for entry in findings.findings(summary)] == [("test_0", "test_1"), ("test_2",)]


def test_pytorch_is_the_first_row_and_the_others_are_relative_to_it(tmp_path: Path) -> None:
    lines = [run_event()]
    for case, centre in (
        ("best-onnx-fp32-ort-cpu", 20.0),
        ("best-onnx-fp16-ort-cpu", 25.0),
        ("best-pytorch-fp32-eager-cpu", 40.0),
    ):
        lines += [case_event(case), claim_event(case, "test_p50_within_baseline", "PASS", **timed(centre))]
    (board,) = latency.boards(summarize(tmp_path, [*lines, end_event(0)]))
    assert [timing.row.case.format for timing in board.timings] == ["pytorch", "onnx", "onnx"]
    assert [timing.speed_up for timing in board.timings] == [1.0, 2.0, 1.6]
    assert [timing.note for timing in board.timings] == ["", "", "slower than fp32: accuracy paid for nothing"]


@pytest.mark.parametrize(("fp16", "spec"), [(20.3, {"batch": 1}), (25.0, {"batch": 1, "dynamic": True})])
def test_fp16_is_called_slower_only_beyond_the_confidence_and_for_the_same_options(
    tmp_path: Path, fp16: float, spec: Event
) -> None:
    lines = [run_event()]
    for case, centre, options in (
        ("best-onnx-fp32-ort-cpu", 20.0, {"batch": 1}),
        ("best-onnx-fp16-ort-cpu", fp16, spec),
    ):
        judged = claim_event(case, "test_p50_within_baseline", "PASS", **timed(centre))
        lines += [case_event(case, spec=options), judged]
    (board,) = latency.boards(summarize(tmp_path, [*lines, end_event(0)]))
    assert [timing.note for timing in board.timings] == ["", ""]


@pytest.mark.parametrize(
    ("share", "low", "high", "told"),
    [(True, 0.995, 0.998, False), (True, 0.97, 0.98, True), (False, -0.001, 0.001, False), (False, 0.006, 0.009, True)],
)
def test_a_metric_that_kept_its_budget_is_not_told_as_what_failed(
    share: bool, low: float, high: float, told: bool
) -> None:
    allowed, middle = 0.99 if share else 0.005, (low + high) / 2
    score = events.Accuracy("F1", {"F1": 0.9}, {"F1": 0.9}, middle, low, high, allowed, share, 400)
    claim = Claim(WHEN, "case", "test_detections_agree_without_labels", "FAIL", "scores differ", accuracy=score)
    assert (findings.evidence(claim) is not None) is told


def test_many_samples_are_thinned_for_the_picture() -> None:
    many = [float(index) for index in range(50_000)]
    assert len(picture.thinned([many, many])) <= picture.ENOUGH + 2
    drawn = picture.latency(claim(**timed(24.0, baseline=20.0, each=10_000)))
    assert "p50 24.00 ms" in drawn and "baseline 2026-11-02: p50 20.00 ms" in drawn and len(drawn) < 20_000


@given(st.lists(st.floats() | st.sampled_from([0.0, 1e-320, 1e308, -1e308]), min_size=1, max_size=8), st.floats())
def test_no_samples_break_the_picture(samples: list[float], point: float) -> None:
    measurement = events.Measurement((tuple(samples),), events.Percentile(point, point, point))
    baseline = events.Baseline(point, processes=(tuple(samples),))
    gate = events.Gate(point, 0.02, point, point)
    picture.latency(Claim("", "c", "t", "FAIL", measurement=measurement, baseline=baseline, gate=gate))
    picture.ratio(gate)


# ---- the four files ------------------------------------------------------------------------------------------------


def hostile_record() -> list[Event]:
    case = "best-onnx-fp16-ort-cpu"
    nasty = {"reason": HOSTILE, "issue": "javascript:alert(1)", "owner": HOSTILE, "expires": HOSTILE}
    damage = {"kind": HOSTILE, "layer": HOSTILE, "size": 0.1, "cap": 0.1, "rejected": False, "by": HOSTILE}
    evil = comparison(
        hop=HOSTILE, feeds=HOSTILE, output=HOSTILE, group=HOSTILE, unit=HOSTILE, measure=HOSTILE, reason=HOSTILE
    )
    measured = timed(24.0, baseline=20.0)
    measured["measurement"] |= {"timer": HOSTILE, "notes": [HOSTILE], "conditions": {HOSTILE: HOSTILE}}
    measured["baseline"] |= {"date": HOSTILE, "path": HOSTILE, "reason": HOSTILE}
    details = measured | {
        "comparisons": [evil, comparison(observed="NaN", max_abs="Infinity", cosine=None)],
        "power": {"statement": HOSTILE, "sensitive": False, "damages": [damage]},
        "waiver": nasty,
        "reproduce": HOSTILE,
    }
    made = hop("onnx fp16") | {"name": HOSTILE, "files": [{"path": HOSTILE, "bytes": 1, "sha256": HOSTILE}]}
    made |= {
        "toolchain": {"name": HOSTILE, "packages": {HOSTILE: HOSTILE}},
        "achieved": {"summary": HOSTILE, "counts": {}},
    }
    return [
        run_event(run=HOSTILE, command=[HOSTILE], machine={"id": HOSTILE, "gpu": HOSTILE}, versions={HOSTILE: HOSTILE})
        | {"release": True, "must_pass": [f"{HOSTILE}::{HOSTILE}"]},
        case_event(case, model=HOSTILE, format=HOSTILE, device=HOSTILE, spec={HOSTILE: [HOSTILE]}, hops=[made])
        | {"case": HOSTILE},
        *(claim_event(HOSTILE, f"test_{word}_{HOSTILE}", word, HOSTILE, **details) for word in VERDICTS),
        end_event(1),
    ]


class Elements(HTMLParser):
    """Collects what a browser would see as elements, attributes and comments."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.comments: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


def written(tmp_path: Path, lines: Iterable[Event]) -> dict[str, str]:
    paths = reports.write([write_record(tmp_path / "run", lines)], tmp_path / "out")
    return {kind: path.read_text(encoding="utf-8") for kind, path in paths.items()}


def parsed(text: str) -> ET.Element:
    return ET.fromstring(text)  # noqa: S314  our own file; a refusal is what the tests look for


def test_hostile_text_is_escaped_in_html(tmp_path: Path) -> None:
    text = written(tmp_path, hostile_record())["html"]
    # Looked for in the raw text as well: an unescaped <!-- would hide what follows it from the parser.
    assert "<script>alert" not in text
    assert "<!--" not in text
    page = Elements(text)
    assert [attributes for tag, attributes in page.seen if tag == "script"] == [{}]  # our own, and no other
    assert page.comments == []
    for _, attributes in page.seen:
        assert not any(name.startswith("on") for name in attributes)
        assert not (attributes.get("href") or "").startswith("javascript:")


def test_hostile_text_is_escaped_in_markdown(tmp_path: Path) -> None:
    text = written(tmp_path, hostile_record())["markdown"]
    blocks = re.sub(r"^  (`{3,})sh\n.*?^  \1$", "CODE", text, flags=re.DOTALL | re.MULTILINE)
    unescaped = re.sub(r"\\[^\w\s]", "", blocks)
    outside_code = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "CODE", unescaped)
    assert not re.search(r"<(?!!-- -->)", outside_code)
    assert "@team" not in outside_code and "#12" not in outside_code and "](javascript" not in outside_code
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in rows[:2]}
    assert len(widths) == 1, "a bar in a name would add a column"


def test_hostile_text_leaves_valid_xml_and_json(tmp_path: Path) -> None:
    texts = written(tmp_path, hostile_record())
    parsed(texts["junit"])
    json.loads(texts["json"], parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    for text in texts.values():
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)


def test_the_html_loads_nothing_from_outside(tmp_path: Path) -> None:
    text = written(tmp_path, every_verdict())["html"]
    for _, attributes in Elements(text).seen:
        assert "src" not in attributes and "srcset" not in attributes and "action" not in attributes
    assert "@import" not in text and "url(" not in text and "fetch(" not in text and "XMLHttp" not in text
    outside = {
        (tag, attributes["href"])
        for tag, attributes in Elements(text).seen
        if (attributes.get("href") or "#")[0] != "#"
    }
    assert outside == {("link", "data:,"), ("a", WAIVER["issue"])}


def test_the_html_opens_with_the_verdict_and_leads_from_each_field_to_its_details(tmp_path: Path) -> None:
    text = written(tmp_path, every_verdict())["html"]
    assert text.index("NOT QUALIFIED</h1>") < text.index("What failed") < text.index('class="matrix"')
    page = Elements(text)
    targets = {attributes["id"] for _, attributes in page.seen if "id" in attributes}
    links = {(attributes.get("href") or "")[1:] for tag, attributes in page.seen if tag == "a" and "href" in attributes}
    assert {link for link in links if link.startswith(("c", "r"))} <= targets
    assert sum(link.startswith("c0-") for link in links) == len(VERDICTS)


def test_the_html_shows_what_was_observed_and_allowed(tmp_path: Path) -> None:
    text = written(tmp_path, every_verdict())["html"]
    first = text[text.index('<article class="finding"') : text.index("</article>")]
    for piece in (
        "3.21 px",
        "≤ 1 px",
        "3.21 × the allowed",
        "what FAIL says",
        "pytorch fp32 → onnx fp16",
        "--claim test_",
    ):
        assert piece in first
    for piece in (
        "9d41c2be9d41<",
        "63 of 63 convolutions",
        "went unnoticed",
        "a slow-down of 4.5 %",
        "claim insensitive",
    ):
        assert piece in text


def test_the_html_stands_what_a_record_need_not_have(tmp_path: Path) -> None:
    score = {"metric": "F1", "artifact": {}, "reference": {}, "change": None, "low": None, "high": None}
    score |= {"allowed": 0.1, "share": False, "images": 0}
    case = "best-onnx-fp32-ort-cpu"
    lines = [run_event(machine={"id": "m"}), case_event(case), claim_event(case, "test_x", "FAIL", accuracy=score)]
    assert "F1" in html.render(summarize(tmp_path, lines))


def test_the_html_shows_the_layers_of_an_engine(tmp_path: Path) -> None:
    page = html.render(summarize(tmp_path, every_verdict()))
    assert "3 layers · int8 1 (0.0210 ms) · fp16 1 (0.0110 ms) · reformat 1 (0.0040 ms)" in page
    for layer in LAYERS:
        assert layer["name"] in page and layer["kind"] in page


@pytest.mark.parametrize("url", ["javascript:alert(1)", "data:text/html,x", "//evil", "https:", "http://[", "issue 7"])
def test_only_web_addresses_become_links(url: str) -> None:
    assert html.link(url) == ""


def test_junit_has_a_test_for_each_claim(tmp_path: Path) -> None:
    root = parsed(written(tmp_path, every_verdict())["junit"])
    counts = {name: int(root.get(name, "")) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": 13, "failures": 3, "errors": 3, "skipped": 5}
    found = root.find("./testsuite[@name='best-onnx-fp16-ort-cpu']/testcase[@name='claim fail']/failure")
    assert found is not None and found.get("message") == "FAIL: what FAIL says"
    assert "observed 3.21 px, allowed ≤ 1 px" in (found.text or "")


def test_junit_is_red_for_a_must_pass_claim_without_a_pass(tmp_path: Path) -> None:
    wanted = ["best-onnx-fp32-ort-cpu::test_1", "elsewhere::test_2"]
    lines = one_case("PASS", "NO_BASELINE", code=1, release=True, must_pass=wanted)
    root = parsed(written(tmp_path, lines)["junit"])
    assert {node.get("type") for node in root.iter("failure")} == {"NO_BASELINE", "NEVER_RAN"}


@pytest.mark.parametrize(
    "lines", [one_case("PASS", code=0)[:-1], one_case("SKIPPED", code=5), one_case("PASS", code=1)]
)
def test_junit_is_red_for_a_run_that_proves_nothing(tmp_path: Path, lines: list[Event]) -> None:
    assert parsed(written(tmp_path, lines)["junit"]).get("errors") == "1"


def test_json_has_the_numbers_without_the_raw_samples(tmp_path: Path) -> None:
    result = json.loads(written(tmp_path, every_verdict())["json"])
    assert result["verdict"] == "NOT QUALIFIED" and result["counts"] == dict.fromkeys(VERDICTS, 1)
    (case,) = result["cases"]
    (timing,) = [entry for entry in case["claims"] if entry["verdict"] == "INCONCLUSIVE"]
    assert timing["measurement"]["samples"] == [60] * 5 and "processes" not in timing["measurement"]
    assert timing["gate"]["mde"] == 0.045


def test_the_time_of_a_report_grows_with_its_cases_and_the_markdown_stays_small(tmp_path: Path) -> None:
    measured = timed(24.0, baseline=20.0)

    def taken(cases: int) -> tuple[float, dict[str, Path]]:
        lines = [run_event()]
        for index in range(cases):
            case = f"model{index}-onnx-fp16-ort-cpu"
            lines.append(case_event(case))
            words = ["FAIL" if index % 5 == 0 else "PASS", *["PASS"] * 10]
            lines += [
                claim_event(
                    case, f"test_claim_{column}", word, "0.4 px", comparisons=[comparison(), comparison()], power=POWER
                )
                for column, word in enumerate(words)
            ]
            lines.append(claim_event(case, "test_p50_within_baseline", "PASS", **measured))
        folder = write_record(tmp_path / f"run{cases}", [*lines, end_event(1)])
        start = time.process_time()  # a wall clock would count what else the machine does
        paths = reports.write([folder], tmp_path / f"out{cases}")
        return time.process_time() - start, paths

    taken(10)  # what is imported and compiled at the first use
    few, _ = taken(100)
    many, paths = taken(500)
    assert many < 10 * few, "five times as many cases: 25 times the time would be each looked at for each other"
    text = paths["markdown"].read_bytes()
    assert len(text) < 60_000
    assert b"more cases; the HTML report has all of them" in text


def test_long_hostile_names_do_not_make_the_markdown_long(tmp_path: Path) -> None:
    long = "`|<@" * 5_000
    claims = [claim_event(long + str(index), f"test_{index}{long}", "FAIL", long, **timed(2.0)) for index in range(100)]
    folder = write_record(tmp_path, [run_event(run=long, machine={"id": long}), *claims, end_event(1)])
    assert len(markdown.render(merge([read_record(folder)])).encode()) < markdown.LIMIT


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file in the way")
    folder = write_record(tmp_path / "run", every_verdict())
    with pytest.raises(BadRequest, match=r"cannot write the report into .*out") as caught:
        reports.write([folder], tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_writing_again_replaces_the_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = write_record(tmp_path / "run", every_verdict())
    reports.write([folder, write_record(tmp_path / "other", second_machine("PASS"))], tmp_path / "out")
    assert (tmp_path / "out" / "record-2.jsonl").is_file()
    paths = reports.write([folder], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "record-1.jsonl",
        "report.html",
        "report.json",
        "report.md",
        "report.xml",
    ]
    assert set(paths) == {"html", "markdown", "junit", "json"}


def test_a_report_is_made_again_of_the_records_beside_it(tmp_path: Path) -> None:
    runs = [
        write_record(
            tmp_path / f"run{n}", one_case("PASS", code=0, run=f"20261122-1705{n:02}", machine={"id": f"m{n}"})
        )
        for n in range(11)
    ]
    first = {kind: path.read_bytes() for kind, path in reports.write(runs, tmp_path / "out").items()}
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    again = reports.write([tmp_path / "elsewhere"], tmp_path / "elsewhere")
    assert {kind: path.read_bytes() for kind, path in again.items()} == first
    # The order is the one that is asked for, also where a copy takes another one's name.
    copies = [tmp_path / "elsewhere" / f"record-{n}.jsonl" for n in (11, 1)]
    records = json.loads(reports.write(copies, tmp_path / "elsewhere")["json"].read_text(encoding="utf-8"))["runs"]
    assert [(run["run"], run["record"]) for run in records] == [
        ("20261122-170510", "record-1.jsonl"),
        ("20261122-170500", "record-2.jsonl"),
    ]
    assert not copies[0].exists()


def test_a_folder_of_a_run_keeps_its_own_report(tmp_path: Path) -> None:
    one = write_record(tmp_path / "a", one_case("PASS", code=0))
    two = write_record(tmp_path / "b", second_machine("FAIL", code=1))
    reports.write([one], one)
    before = {path.name: path.read_bytes() for path in one.iterdir()}
    for runs in ([one, two], [two]):
        with pytest.raises(BadRequest, match=r"a' is the folder of a run.*--output"):
            reports.write(runs, one)
    assert {path.name: path.read_bytes() for path in one.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "reads"),
    [
        ("test_outputs_match_reference", "outputs match reference"),
        ("test_p50_within_baseline", "p50 within baseline"),
        ("test_batch_rows_agree[min_opt]", "batch rows agree [min_opt]"),
    ],
)
def test_names_of_claims_read_as_sentences(name: str, reads: str) -> None:
    assert wording.sentence(name) == reads


@pytest.mark.parametrize(
    ("told", "reads"),
    [
        ("2026-11-22T19:05:01+02:00", "2026-11-22 17:05 UTC"),
        ("yesterday", "yesterday"),
        ("0001-01-01T00:00:00+10:00", "0001-01-01T00:00:00+10:00"),
    ],
)
def test_a_time_that_cannot_be_read_stays_as_it_is(told: str, reads: str) -> None:
    assert wording.moment(told) == reads
