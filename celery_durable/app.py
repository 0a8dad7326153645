"""``install()``: puts celery_durable together on a Celery app."""

from __future__ import annotations

import sys
from typing import Any

from celery import Celery

from . import flower
from .beat import add_recovery
from .config import Config
from .exceptions import ConfigurationError
from .groups import DurableGroupResult
from .installation import Installation, register, registered
from .logs import watch_celery
from .registration import watch
from .remote import add_step_task
from .store import check_url
from .task import Step, Workflow

#: What a worker runs of ours; by name, as only a worker needs what they bring along.
_WORKER_STEP = "celery_durable.worker:NodeStep"
_CONSUMER_STEP = "celery_durable.worker:UnknownTaskStep"


def install(app: Celery, **settings: Any) -> None:
    """Make an app's ``durable.Workflow`` tasks durable. Contacts neither the database nor the broker.

    ``settings`` are the ``durable_*`` settings without their prefix, and win over ``app.conf``; durations are
    in seconds or timedeltas. Calling it again with the same settings does nothing.

    Raises ConfigurationError for an unknown name (with the nearest one), a wrong value, a URL that can't be
    one, and for other settings than at an earlier call. What only ``app.conf`` says is checked when it is
    first used, and when a worker starts.
    """
    if not isinstance(app, Celery):
        raise ConfigurationError(f"durable.install() takes the Celery app first, not {type(app).__name__}.")
    _check(settings)
    earlier = registered(app)
    if earlier is not None:
        if settings and settings != earlier.settings:
            raise ConfigurationError(
                "celery_durable is already installed on this app with other settings: call durable.install() once."
            )
        return
    installation = Installation(app, settings)
    register(app, installation)
    watch(app, (Workflow, Step))
    watch_celery()
    app.steps["worker"].add(_WORKER_STEP)
    app.steps["consumer"].add(_CONSUMER_STEP)
    add_recovery(app, installation)
    add_step_task(app)
    if "celery.worker.control" in sys.modules:
        from . import control  # noqa: F401 - `celery inspect` and `celery control` know the names of commands
    app.GroupResult = app.subclass_with_self(DurableGroupResult, name="GroupResult", keep_reduce=True)
    if flower.is_starting():
        flower.install()


def _check(settings: dict[str, Any]) -> None:
    # Whether lease and heartbeat_interval fit is known when both are: one of them may be in app.conf.
    whole = {"lease", "heartbeat_interval"} <= settings.keys()
    (Config.from_settings if whole else Config.of_values)(settings)
    if "database_url" in settings and settings.get("database") is None:
        check_url(settings["database_url"])
