"""ModelSpec: a model described by its importable factory and weights, without torch, so that it can cross processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from exporters.errors import BadRequest

Dim = int | str  # a fixed size, or the name of an axis: batch, height, width, or a name of the model's own


@dataclass(frozen=True)
class InputSpec:
    """One input: its name, shape (sizes, or names of axes) and numpy dtype; `low` and `high` bound generated values."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str = "float32"
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class ChannelGroup:
    """Channels start:stop:step of an output's axis 1 that share one meaning, unit and tolerance.

    Kinds: box, score, mask (coefficients), point (coordinates), visibility and angle belong to anchors; probability to
    classifiers; value is anything else.

    `extent` is the range of values that the arithmetic works in (for boxes the image size in pixels); 0 takes the range
    of the reference's own values.
    """

    name: str
    kind: str
    unit: str = ""
    start: int = 0
    stop: int | None = None
    extent: float = 0.0
    step: int = 1

    @property
    def channels(self) -> slice:
        return slice(self.start, self.stop, self.step)


# What kinds of channels there are; the second belong to anchors, of which those count that fire.
OF_ANCHORS = ("box", "mask", "point", "visibility", "angle")
GROUP_KINDS = ("score", "value", "probability", *OF_ANCHORS)


@dataclass(frozen=True)
class OutputSpec:
    """One output: its name, its axes that vary with the input (axis -> name), and its channel groups."""

    name: str
    axes: tuple[tuple[int, str], ...] = ()
    groups: tuple[ChannelGroup, ...] = (ChannelGroup("values", "value"),)


@dataclass(frozen=True)
class Preprocess:
    """What the deployment does to an RGB image: letterbox, stretch or crop, pad value, then (x/255 - mean)/std."""

    resize: str = "letterbox"
    pad: int = 114
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class ModelSpec:
    """What a worker needs to build a model, and what a judge needs to know about its tensors.

    Attributes:
        name: the model's part of a case id.
        factory: `package.module:function`, called with `arguments`, returns a `torch.nn.Module`.
        weights: file that is loaded strictly into the module; None keeps what the factory made.
        search: folders that a worker adds to its import path to find the factory.
        seed: seeds torch before the factory runs, so that random weights are the same everywhere.
        stride: height and width are multiples of it.
        fp32: (module path, reason): modules that conversions to lower precision leave in FP32.
        owner: author, license, description ... of the model, from the checkpoint or the request.
        feeds: folder of images or `module:factory`, whose inputs the outputs are compared on.
        evaluate: labelled data set, folder of images or `module:factory` of either, which accuracy is judged on.
        kpt_shape: of pose, how many key points and how many values of each.
    """

    name: str
    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    weights: Path | None = None
    search: tuple[Path, ...] = ()
    seed: int = 0
    task: str = ""
    inputs: tuple[InputSpec, ...] = (InputSpec("images", ("batch", 3, "height", "width")),)
    outputs: tuple[OutputSpec, ...] = (OutputSpec("output0", ((0, "batch"),)),)
    stride: int = 1
    imgsz: tuple[int, int] = (0, 0)
    names: Mapping[int, str] = field(default_factory=dict[int, str])
    fp32: tuple[tuple[str, str], ...] = ()
    owner: Mapping[str, str] = field(default_factory=dict[str, str])
    preprocess: Preprocess = Preprocess()
    feeds: str = ""
    evaluate: str = ""
    kpt_shape: tuple[int, ...] = ()

    def shape(self, entry: InputSpec, batch: int, imgsz: tuple[int, int]) -> tuple[int, ...]:
        """Concrete shape of an input for a batch size and an image size (height, width)."""
        sizes = {"batch": batch, "height": imgsz[0], "width": imgsz[1]}
        unknown = next((d for d in entry.shape if isinstance(d, str) and d not in sizes), None)
        if unknown is not None:
            raise BadRequest(
                f"model '{self.name}': input '{entry.name}' has an axis named '{unknown}'",
                "axes are numbers, or named batch, height, width",
            )
        return tuple(d if isinstance(d, int) else sizes[d] for d in entry.shape)

    @property
    def has_images(self) -> bool:
        """Whether the first input is an image whose size can be asked for."""
        return {"height", "width"} <= set(self.inputs[0].shape)

    @property
    def has_batch(self) -> bool:
        return "batch" in self.inputs[0].shape

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` is its inverse."""
        data = asdict(self)
        data["weights"] = str(self.weights) if self.weights else None
        data["search"] = [str(p) for p in self.search]
        data["names"] = {str(k): v for k, v in self.names.items()}
        return data

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ModelSpec:
        outputs = tuple(
            OutputSpec(
                o["name"], tuple((int(a), str(n)) for a, n in o["axes"]), tuple(ChannelGroup(**g) for g in o["groups"])
            )
            for o in data["outputs"]
        )
        p = data["preprocess"]
        return replace(
            ModelSpec(data["name"], data["factory"]),
            **{k: data[k] for k in ("arguments", "seed", "task", "stride", "owner", "feeds", "evaluate")},
            weights=Path(data["weights"]) if data["weights"] else None,
            search=tuple(Path(p) for p in data["search"]),
            inputs=tuple(
                InputSpec(i["name"], tuple(i["shape"]), i["dtype"], i["low"], i["high"]) for i in data["inputs"]
            ),
            outputs=outputs,
            imgsz=(data["imgsz"][0], data["imgsz"][1]),
            preprocess=Preprocess(p["resize"], p["pad"], tuple(p["mean"]), tuple(p["std"])),
            names={int(k): v for k, v in data["names"].items()},
            fp32=tuple((a, b) for a, b in data["fp32"]),
            kpt_shape=tuple(data["kpt_shape"]),
        )


def classifier_output(model: ModelSpec) -> OutputSpec | None:
    """The output with probabilities of classes; None for a model that is no classifier."""
    return next((o for o in model.outputs if any(g.kind == "probability" for g in o.groups)), None)


def detector_output(model: ModelSpec) -> OutputSpec | None:
    """The output that has both boxes and scores of anchors, if any."""
    return next((o for o in model.outputs if {"box", "score"} <= {g.kind for g in o.groups}), None)


def named_pictures(model: ModelSpec) -> str:
    """The data set, folder or factory of pictures to judge accuracy on; "" where a model names none."""
    return model.evaluate or (model.feeds if model.feeds and Path(model.feeds).exists() else "")


def belongs(name: str, paths: Sequence[str]) -> bool:
    """Whether a node ("/model.22/decode/Add") or a parameter lies in a module of `paths` ("model.22.decode")."""
    dotted = f".{module_path(name)}."
    return any(f".{path}." in dotted for path in paths)


def module_path(name: str) -> str:
    """A node's name with dots, as PyTorch names modules: "/model.22/cv2.0/cv2.0.0/conv/Conv", where the exporter says
    the list's name again, is model.22.cv2.0.0.conv.Conv."""
    parts: list[str] = []
    for part in name.strip("/.").split("/"):
        if parts and part.startswith(parts[-1] + "."):
            parts[-1] = part
        else:
            parts.append(part)
    return ".".join(parts)


def class_names(value: Any, where: str) -> dict[int, str]:
    """Class names from a list or a mapping with every index from 0.

    Raises:
        BadRequest: an index is missing, not a whole number, or a name is not text.
    """
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(cast("list[Any]", value)))
    if not isinstance(value, Mapping):
        raise BadRequest(
            f"{where}: class names are {type(value).__name__}", "give a list, or a mapping from index to name"
        )
    names: dict[int, str] = {}
    for key, name in cast("Mapping[Any, Any]", value).items():
        if not (isinstance(key, int) or (isinstance(key, str) and key.strip().isdecimal())):
            raise BadRequest(f"{where}: class index {key!r} is not a whole number", "use 0, 1, 2, ...")
        if not isinstance(name, (str, int, float)):
            raise BadRequest(f"{where}: the name of class {key} is {name!r}", "names are text")
        names[int(key)] = str(name)
    gap = next((i for i in range(len(names)) if i not in names), None)
    if gap is not None:
        raise BadRequest(
            f"{where}: class names have no index {gap} (they have {sorted(names)[:5]}...)",
            "give every index from 0 without gaps",
        )
    return dict(sorted(names.items()))
