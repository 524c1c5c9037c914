"""What a checkpoint says about its model, from whatever form the file gives it: names, stride, task, sizes, owner."""

from __future__ import annotations

import ast
import json
import reprlib
from collections.abc import Mapping
from typing import Any, cast

from exporters.errors import BadRequest, CheckpointError
from exporters.models.refusal import RefusalError, shown

_MAX_LITERAL = 2**20


def literal(key: str, text: str) -> Any:
    """The value of a metadata string: JSON, or a Python literal, as the peer's `str()` writes them."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        if len(text) > _MAX_LITERAL:
            raise ValueError
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        what = f"has the metadata {key} {shown(text)!r}, which is neither JSON nor a Python literal"
        raise RefusalError(what, "write it with json.dumps") from None


def normalized(file: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Checkpoint that are facts, from whatever form the file gives them."""

    def refused(key: str, expected: str) -> CheckpointError:
        shape = shown(reprlib.repr(facts[key]))
        return CheckpointError(f"{file} has {key} {shape}, not {expected}", "correct it in the checkpoint")

    def whole(key: str, expected: str, *lengths: int) -> list[int] | None:
        value: Any = facts.get(key)
        if value is None:
            return None
        numbers = cast("list[Any]", value if isinstance(value, list | tuple) else [value])
        for number in numbers:
            if type(number) not in (int, float) or not 0 < number < 2**31 or number != int(number):
                raise refused(key, expected)
        if not numbers or (lengths and len(numbers) not in lengths):
            raise refused(key, expected)
        return [int(number) for number in numbers]

    stride = whole("stride", "whole numbers of pixels")
    imgsz = whole("imgsz", "one or two whole numbers of pixels", 1, 2)
    kpt_shape = whole("kpt_shape", "two whole numbers", 2)
    text = {key: value for key, value in facts.items() if isinstance(value, str) and value}
    return {
        "names": _class_names(file, facts.get("names")),
        "stride": max(stride) if stride else None,
        "task": text.get("task"),
        "imgsz": tuple(imgsz) if imgsz and len(imgsz) == 2 else imgsz and imgsz[0],
        "scale": text.get("scale"),
        "kpt_shape": kpt_shape and tuple(kpt_shape),
        "author": text.get("author"),
        "license": text.get("license"),
        "version": text.get("version"),
        "info": {key: text[key] for key in ("description", "date", "docs") if key in text},
        "modules": facts.get("modules", {}),
    }


def _class_names(file: str, value: Any) -> dict[int, str] | None:
    """Class names by index, from a list or a mapping whose keys are numbers or, as JSON writes them, digits."""
    if value is None:
        return None
    fix = "give every class a name, with the indices 0 to N-1"
    if isinstance(value, list | tuple):
        value = dict(enumerate(cast("list[Any]", value)))
    names: dict[int, str] = {}
    for key, name in cast("dict[Any, Any]", value).items() if isinstance(value, dict) else ():
        index = int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 10 else key
        if type(index) is not int or not isinstance(name, str | int):
            raise BadRequest(f"{file} has the class name {shown(reprlib.repr((key, name)))}", fix)
        names[index] = str(name)
    if not names:
        raise BadRequest(f"{file} has class names that name no class", fix)
    missing = next(index for index in range(len(names) + 1) if index not in names)
    if missing < len(names):
        raise BadRequest(f"{file} has {len(names)} class names up to index {max(names)} but none for {missing}", fix)
    return dict(sorted(names.items()))
