"""The parts of a workflow's page, ready to be shown."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Links:
    """Where a page leads to; None: Flower doesn't know it."""

    workflow: Callable[[str], str]
    #: The same page with the steps of these children.
    unfolded: Callable[[Collection[str]], str]
    task: Callable[[str], str | None]
    worker: Callable[[str | None], str | None]
    listed: Callable[..., str]


@dataclass(frozen=True, slots=True)
class Label:
    """What stands before a lane."""

    text: str
    title: str
    depth: int
    state: str
    lasted: str
    url: str | None
    toggle: str | None
    open: bool


@dataclass(frozen=True, slots=True)
class ErrorShown:
    """A failed try; ``brief`` stands for it in a line."""

    title: str
    message: str
    traceback: str
    brief: str


@dataclass(frozen=True, slots=True)
class StepShown:
    """A step below the picture."""

    key: str
    anchor: str
    state: str
    brief: str
    tried: str
    lasted: str
    when: str
    links: list[tuple[str, str]]
    value: str | None
    errors: list[ErrorShown]


@dataclass(frozen=True, slots=True)
class MessageShown:
    """A message that was sent to the workflow."""

    sent: str
    topic: str
    text: str
    taken_by: str
    idempotency_key: str
