"""What all handlers do: read what a request says, ask the database in a thread, tell what went wrong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ..exceptions import DurableError, WorkflowConflict, WorkflowNotFound

logger = logging.getLogger("celery_durable")

T = TypeVar("T")

#: Of our own, so that a database that hangs takes no thread from Flower.
_THREADS = ThreadPoolExecutor(5, thread_name_prefix="durable-flower")


async def in_thread(function: Callable[[], T]) -> T:
    """Run what reads or writes the database beside Flower's loop."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, function)


def status_of(error: Exception) -> int:
    """Return the HTTP status of an error that an answer tells; one that only an operator can mend is logged, too."""
    if isinstance(error, WorkflowNotFound):
        return 404
    if isinstance(error, WorkflowConflict):
        return 409
    if not isinstance(error, DurableError):
        return 400
    logger.warning("Flower can't show or steer workflows: %s", error)
    return 503


def said(arguments: Mapping[str, Sequence[bytes]], name: str) -> list[str]:
    """Return the values of an argument as they were sent: Flower's own way would strip and escape them.

    Raises ValueError for what isn't text.
    """
    try:
        return [value.decode() for value in arguments.get(name, ())]
    except UnicodeDecodeError:
        raise ValueError(f"{name} isn't UTF-8.") from None


def last_said(arguments: Mapping[str, Sequence[bytes]], name: str) -> str | None:
    """Return the last value of an argument."""
    return next(reversed(said(arguments, name)), None)
