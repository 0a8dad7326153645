"""Values, times and sizes as text that a page bears. Escaping is the templates' and the drawing's."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, tzinfo
from typing import Any

from ..client import Omitted
from ..text import printable, safe_str

#: Characters of one value.
MOST = 10_000
#: Characters of a value that stands in one line.
_LINE = 80
_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def value(found: Any, most: int = MOST) -> str:
    """Return a value as JSON, or else as Python shows it; of one that isn't there, why."""
    if isinstance(found, Omitted):
        return f"{size(found.size)}: too large for this page."
    if isinstance(found, BaseException):
        return printable(safe_str(found), most)
    try:
        text = json.dumps(found, ensure_ascii=False)
        if len(text) > _LINE and _is_nested(found):
            text = json.dumps(found, ensure_ascii=False, indent=2)
    except Exception:  # noqa: BLE001 - a value may refuse in any way, and is then told by its repr
        text = _repr(found)
    return printable(text, most)


def duration(seconds: float) -> str:
    """Return a length of time, in its two largest units."""
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if seconds < 0.0995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds % 1 else f"{seconds:.0f} s"
    return _in_units(round(seconds))


def moment(time: datetime | None, zone: tzinfo) -> str:
    """Return a point in time with its milliseconds and its zone."""
    if time is None:
        return ""
    local = time.astimezone(zone)
    return f"{local:%Y-%m-%d %H:%M:%S}.{local.microsecond // 1000:03} {local:%Z}".strip()


def second(time: datetime, zone: tzinfo) -> str:
    """Return a point in time to the second, where the zone is told besides."""
    return f"{time.astimezone(zone):%Y-%m-%d %H:%M:%S}"


def module(name: str) -> str:
    """Return what stands before the last part of a task's name, or of a step's key."""
    return name[: len(name) - len(last(name))]


def last(name: str) -> str:
    """Return the last part of a task's name, or of a step's key: most likely that of its function."""
    dotted, mark, rest = name.partition("[")
    parts = dotted.split(".")
    # durable.sleep, shop.charge.delay
    count = 2 if parts[0] == "durable" or parts[-1].partition("#")[0] == "delay" else 1
    return ".".join(parts[-count:]) + mark + rest


def clock(time: datetime, zone: tzinfo, *, with_day: bool) -> str:
    """Return the time of day, with the day where that isn't always the same."""
    local = time.astimezone(zone)
    return f"{local:%b %d} {local:%H:%M:%S}" if with_day else f"{local:%H:%M:%S}"


def size(count: int) -> str:
    """Return a number of bytes."""
    if count < 1024:
        return f"{count} bytes"
    return f"{count / 1024:.1f} KiB" if count < 1024**2 else f"{count / 1024**2:.1f} MiB"


def number(count: int, most: int) -> str:
    """Return a count that was only made up to a bound."""
    return f"{count:,}" if count < most else f"{most:,}+"


def between(start: datetime | None, end: datetime | None) -> str:
    """Return how long it was from one time to another; nothing, if one of them isn't known."""
    return duration((end - start).total_seconds()) if start is not None and end is not None else ""


def ago(time: timedelta | float | None) -> str:
    """Return how long something has been."""
    if time is None:
        return "never"
    seconds = time.total_seconds() if isinstance(time, timedelta) else time
    return f"{duration(max(0.0, seconds))} ago"


def lag(seconds: float | None) -> str:
    """Return by how much something is late."""
    return "nothing" if not seconds else duration(max(0.0, seconds))


def _is_nested(found: Any) -> bool:
    return isinstance(found, dict) or (isinstance(found, list | tuple) and any(map(_is_nested, found)))


def _in_units(seconds: int) -> str:
    parts: list[str] = []
    for name, length in _UNITS:
        count, seconds = divmod(seconds, length)
        if count or parts:
            parts.append(f"{count} {name}" if count else "")
        if len(parts) == 2:
            break
    return " ".join(filter(None, parts))


def _repr(found: Any) -> str:
    try:
        return str.__str__(repr(found))
    except Exception:  # noqa: BLE001 - a broken __repr__ must not hide the page
        return f"<{type(found).__name__}>"
