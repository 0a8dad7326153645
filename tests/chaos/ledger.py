"""What bodies say of themselves, outside the database: one JSON object a line, on a clock that no fault can move."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


def now() -> float:
    """Seconds on a clock that all processes share, and that a wrong system clock doesn't change."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that a process has done: a body's `begin`, `end` or `fail`, or a `rescue` by the recovery."""

    what: str
    workflow: str
    key: str = ""
    attempt: int = 0
    nonce: str = ""
    pid: int = 0
    at: float = 0.0


class Writer:
    """Appends entries. One write on an O_APPEND descriptor: lines never mix, and a SIGKILL can't lose one."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)

    def write(self, what: str, workflow: str, **facts: Any) -> None:
        """Append one entry of this process and this instant."""
        entry = Entry(what, workflow, pid=os.getpid(), at=now(), **facts)
        os.write(self._descriptor, (json.dumps(asdict(entry)) + "\n").encode())


def read(path: Path) -> Iterator[Entry]:
    """All entries, in the order of the writes."""
    if path.exists():
        with path.open() as lines:
            for line in lines:
                yield Entry(**json.loads(line))
