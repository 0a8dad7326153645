"""Named queries: each file is cut at its names, and the schema is filled in as an identifier."""

from __future__ import annotations

import re

import pytest

from celery_durable.store.queries import Queries, in_schema

FILES = ["nodes.sql", "checkpoints.sql", "workflows.sql"]


@pytest.mark.parametrize("file", FILES)
def test_every_query_is_named_and_described(file: str) -> None:
    """A query's first line says what it is for, and nothing is left to fill in but its parameters."""
    queries = list(Queries(file, "durable"))
    assert queries
    for query in queries:
        assert query.text.startswith("-- "), query.name
        assert query.name.startswith(f"{file.removesuffix('.sql')}."), query.name
        assert "{" not in query.text, query.name


@pytest.mark.parametrize("file", FILES)
def test_no_query_uses_the_transactions_clock(file: str) -> None:
    """In a caller's long transaction now() stands still."""
    for query in Queries(file, "durable"):
        assert not re.search(r"\bnow\(\)|\bcurrent_timestamp\b", query.text, re.IGNORECASE), query.name


@pytest.mark.parametrize(
    ("schema", "quoted"),
    [("durable", '"durable"'), ("My Schema", '"My Schema"'), ('a"b', '"a""b"'), ("a.b", '"a.b"')],
)
def test_a_schema_is_quoted(schema: str, quoted: str) -> None:
    """Whatever its name, it can't become anything but a name."""
    assert in_schema("SELECT FROM {schema}.workflow", schema) == f"SELECT FROM {quoted}.workflow"


def test_an_unknown_query_is_an_error() -> None:
    """There is no silent empty statement."""
    with pytest.raises(KeyError):
        Queries("nodes.sql", "durable")["no_such_query"]
