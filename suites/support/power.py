"""Power: a comparison proves on its own feeds that it could have failed, by rejecting known damage of the reference."""

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
class Power:
    """Whether the comparison could have failed, and the statement for the report."""

    sensitive: bool
    statement: str
    damages: tuple[Attempt, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"damages": [asdict(d) for d in self.damages]}


def prove(
    reference: Outputs,
    damaged: Callable[[str, float], Outputs],
    layers: Sequence[str],
    model: ModelSpec,
    precision: Precision,
    imgsz: tuple[int, int],
    overrides: Sequence[Mapping[str, Any]] = (),
    rounding: Rounding | None = None,
) -> Power:
    """Tries damage that must be rejected at this precision's tolerances.

    Args:
        reference: the undamaged outputs.
        damaged: outputs with noise of a size on the weights of a layer.
        layers: names of layers, in the model's order.
        rounding: as `compare` takes it.
    """
    cap = CAPS[precision]

    # The first draws do: more of them move a limit by little, and what is damaged always asks for them.
    first = rounding and (lambda _: rounding(DRAWS[0]))

    def rows_of(outputs: Outputs) -> list[Comparison]:
        return compare(reference, outputs, model, precision, imgsz=imgsz, overrides=overrides, rounding=first)

    seen: set[tuple[str, str]] = set()  # (output, group) in which damage was noticed

    def rejected(outputs: Outputs) -> str:
        """What rejects these outputs, or ""."""
        bad = [r for r in rows_of(outputs) if not r.passed]
        seen.update((r.output, r.group) for r in bad)
        if bad:
            return f"{bad[0].group} {bad[0].measure} {bad[0].observed:.3g}, allowed {bad[0].allowed:.3g}"
        matching = same_objects(reference, outputs, model, precision)
        if matching is not None and not matching.passed:
            return f"matching: {len(matching.lost)} lost, {len(matching.extra)} extra of {matching.reference}"
        return ""

    silent = _silent(reference, model)
    if silent:
        return Power(False, silent, ())
    attempts: list[Attempt] = []
    for layer in _chosen(layers):
        for size in (s for s in SIZES if s <= cap):
            by = rejected(damaged(layer, size))
            if by or size == max(s for s in SIZES if s <= cap):
                attempts.append(Attempt("noise", layer, size, cap, bool(by), by))
                break
    # What is compared has to be noticed in itself: an output that nothing reaches would pass whatever is in it.
    deaf = {(r.output, r.group) for r in rows_of(reference)} - seen
    for layer in layers if deaf else ():
        rejected(damaged(layer, cap))
        if not deaf - seen:
            break
    for kind, outputs in _rearranged(reference, model):
        by = rejected(outputs)
        attempts.append(Attempt(kind, "", 1.0, 1.0, bool(by), by))
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
            made.append((f"channels {a} and {b} swapped", {**reference, spec.name: swapped}))
    if output.ndim > 1 and output.shape[0] > 1:
        repeated = output.copy()
        repeated[1] = output[0]
        made.append(("a batch row repeated", {**reference, spec.name: repeated}))
    return made
