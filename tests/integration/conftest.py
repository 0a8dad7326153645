"""A database that the tests of one module share: each finds it empty."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from tests.fixtures.fix_postgres import _new_database
from tests.fixtures.tables import TRUNCATE

_OTHERS = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


@pytest.fixture(scope="module")
def module_database_url(postgres_server: str, template_database: str) -> Iterator[str]:
    """URL of a migrated database for a module."""
    with _new_database(postgres_server, template_database) as url:
        yield url


@pytest.fixture
def emptied_database_url(module_database_url: str) -> str:
    """The same, without workflows and without sessions; quicker to be had than a new one."""
    with psycopg.connect(module_database_url, autocommit=True) as connection:
        connection.execute(_OTHERS)
        connection.execute(TRUNCATE)
    return module_database_url
