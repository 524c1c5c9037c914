"""Power: comparisons prove on their own feeds that they could have failed, by rejecting damage that is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from exporters.models.spec import ModelSpec
from exporters.session import Array
from exporters.spec import Precision
from suites.support.compare import DRAWS, SCORE_FLOOR, Comparison, Rounding, compare
from suites.support.detections import detector_output, same_objects

# Largest damage, as a share of the layer's standard deviation, that a comparison of this precision may miss. TF32 has
# FP16's fraction; BF16's roundings are 8 times as large, and so is what is allowed of it.
CAPS: Mapping[Precision, float] = {
    Precision.FP32: 0.01,
    Precision.TF32: 0.05,
    Precision.FP16: 0.05,
    Precision.BF16: 0.2,
    Precision.FP8: 0.2,
    Precision.INT8: 0.2,
}
SIZES = (0.00125, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2)

Outputs = Mapping[str, Array]


@dataclass(frozen=True)
class Attempt:
    """One known damage: its size, whether a claim rejected it, and by what."""

    kind: str
    layer: str
    size: float
    cap: float
    rejected: bool
    by: str


@dataclass(frozen=True)
class Shown:
    """One set of feeds.

    Attributes:
        reference: the undamaged outputs.
        damaged: outputs with noise of a size on the weights of a layer.
        rounding: as `compare` takes it.
    """

    reference: Outputs
    damaged: Callable[[str, float], Outputs]
    rounding: Rounding | None = None


@dataclass(frozen=True)
class Power:
    """Whether the comparison could have failed, and the statement for the report."""

    sensitive: bool
    statement: str
    damages: tuple[Attempt, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"damages": [asdict(d) for d in self.damages]}


def prove(
    shown: Sequence[Shown],
    layers: Sequence[str],
    model: ModelSpec,
    precision: Precision,
    imgsz: tuple[int, int],
    overrides: Sequence[Mapping[str, Any]] = (),
) -> Power:
    """Tries damage that must be rejected at this precision's tolerances, on one set of feeds at least: all are judged.

    Args:
        shown: the sets of feeds, of which the next is tried where one does not notice.
        layers: names of layers, in the model's order.
    """
    cap = CAPS[precision]
    sizes = [s for s in SIZES if s <= cap]

    def rows_of(one: Shown, outputs: Outputs) -> list[Comparison]:
        # The first draws do: more of them move a limit by little, and what is damaged always asks for them.
        first = one.rounding and (lambda _, some: one.rounding(DRAWS[0], some))  # pyright: ignore[reportOptionalCall]
        return compare(one.reference, outputs, model, precision, imgsz=imgsz, overrides=overrides, rounding=first)

    seen: set[tuple[str, str]] = set()  # (output, group) in which damage was noticed

    def rejected(one: Shown, outputs: Outputs) -> str:
        """What rejects these outputs, or ""."""
        bad = [r for r in rows_of(one, outputs) if not r.passed]
        seen.update((r.output, r.group) for r in bad)
        if bad:
            return f"{bad[0].group} {bad[0].measure} {bad[0].observed:.3g}, allowed {bad[0].allowed:.3g}"
        matching = same_objects(one.reference, outputs, model, precision)
        if matching is not None and not matching.passed:
            return f"matching: {len(matching.lost)} lost, {len(matching.extra)} extra of {matching.reference}"
        return ""

    silent = [_silent(one.reference, model) for one in shown]
    if all(silent):
        return Power(False, silent[0], ())
    telling = [one for one, why in zip(shown, silent, strict=True) if not why]
    attempts: list[Attempt] = []
    for layer in _chosen(layers):
        tries = ((one, size) for one in telling for size in sizes)
        found = next(((s, by) for one, s in tries if (by := rejected(one, one.damaged(layer, s)))), (sizes[-1], ""))
        attempts.append(Attempt("noise", layer, found[0], cap, bool(found[1]), found[1]))
    # What is compared has to be noticed in itself: an output that nothing reaches would pass whatever is in it.
    deaf = {(r.output, r.group) for one in telling for r in rows_of(one, one.reference)} - seen
    for layer, one in ((layer, one) for layer in (layers if deaf else ()) for one in telling):
        rejected(one, one.damaged(layer, cap))
        if not deaf - seen:
            break
    rearranged: dict[str, str] = {}  # what rejects it, or ""
    for one in telling:
        for kind, outputs in _rearranged(one.reference, model):
            rearranged[kind] = rearranged.get(kind) or rejected(one, outputs)
    attempts += [Attempt(kind, "", 1.0, 1.0, bool(by), by) for kind, by in rearranged.items()]
    if not any(a.kind == "noise" for a in attempts):
        return Power(False, "has no layer with weights to damage, so that it proves nothing", tuple(attempts))
    missed = [a for a in attempts if not a.rejected]
    if missed:
        worst = missed[0]
        what = (
            f"noise of {worst.cap:.3g} of the standard deviation of {worst.layer}'s weights"
            if worst.kind == "noise"
            else worst.kind
        )
        return Power(False, f"does not notice {what}", tuple(attempts))
    if deaf - seen:
        output, group = min(deaf - seen)
        return Power(False, f"does not notice any damage in {group} of {output}", tuple(attempts))
    size = max((a.size for a in attempts if a.kind == "noise"), default=0.0)
    others = ", ".join(a.kind for a in attempts if a.kind != "noise")
    return Power(
        True,
        f"notices noise of {size * 100:.3g} % of a layer's standard deviation" + (f"; {others}" if others else ""),
        tuple(attempts),
    )


def _silent(reference: Outputs, model: ModelSpec) -> str:
    """Why nothing can be seen in these outputs at all, or ""."""
    spec = detector_output(model)
    if spec is None:
        return ""
    score = next(g for g in spec.groups if g.kind == "score")
    best = float(np.asarray(reference[spec.name])[:, score.channels].max())
    return (
        "" if best >= SCORE_FLOOR else f"no anchor has a score of {SCORE_FLOOR} (best {best:.3g}), so boxes say nothing"
    )


def _chosen(layers: Sequence[str]) -> list[str]:
    """One layer in the middle of each third."""
    count = len(layers)
    return list(dict.fromkeys(layers[i] for i in (count // 6, count // 2, count * 5 // 6) if i < count))


def _rearranged(reference: Outputs, model: ModelSpec) -> list[tuple[str, Outputs]]:
    """Outputs with the two classes that fire most swapped, and with the first row of a batch repeated."""
    made: list[tuple[str, Outputs]] = []
    spec = detector_output(model) or model.outputs[0]
    output = np.asarray(reference[spec.name])
    group = next((g for g in spec.groups if g.kind == "score"), spec.groups[0])
    if output.ndim > 1:
        values = output[:, group.channels]
        if values.shape[1] > 1:
            counts = (
                (values >= SCORE_FLOOR).sum(axis=(0, *range(2, values.ndim)))
                if group.kind == "score"
                else values.mean(axis=(0, *range(2, values.ndim)))
            )
            order = np.argsort(-counts, kind="stable")
            a, b = int(order[0]) + group.start, int(order[1]) + group.start
            swapped = output.copy()
            swapped[:, [a, b]] = output[:, [b, a]]
            made.append(("two channels swapped", {**reference, spec.name: swapped}))
    if output.ndim > 1 and output.shape[0] > 1:
        repeated = output.copy()
        repeated[1] = output[0]
        made.append(("a batch row repeated", {**reference, spec.name: repeated}))
    return made
