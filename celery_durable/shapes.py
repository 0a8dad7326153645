"""Dataclasses and pydantic models as results: stored as plain data, rebuilt by the function's return hint.

pydantic does the work, and is imported with the first such value.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import types
import typing
from collections.abc import Callable, Iterator
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, Literal
from uuid import UUID

from celery import Task

from .exceptions import SerializationError

Mode = Literal["json", "python"]
#: How a value is made plain, the best first. As JSON all of it is plain for whoever lists it, but bytes and unions such
#: as ``str | datetime`` may only come back if what kombu knows is left to kombu.
MODES: tuple[Mode, ...] = ("json", "python")
#: Values within a value that are looked at for advice.
_MOST_LOOKED_AT = 1_000
_KNOWN_TO_KOMBU = {type(None), bool, int, float, str, bytes, datetime, date, time, Decimal, UUID}


class Shape:
    """What a function says that it returns, looked up when it is first needed."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    @functools.cached_property
    def hint(self) -> Any:
        """The return hint; None if it can't be resolved, or names nothing that has to be rebuilt."""
        try:
            hint = _return_hint(self._function)
        except Exception:  # noqa: BLE001 - a hint is any code; without one, a value is stored as it is
            return None
        return hint if _needs_shape(hint) else None

    def dump(self, value: Any, mode: Mode = "json") -> Any:
        """Return plain data of a value; raises whatever pydantic or the value's class does if it can't be made."""
        data = _adapter_of(self.hint).dump_python(value, mode=mode, by_alias=True, round_trip=True, warnings=False)
        return _kept_by_kombu(data) if mode == "python" else data

    def load(self, data: Any, mode: Mode = "json") -> Any:
        """Rebuild a value from its data; raises whatever pydantic or the value's class does if it doesn't fit.

        A function that has lost its hint since then gets the plain data.
        """
        if self.hint is None:
            return data
        adapter = _adapter_of(self.hint)
        # Only of JSON does a strict model take a string as a datetime.
        return adapter.validate_python(data) if mode == "python" else adapter.validate_json(json.dumps(data))

    def check(self, value: Any, data: Any, mode: Mode = "json") -> None:
        """Raise SerializationError unless a value comes back from its data as it was.

        Else a sloppy hint, an object of a subclass, or a union of classes with the same fields changed it in silence.
        """
        if not _are_alike(value, self.load(data, mode)):
            raise SerializationError(
                f"it wouldn't come back as it is by the hint {inspect.formatannotation(self.hint)}: is it of another "
                "class, or does a union have several classes with its fields?"
            )


def shape_of(function: Callable[..., Any]) -> Shape | None:
    """Return the shape of a function's results by its return hint; None if there is no hint, or nothing to rebuild.

    Takes functions, coroutine functions, methods, partials, Celery tasks, classes and other callables. A hint that
    names what isn't defined yet is resolved with the first result; if it can't be then either, it doesn't count.
    """
    function = _annotated(function)
    try:
        hint = _return_hint(function)
    except Exception:  # noqa: BLE001 - as above
        return Shape(function)
    return Shape(function) if _needs_shape(hint) else None


def fields_of(value: Any) -> dict[str, Any] | None:
    """Return the data of a dataclass' or model's instance; None of anything else.

    Left out is what its author left out, by ``field(compare=False)`` or pydantic's ``Field(exclude=True)``.
    """
    cls: Any = type(value)
    if not _is_data_class(cls):
        return None
    if dataclasses.is_dataclass(cls):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(cls) if field.compare}
    own = vars(value)
    kept = {name: own[name] for name, field in cls.model_fields.items() if name in own and not field.exclude}
    return {**kept, **(getattr(value, "__pydantic_extra__", None) or {})}


def _annotated(function: Any) -> Any:
    """Return the function, or class, whose annotations count for a callable."""
    while True:
        if isinstance(function, Task):
            function = function.run
        elif isinstance(function, functools.partial):
            function = function.func
        elif inspect.ismethod(function):
            function = function.__func__
        elif isinstance(function, type) or inspect.isroutine(function):
            return function
        else:
            function = getattr(function, "__wrapped__", type(function).__call__)


def _return_hint(function: Any) -> Any:
    """Return what a function returns by its annotation; raises if that can't be resolved.

    It is resolved alone: the hints of the arguments may name what only type checkers import.
    """
    if isinstance(function, type):
        return function
    hint = (getattr(function, "__annotations__", None) or {}).get("return")
    innermost = inspect.unwrap(function)
    alone = types.SimpleNamespace(
        __annotations__={"return": hint}, __type_params__=getattr(innermost, "__type_params__", ())
    )
    names = getattr(innermost, "__globals__", {})
    return typing.get_type_hints(alone, globalns=names, include_extras=True)["return"]


def _needs_shape(hint: Any) -> bool:
    return any(map(_is_data_class, _parts_of(hint)))


def _parts_of(hint: Any, seen: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Yield all that a hint names, e.g. of ``list[Order] | None`` list, Order and None."""
    if hint is None or any(hint is known for known in seen):
        return
    yield hint
    aliased = getattr(hint, "__supertype__", None), getattr(hint, "__value__", None)  # NewType and type statement
    for part in (typing.get_origin(hint), *typing.get_args(hint), *aliased):
        yield from _parts_of(part, (*seen, hint))


def _is_data_class(found: Any) -> bool:
    """Return whether this is a dataclass or a pydantic model, without importing pydantic."""
    return issubclass(type(found), type) and (
        dataclasses.is_dataclass(found)
        or any((base.__module__, base.__name__) == ("pydantic.main", "BaseModel") for base in found.__mro__)
    )


def _adapter_of(hint: Any) -> Any:
    try:
        hash(hint)
    except TypeError:  # Annotated may hold anything
        return _make_adapter(hint)
    return _cached_adapter(hint, repr(hint))


def _make_adapter(hint: Any) -> Any:
    try:
        from pydantic import TypeAdapter
    except ImportError as error:
        raise SerializationError(
            "dataclasses and models are kept by pydantic 2, which isn't installed: pip install celery-durable[pydantic]"
        ) from error
    return TypeAdapter(hint)


@functools.lru_cache(maxsize=256)
def _cached_adapter(hint: Any, _order: str) -> Any:
    """Unions of the same members in another order are equal, but don't do the same: hence their text."""
    return _make_adapter(hint)


def _kept_by_kombu(data: Any) -> Any:
    """Return plain data whose leaves are of types that kombu's JSON keeps."""
    if isinstance(data, dict):
        return {_as_json({key: None}).popitem()[0]: _kept_by_kombu(value) for key, value in data.items()}
    if isinstance(data, list | tuple | set | frozenset):
        return [_kept_by_kombu(value) for value in data]
    return data if type(data) in _KNOWN_TO_KOMBU else _as_json(data)


def _as_json(data: Any) -> Any:
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(data)


def _are_alike(one: Any, other: Any) -> bool:
    """Return whether two values hold the same data in the same classes, which may lack an ``__eq__``."""
    fields, others = fields_of(one), fields_of(other)
    if fields is not None or others is not None:
        return type(one) is type(other) and _are_alike(fields, others)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_are_alike(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_are_alike, one, other))
    return bool(one == other or (one != one and other != other))


def advice_on(value: Any) -> str:
    """Return what to do with a value that can't be serialized because a row of a database is in it; else nothing."""
    pending, seen = [value], 0
    while pending and seen < _MOST_LOOKED_AT:
        value, seen = pending.pop(), seen + 1
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            pending += value
        elif _is_row(type(value)):
            return f" Of {type(value).__qualname__} pass its key, and read it where it is needed."
    return ""


def _is_row(cls: type) -> bool:
    """Tell whether this is a model of Django's or SQLAlchemy's, by what both give to every one."""
    return (hasattr(cls, "_meta") and hasattr(cls, "pk")) or hasattr(cls, "_sa_class_manager")
