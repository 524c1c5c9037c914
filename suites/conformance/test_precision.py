"""Precision: in the artifact, as read back from it, and executed, as the runtime tells."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict

from exporters import formats
from exporters.artifact import ALLOW_TF32
from exporters.errors import NotSupported
from exporters.models.spec import belongs
from exporters.spec import Precision
from suites.support.bench import Bench


def test_achieved_precision_is_the_requested(case: Bench) -> None:
    """Every convolution and matrix product has the asked precision, but those that the model names with reasons."""
    achieved = case.facts().achieved
    asked = case.spec.precision.value
    evidence = ", ".join(f"{n} {k}" for k, n in achieved.counts.items())
    kinds = {k.removeprefix("operators ") for k in achieved.counts if k.startswith("operators ")}
    if case.spec.precision is Precision.TF32 and kinds <= {"tf32", "fp32"}:
        # TF32 is a permission: the builder takes an FP32 kernel where that is faster.
        if "tf32" not in kinds:
            raise NotSupported(f"TensorRT found no kernel in TF32 that is faster than in FP32 ({evidence})")
        return
    assert achieved.precision == asked, f"asked for {asked}, the file is {achieved.precision or 'unknown'} ({evidence})"
    # On a CPU it makes no difference, but our own file is one for both.
    rounded = achieved.counts.get(ALLOW_TF32, 0) if case.brought is None or case.case.device != "cpu" else 0
    assert not rounded or asked != "fp32", f"asked for fp32, but a GPU may round to TF32 in {rounded} convolutions"
    kept = [*(path for path, _ in case.model.fp32), *case.spec.keep, *formats.get(case.spec.format).keeps(case.spec)]
    wrong = [name for name in achieved.exceptions if not belongs(name, kept)]
    assert not wrong, f"asked for {asked}, but {len(wrong)} operators are not: {', '.join(wrong[:5])} ({evidence})"
    lost = [path for path in case.spec.keep if case.brought is None and _is_lost(case, path, achieved.exceptions)]
    assert not lost, f"asked to keep {', '.join(lost)} in floating point, but all of it is {asked} ({evidence})"
    if achieved.in_fp32 is not None and case.brought is None and asked != "fp32":
        paths = [path for path, _ in case.model.fp32]  # what one of them computes may be a constant by now
        assert not paths or any(belongs(name, paths) for name in achieved.in_fp32), (
            f"{', '.join(paths)} were to stay in FP32, and nothing of them does ({evidence})"
        )
    # What our request keeps in FP32 is to be kept between its operators too; others' files promise nothing there.
    rounded = achieved.rounded if case.brought is None else ()
    assert not rounded, (
        f"{len(rounded)} values that stay in FP32 go through FP16: {', '.join(rounded[:3])} ({evidence})"
    )


def _is_lost(case: Bench, path: str, exceptions: Collection[str]) -> bool:
    """Whether a module that was to be kept has weights that the network uses, and no operator of it is an exception."""
    has_weights = any(belongs(name, [path]) for name in case.parameters().used)
    return has_weights and not any(belongs(name, [path]) for name in exceptions)


def test_executed_precision_is_the_requested(case: Bench) -> None:
    """The runtime computes in the asked precision, by its own account."""
    asked, runtime = case.spec.precision, case.case.runtime
    execution = case.describe().execution
    if execution.layers:
        case.evidence["layers"] = [asdict(layer) for layer in execution.layers]
    if asked not in runtime.executes:
        seen = "; ".join(execution.notes)
        raise NotSupported(f"{runtime.because} (seen: {seen})" if seen else runtime.because)
    if not execution.precision and runtime.untold:
        raise NotSupported(runtime.untold)
    if asked is Precision.TF32 and execution.precision == "fp32":
        raise NotSupported(
            f"TF32 is a permission, and most operators are faster in FP32 ({'; '.join(execution.notes)})"
        )
    assert execution.precision == asked.value, (
        f"asked for {asked}, {execution.runtime} executes {execution.precision or 'unknown'} "
        f"({'; '.join(execution.notes)})"
    )
    if asked is Precision.INT8 and execution.operators:
        stored, ran = case.facts().achieved.counts.get("operators int8", 0), execution.operators.get("int8", 0)
        assert ran >= stored, f"the file has {stored} operators in int8, and {execution.runtime} runs {ran} of them so"


def test_every_node_runs_on_the_requested_provider(case: Bench) -> None:
    """No node of the graph fell back to another provider or device."""
    execution = case.describe().execution
    if not execution.providers:
        raise NotSupported(f"{execution.runtime} has no execution providers: it runs on the device that it is given")
    counts = ", ".join(f"{n} on {p}" for p, n in execution.providers.items())
    assert not execution.fallback, (
        f"{len(execution.fallback)} nodes run elsewhere ({counts}): {', '.join(execution.fallback[:5])}"
    )


def test_opset_is_the_requested(case: Bench) -> None:
    """The graph is written in the operator set that was asked for."""
    if "opset" not in formats.get(case.spec.format).options:
        raise NotSupported(f"format {case.spec.format} has no operator set")
    found = case.facts().achieved.counts.get("opset", 0)
    if case.spec.format != "onnx":
        raise NotSupported("the operator set is that of the ONNX file that it was made from")
    if case.brought is not None and "opset" not in case.spec.changed():
        raise NotSupported(f"no operator set was asked for (the file has {found})")
    assert found == case.spec.opset, f"the file's opset is {found}, asked for {case.spec.opset}"
