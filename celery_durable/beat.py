"""The recovery as a task, and its entry in the beat schedule."""

from __future__ import annotations

import math
from typing import Any

from celery import Celery

from . import broker
from .envelope import send_all
from .installation import Installation
from .store.rows import StoredMessage

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

        def send(messages: list[StoredMessage]) -> list[str]:
            with broker.producer(app) as producer:
                return send_all(app, producer, messages)

        return installation.recovery(send, patience=_PATIENCE).sweep()

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
