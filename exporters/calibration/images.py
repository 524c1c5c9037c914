"""Images of a data set, and the deployment's preprocessing: letterbox, RGB, /255."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from exporters.errors import BadRequest, first_line
from exporters.models.spec import Preprocess

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """An image file as (H, W, 3) RGB, the way up that its camera noted (EXIF).

    Raises:
        BadRequest: the file is not an image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(image.convert("RGB"))
    except (
        OSError,
        ValueError,
        SyntaxError,
        LookupError,
        TypeError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        # Pillow's readers raise these, too, for files that are damaged.
        raise BadRequest(
            f"image '{path}' cannot be read ({first_line(error)})", "remove it from the data set, or repair it"
        ) from None


def prepare_image(image: npt.NDArray[np.uint8], imgsz: tuple[int, int], how: Preprocess) -> npt.NDArray[np.float32]:
    """(H, W, 3) uint8 -> (3, h, w) float32 of size `imgsz`: letterboxed, stretched or cropped, scaled, normalized."""
    from PIL import Image

    h, w = imgsz
    inner, (top, left) = fitted((image.shape[0], image.shape[1]), imgsz, how)
    resized = np.asarray(Image.fromarray(image).resize((inner[1], inner[0]), Image.Resampling.BILINEAR))
    if how.resize == "crop":
        canvas = resized[-top : -top + h, -left : -left + w]
    else:
        canvas = np.full((h, w, 3), how.pad, np.uint8)
        canvas[top : top + inner[0], left : left + inner[1]] = resized
    values = canvas.astype(np.float32) / 255.0
    values = (values - np.asarray(how.mean, np.float32)) / np.asarray(how.std, np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def fitted(size: tuple[int, int], imgsz: tuple[int, int], how: Preprocess) -> tuple[tuple[int, int], tuple[int, int]]:
    """What an image (height, width) becomes: its size when resized, and the place (top, left) of that on the canvas.

    Where it is cropped the place is negative.
    """
    h, w = imgsz
    if how.resize == "letterbox":
        ratio = min(h / size[0], w / size[1])
        inner = (max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio)))
    elif how.resize == "crop":
        ratio = max(h / size[0], w / size[1])
        inner = (max(h, round(size[0] * ratio)), max(w, round(size[1] * ratio)))
    else:
        inner = (h, w)
    return inner, ((h - inner[0]) // 2, (w - inner[1]) // 2)


def list_images(data: Path, split: str) -> list[Path]:
    """Images of a folder (searched below it too), or of the split of a YOLO data set YAML; sorted.

    Raises:
        BadRequest: see `exporters.calibration.images_of`.
    """
    if not data.exists():
        raise BadRequest(f"data '{data}' does not exist", "give a data set YAML, a folder of images, or module:factory")
    if data.is_dir():
        roots = [data / split] if (data / split).is_dir() else [data]
        if split != "val" and roots == [data]:  # the default means the whole folder where there are no splits
            raise BadRequest(f"data '{data}' has no folder '{split}'", "name a split that it has with --split, or none")
    elif data.suffix.lower() in (".yaml", ".yml"):
        roots = _split_of(data, split)
    else:
        raise BadRequest(
            f"data '{data}' is neither a folder nor a YAML file", "give a data set YAML or a folder of images"
        )
    found: list[Path] = []
    for root in roots:
        if root.is_dir():
            found += sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        elif root.suffix.lower() == ".txt" and root.is_file():
            lines = _text(root, "a list of images").splitlines()
            found += [(root.parent / line.strip()).resolve() for line in lines if line.strip()]
        elif root.suffix.lower() in SUFFIXES:
            found.append(root)
        else:
            raise BadRequest(f"data '{data}': '{root}' does not exist", "correct the path of this split")
    absent = next((p for p in found if not p.is_file()), None)
    if absent or not found:
        raise BadRequest(
            f"data '{data}': " + (f"image '{absent}' does not exist" if absent else "no images found"),
            "images are " + ", ".join(sorted(SUFFIXES)),
        )
    return found


def _split_of(path: Path, split: str) -> list[Path]:
    """Folders, lists or images of one split of a data set YAML; `path:` inside it is relative to the YAML."""
    import yaml

    try:
        read: Any = yaml.safe_load(_text(path, "YAML"))
    except (yaml.YAMLError, RecursionError) as error:
        raise BadRequest(f"data '{path}' is not YAML ({first_line(error)})", "see the YOLO data set format") from None
    values: dict[Any, Any] = cast("dict[Any, Any]", read) if isinstance(read, dict) else {}
    entries: Any = values.get(split)
    if not entries:
        has = sorted(map(str, values)) if values else "no key"
        raise BadRequest(f"data '{path}' has no split '{split}' (it has {has})", "name a split with --split")
    root = (path.parent / str(values.get("path") or ".")).resolve()
    listed = cast("list[Any]", entries) if isinstance(entries, list) else [entries]
    return [(root / str(entry)).resolve() for entry in listed]


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(
            f"data '{path}' cannot be read as {what} ({first_line(error)})", "correct it, or give a folder"
        ) from None
