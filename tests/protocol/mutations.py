"""Statements with one mistake each: what the machine must be able to find."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from celery_durable.store import queries


@dataclass(frozen=True, slots=True)
class Mutation:
    """A statement of the store with a part of its text left out, or replaced."""

    name: str
    file: str
    query: str
    old: str
    new: str

    @contextmanager
    def made(self) -> Iterator[None]:
        """Whoever loads the statements meanwhile gets this one with its mistake."""
        named = queries._named

        def mutated(filename: str) -> list[tuple[str, str]]:
            return [
                (name, self._in(text) if (filename, name) == (self.file, self.query) else text)
                for name, text in named(filename)
            ]

        queries._named = mutated  # type: ignore[assignment]
        try:
            yield
        finally:
            queries._named = named

    def _in(self, text: str) -> str:
        assert text.count(self.old) == 1, f"{self.file}: {self.query} doesn't say {self.old!r} once any more"
        return text.replace(self.old, self.new)

    def __str__(self) -> str:
        return self.name


MUTATIONS = [
    Mutation("rescue by an old list", "workflows.sql", "rescue", "OR w.claimed_at < n.as_of AND", "OR"),
    Mutation("rescue that waits", "workflows.sql", "rescue", "FOR UPDATE OF w SKIP LOCKED", "FOR UPDATE OF w"),
    Mutation("redispatch beside the owner", "workflows.sql", "redispatch", "w.claimed_at < n.as_of AND", "true OR"),
]
