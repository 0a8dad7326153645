"""One Postgres and one broker for all contestants, each of which has a database of its own in both."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg

from celery_durable.testing.servers import EmbeddedBroker, EmbeddedPostgres

#: What makes a commit a commit; a benchmark without it would be one of something else.
DURABLE = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}


@dataclass
class Stage:
    """What there is to run on; `quick` asks for small counts."""

    home: Path
    server: str
    broker: str
    quick: bool = False
    _numbers: Iterator[int] = field(default_factory=count)
    _databases: dict[str, str] = field(default_factory=dict)
    _brokers: dict[str, str] = field(default_factory=dict)

    def size(self, usual: int, quick: int) -> int:
        """The usual count, or the small one."""
        return quick if self.quick else usual

    def database(self, name: str) -> str:
        """URL of a contestant's database, which is made when it is first asked for."""
        if name not in self._databases:
            self.execute(f'CREATE DATABASE "{name}"')
            self._databases[name] = urlsplit(self.server)._replace(path=f"/{name}").geturl()
        return self._databases[name]

    def broker_of(self, name: str) -> str:
        """URL of a contestant's database of the broker."""
        return self._brokers.setdefault(name, urlsplit(self.broker)._replace(path=f"/{len(self._brokers)}").geturl())

    def log(self, name: str) -> Path:
        """A new file for what a process writes."""
        return self.home / f"{name}-{next(self._numbers)}.log"

    def execute(self, statement: str, params: Any = None, *, database: str | None = None) -> None:
        """Run a statement on a connection of its own."""
        with psycopg.connect(database or self.server, autocommit=True) as connection:
            connection.execute(statement, params)

    def rows(self, query: str, params: Any = None, *, database: str | None = None) -> list[tuple[Any, ...]]:
        """Return what a query finds."""
        with psycopg.connect(database or self.server, autocommit=True) as connection:
            return connection.execute(query, params).fetchall()

    def checkpoint(self) -> None:
        """Nobody pays for the pages that another one has written."""
        self.execute("CHECKPOINT")

    def server_version(self) -> str:
        """Postgres's, as it says it."""
        return self.rows("SHOW server_version")[0][0]


@contextmanager
def opened(quick: bool = False) -> Iterator[Stage]:
    """Start the servers; raise RuntimeError if commits aren't durable there."""
    home = Path(tempfile.mkdtemp(prefix="celery-durable-bench-"))
    try:
        with EmbeddedPostgres() as postgres, EmbeddedBroker() as broker:
            stage = Stage(home, postgres.url, broker.url, quick)
            _check(stage)
            _tell_apps(stage)
            yield stage
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _check(stage: Stage) -> None:
    for name, wanted in DURABLE.items():
        ((setting,),) = stage.rows(f"SHOW {name}")
        if setting != wanted:
            raise RuntimeError(
                f"Nothing is measured where commits aren't durable: {name} is {setting}, set it {wanted}."
            )


def _tell_apps(stage: Stage) -> None:
    """Apps read their addresses from the environment, in this process and in their workers."""
    os.environ["BENCH_DURABLE_DATABASE"] = stage.database("celery_durable")
    os.environ["BENCH_DURABLE_BROKER"] = stage.broker_of("celery_durable")
    os.environ["BENCH_PLAIN_BROKER"] = stage.broker_of("celery")
