"""TensorRT without a GPU: TensorRT-RTX builds the matrix ahead of time, and the files that TensorRT cannot take."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from exporters import toolchain
from exporters.artifact import MANIFEST, UNQUANTIZED, Artifact, list_files
from exporters.errors import ExportgateError, NotSupported, ToolchainMissing
from exporters.pool import Pool
from exporters.spec import ExportSpec, request
from exporters.tensorrt.header import Engine, read_engine, write_engine
from suites.conformance import test_export, test_metadata, test_precision
from suites.selftest.conftest import Judge, Workshop
from suites.selftest.test_bad_input import assert_refused, run
from suites.support.verdict import Verdict


def is_here() -> bool:
    try:
        toolchain.resolve("rtx")
    except ToolchainMissing:
        return False
    return True


pytestmark = pytest.mark.skipif(not is_here(), reason="TensorRT-RTX is not installed: exportgate[rtx] brings it")
PRECISION = test_precision.test_achieved_precision_is_the_requested


def _engine(workshop: Workshop, name: str) -> Engine:
    return read_engine(workshop.good(name).path)


@pytest.mark.parametrize("shape", ["", "dynamic", "pair"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16", "int8"])
def test_the_matrix_builds_for_three_generations(workshop: Workshop, judge: Judge, precision: str, shape: str) -> None:
    """For 8.6, 8.9 and 12.0 at once; the precision is read back from the network before the build."""
    # An INT8 detector is calibrated in a moment where the model is small.
    name = f"{'blobs ' if precision == 'int8' else ''}engine {precision} {shape}".strip()
    for claim in (PRECISION, test_export.test_export_makes_the_declared_file):
        verdict, because = judge(claim, workshop.bench(name))
        assert verdict is Verdict.PASS, because
    facts = _engine(workshop, name).facts
    assert facts["compute_capability"] == "8.6,8.9,12.0"
    assert str(facts["made_by"]).startswith("TensorRT-RTX")
    assert set(facts["network"].values()) <= {precision, "fp32"}
    size = 160 if precision == "int8" else 320
    smallest = 8 if precision == "int8" else 32
    low, best, high = {
        "": (None, None, None),
        "dynamic": ([1, 3, smallest, smallest], [1, 3, size, size], [1, 3, 2 * size, 2 * size]),
        "pair": ([1, 3, size, size], [2, 3, size, size], [2, 3, size, size]),
    }[shape]
    assert facts["profiles"] == ([{"images": [low, best, high]}] if low else [])


def test_fp8_builds_where_there_is_fp8(workshop: Workshop, judge: Judge) -> None:
    name = "blobs engine fp8"
    assert judge(PRECISION, workshop.bench(name)) == (Verdict.PASS, "")
    facts = _engine(workshop, name).facts
    assert facts["compute_capability"] == "8.9,12.0" and "fp8" in facts["network"].values(), facts["network"]


@pytest.mark.parametrize("name", ["engine fp32", "engine fp16", "blobs engine int8"])
def test_two_builds_give_the_same_bytes(
    workshop: Workshop, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _engine(workshop, name).plan()
    monkeypatch.setenv("EXPORTGATE_CACHE", str(tmp_path))
    with Pool() as pool:
        again = pool.export(workshop.case(name).spec)
        assert again.key in pool.fresh, "the second build came from the cache"
    assert read_engine(again.path).plan() == first


def test_a_hopper_is_refused(workshop: Workshop) -> None:
    """TensorRT-RTX does not build for compute capability 9.0, and says what it builds for."""
    spec = request(workshop.models["obstacles"], "engine", imgsz=320, compute_capability="9.0")
    with pytest.raises(NotSupported) as caught:
        workshop.run.pool.export(spec)
    assert "9.0" in str(caught.value) and "8.9" in str(caught.value)


def test_an_fp32_engine_that_is_called_fp16_is_caught(workshop: Workshop, judge: Judge) -> None:
    other = workshop.good("engine fp32").path

    def damage(path: Path, _: Workshop) -> None:
        path.write_bytes(other.read_bytes())

    assert judge(PRECISION, workshop.bench("engine fp16")) == (Verdict.PASS, "")
    verdict, because = workshop.judge("engine fp16", PRECISION, damage)
    assert verdict is Verdict.FAIL and "asked for fp16, the file is fp32" in because


def test_an_engine_that_lost_its_names_is_caught(workshop: Workshop, judge: Judge) -> None:
    """Metadata is judged where the engine cannot run, too."""

    def damage(path: Path, _: Workshop) -> None:
        engine = read_engine(path)
        write_engine(path, {**(engine.header or {}), "names": {"0": "thing"}}, engine.plan())

    claim = test_metadata.test_class_names_survive_the_round_trip
    assert judge(claim, workshop.bench("engine fp16")) == (Verdict.PASS, "")
    verdict, because = workshop.judge("engine fp16", claim, damage)
    assert verdict is Verdict.FAIL and "class names differ" in because


def test_int8_that_left_a_convolution_in_fp32_is_caught(workshop: Workshop) -> None:
    def damage(path: Path, _: Workshop) -> None:
        engine = read_engine(path)
        header: dict[str, Any] = json.loads(json.dumps(engine.header))
        kinds = header["plan"]["network"]
        kinds[next(name for name, kind in kinds.items() if kind == "int8")] = "fp32"
        write_engine(path, header, engine.plan())

    verdict, because = workshop.judge("blobs engine int8", PRECISION, damage)
    assert verdict is Verdict.FAIL and "operators are not" in because


def test_what_quantization_leaves_alone_is_named_and_no_exception(workshop: Workshop, judge: Judge) -> None:
    """A transposed convolution and products of two computed tensors, in the file and in the network."""
    for name in ("mixed onnx int8", "mixed engine int8"):
        bench = workshop.bench(name)
        assert judge(PRECISION, bench) == (Verdict.PASS, "")
        assert bench.facts().achieved.counts[UNQUANTIZED] == 3
        bench.close()


@pytest.mark.parametrize("name", ["mixed engine fp32", "mixed engine fp16", "mixed engine int8"])
def test_an_engine_is_built_with_what_is_inside(workshop: Workshop, name: str) -> None:
    """Outputs of modules as well, in FP32, that of the whole network among them; what is not there is left out."""
    spec = workshop.case(name).spec
    made = workshop.run.pool.export(spec.but(inside=("stem", "up", "last", "gone")))
    outputs = {o["name"]: o for o in read_engine(made.path).facts["outputs"]}
    assert list(outputs) == ["output0", "inside/stem", "inside/up", "inside/last"]
    assert {o["dtype"] for o in outputs.values()} == {"FLOAT"}
    assert [outputs[f"inside/{m}"]["shape"] for m in ("stem", "up")] == [[1, 8, 32, 32], [1, 8, 64, 64]]
    assert read_engine(workshop.good(name).path).facts["outputs"] == [outputs["output0"]]


def test_a_plan_that_is_not_its_headers_is_caught(workshop: Workshop) -> None:
    def damage(path: Path, _: Workshop) -> None:
        engine = read_engine(path)
        path.write_bytes(path.read_bytes()[: engine.start] + engine.plan()[:8] + random.Random(0).randbytes(2000))

    verdict, because = workshop.judge("engine fp16", PRECISION, damage)
    assert verdict is Verdict.ERROR and "not the one that its metadata header describes" in because


def test_noise_that_is_brought_is_not_qualified(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "noise.engine").write_bytes(b"\xa7" + bytes(range(256)) * 20)
    weights = str(workshop.models["obstacles"].weights)
    for device in (["--device", "0"], ["--device", "cpu", "--compute-capability", "8.9"]):
        done = run(["check", "noise.engine", "--model", weights, "--trust", *device], tmp_path)
        assert done.returncode not in (0, None), done.stdout
        assert "\nQUALIFIED" not in done.stdout


# ---- ONNX files that TensorRT takes in silence or refuses in words that help nobody ---------------------------------

Harm = Callable[[Path], object]


def _model(change: Callable[[onnx.ModelProto], None]) -> Harm:
    def harm(path: Path) -> None:
        model = onnx.load(path)
        change(model)
        onnx.save(model, path)

    return harm


def _opset(version: int) -> Harm:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = version

    return _model(change)


def _ir(model: onnx.ModelProto) -> None:
    model.ir_version = 99


def _unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "Convolute"
    model.graph.node[0].domain = "example.com"
    model.opset_import.append(onnx.helper.make_opsetid("example.com", 1))


def _renamed_input(model: onnx.ModelProto) -> None:
    old = model.graph.input[0].name
    model.graph.input[0].name = "pictures"
    for node in model.graph.node:
        node.input[:] = ["pictures" if name == old else name for name in node.input]


def _external(cut: bool) -> Harm:
    def harm(path: Path) -> None:
        onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
        data = path.with_name("weights.bin")
        data.write_bytes(data.read_bytes()[:100]) if cut else data.unlink()

    return harm


BAD: dict[str, tuple[Harm, tuple[str, ...]]] = {
    "empty": (lambda p: p.write_bytes(b""), ("holds no graph",)),
    "zeros": (lambda p: p.write_bytes(bytes(4096)), ("not an ONNX model",)),
    "a web page": (lambda p: p.write_text("<!DOCTYPE html><html></html>"), ("not an ONNX model",)),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-20]), ("not an ONNX model",)),
    "random": (lambda p: p.write_bytes(random.Random(0).randbytes(5000)), ("not an ONNX model",)),
    "unknown operator": (_model(_unknown_operator), ("Convolute",)),
    "opset 99": (_opset(99), ("operator set 99", "ends at")),
    "opset of a newer ONNX": (_opset(onnx.defs.onnx_opset_version() + 1), ("operator set", "ends at")),
    "IR 99": (_model(_ir), ("IR version 99",)),
    "another input": (_model(_renamed_input), ("no input 'images'", "pictures")),
    "external data missing": (_external(cut=False), ("weights.bin", "missing")),
    "external data truncated": (_external(cut=True), ("weights.bin", "100 bytes")),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_onnx_file_is_one_line(
    workshop: Workshop, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that the engine is made from is damaged in the cache, its manifest with it; a real worker builds."""
    monkeypatch.setenv("EXPORTGATE_CACHE", str(tmp_path))
    spec = _request(workshop, "engine", compute_capability="8.9")
    with Pool() as pool:
        parent = pool.export(_request(workshop, "onnx"))
        harm, words = BAD[name]
        harm(parent.path)
        _manifest(parent)
        with pytest.raises(ExportgateError) as caught:
            pool.export(spec)
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert "\n" not in str(caught.value)
        # The worker lives on: the next case builds.
        good = pool.export(_request(workshop, "engine", compute_capability="8.9", imgsz=64))
        assert good.path.is_file()
    assert not [p for p in (tmp_path / "artifacts").iterdir() if "engine" in p.name and p != good.root]


def _request(workshop: Workshop, form: str, **options: Any) -> ExportSpec:
    return request(workshop.models["twins"], form, **options)


def _manifest(artifact: Artifact) -> None:
    """The manifest of a broken exporter describes what it made."""
    told = dataclasses.replace(artifact, files=list_files(artifact.root))
    (artifact.root / MANIFEST).write_text(json.dumps(told.to_dict()), encoding="utf-8")


# ---- requests that cannot be ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ("compute capability", "--compute-capability")),
        (["--compute-capability", "eight"], ("'eight'", "major.minor")),
        (["--compute-capability", "9.0"], ("9.0", "8.9")),
        (["--compute-capability", "8.6", "--precision", "fp8", "--data", "{images}"], ("fp8", "8.6", "8.9")),
        (["--compute-capability", "8.9", "--batch", "100000000"], ("batch 100000000", "2147483647", "lower batch")),
        (["--compute-capability", "7.5"], ("Turing", "FP32 GEMM is not supported")),
        (["--dla", "9" * 5000], ("dla '99999999999999999999'",)),
        (["--int8"], ("INT8", "--data")),
        (["--int8", "--data", "{images}", "--trt-quant-algo", "ENTROPY_2"], ("GPU",)),
        (["--trt-quant-algo", "ENTROPY_CALIBRATION_3", "--int8", "--data", "{images}"], ("'ENTROPY_CALIBRATION_3'",)),
        (["--workspace", "0"], ("workspace", "'0'")),
        (["--workspace", "much"], ("workspace", "'much'")),
        (["--builder-level", "9"], ("builder_level", "'9'")),
        (["--timing-cache", "nowhere.cache"], ("timing_cache", "nowhere.cache")),
        (["--hardware-compatibility", "volta"], ("hardware_compatibility", "'volta'")),
        (["--dla", "x"], ("dla", "'x'")),
        (["--refit", "--compute-capability", "8.9"], ("refit",)),
        (["--profiles", "1x320x320:1x640x640:1x640x640"], ("profiles", "--dynamic")),
        (["--dynamic", "--profiles", "1x640x640:1x320x320:1x640x640"], ("height", "640", "320")),
        (["--dynamic", "--profiles", "1x300x320:1x320x320:1x640x640"], ("min", "300", "stride 32", "288 or 320")),
        (["--dynamic", "--batch", "8", "--profiles", "1x320x320:1x320x320:4x640x640"], ("batch 8", "4")),
        (["--dynamic", "--profiles", "1x320x320"], ("profile", "1 shapes")),
        (["--dynamic", "--profiles", "1x320x320:1x320x320:1x999999968x640"], ("1x999999968x640", "2147483647")),
        (
            ["--dynamic", "--profiles", "1x320x320:1x320x320:1x320x320,1x320x320:4x320x320:8x640x640"],
            ("add --batch 8",),
        ),
        (["--dynamic", "--profiles", "1x64x64:1x96x96:1x128x128"], ("imgsz 320x320", "none of the profiles")),
        (["--timing-cache", "off", "--compute-capability", "8.9"], ("timing_cache", "nothing is timed")),
        (["--precision", "bf16", "--compute-capability", "7.5"], ("bf16", "7.5", "8.0")),
        (["--hardware-compatibility", "ampere_plus", "--compute-capability", "8.9"], ("hardware_compatibility",)),
    ],
)
def test_an_engine_that_cannot_be_is_refused_in_one_line(
    trained: Path, options: list[str], words: tuple[str, ...], tmp_path: Path
) -> None:
    from suites.reference.photographs import folder

    given = [o.format(images=folder()) for o in options]
    done = run(["export", str(trained), "--format", "engine", "--output", "out", "--imgsz", "320", *given], tmp_path)
    assert_refused(done, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "asked", "words"),
    [
        (["--compute-capability", "8.6"], ["--compute-capability", "8.9"], ("built for compute capability 8.6", "8.9")),
        (
            ["--compute-capability", "8.6", "--dynamic", "--profiles", "1x64x64:1x96x96:1x128x128"],
            ["--compute-capability", "8.6", "--dynamic", "--profiles", "1x32x32:1x96x96:1x128x128"],
            ("built with the profiles", "[1, 3, 64, 64]", "[1, 3, 32, 32]"),
        ),
    ],
)
def test_an_engine_for_other_gpus_or_shapes_is_not_qualified(
    trained: Path, given: list[str], asked: list[str], words: tuple[str, ...], tmp_path: Path
) -> None:
    """Its own header says what it was built for."""
    common = ["--format", "engine", "--imgsz", "96"]
    done = run(["export", str(trained), *common, *given, "--output", "out"], tmp_path)
    assert done.returncode == 0, done.stderr
    check = ["check", str(next((tmp_path / "out").glob("*.engine"))), "--model", str(trained), *common, "--trust"]
    done = run([*check, *given], tmp_path)
    assert done.returncode == 0 and "values of 1 not compared" in done.stdout, done.stdout
    done = run([*check, *asked], tmp_path)
    assert done.returncode == 1
    assert all(word in done.stdout for word in words), done.stdout


def test_an_engine_of_another_size_behind_the_right_metadata_is_not_qualified(trained: Path, tmp_path: Path) -> None:
    """What was read off the network counts, not the size that its header was asked for."""
    common = ["--format", "engine", "--compute-capability", "8.6"]
    for size in ("64", "96"):
        assert run(["export", str(trained), *common, "--imgsz", size, "--output", size], tmp_path).returncode == 0
    small, right = (read_engine(next((tmp_path / size).glob("*.engine"))) for size in ("64", "96"))
    write_engine(tmp_path / "forged.engine", {**(right.header or {}), "plan": dict(small.facts)}, small.plan())
    check = ["check", "forged.engine", "--model", str(trained), *common, "--imgsz", "96", "--trust"]
    done = run(check, tmp_path)
    assert done.returncode == 1 and "has shape [1, 3, 64, 64], and [1, 3, 96, 96] is asked for" in done.stdout


def test_a_verbose_build_keeps_its_log(trained: Path, tmp_path: Path) -> None:
    """Beside the artifact, or where it fails in the cache; a quiet one that was made before has none."""
    export = ["export", str(trained), "--format", "engine", "--imgsz", "96", "--compute-capability"]
    assert run([*export, "8.9", "--output", "quiet"], tmp_path).returncode == 0
    done = run([*export, "8.9", "--output", "verbose", "--toolchain-log"], tmp_path)
    assert done.returncode == 0
    path = next(line.partition("log: ")[2] for line in done.stdout.splitlines() if "builder's log" in line)
    assert "[V]" in Path(path).read_text(encoding="utf-8") or len(Path(path).read_text(encoding="utf-8")) > 10_000
