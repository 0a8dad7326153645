"""Durable sleep: ``durable.sleep``, ``durable.sleep_until``."""

from __future__ import annotations

from collections.abc import Coroutine
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Any

from .calls import awaited, bind, only_in_workflow, run_here
from .config import LONGEST
from .config import duration as duration_of
from .engine.context import Attempt, in_plain_function
from .engine.wait import sleep as sleep_of

_WHAT = "sleep durably"


def sleep(duration: float | timedelta) -> None:
    """Let so much time pass, in seconds or a timedelta, without holding a worker.

    When it ends is fixed by the database's clock at the first call, and kept over every crash; it never ends early.
    Up to the setting ``suspend_after`` the workflow waits in place. Longer, it unwinds (``finally`` blocks run) and is
    replayed by any worker when the time has come. In a workflow function that is called directly, or in eager mode, no
    time passes.

    Raises ValueError for a negative or impossible duration, NotInWorkflow, NotAllowedInStep.
    """
    _sleep(duration_of(duration, "duration"), None, "await durable.asleep(…)")


def sleep_until(moment: datetime) -> None:
    """Let time pass until a moment, which must have a time zone; one in the past is no sleep. As ``sleep``.

    Raises ValueError for a naive datetime, and for one more than 100 years away.
    """
    _sleep(None, _aware(moment), "await durable.asleep_until(…)")


def asleep(duration: float | timedelta) -> Coroutine[Any, Any, None]:
    """Return what an async workflow awaits to let so much time pass, as ``sleep``.

    While other steps or tasks of the workflow go on, it sleeps in place; when nothing else does, the worker is given
    back.
    """
    return _asleep(duration_of(duration, "duration"), None, "durable.sleep(…)")


def asleep_until(moment: datetime) -> Coroutine[Any, Any, None]:
    """Return what an async workflow awaits to sleep until a moment, as ``sleep_until``."""
    return _asleep(None, _aware(moment), "durable.sleep_until(…)")


def _sleep(duration: float | None, until: datetime | None, instead: str) -> None:
    attempt = _sleeper()
    if attempt is not None:
        run_here(attempt, partial(sleep_of, bind(attempt, "sleep"), duration, until), instead)


def _asleep(duration: float | None, until: datetime | None, instead: str) -> Coroutine[Any, Any, None]:
    attempt = _sleeper()
    if attempt is None:
        return _nothing()
    return awaited(attempt, partial(sleep_of, bind(attempt, "sleep"), duration, until), instead)


def _sleeper() -> Attempt | None:
    return None if in_plain_function() else only_in_workflow(_WHAT)


async def _nothing() -> None:
    return None


def _aware(moment: datetime) -> datetime:
    if not isinstance(moment, datetime) or moment.utcoffset() is None:
        raise ValueError(
            f"{moment!r} isn't a moment: pass a datetime with a time zone, such as datetime.now(timezone.utc) + delta."
        )
    if (moment - datetime.now(timezone.utc)).total_seconds() > LONGEST:
        raise ValueError(f"A workflow can't sleep until {moment}: the longest sleep is 100 years.")
    return moment
