"""celery_durable, with real workers."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Sequence
from typing import Any

from tests.benchmarks.processes import CeleryWorker
from tests.benchmarks.stage import Stage

APP = "tests.benchmarks.apps.durable"

_RAN = "SELECT sum(extract(epoch FROM finished_at - started_at)) FROM celery_durable.workflow WHERE id = ANY (%s)"
#: Everything but the workers that are alive.
_EMPTY = """
TRUNCATE celery_durable.workflow, celery_durable.input, celery_durable.output, celery_durable.checkpoint,
    celery_durable.message, celery_durable.event, celery_durable.awaiting, celery_durable.on_cancel,
    celery_durable.cancellation, celery_durable.attempt
"""


class Durable:
    """Workflows of celery_durable, published by this process and run by one worker."""

    name = "celery_durable"
    needs: tuple[str, ...] = ()

    def __init__(
        self, stage: Stage, concurrency: int, settings: dict[str, Any] | None = None, options: Sequence[str] = ()
    ) -> None:
        self.stage, self.database = stage, stage.database(self.name)
        self._concurrency, self._options = concurrency, options
        self._env = {"BENCH_SETTINGS": json.dumps(settings or {})}

    def __enter__(self) -> Durable:
        self.tasks: Any = importlib.import_module(APP)
        self.worker = CeleryWorker(
            APP, self._concurrency, self.stage.log(self.name), self._env, ["--hostname=durable@bench", *self._options]
        )
        self.run(1)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.worker.stop()

    def empty(self) -> None:
        """Forget all workflows."""
        self.stage.execute(_EMPTY, self.database)

    def run(self, steps: int) -> tuple[float, float]:
        """Run a workflow: seconds from claim to finish, as its row has them, and from `delay()` to `get()`."""
        began = time.perf_counter()
        handle = self.tasks.steps.delay(steps)
        handle.get(timeout=120)
        whole = time.perf_counter() - began
        ((inside,),) = self.stage.rows(_RAN, ([handle.id],), self.database)
        return float(inside), whole

    def run_many(self, workflows: int, steps: int) -> float:
        """Run workflows at once: seconds from the first `delay()` to the last result."""
        began = time.perf_counter()
        for handle in [self.tasks.steps.delay(steps) for _ in range(workflows)]:
            handle.get(timeout=300)
        return time.perf_counter() - began
