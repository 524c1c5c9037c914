"""Names, shapes and dtypes, in the order count and names -> shape -> dtype -> finite."""

from __future__ import annotations

import numpy as np

from exporters import formats
from exporters.errors import NotSupported
from suites.support.bench import Bench


def test_input_signature_is_the_requested(case: Bench) -> None:
    """The model's names and types, and sizes that are fixed or vary as asked; a brought FP16 file may take FP16."""
    entry = formats.get(case.spec.format)
    inputs, _ = case.signature()
    if not entry.keeps_signature:
        raise NotSupported(f"a {entry.title} file holds neither names nor shapes of its inputs")
    names = [i.name for i in inputs]
    expected = [i.name for i in case.model.inputs]
    assert names == expected, f"inputs are {names}, expected {expected}"
    for got, want in zip(inputs, case.model.inputs, strict=True):
        kinds = {want.dtype} | ({"float16"} if case.brought is not None and want.dtype == "float32" else set())
        assert got.dtype in kinds, f"input {got.name} is {got.dtype}, expected {' or '.join(sorted(kinds))}"
        fixed = case.model.shape(want, case.spec.batch, case.spec.imgsz)
        assert len(got.shape) == len(fixed), f"input {got.name} has {len(got.shape)} axes, expected {len(fixed)}"
        for axis, (size, name, number) in enumerate(zip(got.shape, want.shape, fixed, strict=True)):
            # Where `batch` is the largest, it varies from 2 on, whether height and width do or not.
            varies = isinstance(name, str) and (
                case.spec.batch > 1 if entry.smaller_batches and name == "batch" else case.spec.dynamic
            )
            assert isinstance(size, str) if varies else size == number, (
                f"input {got.name}, axis {axis} is {size!r}, expected {'an axis that varies' if varies else number}"
            )


def test_output_names_match_reference(case: Bench) -> None:
    """The same outputs, by name: none missing, none added."""
    got = {o.name for o in case.signature()[1]}
    want = {o.name for o in case.model.outputs}
    assert got == want, (
        f"outputs are {sorted(got)}, expected {sorted(want)}: missing {sorted(want - got)}, added {sorted(got - want)}"
    )


def test_output_shapes_match_reference(case: Bench) -> None:
    """Every output has the shape of the reference's on the same feeds; where nothing runs the file, by its own word."""
    if not case.case.runtime.runs:
        told = {o.name: o.shape for o in case.signature()[1]}
        for name, want in case.raw(case.feeds_of(case.spec)[0]).items():
            got = told.get(name, ())
            if name in told and not got:
                raise NotSupported(f"a {formats.get(case.spec.format).title} file does not hold shapes of its outputs")
            fits = len(got) == len(want.shape) and all(
                size == number for size, number in zip(got, want.shape, strict=True) if isinstance(size, int)
            )
            assert fits, f"output {name} has shape {list(got)}, expected {list(want.shape)}"
        return
    for feeds in case.feeds():
        expected, observed = case.expected(feeds), case.outputs(feeds)
        for name, want in expected.items():
            assert name in observed, f"output {name} is missing; there are {sorted(observed)}"
            assert observed[name].shape == want.shape, (
                f"output {name} has shape {list(observed[name].shape)}, expected {list(want.shape)} "
                f"(feeds {feeds.name})"
            )


def test_output_dtypes_are_floating(case: Bench) -> None:
    """Outputs come in FP32, as the contract says; a brought FP16 file may give FP16."""
    allowed = {"float32"} | ({"float16"} if case.brought is not None else set())
    if not case.case.runtime.runs:
        for output in case.signature()[1]:
            assert output.dtype in allowed, f"output {output.name} is {output.dtype}, expected float32"
        return
    for feeds in case.feeds()[:1]:
        for name, want in case.expected(feeds).items():
            got = case.outputs(feeds).get(name)
            assert got is not None, f"output {name} is missing"
            kinds = allowed if want.dtype.kind == "f" else {str(want.dtype)}
            assert str(got.dtype) in kinds, f"output {name} is {got.dtype}, expected {' or '.join(sorted(kinds))}"


def test_outputs_are_finite(case: Bench) -> None:
    """No NaN and no infinity where the reference has none."""
    for feeds in case.feeds():
        expected = case.expected(feeds)
        for name, got in case.outputs(feeds).items():
            want = expected.get(name)
            assert want is None or got.shape == want.shape, (
                f"output {name} has shape {list(got.shape)}, expected {list(want.shape) if want is not None else ''}"
            )
            wrong = ~np.isfinite(got) & np.isfinite(expected.get(name, np.zeros(())))
            assert not wrong.any(), (
                f"output {name} holds {int(wrong.sum())} NaN or infinite values of {got.size} (feeds {feeds.name})"
            )
