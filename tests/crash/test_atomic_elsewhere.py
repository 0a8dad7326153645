"""Processes that die or stand still around the commits of a step that is atomic in another database than ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Literal

import pytest

import celery_durable as durable
from tests.crash.crew import PATIENCE, Crew, _only_started, crew
from tests.crash.statements import text_of
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_postgres import Sql, _new_database
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.proxy import PostgresProxy
from tests.fixtures.workers import is_alive

pytestmark = [pytest.mark.crash, pytest.mark.slow]

#: Where each statement goes, and by what the proxy there recognizes it.
STATEMENTS = {
    "look": ("ours", text_of("workflows.look")),
    "effect": ("theirs", "INTO booking"),
    "keep": ("theirs", text_of("markers.keep")),
    "commit": ("theirs", "COMMIT"),
    "save": ("ours", text_of("checkpoints.save_slow")),
}


@pytest.fixture(scope="module")
def other_url(postgres_server: str) -> Iterator[str]:
    with _new_database(postgres_server, "template0") as url:
        yield url


@pytest.fixture(scope="module")
def other(other_url: str) -> Iterator[Sql]:
    """Another database, with a table of the app's own."""
    with closing(Sql(other_url)) as sql:
        sql.execute("CREATE TABLE booking (workflow text NOT NULL)")
        yield sql


@pytest.fixture(scope="module")
def proxies(module_database_url: str, other_url: str) -> Iterator[dict[str, PostgresProxy]]:
    with PostgresProxy(module_database_url) as ours, PostgresProxy(other_url) as theirs:
        yield {"ours": ours, "theirs": theirs}


@pytest.fixture(scope="module")
def all_hands(
    module_database_url: str,
    module_broker: Broker,
    other: Sql,
    proxies: dict[str, PostgresProxy],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Crew]:
    directory = tmp_path_factory.mktemp("elsewhere")
    with crew(directory, module_database_url, module_broker, proxies["ours"].url) as made:
        made.factory.env["ELSEWHERE_URL"] = proxies["theirs"].url.replace("postgresql:", "postgresql+psycopg:")
        made.client.task(base=durable.Workflow, name="booked elsewhere")(_only_started)
        made.muster(concurrency=1)
        made.result(made.start("booked elsewhere"))  # the table of markers is there from now on
        yield made


@pytest.fixture
def hands(all_hands: Crew, proxies: dict[str, PostgresProxy]) -> Iterator[Crew]:
    """Two workers with one pool process each, which reach both databases through proxies."""
    wait_until(lambda: all(len(worker.children()) == 1 for worker in all_hands.workers), message="all are replaced")
    wait_until(lambda: all_hands.witnesses() == 2, message="both nodes were heard for a lease without a gap")
    for proxy in proxies.values():
        proxy.reset()
    yield all_hands
    all_hands.show_logs()


def check_booked_once(hands: Crew, other: Sql, workflow_id: str) -> None:
    assert hands.result(workflow_id) == ["booked", "last"]
    assert other.value("SELECT count(*) FROM booking WHERE workflow = %s", workflow_id) == 1
    assert other.value("SELECT count(value) FROM celery_durable.marker WHERE workflow = %s", workflow_id) == 1
    assert hands.ledger.count("last", workflow_id) == 1


@pytest.mark.parametrize(
    ("statement", "when", "runs"),
    [
        ("look", "after", 1),
        ("effect", "after", 2),
        ("keep", "before", 2),
        ("keep", "after", 2),
        ("commit", "before", 1),  # it arrives after the death of who has sent it
        ("commit", "after", 1),
        ("save", "before", 1),
        ("save", "after", 1),
    ],
)
def test_killed_around_the_commits(
    hands: Crew,
    other: Sql,
    proxies: dict[str, PostgresProxy],
    statement: str,
    when: Literal["before", "after"],
    runs: int,
) -> None:
    """SIGKILL at any instant: what was committed isn't repeated, what wasn't is."""
    where, text = STATEMENTS[statement]
    held = proxies[where].hold(text, when)
    workflow_id = hands.start("booked elsewhere")
    held.wait_reached()
    process = hands.runner_of(hands.worker_of(workflow_id))
    process.kill()
    wait_until(lambda: not is_alive(process), message="the process is gone")
    held.release()
    check_booked_once(hands, other, workflow_id)
    assert hands.ledger.count("book", workflow_id) == runs


@pytest.mark.parametrize("statement", ["effect", "commit"])
def test_stopped_before_its_commit(hands: Crew, other: Sql, proxies: dict[str, PostgresProxy], statement: str) -> None:
    """A worker that stands still is overtaken, and can't commit when it goes on."""
    held = proxies["theirs"].hold(STATEMENTS[statement][1], "before")
    workflow_id = hands.start("booked elsewhere")
    held.wait_reached()
    worker = hands.worker_of(workflow_id)
    worker.pause()
    wait_until(lambda: hands.row(workflow_id).state == "SUCCESS", PATIENCE, "another worker has finished it")
    held.release()
    worker.resume()
    wait_until(
        lambda: f"the workflow {workflow_id} over" in worker.log, PATIENCE, "the first attempt has ended as void"
    )
    check_booked_once(hands, other, workflow_id)
    assert hands.row(workflow_id).attempt == 2
