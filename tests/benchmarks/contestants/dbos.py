"""DBOS, in a process of its own that starts its workflows, too."""

from __future__ import annotations

from tests.benchmarks.processes import Servant
from tests.benchmarks.stage import Stage

_EMPTY = "TRUNCATE dbos.workflow_status, dbos.workflow_input, dbos.workflow_output, dbos.operation_outputs CASCADE"


class Dbos:
    """Workflows of DBOS."""

    name = "dbos"
    needs = ("dbos",)

    def __init__(self, stage: Stage, concurrency: int) -> None:
        self.stage, self.database, self._concurrency = stage, stage.database(self.name), concurrency

    def __enter__(self) -> Dbos:
        command = ["tests.benchmarks.apps.dbos", self.database, str(self._concurrency)]
        self.process = Servant(command, self.stage.log(self.name))
        self.run(1)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.stop()

    def empty(self) -> None:
        """Forget all workflows."""
        self.stage.execute(_EMPTY, self.database)

    def run(self, steps: int) -> tuple[float, float]:
        """Run a workflow: seconds from its first step to its last, in its body, and from its start to its result.

        The former is without the start and the end, which celery_durable's has: in DBOS's favour.
        """
        took = self.process.ask("run", count=steps)
        return took["inside"], took["whole"]

    def run_many(self, workflows: int, steps: int) -> float:
        """Run workflows at once: seconds from the first start to the last result."""
        return self.process.ask("run_many", count=steps, workflows=workflows)["whole"]
