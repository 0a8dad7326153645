"""celery_durable, with a real worker."""

from __future__ import annotations

import importlib
import time
from typing import Any

from tests.benchmarks.contestants.contestant import Contestant
from tests.benchmarks.processes import CeleryWorker

APP = "tests.benchmarks.apps.durable"
#: Nobody takes messages from here until told to.
SIDING = "siding"

_RAN = "SELECT extract(epoch FROM finished_at - started_at)::float FROM celery_durable.workflow WHERE id = %s"
_CLAIMED = "SELECT extract(epoch FROM started_at)::float FROM celery_durable.workflow WHERE id = %s"
_IN_STATE = "SELECT count(*) FROM celery_durable.workflow WHERE state = %s"
#: The only step of one workflow as the many steps of another one.
_COPY = """
INSERT INTO celery_durable.checkpoint (workflow, key, seq, attempt, tries, ok, value, content_type, args, fingerprint,
    started_at, at)
SELECT %(to)s, CASE n WHEN 1 THEN key ELSE key || '#' || n END, n, 0, tries, ok, value, content_type, args, fingerprint,
    clock_timestamp(), clock_timestamp()
FROM celery_durable.checkpoint, generate_series(1, %(count)s) AS n WHERE workflow = %(of)s
"""


class Durable(Contestant):
    """Workflows of celery_durable, published by this process and run by one worker."""

    name = "celery_durable"
    #: All but the workers that are alive.
    emptying = """
        TRUNCATE celery_durable.workflow, celery_durable.input, celery_durable.output, celery_durable.checkpoint,
            celery_durable.message, celery_durable.event, celery_durable.awaiting, celery_durable.on_cancel,
            celery_durable.cancellation, celery_durable.attempt
    """

    def start(self) -> None:
        self.tasks: Any = importlib.import_module(APP)
        self.process = CeleryWorker(APP, self.concurrency, self.stage.log(self.name))

    def warm_up(self) -> None:
        self.whole("steps", 1)

    def whole(self, workflow: str, *arguments: Any) -> float:
        """Run a workflow: seconds from `delay()` to `get()`."""
        began = time.perf_counter()
        getattr(self.tasks, workflow).delay(*arguments).get(timeout=120)
        return time.perf_counter() - began

    def inside(self, workflow: str, *arguments: Any) -> float:
        """Run a workflow: seconds from its claim to its finish, as its row has them."""
        handle = getattr(self.tasks, workflow).delay(*arguments)
        handle.get(timeout=120)
        return self.rows(_RAN, (handle.id,))[0][0]

    def statements(self, count: int) -> float:
        """Make the statement of so many steps in a workflow, without steps: how many a second."""
        return count / self.tasks.statements.delay(count).get(timeout=120)

    def run(self, steps: int) -> tuple[float, float]:
        """Run a workflow: seconds from claim to finish, as its row has them, and from `delay()` to `get()`."""
        began = time.perf_counter()
        handle = self.tasks.steps.delay(steps)
        handle.get(timeout=120)
        whole = time.perf_counter() - began
        return self.rows(_RAN, (handle.id,))[0][0], whole

    def run_many(self, workflows: int, steps: int) -> float:
        """Run workflows at once: seconds from the first `delay()` to the last result."""
        began = time.perf_counter()
        for handle in [self.tasks.steps.delay(steps) for _ in range(workflows)]:
            handle.get(timeout=300)
        return time.perf_counter() - began

    def replay(self, steps: int) -> float:
        """Take up a workflow with so many completed steps: seconds from its claim until all of them were replayed.

        Their rows are made by SQL of a real one's, its fingerprint of the arguments included, so that all is checked.
        """
        real = self.tasks.equal_steps.delay(1)
        real.get(timeout=60)
        handle = self.tasks.equal_steps.apply_async((steps,), queue=SIDING)
        self.stage.execute(_COPY, {"of": real.id, "to": handle.id, "count": steps}, database=self.database)
        self.stage.execute("ANALYZE celery_durable.checkpoint", database=self.database)
        self.tasks.app.control.add_consumer(SIDING, reply=True, limit=1)
        replayed = handle.get(timeout=300)
        self.tasks.app.control.cancel_consumer(SIDING, reply=True, limit=1)
        return replayed - self.rows(_CLAIMED, (handle.id,))[0][0]

    def in_state(self, state: str) -> int:
        """How many workflows there are in a state."""
        return self.rows(_IN_STATE, (state,))[0][0]
