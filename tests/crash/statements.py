"""How the proxy recognizes a statement of the store: by the comment that it begins with."""

from __future__ import annotations

from celery_durable.store.queries import Queries

_SCHEMA = "celery_durable"


def text_of(name: str) -> str:
    """The first line of `file.query`, such as `workflows.claim`, as it goes over the wire."""
    stem, query = name.split(".")
    return Queries(f"{stem}.sql", _SCHEMA)[query].text.splitlines()[0]
