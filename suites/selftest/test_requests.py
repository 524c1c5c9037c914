"""Requests, metadata, cases and declarations: properties that hold for every legal value."""

from __future__ import annotations

import configparser
import json
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import sklearn
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement

from exporters import formats, toolchain
from exporters.errors import ArtifactError, BadRequest
from exporters.metadata import Metadata, normalize, read_json, read_yaml
from exporters.models.spec import ModelSpec, class_names
from exporters.spec import ExportSpec, Precision, parse_imgsz, request
from suites.support.cases import Case, Selection, matrix
from suites.support.config import Project

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelSpec("model", "exporters.models.yolov8:build", stride=32, imgsz=(640, 640), task="detect", names={0: "a"})
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=80, deadline=None)
@given(st.lists(text, min_size=1, max_size=20))
def test_class_names_survive_both_encodings(names: list[str]) -> None:
    want = dict(enumerate(names))
    metadata = Metadata(names=want, imgsz=(640, 480), stride=32, args={"half": True})
    assert normalize(metadata.as_strings(), "onnx").names == want
    assert read_json(metadata.as_json(), "torchscript") == metadata


def test_a_thousand_names_with_quotes_and_newlines_survive() -> None:
    want = {i: f"class '{i}' \"q\"\n\\n é 猫 🐈 {{}}" for i in range(1000)}
    assert normalize(Metadata(names=want).as_strings(), "x").names == want


@pytest.mark.parametrize(
    "values",
    [
        {"names": "__import__('os').system('true')"},
        {"names": "[1,"},
        {"stride": "x"},
        {"imgsz": "[]"},
        {"names": "{0: 'a', 2: 'b'}"},
        {"imgsz": "(" * 5000},
        {"stride": 32.9},
        {"batch": True},
        {"batch": "1.0"},
        {"imgsz": [256.0, 256]},
        {"imgsz": [256, 256, 256]},
        {"kpt_shape": [17, 2.5]},
        [],
    ],
)
def test_metadata_that_cannot_be_read_is_an_error_of_one_line(values: object) -> None:
    with pytest.raises(ArtifactError) as caught:
        normalize(values, "file.onnx")
    assert str(caught.value).count("file.onnx") == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stride: !!bool maybe", "is not YAML"),
        ("task: !!timestamp soon", "is not YAML"),
        ('stride: !!int ""', "is not YAML"),
        ("batch: " + "[" * 5000, "is not YAML"),
        ("a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)), "values"),
        ("a: &a [*a]", "values"),
    ],
    ids=["bool", "timestamp", "int", "nested", "aliases in aliases", "an alias in itself"],
)
def test_a_side_car_that_cannot_be_read_is_an_error_of_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "metadata.yaml").write_text(text)
    with pytest.raises(ArtifactError, match=said) as caught:
        read_yaml(tmp_path / "metadata.yaml")
    assert "metadata.yaml" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_nested_json_is_an_error_of_one_line() -> None:
    with pytest.raises(ArtifactError, match=r"file\.pt2: the metadata is not JSON"):
        read_json('{"a":' + "[" * 100_000, "file.pt2")


@pytest.mark.parametrize("value", [{0: "a", 2: "c"}, {1: "a"}, {"x": "a"}, 3, {0: ["a"]}])
def test_names_with_gaps_are_refused(value: object) -> None:
    with pytest.raises(BadRequest):
        class_names(value, "here")


@settings(max_examples=100, deadline=None)
@given(st.integers(-10, 3000), st.sampled_from([1, 8, 32, 64]))
def test_an_image_size_is_met_or_refused_with_sizes_that_fit(size: int, stride: int) -> None:
    if size > 0 and size % stride == 0:
        assert parse_imgsz(str(size), stride) == (size, size)
        return
    with pytest.raises(BadRequest) as caught:
        parse_imgsz(size, stride)
    for word in caught.value.fix.removeprefix("use ").split(" or "):
        assert int(word) > 0
        assert int(word) % stride == 0


requests = st.fixed_dictionaries(
    {},
    optional={
        "imgsz": st.tuples(st.integers(1, 20), st.integers(1, 20)).map(lambda s: (s[0] * 32, s[1] * 32)),
        "batch": st.integers(1, 64),
        "dynamic": st.booleans(),
        "simplify": st.booleans(),
        "opset": st.integers(17, 20),
        "half": st.booleans(),
    },
)


@settings(max_examples=60, deadline=None)
@given(requests)
def test_a_request_is_never_altered_and_crosses_processes(options: dict[str, object]) -> None:
    spec = request(MODEL, "onnx", **options)
    for name in ("batch", "dynamic", "simplify", "opset", "imgsz"):
        if name in options:
            assert getattr(spec, name) == options[name]
    assert spec.precision is (Precision.FP16 if options.get("half") else Precision.FP32)
    assert ExportSpec.from_dict(spec.to_dict()) == spec


@settings(max_examples=60, deadline=None)
@given(requests, requests)
def test_different_requests_have_different_case_ids(a: dict[str, object], b: dict[str, object]) -> None:
    first, second = request(MODEL, "onnx", **a), request(MODEL, "onnx", **b)
    runtime = formats.get("onnx").runtimes[0]
    assert (Case(first, runtime).id == Case(second, runtime).id) == (first == second)


quantized = st.fixed_dictionaries(
    {"int8": st.just(True), "data": st.just("suites.reference.photographs:crops")},
    optional={
        "calibrator": st.sampled_from(["max", "entropy", "percentile"]),
        "keep": st.lists(st.sampled_from(["model.0.conv", "model.1", "model.22.cv3"]), min_size=1, unique=True),
        "fraction": st.sampled_from([0.5, 1.0]),
    },
)


@settings(max_examples=60, deadline=None)
@given(quantized, quantized)
def test_requests_of_8_bits_cross_processes_and_have_ids_of_their_own(
    a: dict[str, object], b: dict[str, object]
) -> None:
    first, second = request(MODEL, "onnx", **a), request(MODEL, "onnx", **b)
    assert ExportSpec.from_dict(json.loads(json.dumps(first.to_dict()))) == first
    runtime = formats.get("onnx").runtimes[0]
    assert (Case(first, runtime).id == Case(second, runtime).id) == (first == second)


def test_no_cell_of_the_matrix_is_filtered_out_silently(trained: Path) -> None:
    cases = matrix(
        Project(Path()),
        Selection(
            str(trained),
            ("pytorch", "torchscript", "onnx"),
            ("fp32", "fp16", "int8"),
            {"data": str(Path(sklearn.__file__).parent / "datasets" / "images")},
        ),
    )  # type: ignore[arg-type]
    assert len(cases) == 9
    assert {c.spec.format for c in cases if c.because} == {"pytorch", "torchscript"}


def test_every_option_of_every_format_is_one_of_the_request() -> None:
    known = {f.name for f in fields(ExportSpec)}
    for entry in formats.registry().values():
        assert entry.options <= known, entry.id
        assert set(entry.gone).isdisjoint(entry.precisions), entry.id
        assert all(entry.lacks(p) for p in Precision if p not in entry.precisions), entry.id


def test_the_declared_toolchains_are_the_extras_of_the_project() -> None:
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("pyproject.toml is in a checkout only")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, chain in toolchain.TOOLCHAINS.items():
        assert {Requirement(r).name for r in extras[name]} <= set(chain.packages), name
        assert chain.lock.is_file(), chain.lock
    assert {f.toolchain for f in formats.registry().values()} <= set(toolchain.TOOLCHAINS)


@pytest.mark.parametrize("name", [n for n in toolchain.TOOLCHAINS if n != "pytorch"])  # which all of them have
def test_the_tox_environment_that_is_named_has_the_toolchain(name: str) -> None:
    if not (ROOT / "tox.ini").is_file():
        pytest.skip("tox.ini is in a checkout only")
    found = configparser.RawConfigParser()
    found.read(ROOT / "tox.ini")
    section = found[f"testenv:{toolchain.TOOLCHAINS[name].tox}"]
    extras = section.get("extras", found["testenv"]["extras"])
    extras = extras.replace("{[testenv:cpu]extras}", found["testenv:cpu"]["extras"])
    assert name in extras.split() or f"toolchain sync {name}" in section["commands"], extras


def test_collection_imports_no_torch(trained: Path, tmp_path: Path) -> None:
    """The command line and collection stay light: only workers import torch."""
    code = (
        "import sys, pytest\nclass Look:\n def pytest_collection_finish(self, session):\n"
        "  assert len(session.items) > 20\n  print('torch' in sys.modules)\n"
        "pytest.main(['--collect-only', '-qq', '-p', 'suites.plugin', '-c', '/dev/null', '--rootdir', "
        f"{str(ROOT)!r}, '--model', {str(trained)!r}, '--format', 'onnx', {str(ROOT / 'suites/conformance')!r}], "
        "plugins=[Look()])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert "False" in done.stdout.splitlines(), done.stdout + done.stderr
