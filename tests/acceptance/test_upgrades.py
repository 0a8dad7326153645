"""Upgrades: what an earlier release has left goes on, and both releases run side by side."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import celery_durable as durable
from celery_durable.states import FINAL
from celery_durable.store.migrate import migrate, missing_in
from tests.fixtures import releases
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.gates import Gates
from tests.fixtures.ledger import Ledger
from tests.fixtures.site import FAST, forget, load, shop_env
from tests.fixtures.tables import TABLES
from tests.fixtures.workers import Worker, Workers

pytestmark = [pytest.mark.crash, pytest.mark.slow]

APP = "tests.fixtures.apps.released"
#: Old code knows these settings, too; nothing is pruned.
FOR_EVER = {**FAST, "retention": 90 * 365 * 86400, "suspend_after": 0}
MIGRATE = "import sys; from celery_durable.store.migrate import migrate; migrate(sys.argv[1])"


@pytest.fixture
def worker_env(empty_database_url: str, broker: Broker, ledger: Ledger) -> dict[str, str]:
    """What the app reads from its environment."""
    return shop_env(empty_database_url, broker.url, broker.queue, ledger, **FOR_EVER)


@pytest.fixture
def sql(empty_database_url: str) -> Iterator[Sql]:
    """`Sql` on the database that is upgraded."""
    with closing(Sql(empty_database_url)) as helper:
        yield helper


@pytest.fixture
def shipping(workers: Workers) -> Iterator[Any]:
    """The app of the earlier release, as a producer of this one has it."""
    module = load(APP, workers.env)
    yield module
    module.app.close()
    forget(APP)


@pytest.fixture
def gates(ledger: Ledger) -> Gates:
    """Gates at which bodies wait."""
    return Gates(ledger.path)


@pytest.fixture
def old_code(tmp_path: Path) -> Path:
    """Where the code is that knows the first schema only."""
    return releases.code_before(2, tmp_path / "released")


def start(workers: Workers, root: Path | None = None, **options: Any) -> Worker:
    """A worker with places for all that waits at gates: of this release, or of another one's code."""
    place = {} if root is None else {"root": root}
    worker: Worker = workers.start(app=f"{APP}:app", concurrency=12, **place, **options)
    return worker


def states(shipping: Any, *ids: str) -> dict[str, str]:
    return {each: durable.get_workflow_status(each, app=shipping.app).state for each in ids}


def result(shipping: Any, workflow_id: str, state: str = "SUCCESS") -> Any:
    """Wait for the end of a workflow; its result."""
    wait_until(
        lambda: durable.get_workflow_status(workflow_id, app=shipping.app).state in FINAL,
        60,
        lambda: f"it has finished: {durable.get_workflow_status(workflow_id, app=shipping.app)}",
    )
    status = durable.get_workflow_status(workflow_id, app=shipping.app)
    assert status.state == state, status
    return status.result


@pytest.mark.parametrize("dump", releases.DUMPS, ids=lambda dump: dump.stem)
def test_what_an_earlier_release_has_left(
    workers: Workers, sql: Sql, shipping: Any, ledger: Ledger, empty_database_url: str, broker: Broker, dump: Path
) -> None:
    """All that lived comes to its end past its steps; what had ended is read, resumed and pruned."""
    releases.load(dump, sql)
    sql.execute("UPDATE celery_durable.workflow SET queue = %s", broker.queue)
    sql.execute("UPDATE celery_durable.on_cancel SET queue = %s", broker.queue)
    migrate(empty_database_url)
    ended = {"shipped": "SUCCESS", "refused": "FAILURE", "dropped": "DEAD", "cancelled": "CANCELLED"}
    assert states(shipping, *ended) == ended
    assert durable.get_workflow_status("shipped", app=shipping.app).result == [0, 1, 2]
    assert isinstance(durable.get_workflow_status("refused", app=shipping.app).error, ValueError)
    steps = durable.list_workflow_steps("asking", app=shipping.app)
    assert [step.output for step in steps] == [None, {"first": 1}, 0]

    worker = start(workers)
    assert result(shipping, "running") == [0, 1, 2]
    assert result(shipping, "enqueued") == [0, 1, 2]
    assert result(shipping, "stored") == [0, 1]
    assert result(shipping, "asking") == [{"first": 1}, 0, {"second": 2}]
    assert result(shipping, "checked") == "1 kg"
    assert result(shipping, "watching") == "yes"
    assert result(shipping, "answering") == "answered"
    assert result(shipping, "convoy") == [[0, 1, 2], "answered"]
    result(shipping, "late", "CANCELLED")
    result(shipping, "unwanted", "CANCELLED")
    assert [ledger.count("pack", "running", number) for number in range(3)] == [0, 1, 1]
    assert ledger.count("pack", "asking", 0) == ledger.count("pack", "stored", 0) == 0

    for each in ("refused", "dropped", "cancelled"):
        durable.resume_workflow(each, app=shipping.app)
    for topic in ("first", "second"):
        durable.send("cancelled", topic, topic, app=shipping.app)
    assert result(shipping, "refused") is None
    assert result(shipping, "dropped") == "picked up"
    assert result(shipping, "cancelled") == ["first", 0, "second"]
    assert {ledger.count("pack", each, 0) for each in ("refused", "dropped")} == {0}
    fork = durable.fork_workflow("shipped", from_step="tests.fixtures.apps.released.pack#3", app=shipping.app)
    assert result(shipping, fork.id) == [0, 1, 2]

    worker.stop()
    worker.wait_exit()
    start(workers, settings={**FAST, "retention": 0.001})
    rows = " + ".join(
        f"(SELECT count(*) FROM celery_durable.{each})" for each in TABLES if each not in ("node", "sweep")
    )
    wait_until(lambda: sql.value(f"SELECT {rows}") == 0, 60, "all of it is pruned")


@pytest.mark.parametrize("first", ["old", "new"])
def test_both_releases_side_by_side(
    workers: Workers, sql: Sql, shipping: Any, ledger: Ledger, gates: Gates, empty_database_url: str, old_code: Path,
    first: str,
) -> None:  # fmt: skip
    """Whichever starts first, each goes on with what the other has left, and an old one may start again later."""
    roots: dict[str, Path | None] = {"old": old_code, "new": None}
    second = {"old": "new", "new": "old"}[first]
    subprocess.run([sys.executable, "-c", MIGRATE, empty_database_url], cwd=old_code, check=True)
    parcels = [f"parcel-{number}" for number in range(8)]
    gates.close(*(f"{parcel}-1" for parcel in parcels), "answering-0")
    running = {first: start(workers, roots[first])}
    begin(shipping, parcels[:4])
    shipping.answer.apply_async(("answering",), task_id="answering")
    shipping.watch.apply_async(("answering",), task_id="watching")
    shipping.ask.apply_async(("asking",), task_id="asking")
    wait_until(lambda: sum(ledger.count("pack", parcel, 1) for parcel in parcels) == 4, 60, "four are in their step")
    running[second] = start(workers, roots[second])
    begin(shipping, parcels[4:])
    wait_until(lambda: sum(ledger.count("pack", parcel, 1) for parcel in parcels) == 8, 60, "eight are in their step")
    wait_until(lambda: missing_in(empty_database_url, "celery_durable") == [], 60, "the new one has migrated")

    for each in ("old", "new"):
        running[each].kill()
        running[each] = start(workers, roots[each])
    shipping.convoy.apply_async(("convoy",), task_id="convoy")
    durable.send("asking", "one", "first", app=shipping.app)
    gates.open(*(f"{parcel}-1" for parcel in parcels), "answering-0")
    for parcel in parcels:
        assert result(shipping, parcel) == [0, 1, 2]
        counts = [ledger.count("pack", parcel, number) for number in range(3)]
        assert counts[0] == counts[2] == 1
        assert counts[1] <= 3
    durable.send("asking", "two", "second", app=shipping.app)
    assert result(shipping, "asking") == ["one", 0, "two"]
    assert result(shipping, "watching") == "yes"
    assert result(shipping, "convoy") == [[0, 1, 2], "answered"]
    assert {each.state for each in durable.list_workflows(app=shipping.app)} == {"SUCCESS"}
    for worker in running.values():
        worker.stop()
        worker.wait_exit()
        assert "Traceback" not in worker.log


def begin(shipping: Any, parcels: list[str]) -> None:
    """Start workflows that wait in their second step."""
    for parcel in parcels:
        shipping.ship.apply_async((parcel,), task_id=parcel)
