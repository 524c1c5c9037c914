"""Hypothesis drives real artifacts: any legal request and any class names give files that the claims pass."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from exporters import formats
from exporters.errors import NotSupported
from exporters.spec import OPSETS, request
from suites.conformance import test_dynamic as dynamic
from suites.conformance import test_export as export
from suites.conformance import test_metadata as metadata
from suites.conformance import test_outputs as outputs
from suites.conformance import test_precision as precision
from suites.conformance import test_shapes as shapes
from suites.support.bench import Bench
from suites.support.cases import Case

if TYPE_CHECKING:
    from suites.selftest.conftest import Workshop

pytest.importorskip("onnx", reason="the toolchain onnx is not installed")

CLAIMS = (
    export.test_export_makes_the_declared_file,
    shapes.test_input_signature_is_the_requested,
    shapes.test_output_shapes_match_reference,
    outputs.test_outputs_match_reference,
    outputs.test_detections_match_reference,
    dynamic.test_other_shapes_are_refused,
    metadata.test_class_names_survive_the_round_trip,
    metadata.test_metadata_describes_the_request,
    precision.test_achieved_precision_is_the_requested,
    precision.test_opset_is_the_requested,
)
# Surrogates are no text: no file could hold them.
NAMES = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=3, max_size=3)
REQUESTS = st.one_of(
    st.fixed_dictionaries(
        {"format": st.just("onnx"), "opset": st.integers(*OPSETS), "simplify": st.booleans()},
    ),
    st.fixed_dictionaries({"format": st.just("torchscript")}),
)


# A TorchScript file has no operator set, and holds neither names nor shapes of its inputs.
NOT_OF_TORCHSCRIPT = (
    precision.test_opset_is_the_requested,
    shapes.test_input_signature_is_the_requested,
    dynamic.test_other_shapes_are_refused,
)


# Derandomized, since CI may not depend on chance; each example exports and judges a file of its own.
@settings(
    max_examples=12,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType] (its metaclass hides the type)
)
@given(
    chosen=REQUESTS,
    half=st.booleans(),
    is_dynamic=st.booleans(),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(2, 12), st.integers(2, 12)),
    names=NAMES,
)
@example({"format": "onnx"}, True, False, 1, (3, 5), ["it's", 'a "quote"', "two\nlines\r\n\x00"])
@example({"format": "torchscript"}, False, True, 2, (4, 2), ["Ampel 🚦", "", "{0: 'x'}"])
def test_any_legal_request_gives_an_artifact_that_passes(
    workshop: Workshop,
    chosen: dict[str, object],
    half: bool,
    is_dynamic: bool,
    batch: int,
    size: tuple[int, int],
    names: list[str],
) -> None:
    model = replace(workshop.models["blobs"], names=dict(enumerate(names)))
    options = {k: v for k, v in chosen.items() if k != "format"}
    imgsz = (size[0] * model.stride * 2, size[1] * model.stride * 2)  # two cells a side at least hold a scene's object
    spec = request(model, str(chosen["format"]), half=half, dynamic=is_dynamic, batch=batch, imgsz=imgsz, **options)
    bench = Bench(workshop.run, Case(spec, formats.get(spec.format).runtimes[0]))
    try:
        for claim in CLAIMS:
            try:
                claim(bench)
            except NotSupported as reason:
                assert spec.format == "torchscript", reason
                assert claim in NOT_OF_TORCHSCRIPT, reason
    finally:
        bench.close()
