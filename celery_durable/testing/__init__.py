"""Public helpers for tests: runs in process, crashes, replays, histories, and embedded servers.

The fixtures are those of the pytest plugin ``celery_durable.testing.plugin``; all that is here does without pytest.
``servers`` has an embedded Postgres and an embedded broker.
"""

from __future__ import annotations

from .crashes import Survival, survives_crashes
from .history import History, HistoryStep, history_of
from .replaying import replay
from .runs import Run, deliver, with_steps_done

__all__ = [
    "History",
    "HistoryStep",
    "Run",
    "Survival",
    "deliver",
    "history_of",
    "replay",
    "survives_crashes",
    "with_steps_done",
]
