"""Baselines as files: what no measurement gives is refused in one line, whoever wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.errors import BadRequest
from suites import cli
from suites.accuracy import test_accuracy
from suites.cli_baseline import AGAINST_BASELINE
from suites.performance import test_latency
from suites.selftest.conftest import ROOT
from suites.support.acceptance import check
from suites.support.baseline import read_baseline
from suites.support.config import find_project

CASE = "two-onnx-fp32-ort-cpu.b8"
GOOD: dict[str, Any] = {
    "case": CASE,
    "machine": "quiet-2c",
    "date": "2026-11-23",
    "reason": "first",
    "accuracy": {"metric": "mAP50-95", "value": 0.5, "reference": 0.5, "pictures": "0" * 64},
    "comparable": {"cores": 2},
    "conditions": {"artifact MiB": 10.0, "load ms": 20.0, "peak memory MiB": 300.0},
    "milliseconds": [[1.0, 1.1], [1.0, 1.2]],
}
METRIC = GOOD["accuracy"]


def stored(folder: Path, text: str, case: str = CASE) -> Path:
    path = folder / "quiet-2c" / f"{case}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_good_baseline_is_read(tmp_path: Path) -> None:
    found = read_baseline(stored(tmp_path, json.dumps(GOOD)))
    assert found is not None and found.p50 == pytest.approx(1.075) and found.figures == GOOD["conditions"]
    for empty in ({"accuracy": None}, {"conditions": {"artifact MiB": 0.0}}):
        assert read_baseline(stored(tmp_path, json.dumps(GOOD | empty))) is not None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"milliseconds": [[-1.0] * 3, [-1.1] * 3]},
            "milliseconds = -1.0, expected a finite number",
        ),
        ({"milliseconds": [[1.0, 0.0], [1.0, 1.0]]}, "milliseconds = 0, expected more than 0"),
        ({"milliseconds": [[1.0, float("nan")], [1.0, 1.0]]}, "milliseconds = nan"),
        ({"milliseconds": [[1.0, float("inf")], [1.0, 1.0]]}, "milliseconds = inf"),
        ({"milliseconds": [[10**400], [1.0]]}, "expected a finite number"),
        ({"milliseconds": ["12", "11"]}, "milliseconds = ['12', '11'], expected a list for each process"),
        ({"milliseconds": [["1.0"], [1.0]]}, "milliseconds = '1.0'"),
        ({"milliseconds": [[True], [1.0]]}, "milliseconds = True"),
        ({"milliseconds": [[], [1.0]]}, "none of them empty"),
        ({"milliseconds": []}, "milliseconds = []"),
        ({"milliseconds": None}, "milliseconds = None, expected a list"),
        ({"conditions": []}, "conditions = [], expected an object"),
        ({"conditions": None}, "conditions = None, expected an object"),
        ({"conditions": {"artifact MiB": float("nan")}}, "artifact MiB = nan"),
        ({"conditions": {"load ms": "20"}}, "load ms = '20'"),
        ({"conditions": {"peak memory MiB": -1.0}}, "peak memory MiB = -1.0"),
        ({"comparable": [["cores", 2]]}, "comparable = [['cores', 2]], expected an object"),
        ({"accuracy": []}, "accuracy = []"),
        ({"accuracy": METRIC | {"value": float("nan")}}, "accuracy value = nan"),
        ({"accuracy": METRIC | {"reference": 86.1}}, "accuracy = 86.1"),
        ({"accuracy": METRIC | {"pictures": None}}, "pictures = None"),
        ({"date": "soon"}, "soon"),
        ({"reason": 7}, "reason = 7"),
        ({"case": "other-onnx-fp32-ort-cpu"}, "it is of case 'other-onnx-fp32-ort-cpu', and its path says"),
        ({"machine": "another"}, "it is of machine 'another', and its path says 'quiet-2c'"),
    ],
)
def test_what_no_measurement_gives_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    """A negative sample would let every candidate pass, and beyond a size of nan nothing has grown."""
    path = stored(tmp_path, json.dumps(GOOD | change))
    with pytest.raises(BadRequest) as refused:
        read_baseline(path)
    assert says in refused.value.what and str(path) in refused.value.what


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.write_text("[]"), "it is [], expected an object"),
        (lambda path: path.write_text("[" * 100_000), "nested too deeply"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "codec can't decode"),
        (_folder, "Is a directory"),
        (_link, "No such file"),
    ],
    ids=["a list", "nested", "no text", "a folder", "a broken link"],
)
def test_a_file_that_is_no_baseline_is_one_line(
    spoil: Callable[[Path], Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "exportgate.toml").write_text("")
    spoil(stored(tmp_path / "baselines", json.dumps(GOOD)))
    assert cli.main(["baseline", "show", "--project", str(tmp_path)]) == 4
    told = capsys.readouterr().err
    assert says in told and "cannot be read" in told and len(told.splitlines()) == 1


MEASURED: dict[str, Any] = {
    "processes": [[1.0] * 20, [1.001] * 20],
    "p50": None,
    "throttled": False,
    "conditions": {"artifact MiB": 10.0, "load ms": 20.0, "machine": "quiet-2c", "comparable": {"cores": 2}},
}
CONDITIONS = MEASURED["conditions"]
OTHER = "other-onnx-fp32-ort-cpu"


def recorded(folder: Path, *claims: dict[str, Any]) -> Path:
    """A run's record of these claims; those that name no case are of CASE."""
    run = folder / "run"
    run.mkdir(exist_ok=True)
    start = {"event": "run", "schema": 1, "run": "r", "time": "t", "command": [], "machine": {"id": "quiet-2c"}}
    plain = {"event": "claim", "time": "t", "case": CASE, "claim": "test_p50_within_baseline", "verdict": "PASS"}
    lines = [start, *(plain | c for c in claims), {"event": "end", "time": "t", "exit": 0}]
    (run / "record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "exportgate.toml").write_text("")
    return run


def baseline(folder: Path, *words: str) -> int:
    return cli.main(["baseline", *words, "--project", str(folder)])


@pytest.mark.parametrize(
    ("identity", "change", "says"),
    [
        (CASE, {"conditions": CONDITIONS | {"machine": "../../../up"}}, "the machine '../../../up'"),
        (CASE, {"conditions": CONDITIONS | {"machine": ".."}}, "the machine '..'"),
        ("../../../escaped", {}, "the case '../../../escaped'"),
        ("", {}, "the case ''"),
        (CASE, {"conditions": {"machine": "quiet-2c"}}, "comparable = None, expected an object"),
        (CASE, {"conditions": CONDITIONS | {"comparable": ["cores"]}}, "comparable = ('cores',), expected an object"),
        (CASE, {"conditions": CONDITIONS | {"artifact MiB": "large"}}, "artifact MiB = 'large'"),
        (CASE, {"processes": [[1.0, "NaN"], [1.0, 1.0]]}, "milliseconds = nan"),
        (CASE, {"processes": [[1.0, 0.0], [1.0, 1.0]]}, "milliseconds = 0"),
        (CASE, {"processes": [[1.0, -1.0], [1.0, 1.0]]}, "milliseconds = -1.0"),
        (CASE, {"processes": [[1.0], []]}, "none of them empty"),
        (CASE, {"processes": []}, "milliseconds = []"),
    ],
)
@pytest.mark.parametrize("words", [("accept", "--reason", "r"), ("diff",)], ids=["accept", "diff"])
def test_a_record_that_no_run_writes_leaves_everything_as_it_was(
    identity: str,
    change: dict[str, Any],
    says: str,
    words: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A good case stands before the bad one: neither becomes a baseline, and nothing lands outside the folder."""
    project = tmp_path / "a" / "b"
    project.mkdir(parents=True)
    good = {"case": OTHER, "measurement": MEASURED}
    run = recorded(project, good, {"case": identity, "measurement": MEASURED | change})
    files = sorted(tmp_path.rglob("*"))
    assert baseline(project, *words, str(run)) == 4
    told = capsys.readouterr().err
    assert says in told and len(told.splitlines()) == 1, told
    assert sorted(tmp_path.rglob("*")) == files


def labels(value: float, pictures: str = "0" * 64) -> dict[str, Any]:
    """The claim that a metric was judged by."""
    metric = {"metric": "mAP50-95", "artifact": {"mAP50-95": value}, "reference": {"mAP50-95": 0.5}, "images": 40}
    interval = {"change": 0, "low": 0, "high": 0, "allowed": 0.01, "share": False, "pictures": pictures}
    return {"claim": "test_accuracy_against_labels", "accuracy": metric | interval}


LARGER = MEASURED | {"conditions": CONDITIONS | {"artifact MiB": 12.0, "load ms": 90.0, "peak memory MiB": 400.0}}


def test_what_grew_on_purpose_is_accepted_and_says_what_was_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The claims that hold a case against its baseline fail, since it is that baseline which is to be replaced."""
    path = stored(tmp_path / "baselines", json.dumps(GOOD))
    grown = [{"claim": name, "verdict": "FAIL"} for name in AGAINST_BASELINE[1:]]
    run = recorded(tmp_path, {"measurement": LARGER, "verdict": "INCONCLUSIVE"}, labels(0.45), *grown)
    changes = [
        "  artifact MiB: 10 in the baseline, 12 here (+20.0%)",
        "  load ms: 20 in the baseline, 90 here (+350.0%)",
        "  peak memory MiB: 300 in the baseline, 400 here (+33.3%)",
        "  mAP50-95: 0.5 in the baseline, 0.45 here (-0.0500)",
    ]
    assert baseline(tmp_path, "diff", str(run)) == 0
    assert capsys.readouterr().out.splitlines()[1:] == changes
    assert baseline(tmp_path, "accept", str(run), "--reason", "a wider neck") == 0
    assert capsys.readouterr().out.splitlines()[1:] == changes
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["before"] == {"date": "2026-11-23", "p50": pytest.approx(1.075), **GOOD["conditions"], "mAP50-95": 0.5}
    assert data["p50"] == 1.0005 and data["conditions"]["artifact MiB"] == 12.0 and data["accuracy"]["value"] == 0.45
    assert baseline(tmp_path, "diff", str(run)) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_what_else_differs_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored(tmp_path / "baselines", json.dumps(GOOD | {"conditions": {"load ms": 20.0}}))
    assert baseline(tmp_path, "diff", str(recorded(tmp_path, {"measurement": MEASURED}, labels(0.5, "1" * 64)))) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  artifact MiB: none in the baseline, 10 here",
        "  mAP50-95: 0.5 in the baseline, 0.5 here (+0.0000) on other pictures",
    ]


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [("test_outputs_match_reference", "FAIL"), *((name, "CRASH") for name in AGAINST_BASELINE[1:])],
)
def test_a_case_that_fails_otherwise_is_not_accepted(
    claim: str, verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recorded(tmp_path, {"measurement": MEASURED}, {"claim": claim, "verdict": verdict})
    assert baseline(tmp_path, "accept", str(run), "--reason", "r") == 4
    assert f"failed {claim}" in capsys.readouterr().err


def test_the_claims_against_a_baseline_are_claims() -> None:
    """One that is renamed would be in the way of what grew on purpose again."""
    assert all(any(hasattr(module, name) for module in (test_accuracy, test_latency)) for name in AGAINST_BASELINE)


@pytest.mark.parametrize(
    ("delta", "count", "cv", "accepted"),
    [
        # 0.02 + 2.8 * 0.15 * sqrt(1/10 + 1/10) = 0.21: what the gate could find was ten times what is let pass.
        (0.02, 10, 0.149, False),
        # 2.8 * CV * sqrt(1/10 + 1/50) = 0.02 at a CV of 2.06 %
        (0.02, 10, 0.020, True),
        (0.02, 10, 0.021, False),
        # 2.8 * CV * sqrt(1/5 + 1/25) = 0.02 at a CV of 1.46 %
        (0.02, 5, 0.014, True),
        (0.02, 5, 0.015, False),
        (0.5, 4, 0.149, True),
        (0.5, 4, 0.160, False),
    ],
)
def test_a_measurement_has_to_notice_twice_what_is_let_pass(
    delta: float, count: int, cv: float, accepted: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beyond, an unchanged artifact would often be INCONCLUSIVE."""
    spread = np.linspace(-1, 1, count)
    processes = [[float(x)] * 20 for x in 100 * (1 + cv * spread / np.std(spread, ddof=1))]
    run = recorded(tmp_path, {"measurement": MEASURED | {"processes": processes}})
    (tmp_path / "exportgate.toml").write_text(f"[latency]\ndelta = {delta}\nprocesses = {count}\n")
    assert baseline(tmp_path, "accept", str(run), "--reason", "r") == (0 if accepted else 4)
    assert accepted or f"{count} processes differ by {cv:.1%}" in capsys.readouterr().err


def test_a_gpu_is_held_to_its_own_delta(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu = {"conditions": CONDITIONS | {"comparable": {"gpu name": "none"}}, "processes": [[1.0] * 20, [1.1] * 20]}
    run = recorded(tmp_path, {"measurement": MEASURED | gpu})
    (tmp_path / "exportgate.toml").write_text("[latency]\ndelta = 0.5\n[latency.cuda]\ndelta = 0.02\n")
    assert baseline(tmp_path, "accept", str(run), "--reason", "r") == 4
    assert "delta = 0.02 asks for 4.0%" in capsys.readouterr().err


@pytest.mark.skipif(not (ROOT / "baselines").is_dir(), reason="our baselines are not part of a wheel")
def test_our_own_baselines_are_as_quiet_as_our_own_gate_needs() -> None:
    project = find_project(None, ROOT)
    found = [b for path in sorted(project.baselines.glob("*/*.json")) if (b := read_baseline(path))]
    assert len(found) > 10
    for one in found:
        check(one, None, project.latency_on(one.device))


def test_a_metric_that_the_record_lacks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judged = labels(0.5)
    judged["accuracy"]["artifact"] = {}
    run = recorded(tmp_path, {"measurement": MEASURED}, judged)
    assert baseline(tmp_path, "accept", str(run), "--reason", "r") == 4
    assert "accuracy value = None" in capsys.readouterr().err
    assert not (tmp_path / "baselines").exists()


def test_where_one_baseline_cannot_be_written_none_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second one's folder is a file."""
    elsewhere = MEASURED | {"conditions": CONDITIONS | {"machine": "blocked"}}
    run = recorded(tmp_path, {"case": OTHER, "measurement": MEASURED}, {"measurement": elsewhere})
    (tmp_path / "baselines").mkdir()
    (tmp_path / "baselines" / "blocked").write_text("")
    assert baseline(tmp_path, "accept", str(run), "--reason", "r") == 4
    assert "cannot be written" in capsys.readouterr().err
    assert not list((tmp_path / "baselines").glob("*/*"))


def test_where_the_last_cannot_take_its_place_the_others_are_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three the first had one, the second had none, and the third's folder can take no more."""
    run = recorded(tmp_path, {"measurement": MEASURED})
    assert baseline(tmp_path, "accept", str(run), "--reason", "first") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "baselines").glob("*/*")}
    run = recorded(tmp_path, *({"case": c, "measurement": MEASURED} for c in (CASE, OTHER, "last-onnx-fp32-ort-cpu")))
    replace = Path.replace

    def full(path: Path, target: Path) -> Path:
        if path.name.startswith("last"):
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    assert baseline(tmp_path, "accept", str(run), "--reason", "second") == 4
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "baselines").glob("*/*")}


def test_what_is_accepted_is_read_again(tmp_path: Path) -> None:
    run = recorded(tmp_path, {"measurement": MEASURED}, {"case": "a b-onnx-fp32-ort-cpu", "measurement": MEASURED})
    assert baseline(tmp_path, "accept", str(run), "--reason", "first") == 0
    found = read_baseline(tmp_path / "baselines" / "quiet-2c" / f"{CASE}.json")
    assert found is not None and found.reason == "first" and found.p50 == pytest.approx(1.0005)
    assert baseline(tmp_path, "show") == baseline(tmp_path, "diff", str(run)) == 0
