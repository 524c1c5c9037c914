"""What the suite's own tests share: the trained checkpoint, small models, and a workshop that breaks artifacts."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from exporters import formats
from exporters.artifact import Artifact, commit, list_files
from exporters.models.catalog import TASKS, detect_outputs, from_checkpoint, from_table
from exporters.models.spec import ModelSpec, OutputSpec
from exporters.pool import Pool
from exporters.spec import QUANTIZATIONS, ExportSpec, request
from exporters.toolchain import cache_root
from suites.support.bench import Bench, Run
from suites.support.cases import Case
from suites.support.config import Project, find_project
from suites.support.verdict import Verdict, one_line, verdict_of

Claim = Callable[[Bench], None]
Judge = Callable[[Claim, Bench], tuple[Verdict, str]]

# Written to a temporary folder and imported by workers only, as a user's own module would be.
SMALL = r'''
import pathlib

import numpy as np
import PIL.Image
import torch
from torch import nn


class Blobs(nn.Module):
    """A detector by hand: one anchor a cell of 8x8 pixels, whose colour decides class, score, place and size."""

    def __init__(self):
        super().__init__()
        self.stem, self.box, self.score = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 3, 1)
        colours = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, -1, 0], [0, 1, -1], [-1, 0, 1], [.5, .5, 0], [0, .5, .5]]
        self.stem.weight.data[:] = torch.tensor(colours).view(8, 3, 1, 1)
        self.stem.bias.data.zero_()
        self.box.weight.data.zero_()
        for channel, (source, pixels) in enumerate(((3, 12), (4, 12), (6, 24), (7, 24))):
            self.box.weight.data[channel, source] = pixels
        self.box.bias.data[:] = torch.tensor([0, 0, 8, 8])
        self.score.weight.data.zero_()
        for number in range(3):
            self.score.weight.data[number, 3 + number] = 30.0
        self.score.bias.data[:] = -12.0

    def forward(self, images):
        x = self.stem(nn.functional.avg_pool2d(images, 8)).relu()
        h, w = x.shape[2:]
        across = (torch.arange(w, dtype=torch.float32) + 0.5).view(1, 1, 1, -1).expand(1, 1, h, w) * 8
        down = (torch.arange(h, dtype=torch.float32) + 0.5).view(1, 1, -1, 1).expand(1, 1, h, w) * 8
        box = self.box(x)
        boxes = torch.cat((box[:, :1] + across, box[:, 1:2] + down, box[:, 2:]), 1)
        return torch.cat((boxes, self.score(x).sigmoid()), 1).flatten(2)


class Spiky(Blobs):
    """The same behind a convolution with a channel of 300 that nobody needs: 8 bits of that tensor say nothing."""

    def __init__(self):
        super().__init__()
        self.wide, stem = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1)
        self.wide.weight.data[:] = torch.cat((torch.eye(3), torch.zeros(1, 3))).view(4, 3, 1, 1)
        self.wide.bias.data[:] = torch.tensor([0.0, 0.0, 0.0, 300.0])
        stem.weight.data[:] = torch.cat((self.stem.weight, torch.zeros(8, 1, 1, 1)), 1)
        stem.bias.data.zero_()
        self.stem = stem

    def forward(self, images):
        return super().forward(self.wide(images))


class Twins(nn.Module):
    """Two outputs of one shape."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images):
        return self.left(images), self.right(images)


class Mixed(nn.Module):
    """Convolutions, a transposed one, and products of two computed tensors."""

    def __init__(self):
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 2, 2)
        self.query, self.key, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, images):
        x = self.up(self.stem(images).relu())
        share = (self.query(x).flatten(2) @ self.key(x).flatten(2).transpose(1, 2)).softmax(2)
        return self.last((share @ x.flatten(2)).view_as(x))


def mixed():
    return Mixed()


def blobs():
    return Blobs()


def spiky():
    return Spiky()


def twins():
    return Twins()


def scenes(spec):
    """Images of coloured cells on black."""
    generator = np.random.default_rng(0)
    for _ in range(4):
        yield {"images": np.stack([picture(generator, *spec.imgsz)[0] for _ in range(spec.batch)])}


def many(spec):
    """60 of them, one by one."""
    generator = np.random.default_rng(2)
    for _ in range(60):
        yield {"images": picture(generator, *spec.imgsz)[0][None]}


def noise(spec):
    """60 images of noise: averaged over a cell it is grey."""
    for seed in range(60):
        yield {"images": np.random.default_rng(seed).random((1, 3, *spec.imgsz), np.float32)}


def reddish(spec):
    """As `many`, with red made stronger, so that colours can be told apart."""
    for feeds in many(spec):
        yield {"images": np.clip(feeds["images"] * np.array([1.0, 0.8, 0.6], np.float32).reshape(3, 1, 1), 0, 1)}


def swapped(spec):
    """The same as BGR."""
    for feeds in reddish(spec):
        yield {"images": np.ascontiguousarray(feeds["images"][:, ::-1])}


def one(spec):
    yield next(iter(many(spec)))


def unscaled(spec):
    """As `many`, but for the division by 255."""
    for feeds in many(spec):
        yield {"images": feeds["images"] * 255}


def picture(generator, height, width):
    """Coloured cells on black (3, H, W), and of each its class, row and column."""
    image, cells = np.zeros((3, height, width), np.float32), []
    for y in range(8, height - 8, 16):
        for x in range(8, width - 8, 16):
            strong, weak = generator.permutation(3)[:2]
            image[strong, y : y + 8, x : x + 8] = generator.uniform(0.3, 0.8)
            image[weak, y : y + 8, x : x + 8] = generator.uniform(0.0, 0.2)
            cells.append((strong, y // 8, x // 8))
    return image, cells


def labelled(model):
    """40 such images with the boxes that the model gives their cells: a data set in the YOLO layout."""
    root, generator = pathlib.Path(__file__).with_name("labelled"), np.random.default_rng(1)
    for number in range(0 if root.exists() else 40):
        image, cells = picture(generator, *model.imgsz)
        stored = (image * 255).round().astype(np.uint8)
        boxes = Blobs()(torch.from_numpy(stored[None] / np.float32(255)))[0, :4].detach().numpy()
        rows = [(k, *boxes[:, y * (model.imgsz[1] // 8) + x] / model.imgsz[0]) for k, y, x in cells]
        for kind, suffix in (("images", "png"), ("labels", "txt")):
            path = root / kind / "val" / f"{number}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "images":
                PIL.Image.fromarray(stored.transpose(1, 2, 0)).save(path)
            else:
                path.write_text("".join(" ".join(f"{v:.6g}" for v in row) + "\n" for row in rows))
    (root / "data.yaml").write_text("path: .\nval: images/val\nnames: [red, green, blue]\n")
    return root / "data.yaml"
'''


settings.register_profile("long", max_examples=600)


def is_long() -> bool:
    """Whether hypothesis has the profile "long", which `tox -e sabotage` asks for."""
    return (settings.default or settings()).max_examples > 100


ROOT = Path(__file__).resolve().parents[2]


def command_line(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`exportgate` in a folder, as a user types it; further variables of its environment."""
    return subprocess.run(
        [sys.executable, "-m", "suites.cli", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def trained_checkpoint() -> Path | None:
    """The real trained checkpoint; it is installed by tox and never part of the repository."""
    found = importlib.util.find_spec("railway_obstacle_detector")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations))) / "best.pt"


@pytest.fixture(scope="session")
def trained() -> Path:
    """See trained_checkpoint."""
    found = trained_checkpoint()
    if found is None:
        pytest.skip("the package smartrail-obstacle-detector, which holds the trained checkpoint, is not installed")
    return found


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSpec]:
    """See small_ones."""
    return small_ones(tmp_path_factory.mktemp("small"))


def small_ones(folder: Path) -> dict[str, ModelSpec]:
    """Small models: `blobs` (a detector that stands INT8), `blind` (the same without pictures to judge accuracy on),
    `spiky` (a detector that does not stand it), `twins`, `mixed`."""
    (folder / "small_models.py").write_text(SMALL, encoding="utf-8")
    blobs = ModelSpec(
        "blobs",
        "small_models:blobs",
        search=(folder,),
        task="detect",
        outputs=detect_outputs(3),
        stride=8,
        imgsz=(160, 160),
        names={0: "red", 1: "green", 2: "blue"},
        feeds="small_models:scenes",
        evaluate="small_models:labelled",
    )
    twins = ModelSpec(
        "twins",
        "small_models:twins",
        search=(folder,),
        outputs=(OutputSpec("left"), OutputSpec("right")),
        imgsz=(32, 32),
    )
    mixed = ModelSpec(
        "mixed",
        "small_models:mixed",
        search=(folder,),
        outputs=(OutputSpec("output0"),),
        imgsz=(32, 32),
        feeds="small_models:scenes",
    )
    spiky = replace(blobs, name="spiky", factory="small_models:spiky")
    blind = replace(blobs, name="blind", evaluate="")
    return {"blobs": blobs, "blind": blind, "spiky": spiky, "twins": twins, "mixed": mixed}


def judged(claim: Claim, bench: Bench) -> tuple[Verdict, str]:
    """The verdict that a claim ends with, and its line."""
    error: BaseException | None = None
    try:
        claim(bench)
    except (Exception, pytest.fail.Exception) as caught:  # noqa: BLE001 as the plugin does: every exception is a verdict
        error = caught
    return verdict_of(error), one_line(error) if error is not None else ""


@pytest.fixture(scope="session")
def judge() -> Judge:
    """How a claim about a bench ends: its verdict, and its line."""
    return judged


class Workshop:
    """Good artifacts, copies of them that are broken as an exporter would break them, and how claims judge either.

    Everything but the damage is real: workers export, open and run; the damage changes files on disk.
    """

    def __init__(self, trained: Path, small: dict[str, ModelSpec], folder: Path) -> None:
        own = find_project(None, folder, own=True)
        references = {task: from_table(task, own.models[task], own.folder) for task in TASKS}
        unlabelled = replace(references["detect"], name="unlabelled", evaluate="")
        self.models = {"obstacles": from_checkpoint(trained), **small, **references, "unlabelled": unlabelled}
        # Broken artifacts lie in the cache, since code is loaded from there only.
        self.folder = cache_root() / "artifacts" / f"selftest-{uuid.uuid4().hex}"
        self.damage: Callable[[Path, Workshop], None] | None = None
        self.rewrites_manifest = True
        self.run = Run(Project(folder), Pool(), self._damaged)

    def case(self, name: str) -> Case:
        """A case from words: "onnx fp16 dynamic" of the trained checkpoint, "twins onnx fp32" of a small model, "pose
        onnx fp16" of a reference ("unlabelled": the detector without pictures to judge accuracy on). Of several
        runtimes it is in the one that a word names ("detect coreml fp16 evaluator"), else in the first."""
        words = name.split()
        model = self.models[words.pop(0) if words[0] in self.models else "obstacles"]
        options: dict[str, Any] = {"imgsz": 320} if model.name == self.models["obstacles"].name else {}
        options |= {"dynamic": True} if "dynamic" in words else {}
        options |= {"batch": 2} if "pair" in words else {}
        options |= {name: True for name in ("nms", "palettize", "keras") if name in words}
        options |= {"keep": "box"} if "kept" in words and "int8" in words else {}  # a module of blobs
        options |= (
            {"quantization": next((q for q in QUANTIZATIONS if q in words), "dynamic")} if "int8" in words else {}
        )
        calibrated = bool({"int8", "fp8"} & {*words}) and "data" in formats.get(words[0]).options
        calibrated &= words[0] != "tflite" or options.get("quantization") != "dynamic"  # no pictures
        options |= {"data": model.feeds} if calibrated else {}
        if calibrated and model.feeds == "suites.reference.scenes:feeds":
            options |= {"data": "suites.reference.scenes:training", "calibrator": "percentile"}
        options = {k: v for k, v in options.items() if k in formats.get(words[0]).options | {"imgsz"}}
        options |= {"device": "cuda:0"} if "cuda" in words else {}
        here = "8.9,12.0" if "fp8" in words else "8.6,8.9,12.0"
        options |= {"compute_capability": here} if words[0] == "engine" and "cuda" not in words else {}
        spec = request(model, words[0], precision=words[1], **options)
        kind = spec.device.partition(":")[0]
        runtimes = [r for r in formats.get(spec.format).runtimes if r.device == kind]
        runtime = next((r for r in runtimes if r.id in words[2:]), runtimes[0])
        return Case(spec, runtime, budget=0.99 if "budget" in words else 0.0)

    def bench(self, name: str) -> Bench:
        """A bench of a case's undamaged artifact."""
        return Bench(self.run, self.case(name))

    def good(self, name: str) -> Artifact:
        """The undamaged artifact of a case."""
        return self.run.pool.export(self.case(name).spec)

    def judge(
        self,
        name: str,
        claim: Claim,
        damage: Callable[[Path, Workshop], None] | None = None,
        rewrites_manifest: bool = True,
    ) -> tuple[Verdict, str]:
        """What a claim says of a case's artifact, damaged or good."""
        self.damage, self.rewrites_manifest = damage, rewrites_manifest
        bench = Bench(self.run, self.case(name))
        try:
            return judged(claim, bench)
        finally:
            bench.close()
            self.damage = None
            shutil.rmtree(self.folder, ignore_errors=True)

    def _damaged(self, artifact: Artifact, spec: ExportSpec) -> Artifact | None:
        """What a broken exporter would have made instead of the artifact: its manifest describes its own files."""
        if self.damage is None:
            return None
        root = self.folder / uuid.uuid4().hex
        shutil.copytree(artifact.root, root)
        self.damage(root / artifact.primary, self)
        if not self.rewrites_manifest:
            return replace(artifact, root=root)
        return commit(replace(artifact, root=root, files=list_files(root)), root.with_name(f"{root.name}-finished"))


@pytest.fixture(scope="session")
def workshop(
    trained: Path, small_models: dict[str, ModelSpec], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workshop]:
    """One set of workers, references and feeds for all broken exporters."""
    made = Workshop(trained, small_models, tmp_path_factory.mktemp("workshop"))
    yield made
    made.run.close()
