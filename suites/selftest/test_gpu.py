"""TensorRT on a real GPU: engines that are not what they say, sessions, memory, measurements. `pytest -m cuda`."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from exporters.cuda.nvml import gpu_facts
from exporters.errors import (
    ArtifactError,
    BadRequest,
    ExportgateError,
    FeedError,
    MeasurementError,
    NotSupported,
    UnsafeFile,
)
from exporters.measure import MeasurementPlan, Samples
from exporters.models.spec import InputSpec, ModelSpec, OutputSpec
from exporters.pool import Pool, RemoteSession
from exporters.spec import request
from exporters.tensorrt import timing
from exporters.tensorrt.calibrators import algorithm_of
from exporters.tensorrt.header import read_engine, write_engine
from exporters.tensorrt.options import ALGORITHMS
from exporters.toolchain import cache_root
from suites.conformance import test_dynamic, test_metadata, test_outputs, test_precision, test_shapes
from suites.selftest.conftest import Claim, Judge, Workshop
from suites.support.bench import Bench, Run
from suites.support.gate import judge as gate
from suites.support.verdict import Verdict

pytestmark = pytest.mark.cuda
PLAN = MeasurementPlan(seconds=0.3, inferences=64)
CLAIMS: tuple[Claim, ...] = (
    test_shapes.test_input_signature_is_the_requested,
    test_shapes.test_output_shapes_match_reference,
    test_outputs.test_outputs_match_reference,
    test_outputs.test_detections_match_reference,
    test_metadata.test_class_names_survive_the_round_trip,
    test_precision.test_achieved_precision_is_the_requested,
    test_precision.test_executed_precision_is_the_requested,
    test_dynamic.test_other_shapes_are_refused,
)


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not gpu_facts():
        pytest.skip("there is no NVIDIA GPU here, or no driver")


def opened(workshop: Workshop, name: str) -> RemoteSession:
    case = workshop.case(name)
    return workshop.run.pool.open(workshop.good(name), case.spec, case.runtime.id, case.device)


def feeds(workshop: Workshop, name: str, batch: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    spec = workshop.case(name).spec
    return workshop.run.feeds(spec, batch, spec.imgsz)[0].arrays


def _passes(judge: Judge, bench: Bench, claims: tuple[Claim, ...]) -> None:
    try:
        for claim in claims:
            verdict, because = judge(claim, bench)
            assert verdict in (Verdict.PASS, Verdict.NOT_SUPPORTED), f"{claim.__name__}: {verdict} {because}"
    finally:
        bench.close()


# ---- good engines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["", "dynamic", "pair"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16", "int8"])
def test_a_good_engine_passes(workshop: Workshop, judge: Judge, precision: str, shape: str) -> None:
    # The boxes of `blobs` are small: BF16's roundings are as large as the damage that a comparison has to notice.
    model = "twins" if precision == "bf16" else "blobs"
    name = f"{model} engine {precision} cuda {shape}".strip()
    bench = workshop.bench(name)
    more = (test_dynamic.test_random_shapes_match_reference,) if shape == "dynamic" else ()
    more += (test_dynamic.test_smaller_batches_match_reference,) if shape == "pair" else ()
    _passes(judge, bench, (*CLAIMS, *more))


@pytest.mark.parametrize(
    "options",
    [
        {"refit": True},
        {"version_compatible": True},
        {"hardware_compatibility": "ampere_plus"},
        {"dynamic": True, "batch": 4, "profiles": "1x96x96:1x160x160:1x160x160,1x160x160:2x160x160:4x320x320"},
    ],
    ids=["refit", "version compatible", "hardware compatible", "two profiles"],
)
def test_an_engine_built_otherwise_passes(workshop: Workshop, judge: Judge, options: dict[str, Any]) -> None:
    """Options of the builder change how an engine may be used, not what it computes."""
    case = workshop.case("blobs engine fp16 cuda")
    spec = request(case.spec.model, "engine", precision="fp16", device="0", **options)
    _passes(judge, Bench(workshop.run, replace(case, spec=spec)), CLAIMS)


@pytest.mark.parametrize("shape", ["", "dynamic", "pair"])
def test_fp8_passes_where_tensorrt_runs_it_and_fails_where_not(workshop: Workshop, judge: Judge, shape: str) -> None:
    """TensorRT 10.6 runs these convolutions in FP16, and those of YOLOv8n, too, with wrong values: FP8 is no more than
    was asked for."""
    bench = workshop.bench(f"blobs engine fp8 cuda {shape}".strip())
    try:
        achieved = bench.artifact().achieved.precision
        verdict, because = judge(test_precision.test_achieved_precision_is_the_requested, bench)
    finally:
        bench.close()
    assert verdict is (Verdict.PASS if achieved == "fp8" else Verdict.FAIL), because
    assert verdict is Verdict.PASS or f"asked for fp8, the file is {achieved}" in because, because


@pytest.mark.parametrize("name", ["engine fp32 cuda nms", "engine fp16 cuda nms pair"])
def test_an_engine_suppresses_as_the_reference_does(workshop: Workshop, judge: Judge, name: str) -> None:
    """NMS in the graph of a real detector, alone and in a batch."""
    bench = workshop.bench(name)
    more = (test_dynamic.test_smaller_batches_match_reference,) if "pair" in name else ()
    _passes(judge, bench, (*CLAIMS, *more))


# ---- engines that are not what they say -----------------------------------------------------------------------------


def _another(form: str) -> Callable[[Path, Workshop], None]:
    """The file of another case, under this one's name."""

    def damage(path: Path, workshop: Workshop) -> None:
        path.write_bytes(workshop.good(form).path.read_bytes())

    return damage


def _another_checkpoint(path: Path, workshop: Workshop) -> None:
    """The plan of other weights behind the right header."""
    model = workshop.models["blobs"]
    source = model.search[0] / "small_models.py"
    folder = path.parent / "other"
    folder.mkdir()
    (folder / "small_models.py").write_text(source.read_text(encoding="utf-8").replace("30.0", "-30.0"))
    with Pool() as pool:
        spec = workshop.case("blobs engine fp16 cuda").spec.but(model=replace(model, search=(folder,)))
        other = read_engine(pool.export(spec).path).plan()
    header = read_engine(path).header
    assert header is not None
    write_engine(path, header, other)


def _doubled_scale(path: Path, workshop: Workshop) -> None:
    """An engine of the Q/DQ graph in which one tensor's scale is twice as large where it is dequantized."""
    from exporters.cuda.context import enter
    from exporters.tensorrt.build import build

    case = workshop.case("blobs engine int8 cuda")
    parent = workshop.good("blobs onnx int8").path
    model = onnx.load(parent)
    stored = {i.name: i for i in model.graph.initializer}
    node = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored][-1]
    scale = onnx.numpy_helper.to_array(stored[node.input[1]])
    stored[node.input[1]].CopyFrom(onnx.numpy_helper.from_array(scale * 2, node.input[1]))
    graph = path.parent / "doubled.onnx"
    onnx.save(model, graph)
    built = build(graph, case.spec, enter("cuda:0"), path.parent)
    header = read_engine(path).header
    assert header is not None
    write_engine(path, header, built.plan)


@pytest.mark.parametrize(
    ("name", "damage", "claim", "words"),
    [
        (
            "blobs engine fp16 cuda",
            _another("blobs engine fp32 cuda"),
            test_precision.test_achieved_precision_is_the_requested,
            "asked for fp16, the file is fp32",
        ),
        (
            "blobs engine int8 cuda",
            _another("blobs engine fp16 cuda"),
            test_precision.test_achieved_precision_is_the_requested,
            "asked for int8, the file is fp16",
        ),
        ("blobs engine int8 cuda", _doubled_scale, test_outputs.test_outputs_match_reference, "engine int8"),
        ("blobs engine fp16 cuda", _another_checkpoint, test_outputs.test_outputs_match_reference, "-> engine fp16"),
        (
            "blobs engine fp16 cuda",
            _another("blobs engine fp16 cuda pair"),
            test_shapes.test_input_signature_is_the_requested,
            "axis 0",
        ),
    ],
    ids=["fp32 as fp16", "fp16 as int8", "a scale doubled", "another checkpoint", "another batch"],
)
def test_a_wrong_engine_is_caught(
    workshop: Workshop, name: str, damage: Callable[[Path, Workshop], None], claim: Claim, words: str
) -> None:
    verdict, because = workshop.judge(name, claim, damage)
    assert verdict is Verdict.FAIL, because
    assert words in because


NOISE = """
# Put on a worker's path by a test: an exporter whose engines have other weights in one layer than their ONNX files.
import sys
import threading
import time


def _damage():
    while not hasattr(sys.modules.get("exporters.formats.engine"), "FORMAT"):
        time.sleep(0.002)
    module = sys.modules["exporters.formats.engine"]
    own = module._in_precision

    def in_precision(job):
        import onnx

        source = own(job)
        model = onnx.load(source)
        stored = {i.name: i for i in model.graph.initializer}
        node = next(n for n in model.graph.node if n.op_type == "Conv" and n.name.startswith("/key"))
        weights = onnx.numpy_helper.to_array(stored[node.input[1]])
        stored[node.input[1]].CopyFrom(onnx.numpy_helper.from_array(weights * weights.dtype.type(1.5), node.input[1]))
        target = job.folder / "damaged.onnx"
        onnx.save(model, target)
        return target

    module._in_precision = in_precision


threading.Thread(target=_damage, daemon=True).start()
"""


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_failure_of_an_engine_names_where_it_begins(
    workshop: Workshop, judge: Judge, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By engines that are built again with what is inside; the ONNX file is right, and TensorRT gets another."""
    (tmp_path / "sitecustomize.py").write_text(NOISE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("EXPORTGATE_CACHE", str(tmp_path / "cache"))
    with Pool() as pool:
        bench = Bench(Run(workshop.run.project, pool), workshop.case(f"mixed engine {precision} cuda"))
        verdict, because = judge(test_outputs.test_outputs_match_reference, bench)
        bench.close()
    assert verdict is Verdict.FAIL, because
    assert "in an engine built again to show it" in because and "beyond is Conv /key/Conv: " in because, because


# ---- plans that cannot be loaded ------------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _header_twice(path: Path) -> None:
    """The metadata header before a file that has one."""
    data = path.read_bytes()
    text = json.dumps({"names": {}, "stride": 8}).encode()
    path.write_bytes(struct.pack("<i", len(text)) + text + data)


def _of_another_version(path: Path) -> None:
    engine = read_engine(path)
    header: dict[str, Any] = json.loads(json.dumps(engine.header))
    header["plan"] |= {"made_by": "TensorRT 8.6.1", "gpu": "NVIDIA A100-SXM4-80GB", "compute_capability": "8.0"}
    plan = bytearray(engine.plan())
    plan[4:64] = bytes(b ^ 0x55 for b in plan[4:64])  # behind the magic: version and size
    write_engine(path, header, bytes(plan))


def _noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(20_000))


def _noise_behind_the_magic(path: Path) -> None:
    path.write_bytes(b"ftrt" + np.random.default_rng(0).bytes(20_000))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_cut, ("is not the one that its metadata header describes",)),
        (_header_twice, ("holds no plan of TensorRT",)),
        (_of_another_version, ("TensorRT 8.6.1", "A100", "THIS GPU")),
        (_noise, ("holds no plan of TensorRT",)),
        (_noise_behind_the_magic, ("cannot be loaded by TensorRT",)),
        (lambda p: p.write_bytes(b""), ("0 bytes",)),
    ],
    ids=["cut", "header twice", "another version", "noise", "noise behind the magic", "empty"],
)
def test_a_plan_that_cannot_be_loaded_is_one_line(
    workshop: Workshop, damage: Callable[[Path], object], words: tuple[str, ...]
) -> None:
    def claim(bench: Any) -> None:
        bench.session()

    verdict, because = workshop.judge("blobs engine fp16 cuda", claim, lambda path, _: [damage(path), None][1])
    assert verdict is Verdict.ERROR
    here = str(gpu_facts()["name"])
    assert all((here if w == "THIS GPU" else w) in because for w in words), because
    assert "\n" not in because
    again = opened(workshop, "blobs engine fp16 cuda")  # the GPU works on
    again.close()


def test_somebody_elses_plan_needs_trust(workshop: Workshop, tmp_path: Path) -> None:
    from exporters.artifact import foreign

    path = tmp_path / "theirs.engine"
    path.write_bytes(workshop.good("blobs engine fp16 cuda").path.read_bytes())
    case = workshop.case("blobs engine fp16 cuda")
    with pytest.raises(UnsafeFile, match="--trust"):
        foreign(path, "engine", case.spec.to_dict(), trust=False, is_code=True)
    brought = foreign(path, "engine", case.spec.to_dict(), trust=True, is_code=True)
    session = workshop.run.pool.open(brought, case.spec, "trt", "cuda:0")
    assert session.run(feeds(workshop, "blobs engine fp16 cuda"))
    session.close()


# ---- implicit quantization -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_scales_are_calibrated_once_and_a_damaged_cache_is_named(workshop: Workshop, algorithm: str) -> None:
    """Another engine of the same request finds the scales; a cache that was cut is made anew, and that is told."""
    model, folder = workshop.models["blobs"], cache_root() / "calibration"
    for old in folder.glob("blobs-*"):
        old.unlink()
    spec = request(model, "engine", device="0", int8=True, data=model.feeds, trt_quant_algo=algorithm, builder_level=0)
    try:
        made = workshop.run.pool.export(spec)
    except NotSupported as error:
        assert algorithm in str(error)
        return
    assert [n for n in made.notes if "calibrated on" in n and algorithm in n], made.notes
    (kept,) = folder.glob("blobs-*")
    again = workshop.run.pool.export(spec.but(builder_level=1))
    assert [n for n in again.notes if "reused" in n] and not [n for n in again.notes if "calibrated on" in n]
    left = {next(a.root.glob("*.calibration")).read_bytes() for a in (made, again)}
    assert len(left) == 1 and algorithm_of(left.pop()) == algorithm
    kept.write_bytes(kept.read_bytes()[:-30])
    third = workshop.run.pool.export(spec.but(builder_level=2))
    assert [n for n in third.notes if "is damaged and was made anew" in n], third.notes
    assert [n for n in third.notes if "calibrated on" in n]


def test_a_damaged_timing_cache_is_named_and_begun_anew(workshop: Workshop, tmp_path: Path) -> None:
    facts = gpu_facts()
    path = timing.kept_path("TensorRT", str(importlib.import_module("tensorrt").__version__), str(facts["name"]))
    workshop.good("blobs engine fp16 cuda")  # so that there is one
    before = path.read_bytes()
    try:
        path.write_bytes(b"noise" * 1000)
        spec = workshop.case("blobs engine fp16 cuda").spec.but(builder_level=1)
        made = workshop.run.pool.export(spec)
        assert [n for n in made.notes if "is damaged and was begun anew" in n], made.notes
        given = tmp_path / "given.cache"
        given.write_bytes(b"noise" * 1000)
        with pytest.raises(ExportgateError, match="is none of TensorRT"):
            workshop.run.pool.export(spec.but(timing_cache=str(given)))
    finally:
        path.write_bytes(before)


# ---- sessions -------------------------------------------------------------------------------------------------------


def test_shapes_outside_the_profile_are_refused(workshop: Workshop) -> None:
    session = opened(workshop, "blobs engine fp16 cuda pair")
    for batch, size in ((3, 160), (1, 168)):
        with pytest.raises(FeedError) as caught:
            session.run({"images": np.zeros((batch, 3, size, size), np.float32)})
        assert "expected" in str(caught.value) and str(batch if batch > 2 else size) in str(caught.value)
    assert session.run(feeds(workshop, "blobs engine fp16 cuda pair", 2))
    session.close()


def test_several_contexts_at_a_time(workshop: Workshop) -> None:
    """Two sessions of one worker, in turns, with shapes of their own, give what each gives alone."""
    name = "blobs engine fp16 cuda dynamic"
    one, two = opened(workshop, name), opened(workshop, name)
    small = {"images": np.ascontiguousarray(feeds(workshop, name)["images"][..., :80, :])}
    large = feeds(workshop, name)
    alone = {k: np.array(v) for k, v in one.run(small).items()}, {k: np.array(v) for k, v in two.run(large).items()}
    for _ in range(3):
        for session, given, wanted in ((one, small, alone[0]), (two, large, alone[1]), (one, large, alone[1])):
            got = session.run(given)
            assert all(np.array_equal(got[k], wanted[k]) for k in wanted)
    one.close()
    two.close()


def test_a_repeated_shape_is_replayed_as_a_cuda_graph(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay gives what was enqueued, for other values too, and never outlives a change of shape or of the context."""
    from exporters.cuda.graph import Graph
    from exporters.runtimes.tensorrt import TensorRtSession

    launched: list[int] = []
    own = Graph.launch
    monkeypatch.setattr(Graph, "launch", lambda graph: (launched.append(id(graph)), own(graph))[1])
    name = "blobs engine fp16 cuda dynamic"
    large = feeds(workshop, name)
    small = {"images": np.ascontiguousarray(large["images"][..., :80, :])}
    other = {"images": np.ascontiguousarray(large["images"][..., ::-1])}
    with TensorRtSession(workshop.good(name).path, workshop.case(name).spec, "cuda:0") as session:
        plain: list[dict[str, np.ndarray[Any, Any]]] = []
        for given in (large, small, other):  # each is bound anew, so none is replayed
            session.bound = None
            plain.append(session.run(given))
        assert not launched
        assert any(not np.array_equal(plain[0][k], plain[2][k]) for k in plain[0])

        def runs(given: dict[str, np.ndarray[Any, Any]], wanted: int, replayed: bool) -> None:
            launched.clear()
            got = session.run(given)
            assert all(np.array_equal(got[k], plain[wanted][k]) for k in got)
            assert bool(launched) is replayed

        runs(large, 0, True)  # `other` had this shape
        runs(other, 2, True)
        runs(small, 1, False)
        runs(small, 1, True)
        runs(large, 0, False)
        runs(other, 2, True)
        session.on_device(small).close()  # the context is told other shapes and addresses
        runs(large, 0, False)
        runs(other, 2, True)


def test_two_contexts_compute_at_the_same_time(workshop: Workshop) -> None:
    """Both are enqueued before either is waited for, each on its stream with shapes of its own."""
    from exporters.runtimes.tensorrt import TensorRtSession

    name = "blobs engine fp16 cuda dynamic"
    path, spec = workshop.good(name).path, workshop.case(name).spec
    large = feeds(workshop, name)
    small = {"images": np.ascontiguousarray(large["images"][..., :80, :])}
    with TensorRtSession(path, spec, "cuda:0") as one, TensorRtSession(path, spec, "cuda:0") as two:
        alone = one.run(small), two.run(large)
        slots = one.on_device(small), two.on_device(large)
        for graph in (False, True):
            assert not graph or all(slot.capture() for slot in slots)
            for slot in slots:
                slot.forget()
            for _ in range(50):
                for slot in slots:
                    slot.enqueue(graph)
            for slot, wanted in zip(slots, alone, strict=True):
                got = slot.outputs()
                assert all(np.array_equal(got[k], wanted[k]) for k in wanted)
        for slot in slots:
            slot.close()


SPARSE = '''
import torch


class Sparse(torch.nn.Module):
    """Places of the bright pixels: how many there are depends on the picture."""

    def forward(self, images):
        return torch.nonzero(images > 0.9).float(), images * 2


def make():
    return Sparse()


def pictures(spec):
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        yield {"images": torch.rand((1, 3, 16, 16), generator=generator).numpy()}
'''


def test_outputs_whose_size_depends_on_the_data(tmp_path: Path) -> None:
    (tmp_path / "sparse.py").write_text(SPARSE)
    model = ModelSpec(
        "sparse",
        "sparse:make",
        search=(tmp_path,),
        inputs=(InputSpec("images", (1, 3, 16, 16)),),
        outputs=(OutputSpec("places", ((0, "count"),)), OutputSpec("double")),
        feeds="sparse:pictures",
    )
    spec = request(model, "engine", device="0")
    with Pool() as pool:
        session = pool.open(pool.export(spec), spec, "trt", "cuda:0")
        for seed in (0, 1, 0):
            images = np.random.default_rng(seed).random((1, 3, 16, 16), np.float32)
            got = session.run({"images": images})
            assert np.array_equal(got["places"], np.argwhere(images > 0.9).astype(np.float32))
            assert np.allclose(got["double"], images * 2)
        assert session.measure([{"images": images}], PLAN).milliseconds
        session.close()


def test_memory_does_not_grow(workshop: Workshop) -> None:
    """Load, run and close, 200 times in one process: at most 2 MiB more GPU memory than after 20."""
    name = "blobs engine fp16 cuda"
    artifact, case, given = workshop.good(name), workshop.case(name), feeds(workshop, name)
    used: list[int] = []
    with Pool() as pool:
        for number in range(1, 201):
            session = pool.open(artifact, case.spec, case.runtime.id, case.device)
            session.run(given)
            if number in (20, 200):
                used.append(
                    round(
                        session.measure([given], MeasurementPlan(0.0, 0.0, 1, longest_warm_up=0.0)).before["used_mib"]
                    )
                )
            session.close()
    print(f"GPU memory after round 20: {used[0]} MiB, after round 200: {used[1]} MiB")
    assert used[1] - used[0] <= 2


def test_no_room_is_one_line_and_the_gpu_works_on(workshop: Workshop) -> None:
    """The GPU's memory is taken by somebody else while a session is opened and fed."""
    import torch

    name = "blobs engine fp16 cuda pair"
    artifact, case = workshop.good(name), workshop.case(name)
    given = feeds(workshop, name, 2)
    with Pool() as pool:
        pool.open(artifact, case.spec, case.runtime.id, case.device).close()  # the process has its context
        held, size = list[torch.Tensor](), torch.cuda.mem_get_info()[0]
        while size >= 1 << 20:  # not all that is free is to be had in one piece
            try:
                held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                size //= 2
        try:
            with pytest.raises(ExportgateError) as caught:
                session = pool.open(artifact, case.spec, case.runtime.id, case.device)
                session.run(given)
        finally:
            del held
            torch.cuda.empty_cache()
        assert isinstance(caught.value, (BadRequest, ArtifactError)), repr(caught.value)
        assert "MiB" in str(caught.value) and "free" in str(caught.value), str(caught.value)
        again = pool.open(artifact, case.spec, case.runtime.id, case.device)
        assert again.run(given)
        again.close()


@pytest.mark.parametrize("workspace", [1e-9, 1024.0])
def test_an_impossible_workspace_names_the_option_or_builds(workshop: Workshop, workspace: float) -> None:
    """TensorRT finds kernels that need none, and takes no more than there is; or the line names the option."""
    spec = request(workshop.models["blobs"], "engine", device="0", workspace=workspace)
    try:
        assert workshop.run.pool.export(spec).path.is_file()
    except ExportgateError as error:
        assert "workspace" in str(error)


# ---- measurements ---------------------------------------------------------------------------------------------------


def _measured(workshop: Workshop, name: str, pool: Pool, plan: MeasurementPlan = PLAN) -> Samples:
    case = workshop.case(name)
    session = pool.open(workshop.good(name), case.spec, case.runtime.id, case.device)
    found = session.measure([feeds(workshop, name)], plan)
    session.close()
    return found


def test_the_median_is_that_of_a_bare_loop(workshop: Workshop) -> None:
    """CUDA events around the captured graph and nothing else, on the same engine in the same process: within 1 %."""
    import torch

    from exporters.measure import measure
    from exporters.runtimes.tensorrt import TensorRtSession

    # A model whose inference takes long enough that two loops agree to 1 %: the small ones take 20 microseconds.
    model = replace(workshop.models["obstacles"], imgsz=(640, 640))
    spec = request(model, "engine", device="0", half=True)
    given = workshop.run.feeds(spec, 1, spec.imgsz)[0].arrays
    with TensorRtSession(workshop.run.pool.export(spec).path, spec, "cuda:0") as session:
        ratios: list[float] = []
        for _ in range(5):
            ours = statistics.median(measure(session, [given], MeasurementPlan(seconds=0.5)).milliseconds)
            slot = session.on_device(given)
            assert slot.capture()
            stream = torch.cuda.ExternalStream(int(session.stream.handle))
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            bare: list[float] = []
            for _ in range(2000):
                start.record(stream)
                slot.enqueue(True)
                end.record(stream)
                end.synchronize()
                bare.append(start.elapsed_time(end))
            slot.close()
            ratios.append(ours / statistics.median(bare))
    print(f"ratios to the bare loop: {', '.join(f'{r:.4f}' for r in ratios)}")
    assert abs(statistics.median(ratios) - 1) <= 0.01


def test_a_graph_that_computes_nothing_is_no_measurement(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an inference before it left in the outputs is not taken for its own."""
    from exporters.cuda.graph import Graph
    from exporters.measure import measure
    from exporters.runtimes.tensorrt import TensorRtSession

    name = "blobs engine fp16 cuda"
    monkeypatch.setattr(Graph, "launch", lambda graph: None)
    given = [feeds(workshop, name)]
    session = TensorRtSession(workshop.good(name).path, workshop.case(name).spec, "cuda:0")
    with session, pytest.raises(MeasurementError, match="changed by nan"):
        measure(session, given, PLAN)


def test_a_measurement_says_how_it_was_taken(workshop: Workshop) -> None:
    with Pool() as pool:
        found = _measured(workshop, "blobs engine fp16 cuda", pool)
    assert "CUDA graph" in found.timer
    assert found.first_call > 0
    for figure in ("host latency ms", "enqueue ms", "compute without CUDA graph ms", "throughput per s"):
        assert found.figures[figure] > 0
    assert found.before["sm_mhz"] > 0 and found.after["celsius"] > 0


DELAY = """
# Put on a worker's path by a test: every inference of an engine also fills 256 MB of GPU memory.
import sys
import threading
import time


def _delay():
    while not hasattr(sys.modules.get("exporters.runtimes.tensorrt"), "_allocator"):
        time.sleep(0.002)
    module = sys.modules["exporters.runtimes.tensorrt"]
    own = module.Slot.enqueue
    held = []

    def enqueue(self, graph=False):
        cuda = module.driver()
        if not held:
            held.append(cuda.mem_alloc(256 << 20))
        own(self, graph)
        if not graph:
            cuda.memset_d8_async(held[0], 0, 256 << 20, self.session.stream)

    module.Slot.enqueue = enqueue


threading.Thread(target=_delay, daemon=True).start()
"""


def test_a_delay_in_the_worker_is_caught_by_the_baseline(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of the same engine pass the gate against each other; with a delay in every inference they fail."""

    def processes() -> list[list[float]]:
        made: list[list[float]] = []
        for _ in range(6):
            with Pool() as pool:
                made.append(list(_measured(workshop, "blobs engine fp16 cuda", pool).milliseconds))
        return made

    baseline, same = processes(), processes()
    (tmp_path / "sitecustomize.py").write_text(DELAY)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    slow = processes()
    clean, late = gate(baseline, same, 0.02), gate(baseline, slow, 0.02)
    print(f"A/A: {clean.line()}; delayed: {late.line()}")
    assert late.verdict is Verdict.FAIL
    assert clean.verdict is not Verdict.FAIL
