"""How a decoded JSON value becomes a frozen dataclass, by its type hints.

Whatever a record says is untrusted: a type that differs is refused with its place, and text loses what cannot be shown.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints


class FieldError(ValueError):
    """Raised when a field of a line is missing or of another type; says which one and what it holds."""


# No report can show these: control characters (XML has no way to write them), lone surrogates (UTF-8 has none), and
# marks that reorder the text around them, so that a name could read as another one.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_SPECIAL = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}

T = TypeVar("T")
Convert = Callable[[Any, str], Any]


def clean(text: str) -> str:
    """Text with each character that no report can show replaced by U+FFFD, so that it is seen that there was one."""
    return _UNSHOWABLE.sub("�", text.replace("\r\n", "\n"))


def build(kind: type[T], value: Any, place: str) -> T:
    """A dataclass of `kind` from a decoded JSON value; fields that it does not know are ignored.

    Raises:
        FieldError: a field is missing or has another type; the message starts with `place`.
    """
    return _converter(kind)(value, place)


def _refuse(place: str, value: Any, wanted: str) -> FieldError:
    shown = clean(repr(value))
    return FieldError(f"{place} is {shown[:60]}{'…' if len(shown) > 60 else ''}, not {wanted}")


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise _refuse(place, value, "text")
    return clean(value)


def _truth(value: Any, place: str) -> bool:
    if not isinstance(value, bool):
        raise _refuse(place, value, "true or false")
    return value


def _whole(value: Any, place: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _refuse(place, value, "a whole number")
    return value


def _number(value: Any, place: str) -> float:
    if isinstance(value, str) and value in _SPECIAL:
        return _SPECIAL[value]
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise _refuse(place, value, "a number")
    try:
        return float(value)
    except OverflowError:
        raise _refuse(place, "an enormous whole number", "a number that can be shown") from None


def _anything(value: Any, place: str) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return tuple(_anything(item, place) for item in cast("list[Any]", value))
    if isinstance(value, dict):
        return _mapping(_anything)(value, place)
    return value


def _mapping(convert: Convert) -> Convert:
    def apply(value: Any, place: str) -> Any:
        if not isinstance(value, dict):
            raise _refuse(place, value, "an object")
        items = cast("dict[str, Any]", value)
        return {clean(name): convert(item, f"{place}.{clean(name)}") for name, item in items.items()}

    return apply


def _sequence(convert: Convert) -> Convert:
    def apply(value: Any, place: str) -> Any:
        if not isinstance(value, list):
            raise _refuse(place, value, "a list")
        items = cast("list[Any]", value)
        # Samples come by the hundred thousand: a list that is all floats needs no second look.
        if convert is _number and all(type(item) is float for item in items):
            return tuple(items)
        return tuple([convert(item, f"{place}[{index}]") for index, item in enumerate(items)])

    return apply


def _optional(convert: Convert) -> Convert:
    return lambda value, place: None if value is None else convert(value, place)


def _one_of(words: tuple[str, ...]) -> Convert:
    def apply(value: Any, place: str) -> Any:
        if value not in words:
            raise _refuse(place, value, f"one of {' '.join(words)}")
        return value

    return apply


def _record(kind: type[Any]) -> Convert:
    hints = get_type_hints(kind)
    plan = [
        (entry.name, _converter(hints[entry.name]), entry.default is MISSING and entry.default_factory is MISSING)
        for entry in fields(kind)
    ]

    def apply(value: Any, place: str) -> Any:
        if not isinstance(value, dict):
            raise _refuse(place, value, "an object")
        items = cast("dict[str, Any]", value)
        found: dict[str, Any] = {}
        for name, convert, required in plan:
            if name in items:
                found[name] = convert(items[name], f"{place}.{name}")
            elif required:
                raise FieldError(f"{place} lacks {name}")
        return kind(**found)

    return apply


@cache
def _converter(hint: Any) -> Convert:
    """How a JSON value becomes what a type hint says; every hint in reports/events.py has a branch."""
    plain: dict[Any, Convert] = {str: _text, bool: _truth, int: _whole, float: _number, Any: _anything}
    if hint in plain:
        return plain[hint]
    if is_dataclass(hint):
        return _record(cast("type[Any]", hint))
    origin, inner = get_origin(hint), get_args(hint)
    if origin is tuple:
        return _sequence(_converter(inner[0]))
    if origin is Mapping:
        return _mapping(_converter(inner[1]))
    if origin is Literal:
        return _one_of(inner)
    if origin in (Union, types.UnionType):
        return _optional(_converter(inner[0]))
    raise TypeError(f"no converter for {hint!r}")
