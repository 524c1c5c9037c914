"""TensorFlow.js: its files, the processes that run them and how those end, and a page that shows what it detects."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

from exporters import formats, toolchain
from exporters.artifact import foreign
from exporters.errors import ArtifactError, ExportgateError, NotSupported, ToolchainMissing, WorkerCrash, WorkerTimeout
from exporters.models.spec import InputSpec, ModelSpec, OutputSpec
from exporters.runtimes.tfjs import TfjsSession
from exporters.spec import ExportSpec, request
from exporters.tfjs import child, chromium, places, read
from exporters.tfjs.chromium import Chromium
from exporters.tfjs.node import Node
from suites.conformance import test_metadata as metadata
from suites.conformance import test_outputs as outputs
from suites.conformance import test_precision as precision
from suites.support.bench import Bench
from suites.support.cases import what_is_missing
from suites.support.suppression import suppressed
from suites.support.verdict import Verdict

if TYPE_CHECKING:
    from suites.selftest.conftest import Workshop

pytestmark = pytest.mark.formats
ROOT = Path(__file__).resolve().parents[2]
PICTURE = os.environ.get("EXPORTGATE_PICTURE", "")  # where the page's picture is kept

MODULES = """
import torch
from torch import nn


class Far(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.conv.weight.data[0, 0] = 1e5

    def forward(self, images):
        return self.conv(images)


class Counted(nn.Module):
    def forward(self, images, count):
        return images * count


def far():
    return Far()


def counted():
    return Counted()
"""
# Opens one session of each kind, says where, and dies as a worker does that is killed.
KILLED = """
import os, signal, sys
from pathlib import Path
from exporters.tfjs import read
from exporters.tfjs.chromium import Chromium
from exporters.tfjs.node import Node
modules, model = map(Path, sys.argv[1:])
page, node = Chromium(modules, model, read.read(model).names), Node(modules, model / read.MODEL)
print(page.place.folder, node.place.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def toolchain_is_here() -> None:
    missing = [m for r in formats.get("tfjs").runtimes if (m := what_is_missing(formats.get("tfjs"), "cpu", r))]
    if missing:
        pytest.skip(missing[0])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSpec]:
    folder = tmp_path_factory.mktemp("tfjs")
    (folder / "tfjs_models.py").write_text(MODULES, encoding="utf-8")
    count = InputSpec("count", ("batch", 1, 1, 1), "int64")
    common = {"search": (folder,), "outputs": (OutputSpec("output0"),), "imgsz": (32, 32)}
    return {
        "far": ModelSpec("far", "tfjs_models:far", **common),
        "counted": ModelSpec("counted", "tfjs_models:counted", inputs=(*ModelSpec.inputs, count), **common),
    }


@pytest.fixture
def copied(workshop: Workshop, tmp_path: Path) -> Path:
    """A copy of the classifier's folder, to be damaged."""
    return Path(shutil.copytree(workshop.good("classify tfjs fp32").path, tmp_path / "classify_web_model"))


@pytest.fixture(params=["node", "chromium"])
def runtime(request: pytest.FixtureRequest) -> str:
    return request.param


def opened(folder: Path, workshop: Workshop, runtime: str, task: str = "classify") -> TfjsSession:
    return TfjsSession(folder, workshop.case(f"{task} tfjs fp32").spec, runtime, named=True, modules=modules())


def modules() -> Path:
    """The npm packages of the toolchain's environment."""
    return toolchain.resolve("tensorflow").python.parents[1] / "node_modules"


def process(session: TfjsSession) -> psutil.Process:
    return psutil.Process(session.child.place.process.pid)


# ---- files ---------------------------------------------------------------------------------------------------------

Change = Callable[[Path, dict[str, Any]], None]


def _two_shards(folder: Path, model: dict[str, Any]) -> list[Path]:
    """The one shard cut into two of one size, as those of a larger model are."""
    group = model["weightsManifest"][0]
    whole = folder / group["paths"][0]
    data = whole.read_bytes()
    assert len(data) % 2 == 0
    whole.unlink()
    group["paths"] = [f"group1-shard{n}of2.bin" for n in (1, 2)]
    halves = [folder / name for name in group["paths"]]
    for half, part in zip(halves, (data[: len(data) // 2], data[len(data) // 2 :]), strict=True):
        half.write_bytes(part)
    return halves


def _weights(model: dict[str, Any]) -> list[dict[str, Any]]:
    return model["weightsManifest"][0]["weights"]


def _second_is_missing(folder: Path, model: dict[str, Any]) -> None:
    _two_shards(folder, model)[1].unlink()


def _second_is_cut(folder: Path, model: dict[str, Any]) -> None:
    half = _two_shards(folder, model)[1]
    half.write_bytes(half.read_bytes()[:-4])


def _named_in_another_order(folder: Path, model: dict[str, Any]) -> None:
    _two_shards(folder, model)
    model["weightsManifest"][0]["paths"].reverse()


def _named_twice(folder: Path, model: dict[str, Any]) -> None:
    model["weightsManifest"][0]["paths"] = ["a.bin", "a.bin"]


def _outside(folder: Path, model: dict[str, Any]) -> None:
    name = model["weightsManifest"][0]["paths"][0]
    shutil.copy(folder / name, folder.parent / name)
    model["weightsManifest"][0]["paths"] = [f"../{name}"]


def _layers(folder: Path, model: dict[str, Any]) -> None:
    model["format"] = "layers-model"


def _larger_weight(folder: Path, model: dict[str, Any]) -> None:
    _weights(model)[0]["shape"] = [7, *_weights(model)[0]["shape"]]


def _huge_weight(folder: Path, model: dict[str, Any]) -> None:
    _weights(model)[0]["shape"] = [1 << 39] * 6


def _endless_shape(folder: Path, model: dict[str, Any]) -> None:
    _weights(model)[0]["shape"] = [1 << 39] * 100_000


def _negative_size(folder: Path, model: dict[str, Any]) -> None:
    _weights(model)[0]["shape"] = [-1]


def _text_weight(folder: Path, model: dict[str, Any]) -> None:
    _weights(model)[0]["dtype"] = "string"


def _no_scale(folder: Path, model: dict[str, Any]) -> None:
    _weights(model)[0]["quantization"] = {"dtype": "uint8", "min": 0.0}


def _endless_scale(folder: Path, model: dict[str, Any]) -> None:
    _weights(model)[0]["quantization"] = {"dtype": "uint8", "min": 0.0, "scale": float("inf")}


def _without_a_weight(folder: Path, model: dict[str, Any]) -> None:
    shard = folder / model["weightsManifest"][0]["paths"][0]
    size = 4 * int(np.prod(_weights(model).pop()["shape"]))
    shard.write_bytes(shard.read_bytes()[:-size])


def _reads_what_is_not_there(folder: Path, model: dict[str, Any]) -> None:
    node = next(n for n in model["modelTopology"]["node"] if n.get("input"))
    node["input"][0] = "steam"


def _no_graph(folder: Path, model: dict[str, Any]) -> None:
    del model["modelTopology"]


def _wide_input(folder: Path, model: dict[str, Any]) -> None:
    model["signature"]["inputs"]["images"]["dtype"] = "DT_INT64"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_second_is_missing, "group1-shard2of2.bin' is missing"),
        (_second_is_cut, "weight group 1 holds .* bytes, and the weights in model.json take"),
        (_named_in_another_order, "shard 'group1-shard2of2.bin' is number 1 of 2 in weightsManifest"),
        (_named_twice, "shard 'a.bin' is named twice"),
        (_outside, r"shard '\.\./group1-shard1of1.bin' is no file of the folder of model.json"),
        (_layers, "has format 'layers-model', expected 'graph-model'"),
        (_larger_weight, "bytes, and the weights in model.json take"),
        (_huge_weight, "bytes, and the weights in model.json take"),
        (_endless_shape, "has shape"),
        (_negative_size, r"has shape \[-1\]"),
        (_text_weight, "has type 'string', expected float32, int32 or bool"),
        (_no_scale, "scale of weight .* is None, expected a number"),
        (_endless_scale, "scale of weight .* is inf, expected a number"),
        (_without_a_weight, "constant .* has no weight in weightsManifest|node .* reads"),
        (_reads_what_is_not_there, "reads 'steam', which is no node"),
        (_no_graph, "modelTopology is None, expected a mapping"),
        (_wide_input, "input 'images' is of type int64; TensorFlow.js takes float32, int32, bool"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_before_anything_runs_it(
    workshop: Workshop, copied: Path, monkeypatch: pytest.MonkeyPatch, change: Change, words: str
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("exporters.runtimes.tfjs.Node", never)
    model = json.loads((copied / read.MODEL).read_text(encoding="utf-8"))
    change(copied, model)
    (copied / read.MODEL).write_text(json.dumps(model), encoding="utf-8")
    with pytest.raises(ArtifactError, match=words) as caught:
        opened(copied, workshop, "node")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def _rewritten(change: Change) -> Callable[[Path, Workshop], None]:
    def damage(path: Path, workshop: Workshop) -> None:
        model = json.loads((path / read.MODEL).read_text(encoding="utf-8"))
        change(path, model)
        (path / read.MODEL).write_text(json.dumps(model), encoding="utf-8")

    return damage


def _swapped(folder: Path, model: dict[str, Any]) -> None:
    """Shards of one size, each with the other's bytes: what their names and sizes do not tell."""
    one, two = _two_shards(folder, model)
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)


def _unknown_operator(folder: Path, model: dict[str, Any]) -> None:
    next(n for n in model["modelTopology"]["node"] if n["op"] == "Sigmoid")["op"] = "Steam"


def _other_attributes(folder: Path, model: dict[str, Any]) -> None:
    """A mean over an axis that there is not, which JavaScript notices when it runs."""
    node = next(n for n in model["modelTopology"]["node"] if n["op"] == "Mean")
    place = next(w for w in _weights(model) if w["name"] == node["input"][1])
    start = read.read(folder).weights[place["name"]].start
    shard = folder / model["weightsManifest"][0]["paths"][0]
    data = bytearray(shard.read_bytes())
    data[start : start + 4] = (9).to_bytes(4, "little")
    shard.write_bytes(data)


def test_what_javascript_notices_is_told_in_one_line(workshop: Workshop, runtime: str) -> None:
    cell, claim = f"classify tfjs fp32 {runtime}", outputs.test_outputs_match_reference
    assert workshop.judge(cell, claim) == (Verdict.PASS, "")
    verdict, because = workshop.judge(cell, claim, _rewritten(_swapped))  # other values, or places out of bounds
    assert verdict in (Verdict.FAIL, Verdict.ERROR) and because and "\n" not in because, because
    for change, words in (
        (_unknown_operator, "Steam"),
        (_other_attributes, "cannot be run by TensorFlow.js (All values in axis param must be in range"),
    ):
        verdict, because = workshop.judge(cell, claim, _rewritten(change))
        assert verdict is Verdict.ERROR and words in because and "\n" not in because, because


def test_metadata_is_in_both_places_and_the_same(workshop: Workshop) -> None:
    cell, claim = "classify tfjs fp32", metadata.test_class_names_survive_the_round_trip
    model = json.loads((workshop.good(cell).path / read.MODEL).read_text(encoding="utf-8"))
    assert model["userDefinedMetadata"]["layout"] == "NHWC"
    assert model["userDefinedMetadata"]["names"]["0"] == workshop.case(cell).spec.model.names[0]

    def renamed(folder: Path, model: dict[str, Any]) -> None:
        model["userDefinedMetadata"]["names"]["0"] = "steam"

    assert workshop.judge(cell, claim) == (Verdict.PASS, "")
    verdict, because = workshop.judge(cell, claim, _rewritten(renamed))
    assert verdict is Verdict.FAIL and "names in userDefinedMetadata of model.json is not that of" in because, because


def test_outputs_of_one_shape_keep_their_names(workshop: Workshop) -> None:
    """The converter loses the names of such."""

    def exchanged(folder: Path, model: dict[str, Any]) -> None:
        told = model["signature"]["outputs"]
        told["left"], told["right"] = told["right"], told["left"]

    cell, claim = "twins tfjs fp32", outputs.test_outputs_match_reference
    assert list(read.read(workshop.good(cell).path).outputs) and workshop.judge(cell, claim) == (Verdict.PASS, "")
    assert workshop.judge(cell, claim, _rewritten(exchanged))[0] is Verdict.FAIL


def test_a_file_of_another_converter_is_read(workshop: Workshop, copied: Path) -> None:
    """Without userDefinedMetadata and names of inputs, its output called by its operator, as of a frozen graph."""
    case = workshop.case("classify tfjs fp32")
    model = json.loads((copied / read.MODEL).read_text(encoding="utf-8"))
    del model["userDefinedMetadata"]
    outputs_of = model["signature"]["outputs"]
    model["signature"] = {"outputs": {t["name"]: t for t in outputs_of.values()}}
    (copied / read.MODEL).write_text(json.dumps(model), encoding="utf-8")
    brought = foreign(copied, "tfjs", case.spec.to_dict(), trust=False, is_code=False)
    with closing(Bench(workshop.run, case, brought)) as bench:
        outputs.test_outputs_match_reference(bench)
        metadata.test_class_names_survive_the_round_trip(bench)


# ---- precision -----------------------------------------------------------------------------------------------------


def test_what_is_stored_in_fewer_bits(workshop: Workshop) -> None:
    """Kernels, and biases in 16 bits; anchors, strides and whole numbers never."""
    whole, halves, bytes_ = (read.read(workshop.good(f"detect tfjs {p}").path) for p in ("fp32", "fp16", "int8"))
    values = whole.values()
    assert {w.stored for w in whole.weights.values()} == {"float32", "int32"}
    kernels = set(bytes_.kernels().values())
    assert len(kernels) > 60
    assert {n for n, w in bytes_.weights.items() if w.stored == "uint8"} == kernels
    for name, array in bytes_.values().items():
        if name in kernels:
            stored = bytes_.weights[name]
            close = np.abs(array * stored.scale + stored.least - values[name])
            assert close.max() <= 0.5001 * stored.scale, name
    rounded = {n for n, w in halves.weights.items() if w.stored == "float16"}
    assert kernels < rounded
    for name, array in halves.values().items():
        assert np.array_equal(array, values[name].astype(np.float16) if name in rounded else values[name]), name
    anchors = [n for n, v in values.items() if v.dtype == np.float32 and v.size >= 1344 and n not in kernels]
    assert anchors and not rounded & set(anchors)


def test_a_weight_in_another_precision_is_noticed(workshop: Workshop) -> None:
    """One convolution of the FP16 file left in FP32."""
    cell, claim = "classify tfjs fp16", precision.test_achieved_precision_is_the_requested

    def widened(folder: Path, model: dict[str, Any]) -> None:
        found = read.read(folder)
        chosen = next(iter(found.kernels().values()))
        shard = folder / model["weightsManifest"][0]["paths"][0]
        data = [v.astype(np.float32) if n == chosen else v for n, v in found.values().items()]
        shard.write_bytes(b"".join(v.tobytes() for v in data))
        del next(w for w in _weights(model) if w["name"] == chosen)["quantization"]

    assert workshop.judge(cell, claim) == (Verdict.PASS, "")
    verdict, because = workshop.judge(cell, claim, _rewritten(widened))
    assert verdict is Verdict.FAIL and "1 operators are not" in because, because
    assert workshop.judge(cell, outputs.test_outputs_match_reference, _rewritten(widened))[0] is Verdict.PASS


def test_what_the_format_cannot_hold_is_refused(workshop: Workshop, models: dict[str, ModelSpec]) -> None:
    pool = workshop.run.pool
    with pytest.raises(NotSupported, match=r"FP16 ends at 65504, and weight '.*' has 100000"):
        pool.export(request(models["far"], "tfjs", half=True))
    with pytest.raises(
        NotSupported, match=r"TensorFlow\.js has no tensors of int64, and input 'count' of model 'counted'"
    ):
        pool.export(request(models["counted"], "tfjs"))


# ---- processes -----------------------------------------------------------------------------------------------------


def feeds(session: TfjsSession) -> dict[str, np.ndarray]:
    return {i.name: np.zeros([int(n) for n in i.shape], i.dtype) for i in session.inputs}


def test_a_process_that_is_killed_is_told_and_leaves_nothing(workshop: Workshop, copied: Path, runtime: str) -> None:
    session = opened(copied, workshop, runtime)
    folder = session.child.place.folder
    session.run(feeds(session))
    process(session).send_signal(signal.SIGKILL)
    title = session.child.title
    for _ in range(2):  # and is told again
        with pytest.raises(WorkerCrash, match=rf"{title} died during run: (signal SIGKILL|its page is gone)") as caught:
            session.run(feeds(session))
        assert "\n" not in str(caught.value)
    assert not folder.exists()
    session.close()


def test_a_page_that_crashes_is_told_at_once(workshop: Workshop, copied: Path) -> None:
    """Its renderer is killed, as the system does when memory is short; the browser itself goes on."""
    session = opened(copied, workshop, "chromium")
    renderers = [p for p in process(session).children(recursive=True) if "--type=renderer" in p.cmdline()]
    assert renderers
    for renderer in renderers:
        renderer.kill()
    begun = time.monotonic()
    with pytest.raises(WorkerCrash, match="Chromium died during run: its page is gone"):
        session.run(feeds(session))
    assert time.monotonic() - begun < 10
    assert not session.child.place.folder.exists()


def _copied_scripts(tmp_path: Path) -> Path:
    return Path(shutil.copytree(places.JS, tmp_path / "js"))


def test_a_page_that_does_not_load_is_told(
    workshop: Workshop, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = _copied_scripts(tmp_path)
    monkeypatch.setattr(chromium, "JS", scripts)
    monkeypatch.setattr(child, "STARTING", 5.0)
    (scripts / "page.js").unlink()
    with pytest.raises(WorkerTimeout, match=r"Chromium did not start within 5 s.*, and was stopped") as caught:
        opened(copied, workshop, "chromium")
    assert "\n" not in str(caught.value)
    shutil.copy(places.JS / "page.js", scripts)
    libraries = Path(shutil.copytree(modules() / "@tensorflow", tmp_path / "m" / "@tensorflow")).parent
    (libraries / "@tensorflow/tfjs-core/dist/tf-core.min.js").unlink()
    with pytest.raises(WorkerCrash, match=r"TensorFlow.js does not start in Chromium \(.*\)"):
        Chromium(libraries, copied, read.read(copied).names)


def test_node_without_its_packages_is_told(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(
        WorkerCrash, match=r"Node.js died during start: exit code 1 \(Error: Cannot find module"
    ) as caught:
        Node(tmp_path, copied / read.MODEL)
    assert "\n" not in str(caught.value)


def test_nothing_is_left_of_a_worker_that_is_killed(copied: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", KILLED, str(modules()), str(copied)]
    variables = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder, node = done.stdout.split()
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and list(_left(folder, int(node))):
        time.sleep(0.2)
    assert not list(_left(folder, int(node)))


def _left(folder: str, node: int) -> Iterator[str]:
    """Processes of a profile, and Node.js, that run."""
    for one in psutil.process_iter():
        with suppress(psutil.Error):
            if one.status() != psutil.STATUS_ZOMBIE and (one.pid == node or folder in " ".join(one.cmdline())):
                yield f"{one.pid} {one.name()}"


def test_closing_ends_processes_and_removes_the_profile(workshop: Workshop, copied: Path, runtime: str) -> None:
    session = opened(copied, workshop, runtime)
    place = session.child.place
    all_ = [process(session), *process(session).children(recursive=True)]
    assert place.folder.exists()
    session.close()
    assert not place.runs and not place.folder.exists()
    _, alive = psutil.wait_procs([p for p in all_ if p.is_running()], timeout=10)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    with pytest.raises(WorkerCrash, match="is closed"):
        session.run(feeds(session))


def test_the_page_is_for_those_who_know_its_address(workshop: Workshop, copied: Path) -> None:
    def got(address: str) -> tuple[int, bytes]:
        connection = HTTPConnection(base.removeprefix("http://"), timeout=5)
        with closing(connection):
            connection.request("GET", address)
            answer = connection.getresponse()
            return answer.status, answer.read()

    with closing(opened(copied, workshop, "chromium")) as session:
        words = process(session).cmdline()
        address = next(w for w in words if w.startswith("http://127.0.0.1:"))
        base, secret, page = address.rsplit("/", 2)
        code, text = got(f"/{secret}/{page}")
        assert code == 200 and b"TensorFlow.js" in text
        shard = next(copied.glob("*.bin"))
        assert got(f"/{secret}/model/{shard.name}") == (200, shard.read_bytes())
        for other in (
            "/index.html",
            f"/{secret[:-1]}/index.html",
            f"/{secret}/model/metadata.yaml",
            f"/{secret}/model/..%2f..%2fetc/passwd",
            f"/{secret}/",
        ):
            assert got(other)[0] == 404, other


def test_what_is_not_here_is_skipped(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    claim = outputs.test_outputs_match_reference
    monkeypatch.setattr(places, "BROWSERS", ("no-such-browser",))
    verdict, because = workshop.judge("classify tfjs fp32 chromium", claim)
    assert verdict is Verdict.SKIPPED and "there is no Chromium on the PATH" in because, because
    assert workshop.judge("classify tfjs fp32 node", claim) == (Verdict.PASS, "")
    monkeypatch.setenv("PATH", str(tmp_path))
    verdict, because = workshop.judge("classify tfjs fp32 node", claim)
    assert verdict is Verdict.SKIPPED and "Node.js is not on the PATH; apt-get install nodejs npm" in because, because
    monkeypatch.setattr(places, "cache_root", lambda: tmp_path)
    with pytest.raises(ToolchainMissing, match="npm package @tensorflow/tfjs-core is not installed; run 'exportgate"):
        places.node_modules()


def test_npm_is_asked_for_what_the_lock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, told = toolchain.LOCKS / "tfjs", list[str]()
    locked = json.loads((lock / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    asked = json.loads((lock / "package.json").read_text(encoding="utf-8"))["dependencies"]
    assert locked[""]["dependencies"] == asked
    assert set(asked) == {f"@tensorflow/{name}" for name in places.PACKAGES}
    for name, version in asked.items():
        assert locked[f"node_modules/{name}"]["version"] == version
    assert all("integrity" in entry for name, entry in locked.items() if name)
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code ENETUNREACH' >&2\nexit 1\n", encoding="utf-8")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(ExportgateError, match="npm failed: npm error code ENETUNREACH; what it installs is in"):
        toolchain._install_packages(lock, tmp_path, told.append)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    toolchain._install_packages(lock, tmp_path, told.append)
    assert told == ["npm is not on the PATH, so what runs tfjs is left out: apt-get install nodejs npm, and sync again"]


# ---- the page ------------------------------------------------------------------------------------------------------


def test_the_page_shows_what_pytorch_detects(workshop: Workshop) -> None:
    """One scene through the page in Chromium: boxes, classes and scores after suppression in JavaScript, and a picture.

    EXPORTGATE_PICTURE names a file that the picture is kept in.
    """
    from PIL import Image

    case = workshop.case("detect tfjs fp32 chromium")
    good, model = workshop.good("detect tfjs fp32"), case.spec.model
    suppressing: ExportSpec = replace(case.spec, nms=True)  # with the options' defaults: conf 0.25, iou 0.7
    with closing(Bench(workshop.run, case)) as bench:
        scene = bench.feeds()[0]
        wanted = _rows(suppressed(bench.raw(scene), model, suppressing)["output0"][0], len(model.names))
    with closing(opened(good.path, workshop, "chromium", "detect")) as session:
        names, title = [model.names[n] for n in sorted(model.names)], f"{good.primary} in Chromium"
        found, picture = session.show(scene.arrays["images"], names, suppressing.conf, suppressing.iou, title)
    assert len(wanted) > 3
    assert found.shape == wanted.shape
    np.testing.assert_array_equal(found[:, 5], wanted[:, 5])
    np.testing.assert_allclose(found[:, :4], wanted[:, :4], atol=0.05)  # pixels
    np.testing.assert_allclose(found[:, 4], wanted[:, 4], atol=1e-3)
    path = Path(PICTURE) if PICTURE else workshop.folder.with_name(f"{workshop.folder.name}.png")
    path.write_bytes(picture)
    with Image.open(path) as image:
        colours = image.convert("RGB").getcolors(1 << 20)
        assert image.size == (768, 768) and colours is not None and len(colours) > 100
    if not PICTURE:
        path.unlink()


def _rows(anchors: np.ndarray, classes: int) -> np.ndarray:
    """Corners, score and class of what is no row of zeros, best first."""
    kept = anchors[:, anchors[4 : 4 + classes].max(0) > 0].astype(np.float64)
    x, y, w, h = kept[:4]
    scores = kept[4 : 4 + classes]
    rows = np.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2, scores.max(0), scores.argmax(0)), 1)
    return rows[np.argsort(-rows[:, 4], kind="stable")]
