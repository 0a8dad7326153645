"""The limit of values: psycopg with one INSERT of the same bytes in each transaction."""

from __future__ import annotations

import time

import psycopg

from tests.benchmarks.contestants.contestant import Contestant


class Bare(Contestant):
    """A connection in autocommit, and a table of a key and a value."""

    name = "psycopg"
    emptying = "TRUNCATE kept"

    def start(self) -> None:
        self._connection = psycopg.connect(self.database, autocommit=True)
        self._connection.execute("CREATE TABLE IF NOT EXISTS kept (id serial PRIMARY KEY, value bytea)")

    def stop(self) -> None:
        self._connection.close()

    def insert(self, value: bytes) -> float:
        """Keep a value: seconds that it took."""
        began = time.perf_counter()
        self._connection.execute("INSERT INTO kept (value) VALUES (%b)", (value,))
        return time.perf_counter() - began
