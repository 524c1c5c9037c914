"""Engine files and the cache's commands, on any machine: header, plan, manifest, Triton's configuration, pruning."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.session import Layer
from exporters.tensorrt import timing
from exporters.tensorrt.calibrators import algorithm_of, is_cache
from exporters.tensorrt.header import read_engine, write_engine
from exporters.tensorrt.inspector import achieved
from exporters.tensorrt.plans import strip, wrap
from suites.selftest.test_bad_input import assert_refused, run

PLAN = b"ftrt\x00\x00\x00\x00\x01\x00" + bytes(range(256))
HEADER: dict[str, Any] = {
    "stride": 32,
    "batch": 8,
    "imgsz": [640, 640],
    "names": {"0": "Straße", "1": 'a "quote"\nand a line'},
    "plan": {
        "made_by": "TensorRT 10.6.0",
        "gpu": "NVIDIA H100 80GB HBM3",
        "inputs": [{"name": "images", "shape": [-1, 3, 640, 640], "dtype": "FLOAT"}],
        "outputs": [{"name": "output0", "shape": [-1, 10, 8400], "dtype": "HALF"}],
    },
}


def engine(folder: Path, header: Any = HEADER) -> Path:
    path = folder / "best.engine"
    write_engine(path, header, PLAN)
    return path


def test_the_length_of_the_header_counts_bytes(tmp_path: Path) -> None:
    data = engine(tmp_path).read_bytes()
    length = int.from_bytes(data[:4], "little", signed=True)
    facts = {**HEADER["plan"], "sha256": hashlib.sha256(PLAN).hexdigest()}
    assert json.loads(data[4 : 4 + length].decode("utf-8")) == {**HEADER, "plan": facts}
    assert data[4 + length :] == PLAN


def test_strip_and_wrap_give_the_same_file(tmp_path: Path) -> None:
    path = engine(tmp_path)
    before = path.read_bytes()
    assert run(["engine", "strip", "best.engine"], tmp_path).returncode == 0
    assert (tmp_path / "best.plan").read_bytes() == PLAN
    path.unlink()
    assert run(["engine", "wrap", "best.plan"], tmp_path).returncode == 0
    assert path.read_bytes() == before


@given(names=st.dictionaries(st.integers(0, 99).map(str), st.text()), plan=st.binary(min_size=16).map(PLAN[:8].__add__))
def test_any_names_survive_strip_and_wrap(names: dict[str, str], plan: bytes, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("any")
    path = folder / "any.engine"
    # Lone surrogates are no text that UTF-8 can write; no checkpoint holds them.
    header = {"names": {k: v.encode("utf-8", "replace").decode() for k, v in names.items()}}
    write_engine(path, header, plan)
    made = wrap(*strip(path, folder / "any.plan"), folder / "again.engine")
    assert made.read_bytes() == path.read_bytes()
    assert read_engine(made).header == header and read_engine(made).plan() == plan


def test_triton_is_told_what_the_plan_takes(tmp_path: Path) -> None:
    engine(tmp_path)
    assert run(["engine", "strip", "best.engine", "--triton", "models", "--name", "det"], tmp_path).returncode == 0
    assert (tmp_path / "models/det/1/model.plan").read_bytes() == PLAN
    text = (tmp_path / "models/det/config.pbtxt").read_text(encoding="utf-8")
    words = " ".join(text.split())
    assert 'name: "det" platform: "tensorrt_plan" max_batch_size: 8' in words
    assert 'input [ { name: "images" data_type: TYPE_FP32 dims: [ 3, 640, 640 ] } ]' in words
    assert 'output [ { name: "output0" data_type: TYPE_FP16 dims: [ 10, 8400 ] } ]' in words


def test_triton_gets_whole_shapes_where_the_batch_is_fixed(tmp_path: Path) -> None:
    facts = {
        **HEADER["plan"],
        "inputs": [{"name": "images", "shape": [1, 3, 640, 640], "dtype": "FLOAT"}],
        "outputs": [{"name": "output0", "shape": [1, 10, 8400], "dtype": "FLOAT"}],
    }
    engine(tmp_path, {**HEADER, "plan": facts})
    assert run(["engine", "strip", "best.engine", "--triton", "models"], tmp_path).returncode == 0
    words = " ".join((tmp_path / "models/best/config.pbtxt").read_text(encoding="utf-8").split())
    assert "max_batch_size: 0" in words and "dims: [ 1, 3, 640, 640 ]" in words and "dims: [ 1, 10, 8400 ]" in words


def test_show_tells_header_and_plan(tmp_path: Path) -> None:
    engine(tmp_path)
    done = run(["engine", "show", "best.engine"], tmp_path)
    assert done.returncode == 0
    for words in (f"plan of {len(PLAN)} bytes", "Straße", "input images: FLOAT [-1, 3, 640, 640]", "TensorRT 10.6.0"):
        assert words in done.stdout


def test_an_operator_that_no_layer_names_is_an_exception() -> None:
    layers = [Layer("a", "CaskConvolution", "fp16", None, ("/a/Conv",)), Layer("f", "kgen", "fp32", None, ())]
    assert achieved(layers, {"operators": ["/a/Conv"]}).exceptions == ()
    found = achieved(layers, {"operators": ["/a/Conv", "/b/Conv"]})
    assert found.precision == "fp16" and found.exceptions == ("/b/Conv",)
    assert found.counts["operators unknown"] == 1


def test_of_layers_that_name_a_node_the_one_that_multiplies_counts() -> None:
    """And the first one, where none does: another may move what it made."""

    def precision(*kinds: tuple[str, str]) -> str:
        return achieved([Layer(k, k, p, None, ("/a/Conv",)) for k, p in kinds], {"operators": ["/a/Conv"]}).precision

    assert precision(("shuffle", "fp32"), ("CaskConvolution", "fp16")) == "fp16"
    assert precision(("CaskConvolution", "fp16"), ("shuffle", "fp32")) == "fp16"
    assert precision(("kgen", "fp16"), ("shuffle", "fp32")) == "fp16"


def test_show_prints_nothing_that_a_terminal_obeys(tmp_path: Path) -> None:
    engine(tmp_path, {**HEADER, "author": "\x1b[2Jgone"})
    done = run(["engine", "show", "best.engine"], tmp_path)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout and "\\x1b[2Jgone" in done.stdout


def _damaged(folder: Path) -> None:
    engine(folder)
    (folder / "plain.engine").write_bytes(PLAN)
    (folder / "tiny.engine").write_bytes(b"abc")
    (folder / "cut.engine").write_bytes((folder / "best.engine").read_bytes()[:100])
    (folder / "broken.engine").write_bytes((9).to_bytes(4, "little") + b'{"names":' + PLAN)
    write_engine(folder / "peer.engine", {k: v for k, v in HEADER.items() if k != "plan"}, PLAN)
    strip(folder / "best.engine", folder / "best.plan")
    (folder / "other.plan").write_bytes(PLAN + b"x")
    (folder / "other.plan.json").write_bytes((folder / "best.plan.json").read_bytes())
    (folder / "list.json").write_text("[]")
    good = (folder / "best.engine").read_bytes()
    (folder / "noise.engine").write_bytes(b"\xa7" + bytes(range(200)))
    (folder / "page.engine").write_bytes(good[: -len(PLAN)] + b"<html></html>")
    (folder / "swapped.engine").write_bytes(good[: -len(PLAN)] + PLAN[:8] + PLAN[:7:-1])
    (folder / "length.engine").write_bytes((-5).to_bytes(4, "little", signed=True) + good[4:])
    write_engine(folder / "empty.engine", HEADER, b"")
    deep = b'{"names": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (folder / "deep.engine").write_bytes(len(deep).to_bytes(4, "little") + deep + PLAN)
    write_engine(folder / "inputs.engine", {**HEADER, "plan": {**HEADER["plan"], "inputs": 5}}, PLAN)
    write_engine(folder / "tensor.engine", {**HEADER, "plan": {**HEADER["plan"], "outputs": [{"name": "o"}]}}, PLAN)
    half = b'{"names": {"0": "\\ud800"}}'
    (folder / "half.engine").write_bytes(len(half).to_bytes(4, "little") + half + PLAN)
    facts = {**HEADER["plan"], "sha256": None}
    text = json.dumps({**HEADER, "plan": facts}).encode()
    (folder / "unsigned.engine").write_bytes(len(text).to_bytes(4, "little") + text + PLAN)
    write_engine(folder / "batch.engine", {**HEADER, "batch": "x"}, PLAN)
    write_engine(folder / "network.engine", {**HEADER, "plan": {**HEADER["plan"], "network": {"a": {"b": 1}}}}, PLAN)
    (folder / "garbage.plan").write_bytes(b"garbage, no plan")
    told = {"sha256": hashlib.sha256(b"garbage, no plan").hexdigest(), "header": {"names": {"0": "a"}}}
    (folder / "garbage.plan.json").write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["strip", "nowhere.engine"], ("nowhere.engine", "no file")),
        (["strip", "plain.engine"], ("plain.engine", "plain plan already")),
        (["strip", "tiny.engine"], ("tiny.engine", "3 bytes")),
        (["strip", "broken.engine"], ("broken.engine", "not JSON")),
        (["strip", "cut.engine"], ("cut.engine", "ends within its metadata header")),
        (["strip", "best.engine"], ("best.plan", "exists", "--overwrite")),
        (["strip", "peer.engine", "--triton", "m"], ("peer.engine", "inputs and outputs")),
        (["strip", "best.engine", "--triton", "m", "--output", "x.plan"], ("--output x.plan", "--triton")),
        (["strip", "best.engine", "--output", "no/such/x.plan"], ("x.plan", "cannot be written")),
        (["wrap", "other.plan"], ("other.plan", "is not the plan")),
        (["wrap", "best.plan", "--manifest", "list.json", "--output", "x.engine"], ("list.json", "no manifest")),
        (["wrap", "best.plan", "--manifest", "gone.json", "--output", "x.engine"], ("gone.json", "cannot be read")),
        (["wrap", "best.plan"], ("best.engine", "exists", "--overwrite")),
        (["show", "."], ("'.'", "no file")),
        (["weigh", "best.engine"], ("weigh",)),
        (["show", "noise.engine"], ("noise.engine", "no plan of TensorRT")),
        (["show", "page.engine"], ("page.engine", "no plan of TensorRT", "<htm")),
        (["strip", "swapped.engine"], ("swapped.engine", "is not the one")),
        (["show", "length.engine"], ("length.engine", "length of -5")),
        (["show", "empty.engine"], ("empty.engine", "no plan")),
        (["show", "deep.engine"], ("deep.engine", "not JSON")),
        (["show", "inputs.engine"], ("inputs.engine", "plan.inputs", "5")),
        (["strip", "tensor.engine"], ("tensor.engine", "plan.outputs")),
        (["show", "network.engine"], ("network.engine", "plan.network", "'b': 1")),
        (["wrap", "garbage.plan"], ("garbage.plan", "holds no plan of TensorRT")),
        (["show", "half.engine"], ("half.engine", "ud800")),
        (["show", "unsigned.engine"], ("unsigned.engine", "plan.sha256", "None")),
        (["strip", "best.engine", "--output", "plain.engine/x"], ("plain.engine/x", "cannot be written")),
        (["wrap", "best.plan", "--output", "plain.engine/x"], ("plain.engine/x", "cannot be written")),
        (["wrap", "best.plan", "--output", "best.plan", "--overwrite"], ("best.plan", "what is wrapped")),
        (["strip", "batch.engine", "--triton", "m"], ("batch.engine", "batch", "'x'")),
        (["strip", "best.engine", "--triton", "m", "--name", "../outside"], ("'../outside'", "no name")),
        (["strip", "best.engine", "--output", "best.engine", "--overwrite"], ("best.engine", "the engine itself")),
    ],
)
def test_bad_requests_are_one_line(words: list[str], said: tuple[str, ...], tmp_path: Path) -> None:
    _damaged(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    assert_refused(run(["engine", *words], tmp_path), *said)
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_timing_caches_travel_packed_beside_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored for a GPU model seeds an empty cache, byte for byte, and never replaces one that is kept."""
    name, data = "nvidia-h100-80gb-hbm3-tensorrt-10.6.0.cache", bytes(range(256)) * 400
    for place in ("one", "two"):
        (tmp_path / place / "timing").mkdir(parents=True)
    (tmp_path / "one" / "timing" / name).write_bytes(data)
    (tmp_path / "one" / "timing" / "nvidia-a100-tensorrt-10.6.0.cache").write_bytes(b"another GPU's")
    monkeypatch.setenv("EXPORTGATE_CACHE", str(tmp_path / "one"))
    gpu = "NVIDIA H100 80GB HBM3"
    stored = timing.store(tmp_path / "baselines" / "h100", gpu)
    assert [p.name for p in stored] == [f"{name}.xz"] and stored[0].stat().st_size < len(data) / 10
    monkeypatch.setenv("EXPORTGATE_CACHE", str(tmp_path / "two"))
    told: list[str] = []
    timing.seed(tmp_path / "baselines", "NVIDIA A100", told.append)
    assert not list((tmp_path / "two" / "timing").iterdir()), "of another GPU model"
    timing.seed(tmp_path / "baselines", gpu, told.append)
    kept = tmp_path / "two" / "timing" / name
    assert kept.read_bytes() == data
    kept.write_bytes(b"what later builds learnt")
    timing.seed(tmp_path / "baselines", gpu, told.append)
    assert kept.read_bytes() == b"what later builds learnt" and not told
    kept.unlink()
    stored[0].write_bytes(stored[0].read_bytes()[:-50])
    timing.seed(tmp_path / "baselines", gpu, told.append)
    assert not kept.exists() and len(told) == 1 and stored[0].name in told[0]


@pytest.mark.parametrize(
    ("data", "is_one", "algorithm"),
    [
        (b"TRT-100600-EntropyCalibration2\nimages: 3c010a14\n", True, "ENTROPY_CALIBRATION_2"),
        (b"TRT-8601-MinMaxCalibration\nimages: 3c010a14\n/a/Conv: 3c010a14\n", True, "MINMAX_CALIBRATION"),
        (b"0 3ff0000000000000 3fefff2e48e8a71e\nimages: 3bce0b2d\n", True, "LEGACY_CALIBRATION"),  # TensorRT 10.6's
        (b"0 3ff0000000000000\nimages: 3bce0b2d\n", False, ""),
        (b"TRT-100600-EntropyCalibration2\n", False, "ENTROPY_CALIBRATION_2"),
        (b"TRT-100600-EntropyCalibration2\nimages: 3c01\n", False, "ENTROPY_CALIBRATION_2"),
        (b"\x00\xff\xfe", False, ""),
        (b"", False, ""),
    ],
)
def test_a_calibration_cache_is_told_from_other_files(data: bytes, is_one: bool, algorithm: str) -> None:
    assert is_cache(data) is is_one
    assert algorithm_of(data) == algorithm


def test_the_cache_is_shown_and_pruned(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name, age in (("timing/old.cache", 40), ("timing/new.cache", 1), ("placed/mark", 90), ("toolchains/x/f", 90)):
        path = cache / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(2048))
        then = path.stat().st_mtime - age * 86400
        os.utime(path, (then, then))
    shown = run(["cache", "show"], tmp_path)
    assert shown.returncode == 0 and "timing: 2 (4.0 KiB)" in shown.stdout
    assert re.search(r"timing/new\.cache: 2\.0 KiB, last used \d{4}-\d\d-\d\d", shown.stdout)
    done = run(["cache", "prune", "--older-than", "30"], tmp_path)
    assert done.returncode == 0 and "1 entries removed" in done.stdout
    assert not (cache / "timing/old.cache").exists()
    for kept in ("timing/new.cache", "placed/mark", "toolchains/x/f"):
        assert (cache / kept).exists()
    for words, said in ((["--older-than", "x"], "'x'"), (["--older-than", "1", "--kind", "timng"], "'timng'")):
        assert_refused(run(["cache", "prune", *words], tmp_path), said)
