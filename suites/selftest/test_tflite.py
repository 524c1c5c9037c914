"""What is special to TensorFlow Lite: what is appended, divided and named; which forms of 8 bits take what."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters import formats
from exporters.errors import ArtifactError, BadRequest
from exporters.litert.program import divisors_of
from exporters.litert.signature import as_floats, as_stored
from exporters.models.catalog import detect_outputs
from exporters.models.spec import ChannelGroup, OutputSpec
from exporters.placement import place
from exporters.runtimes import tflite_file
from exporters.spec import request
from suites.accuracy.test_calibration import test_calibration_fits_the_pictures as calibration_fits
from suites.conformance.test_metadata import test_metadata_describes_the_request as describes_request
from suites.conformance.test_outputs import test_outputs_match_reference as outputs_match
from suites.conformance.test_precision import test_executed_precision_is_the_requested as executed_precision
from suites.conformance.test_shapes import test_input_signature_is_the_requested as input_signature
from suites.conformance.test_shapes import test_output_names_match_reference as names_match
from suites.support.cases import what_is_missing
from suites.support.verdict import Verdict

if TYPE_CHECKING:
    from suites.selftest.conftest import Workshop

pytestmark = pytest.mark.formats
FACTS = {"task": "detect", "stride": 32, "names": {0: "a"}, "imgsz": [64, 64]}


@pytest.fixture(autouse=True)
def toolchain() -> None:
    missing = what_is_missing(formats.get("tflite"), "cpu")
    if missing:
        pytest.skip(missing)


def _bare(path: Path) -> bytes:
    """A file without what is appended."""
    data = path.read_bytes()
    return data[: data.index(b"PK\x03\x04")]


def _appended(path: Path, target: Path, **entries: str) -> Path:
    target.write_bytes(_bare(path))
    with zipfile.ZipFile(target, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, text in entries.items():
            archive.writestr(name.replace("_json", ".json"), text)
    return target


def test_metadata_of_others_are_read_from_their_one_entry(workshop: Workshop, tmp_path: Path) -> None:
    good = workshop.good("twins tflite fp32").path
    for entry, text in (("another_json", json.dumps(FACTS)), ("meta", str(FACTS))):
        found = tflite_file.read_metadata(_appended(good, tmp_path / "a.tflite", **{entry: text}))
        assert (found.stride, found.names, found.imgsz) == (32, {0: "a"}, (64, 64))
    for told, entries in (
        ("2 entries are appended", {"one": "1", "two": "2"}),
        ("neither JSON nor a Python literal", {"one": "__import__('os')"}),
        ("larger than 1024 KiB", {"one": " " * (2 << 20)}),
        ("no zip archive", {}),
    ):
        with pytest.raises(ArtifactError, match=told) as caught:
            path = _appended(good, tmp_path / "a.tflite", **entries)
            if not entries:
                path.write_bytes(_bare(good))
            tflite_file.read_metadata(path)
        assert "\n" not in str(caught.value)


def _with_metadata(change: Callable[[dict[str, object]], object]) -> Callable[[Path, Workshop], None]:
    def damage(path: Path, workshop: Workshop) -> None:
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            values = json.loads(archive.read(tflite_file.ENTRY))
        change(values)
        _appended(path, path.with_name("other"), metadata_json=json.dumps(values)).replace(path)

    return damage


def test_weights_alone_have_no_ranges_to_fit(workshop: Workshop) -> None:
    verdict, because = workshop.judge("classify tflite int8", calibration_fits)
    assert verdict is Verdict.NOT_SUPPORTED and "no ranges of activations" in because, because


def test_what_places_were_divided_by_is_in_the_metadata(workshop: Workshop) -> None:
    cell = "blobs tflite fp32"
    found = tflite_file.read_metadata(workshop.good(cell).path)
    assert found.divisors == {"output0": (160.0, 160.0, 160.0, 160.0, 1.0, 1.0, 1.0)}
    assert found.layout == "NCHW"
    assert workshop.judge(cell, outputs_match)[0] is Verdict.PASS
    verdict, because = workshop.judge(cell, outputs_match, _with_metadata(lambda v: v.pop("divisors")))
    assert verdict is Verdict.FAIL, because


def test_each_kind_of_channel_has_a_divisor_of_its_own() -> None:
    size = (64, 128)
    boxes = detect_outputs(2)[0]
    assert divisors_of(boxes, 6, size, {}) == (128, 64, 128, 64, 1, 1)
    masks = replace(boxes, groups=(*boxes.groups, ChannelGroup("masks", "mask", "", 6, 8)))
    assert divisors_of(masks, 8, size, {"masks": 3.0})[6:] == (16, 16)
    assert divisors_of(masks, 8, size, {})[6:] == (1, 1)
    turned = replace(boxes, groups=(*boxes.groups, ChannelGroup("angle", "angle", "rad", 6, 7)))
    assert divisors_of(turned, 7, size, {})[6] == np.pi
    assert divisors_of(OutputSpec("logits"), 4, size, {}) == ()


def test_all_in_8_bits_is_fed_and_gives_floating_point(workshop: Workshop) -> None:
    """The file takes and gives int8 with channels last, and its session what the reference does."""
    cell = "blobs tflite int8 full_integer"
    path = workshop.good(cell).path
    file = tflite_file.read(path)
    ends = [file.tensors[n] for n in (*file.inputs, *file.outputs)]
    assert [t.dtype for t in ends] == ["int8", "int8"]
    assert ends[0].shape == (1, 160, 160, 3)
    assert path.name.endswith("_full_integer_quant.tflite")
    assert workshop.judge(cell, input_signature) == (Verdict.PASS, "")
    values = np.array([-1.0, 0.0, 0.5, 1.0, 9.0], np.float32)
    told = as_floats(as_stored(values, ends[0]), ends[0])
    assert np.abs(told[1:4] - values[1:4]).max() <= ends[0].scales[0] / 2
    assert told.min() >= -ends[0].scales[0]
    assert told.max() <= 1 + ends[0].scales[0]


@pytest.mark.parametrize("asked", ["dynamic", "integer", "full_integer"])
def test_another_form_of_8_bits_is_noticed(workshop: Workshop, asked: str) -> None:
    cells = {form: f"blobs tflite int8 {form}" for form in ("dynamic", "integer", "full_integer")}
    assert workshop.judge(cells[asked], describes_request) == (Verdict.PASS, "")
    for other in sorted({*cells} - {asked}):

        def damage(path: Path, workshop: Workshop, other: str = other) -> None:
            path.write_bytes(workshop.good(cells[other]).path.read_bytes())

        verdict, because = workshop.judge(cells[asked], describes_request, damage)
        assert (verdict, because) == (Verdict.FAIL, f"the file's quantization is {other}, expected {asked}")


def test_names_of_tensors_are_those_in_the_file(workshop: Workshop) -> None:
    """One that the file has lost is not given the request's; where none is the model's the place counts."""

    def damage(*words: bytes) -> Callable[[Path, Workshop], None]:
        def change(path: Path, workshop: Workshop) -> None:
            data = path.read_bytes()
            for word in words:
                assert word in data
                data = data.replace(word, word[:4] + word[4:].swapcase())
            path.write_bytes(data)

        return change

    cell = "twins tflite fp32"
    left, right = b"\x04\x00\x00\x00left\x00", b"\x05\x00\x00\x00right\x00"
    assert workshop.judge(cell, names_match) == (Verdict.PASS, "")
    verdict, because = workshop.judge(cell, names_match, damage(left))
    assert verdict is Verdict.FAIL and "LEFT" in because, because
    assert workshop.judge(cell, names_match, damage(left, right)) == (Verdict.PASS, "")


def test_arithmetic_of_8_bits_is_seen_where_activations_are_quantized_as_they_come(workshop: Workshop) -> None:
    cell = "classify tflite int8 dynamic"
    verdict, because = workshop.judge(cell, executed_precision)
    assert verdict is Verdict.PASS, because

    def damage(path: Path, workshop: Workshop) -> None:
        path.write_bytes(workshop.good("classify tflite fp32").path.read_bytes())

    assert workshop.judge(cell, executed_precision, damage)[0] is Verdict.FAIL


def test_forms_of_8_bits_take_what_they_use(workshop: Workshop) -> None:
    model = workshop.models["blobs"]
    data = "small_models:many"
    with pytest.raises(BadRequest, match="with quantization dynamic: activations are quantized as they come"):
        request(model, "tflite", int8=True, data=data)
    for form in ("integer", "full_integer"):
        with pytest.raises(BadRequest, match="needs images to calibrate on"):
            request(model, "tflite", int8=True, quantization=form)
    with pytest.raises(BadRequest, match="keep 'box' with quantization full_integer"):
        request(model, "tflite", int8=True, quantization="full_integer", data=data, keep="box")
    with pytest.raises(BadRequest, match="does not take option 'dynamic'"):
        request(model, "tflite", dynamic=True)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_in_one_line(
    workshop: Workshop, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cut off, or with four bytes changed: never another exception, never without an end."""
    whole = workshop.good("twins tflite fp32").path.read_bytes()
    path = tmp_path_factory.getbasetemp() / "damaged.tflite"
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for position in data.draw(st.lists(st.integers(0, max(0, len(damaged) - 4)), max_size=4)):
        damaged[position : position + 4] = data.draw(st.binary(min_size=4, max_size=4))
    path.write_bytes(damaged)
    for read in (tflite_file.read_precision, tflite_file.read_metadata):
        try:
            read(path)
        except ArtifactError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)


def test_a_file_is_placed_in_the_folder_that_users_know(workshop: Workshop, tmp_path: Path) -> None:
    """Twice, since the second replaces what is ours."""
    good = workshop.good("twins tflite fp32")
    for _ in range(2):
        assert place(good, tmp_path) == tmp_path / "twins_saved_model" / "twins_float32.tflite"
    assert [p.name for p in tmp_path.rglob("*")] == ["twins_saved_model", "twins_float32.tflite"]
