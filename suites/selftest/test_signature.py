"""Signed reports, with real keys of ssh-keygen: what was changed since is found, whatever it is."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporters.errors import BadRequest
from reports import signature
from suites.selftest.conftest import command_line
from suites.selftest.test_bad_input import assert_refused, run
from suites.selftest.test_report import case_event, claim_event, end_event, hop, run_event, write_record

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="there is no ssh-keygen here")
CASE = "best-onnx-fp32-ort-cpu"
WAIVER = {
    "reason": "rounds twice",
    "issue": "https://example.com/12",
    "owner": "jane",
    "expires": "2027-01-31",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with one artifact, two keys, and a file of allowed signers that names the first key jane's."""
    artifact = tmp_path / "cache" / "best.onnx"
    artifact.parent.mkdir()
    artifact.write_bytes(b"a graph and its weights")
    digest = hashlib.sha256(artifact.read_bytes()).hexdigest()
    last = hop("onnx fp32") | {"files": [{"path": artifact.name, "bytes": 23, "sha256": digest}]}
    events = [
        run_event(),
        case_event(CASE, hops=[hop("pytorch fp32"), last], artifact=str(artifact.parent)),
        claim_event(CASE, "test_outputs_match_reference", "PASS"),
        claim_event(CASE, "test_detections_match_reference", "WAIVED", "lost one", waiver=WAIVER),
        end_event(0),
    ]
    made = tmp_path / "run"
    made.mkdir()
    (made / "record.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events), encoding="utf-8")
    for name in ("jane", "joe"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(tmp_path / name)]
        subprocess.run(words, check=True)
    public = (tmp_path / "jane.pub").read_text(encoding="ascii")
    (tmp_path / "signers").write_text(f"jane {public}", encoding="ascii")
    return tmp_path


def signed(folder: Path, key: str = "jane") -> None:
    done = run(["sign", "run", "--key", key, "--who", "jane"], folder)
    assert done.returncode == 0, done.stderr
    assert "signed by jane: QUALIFIED: 0 of 2 claims failed" in done.stdout


def test_a_signed_report_says_who_and_when_and_is_verified(folder: Path) -> None:
    assert run(["report", "run"], folder).returncode == 0
    page, text = folder / "run" / "report.html", folder / "run" / "report.md"
    assert "Not signed" in page.read_text(encoding="utf-8") and "Not signed" in text.read_text(encoding="utf-8")
    signed(folder)
    told = json.loads((folder / "run" / "statement.json").read_text(encoding="utf-8"))
    assert told["verdict"] == "QUALIFIED" and told["waivers"][0]["owner"] == "jane"
    assert f"Signed by <b>jane, {told['when']}" in page.read_text(encoding="utf-8")
    assert "Signed by jane" in text.read_text(encoding="utf-8")
    assert run(["report", "run"], folder).returncode == 0  # written again they are the same
    for more in ([], ["--signers", "signers"]):
        done = run(["verify", "run", *more], folder)
        assert done.returncode == 0 and "VERIFIED: 0 of 8 checks failed" in done.stdout, done.stdout
        assert ("name the allowed signers" in done.stdout) is (not more)


def _one_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _another_verdict(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8").replace("QUALIFIED", "NOT QUALIFIED", 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("run/record.jsonl", _one_byte, "FAIL record.jsonl of the report was changed"),
        ("run/report.html", _one_byte, "FAIL report.html of the report was changed"),
        ("run/report.xml", Path.unlink, "FAIL report.xml of the report is not there any more"),
        ("cache/best.onnx", _one_byte, f"FAIL best.onnx of case {CASE} was changed"),
        ("cache/best.onnx", Path.unlink, f"FAIL best.onnx of case {CASE} is not there any more"),
        ("run/statement.json", _another_verdict, "FAIL the signature does not hold for jane"),
    ],
)
@pytest.mark.parametrize("signers", [[], ["--signers", "signers"]])
def test_what_was_changed_since_is_found(
    folder: Path, name: str, change: Callable[[Path], object], words: str, signers: list[str]
) -> None:
    signed(folder)
    change(folder / name)
    done = run(["verify", "run", *signers], folder)
    assert done.returncode == 1
    # Nothing that a statement speaks of is looked at where its own signature does not hold.
    checks = 1 if name.endswith("statement.json") else 8
    assert words in done.stdout and f"NOT VERIFIED: 1 of {checks} checks failed" in done.stdout


def test_what_was_signed_is_told_and_a_verdict_that_failed_is_no_leave_to_deploy(folder: Path) -> None:
    signed(folder)
    done = run(["verify", "run", "--artifact", "cache/best.onnx"], folder)
    assert done.returncode == 0
    when = json.loads((folder / "run" / "statement.json").read_text(encoding="utf-8"))["when"]
    assert done.stdout.splitlines()[:2] == [
        f"signed by jane, {when}: QUALIFIED: 0 of 2 claims failed; 1 PASS, 1 WAIVED; 1 case",
        f"waived until 2027-01-31: {CASE} test_detections_match_reference: rounds twice (jane, https://example.com/12)",
    ]
    record = folder / "run" / "record.jsonl"
    record.write_text(record.read_text(encoding="utf-8").replace('"PASS"', '"FAIL"'), encoding="utf-8")
    assert (
        run(["sign", "run", "--key", "jane", "--who", "jane"], folder).returncode == 0
    )  # who signs that it failed may
    done = run(["verify", "run", "--artifact", "cache/best.onnx", "--signers", "signers"], folder)
    assert done.returncode == 1
    assert ": NOT QUALIFIED: 1 of 2 claims failed (1 FAIL)" in done.stdout.splitlines()[0]
    assert "FAIL the verdict that was signed is NOT QUALIFIED" in done.stdout
    assert done.stdout.splitlines()[-1] == "NOT VERIFIED: 1 of 9 checks failed"


def test_a_signature_that_does_not_hold_tells_nothing(folder: Path) -> None:
    signed(folder)
    _another_verdict(folder / "run" / "statement.json")
    done = run(["verify", "run"], folder)
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 2, done.stdout


def test_somebody_elses_key_does_not_count(folder: Path) -> None:
    signed(folder, "joe")
    done = run(["verify", "run", "--signers", "signers"], folder)
    assert done.returncode == 1 and "the signature does not hold for jane" in done.stdout


def test_a_file_is_among_those_that_were_judged_wherever_it_lies(folder: Path) -> None:
    signed(folder)
    shutil.move(folder / "cache" / "best.onnx", folder / "deployed.onnx")
    assert run(["verify", "run", "--artifact", "deployed.onnx"], folder).returncode == 0
    _one_byte(folder / "deployed.onnx")
    done = run(["verify", "run", "--artifact", "deployed.onnx"], folder)
    assert done.returncode == 1 and "'deployed.onnx' is none of the files that were judged" in done.stdout


def two_machines(folder: Path) -> Path:
    """The merged report of the run and of another machine's, whose artifact is not here; only it is left of them."""
    artifact = [{"path": "best.engine", "bytes": 9, "sha256": hashlib.sha256(b"an engine").hexdigest()}]
    case = "best-engine-fp16-trt-cuda"
    events = [
        run_event(run="20261122-180000-ffee00", machine={"id": "nvidia-h100", "gpu": "NVIDIA H100"}),
        case_event(case, hops=[hop("engine fp16") | {"files": artifact}], artifact="/runner/cache/1"),
        claim_event(case, "test_outputs_match_reference", "PASS"),
        end_event(0),
    ]
    write_record(folder / "gpu", events)
    done = run(["report", "run", "gpu", "--output", "merged"], folder)
    assert done.returncode == 0 and "on 2 machines" in done.stdout, done.stderr
    shutil.rmtree(folder / "run")
    shutil.rmtree(folder / "gpu")
    return folder / "merged"


def test_a_merged_report_is_signed_and_verified_without_its_runs(folder: Path) -> None:
    merged = two_machines(folder)
    text = (merged / "report.json").read_bytes()
    done = run(["report", "merged"], folder)
    assert done.returncode == 0 and (merged / "report.json").read_bytes() == text  # made of the copies beside it
    done = run(["sign", "merged", "--key", "jane", "--who", "jane"], folder)
    assert done.returncode == 0 and "signed by jane: QUALIFIED: 0 of 3 claims failed" in done.stdout, done.stderr
    told = json.loads((merged / "statement.json").read_text(encoding="utf-8"))
    assert len(told["runs"]) == 2 and {"record-1.jsonl", "record-2.jsonl", "report.html"} < set(told["files"])
    assert "Signed by jane" in (merged / "report.md").read_text(encoding="utf-8")
    assert run(["report", "."], merged).returncode == 0  # from another folder they are the same
    done = run(["verify", "merged", "--signers", "signers"], folder)
    assert done.returncode == 0 and "VERIFIED: 0 of 9 checks failed" in done.stdout, done.stdout
    assert "1 of 2 files that were judged were not there when it was signed" in done.stdout
    (folder / "deployed.engine").write_bytes(b"an engine")
    assert run(["verify", "merged", "--artifact", "deployed.engine"], folder).returncode == 0
    _one_byte(merged / "record-2.jsonl")
    done = run(["verify", "merged"], folder)
    assert done.returncode == 1 and "FAIL record-2.jsonl of the report was changed" in done.stdout


def said_of_its_signature(report: Path) -> str:
    """What a report says of its signature, on each of its pages the same."""
    told = json.loads((report / "report.json").read_text(encoding="utf-8"))
    said = f"Signed by {told['signed']}" if told["signed"] else "Not signed"
    if told["signature_wrong"]:
        assert told["signed"] is None
        said = f"The signature in this folder {told['signature_wrong']}"
    others = [w for w in ("The signature in this folder", "Not signed", "Signed by") if not said.startswith(w)]
    for name in ("report.html", "report.md"):
        page = (report / name).read_text(encoding="utf-8").replace("<b>", "")
        assert said in page and not any(words in page for words in others), name
    return said


def test_a_record_that_was_changed_is_not_signed_by_who_signed_it_before(folder: Path) -> None:
    record = folder / "run" / "record.jsonl"
    good = record.read_text(encoding="utf-8")
    record.write_text(good.replace('"PASS"', '"FAIL"'), encoding="utf-8")
    assert run(["sign", "run", "--key", "jane", "--who", "jane"], folder).returncode == 0
    assert run(["report", "run"], folder).returncode == 1
    assert said_of_its_signature(folder / "run").startswith("Signed by jane, ")
    record.write_text(good, encoding="utf-8")
    assert run(["report", "run"], folder).returncode == 0
    assert said_of_its_signature(folder / "run") == "The signature in this folder is not of this record"


@pytest.mark.parametrize("how", ["empty", "for another purpose", "of other words", "no statement"])
def test_a_name_that_nobody_signed_is_no_signature(folder: Path, how: str) -> None:
    signed(folder)
    path, beside = (folder / "run" / f"statement.json{end}" for end in ("", ".sig"))
    said = "does not hold"
    if how == "empty":
        beside.write_bytes(b"")
    elif how == "for another purpose":
        beside.unlink()
        subprocess.run(
            ["ssh-keygen", "-q", "-Y", "sign", "-f", str(folder / "jane"), "-n", "file", str(path)], check=True
        )
    elif how == "of other words":
        path.write_text(path.read_text(encoding="utf-8").replace('"jane"', '"joe"', 1), encoding="utf-8")
    else:
        path.write_text("{}", encoding="utf-8")
        said = "has no statement that can be read"
    assert run(["report", "run"], folder).returncode == 0
    assert said_of_its_signature(folder / "run") == f"The signature in this folder {said}"


def test_a_signature_under_another_verdict_is_not_of_this_report(folder: Path) -> None:
    """As where another version of exportgate judged the record as a whole otherwise."""
    signed_anyway(folder, verdict="NOT QUALIFIED")
    assert run(["report", "run"], folder).returncode == 0
    assert said_of_its_signature(folder / "run") == "The signature in this folder is of another verdict: NOT QUALIFIED"


def test_a_signature_is_not_carried_over_to_a_merged_report(folder: Path) -> None:
    signed(folder)
    other = [run_event(run="20261122-180000-ffee00"), claim_event(CASE, "test_names", "FAIL"), end_event(1)]
    write_record(folder / "other", other)
    before = {path.name: path.read_bytes() for path in (folder / "run").iterdir()}
    assert_refused(run(["report", "run", "other"], folder), "2 runs", "--output")
    assert_refused(run(["report", "run", "other", "--output", "run"], folder), "'run' is the folder of a run")
    assert run(["report", "run", "other", "--output", "merged"], folder).returncode == 1
    assert said_of_its_signature(folder / "merged") == "Not signed"
    for name in ("statement.json", "statement.json.sig"):
        shutil.copy(folder / "run" / name, folder / "merged")
    assert run(["report", "merged"], folder).returncode == 1
    assert said_of_its_signature(folder / "merged") == "The signature in this folder is not of these records"
    assert {path.name: path.read_bytes() for path in (folder / "run").iterdir()} == before
    assert run(["verify", "run"], folder).returncode == 0


def test_a_signature_that_cannot_be_checked_is_one_line_and_nothing_is_written(folder: Path) -> None:
    signed(folder)
    page = (folder / "run" / "report.html").read_bytes()
    done = command_line(folder, "report", "run", PATH=str(folder / "nowhere"))
    assert done.returncode == 1 and "there is no ssh-keygen here" in done.stderr and "Traceback" not in done.stderr
    assert (folder / "run" / "report.html").read_bytes() == page


def test_a_signature_that_failed_leaves_the_one_before(folder: Path) -> None:
    signed(folder)
    first = said_of_its_signature(folder / "run")
    _one_byte(folder / "cache" / "best.onnx")
    assert_refused(run(["sign", "run", "--key", "jane", "--who", "joe"], folder), "no longer the file that was judged")
    assert first and said_of_its_signature(folder / "run") == first


def test_a_name_that_does_not_print_is_refused(folder: Path) -> None:
    """A terminal would show another one."""
    done = run(["sign", "run", "--key", "jane", "--who", "joe\rjane"], folder)
    assert_refused(done, "--who 'joe\\rjane'", "allowed signers")
    assert not (folder / "run" / "statement.json").exists()


def test_what_is_no_longer_what_was_judged_is_not_signed(folder: Path) -> None:
    _one_byte(folder / "cache" / "best.onnx")
    done = run(["sign", "run", "--key", "jane", "--who", "jane"], folder)
    assert_refused(done, "best.onnx", CASE, "no longer the file that was judged")
    assert not (folder / "run" / "statement.json").exists()
    assert "Not signed" in (folder / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"files": {"record.jsonl": 5}}, "statement.files.record.jsonl is 5, not text"),
        ({"files": ["record.jsonl"]}, "statement.files is ['record.jsonl'], not an object"),
        ({"artifacts": [{"case": CASE, "folder": "x", "files": ["a"]}]}, "artifacts[0].files is ['a'], not an object"),
        ({"artifacts": [{"case": CASE, "folder": 5, "files": {}}]}, "statement.artifacts[0].folder is 5, not text"),
        ({"artifacts": [{"case": CASE, "folder": "x", "files": {"a": ["b"]}}]}, "files.a is ['b'], not text"),
        ({"artifacts": [5]}, "statement.artifacts[0] is 5, not an object"),
        ({"waivers": [{"case": CASE}]}, "statement.waivers[0] lacks reason"),
        ({"files": {"a\nb": 5}}, "statement.files.a b is 5, not text"),
        ({"verdict": "FINE"}, "statement.verdict is 'FINE', not one of QUALIFIED"),
        ({"schema": 2}, "statement.schema is 2, this exportgate reads 1"),
    ],
)
def test_a_statement_of_another_form_is_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    told = {"schema": 1, "who": "jane", "when": "", "verdict": "QUALIFIED", "headline": "", "runs": [], "waivers": []}
    path = tmp_path / "statement.json"
    path.write_text(json.dumps(told | {"files": {}, "artifacts": []} | change), encoding="utf-8")
    (tmp_path / "statement.json.sig").write_text("none", encoding="utf-8")
    with pytest.raises(BadRequest) as caught:
        signature.verify(tmp_path, None)
    assert str(path) in str(caught.value) and said in str(caught.value) and "\n" not in str(caught.value)


def signed_anyway(folder: Path, **changes: Any) -> None:
    """A statement that sign would not write, with a signature of joe's that holds."""
    signed(folder)
    path = folder / "run" / "statement.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    path.with_name("statement.json.sig").unlink()
    words = ["ssh-keygen", "-q", "-Y", "sign", "-f", str(folder / "joe"), "-n", "exportgate", str(path)]
    subprocess.run(words, check=True)


def test_names_that_no_file_can_have_are_not_there(folder: Path) -> None:
    digest = "ab" * 32
    files = {"n" * 5000: digest, "a\nVERIFIED: 0": digest, "a\0b": digest, ".": digest}
    signed_anyway(folder, files=files, artifacts=[{"case": CASE, "folder": "x" * 5000, "files": {"a": digest}}])
    done = run(["verify", "run"], folder)
    assert done.returncode == 1 and not done.stderr, done.stderr[-500:]
    assert "NOT VERIFIED: 5 of 7 checks failed" in done.stdout
    assert not [line for line in done.stdout.splitlines() if line.startswith("VERIFIED")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sign", "nowhere", "--key", "jane"], ("'nowhere'", "no folder")),
        (["sign", "run", "--key", "nokey"], ("'nokey'", "no file")),
        (["sign", "run", "--key", "signers"], ("'signers'", "signed nothing", "--key")),
        (["sign", "cache", "--key", "jane"], ("record.jsonl",)),
        (["verify", "run"], ("'run'", "not signed", "exportgate sign")),
        (["verify", "broken"], ("statement.json", "no statement")),
        (["verify", "run", "--signers", "gone"], ("'gone'", "no file")),
    ],
)
def test_bad_requests_are_one_line(folder: Path, words: list[str], said: tuple[str, ...]) -> None:
    (folder / "broken").mkdir()
    (folder / "broken" / "statement.json").write_text("[1]")
    (folder / "broken" / "statement.json.sig").write_text("none")
    assert_refused(run(words, folder), *said)
