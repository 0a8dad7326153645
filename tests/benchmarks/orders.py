"""Orders to a process by its standard input, one line of JSON each, and its answers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any


def serve(duties: Mapping[str, Callable[..., Any]]) -> None:
    """Carry out orders until the input ends; what the duties print goes to the log."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _answer(answers, "ready")
    for line in sys.stdin:
        order = json.loads(line)
        _answer(answers, duties[order["do"]](**order["with"]))


def _answer(answers: Any, value: Any) -> None:
    print(json.dumps(value), file=answers, flush=True)
