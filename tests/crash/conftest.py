"""What the crash tests share: a database and a part of the broker for a whole module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fixtures.brokers import Broker, isolated
from tests.fixtures.fix_postgres import _new_database


@pytest.fixture(scope="module")
def module_database_url(postgres_server: str, template_database: str) -> Iterator[str]:
    """URL of a migrated database that the tests of one module share, as their workers outlive a test."""
    with _new_database(postgres_server, template_database) as url:
        yield url


@pytest.fixture(scope="module")
def module_broker(broker_server: str) -> Iterator[Broker]:
    """The part of the broker that the tests of one module share."""
    with isolated(broker_server) as broker:
        yield broker
