"""Values: hop by hop against PyTorch, per channel group, with a proof that the comparison could have failed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from exporters import formats
from exporters.errors import ExportgateError, NotSupported
from exporters.models.spec import classifier_output, detector_output, named_pictures
from exporters.spec import CALIBRATED, Precision
from suites.support.attribution import Rebuilt, first_beyond
from suites.support.bench import Bench, Outputs, cast
from suites.support.compare import Comparison, compare
from suites.support.feeds import FeedSet
from suites.support.power import Power, Shown, prove
from suites.support.verdict import Judged, Verdict

pytestmark = pytest.mark.values
FEW = 4  # rows of a batch on which power is proven first
BY_PICTURES = "in 8 bits it is judged by what it finds in its pictures (test_detections_agree_without_labels)"


def test_outputs_match_reference(case: Bench) -> None:
    """Every channel group is within its tolerance on every set of feeds, and damage of known size would not be."""
    # Detections of a graph with NMS are matched one to one; what stands before it is compared in the file without.
    hops = [hop for hop in case.hops() if not hop[1].nms]
    elsewhere = _by_pictures(case)
    rows: list[Comparison] = []
    for feeds in case.feeds():
        reference = case.raw(feeds)
        before: tuple[str, Outputs] = ("pytorch fp32", reference)
        converted = Precision.FP32
        for name, spec, artifact in hops:
            outputs = case.hop_outputs(name, spec, artifact, feeds)
            _present(reference, outputs, name)
            same = spec.precision is converted  # the graph of the hop before, in another runtime
            # What it was made from, and the same graph in another runtime, are judged here all the same.
            if same or not (elsewhere and spec.precision in CALIBRATED):
                own = spec is hops[-1][1]
                rows += _rows(case, before[1], outputs, f"{before[0]} -> {name}", spec.precision, feeds, same, own)
            before, converted = (name, outputs), spec.precision
        if len(hops) > 1 and not elsewhere:
            rows += _rows(case, reference, before[1], f"pytorch fp32 -> {before[0]}", case.spec.precision, feeds)
    # The rows of one hop and group on several feeds tell the same story: the record keeps the worst of each.
    case.evidence["comparisons"] = [r.to_dict() for r in _worst(rows)]
    failed = [r for r in rows if not r.passed]
    if failed:
        culprit = failed[0]
        raise AssertionError(
            f"{len(failed)} of {len(rows)} comparisons fail, first at the hop {culprit.hop}: {culprit.line()}"
            + _inside(case, culprit)
        )
    if elsewhere:
        raise NotSupported(BY_PICTURES)
    # Rows of its parents say nothing of the artifact itself.
    own = [r for r in rows if r.hop.endswith(f"-> {hops[-1][0]}")]
    if not own and case.spec.precision is Precision.INT8:
        raise NotSupported("an INT8 detector is judged by matching its detections, not element by element")
    assert own, "nothing was compared"
    _prove(case)


def test_detections_match_reference(case: Bench) -> None:
    """The same objects: one-to-one by class with enough overlap, none lost, none added; of a classifier its class."""
    if _by_pictures(case):
        raise NotSupported(BY_PICTURES)
    total = matched = 0
    floor, lowest = 0.0, 1.0
    problems: list[str] = []
    for feeds in case.feeds():
        expected, observed = case.expected(feeds), case.outputs(feeds)
        _present(expected, observed, case.spec.format)
        found = case.same_objects(feeds, observed)
        if found is None:
            raise NotSupported(f"model {case.model.name} has neither boxes with scores nor probabilities")
        total, matched, floor, lowest = (
            total + found.reference,
            matched + found.matched,
            found.iou_floor,
            min(lowest, found.lowest_iou),
        )
        problems += [f"lost {x} (feeds {feeds.name})" for x in found.lost] + [
            f"added {x} (feeds {feeds.name})" for x in found.extra
        ]
    case.evidence["matching"] = {"reference": total, "matched": matched, "iou_floor": floor, "lowest_iou": lowest}
    assert not problems, (
        f"{matched} of {total} detections found again at IoU {floor}; {problems[0]}"
        + (f" and {len(problems) - 1} more" if len(problems) > 1 else "")
        + (_hint(case) if case.spec.precision in CALIBRATED else "")
    )
    if not total:
        raise _insensitive(case, "the reference detects nothing on these feeds, so nothing could be lost")
    _prove(case)


def test_same_feeds_give_the_same_outputs(case: Bench) -> None:
    """A second inference on the same feeds agrees with the first far within the tolerance (sums may be reordered)."""
    feeds = case.feeds()[0]
    first = {k: np.array(v) for k, v in case.outputs(feeds).items()}
    session = case.session()
    second = case.readable(case.guard(lambda: session.run(cast(session, feeds.arrays))))
    for name, want in first.items():
        largest = float(np.max(np.abs(np.asarray(second[name], np.float64) - want)))
        assert np.isfinite(largest), f"output {name} is not finite"
        allowed = 1e-5 * max(float(np.max(np.abs(want))), 1.0)
        assert largest <= allowed, (
            f"output {name} changed by {largest:.3g} from one inference to the next, allowed {allowed:.3g}"
        )


def _by_pictures(case: Bench) -> bool:
    """Whether a model is judged in 8 bits by what it finds in pictures of its own.

    Four sets of feeds hold some twenty objects: noise that matters loses none of them, and of the objects in hundreds
    of pictures an artifact that is right may lose one. How many it may lose the accuracy claims say, with an interval.
    """
    has_metric = detector_output(case.model) is not None or classifier_output(case.model) is not None
    return has_metric and case.spec.precision in CALIBRATED and bool(named_pictures(case.model))


def _present(expected: Outputs, observed: Outputs, name: str) -> None:
    """Names and shapes first: a missing output is a failure, never passed over."""
    for output, want in expected.items():
        assert output in observed, f"{name}: output {output} is missing; there are {sorted(observed)}"
        assert observed[output].shape == want.shape, (
            f"{name}: output {output} has shape {list(observed[output].shape)}, expected {list(want.shape)}"
        )


def _rows(
    case: Bench,
    expected: Outputs,
    observed: Outputs,
    hop: str,
    precision: Precision,
    feeds: FeedSet,
    same_graph: bool = False,
    own: bool = True,
) -> list[Comparison]:
    return compare(
        expected,
        observed,
        case.model,
        precision,
        hop=hop,
        feeds=feeds.name,
        imgsz=case.spec.imgsz,
        overrides=case.run.project.tolerances,
        rounding=case.rounding(feeds, precision, own),
        same_graph=same_graph,
    )


def _inside(case: Bench, culprit: Comparison) -> str:
    """Where inside the artifact of the failed hop it begins; "" where nothing can be seen there."""
    hops = case.hops()
    number = next(n for n, hop in enumerate(hops) if culprit.hop.endswith(f"-> {hop[0]}"))
    spec = hops[number][1]
    feeds = next(f for f in case.feeds() if f.name == culprit.feeds)
    try:
        session = case.hop_session(*hops[number])
        again = number > 0 and formats.get(spec.format).shows_inside
        inside = Rebuilt(spec, case.open_beside, case.hop_session(*hops[number - 1])) if again else session
        found = case.guard(
            lambda: first_beyond(
                case.run.reference(case.model),
                inside,
                feeds.arrays,
                cast(session, feeds.arrays),
                spec.precision,
                culprit.worst_index[0] if case.model.has_batch else 0,
            )
        )
    except ExportgateError as error:
        return f"; where inside it begins cannot be told: {error.what}"
    return f"; {found.line}" if found.line else ""


def _worst(rows: list[Comparison]) -> list[Comparison]:
    """For each hop, output, group and measure the row that is nearest to its limit, or furthest beyond."""
    chosen: dict[Any, Comparison] = {}

    def used(row: Comparison) -> float:
        if row.measure in ("cosine", "snr_db"):
            return -row.observed
        return row.observed / row.allowed if row.allowed else row.observed

    for row in rows:
        key = (row.hop, row.output, row.group, row.measure)
        if key not in chosen or used(row) > used(chosen[key]):
            chosen[key] = row
    return list(chosen.values())


def _prove(case: Bench) -> None:
    """INSENSITIVE where known damage of the reference would have passed on every set of feeds that fires."""
    # What shows on a few rows of a batch shows on all of it, and each row costs inferences by the hundred.
    power = _power(case, FEW) if case.model.has_batch and case.spec.batch > FEW else None
    if power is None or not power.sensitive:
        power = _power(case)
    case.evidence["power"] = power.to_dict()
    if not power.sensitive:
        raise _insensitive(
            case, f"the comparison {power.statement}" if power.statement.startswith("does") else power.statement
        )


def _insensitive(case: Bench, because: str) -> Judged:
    """What to do stands beside it where the model came without pictures, as a checkpoint's path does."""
    return Judged(Verdict.INSENSITIVE, because + _hint(case))


def _hint(case: Bench) -> str:
    lacks = case.model.has_images and not named_pictures(case.model)
    return "; name pictures that it knows with --evaluate" if lacks else ""


def _power(case: Bench, rows: int | None = None) -> Power:
    """What the comparison notices, on the first rows of each set of feeds or on all."""

    def shown(feeds: FeedSet) -> Shown:
        return Shown(
            case.raw(feeds),
            lambda layer, size: case.guard(lambda: case.run.damaged(case.model, feeds, layer, size)),
            case.rounding(feeds, case.spec.precision),
        )

    sets = [f for f in case.feeds() if f.fires] or [case.feeds()[0]]
    return prove(
        [shown(f if rows is None else f.rows(slice(rows), f"{rows} rows")) for f in sets],
        case.guard(lambda: case.run.layers(case.model)),
        case.model,
        case.spec.precision,
        case.spec.imgsz,
        case.run.project.tolerances,
    )
