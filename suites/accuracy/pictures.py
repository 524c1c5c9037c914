"""The pictures that accuracy is judged on, and what the artifact and PyTorch find in them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from exporters.calibration.images import list_images, prepare_image, read_image
from exporters.errors import BadRequest, NotSupported
from exporters.models.catalog import TASKS
from exporters.models.factory import import_function, telling
from exporters.models.spec import ModelSpec, classifier_output, named_pictures
from exporters.pool import RemoteSession
from exporters.spec import NMS, ExportSpec
from suites.accuracy.dataset import DataSet, Item, Labels, label_file, read_dataset
from suites.accuracy.deploy import Detections, deploy
from suites.support.bench import Bench, Outputs, cast
from suites.support.detections import detector_output
from suites.support.suppression import as_anchors, suppressed

Kept = TypeVar("Kept")
SPLIT = "val"
TOGETHER = 8  # pictures that PyTorch is shown at a time: small networks take half the time
LOWEST = 0.001  # confidence from which detections count for the metric, as where YOLOv8's authors take theirs


@dataclass(frozen=True)
class Pictures:
    """Images, and their labels where there are any."""

    items: Sequence[Item]
    labelled: bool

    @cached_property
    def digest(self) -> str:
        """Of names and sizes of the files, and of what the labels say: another set has another metric."""
        total = hashlib.sha256()
        for item in self.items:
            total.update(f"{item.path.name} {item.path.stat().st_size} {item.size}".encode())
            labels = item.labels
            for part in (labels.classes, labels.boxes, *labels.polygons, labels.points, labels.turned):
                total.update(np.ascontiguousarray(part, np.float64).tobytes())
        return total.hexdigest()


def task_of(model: ModelSpec) -> str:
    """The task whose metric judges a model: its own, or what its outputs' channel groups make of it.

    Raises:
        NotSupported: neither boxes with scores nor probabilities.
    """
    if model.task in TASKS:
        return model.task
    if detector_output(model) is not None:
        return "detect"
    if classifier_output(model) is not None:
        return "classify"
    raise NotSupported(f"model {model.name} has neither boxes with scores nor probabilities")


def classes_of(model: ModelSpec) -> int:
    """How many classes a model tells apart."""
    groups = [g for o in model.outputs for g in o.groups if g.kind in ("score", "probability")]
    return int((groups[0].stop or 0) - groups[0].start)


def pictures_of(model: ModelSpec) -> Pictures:
    """What the model is to be judged on.

    Raises:
        NotSupported: the model names no pictures.
        BadRequest: they cannot be read, or belong to other classes.
    """
    task = task_of(model)
    named = named_pictures(model)
    if not named:
        raise NotSupported(
            f"model {model.name} has no pictures to judge accuracy on: name them with --evaluate, or with evaluate "
            "in its table"
        )
    data = Path(named) if Path(named).exists() else _made(named, model)
    if not _is_labelled(data, task, model):
        none = Labels(np.zeros(0, int))
        return Pictures([Item(p, _size(p), none) for p in list_images(data, SPLIT)], False)
    return Pictures(_in_our_numbers(read_dataset(data, SPLIT, task, model.kpt_shape), model, data), True)


def _size(path: Path) -> tuple[int, int]:
    """Height and width of an image file."""
    shape = read_image(path).shape
    return shape[0], shape[1]


def _made(factory: str, model: ModelSpec) -> Path:
    """The data set that `module:factory` writes for a model."""
    function = import_function(factory, model.search, "evaluate")
    with telling(factory, "evaluate"):
        made = Path(function(model))
    if not made.exists():
        raise BadRequest(f"evaluate '{factory}' gave '{made}', which does not exist", "return the data set's path")
    return made


def _is_labelled(data: Path, task: str, model: ModelSpec) -> bool:
    """Whether these are more than images.

    Raises:
        BadRequest: labels are meant and there are none.
    """
    if task == "classify":
        root = data / SPLIT
        if data.is_dir() and {p.name for p in data.iterdir() if p.is_dir()} & set(dict(model.names).values()):
            raise BadRequest(
                f"data '{data}' has the folders of the classes itself", f"name the folder that has '{SPLIT}' with them"
            )
        # What is no folder is refused by the reader.
        return not data.is_dir() or (root.is_dir() and any(p.is_dir() for p in root.iterdir()))
    if data.is_dir():
        return False
    images = list_images(data, SPLIT)
    if not any(label_file(p).is_file() for p in images):
        raise BadRequest(
            f"data '{data}' has no labels: none for {len(images)} images of '{SPLIT}' (the first would be "
            f"'{label_file(images[0])}')",
            "put them there, or name the folder of images, to judge without labels",
        )
    return True


def _in_our_numbers(found: DataSet, model: ModelSpec, data: Path) -> list[Item]:
    """The images with the model's numbers of the classes, which have the same names in another order maybe.

    Raises:
        BadRequest: the classes are others.
    """
    count = classes_of(model)
    theirs, ours = dict(found.names), dict(model.names) or dict(found.names)
    if len(theirs) != count or set(theirs.values()) != set(ours.values()):
        sides = (("data", theirs, ours), ("model", ours, theirs))
        odd = [f"'{n}' only in the {side}" for side, a, b in sides for n in a.values() if n not in b.values()]
        raise BadRequest(
            f"data '{data}' has {len(theirs)} classes and model '{model.name}' {count}"
            + (f": {', '.join(odd[:2])}" if odd else ""),
            "judge the model on data with its own classes",
        )
    number = {name: k for k, name in ours.items()}
    table = np.array([number[theirs[k]] for k in range(len(theirs))])
    return [replace(i, labels=replace(i.labels, classes=table[i.labels.classes.astype(int)])) for i in found.items]


def found_by(run: Callable[[Outputs], Outputs], spec: ExportSpec, items: Sequence[Item]) -> list[Detections]:
    """The detections of each image, as a deployment of this batch and image size would have them."""
    entry, found = spec.model.inputs[0], list[Detections]()
    for first in range(0, len(items), spec.batch):
        part = items[first : first + spec.batch]
        images = [prepare_image(read_image(i.path), spec.imgsz, spec.model.preprocess) for i in part]
        images += images[-1:] * (spec.batch - len(part))  # a fixed graph takes whole batches
        outputs = run({entry.name: np.stack(images).astype(entry.dtype)})
        found += [deploy(outputs, n, spec.model, spec.imgsz, i.size, LOWEST, not spec.nms) for n, i in enumerate(part)]
    return found


def shown_to(case: Bench) -> Pictures:
    """The pictures that a case's model is judged on; kept for the next case.

    Raises:
        NotSupported: see `pictures_of`; or the model takes no images.
    """
    if len(case.model.inputs) > 1 or not case.model.has_images:
        raise NotSupported(f"model {case.model.name} takes no images")
    key = ("pictures", repr(case.model))
    if key not in case.run.found:
        case.run.found[key] = pictures_of(case.model)
    return case.run.found[key]


def kept(case: Bench, what: Hashable, make: Callable[[], Kept]) -> Kept:
    """What hangs on the model, the image size and the suppression alone: made once for all their cases."""
    nms = tuple(getattr(case.spec, name) for name in NMS)
    key = (what, repr(case.model), case.spec.imgsz, nms)
    if key not in case.run.found:
        case.run.found[key] = make()
    return case.run.found[key]


def reference_of(case: Bench) -> list[Detections]:
    """What PyTorch finds in the pictures; kept for the next case."""

    def run(feeds: Outputs) -> Outputs:
        found = case.guard(lambda: case.run.reference(case.model).run(feeds))
        return suppressed(found, case.model, case.spec) if case.spec.nms else found

    return kept(
        case,
        "reference",
        lambda: found_by(run, case.spec.but(batch=TOGETHER if case.model.has_batch else 1), shown_to(case).items),
    )


def artifact_of(case: Bench) -> list[Detections]:
    """What the case's artifact finds in the pictures; kept for the next claim.

    Raises:
        NotSupported: nothing here runs it.
    """
    shown, session = shown_to(case), case.session()
    key = ("case", case.case.id, session.artifact.root)
    if key not in case.run.found:
        case.run.found[key] = found_in(case, session, case.spec, shown)
    return case.run.found[key]


def found_in(case: Bench, session: RemoteSession, spec: ExportSpec, shown: Pictures) -> list[Detections]:
    """What an open artifact finds in the pictures."""

    def run(feeds: Outputs) -> Outputs:
        found = case.guard(lambda: session.run(cast(session, feeds)))
        return as_anchors(found, spec.model, spec) if spec.nms else found

    return found_by(run, spec, shown.items)
