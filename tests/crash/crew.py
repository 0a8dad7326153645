"""Workers that many tests share, and replace as they die."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from celery import Celery

import celery_durable as durable
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.ledger import Ledger
from tests.fixtures.workers import Worker, Workers, is_alive

APP = "tests.fixtures.apps.crashing:app"
SETTINGS = {
    "heartbeat_interval": 0.2,
    "lease": 1.5,
    "recovery_interval": 0.2,
    "republish_after": 1,
    "suspend_after": 0.2,
    "step_events": True,
}
#: Body runs of `everything` when nothing goes wrong.
RUNS = {"plain": 1, "flaky": 2, "patient": 2, "last": 1}
RESULT = ["plain", "flaky", "patient", "last"]
#: Long enough for a lease, a lost message and a worker's start on a busy machine.
PATIENCE = 40


class Crew:
    """Some workers of `tests/fixtures/apps/crashing.py`, a client beside them, and all that they leave behind."""

    def __init__(
        self, directory: Path, database_url: str, broker: Broker, worker_database_url: str | None = None, size: int = 2
    ) -> None:
        self._directory = directory
        self.plans = directory / "plans"
        self.plans.mkdir()
        self.ledger = Ledger(directory / "ledger")
        self.database_url = database_url
        self.sql = Sql(database_url)
        backend = broker.url if broker.url.startswith("redis") else ""
        self.env = {
            "DATABASE_URL": worker_database_url or database_url,
            "BROKER_URL": broker.url,
            "RESULT_BACKEND": backend,
            "CELERY_DURABLE_TEST_QUEUE": broker.queue,
            "DURABLE_SETTINGS": json.dumps(SETTINGS),
            "LEDGER": str(self.ledger.path),
            "CRASH_PLANS": str(self.plans),
        }
        self.client = client_of(self.env, worker_database_url or database_url)
        self.factory = Workers(self.env, directory)
        self.workers: list[Worker] = []
        self._size = size
        self._shown: dict[Path, int] = {}

    def muster(self, pool: str = "prefork", concurrency: int = 2) -> None:
        """Replace whoever has died, and return when all are at work."""
        self.workers = [worker for worker in self.workers if worker.running]
        while len(self.workers) < self._size:
            self.enlist(pool, concurrency)
        for worker in self.workers:
            worker.wait_ready()

    def enlist(self, pool: str = "prefork", concurrency: int = 2, **options: Any) -> Worker:
        """Start one more worker, without waiting for it."""
        worker = self.factory.start(APP, pool, concurrency, args=("--without-gossip",), wait=False, **options)
        self.workers.append(worker)
        return worker

    def plan(self, hook: str, nth: int = 1, whom: str = "process") -> str:
        """Lay out a crash, and return the id for the workflow that is to suffer it."""
        workflow_id = new_id()
        (self.plans / workflow_id).write_text(f"{hook} {nth} {whom}")
        return workflow_id

    def await_kill(self, workflow_id: str) -> None:
        """Return once the planned crash has happened, and its victims are gone."""
        done = self.plans / f"{workflow_id}.done"
        wait_until(done.exists, PATIENCE, "the kill is about to happen")
        victims = [int(pid) for pid in done.read_text().split()]
        wait_until(lambda: not any(map(_lives, victims)), message="the victims are gone")

    def start(self, name: str, workflow_id: str | None = None) -> str:
        """Start a workflow, and return its id."""
        return str(self.client.tasks[name].apply_async(task_id=workflow_id or new_id()).id)

    def open_gate(self, workflow_id: str) -> None:
        """Let a waiting body go on."""
        (self.plans / f"{workflow_id}.open").touch()

    def at_gate(self, workflow_id: str, name: str = "step") -> None:
        """Return once the workflow waits at a gate."""
        wait_until(lambda: self.ledger.count(f"at-{name}", workflow_id), PATIENCE, "the body waits at its gate")

    def row(self, workflow_id: str) -> Any:
        """The workflow's row."""
        return self.sql.one("SELECT * FROM celery_durable.workflow WHERE id = %s", workflow_id)

    def worker_of(self, workflow_id: str) -> Worker:
        """The worker that runs a workflow."""
        pid = self.sql.value(
            "SELECT n.pid FROM celery_durable.workflow w JOIN celery_durable.node n ON n.id = w.node WHERE w.id = %s",
            workflow_id,
        )
        return next(worker for worker in self.workers if worker.pid == pid)

    def runner_of(self, worker: Worker) -> psutil.Process:
        """The only pool process of a worker."""
        (process,) = worker.children()
        return process

    def result(self, workflow_id: str) -> Any:
        """Wait until the workflow has succeeded and Celery has delivered that; return what all sides agree on."""
        wait_until(lambda: self._is_settled(workflow_id), PATIENCE, lambda: f"{self.row(workflow_id)} is settled")
        status = durable.get_workflow_status(workflow_id, app=self.client)
        assert status.error is None
        if self.env["RESULT_BACKEND"]:
            assert self.client.AsyncResult(workflow_id).result == status.result
        return status.result

    def runs(self, workflow_id: str) -> dict[str, int]:
        """How often each body of a workflow has run."""
        return {name: self.ledger.count(name, workflow_id) for name in RUNS}

    def witnesses(self) -> int:
        """How many nodes were heard for a lease without a gap, and can tell that another one is silent."""
        return int(
            self.sql.value(
                "SELECT count(*) FROM celery_durable.node "
                "WHERE unbroken < clock_timestamp() - lease AND seen > clock_timestamp() - lease / 2"
            )
        )

    def show_logs(self) -> None:
        """Print what the workers have logged since the last time; pytest shows it if a test fails."""
        for path in sorted(self._directory.glob("worker*.log")):
            log = path.read_text(errors="replace")
            if new := log[self._shown.get(path, 0) :]:
                print(f"--- {path.name} ---\n{new}")
            self._shown[path] = len(log)
        print(*self.sql.all("SELECT * FROM celery_durable.node ORDER BY started_at"), sep="\n")

    def disband(self) -> None:
        """Kill all workers."""
        self.factory.kill_all()
        self.sql.close()

    def _is_settled(self, workflow_id: str) -> bool:
        row = self.row(workflow_id)
        return row.state == "SUCCESS" and row.dispatched and row.node is None


@contextmanager
def crew(*args: Any, **kwargs: Any) -> Iterator[Crew]:
    """A crew that is disbanded at the end."""
    made = Crew(*args, **kwargs)
    try:
        yield made
    finally:
        made.disband()


def client_of(env: dict[str, str], database_url: str) -> Celery:
    """An app that only starts workflows, as a web process does."""
    client = Celery("client", broker=env["BROKER_URL"], backend=env["RESULT_BACKEND"] or None, set_as_current=False)
    client.conf.task_default_queue = env["CELERY_DURABLE_TEST_QUEUE"]
    durable.install(client, database_url=database_url, **SETTINGS)
    for name in ("everything", "gated", "between", "waits"):
        client.task(base=durable.Workflow, name=name)(_only_started)
    client.finalize()
    return client


def _only_started() -> None:
    raise AssertionError("a client runs nothing")


def _lives(pid: int) -> bool:
    try:
        return is_alive(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def new_id() -> str:
    """An id that no other test uses."""
    return uuid.uuid4().hex
