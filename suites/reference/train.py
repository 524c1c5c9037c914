"""Trains a reference checkpoint: `python -m suites.reference.train TASK --output FOLDER`, on a GPU some minutes.

The model is ours at the scale "p", the pictures are those of `scenes`, the losses those of `losses`. What comes out is
a safetensors file in FP16, whose metadata tell what made it and the metric on pictures that the training did not see.
"""
# pyright: reportUnknownMemberType=false, reportPrivateImportUsage=false
# (torch's functions have no types for some of their arguments)

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from exporters.models.build import as_tuple
from exporters.models.catalog import TASKS, outputs_of
from exporters.models.spec import ModelSpec
from exporters.models.yolov8 import YOLOv8, build
from exporters.models.yolov8_heads import REG_MAX, Classify, Detect, Segment
from exporters.version import __version__
from suites.accuracy.dataset import Item, Labels
from suites.accuracy.deploy import Detections, deploy
from suites.accuracy.metrics import Evaluation, evaluate
from suites.reference import losses, scenes

Job = TypeVar("Job")
Made = TypeVar("Made")
SCALE = "p"
MOST = 8  # objects in a picture
GRID = scenes.SIZE // 4  # of the prototypes
BOX, CLASS, DISTRIBUTION, POINT, SEEN = 7.5, 0.5, 1.5, 12.0, 1.0  # weights of the losses, as YOLOv8's authors name them
PRIOR = 0.01  # probability of a class where nothing was learnt
AVERAGE = 0.999  # of the weights, over steps


@dataclass(frozen=True)
class Batch:
    """Pictures (B, 3, S, S) uint8 and their objects, MOST of each at most; in pixels."""

    images: Tensor
    classes: Tensor  # (B, M) int64; of a classifier (B, 1)
    valid: Tensor  # (B, M) bool
    boxes: Tensor  # (B, M, 4)
    points: Tensor  # (B, M, 4, 3)
    turned: Tensor  # (B, M, 5)
    instances: Tensor  # (B, GRID, GRID) uint8: number of the object from 1, 0 for none

    def __getitem__(self, which: Any) -> Batch:
        return Batch(*(getattr(self, f)[which] for f in self.__dataclass_fields__))

    def to(self, device: str) -> Batch:
        return Batch(*(getattr(self, f).to(device) for f in self.__dataclass_fields__))


def _one(job: tuple[str, int, str]) -> tuple[np.ndarray[Any, Any], ...]:
    """A picture as arrays of fixed sizes."""
    from PIL import Image, ImageDraw

    split, number, task = job
    made = scenes.picture(split, number, task)
    things = made.things[:MOST]
    classes, valid, boxes = np.zeros(MOST, np.int64), np.zeros(MOST, bool), np.zeros((MOST, 4), np.float32)
    points, turned = np.zeros((MOST, *scenes.KPT_SHAPE), np.float32), np.zeros((MOST, 5), np.float32)
    turned[:, 2:4] = 1
    canvas = Image.new("L", (scenes.SIZE, scenes.SIZE))
    for row, thing in enumerate(things):
        classes[row], valid[row], boxes[row] = thing.label, True, thing.box
        points[row], turned[row] = thing.points, thing.turned
        ImageDraw.Draw(canvas).polygon([(x - 0.5, y - 0.5) for x, y in thing.outline], fill=row + 1)
    image = made.image.transpose(2, 0, 1)
    # Pillow fills a pixel's breadth beyond an edge, so the mask is drawn large and read at the cells' middles.
    return image, classes, valid, boxes, points, turned, np.asarray(canvas)[2::4, 2::4].copy()


def _of_val(job: tuple[int, str]) -> scenes.Picture:
    return scenes.picture("val", *job)


def _in_processes(make: Callable[[Job], Made], jobs: Sequence[Job]) -> list[Made]:
    """`make` of each job, in as many processes as there are cores; few jobs in this one."""
    if len(jobs) < 64:
        return [make(job) for job in jobs]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(make, jobs, chunksize=16))


def pictures_of(jobs: Sequence[tuple[str, int, str]]) -> Batch:
    """The pictures of these splits, numbers and tasks."""
    rows = _in_processes(_one, jobs)
    return Batch(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))


def turned_about(batch: Batch, across: bool, down: bool, diagonal: bool) -> Batch:
    """The pictures mirrored left to right, top to bottom, and about their diagonal; labels with them."""
    images, instances, boxes, points, turned = (
        batch.images,
        batch.instances,
        batch.boxes.clone(),
        batch.points.clone(),
        batch.turned.clone(),
    )
    for axis, wanted in ((0, across), (1, down)):
        if not wanted:
            continue
        images, instances = images.flip(3 - axis), instances.flip(2 - axis)
        low = scenes.SIZE - boxes[..., axis + 2]
        boxes[..., axis + 2] = scenes.SIZE - boxes[..., axis]
        boxes[..., axis] = low
        points[..., axis] = scenes.SIZE - points[..., axis]
        turned[..., axis] = scenes.SIZE - turned[..., axis]
        turned[..., 4] = (math.pi if axis == 0 else 0.0) - turned[..., 4]
    if diagonal:
        images, instances = images.transpose(2, 3), instances.transpose(1, 2)
        boxes, points = boxes[..., [1, 0, 3, 2]], points[..., [1, 0, 2]]
        turned = torch.cat((turned[..., [1, 0, 2, 3]], math.pi / 2 - turned[..., 4:]), -1)
    if across ^ down ^ diagonal:  # left and right of an object changed sides
        points = points[:, :, list(scenes.FLIP)]
    return replace(batch, images=images, instances=instances, boxes=boxes, points=points, turned=turned)


def features(model: YOLOv8, images: Tensor) -> list[Tensor]:
    """What the head is given."""
    outputs: list[Tensor] = []
    for module, sources in zip(model.model, model.sources, strict=True):
        inputs = [images if i == -1 and not outputs else outputs[i] for i in sources]
        if isinstance(module, (Detect, Classify)):
            return inputs
        outputs.append(module(*inputs))
    raise AssertionError("a model without a head")


class Task:
    """The loss of one task on the head's raw outputs."""

    def __init__(self, task: str, model: YOLOv8) -> None:
        self.task, self.model, self.head = task, model, model.model[-1]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The parts of the loss of a batch, weighed already; images are float in 0..1."""
        xs = features(self.model, batch.images)
        if isinstance(self.head, Classify):
            logits = self.head.linear(self.head.pool(self.head.conv(xs[0])).flatten(1))
            return {"class": functional.cross_entropy(logits.float(), batch.classes[:, 0], label_smoothing=0.05)}
        return self._of_anchors(cast("Detect", self.head), xs, batch)

    def _of_anchors(self, head: Detect, xs: Sequence[Tensor], batch: Batch) -> dict[str, Tensor]:
        box = head.flat(xs, head.cv2).float()
        scores = head.flat(xs, head.cv3).float().transpose(1, 2)  # logits (B, A, nc)
        extra = None if self.task == "detect" else head.flat(xs, head.cv4).float().transpose(1, 2)
        centres, strides = head.anchors([(int(x.shape[2]), int(x.shape[3])) for x in xs], box.device)
        centres, strides = centres[0].T, strides.reshape(-1, 1)  # (A, 2) in cells, (A, 1)
        pixels = centres * strides  # (A, 2)
        bins = box.view(len(box), 4, REG_MAX, -1).permute(0, 3, 1, 2)  # (B, A, 4, bins)
        steps = torch.arange(REG_MAX, device=box.device, dtype=torch.float32)
        distances = (bins.softmax(3) * steps).sum(3)  # in cells
        if self.task == "obb":
            assert extra is not None
            angle = (extra[..., 0].sigmoid() - 0.25) * math.pi
            half = (distances[..., 2:] - distances[..., :2]) / 2
            cos, sin = angle.cos(), angle.sin()
            middle = centres + torch.stack(
                (half[..., 0] * cos - half[..., 1] * sin, half[..., 0] * sin + half[..., 1] * cos), -1
            )
            size = distances[..., :2] + distances[..., 2:]
            predicted = torch.cat((middle * strides, size * strides, angle[..., None]), -1)
            overlap = losses.probiou(batch.turned[:, :, None], predicted.detach()[:, None])
            local = losses.own_frame(pixels, batch.turned).abs()
            inside = (local < batch.turned[:, :, None, 2:4] / 2).all(3)
        else:
            predicted = torch.cat((centres - distances[..., :2], centres + distances[..., 2:]), -1) * strides
            overlap = losses.ciou(batch.boxes[:, :, None], predicted.detach()[:, None]).clamp_min(0)
            inside = losses.inside_boxes(pixels, batch.boxes)
        box_sides = batch.turned[..., 2:4] if self.task == "obb" else batch.boxes[..., 2:] - batch.boxes[..., :2]
        inside = inside & losses.fitting(box_sides.amax(2), strides)
        chosen = losses.assign(scores.detach().sigmoid(), overlap, inside, batch.classes, batch.valid)
        target = torch.zeros_like(scores)
        label = batch.classes.gather(1, chosen.number)
        target.scatter_(2, label[..., None], (chosen.weight * chosen.positive)[..., None])
        total = target.sum().clamp_min(1)
        parts = {"class": CLASS * functional.binary_cross_entropy_with_logits(scores, target, reduction="sum") / total}
        where = chosen.positive
        if not where.any():
            return parts
        rows, anchors = where.nonzero(as_tuple=True)
        number = chosen.number[where]
        weight = chosen.weight[where]
        stride = strides[anchors]
        if self.task == "obb":
            wanted = batch.turned[rows, number]
            parts["box"] = BOX * ((1 - losses.probiou(predicted[where], wanted)) * weight).sum() / total
            wanted = losses.nearest_angle(wanted, predicted[where][:, 4].detach())
            offset = pixels[anchors] - wanted[:, :2]
            cos, sin = wanted[:, 4].cos(), wanted[:, 4].sin()
            own = torch.stack((offset[:, 0] * cos + offset[:, 1] * sin, offset[:, 1] * cos - offset[:, 0] * sin), 1)
            sides = torch.cat((own + wanted[:, 2:4] / 2, wanted[:, 2:4] / 2 - own), 1) / stride
        else:
            wanted = batch.boxes[rows, number]
            parts["box"] = BOX * ((1 - losses.ciou(predicted[where], wanted)) * weight).sum() / total
            sides = torch.cat((pixels[anchors] - wanted[:, :2], wanted[:, 2:] - pixels[anchors]), 1) / stride
        parts["distribution"] = DISTRIBUTION * (losses.distribution(bins[where], sides) * weight).sum() / total
        if self.task == "pose":
            assert extra is not None
            raw = extra[where].view(-1, *scenes.KPT_SHAPE)
            points = (raw[..., :2] * 2 + (centres[anchors] - 0.5)[:, None]) * stride[:, None]
            real = batch.points[rows, number]
            area = (wanted[:, 2:] - wanted[:, :2]).prod(1)
            parts["points"] = POINT * losses.key_points(points, real, area)
            parts["seen"] = SEEN * functional.binary_cross_entropy_with_logits(raw[..., 2], (real[..., 2] > 0).float())
        if self.task == "segment":
            assert extra is not None
            prototypes = cast("Segment", head).proto(xs[0]).float()
            parts["mask"] = BOX * losses.masks(extra[where], prototypes, rows, batch.instances, number, wanted / 4)
        return parts


def prepared(batch: Batch, generator: torch.Generator) -> Batch:
    """The batch as it is trained on: float images in 0..1, turned about and coloured at random."""
    across, down, diagonal = (bool(torch.rand((), generator=generator) < 0.5) for _ in range(3))
    batch = turned_about(batch, across, down, diagonal)
    images = batch.images.float() / 255
    shape = (len(images), 3, 1, 1)
    gain = 1 + 0.3 * (torch.rand(shape, generator=generator) - 0.5)
    shift = 0.2 * (torch.rand((len(images), 1, 1, 1), generator=generator) - 0.5)
    return replace(batch, images=(images * gain.to(images.device) + shift.to(images.device)).clamp(0, 1))


def start(model: YOLOv8) -> None:
    """Biases by which an untrained head expects few objects, each of some cells."""
    head = model.model[-1]
    if isinstance(head, Detect):
        for branch in head.cv2:
            cast("nn.Conv2d", cast("nn.Sequential", branch)[2]).bias.data[:] = 1.0  # pyright: ignore[reportOptionalMemberAccess]
        for branch in head.cv3:
            bias = cast("nn.Conv2d", cast("nn.Sequential", branch)[2]).bias
            assert bias is not None
            bias.data[:] = -math.log((1 - PRIOR) / PRIOR)


def begin_from(model: YOLOv8, path: Path) -> int:
    """Loads what a safetensors file has of this model's parameters; returns how many."""
    from safetensors.torch import load_file

    own = model.state_dict()
    common = {k: v.to(own[k].dtype) for k, v in load_file(path).items() if k in own and v.shape == own[k].shape}
    model.load_state_dict(common, strict=False)
    return len(common)


def train(
    task: str,
    data: Batch,
    epochs: int,
    size: int,
    rate: float,
    seed: int,
    device: str,
    tell: Callable[[dict[str, Tensor]], object] = lambda parts: None,
    origin: Path | None = None,
) -> YOLOv8:
    """The averaged model after `epochs` over the pictures in batches of `size`; `tell` gets each step's losses.

    `origin` is a checkpoint of another task, from which the training starts as far as names and shapes agree.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build(SCALE, len(scenes.NAMES), task=task, kpt_shape=scenes.KPT_SHAPE).to(device).train()
    start(model)
    if origin is not None:
        begin_from(model, origin)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    learnt = [(n, p) for n, p in model.named_parameters() if "dfl" not in n]
    for name, value in model.named_parameters():
        value.requires_grad_("dfl" not in name)  # whole numbers, which stay so
    groups = [
        {"params": [p for _, p in learnt if p.ndim > 1], "weight_decay": 5e-4 * size / 64},
        {"params": [p for _, p in learnt if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, fused=device != "cpu")
    steps = epochs * (len(data.images) // size)
    warm = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, (1 + math.cos(math.pi * n / max(steps, 1))) / 2)
    )
    loss = Task(task, model)
    data = data.to(device)
    done, began = 0, time.monotonic()
    for epoch in range(epochs):
        order = torch.randperm(len(data.images), generator=generator).to(device)
        sums: dict[str, float] = {}
        for first in range(0, len(order) - size + 1, size):
            batch = prepared(data[order[first : first + size]], generator)
            with torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu"):
                parts = loss.loss(batch)
            tell(parts)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(parts.values())).sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            done += 1
            _averaged(average, model, min(AVERAGE, (1 + done) / (10 + done)))
            if done % 20 == 0 or first + 2 * size > len(order):
                sums = {k: round(float(v.detach()), 4) for k, v in parts.items()}
        print(f"epoch {epoch + 1} of {epochs}: {sums}, {time.monotonic() - began:.0f} s", flush=True)
    return average.to("cpu")


@torch.no_grad()
def _averaged(average: YOLOv8, model: YOLOv8, share: float) -> None:
    """Moves the average towards the model; counters are copied."""
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    floats = [(a, b) for a, b in pairs if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - share)  # one call: a step is short
    for ours, theirs in pairs:
        if not ours.is_floating_point():
            ours.copy_(theirs)


@torch.no_grad()
def measured(model: YOLOv8, task: str, count: int) -> Evaluation:
    """The metric of a model on `count` pictures that no training sees, as a deployment would use it."""
    spec = ModelSpec(task, "", task=task, outputs=outputs_of(task, len(scenes.NAMES), scenes.KPT_SHAPE))
    size = (scenes.SIZE, scenes.SIZE)
    items: list[Item] = []
    found: list[Detections] = []
    for number, made in enumerate(_in_processes(_of_val, [(n, task) for n in range(count)])):
        items.append(Item(Path(str(number)), size, labels_of(made)))
        image = torch.from_numpy(made.image.transpose(2, 0, 1)[None].copy()).float() / 255
        outputs = as_tuple(model.eval()(image))
        named = {o.name: v.numpy() for o, v in zip(spec.outputs, outputs, strict=True)}
        found.append(deploy(named, 0, spec, size, size, 0.001))
    return evaluate(task, items, found, len(scenes.NAMES))


def labels_of(made: scenes.Picture) -> Labels:
    """A picture's labels as the reader of a data set would give them."""
    things = made.things
    return Labels(
        np.array([t.label for t in things], int),
        np.array([np.clip(t.box, 0, scenes.SIZE) for t in things]).reshape(-1, 4),
        tuple(t.outline for t in things),
        np.array([t.points for t in things]).reshape(-1, *scenes.KPT_SHAPE),
        np.array([t.turned for t in things]).reshape(-1, 5),
    )


def save(model: YOLOv8, task: str, path: Path, facts: dict[str, str]) -> None:
    """A safetensors file in FP16 with what `read_checkpoint` looks for, and what made it."""
    from safetensors.torch import save_file

    state = {k: v.half().contiguous() for k, v in model.state_dict().items() if v.is_floating_point()}
    values = {
        "task": task,
        "names": str(scenes.NAMES),
        "imgsz": str(scenes.SIZE),
        "author": "exportgate",
        "license": "Apache-2.0",
        "date": datetime.now(UTC).date().isoformat(),
        "description": f"reference model of exportgate, {task}, trained on generated pictures",
        **({"kpt_shape": str(list(scenes.KPT_SHAPE))} if task == "pose" else {}),
        **({} if task == "classify" else {"stride": "32"}),
        **facts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, values)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--output", type=Path, required=True, help="the folder that TASK.safetensors goes to")
    parser.add_argument("--pictures", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=4e-3, help="largest learning rate of AdamW")
    parser.add_argument("--validate", type=int, default=500, help="pictures that the metric is taken on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="a checkpoint of another task to start from")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args(words)
    began = time.monotonic()
    data = pictures_of([("train", n, asked.task) for n in range(asked.pictures)])
    print(f"{asked.pictures} pictures in {time.monotonic() - began:.0f} s", flush=True)
    model = train(asked.task, data, asked.epochs, asked.batch, asked.rate, asked.seed, asked.device, origin=asked.start)
    metric = measured(model.half().float(), asked.task, asked.validate)  # of the weights that are stored
    facts = {
        "metric": json.dumps({k: round(v, 4) for k, v in metric.values.items()}),
        "command": f"python -m suites.reference.train {asked.task} --pictures {asked.pictures} --epochs {asked.epochs} "
        f"--batch {asked.batch} --rate {asked.rate:g} --seed {asked.seed}"
        + (f" --start {asked.start.name}" if asked.start else ""),
        "version": f"exportgate {__version__}, torch {torch.__version__}, numpy {np.__version__}",
        "device": torch.cuda.get_device_name() if asked.device != "cpu" else "cpu",
        "seconds": str(round(time.monotonic() - began)),
    }
    save(model, asked.task, asked.output / f"{asked.task}.safetensors", facts)
    print(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
