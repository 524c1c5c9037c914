"""Shapes that vary, and rows of a batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from exporters import formats
from exporters.errors import ExportError, FeedError, NotSupported
from suites.support.bench import Bench, Outputs, cast
from suites.support.compare import compare
from suites.support.feeds import FeedSet

pytestmark = pytest.mark.values


def test_batch_rows_equal_single_images(case: Bench) -> None:
    """Row i of a batch equals the same image alone in the reference, and the rows differ."""
    batch = case.spec.batch if case.spec.batch > 1 else _largest(case)
    if not case.model.has_batch or (case.spec.batch == 1 and not _varies(case)):
        raise NotSupported("a fixed batch of 1 has one row")
    if batch == 1:
        raise NotSupported("the largest batch is 1")
    case.session()  # what cannot be opened needs no feeds
    feeds = case.guard(lambda: case.run.feeds(case.spec, batch, case.spec.imgsz))[0]
    observed = _run(case, feeds)
    first = {k: v[:1] for k, v in feeds.arrays.items()}
    for row in range(batch):
        alone = feeds.rows(slice(row, row + 1), f"row {row}")
        expected = case.expected(alone)
        mine = {k: v[row : row + 1] for k, v in observed.items()}
        _within(case, expected, mine, alone, f"row {row} of a batch of {batch}")
        if row:
            assert any(not np.array_equal(v[row : row + 1], first[k]) for k, v in feeds.arrays.items()), (
                "the rows of the feeds do not differ"
            )


def test_random_shapes_match_reference(case: Bench) -> None:
    """Any legal batch, height and width: the shape follows the input and the values are the reference's."""
    if not _varies(case):
        raise NotSupported("the shape of this artifact is fixed")
    stride = case.model.stride
    height, width = (max(1, s // stride) for s in case.spec.imgsz)
    # A profile of the user's says what is legal; else anything from one cell to somewhat more than the image size.
    low, high = (1, 1, 1), (_largest(case), height + 1, width + 1)
    if case.spec.profiles:
        low, _, high = ((b, h // stride, w // stride) for b, h, w in case.spec.profiles[0])

    # Deterministic, since a gate's verdict may not depend on chance; few, since each shape runs the reference too.
    @settings(
        max_examples=6,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType] (its metaclass hides the type)
    )
    @given(*(st.integers(a, b) for a, b in zip(low, high, strict=True)))
    def check(batch: int, h: int, w: int) -> None:
        size = (h * stride, w * stride) if case.model.has_images else case.spec.imgsz
        feeds = _resized(case, batch if case.model.has_batch else 1, size)
        observed = _run(case, feeds)
        expected = case.expected(feeds)
        for name, want in expected.items():
            assert name in observed, f"output {name} is missing"
            assert observed[name].shape == want.shape, (
                f"output {name} has shape {list(observed[name].shape)} for {batch}x{size}, expected {list(want.shape)}"
            )
        _within(case, expected, observed, feeds, f"batch {batch}, {size[0]}x{size[1]}")

    check()


def test_smaller_batches_match_reference(case: Bench) -> None:
    """Where `batch` is the largest batch, every smaller one runs, too: the first rows alone give their own outputs."""
    entry = formats.get(case.spec.format)
    if not entry.smaller_batches or case.spec.batch == 1 or not case.model.has_batch:
        raise NotSupported("the batch is 1" if entry.smaller_batches else f"{entry.title} takes its own batch alone")
    whole = case.feeds()[0]
    for count in sorted({1, case.spec.batch - 1}):
        some = whole.rows(slice(count), f"{count} rows")
        observed, expected = _run(case, some), case.expected(some)
        for name, want in expected.items():
            assert observed[name].shape == want.shape, (
                f"output {name} has shape {list(observed[name].shape)} for batch {count}, expected {list(want.shape)}"
            )
        _within(case, expected, observed, some, f"batch {count} of at most {case.spec.batch}")


def test_other_shapes_are_refused(case: Bench) -> None:
    """An artifact of fixed shape refuses another one, or a dynamic one a size that is no multiple of the stride."""
    entry = formats.get(case.spec.format)
    if not entry.keeps_signature:
        raise NotSupported(f"a {entry.title} file holds no shapes: its runtime takes what it is given")
    feeds = case.feeds()[0].arrays
    name = case.model.inputs[0].name
    array = feeds[name]
    if _varies(case):
        if case.model.stride == 1 or not case.model.has_images:
            raise NotSupported("every size is legal for this model")
        others = [array[..., :-1]]
    else:
        others = [np.concatenate([array, array])]
        if case.model.has_images and array.shape[-2] > case.model.stride:  # a height that the network itself can have
            others.append(array[..., : -case.model.stride, :])
    session = case.session()
    for wrong in map(np.ascontiguousarray, others):
        try:
            case.guard(lambda wrong=wrong: session.run(cast(session, {**feeds, name: wrong})))
        except FeedError as error:
            assert "expected" in str(error) or "multiple of the stride" in str(error), (
                f"the refusal does not say what was expected: {error}"
            )
        else:
            raise AssertionError(
                f"input {name} of shape {list(wrong.shape)} was taken, though the artifact is made for "
                f"{list(array.shape)}"
            )


def _largest(case: Bench) -> int:
    """The largest batch to try: that of the request where `batch` is the largest."""
    return case.spec.batch if formats.get(case.spec.format).smaller_batches else 3


def _varies(case: Bench) -> bool:
    return case.spec.dynamic or case.spec.format == "pytorch"


def _resized(case: Bench, batch: int, size: tuple[int, int]) -> FeedSet:
    """The case's first feeds cut or repeated to another shape, so that they still hold what makes the model fire."""
    arrays: Outputs = {}
    for entry in case.model.inputs:
        array = case.feeds()[0].arrays[entry.name]
        shape = case.model.shape(entry, batch, size)
        for axis, length in enumerate(shape):
            array = np.take(array, np.arange(length) % array.shape[axis], axis)
        if batch > 1 and len(shape) > 3:  # different rows
            array = np.stack([np.roll(row, i * case.model.stride, -1) for i, row in enumerate(array)])
        arrays[entry.name] = np.ascontiguousarray(array)
    return FeedSet(f"{batch}x{size[0]}x{size[1]}", arrays, False)


def _run(case: Bench, feeds: FeedSet) -> Outputs:
    """The artifact's outputs; where its runtime cannot run a legal shape, that is the artifact's failure."""
    session = case.session()
    try:
        found = case.guard(lambda: session.run(cast(session, feeds.arrays)))
        return {k: np.array(v) for k, v in case.readable(found).items()}
    except (ExportError, FeedError) as error:
        raise AssertionError(f"feeds {feeds.name}: the artifact does not run: {error.what}") from error


def _within(case: Bench, expected: Outputs, observed: Outputs, feeds: FeedSet, where: str) -> None:
    if case.spec.nms:
        found = case.same_objects(feeds, observed)
        assert found is not None and found.passed, (
            f"{where}: lost {found and found.lost}, added {found and found.extra}"
        )
        return
    rows = compare(
        expected,
        observed,
        case.model,
        case.spec.precision,
        hop=where,
        feeds=feeds.name,
        imgsz=case.spec.imgsz,
        overrides=case.run.project.tolerances,
        rounding=case.rounding(feeds, case.spec.precision),
    )
    failed = next((r for r in rows if not r.passed), None)
    assert failed is None, f"{where}: {failed.line() if failed else ''}"
