"""The shop, with short times."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import pytest

from tests.fixtures.brokers import Broker, isolated
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.gates import Gates
from tests.fixtures.ledger import Ledger
from tests.fixtures.site import Site, opened, shop_env
from tests.fixtures.workers import Workers


@pytest.fixture
def worker_env(database_url: str, broker: Broker, ledger: Ledger) -> dict[str, str]:
    """What the shop reads from its environment."""
    return shop_env(database_url, broker.url, broker.queue, ledger)


@pytest.fixture
def site(workers: Workers, ledger: Ledger, database_url: str) -> Iterator[Site]:
    """This test's shop, no worker running yet."""
    with opened(workers, ledger, database_url) as site:
        yield site


@pytest.fixture
def gates(site: Site) -> Gates:
    """Gates at which bodies wait."""
    return site.gates


@pytest.fixture(scope="module")
def standing_site(
    postgres_server: str, template_database: str, broker_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A shop with one prefork worker, shared by the tests of a module: each uses names of its own."""
    directory = tmp_path_factory.mktemp("site")
    ledger = Ledger(directory / "ledger")
    with _copy_of(template_database, postgres_server) as url, isolated(broker_server) as broker:
        workers = Workers(shop_env(url, broker.url, broker.queue, ledger, max_payload=100_000), directory)
        with opened(workers, ledger, url) as site:
            workers.start(concurrency=2)
            yield site
            workers.kill_all()
            print(workers.logs())


@contextmanager
def _copy_of(template: str, server: str) -> Iterator[str]:
    name = f"durable_test_{uuid.uuid4().hex[:12]}"
    with closing(Sql(server)) as administrator:
        administrator.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        try:
            yield urlsplit(server)._replace(path=f"/{name}").geturl()
        finally:
            administrator.execute(f"DROP DATABASE {name} WITH (FORCE)")
