"""An application whose database role may read and write rows, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

import celery_durable as durable
from celery_durable.store.migrate import migrate, missing_in
from celery_durable.store.roles import grant
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.ledger import Ledger
from tests.fixtures.roles import as_role, new_role
from tests.fixtures.site import FAST, Site, opened, shop_env
from tests.fixtures.tables import run_script
from tests.fixtures.workers import Workers

pytestmark = pytest.mark.crash


@pytest.fixture
def role(postgres_server: str) -> Iterator[str]:
    """The application's login."""
    with new_role(postgres_server, "shop") as name:
        yield name


@pytest.fixture
def worker_env(empty_database_url: str, broker: Broker, ledger: Ledger, role: str) -> dict[str, str]:
    """What the shop reads from its environment: it is connected as that role."""
    return shop_env(as_role(empty_database_url, role), broker.url, broker.queue, ledger)


@pytest.fixture
def owner(empty_database_url: str, role: str) -> Iterator[Sql]:
    """The owner's connection to a database in which there is no index for lists yet."""
    with closing(Sql(empty_database_url)) as sql:
        for number in (1, 2):
            run_script(sql, number)
        grant(empty_database_url, "celery_durable", role)
        yield sql


@pytest.fixture
def site(owner: Sql, workers: Workers, ledger: Ledger, worker_env: dict[str, str]) -> Iterator[Site]:
    """The shop, connected as that role."""
    with opened(workers, ledger, worker_env["DATABASE_URL"]) as site:
        yield site


def test_an_application_without_ddl(site: Site, owner: Sql, empty_database_url: str) -> None:
    """It starts, runs, rescues, cancels, resumes, sends, lists and prunes; what only the owner may do is told."""
    site.gates.close("a-1")
    first, second = site.start(2)
    told = 'lacks migrations (3), and the role "shop'
    # One of them tries, and says it; killed before, it couldn't.
    wait_until(lambda: told in first.log + second.log, message="a worker says what is missing")
    handle = site.shop.order.delay("a")
    site.reaches("work", "a", 1)
    survivor = second if site.owner(first, second) is first else first
    site.owner(first, second).kill()
    site.reaches("work", "a", 1, times=2)
    site.gates.open("a-1")
    assert site.finished(handle.id).result == [0, 10, 20]

    site.gates.close("b-0")
    other = site.shop.order.delay("b")
    site.reaches("work", "b", 0)
    durable.cancel_workflow(other.id, app=site.shop.app)
    site.gates.open("b-0")
    assert site.finished(other.id).state == "CANCELLED"
    durable.resume_workflow(other.id, app=site.shop.app)
    assert site.finished(other.id).state == "SUCCESS"
    with site.sql.connection.transaction(), durable.outbox(site.sql.connection):
        boxed = site.shop.order.delay("c")
    assert site.finished(boxed.id).state == "SUCCESS"
    assert len(durable.list_workflows(app=site.shop.app)) == 3
    assert durable.check_health(app=site.shop.app).missing == (3,)
    assert "InsufficientPrivilege" not in first.log + second.log

    survivor.stop()
    survivor.wait_exit()
    assert migrate(empty_database_url) == [3]
    worker = site.workers.start(settings={**FAST, "retention": {"SUCCESS": 0.001}})
    wait_until(lambda: owner.value("SELECT count(*) FROM celery_durable.workflow") == 0, message="all of it is pruned")
    assert told not in worker.log


def test_the_owners_worker_builds_what_is_missing(
    owner: Sql, workers: Workers, worker_env: dict[str, str], empty_database_url: str
) -> None:
    """One of several does it, while it works."""
    started = [workers.start(env={"DATABASE_URL": empty_database_url}, wait=False) for _ in range(2)]
    for worker in started:
        worker.wait_ready()
    wait_until(lambda: missing_in(empty_database_url, "celery_durable") == [], message="the indexes are built")
    assert sum("Migration 3 of schema" in worker.log for worker in started) == 1
    assert owner.value("SELECT count(*) FROM pg_index WHERE NOT indisvalid") == 0
