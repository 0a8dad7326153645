"""DBOS, in a process of its own that starts its workflows, too."""

from __future__ import annotations

from tests.benchmarks.contestants.contestant import Contestant
from tests.benchmarks.processes import Servant


class Dbos(Contestant):
    """Workflows of DBOS."""

    name = "dbos"
    needs = ("dbos",)
    emptying = (
        "TRUNCATE dbos.workflow_status, dbos.workflow_input, dbos.workflow_output, dbos.operation_outputs CASCADE"
    )

    def start(self) -> None:
        command = ["tests.benchmarks.apps.dbos", self.database, str(self.concurrency)]
        self.process = Servant(command, self.stage.log(self.name))

    def warm_up(self) -> None:
        self.process.wait_ready()
        self.run(1)

    def run(self, steps: int) -> tuple[float, float]:
        """Run a workflow: seconds from its first step to its last, in its body, and from its start to its result.

        The former is without the start and the end, which celery_durable's has: in DBOS's favour.
        """
        took = self.process.ask("run", count=steps)
        return took["inside"], took["whole"]

    def run_many(self, workflows: int, steps: int) -> float:
        """Run workflows at once: seconds from the first start to the last result."""
        return self.process.ask("run_many", count=steps, workflows=workflows)["whole"]

    def replay(self, steps: int) -> float:
        """Fork a workflow behind so many completed steps: seconds from its first step to its last, in its body."""
        return self.process.ask("replay", count=steps)["inside"]
