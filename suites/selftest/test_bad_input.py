"""Bad input: one clear line that names the value and the fix, exit 4, nothing written."""

from __future__ import annotations

import os
import pickle
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from exporters.artifact import Artifact
from exporters.cuda.nvml import gpu_facts
from exporters.errors import BadRequest
from exporters.models.checkpoint import read_checkpoint
from exporters.placement import place
from reports.events import Measurement
from suites.selftest import sabotage_runs
from suites.selftest.conftest import ROOT, command_line
from suites.support.acceptance import propose, write
from suites.support.cases import Selection, matrix
from suites.support.config import read_project


def run(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, with an empty cache."""
    return command_line(folder, *arguments, **{"EXPORTGATE_CACHE": str(folder / "cache"), **environment})


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit 4 and one line with these words; never a traceback."""
    text = (done.stdout + done.stderr).strip()
    assert done.returncode == 4, f"exit {done.returncode}: {text[-800:]}"
    assert "Traceback" not in text, text[-800:]
    lines = [line for line in text.splitlines() if "error" in line.lower()]
    assert len(lines) == 1, text
    for word in words:
        assert word in lines[0], f"'{word}' is not in: {lines[0]}"


class Calls:
    """Pickles as a call of os.system."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch canary",)


def _files(folder: Path) -> dict[str, Path]:
    """The files that users give by mistake."""
    (folder / "empty.pt").write_bytes(b"")
    (folder / "folder.pt").mkdir()
    (folder / "page.pt").write_text("<!DOCTYPE html><html><body>404 not found</body></html>")
    (folder / "text.pt").write_text("these are not weights\n")
    with zipfile.ZipFile(folder / "malicious.pt", "w") as archive:
        archive.writestr("malicious/data.pkl", pickle.dumps({"model": Calls()}, 2))
        archive.writestr("malicious/version", "3")
        archive.writestr("malicious/byteorder", "little")
    with zipfile.ZipFile(folder / "truncated.pt", "w") as archive:
        archive.writestr("truncated/data.pkl", pickle.dumps({}, 2))
        archive.writestr("truncated/data/0", bytes(4000))
    (folder / "truncated.pt").write_bytes((folder / "truncated.pt").read_bytes()[:2000])
    return {p.name: p for p in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.pt", ("missing.pt", "does not exist")),
        ("empty.pt", ("empty.pt", "is empty")),
        ("folder.pt", ("folder.pt", "is a directory")),
        ("truncated.pt", ("truncated.pt", "damaged")),
        ("page.pt", ("page.pt", "web page")),
        ("text.pt", ("text.pt", "text file")),
        ("malicious.pt", ("malicious.pt", "system")),
    ],
)
@pytest.mark.parametrize("command", ["export", "qualify"])
def test_a_file_that_is_no_checkpoint_is_refused(
    command: str, name: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    files = set(_files(tmp_path))
    done = run([command, name, "--format", "onnx"], tmp_path)
    assert_refused(done, *words)
    left = {p.name for p in tmp_path.iterdir()} - files
    assert left <= {"cache"}, f"written: {left}"
    assert not (tmp_path / "canary").exists(), "the file's code ran"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "onxx"], ("format 'onxx'", "did you mean onnx")),
        (["--format", "torchscript", "--precision", "int8"], ("torchscript", "int8", "fp32, fp16")),
        (["--format", "onnx", "--precision", "fp12"], ("'fp12'", "fp32")),
        (["--format", "onnx", "--half", "--int8"], ("fp16", "int8", "two precisions")),
        (["--format", "onnx", "--half", "--precision", "fp32"], ("fp16", "fp32", "two precisions")),
        (["--format", "onnx", "--imgsz", "0"], ("imgsz 0", "32")),
        (["--format", "onnx", "--imgsz=-1"], ("imgsz -1", "32")),
        (["--format", "onnx", "--imgsz", "641"], ("imgsz 641", "640 or 672")),
        (["--format", "onnx", "--imgsz", "abc"], ("imgsz 'abc'",)),
        (["--format", "onnx", "--imgsz", "640,640,640"], ("imgsz '640,640,640'",)),
        (["--format", "onnx", "--batch", "0"], ("batch '0'",)),
        (["--format", "onnx", "--batch", "two"], ("batch 'two'",)),
        (["--format", "onnx", "--opset", "16"], ("opset '16'", "17 to 20")),
        (["--format", "onnx", "--opset", "99"], ("opset '99'", "17 to 20")),
        (["--format", "torchscript", "--opset", "17"], ("torchscript", "'opset'", "optimize")),
        (["--format", "onnx", "--optimize"], ("onnx", "'optimize'", "simplify")),
        (["--format", "torchscript", "--optimize", "--half"], ("optimize", "fp16")),
        (["--format", "onnx", "--keep", "model.0"], ("'keep'", "int8")),
        (["--format", "onnx", "--int8", "--calibrator", "mean"], ("calibrator 'mean'", "max, entropy, percentile")),
        (["--format", "onnx", "--int8"], ("INT8", "--data")),
        (["--format", "onnx", "--int8", "--data", "nowhere"], ("data", "nowhere", "does not exist")),
        (["--format", "onnx", "--int8", "--data", "."], ("no images",)),
        (["--format", "onnx", "--int8", "--data", ".", "--fraction", "0"], ("fraction '0'",)),
        (["--format", "onnx", "--device", "tpu"], ("device 'tpu'",)),
        (["--format", "onnx", "--project", "nowhere"], ("nowhere", "exportgate.toml")),
        (["--format", "onnx", "--colour"], ("--colour",)),
        (["--format", ","], ("--format ','", "no name")),
        (["--format", "onnx", "--device", ""], ("device is given and empty",)),
        (["--format", "onnx", "--fraction", "0.5"], ("fraction", "INT8")),
        (["--format", "onnx", "--int8", "--data", "os:system"], ("'os' is not found",)),
    ],
)
@pytest.mark.parametrize("command", ["export", "qualify"])
def test_an_option_that_cannot_be_met_is_refused(
    command: str, options: list[str], words: tuple[str, ...], trained: Path, tmp_path: Path
) -> None:
    done = run([command, str(trained), *options], tmp_path)
    assert_refused(done, *words)
    assert {p.name for p in tmp_path.iterdir()} <= {"cache"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # A shell variable that was not set: the default would judge something else, and pass.
        (["check", "", "--model", "best.pt", "--format", "onnx"], ("artifact is given and empty",)),
        (["qualify", ""], ("model is given and empty",)),
        (["qualify", "--replicates", "0"], ("replicates '0'", "from 1")),
        (["qualify", "--exports", "all"], ("exports 'all'", "from 1")),
        (["export", "a" * 300 + ".pt", "--format", "onnx"], ("name too long",)),
        (["qualify", "a" * 300 + ".pt"], ("name too long",)),
        (["export", "best.pt", "--format", "onnx", "--", "-x"], ("-x", "for pytest")),
        (["toolchain", "sync", "nosuch"], ("'nosuch'", "onnx")),
        (["toolchain", "sync", "mlmodel"], ("'mlmodel'", "is made with 'coreml'")),
        # One form, whoever found it: the command line, pytest's start, or the collection.
        (["qualify", "--release", "--", "--lf"], ("exportgate: error: '-- --lf'", "leave it out")),
        (["qualify", "--release", "--", "-x"], ("exportgate: error: a release run was given -x",)),
        (["qualify", "--release", "--", "--collect-only"], ("exportgate: error: ", "--collect-only")),
        (["qualify", "--claim", "test_nosuch"], ("exportgate: error: claim 'test_nosuch'", "test_p50_within_baseline")),
    ],
)
def test_an_argument_that_names_nothing_is_refused(
    arguments: list[str], words: tuple[str, ...], tmp_path: Path
) -> None:
    assert_refused(run(arguments, tmp_path), *words)
    assert {p.name for p in tmp_path.iterdir()} <= {"cache"}


def test_a_report_folder_that_cannot_be_written_is_refused_before_any_work(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/inner"):
        done = run(["qualify", str(trained), "--format", "onnx", "--report", folder], tmp_path)
        assert_refused(done, "record.jsonl", "cannot be written", "--report")
    assert {p.name for p in tmp_path.iterdir()} <= {"cache", "file"}
    assert not (tmp_path / "cache").exists()


def test_a_baselines_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "baselines").write_text("")
    measured = Measurement(((1.0, 1.0), (1.0, 1.0)), None, conditions={"comparable": {}})
    with pytest.raises(BadRequest, match="cannot be written"):
        write([propose(tmp_path / "baselines", "machine", "case", measured, "first")])


def test_a_project_that_cannot_be_read_is_not_passed_over(tmp_path: Path) -> None:
    """exportgate's own matrix would be judged instead."""
    (tmp_path / "exportgate.toml").symlink_to("nowhere.toml")
    assert_refused(run(["qualify"], tmp_path), "exportgate.toml", "cannot be read")


def test_commands_that_are_printed_can_be_typed(trained: Path, tmp_path: Path) -> None:
    """`export` says how to check what it made, and a failed `check` how to judge that file again."""
    folder = tmp_path / "a 'folder'"
    options = ["--format", "onnx", "--imgsz", "64", "--batch", "2"]
    made = run(["export", str(trained), *options, "--output", str(folder)], tmp_path)
    line = next(line for line in made.stdout.splitlines() if "check it: " in line)
    words = shlex.split(line.partition("check it: ")[2])
    assert words[:2] == ["exportgate", "check"]
    claim = ["--claim", "test_input_signature_is_the_requested"]
    checked = run([*words[1:], *claim], tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    words[words.index("--batch") + 1] = "1"
    failed = run([*words[1:], *claim], tmp_path)
    assert failed.returncode == 1
    line = next(line for line in failed.stdout.splitlines() if "reproduce: " in line)
    again = shlex.split(line.partition("reproduce: ")[2])
    assert again[:3] == ["exportgate", "check", str(folder / words[2].rpartition("/")[2])]
    assert run(again[1:], tmp_path).returncode == 1


def test_a_report_folder_that_holds_a_run_is_refused(trained: Path, tmp_path: Path) -> None:
    """Two runs in one record would be a report of neither."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "record.jsonl").write_text("{}\n")
    done = run(["qualify", str(trained), "--format", "onnx", "--report", "run"], tmp_path)
    assert_refused(done, f"--report '{tmp_path / 'run'}'", "holds a run already")
    assert (tmp_path / "run" / "record.jsonl").read_text() == "{}\n"


def test_code_that_somebody_else_made_is_refused_before_anything_is_judged(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs.torchscript").write_bytes(b"PK")
    done = run(["check", "theirs.torchscript", "--model", str(trained)], tmp_path)
    assert_refused(done, "theirs.torchscript", "runs code", "--trust")
    assert {p.name for p in tmp_path.iterdir()} <= {"cache", "theirs.torchscript"}


def test_class_names_with_a_gap_are_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "exportgate.toml").write_text(
        f'[models.gap]\nweights = "{trained}"\nnames = {{ 0 = "a", 1 = "b", 3 = "d", 4 = "e", 5 = "f", 6 = "g" }}\n'
    )
    assert_refused(run(["qualify", "gap", "--format", "onnx"], tmp_path), "no index 2")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[models", ("not TOML",)),
        ("[modles.a]\nweights = 'x'", ("'modles'", "did you mean models")),
        ("[models.a]\nweihgts = 'x'", ("'weihgts'",)),
        ("[models.a]\nweights = 'nowhere.pt'\n[matrix]\nformats = ['onnx']", ("nowhere.pt", "does not exist")),
        ("[matrix]\nmodels = ['b']", ("'b'", "[models.b]")),
        (
            "[models.a]\nfactory = 'b:c'\ninputs = [{name = 'x', shape = ['batch', 1, 'height', 'width']}]\n"
            "preprocess = {mean = [0.5, 0.5, 0.5]}\n[matrix]\nformats = ['onnx']",
            ("mean [0.5, 0.5, 0.5]", "'x' has 1 channels", "three colours"),
        ),
        ("[latency]\ndelta = 'much'", ("delta", "'much'")),
        ("[[waivers]]\ncase = 'a'\nclaim = 'b'", ("waiver", "no reason")),
        (
            "[[waivers]]\ncase='a'\nclaim='b'\nreason='c'\nissue='https://d/1'\nowner='e'\nexpires=2020-01-01",
            ("expired", "2020-01-01"),
        ),
        ("[[tolerances]]\nprecision='fp16'\ngroup='boxes'\nmeasure='max_abs'\nallowed=1.0", ("no reason",)),
    ],
)
def test_a_mistake_in_the_configuration_is_refused(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "exportgate.toml").write_text(text)
    assert_refused(run(["qualify"], tmp_path), *words)


TOLERANCE = "[[tolerances]]\nprecision='fp16'\ngroup='boxes'\nmeasure='max_abs'\nreason='r'\nallowed="
WAIVER = "[[waivers]]\ncase='a'\nclaim='b'\nreason='c'\nowner='e'\nissue='https://d/1'\nexpires="


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tolerances = 5", "tolerances = 5"),
        ("waivers = ['a']", "waivers = ['a']"),
        ("must_pass = 'detector'", "must_pass = 'detector'"),
        ("baselines = 7", "baselines = 7"),
        ("[latency]\ndelta = nan", "delta = nan"),
        ("[latency]\nprocesses = 2.5", "processes = 2.5"),
        ("[limits]\nexport = inf", "export = inf"),
        ("[accuracy]\nfp32 = 1.5", "fp32 = 1.5"),
        ("[accuracy]\nfp33 = 0.1", "'fp33' is not known (did you mean fp32?)"),
        (TOLERANCE + "nan", "allowed = nan"),
        (TOLERANCE.replace("fp16", "fp61") + "1", "'fp61'"),
        (TOLERANCE.replace("'max_abs'", "['max_abs']") + "1", "measure = ['max_abs']"),
        (TOLERANCE + "1\nrelative = 'no'", "relative = 'no'"),
        (WAIVER + "'2099-01-01 or whenever'", "expires = '2099-01-01 or whenever' is not a date"),
        (WAIVER + "20990101", "expires = '20990101' is not a date"),
        (WAIVER + "2099-01-01T08:00:00", "expires = '2099-01-01 08:00:00' is not a date"),
        (WAIVER.replace("https://d/1", "later") + "2099-01-01", "issue = 'later', which is no web address"),
        (WAIVER.replace("claim='b'", "claim=5") + "2099-01-01", "claim = 5"),
        (f"{WAIVER}2099-01-01\n{WAIVER}'2099-02-01'", "a::b is waived twice"),
        ("must_pass = ['']", "must_pass has ''"),
        ("must_pass = ['a', '::']", "must_pass has '::'"),
        ("must_pass = ['a::']", "must_pass has 'a::'"),
        ("must_pass = ['a::b::c']", "must_pass has 'a::b::c'"),
        ("[matrix]\nformats = 'onnx'", "formats = 'onnx'"),
        ("[matrix]\nfromats = ['onnx']", "'fromats'"),
        ("[matrix]\noptions = 3", "options is int"),
        ("[matrix]\nalso = ['onnx']", "also = ['onnx']"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(text: str, words: str, tmp_path: Path) -> None:
    """A text where a list belongs would be read letter by letter, and a limit of nan lets everything pass."""
    (tmp_path / "exportgate.toml").write_text(text)
    with pytest.raises(BadRequest, match=re.escape(words)):
        read_project(tmp_path / "exportgate.toml")


def test_what_is_written_well_is_taken(tmp_path: Path) -> None:
    words = f"must_pass = ['a', 'a b::c']\n{WAIVER}2099-01-01\n{WAIVER.replace('b', 'x')}'2099-01-02'\n"
    (tmp_path / "exportgate.toml").write_text(words + TOLERANCE + "1\nrelative = true")
    found = read_project(tmp_path / "exportgate.toml")
    assert [w.expires.isoformat() for w in found.waivers] == ["2099-01-01", "2099-01-02"]
    assert found.must_pass == ("a", "a b::c") and found.tolerances[0]["relative"] is True


def test_what_the_matrix_would_pass_over_in_silence_is_refused(trained: Path, tmp_path: Path) -> None:
    model = f"[models.a]\nweights = '{trained}'\n[matrix]\nformats = ['onnx']\n"
    file = tmp_path / "exportgate.toml"
    file.write_text(model + "[[matrix.also]]\nformat = 'torchscript'\nmodel = 'b'\n")
    with pytest.raises(BadRequest, match="model 'b' is not one of the matrix; models: a"):
        matrix(read_project(file), Selection())
    file.write_text(model + TOLERANCE.replace("boxes", "boxez") + "1\n")
    with pytest.raises(BadRequest, match="no output has the channel group 'boxez'; groups: box, boxes, score, scores"):
        matrix(read_project(file), Selection())
    for selection in (Selection(), Selection(formats=("onnx",)), Selection("a", ("onnx",))):
        file.write_text(model + TOLERANCE + "1\n")
        with pytest.raises(BadRequest, match="no case of the matrix is in fp16; precisions: fp32"):
            matrix(read_project(file), selection)
        # What is made from it is in it: an FP16 file is converted from one in FP32, with which it is compared.
        file.write_text(f"{model}precisions = ['fp16']\n{TOLERANCE.replace('fp16', 'fp32')}1\n")
        assert matrix(read_project(file), selection)
    file.write_text(model.partition("[matrix]")[0] + TOLERANCE + "1\n")  # without a matrix nobody can tell
    assert matrix(read_project(file), Selection("a", ("onnx",)))
    file.write_text(model.replace("[matrix]", "feeds = 'nowhere'\n[matrix]"))
    with pytest.raises(BadRequest, match="feeds 'nowhere' is no folder"):
        matrix(read_project(file), Selection())
    file.write_text(model.replace("[matrix]", "evaluate = 'nowhere.yaml'\n[matrix]"))
    with pytest.raises(BadRequest, match=r"evaluate 'nowhere\.yaml' does not exist"):
        matrix(read_project(file), Selection())
    file.write_text(model)
    assert_refused(run(["qualify", "--evaluate", "nowhere"], tmp_path), "evaluate 'nowhere' does not exist")
    assert_refused(run(["qualify", "--int8-budget", "99"], tmp_path), "int8-budget '99' is no number from 0 to 1")
    assert_refused(run(["qualify", "--int8-budget", "0"], tmp_path), "int8-budget '0' asks for nothing", "0.99")
    assert_refused(run(["qualify", "--int8-budget", "0.99"], tmp_path), "no case is INT8")
    both = ["--int8-budget", "0.99", "--keep", "model.0", "--format", "onnx", "--int8", "--data", str(tmp_path)]
    Image.new("RGB", (64, 64)).save(tmp_path / "one.png")
    assert_refused(run(["qualify", str(trained), *both], tmp_path), "int8-budget 0.99 with keep")
    file.write_text("")
    done = run(["qualify"], tmp_path)
    assert done.returncode == 5
    assert "nothing was judged" in done.stdout


def test_a_file_that_somebody_else_made_is_not_overwritten(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "best.onnx").write_text("mine")
    done = run(["export", str(trained), "--format", "onnx", "--imgsz", "64", "--output", str(tmp_path)], tmp_path)
    assert_refused(done, "best.onnx", "--overwrite")
    assert (tmp_path / "best.onnx").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_named(trained: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")  # a file where a folder should be: unwritable for root too
    assert_refused(
        run(
            ["export", str(trained), "--format", "onnx", "--imgsz", "64", "--output", str(blocked / "inner")], tmp_path
        ),
        "cannot be written",
        "--output",
    )
    assert_refused(
        run(
            ["export", str(trained), "--format", "onnx", "--imgsz", "64"],
            tmp_path,
            EXPORTGATE_CACHE=str(blocked / "cache"),
        ),
        "cache",
        "EXPORTGATE_CACHE",
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_line(trained: Path, tmp_path: Path) -> None:
    """A file system of 1 MiB where it can be made (root on Linux); elsewhere the export's own limit on file sizes."""
    code = (
        "import resource,signal,sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20));"
        "from suites.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    variables = {**os.environ, "EXPORTGATE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "export",
            str(trained),
            "--format",
            "onnx",
            "--imgsz",
            "64",
            "--output",
            str(tmp_path / "out"),
        ],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    text = done.stdout + done.stderr
    assert done.returncode != 0, text
    assert "Traceback" not in text, text
    assert not list((tmp_path / "cache").glob("artifacts/*")), "a half artifact is in the cache"
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir()), "a half file was left"


def test_the_real_checkpoint_is_read_without_its_package(trained: Path) -> None:
    checkpoint = read_checkpoint(trained)
    assert checkpoint.task == "detect"
    assert dict(checkpoint.names or {}) == {0: "Animal", 1: "Car", 2: "Person", 3: "Rock", 4: "Trash", 5: "Tree"}


@pytest.mark.parametrize(
    "words",
    [
        ["--", "-k", "outputs"],
        ["--", "--ignore-glob=*performance*"],
        ["--", "-o", "python_files=test_m*.py"],
        ["--claim", "test_outputs_match_reference"],
    ],
)
def test_a_release_that_leaves_claims_out_is_refused(trained: Path, words: list[str], tmp_path: Path) -> None:
    given = ["qualify", str(trained), "--format", "onnx", "--imgsz", "64", "--release"]
    done = run([*given, *words], tmp_path)
    assert done.returncode == 4, done.stdout[-500:]
    assert "a release run" in done.stdout + done.stderr


def test_a_waived_claim_that_is_not_judged_fails_the_run(tmp_path: Path) -> None:
    """A waiver is of a FAIL: what pytest takes for an expected failure may be an ERROR."""
    (tmp_path / "small_model.py").write_text("def make():\n    raise RuntimeError('no')\n", encoding="utf-8")
    waiver = sabotage_runs.WAIVER.format(**sabotage_runs.GOOD_WAIVER | {"claim": "test_outputs_match_reference"})
    (tmp_path / "exportgate.toml").write_text(sabotage_runs.PROJECT + waiver, encoding="utf-8")
    done = run(["qualify", "--claim", "test_outputs_match_reference"], tmp_path)
    assert done.returncode == 1 and "NOT QUALIFIED: 1 of 1 claim failed (1 ERROR)" in done.stdout, done.stdout[-500:]


def test_int8_with_fewer_images_than_a_batch_is_refused(trained: Path, tmp_path: Path) -> None:
    from suites.reference.photographs import folder

    given = ["export", str(trained), "--format", "onnx", "--int8", "--batch", "4", "--data", str(folder())]
    assert_refused(run(given, tmp_path), "2 images", "batch", "4")


def test_the_extra_that_brings_a_package_is_named(tmp_path: Path) -> None:
    assert "exportgate[tensorrt]" in run(["formats"], tmp_path).stdout


def test_a_run_that_judged_nothing_says_why(trained: Path, tmp_path: Path) -> None:
    done = run(["qualify", str(trained), "--format", "engine", "--precision", "fp16", "--device", "0"], tmp_path)
    assert done.returncode == 5, done.stdout[-500:]
    assert "no NVIDIA GPU" in done.stdout


@pytest.mark.skipif(bool(gpu_facts()), reason="there is a GPU here: the matrix would be judged")
def test_the_matrix_of_gpu_runners_is_never_green_without_a_gpu(tmp_path: Path) -> None:
    """`pytest -m trt` on a machine that has neither TensorRT nor a GPU: exit 5, and what is missing."""
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "trt",
        "--report",
        str(tmp_path / "report"),
        "-p",
        "no:cacheprovider",
    ]
    if not (ROOT / "conftest.py").is_file():  # an installed wheel, where README names the plugin
        words += ["-p", "suites.plugin", "--pyargs", "suites"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 5, done.stdout[-800:]
    assert re.search(r"skipped \d+ claims: there is no NVIDIA GPU", done.stdout), done.stdout[-800:]
    if not find_spec("pycuda"):
        assert re.search(r"no NVIDIA GPU.*; .*pycuda", done.stdout), done.stdout[-800:]


# ---- where artifacts are placed --------------------------------------------------------------------------------------


def _made(root: Path, files: Mapping[str, str], primary: str) -> Artifact:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Artifact(root, "", "", primary, {})


def test_files_that_share_a_folder_keep_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SavedModel and TensorFlow Lite files of one checkpoint, in whatever order they come, and again."""
    monkeypatch.setenv("EXPORTGATE_CACHE", str(tmp_path / "cache"))
    folder = _made(tmp_path / "1", {"a_saved_model/saved_model.pb": "graph"}, "a_saved_model")
    lite = _made(tmp_path / "2", {"a_saved_model/a_float32.tflite": "lite"}, "a_saved_model/a_float32.tflite")
    for number, order in enumerate([(folder, lite), (lite, folder), (folder, lite, folder), (lite, lite, folder)]):
        for artifact in order:
            place(artifact, tmp_path / f"out{number}")
        found = {p.name for p in (tmp_path / f"out{number}" / "a_saved_model").iterdir()}
        assert found == {"saved_model.pb", "a_float32.tflite"}, order


def test_a_file_of_somebody_else_in_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPORTGATE_CACHE", str(tmp_path / "cache"))
    folder = _made(tmp_path / "1", {"a_saved_model/saved_model.pb": "graph"}, "a_saved_model")
    for name in ("a_saved_model/theirs.txt", "a_saved_model/saved_model.pb"):
        place(folder, tmp_path / "out", overwrite=True)
        (tmp_path / "out" / name).write_text("theirs")
        with pytest.raises(BadRequest, match="not made by exportgate"):
            place(folder, tmp_path / "out")
        assert (tmp_path / "out" / name).read_text() == "theirs"


def test_the_side_car_of_a_file_is_placed_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPORTGATE_CACHE", str(tmp_path / "cache"))
    graph = _made(tmp_path / "1", {"a.pb": "graph", "metadata.yaml": "names: []"}, "a.pb")
    place(graph, tmp_path / "out")
    assert (tmp_path / "out" / "metadata.yaml").read_text() == "names: []"
    (tmp_path / "out" / "metadata.yaml").write_text("theirs")
    with pytest.raises(BadRequest, match=r"metadata\.yaml' exists and was not made by exportgate"):
        place(graph, tmp_path / "out")


def test_a_side_car_is_not_taken_from_the_artifact_that_it_describes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPORTGATE_CACHE", str(tmp_path / "cache"))
    first = _made(tmp_path / "1", {"a.pb": "graph", "metadata.yaml": "names: [a]"}, "a.pb")
    second = _made(tmp_path / "2", {"b.pb": "graph", "metadata.yaml": "names: [b]"}, "b.pb")
    for _ in range(2):
        place(first, tmp_path / "out")
    with pytest.raises(BadRequest, match=r"metadata\.yaml' is of 'a\.pb', which has no other metadata"):
        place(second, tmp_path / "out")
    assert (tmp_path / "out" / "metadata.yaml").read_text() == "names: [a]"
    assert not (tmp_path / "out" / "b.pb").exists()
    (tmp_path / "out" / "a.pb").unlink()
    place(second, tmp_path / "out")
    place(first, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "metadata.yaml").read_text() == "names: [a]"
