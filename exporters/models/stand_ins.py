"""Stand-ins for what a pickle names and builds: inert, hashable by identity or value, with checked access.

Every value that comes from a file goes through `of` or one of its kin before it is used, so that a file of another
shape than torch.save's ends in a TypeError or ValueError, which the reader calls damage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, TypeVar, cast

from exporters.models.refusal import shown

Make = Callable[[tuple[Any, ...]], Any]
_T = TypeVar("_T")


class Role(Enum):
    """What a name of the file may be used for."""

    CLASS = auto()  # becomes a Stub when it is instantiated
    FUNCTION = auto()  # replaced by a function of the reader
    STORAGE = auto()  # the type in a persistent id
    CONSTANT = auto()  # a dtype or a tensor type, only ever passed on
    UNKNOWN = auto()  # a layer outside the table: reading goes on, so that the refusal can name the model's family


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Name:
    """A global of the file, as a name only: nothing is imported for it."""

    module: str
    name: str
    role: Role
    make: Make | None = None
    dtype: str = ""


@dataclass(slots=True, eq=False, repr=False)
class Stub:
    """Stands for an instance of a class that is not imported: its name, and the attributes that the file gave it."""

    origin: Name
    attrs: dict[Any, Any]


@dataclass(frozen=True, slots=True, repr=False)
class Storage:
    """The values of one or more tensors: an entry of the archive named `data/<key>`, of `size` elements of `dtype`."""

    key: str
    dtype: str
    size: int


@dataclass(frozen=True, slots=True, repr=False)
class Tensor:
    """A view into a storage, in elements; its bounds were checked when it was made."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def of(value: Any, kind: type[_T]) -> _T:
    """The value, when it is exactly of this type."""
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__} expected, got {type(value).__name__}")
    return value


def as_tuple(value: Any) -> tuple[Any, ...]:
    return cast("tuple[Any, ...]", of(value, tuple))


def as_list(value: Any) -> list[Any]:
    return cast("list[Any]", of(value, list))


def as_dict(value: Any) -> dict[Any, Any]:
    return cast("dict[Any, Any]", of(value, dict))


def keys(values: Iterable[Any]) -> list[Any]:
    """The values, when each may be hashed safely: nested tuples and huge integers can make hashing take for ever."""
    checked = list(values)
    for value in checked:
        if type(value) is int:
            if abs(value) >= 2**60:
                raise ValueError("a key is an integer above 2**60")
        elif value is not None and type(value) not in (str, float, bool, bytes):
            raise TypeError(f"a key is a {type(value).__name__}")
    return checked


def set_items(target: Any, items: list[Any] | tuple[Any, ...]) -> None:
    """Adds alternating keys and values to a dict."""
    as_dict(target).update(zip(keys(items[::2]), items[1::2], strict=True))


def instance(origin: Any) -> Stub:
    """A stand-in for an instance of the class that a name of the file stands for."""
    name = of(origin, Name)
    if name.role not in (Role.CLASS, Role.UNKNOWN):
        raise TypeError(f"{shown(name.name)} is not a class")
    return Stub(name, {})
