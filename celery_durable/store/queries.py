"""Loads the named queries of the ``.sql`` files beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files

from psycopg import sql

_NAME = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)
_PARAMETER = re.compile(r"%\((\w+)\)s")


@dataclass(frozen=True)
class Query:
    """One statement: where it is written, and its text with the schema filled in."""

    name: str
    text: str

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of its parameters, by their numbers from 1."""
        return tuple(dict.fromkeys(_PARAMETER.findall(self.text)))

    @cached_property
    def numbered(self) -> bytes:
        """The text as Postgres takes it, with parameters ``$1``, ``$2``, …"""
        return _PARAMETER.sub(lambda found: f"${self.names.index(found[1]) + 1}", self.text).encode()


class Queries:
    """The statements of one file for one schema: ``queries["claim"]``; ``others`` fills in more names."""

    def __init__(self, filename: str, schema: str, **others: str) -> None:
        stem = filename.removesuffix(".sql")
        named = _named(filename)
        self._queries = {name: Query(f"{stem}.{name}", in_schema(text, schema, **others)) for name, text in named}

    def __getitem__(self, name: str) -> Query:
        return self._queries[name]

    def __iter__(self) -> Iterator[Query]:
        return iter(self._queries.values())


def in_schema(text: str, schema: str, **others: str) -> str:
    """Fill ``{schema}`` in, and other names, each quoted as an identifier."""
    names = {name: sql.Identifier(value) for name, value in {"schema": schema, **others}.items()}
    return sql.SQL(text).format(**names).as_string(None)


@cache
def _named(filename: str) -> list[tuple[str, str]]:
    parts = _NAME.split(files(__package__).joinpath(filename).read_text(encoding="utf-8"))
    return [(name, text.strip()) for name, text in zip(parts[1::2], parts[2::2], strict=True)]
