"""The recovery as a task, and its entry in the beat schedule; workflows that beat starts, once a tick."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from celery import Celery, signals

from .installation import Installation
from .late import late

if TYPE_CHECKING:
    from . import envelope
else:
    envelope = late("envelope")

TASK = "celery_durable.recover"
#: Seconds that a sweep waits for a database that is away; the next one is due soon.
_PATIENCE = 2.0
#: What tells the ticks of calendars apart, in seconds.
_MINUTE = 60.0
#: How far back the last tick of a calendar is looked for: crontabs may be due each 29th of February.
_FURTHEST = timedelta(days=3000)
_TICKS = uuid.UUID("f0b7c1de-3c1e-4b6e-8a0d-2d6f2f1f9b1a")


def add_recovery(app: Celery, installation: Installation) -> None:
    """Register the task now, and its schedule entry when the app is finalized.

    Celery keeps an entry made then whatever the user assigns to ``beat_schedule`` before or after.
    """

    @app.task(name=TASK, shared=False, ignore_result=True, bind=True)
    def recover(self: Any) -> dict[str, int]:
        """Run all duties of the recovery once; return what each has found."""
        return installation.recovery(partial(envelope.send_stored, app), sweeper="beat", patience=_PATIENCE).sweep()

    def schedule(sender: Celery, **kwargs: Any) -> None:
        config = installation.read_config()
        task = sender.tasks[TASK]
        # Whole seconds: django-celery-beat stores no fractions. It keeps no `expires` of an entry either,
        # so that stands on the task.
        interval = max(1, math.ceil(config.recovery_interval))
        task.expires = interval
        options = {"queue": config.recovery_queue} if config.recovery_queue else {}
        sender.add_periodic_task(float(interval), task.s(), name=TASK, **options)

    signals.beat_init.connect(_watch, dispatch_uid="celery_durable")
    signals.beat_embedded_init.connect(_watch, dispatch_uid="celery_durable")
    if app.finalized:
        schedule(app)
    else:
        app.on_after_finalize.connect(schedule, weak=False)


def _watch(sender: Any, **kwargs: Any) -> None:
    """Let a beat start each workflow under an id that follows from entry and tick: a second beat starts no other."""
    scheduler = sender.scheduler
    send = scheduler.apply_async

    def apply_async(entry: Any, producer: Any = None, advance: bool = True, **kwargs: Any) -> Any:
        task = scheduler.app.tasks.get(entry.task)
        # A task that isn't known here may be a workflow where it runs.
        is_plain = task is not None and not getattr(task, "is_durable_workflow", False)
        if is_plain or "task_id" in (entry.options or {}):
            return send(entry, producer=producer, advance=advance, **kwargs)
        if advance:
            entry = scheduler.reserve(entry)
        # A copy: what this tick has for an id must not stay in the schedule. Celery's entries say how they are copied,
        # which is wrong of those of django-celery-beat.
        named = object.__new__(type(entry))
        vars(named).update(vars(entry), options={**(entry.options or {}), "task_id": _id_of_tick(entry, time.time())})
        return send(named, producer=producer, advance=False, **kwargs)

    scheduler.apply_async = apply_async


def _id_of_tick(entry: Any, now: float) -> str:
    """Return an id that any beat has for an entry in the same interval of the clock, or since the same due time."""
    interval = getattr(entry.schedule, "run_every", None)
    if interval is not None:
        tick = math.floor(now / (interval.total_seconds() or _MINUTE))
    else:
        tick = math.floor(_last_due(entry.schedule, now) / _MINUTE)
    return str(uuid.uuid5(_TICKS, f"{entry.name}\x00{tick}"))


def _last_due(schedule: Any, now: float) -> float:
    """Return when a calendar's schedule was last due, by its own arithmetic; now, if it doesn't say.

    A beat that comes late, or was restarted and catches up, starts what was due then, not what is due now.
    """
    try:
        return _newest(_due_after(schedule), datetime.fromtimestamp(now, schedule.tz)).timestamp()
    except Exception:  # noqa: BLE001 - a schedule may be anybody's code
        return now


def _due_after(schedule: Any) -> Callable[[datetime], datetime]:
    """Return what tells when a schedule is due next after a moment."""
    then = object.__new__(type(schedule))  # copy.copy() would make it anew, without its app and its time zone
    vars(then).update(vars(schedule))

    def due_after(moment: datetime) -> datetime:
        then.nowfun = lambda: moment
        due: datetime = moment + then.remaining_estimate(moment)
        return due

    return due_after


def _newest(due_after: Callable[[datetime], datetime], now: datetime) -> datetime:
    """Return the newest due time until now: looked for further and further back, then closer and closer to now."""
    minute = timedelta(seconds=_MINUTE)
    back = minute
    while (tick := due_after(now - back)) > now:
        if back > _FURTHEST:
            return now
        back *= 2
    late = now
    while late - tick >= minute and tick < (following := due_after(tick)) <= now:
        middle = tick + (late - tick) / 2
        if (found := due_after(middle)) <= now:
            tick = found
        else:
            tick, late = following, middle
    return tick
