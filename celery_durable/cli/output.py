"""What commands print: JSON for scripts, and text that can't steer the terminal, whatever it was made of."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from datetime import datetime
from typing import Any

import click

#: Characters of a value in a table.
LONGEST_VALUE = 2_000
#: Bits of a number that Python is willing to write in decimals.
_LONGEST_INT = 10_000
#: Levels of a value: Python can't write it down to any depth, and one value must not hide the rest.
_DEEPEST = 100
_UNITS: tuple[tuple[int, str, int, str], ...] = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))


def echo_json(value: Any) -> None:
    """Print a value as JSON, in plain ASCII."""
    click.echo(json.dumps(as_json(value), indent=2))


def as_json(value: Any, depth: int = 0) -> Any:
    """Return a value as JSON has it: dataclasses by their fields, times in ISO 8601, anything else by its repr."""
    if depth > _DEEPEST:
        return "<nested too deeply to be shown>"
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value if value.bit_length() <= _LONGEST_INT else text_of(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, BaseException):
        return _error(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name), depth + 1) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else text_of(key): as_json(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(each, depth + 1) for each in value]
    return text_of(value)


def text_of(value: Any) -> str:
    """Return a value's repr; that of anybody's class may fail."""
    from ..text import qualname_of

    try:
        return str(repr(value))
    except Exception:  # noqa: BLE001 - a broken __repr__ must not hide the rest
        return f"<{qualname_of(type(value))}>"


def line(text: str) -> str:
    """Return text in one line, in which everything that isn't printed as it is stands as its escape sequence."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def short(text: str, limit: int = LONGEST_VALUE) -> str:
    """Return text in one line of bounded length."""
    return line(text if len(text) <= limit else f"{text[: limit - 1]}…")


def moment(at: datetime | None) -> str:
    """Return a time in the local time zone; nothing for none."""
    return "" if at is None else f"{at.astimezone():%Y-%m-%d %H:%M:%S}"


def duration(seconds: float) -> str:
    """Return a duration in the two units that matter."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    size, unit, smaller, rest_unit = next(each for each in _UNITS if seconds >= each[0])
    whole, rest = divmod(seconds, size)
    return f"{whole:.0f} {unit} {rest // smaller:.0f} {rest_unit}"


def number(count: int, most: int | None = None) -> str:
    """Return a count for people, of which it may be known only that it is at least ``most``."""
    return f"{count:,}+" if most is not None and count >= most else f"{count:,}"


@contextmanager
def progress(label: str, length: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show how far long work has come, on a terminal; gives what is called with how many are done now."""
    err = sys.stderr
    if not err.isatty():
        yield lambda done: None
        return
    # Without a length click wants something to go through; it isn't gone through.
    things: Iterator[int] | None = None if length is not None else (each for each in range(0))
    bar: Any = click.progressbar(things, length, label, file=err, show_pos=True)
    with bar:
        yield bar.update


def _error(error: BaseException) -> dict[str, str]:
    from ..text import qualname_of, safe_str

    return {"type": qualname_of(type(error)), "message": safe_str(error)}
