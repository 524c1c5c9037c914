"""Edge TPU: what its compiler demands is told without it, and no file is passed off as compiled."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from exporters import formats
from exporters.artifact import foreign
from exporters.errors import BadRequest, ExportError, NotSupported, ToolchainMissing
from exporters.litert import edgetpu
from exporters.pool import Pool
from exporters.runtimes import tflite_file
from exporters.spec import ExportSpec, request
from suites.conformance.test_precision import test_achieved_precision_is_the_requested as achieved_precision
from suites.support.bench import Bench
from suites.support.cases import Case, what_is_missing
from suites.support.verdict import Verdict

if TYPE_CHECKING:
    from suites.selftest.conftest import Judge, Workshop

pytestmark = pytest.mark.formats
FULL = "blobs tflite int8 full_integer"


@pytest.fixture(autouse=True)
def toolchain() -> None:
    missing = what_is_missing(formats.get("edgetpu"), "cpu")
    if missing:
        pytest.skip(missing)


@pytest.fixture
def spec(workshop: Workshop) -> ExportSpec:
    """Of what the workshop makes of the same words, so that the file that it is made from is made once."""
    full = workshop.case(FULL).spec
    return full.but(format="edgetpu", quantization="dynamic")


def _exported(spec: ExportSpec, folder: Path, script: str) -> str:
    """What is said of an export where a compiler is on the PATH that does this; "" where it goes well."""
    compiler = folder / "edgetpu_compiler"
    compiler.write_text(f"#!{sys.executable}\nimport pathlib, shutil, sys\nfolder, source = sys.argv[-2:]\n{script}\n")
    compiler.chmod(0o755)
    pool = Pool(variables={"PATH": f"{folder}:{os.environ['PATH']}"})
    try:
        pool.export(spec)
    except ExportError as error:
        assert "\n" not in str(error)
        return str(error)
    finally:
        pool.close()
    return ""


def test_without_the_compiler_its_demands_are_told(workshop: Workshop, spec: ExportSpec) -> None:
    if shutil.which("edgetpu_compiler"):
        pytest.skip("it is on the PATH")
    with pytest.raises(ToolchainMissing, match=r"not on the PATH \(the Edge TPU takes \d+ of \d+ operators") as caught:
        workshop.run.pool.export(spec)
    assert "MiB fit into its 8 MiB" in str(caught.value)
    bench = Bench(workshop.run, Case(spec, formats.get("edgetpu").runtimes[0]))
    from suites.selftest.conftest import judged

    assert judged(achieved_precision, bench)[0] is Verdict.SKIPPED


def test_failures_of_the_compiler_are_told_in_one_line(spec: ExportSpec, tmp_path: Path) -> None:
    """A script stands for it; of what it makes nothing is taken that lacks the compiler's operator."""
    assert "exit code 3 (Error: no)" in _exported(spec, tmp_path, "print('Error: no'); sys.exit(3)")
    assert "made no " in _exported(spec, tmp_path, "print('Internal compiler error. Aborting!')")
    copied = "name = pathlib.Path(source).stem + '_edgetpu.tflite'\nshutil.copy(source, pathlib.Path(folder) / name)"
    assert "made a file without edgetpu-custom-op" in _exported(spec, tmp_path, copied)
    flags = "assert sys.argv[1:6] == ['-s', '-d', '-k', '10', '-o'], sys.argv"
    assert "exit code 1" not in _exported(spec, tmp_path, flags)


def test_a_file_that_was_not_compiled_fails(workshop: Workshop, spec: ExportSpec, tmp_path: Path, judge: Judge) -> None:
    path = tmp_path / "blobs_full_integer_quant_edgetpu.tflite"
    shutil.copy(workshop.good(FULL).path, path)
    brought = foreign(path, "edgetpu", spec.to_dict(), trust=False, is_code=False)
    bench = Bench(workshop.run, Case(spec, formats.get("edgetpu").runtimes[0]), brought)
    verdict, because = judge(achieved_precision, bench)
    assert verdict is Verdict.FAIL and "not compiled for the Edge TPU" in because, because


def test_the_compilers_operator_holds_something(workshop: Workshop) -> None:
    file = tflite_file.read(workshop.good(FULL).path)
    for held in (0, 4096):
        shell = tflite_file.Operator(tflite_file.CUSTOM, edgetpu.COMPILED, file.inputs, file.outputs, None, held)
        assert edgetpu.is_compiled(replace(file, operators=(shell,))) == (held > 0)


def test_what_the_compiler_would_refuse_is_told(workshop: Workshop) -> None:
    full = edgetpu.demands(tflite_file.read(workshop.good(FULL).path))
    assert full.violations == ()
    assert 0 < full.mapped <= full.operators
    floating = tflite_file.read(workshop.good("blobs tflite fp32").path)
    told = edgetpu.demands(floating).violations
    assert "input 'images' is float32, expected int8 or uint8" in told
    tensors = [replace(t, shape=(-1, *t.shape[1:])) if t.name == "images" else t for t in floating.tensors]
    assert any("size that varies" in v for v in edgetpu.demands(replace(floating, tensors=tuple(tensors))).violations)
    tensors = [replace(t, shape=(2, *t.shape[1:])) if t.name == "images" else t for t in floating.tensors]
    assert any("batch of 2" in v for v in edgetpu.demands(replace(floating, tensors=tuple(tensors))).violations)


def test_what_it_is_made_of_is_refused_as_there(workshop: Workshop) -> None:
    model = workshop.models["blobs"]
    with pytest.raises(NotSupported, match="one picture at a time"):
        request(model, "edgetpu", int8=True, data="small_models:many", batch=2)
    with pytest.raises(BadRequest, match="needs images to calibrate on"):
        request(model, "edgetpu", int8=True)
    with pytest.raises(NotSupported, match="no precision fp32"):
        request(model, "edgetpu")
