"""What is special to OpenVINO: what its Model API reads of a file, beside metadata.yaml."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from exporters import formats
from exporters.artifact import foreign
from exporters.errors import ArtifactError
from exporters.toolchain import resolve
from suites.conformance.test_metadata import test_class_names_survive_the_round_trip as names_survive
from suites.conformance.test_metadata import test_metadata_describes_the_request as describes_request
from suites.conformance.test_precision import test_executed_precision_is_the_requested as executed_precision
from suites.conformance.test_shapes import test_output_shapes_match_reference as shapes_match
from suites.support.bench import Bench
from suites.support.cases import what_is_missing
from suites.support.verdict import Verdict

if TYPE_CHECKING:
    from suites.selftest.conftest import Judge, Workshop

pytestmark = pytest.mark.formats


# All in 8 bits, on pictures of noise.
QUANTIZED = """
import sys
import numpy as np, openvino
sys.modules["openvino_telemetry"] = None
import nncf
source, target = sys.argv[1:]
feeds = [np.random.default_rng(n).random((1, 3, 256, 256), np.float32) for n in range(8)]
model = nncf.quantize(openvino.Core().read_model(source), nncf.Dataset(feeds), preset=nncf.QuantizationPreset.MIXED)
openvino.save_model(model, target, compress_to_fp16=False)
"""


@pytest.fixture
def toolchain() -> None:
    missing = what_is_missing(formats.get("openvino"), "cpu")
    if missing:
        pytest.skip(missing)


def test_names_of_tensors_are_those_in_the_file(workshop: Workshop, toolchain: None) -> None:
    """A file that has lost them is not given the request's."""

    def damage(path: Path, workshop: Workshop) -> None:
        xml = next(path.glob("*.xml"))
        text = xml.read_text(encoding="utf-8")
        changed = re.sub(r' (?:output_)?names="(?:left|right)"', "", text)
        assert changed != text
        xml.write_text(changed, encoding="utf-8")

    cell = "twins openvino fp32"
    assert workshop.judge(cell, shapes_match) == (Verdict.PASS, "")
    verdict, because = workshop.judge(cell, shapes_match, damage)
    assert verdict is Verdict.FAIL and "unnamed0" in because, because


def test_8_bits_that_are_computed_in_others_are_noticed(workshop: Workshop, toolchain: None) -> None:
    """OpenVINO computes the transposed convolution of masks in FP32, though the file has it in 8 bits."""
    cell = "segment openvino int8"

    def damage(path: Path, workshop: Workshop) -> None:
        source = workshop.good("segment onnx fp32").path
        words = [str(resolve("openvino").python), "-c", QUANTIZED, str(source), str(next(path.glob("*.xml")))]
        subprocess.run(words, check=True, capture_output=True)

    assert workshop.judge(cell, executed_precision) == (Verdict.PASS, "")
    verdict, because = workshop.judge(cell, executed_precision, damage)
    assert verdict is Verdict.FAIL and "and openvino runs" in because, because


def test_a_graph_that_cannot_be_read_is_one_line(workshop: Workshop, toolchain: None) -> None:
    def damage(path: Path, workshop: Workshop) -> None:
        xml = next(path.glob("*.xml"))
        xml.unlink()
        xml.mkdir()

    verdict, because = workshop.judge("twins openvino fp32", shapes_match, damage)
    assert verdict is Verdict.ERROR and "cannot be read (Is a directory); export it again" in because, because


def test_class_names_with_any_blank_survive(workshop: Workshop, judge: Judge, toolchain: None) -> None:
    """Who reads labels divides them by blanks: a name is one label, whatever is in it."""
    case = workshop.case("blobs openvino fp32")
    model = replace(case.spec.model, names={0: "a\u00a0b", 1: "a\tb", 2: ""})
    bench = Bench(workshop.run, replace(case, spec=case.spec.but(model=model)))
    try:
        assert judge(names_survive, bench) == (Verdict.PASS, "")
    finally:
        bench.close()


def test_what_lies_beside_the_graph_is_told(workshop: Workshop, toolchain: None, tmp_path: Path) -> None:
    spec = workshop.case("blobs openvino fp32").spec

    def refused(path: Path) -> str:
        brought = foreign(path, "openvino", spec.to_dict(), trust=False, is_code=False)
        with pytest.raises(ArtifactError) as caught:
            workshop.run.pool.open(brought, spec, "ov", "cpu")
        return str(caught.value)

    folder = shutil.copytree(workshop.good("blobs openvino fp32").path, tmp_path / "folder")
    weights = next(folder.glob("*.bin"))
    weights.unlink()
    assert f"{weights.name} is missing" in refused(folder)
    weights.mkdir()
    assert f"{weights.name} is no file" in refused(folder)
    other = tmp_path / "other_openvino_model"
    other.write_text("nothing of OpenVINO's")
    assert "is no OpenVINO IR" in refused(other)


@pytest.mark.parametrize(
    ("pattern", "instead", "word"),
    [
        (r"<model_info>.*</model_info>", "", "has lost its labels"),
        (r'(<labels value=")\w+', r"\1another", "its labels are not the names in metadata.yaml"),
        (r'(<scale_values value=")255', r"\g<1>1", "says scale_values '1' in its rt_info, expected '255'"),
        (r'(<reverse_input_channels value=")YES', r"\1NO", "says reverse_input_channels 'NO'"),
    ],
    ids=["model_info lost", "a label renamed", "another scale", "another order of colours"],
)
def test_what_the_model_api_reads_in_rt_info_is_judged(
    workshop: Workshop, toolchain: None, pattern: str, instead: str, word: str
) -> None:
    def damage(path: Path, workshop: Workshop) -> None:
        xml = next(path.glob("*.xml"))
        text = xml.read_text(encoding="utf-8")
        changed = re.sub(pattern, instead, text, flags=re.DOTALL)
        assert changed != text
        xml.write_text(changed, encoding="utf-8")

    cell = "classify openvino fp32"
    assert workshop.judge(cell, names_survive) == (Verdict.PASS, "")
    verdict, because = workshop.judge(cell, names_survive, damage)
    assert verdict is Verdict.FAIL and word in because, because


@pytest.mark.parametrize("wrong", ["stride: 32.9", "stride: true", "stride: !!bool maybe"])
def test_metadata_that_are_no_whole_numbers_fail(workshop: Workshop, toolchain: None, wrong: str) -> None:
    def damage(path: Path, workshop: Workshop) -> None:
        side_car = path / "metadata.yaml"
        text = side_car.read_text(encoding="utf-8")
        side_car.write_text(re.sub(r"^stride: \d+$", wrong, text, flags=re.MULTILINE), encoding="utf-8")

    verdict, because = workshop.judge("classify openvino fp32", describes_request, damage)
    assert verdict is Verdict.FAIL and "metadata.yaml" in because, because
