"""The recovery as a task, and its entry in the beat schedule."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from celery import Celery

from .envelope import send_stored
from .installation import Installation

TASK = "celery_durable.recover"
#: Seconds that a sweep waits for a database that is away; the next one is due soon.
_PATIENCE = 2.0


def add_recovery(app: Celery, installation: Installation) -> None:
    """Register the task now, and its schedule entry when the app is finalized.

    Celery keeps an entry made then whatever the user assigns to ``beat_schedule`` before or after.
    """

    @app.task(name=TASK, shared=False, ignore_result=True, bind=True)
    def recover(self: Any) -> dict[str, int]:
        """Run all duties of the recovery once; return what each has found."""
        return installation.recovery(partial(send_stored, app), patience=_PATIENCE).sweep()

    def schedule(sender: Celery, **kwargs: Any) -> None:
        config = installation.read_config()
        task = sender.tasks[TASK]
        # Whole seconds: django-celery-beat stores no fractions. It keeps no `expires` of an entry either,
        # so that stands on the task.
        interval = max(1, math.ceil(config.recovery_interval))
        task.expires = interval
        options = {"queue": config.recovery_queue} if config.recovery_queue else {}
        sender.add_periodic_task(float(interval), task.s(), name=TASK, **options)

    if app.finalized:
        schedule(app)
    else:
        app.on_after_finalize.connect(schedule, weak=False)
