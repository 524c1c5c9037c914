"""Calibration sets: which inputs the ranges of an INT8 artifact are taken from, prepared as the deployment does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from exporters.arrays import load, save
from exporters.artifact import digest
from exporters.calibration.images import list_images, prepare_image, read_image
from exporters.errors import BadRequest
from exporters.models.factory import import_function, telling
from exporters.session import Array
from exporters.spec import ExportSpec, is_factory

SMALL = 300  # below, a warning: NVIDIA's guides recommend 500 images for calibration
FIRST = 4  # feeds of a factory that are part of an artifact's key, beside the factory's source
CALIBRATION_BATCH = 8  # images a calibration batch where the artifact's batch is 1


def calibration_batch(batch: int) -> int:
    """Images in a calibration batch: twice the artifact's batch, 8 for batch 1."""
    return CALIBRATION_BATCH if batch == 1 else 2 * batch


def check(spec: ExportSpec) -> None:
    """Refuses at once a calibration set that would fail after minutes: no images, or a model that does not take them.

    Raises:
        BadRequest: see `images_of`; the factory's module is not found; or the model has another input than one image.
    """
    if is_factory(spec.data):
        from exporters.keys import find_source

        module = spec.data.partition(":")[0]
        if find_source(module, spec.model.search) is None:
            raise BadRequest(f"data '{spec.data}': module '{module}' is not found", "give an importable module:factory")
        return
    found = images_of(spec)
    fixed = not spec.dynamic and spec.format != "engine"  # whose ONNX file has an axis for the batch
    if fixed and len(found) < spec.batch:
        raise BadRequest(
            f"data '{spec.data}' has {len(found)} images, and a calibration batch of this fixed graph has {spec.batch}",
            "give as many images, or a smaller --batch",
        )
    if len(spec.model.inputs) > 1 or not spec.model.has_images:
        wanted = ", ".join(f"{i.name} {list(i.shape)}" for i in spec.model.inputs)
        raise BadRequest(
            f"data '{spec.data}' is a set of images and model '{spec.model.name}' takes {wanted}",
            "give module:factory, which yields arrays by input name",
        )


def images_of(spec: ExportSpec) -> list[Path]:
    """The images of the calibration set, in order, thinned evenly to `fraction` of them.

    Raises:
        BadRequest: the path does not exist, the YAML cannot be read, the split is missing, or there are no images.
    """
    images = list_images(Path(spec.data), spec.split)
    count = max(1, round(len(images) * spec.fraction))
    return [images[i * len(images) // count] for i in range(count)]


def digest_of(spec: ExportSpec) -> str:
    """Digest of the calibration set: of every image's bytes in order; of a factory see `first_digest`."""
    total = hashlib.sha256()
    for path in images_of(spec):
        total.update(digest(path).encode())
    return total.hexdigest()


def first_digest(spec: ExportSpec) -> str:
    """Digest of the first FIRST feeds that a factory yields: it may read files that no key knows of."""
    total = hashlib.sha256()
    for feeds, _ in zip(samples(spec), range(FIRST), strict=False):
        for name, array in sorted(feeds.items()):
            total.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def samples(spec: ExportSpec) -> Iterator[dict[str, Array]]:
    """Feeds of batch 1, one an image (or what the factory yields): name -> array with the model's shape and dtype."""
    entry = spec.model.inputs[0]
    if not is_factory(spec.data):
        for path in images_of(spec):
            yield {
                entry.name: prepare_image(read_image(path), spec.imgsz, spec.model.preprocess)[None].astype(entry.dtype)
            }
        return
    yield from feeds_from(spec.data, spec)


def feeds_from(factory: str, spec: ExportSpec) -> Iterator[dict[str, Array]]:
    """What `module:factory` yields when called with the request, as arrays by input name.

    Raises:
        BadRequest: it cannot be imported, raises, or yields nothing.
    """
    function = import_function(factory, spec.model.search, "feeds")
    empty = True
    with telling(factory, "feeds"):
        for feeds in function(spec):
            empty = False
            yield {key: np.asarray(value) for key, value in feeds.items()}
    if empty:
        raise BadRequest(f"feeds '{factory}' yielded nothing", "yield mappings from input name to array")


def whole_batches(spec: ExportSpec, *, varies: bool) -> tuple[int, Iterator[dict[str, Array]]]:
    """How many samples a calibration batch has, and the batches. A graph whose batch does not vary is calibrated with
    that batch; a short last one is left out there.

    Raises:
        BadRequest: there is none, told by the iterator.
    """
    size = calibration_batch(spec.batch) if varies else spec.batch

    def made() -> Iterator[dict[str, Array]]:
        number = 0
        for batch in batches(spec, size):
            if varies or len(next(iter(batch.values()))) == size:
                number += 1
                yield batch
        if not number:
            raise BadRequest(
                f"data '{spec.data}' has fewer samples than a batch of {size}", "give more, or a smaller --batch"
            )

    return size, made()


def keep_batches(spec: ExportSpec, folder: Path) -> None:
    """Writes the calibration batches below `folder`, for a step whose toolchain lacks what the user's code imports."""
    _, made = whole_batches(spec, varies=spec.dynamic)
    names = [i.name for i in spec.model.inputs]
    for number, feeds in enumerate(made):
        if lacking := [name for name in names if name not in feeds]:
            raise BadRequest(
                f"data '{spec.data}' gives {', '.join(feeds) or 'nothing'}, and not {', '.join(lacking)}",
                f"yield mappings from {', '.join(names)} to arrays",
            )
        save({name: feeds[name] for name in names}, folder / f"{number:06}")


def kept_batches(spec: ExportSpec, folder: Path) -> list[dict[str, Array]]:
    """What `keep_batches` wrote, memory-mapped."""
    names = [i.name for i in spec.model.inputs]
    return [load({name: str(one / f"{n}.npy") for n, name in enumerate(names)}) for one in sorted(folder.iterdir())]


def notes(feeds: Sequence[Mapping[str, Array]], how: str, kept: Sequence[str]) -> list[str]:
    """What the record says of a calibration: by how many samples and what, and the modules that it left alone."""
    images = sum(len(next(iter(batch.values()))) for batch in feeds)
    found = [f"calibrated on {images} images ({how})"]
    found += [f"warning: fewer than {SMALL} calibration images"] if images < SMALL else []
    return found + ([f"left in floating point: {', '.join(kept)}"] if kept else [])


def batches(spec: ExportSpec, size: int) -> Iterator[dict[str, Array]]:
    """`samples` joined along axis 0 into batches of `size`; the last may be short."""
    held: list[dict[str, Array]] = []
    for sample in samples(spec):
        held.append(sample)
        if len(held) == size:
            yield {k: np.concatenate([s[k] for s in held]) for k in held[0]}
            held = []
    if held:
        yield {k: np.concatenate([s[k] for s in held]) for k in held[0]}
