"""Migrations as files: what they begin with, their statements, and the rules that ours keep."""

from __future__ import annotations

import re

import pytest

from celery_durable.exceptions import SchemaVersionError
from celery_durable.store.ledger import Ledger, Migration, migrations, missing, quick

ONLINE = """-- online
-- oldest: 3
-- Two statements; this isn't one.
CREATE INDEX CONCURRENTLY IF NOT EXISTS one ON {schema}.workflow (state)
    WHERE state = 'a;b';
DROP INDEX CONCURRENTLY IF EXISTS {schema}.two;
"""
RESUMABLE = re.compile(r"CREATE (UNIQUE )?INDEX CONCURRENTLY IF NOT EXISTS \w+ ON |DROP INDEX CONCURRENTLY IF EXISTS ")


def test_an_online_migration() -> None:
    """Its statements are run one by one; while the schema is made, in its transaction."""
    migration = Migration(7, ONLINE)
    assert (migration.is_online, migration.oldest) == (True, 3)
    first, second = migration.statements("S")
    assert first.startswith('CREATE INDEX CONCURRENTLY IF NOT EXISTS one ON "S".workflow')
    assert second == 'DROP INDEX CONCURRENTLY IF EXISTS "S".two'
    at_once = migration.at_once("S")
    assert "CONCURRENTLY" not in at_once
    assert 'INSERT INTO "S".migration (number, oldest) VALUES (7, 3)' in at_once


def test_a_quick_migration() -> None:
    """What isn't said isn't so: it is quick, and all code can go on."""
    migration = Migration(7, "-- A column.\nALTER TABLE {schema}.workflow ADD COLUMN one text;\n")
    assert (migration.is_online, migration.oldest) == (False, None)
    assert migration.note("S").splitlines()[-1] == 'INSERT INTO "S".migration (number) VALUES (7);'


def test_what_is_missing() -> None:
    """Whatever a newer release has applied, each of ours counts by itself."""
    numbers = list(migrations())
    assert missing(Ledger(frozenset(), 0)) == numbers
    assert missing(Ledger(frozenset([1, 9999]), 0)) == numbers[1:]
    assert missing(Ledger(frozenset([*numbers, 9999]), numbers[-1])) == []
    with pytest.raises(SchemaVersionError, match=r"knows migration 9999, this one knows only \d+: upgrade the package"):
        missing(Ledger(frozenset([1, 9999]), 9999))


def test_our_migrations_keep_the_rules() -> None:
    """They are numbered from 1; an online one can be run again at each of its statements, a quick one builds no index
    on a table that others use."""
    assert list(migrations()) == list(range(1, len(migrations()) + 1))
    for number, migration in migrations().items():
        if migration.is_online:
            for statement in migration.statements("S"):
                assert RESUMABLE.match(statement), statement
        else:
            assert "CONCURRENTLY" not in migration.text, number
            made = set(re.findall(r"CREATE TABLE \{schema\}\.(\w+)", migration.text))
            indexed = set(re.findall(r"INDEX \w+ ON \{schema\}\.(\w+)", migration.text))
            assert indexed <= made, number
    assert 1 in quick(migrations())
