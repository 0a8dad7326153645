"""The two versions of the shop's job: how to start it, and how to know where it stands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import psycopg

from example_project.demo.facts import Completed, Journal


class Job(Protocol):
    def start(self, orders: Iterable[str]) -> None: ...

    def ended(self) -> set[str]:
        """Orders that won't move any more."""

    def fulfilled(self) -> set[str]: ...


class Durable:
    """Seen by plain SQL: a witness that uses no code of the library."""

    def __init__(self, database_url: str) -> None:
        self._url = database_url
        self._connection: psycopg.Connection[Any] | None = None

    def start(self, orders: Iterable[str]) -> None:
        from example_project.tasks import fulfil

        for order in orders:
            fulfil.apply_async((order,), task_id=order)

    def ended(self) -> set[str]:
        return {order for (order,) in self._rows("SELECT id FROM workflow WHERE finished_at IS NOT NULL")}

    def fulfilled(self) -> set[str]:
        return {order for (order,) in self._rows("SELECT id FROM workflow WHERE state = 'SUCCESS'")}

    def completed_steps(self) -> list[Completed]:
        rows = self._rows("""
            SELECT workflow.id, checkpoint.key, extract(epoch FROM checkpoint.at)::float8,
                   workflow.attempt - checkpoint.attempt
            FROM checkpoint JOIN workflow ON workflow.id = checkpoint.workflow
            WHERE checkpoint.ok
        """)
        return [Completed(order, key.rpartition(".")[2], at, skipped) for order, key, at, skipped in rows]

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        if self._connection is None:
            options = "-c search_path=celery_durable"
            self._connection = psycopg.connect(self._url, autocommit=True, options=options)
        return self._connection.execute(query).fetchall()


class Plain:
    """Plain Celery keeps no record: all we can know is whose customer was notified."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def start(self, orders: Iterable[str]) -> None:
        from example_project.plain import fulfil

        for order in orders:
            fulfil(order)

    def ended(self) -> set[str]:
        return self._journal.notified()

    def fulfilled(self) -> set[str]:
        return self._journal.notified()
