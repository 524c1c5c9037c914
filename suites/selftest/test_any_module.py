"""Any torch.nn.Module, through an exportgate.toml of the user's own, and the run record and report that come of it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch

import reports
from exporters.models.spec import InputSpec, ModelSpec, OutputSpec
from exporters.pool import Pool
from exporters.spec import request
from suites.selftest.conftest import command_line

MODULE = '''
import torch
from torch import nn


class TwoInputs(nn.Module):
    """Several inputs of different types, outputs as a mapping."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.linear, self.embed, self.out = nn.Linear(5, width), nn.Embedding(10, width), nn.Linear(width, 4)

    def forward(self, images, extra, ids):
        features = torch.relu(self.bn(self.conv(images))).mean((2, 3)) + self.linear(extra) + self.embed(ids).mean(1)
        return {"logits": self.out(features), "features": features}


def make(width):
    return TwoInputs(width)


def breaks():
    raise RuntimeError("no weights here")
'''
CONFIGURATION = """
[models.two]
factory = "mymodels:make"
arguments = { width = 16 }
imgsz = 32
names = ["it's", "a \\"quoted\\"", "name\\nover two lines", "猫 🐈"]
inputs = [
  { name = "images", shape = ["batch", 3, "height", "width"] },
  { name = "extra", shape = ["batch", 5], low = -1.0 },
  { name = "ids", shape = ["batch", 3], dtype = "int64", high = 10 },
]
outputs = [{ name = "logits" }, { name = "features" }]

[matrix]
formats = ["onnx", "torchscript"]
precisions = ["fp32", "fp16"]
[[matrix.also]]
format = "onnx"
dynamic = true
batch = 2

[latency]
delta = 0.5
processes = 2
seconds = 0.05
"""


def qualify(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return command_line(folder, "qualify", *options)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A project with one model of its own, judged once."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "mymodels.py").write_text(MODULE)
    (folder / "exportgate.toml").write_text(CONFIGURATION)
    return folder, qualify(folder, "--report", "out")


def test_a_module_with_three_inputs_and_two_outputs_qualifies(
    judged: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, done = judged
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "QUALIFIED: 0 of 175 claims failed" in done.stdout, done.stdout[-600:]
    assert "NO_BASELINE" in done.stdout


def test_every_line_of_the_record_fits_the_schema(judged: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = judged
    schema = json.loads((Path(reports.__file__).parent / "schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    lines = [json.loads(line) for line in (folder / "out" / "record.jsonl").read_text().splitlines()]
    for line in lines:
        problems = [f"{list(e.absolute_path)}: {e.message}"[:300] for e in validator.iter_errors(line)]
        assert not problems, problems
    assert {line["event"] for line in lines} == {"run", "case", "claim", "end"}
    assert {p.name for p in (folder / "out").iterdir()} >= {"report.html", "report.md", "report.xml", "report.json"}


def test_a_measurement_becomes_a_baseline_and_gates_the_next_run(
    judged: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """Accepted with a reason; then the same file is within it, and a baseline of half the time is not."""
    from suites import cli

    folder, _ = judged
    case = "two-onnx-fp32-ort-cpu"
    assert (
        cli.main(["baseline", "accept", str(folder / "out"), "--reason", " ", "--case", case, "--project", str(folder)])
        == 4
    )
    status = cli.main(
        ["baseline", "accept", str(folder / "out"), "--reason", "first", "--case", case, "--project", str(folder)]
    )
    found = list((folder / "baselines").glob(f"*/{case}.json"))
    if status == 4 and not found:
        pytest.skip("this machine is too noisy at the moment for its measurement to be accepted as a baseline")
    data = json.loads(found[0].read_text())
    assert data["reason"] == "first"
    data["milliseconds"] = [[x / 50 for x in p] for p in data["milliseconds"]]
    found[0].write_text(json.dumps(data))
    done = qualify(
        folder, "--format", "onnx", "--precision", "fp32", "--report", "slower", "--claim", "test_p50_within_baseline"
    )
    assert done.returncode == 1, done.stdout[-2000:]
    assert "slower than the baseline: ratio to the baseline" in done.stdout


def test_standard_output_is_the_report_where_json_is_asked_for(
    judged: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = judged
    done = qualify(
        folder,
        "--json",
        "--format",
        "onnx",
        "--precision",
        "fp32",
        "--claim",
        "test_outputs_are_finite",
        "--report",
        "j",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["verdict"] == "QUALIFIED"
    assert "report: " in done.stderr


def test_weights_that_a_factory_reads_from_a_file_are_not_taken_from_the_cache(tmp_path: Path) -> None:
    """Only the factory knows of its file: no key could."""
    (tmp_path / "own.py").write_text(
        "import torch\nfrom pathlib import Path\n\n\ndef make():\n    module = torch.nn.Linear(4, 2)\n"
        '    module.load_state_dict(torch.load(Path(__file__).with_name("own.pt")))\n    return module\n'
    )
    inputs = (InputSpec("x", ("batch", 4)),)
    model = ModelSpec("own", "own:make", search=(tmp_path,), inputs=inputs, outputs=(OutputSpec("y", ((0, "batch"),)),))
    made: list[bytes] = []
    for number in (1.0, 1.0, 2.0):
        torch.save({"weight": torch.full((2, 4), number), "bias": torch.zeros(2)}, tmp_path / "own.pt")
        with Pool() as pool:
            artifact = pool.export(request(model, "onnx"))
            made.append(artifact.path.read_bytes())
            assert bool(pool.fresh) is (number != 1.0 or len(made) == 1)
    assert made[0] == made[1]
    assert made[1] != made[2]


def test_a_factory_may_reckon_with_tensors_without_data(tmp_path: Path) -> None:
    """Workers put off importing what torch knows of them (`exporters.lean_torch`)."""
    (tmp_path / "shapes.py").write_text(
        'import torch\n\n\ndef make():\n    width = torch.fft.fft(torch.empty(4, device="meta") + 0j).shape[0]\n'
        "    return torch.nn.Linear(width, 2)\n"
    )
    inputs = (InputSpec("x", ("batch", 4)),)
    model = ModelSpec("shapes", "shapes:make", search=(tmp_path,), inputs=inputs, outputs=(OutputSpec("y"),))
    with Pool() as pool:
        assert pool.export(request(model, "onnx")).path.is_file()


def test_a_folder_without_a_configuration_has_baselines_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from suites import cli

    monkeypatch.chdir(tmp_path)
    assert cli.main(["baseline", "show"]) == 0
    assert f"0 baselines in {tmp_path / 'baselines'}" in capsys.readouterr().out


def test_a_factory_that_raises_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mymodels.py").write_text(MODULE)
    (tmp_path / "exportgate.toml").write_text(
        '[models.bad]\nfactory = "mymodels:breaks"\n[matrix]\nformats = ["onnx"]\n'
    )
    done = qualify(tmp_path)
    assert done.returncode == 1, done.stdout[-2000:]
    assert "no weights here" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_values_that_are_not_judged_are_not_called_good(tmp_path: Path) -> None:
    """A row of the matrix may leave them out, with a reason; everything else is judged."""
    (tmp_path / "mymodels.py").write_text(MODULE)
    (tmp_path / "exportgate.toml").write_text(
        CONFIGURATION.partition("[matrix]")[0]
        + '[[matrix.also]]\nformat = "onnx"\nprecision = ["fp32"]\nno_values = "its weights are random"\n'
    )
    done = qualify(tmp_path, "--report", "out", "--", "-m", "not latency")
    assert done.returncode == 0, done.stdout[-2000:]
    found = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    claims = {c["claim"]: c for c in found["cases"][0]["claims"]}
    assert claims["test_outputs_match_reference"]["verdict"] == "NOT_SUPPORTED"
    assert "its weights are random" in claims["test_outputs_match_reference"]["because"]
    assert claims["test_achieved_precision_is_the_requested"]["verdict"] == "PASS"


def test_python_sees_what_a_factory_reads_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, whose user edits a file between two exports: a number that stands in an attribute alone."""
    import exporters

    monkeypatch.setenv("EXPORTGATE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "sloped.py").write_text(
        "import pathlib\n\nimport torch\n\n\nclass Sloped(torch.nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n"
        '        self.slope = float(pathlib.Path(__file__).with_name("slope.txt").read_text())\n\n'
        "    def forward(self, x):\n        return torch.nn.functional.leaky_relu(x, self.slope)\n"
    )
    model = ModelSpec(
        "sloped",
        "sloped:Sloped",
        search=(tmp_path,),
        inputs=(InputSpec("x", ("batch", 4)),),
        outputs=(OutputSpec("y"),),
    )
    keys: list[str] = []
    for slope in ("0.1", "0.9", "0.9"):
        (tmp_path / "slope.txt").write_text(slope)
        keys.append(exporters.export(request(model, "onnx")).key)
    assert keys[0] != keys[1] == keys[2]
    # It has nothing to store, and is a reference all the same.
    session = exporters.load(exporters.export(request(model, "pytorch")))
    assert float(session.run({"x": -np.ones((1, 4), np.float32)})["y"][0, 0]) == pytest.approx(-0.9)
    session.close()


def test_a_tolerance_that_nothing_has_is_refused_whatever_is_selected(tmp_path: Path) -> None:
    (tmp_path / "mymodels.py").write_text(MODULE)
    for group, allowed, says in (("logitz", 0.1, "logitz"), ("value", 5.0, "cosine")):
        (tmp_path / "exportgate.toml").write_text(
            CONFIGURATION
            + f'[[tolerances]]\nprecision = "fp32"\ngroup = "{group}"\nmeasure = "cosine"\n'
            + f'allowed = {allowed}\nreason = "r"\n'
        )
        for words in ((), ("--format", "onnx"), ("two", "--format", "onnx")):
            done = qualify(tmp_path, *words)
            assert done.returncode == 4 and says in done.stdout + done.stderr, (words, done.stdout[-300:], done.stderr)


def test_baselines_are_accepted_all_or_none(
    judged: tuple[Path, subprocess.CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One that is there already cannot be read: none of the others is written; nor is one whose outputs failed."""
    from suites import cli

    run = tmp_path / "run"
    shutil.copytree(judged[0] / "out", run)
    monkeypatch.chdir(tmp_path)
    record = run / "record.jsonl"
    lines = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    measured = [e for e in lines if e.get("measurement")]
    for event in measured:  # of a machine that is as quiet as a baseline needs
        event["measurement"]["processes"] = [[1.0] * 20, [1.001] * 20]
    record.write_text("".join(json.dumps(e) + "\n" for e in lines), encoding="utf-8")
    last = (
        tmp_path / "baselines" / measured[-1]["measurement"]["conditions"]["machine"] / f"{measured[-1]['case']}.json"
    )
    last.parent.mkdir(parents=True)
    last.write_text("<<<<<<< HEAD")
    assert cli.main(["baseline", "accept", str(run), "--reason", "first"]) == 4
    assert list(last.parent.iterdir()) == [last] and last.read_text() == "<<<<<<< HEAD"
    last.unlink()
    values = next(
        e for e in lines if e.get("claim") == "test_outputs_match_reference" and e["case"] == measured[0]["case"]
    )
    values["verdict"] = "FAIL"
    record.write_text("".join(json.dumps(e) + "\n" for e in lines), encoding="utf-8")
    assert cli.main(["baseline", "accept", str(run), "--reason", "first"]) == 4
    assert not list(last.parent.iterdir())
    values["verdict"] = "PASS"
    record.write_text("".join(json.dumps(e) + "\n" for e in lines), encoding="utf-8")
    assert cli.main(["baseline", "accept", str(run), "--reason", "first"]) == 0
    assert len(list(last.parent.iterdir())) == len(measured)
    measured[0]["measurement"]["processes"] = [[1.25] * 20, [1.2501] * 20]
    measured[0]["measurement"]["conditions"]["comparable"]["cores"] = 96
    record.write_text("".join(json.dumps(e) + "\n" for e in lines), encoding="utf-8")
    capsys.readouterr()
    assert cli.main(["baseline", "diff", str(run)]) == 0
    told = capsys.readouterr().out.splitlines()
    first = next(n for n, line in enumerate(told) if line.startswith(f"{measured[0]['case']}: "))
    assert "p50 1.250 ms, baseline 1.000 ms" in told[first] and "(+24.9%, " in told[first]
    assert "cores" in told[first + 1] and "96 here" in told[first + 1]
    assert sum("(+0.0%, " in line for line in told) == len(measured) - 1
    (last.parent / f"{measured[0]['case']}.json").unlink()
    assert cli.main(["baseline", "diff", str(run)]) == 0
    assert f"{measured[0]['case']}: p50 1.250 ms, no baseline" in capsys.readouterr().out
