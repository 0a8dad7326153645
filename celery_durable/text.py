"""Text for people: of bounded length, as Postgres stores it, whatever an object says of itself."""

from __future__ import annotations

from typing import Any

REPR_LIMIT = 1024
#: Types whose ``repr`` says all of a value.
_EXACT = frozenset({str, int, float, bool, bytes, type(None)})
_QUALNAME = vars(type)["__qualname__"]


class Hidden(str):
    """Text that isn't shown where variables are: trackers of errors show those of every frame."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'…'"


def printable(text: str, limit: int = REPR_LIMIT) -> str:
    """Return text that Postgres stores as it is: no NUL, no lone surrogates, not too long."""
    if len(text) <= limit and text.isascii() and "\x00" not in text:
        return text
    text = text[: limit + 1].replace("\x00", "\\x00")
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return text.encode("utf-8", "backslashreplace").decode()


def is_storable(value: Any) -> bool:
    """Tell whether this is text as Postgres' own can be."""
    return isinstance(value, str) and value == printable(value, len(value))


def call_repr(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return the arguments of a call as text for people, of bounded length."""
    parts = [_safe_repr(arg) for arg in args] + [f"{name}={_safe_repr(value)}" for name, value in kwargs.items()]
    return printable(", ".join(parts), REPR_LIMIT)


def says_all(text: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether this text, which ``call_repr`` has made, can be that of no other arguments than these.

    So it is for plain values alone: of anything else the text may leave something out.
    """
    if text is None or len(text) >= REPR_LIMIT:
        return False
    is_exact = _EXACT.issuperset(map(type, args)) and _EXACT.issuperset(map(type, kwargs.values()))
    return is_exact and all(map(str.isidentifier, kwargs)) and call_repr(args, kwargs) == text


def safe_str(error: BaseException) -> str:
    """Return an error's text; one whose ``__str__`` is broken is told by its class."""
    try:
        return _exactly(str(error))
    except Exception:  # noqa: BLE001 - a broken __str__ must not hide the error
        return f"<{qualname_of(type(error))} whose text can't be made>"


def summary(error: BaseException) -> str:
    """Return an error's class and text as a short line."""
    text = " ".join(printable(safe_str(error), 2 * REPR_LIMIT).split())
    return printable(f"{qualname_of(type(error))}: {text}", 300)


def qualname_of(cls: type) -> str:
    """Return the name of a class, whose metaclass may have another idea of it."""
    return _exactly(_QUALNAME.__get__(cls))


def _safe_repr(value: Any) -> str:
    try:
        return _exactly(repr(value))
    except Exception:  # noqa: BLE001 - a broken __repr__ must not break the step
        return f"<{qualname_of(type(value))}>"


def _exactly(text: str) -> str:
    """Return text as str itself: that of a __str__ or __repr__ may be of a subclass with methods of its own."""
    return str.__str__(text)
