"""Absurd, with a worker process; its schema comes with `absurdctl`, so that nothing is downloaded."""

from __future__ import annotations

import importlib
import time

from tests.benchmarks.contestants.contestant import Contestant
from tests.benchmarks.processes import Process


class Absurd(Contestant):
    """Tasks of Absurd, spawned by this process."""

    name = "absurd"
    needs = ("absurd_sdk", "absurdctl")
    emptying = "TRUNCATE absurd.t_default, absurd.r_default, absurd.c_default, absurd.e_default, absurd.w_default"

    def start(self) -> None:
        self._make_schema()
        self.client = importlib.import_module("absurd_sdk").Absurd(self.database)
        self.client.create_queue("default")
        command = ["tests.benchmarks.apps.absurd", self.database, str(self.concurrency)]
        self.process = Process(command, self.stage.log(self.name))

    def warm_up(self) -> None:
        self.run(1)

    def stop(self) -> None:
        self.client.close()
        super().stop()

    def run(self, steps: int) -> tuple[float, float]:
        """Run a task: seconds from its first step to its last, in its body, and from its spawning to its result.

        The former is without claim and end, which celery_durable's has: in Absurd's favour. The latter has its polls:
        of the worker each 0.25 seconds, and of the waiting client.
        """
        began = time.perf_counter()
        task = self.client.spawn("steps", {"count": steps}, queue="default")
        inside = self.client.await_task_result(task["task_id"], timeout=120).result
        return float(inside), time.perf_counter() - began

    def _make_schema(self) -> None:
        if not self.rows("SELECT FROM pg_namespace WHERE nspname = 'absurd'"):
            self.stage.execute(importlib.import_module("absurdctl").BUNDLED_SCHEMA_SQL, database=self.database)
