"""Workers: what crashes, hangs, swells or babbles costs its own case and no other.

Artifacts are opened once, and the cache is true."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest

import suites
from exporters import client, formats
from exporters.artifact import MANIFEST, Artifact, read_manifest
from exporters.client import Limits, Worker
from exporters.errors import ArtifactError, ExportError, UnsafeFile, WorkerCrash, WorkerTimeout
from exporters.keys import factory_digest
from exporters.models.catalog import from_checkpoint, from_table
from exporters.models.spec import ModelSpec, OutputSpec
from exporters.pool import Pool
from exporters.spec import request
from suites.conformance import test_export as export
from suites.conformance import test_robustness as robustness
from suites.conformance import test_shapes as shapes
from suites.support.ahead import export_ahead, generations
from suites.support.bench import Bench, Run
from suites.support.cases import Case
from suites.support.config import Project
from suites.support.verdict import Verdict

if TYPE_CHECKING:
    from exporters.client import Caller

ROOT = Path(suites.__file__).parent.parent
Judge = Callable[[Callable[[Bench], None], Bench], tuple[Verdict, str]]

MODULE = '''
import os, signal, subprocess, sys, time
import torch


class Model(torch.nn.Module):
    def __init__(self, before):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.before = before

    def forward(self, images):
        self.before()
        return self.conv(images)


def nothing():
    pass


def aborts():
    os.abort()


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def hangs():
    time.sleep(60)


def swells():
    held = []
    for _ in range(400):
        held.append(bytearray(2**24))
        time.sleep(0.02)


def babbles():
    """Writes to every pipe that is open for writing, as a library with the wrong file descriptor would."""
    for number in range(3, 64):
        try:
            if os.readlink(f"/proc/self/fd/{number}").startswith("pipe:"):
                os.write(number, b"no answer\\n")
        except OSError:
            continue


def prints():
    print("printed by Python")
    print('{"id": 1, "result": {}}')
    sys.__stdout__.flush()
    os.write(1, b"printed by C\\n")
    os.system("echo printed by a child")


def breeds():
    subprocess.run([sys.executable, "-c", "import time; held = b'x' * (3 << 29); time.sleep(60)"])


def plain(): return Model(nothing)
def aborting(): return Model(aborts)
def killed(): return Model(is_killed)
def hanging(): return Model(hangs)
def swelling(): return Model(swells)
def breeding(): return Model(breeds)
def babbling(): return Model(babbles)
def printing(): return Model(prints)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user's module with the models lies."""
    made = tmp_path_factory.mktemp("models")
    (made / "misbehaving.py").write_text(MODULE, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def run(folder: Path) -> Iterator[Run]:
    """One pool for all misbehaving models, which may run 8 s and hold 1 GiB."""
    made = Run(Project(folder), Pool(Limits(run=8.0, memory=1.0)))
    yield made
    made.close()


def bench_of(run: Run, folder: Path, factory: str, format_id: str = "pytorch") -> Bench:
    """The case of one of the models."""
    spec = request(ModelSpec(factory, f"misbehaving:{factory}", search=(folder,), imgsz=(32, 32)), format_id)
    return Bench(run, Case(spec, formats.get(format_id).runtimes[0]))


# ---- workers that misbehave ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "ending"),
    [
        ("aborting", (Verdict.CRASH, "died during run", "SIGABRT")),
        ("killed", (Verdict.CRASH, "died during run", "SIGKILL")),
        ("hanging", (Verdict.TIMEOUT, "run took longer than 8 s")),
        ("swelling", (Verdict.CRASH, "more than its limit of 1 GiB")),
        ("breeding", (Verdict.CRASH, "more than its limit of 1 GiB")),
        ("babbling", (Verdict.CRASH, "answered run with 'no answer", "which is no answer")),
    ],
    ids=lambda x: x if isinstance(x, str) else x[0].value,
)
def test_a_worker_that_misbehaves_costs_its_case_and_no_other(
    run: Run, folder: Path, judge: Judge, factory: str, ending: Sequence[str]
) -> None:
    expected, *words = ending
    bad = bench_of(run, folder, factory)
    seen, because = judge(shapes.test_output_shapes_match_reference, bad)
    assert seen is expected, f"{seen}: {because}"
    assert all(word in because for word in words), because
    # The case is lost: its later claims say the same without another try.
    started = dict(run.pool.workers)
    assert judge(shapes.test_outputs_are_finite, bad) == (expected, because)
    assert run.pool.workers == started
    bad.close()
    good = bench_of(run, folder, "plain")
    claims = (
        export.test_artifact_loads_from_its_files_alone,
        shapes.test_output_shapes_match_reference,
        robustness.test_missing_input_is_refused,
    )
    for claim in claims:
        assert judge(claim, good) == (Verdict.PASS, "")
    good.close()


# What the worker does after it has read its call; then it lives on.
GARBAGE = {
    "no-utf-8": ('os.write(1, b"\\xff\\xfe garbage\\n")', WorkerCrash, "which is no answer"),
    "closed-pipe": ("os.close(1)", WorkerCrash, "closed its pipe during run, went on and was stopped"),
    "no-line": ('os.write(1, b"no end")', WorkerTimeout, "took longer than 2 s"),
    "other-id": ('os.write(1, b\'{"id": 0, "result": {}}\\n\' * 9999)', WorkerCrash, "which is no answer"),
    "no-result": ("os.write(1, b'{\"id\": 1}\\n')", WorkerCrash, "which is no answer"),
    "no-object": ('os.write(1, b\'{"id": 1, "result": 1}\\n\')', WorkerCrash, "which is no answer"),
    "odd-error": ('os.write(1, b\'{"id": 1, "error": {"type": []}}\\n\')', WorkerCrash, "which is no answer"),
    "null-error": ('os.write(1, b\'{"id": 1, "error": null}\\n\')', WorkerCrash, "which is no answer"),
    "deep": ('os.write(1, b"[" * 50000 + b"\\n")', WorkerCrash, "which is no answer"),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_worker_that_answers_with_garbage_and_lives_on_is_stopped(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    does, error, words = GARBAGE[kind]
    monkeypatch.setattr(client, "ENDING", 0.5)
    source = f"import os, sys, time\nsys.stdin.readline()\n{does}\ntime.sleep(20)\n"
    monkeypatch.setattr(client, "BOOTSTRAP", source)
    worker = Worker("odd", Path(sys.executable), (), tmp_path / "log", Limits(run=2.0))
    begin = time.monotonic()
    with pytest.raises(error, match=words):
        worker.call("run")
    assert time.monotonic() - begin < 10, "it was waited for"
    assert not worker.alive
    worker.close()


def test_what_a_model_prints_does_not_disturb_the_answers(run: Run, folder: Path, judge: Judge) -> None:
    bench = bench_of(run, folder, "printing")
    assert judge(shapes.test_output_shapes_match_reference, bench) == (Verdict.PASS, "")
    caller = bench.session().caller
    bench.close()
    assert isinstance(caller, Worker)
    log = caller.log.read_text(encoding="utf-8")
    for line in ("printed by Python", "printed by C", "printed by a child"):
        assert line in log


def test_no_worker_outlives_its_pool(folder: Path) -> None:
    with Pool() as pool:
        bench = bench_of(Run(Project(folder), pool), folder, "plain")
        bench.session()
        numbers = [w.process.pid for w in pool.workers.values() if isinstance(w, Worker)]
    assert numbers
    assert not [n for n in numbers if psutil.pid_exists(n)]


# ---- several at once -------------------------------------------------------------------------------------------------


def test_exports_made_ahead_are_found_and_failures_are_told(
    folder: Path, judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at a time; what could not be made fails its own case in its own words, without another try."""
    monkeypatch.setenv("EXPORTGATE_CACHE", str(tmp_path))
    with Pool() as pool:
        run = Run(Project(folder), pool)
        benches = [bench_of(run, folder, "plain", form) for form in ("pytorch", "torchscript", "onnx")]
        lost = bench_of(run, folder, "aborting", "torchscript")
        run.failed = export_ahead(pool, [b.case for b in (*benches, lost)], 2)
        assert list(run.failed) == [lost.case.id]
        made = list(pool.fresh)
        assert len(made) == 3
        for bench in benches:
            bench.artifact()
        assert pool.fresh == made, "one was made again"
        for bench in benches:
            assert judge(shapes.test_output_shapes_match_reference, bench) == (Verdict.PASS, "")
        verdict, because = judge(shapes.test_output_shapes_match_reference, lost)
        assert verdict is Verdict.CRASH and "SIGABRT" in because, because
        assert len(set(pool.fresh)) == len(pool.fresh), "one was made twice"


def test_what_several_are_made_from_is_made_first_and_once(folder: Path) -> None:
    model = ModelSpec("plain", "misbehaving:plain", search=(folder,), imgsz=(32, 32))
    fp32, fp16 = request(model, "onnx"), request(model, "onnx", half=True)
    engines = [request(model, "engine", half=True, device="0", builder_level=n) for n in (1, 2)]
    assert generations([*engines, fp32]) == [[fp32], [fp16], engines]


# ---- interrupted ---------------------------------------------------------------------------------------------------

SLOW = """
import os, time
from pathlib import Path
import torch

def make():
    marker = Path(os.environ["MARKER"])
    first = marker.with_suffix(".first")
    if not first.exists():  # for the digest of the weights, before the export
        first.touch()
    elif not marker.exists():
        marker.write_text(str(os.getpid()))
        time.sleep(120)
    return torch.nn.Conv2d(3, 4, 3)
"""


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_an_interrupted_export_leaves_nothing_and_can_be_repeated(by: signal.Signals, tmp_path: Path) -> None:
    """SIGTERM is how a CI server cancels. Nothing can tidy up after SIGKILL but the worker, which ends too."""
    (tmp_path / "slow.py").write_text(SLOW, encoding="utf-8")
    (tmp_path / "exportgate.toml").write_text('[models.slow]\nfactory = "slow:make"\nimgsz = 32\n', encoding="utf-8")
    cache, target, marker = tmp_path / "cache", tmp_path / "target", tmp_path / "marker"
    environment = {**os.environ, "EXPORTGATE_CACHE": str(cache), "MARKER": str(marker), "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "suites.cli",
        "export",
        "slow",
        "--format",
        "torchscript",
        "--project",
        str(tmp_path),
        "--output",
        str(target),
    ]
    # A test run in a shell's background inherits that Ctrl-C is ignored; the user's command does not.
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (no thread runs here)
    )
    deadline = time.monotonic() + 90
    while not (marker.exists() and marker.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert marker.exists(), process.communicate(timeout=30)
    # In the middle: the export is running, and has written a part of its file.
    unfinished = list((cache / "tmp").iterdir())
    assert len(unfinished) == 1
    (unfinished[0] / "slow.torchscript").write_bytes(b"half")
    process.send_signal(by)
    output, errors = process.communicate(timeout=30)
    if by is not signal.SIGKILL:
        assert process.returncode == pytest.ExitCode.INTERRUPTED, output + errors
        assert "Traceback" not in errors, errors
        assert "interrupted" in errors
        assert not list((cache / "tmp").iterdir())
    assert not list(cache.glob("artifacts/*"))
    assert not list(target.glob("*"))
    deadline = time.monotonic() + 30
    while psutil.pid_exists(int(marker.read_text())):
        assert time.monotonic() < deadline, "the worker goes on"
        time.sleep(0.1)
    again = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert [p.name for p in target.iterdir()] == ["slow.torchscript"]


# ---- opened once ---------------------------------------------------------------------------------------------------

COUNTER = '''
"""Notes every artifact that a pool opens."""
import json, os
from exporters.pool import Pool
opened = Pool.open

def open(pool, artifact, spec, runtime_id, device, replicate=0):
    with __import__("builtins").open(os.environ["OPENED"], "a") as file:
        file.write(json.dumps([str(artifact.root), spec.format, spec.precision.value, replicate]) + "\\n")
    return opened(pool, artifact, spec, runtime_id, device, replicate)

Pool.open = open
'''


def test_each_artifact_is_opened_once_a_case(tmp_path: Path) -> None:
    """All claims of two cases, as pytest orders them.

    An FP16 case opens its FP32 parent too; latency has processes of its own.
    """
    pytest.importorskip("onnx", reason="the toolchain onnx is not installed")
    (tmp_path / "counter.py").write_text(COUNTER, encoding="utf-8")
    (tmp_path / "misbehaving.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "exportgate.toml").write_text(
        '[models.plain]\nfactory = "misbehaving:plain"\nimgsz = 32\n', encoding="utf-8"
    )
    opened, report = tmp_path / "opened", tmp_path / "report"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "OPENED": str(opened)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "suites.plugin",
        "-p",
        "counter",
        "-p",
        "no:cacheprovider",
        "-m",
        "not latency",
        "--model",
        "plain",
        "--format",
        "onnx",
        "--precision",
        "fp32,fp16",
        "--project",
        str(tmp_path),
        "--report",
        str(report),
        str(ROOT / "suites"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    calls = Counter((f, p) for _, f, p, _ in map(json.loads, opened.read_text(encoding="utf-8").splitlines()))
    # The FP32 file is opened as a case, and once more as the parent of the FP16 case; the reference serves both.
    assert calls == {("pytorch", "fp32"): 1, ("onnx", "fp32"): 2, ("onnx", "fp16"): 1}
    lines = (report / "record.jsonl").read_text(encoding="utf-8").splitlines()
    judged = Counter(e["case"] for e in map(json.loads, lines) if e["event"] == "claim")
    assert len(judged) == 2 and min(judged.values()) > 15, judged


# ---- the cache -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Pool, ModelSpec]]:
    """A pool with an empty cache, and a model with weights and a module of its own."""
    from safetensors.numpy import save_file

    monkeypatch.setenv("EXPORTGATE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own.py").write_text(MODULE, encoding="utf-8")
    generator = np.random.default_rng(0)
    state = {
        "conv.weight": generator.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "conv.bias": np.zeros(4, np.float32),
    }
    save_file(state, tmp_path / "weights.safetensors")
    with Pool() as pool:
        yield (
            pool,
            ModelSpec("own", "own:plain", weights=tmp_path / "weights.safetensors", search=(tmp_path,), imgsz=(32, 32)),
        )


def made(pool: Pool, model: ModelSpec, **options: object) -> tuple[Artifact, bool]:
    """The artifact as its manifest in the cache tells, and whether it was made now."""
    before = len(pool.fresh)
    return read_manifest(pool.export(request(model, "torchscript", **options)).root), len(pool.fresh) > before


def test_what_changes_the_artifact_misses_the_cache_and_nothing_else_does(cached: tuple[Pool, ModelSpec]) -> None:
    pool, model = cached
    assert model.weights is not None
    first, fresh = made(pool, model)
    assert fresh
    started: dict[tuple[str, str, str], Caller] = dict(pool.workers)
    assert made(pool, model) == (first, False)
    assert pool.workers == started
    with Pool() as another:
        assert made(another, model) == (first, False)
        # What a user's factory makes is part of the key, so that it is called; nothing is exported.
        assert list(another.workers) == [("pytorch", "pytorch", "export")], "a hit exported"
    with Pool() as another:
        own = ModelSpec("ours", "exporters.models.yolov8:build", {"scale": "n", "nc": 2}, imgsz=(32, 32), stride=32)
        spec = request(own, "torchscript")
        kept = pool.export(spec)
        assert another.export(spec).key == kept.key
        assert not another.workers, "a hit started a worker"

    other, fresh = made(pool, model, batch=2)
    assert fresh and other.key != first.key, "an option"

    content = bytearray(model.weights.read_bytes())
    content[-1] ^= 1  # the sign of nothing: a byte of the last number
    model.weights.write_bytes(content)
    other, fresh = made(pool, model)
    assert fresh and other.key != first.key, "a byte of the weights"
    content[-1] ^= 1
    model.weights.write_bytes(content)
    assert made(pool, model) == (first, False), "the weights as they were"

    source = model.search[0] / "own.py"
    source.write_text(MODULE.replace("return self.conv(images)", "return self.conv(images) + 1"), encoding="utf-8")
    with Pool() as another:
        other, fresh = made(another, model)
        assert fresh and other.key != first.key, "the factory's source"
        assert other.files[0].sha256 != first.files[0].sha256
    source.write_text(MODULE, encoding="utf-8")
    assert made(pool, model) == (first, False), "the source as it was"


def test_what_the_factory_imports_from_beside_it_is_in_the_key(tmp_path: Path) -> None:
    """Its own modules, also those that others of them import, but not a file that none of them names."""
    (tmp_path / "own.py").write_text("import torch\nfrom layers import block\ndef make(): return block()\n")
    (tmp_path / "layers.py").write_text("import deep.inner\ndef block(): ...\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "__init__.py").write_text("")
    (tmp_path / "deep" / "inner.py").write_text("WIDTH = 1\n")
    (tmp_path / "other.py").write_text("WIDTH = 1\n")
    model = ModelSpec("own", "own:make", search=(tmp_path,))
    before = factory_digest(model)
    (tmp_path / "other.py").write_text("WIDTH = 2\n")
    assert factory_digest(model) == before
    for path in ("own.py", "layers.py", "deep/inner.py"):
        text = (tmp_path / path).read_text()
        (tmp_path / path).write_text(text + "X = 1\n")
        assert factory_digest(model) != before, path
        (tmp_path / path).write_text(text)
    assert factory_digest(model) == before


def test_code_is_loaded_from_our_cache_only(cached: tuple[Pool, ModelSpec], tmp_path: Path) -> None:
    pool, model = cached
    first, _ = made(pool, model)
    shutil.copytree(first.root, tmp_path / "copy")
    with pytest.raises(UnsafeFile, match=r"outside exportgate's cache.*--trust"):
        pool.open(read_manifest(tmp_path / "copy"), request(model, "torchscript"), "libtorch", "cpu")


def _byte_changed(artifact: Artifact) -> None:
    content = bytearray(artifact.path.read_bytes())
    content[len(content) // 2] ^= 1
    artifact.path.write_bytes(content)


def _file_gone(artifact: Artifact) -> None:
    artifact.path.unlink()


def _manifest_cut(artifact: Artifact) -> None:
    manifest = artifact.root / MANIFEST
    manifest.write_text(manifest.read_text(encoding="utf-8")[:100], encoding="utf-8")


def _manifest_gone(artifact: Artifact) -> None:
    (artifact.root / MANIFEST).unlink()


@pytest.mark.parametrize(
    "damage", [_byte_changed, _file_gone, _manifest_cut, _manifest_gone], ids=lambda d: d.__name__.strip("_")
)
def test_a_damaged_artifact_in_the_cache_is_made_again(
    cached: tuple[Pool, ModelSpec], damage: Callable[[Artifact], None]
) -> None:
    pool, model = cached
    first, _ = made(pool, model)
    damage(first)
    second, fresh = made(pool, model)
    assert fresh
    assert second.key == first.key
    second.verify()
    assert made(pool, model) == (second, False)


def test_a_module_that_changes_while_its_worker_is_warm_is_built_anew(cached: tuple[Pool, ModelSpec]) -> None:
    """The cache key tells the new source; what the worker builds must be of that source too."""
    pool, model = cached
    feeds = {"images": np.zeros((1, 3, 32, 32), np.float32)}
    results: list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = []
    for source in (MODULE, MODULE.replace("return self.conv(images)", "return self.conv(images) + 1")):
        (model.search[0] / "own.py").write_text(source, encoding="utf-8")
        artifact, fresh = made(pool, model)
        assert fresh
        session = pool.open(artifact, request(model, "torchscript"), "libtorch", "cpu")
        results.append(np.array(session.run(feeds)["output0"]))
        session.close()
    np.testing.assert_allclose(results[1], results[0] + 1)


def test_an_export_that_changes_the_weights_is_caught(cached: tuple[Pool, ModelSpec], judge: Judge) -> None:
    pool, model = cached
    weights = model.weights
    assert weights is not None

    def damage(artifact: Artifact, spec: object) -> None:
        with weights.open("ab") as file:
            file.write(b"\0")

    case = Case(request(model, "torchscript"), formats.get("torchscript").runtimes[0])
    assert judge(export.test_export_leaves_the_weights_unchanged, Bench(Run(Project(model.search[0]), pool), case)) == (
        Verdict.PASS,
        "",
    )
    seen, because = judge(
        export.test_export_leaves_the_weights_unchanged, Bench(Run(Project(model.search[0]), pool, damage), case)
    )
    assert seen is Verdict.FAIL
    assert "weights.safetensors changed while it was exported" in because


# ---- what the cache may not hide -----------------------------------------------------------------------------------


def test_what_a_factory_reads_is_in_the_key(tmp_path: Path) -> None:
    """An activation stands in no tensor, and a calibration set's numbers in no source."""
    (tmp_path / "reads.py").write_text(
        "import json\nimport pathlib\n\nimport numpy as np\nimport torch\n\n"
        'SETTINGS = pathlib.Path(__file__).with_name("settings.json")\n\n\n'
        "def make():\n    kind = json.loads(SETTINGS.read_text())['act']\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), getattr(torch.nn, kind)())\n\n\n"
        "def feeds(spec):\n    size = json.loads(SETTINGS.read_text())['size']\n"
        "    for _ in range(4):\n        yield {'images': np.full((1, 3, 8, 8), size, np.float32)}\n"
    )
    model = ModelSpec("reads", "reads:make", search=(tmp_path,), outputs=(OutputSpec("y"),), imgsz=(8, 8))
    keys: list[str] = []
    for act, size in (("ReLU", 1.0), ("ReLU", 1.0), ("SiLU", 1.0), ("SiLU", 100.0)):
        (tmp_path / "settings.json").write_text(json.dumps({"act": act, "size": size}))
        with Pool() as pool:
            keys.append(pool.export(request(model, "onnx", int8=True, data="reads:feeds")).key)
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_calibration_data_may_come_from_a_module_of_the_project(tmp_path: Path) -> None:
    """Of a checkpoint, too, which needs no module to be built."""
    name = "calibration_of_a_project"
    (tmp_path / f"{name}.py").write_text(
        "import numpy as np\n\n\n"
        "def feeds(spec):\n    for _ in range(8):\n"
        "        yield {'images': np.random.default_rng(0).random((1, 3, *spec.imgsz), np.float32)}\n"
    )
    model = from_table("mine", {"weights": str(ROOT / "suites/reference/classify.safetensors")}, tmp_path)
    with Pool() as pool:
        made = pool.export(request(model, "onnx", int8=True, imgsz=64, data=f"{name}:feeds"))
    assert made.path.is_file()


def test_weights_that_change_while_they_are_exported_are_not_kept(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is of the old file, the artifact of the new one: nothing of it may reach the cache."""
    monkeypatch.setenv("EXPORTGATE_CACHE", str(tmp_path / "cache"))
    weights = Path(shutil.copy(trained, tmp_path / "best.pt"))
    spec = request(from_checkpoint(weights), "pytorch")
    with Pool() as pool:
        own = pool._make

        def swapped(*given: object) -> Artifact:
            weights.write_bytes(trained.read_bytes())
            return own(*given)  # pyright: ignore[reportArgumentType]

        monkeypatch.setattr(pool, "_make", swapped)
        with pytest.raises(ExportError, match="changed while they were exported"):
            pool.export(spec)
    assert not list((tmp_path / "cache" / "artifacts").glob("*"))


def test_a_manifest_names_nothing_outside_its_folder(cached: tuple[Pool, ModelSpec]) -> None:
    pool, model = cached
    artifact = pool.export(request(model, "pytorch"))
    manifest = artifact.root / MANIFEST
    values = json.loads(manifest.read_text(encoding="utf-8"))
    for name in ("../secret", "/etc/hostname"):
        manifest.write_text(json.dumps({**values, "primary": name}), encoding="utf-8")
        with pytest.raises(ArtifactError, match="lies outside"):
            read_manifest(artifact.root)


def test_threads_take_turns_and_arrays_leave_no_files(cached: tuple[Pool, ModelSpec]) -> None:
    pool, model = cached
    spec = request(model, "pytorch")
    session = pool.open(pool.export(spec), spec, "eager", "cpu")
    feeds = [{"images": np.full((1, 3, 32, 32), n, np.float32)} for n in range(6)]
    alone = [np.array(next(iter(session.run(f).values()))) for f in feeds]
    with ThreadPoolExecutor(6) as threads:
        found = [next(iter(f.values())) for f in threads.map(session.run, feeds)]
    assert all(np.array_equal(a, b) for a, b in zip(alone, found, strict=True))
    assert not [p for p in session.folder.rglob("*") if p.is_file()]
    session.close()
