"""Workflows that are to end now."""

from __future__ import annotations

from collections.abc import Collection

from .client import CALLER_PATIENCE
from .envelope import send_stored
from .exceptions import WorkflowCancelledError
from .installation import Installation
from .outboxes import current


def cancel_all(installation: Installation, ids: Collection[str], *, children: bool) -> list[str]:
    """End workflows as CANCELLED, with all that they have started if ``children``; return those that hadn't ended.

    In an outbox that is done by the caller's commit, and nothing is returned.
    """
    box = current(installation)
    if box is not None:
        box.cancel(ids, children=children)
        return []
    workflows = installation.store.workflows
    verdict = installation.codec.verdict(WorkflowCancelledError("The workflow was cancelled."))
    cancelled = workflows.cancel(ids, verdict=verdict, patience=CALLER_PATIENCE)
    # What runs elsewhere may start a child at this moment; a parent that is cancelled can't.
    while children and (family := workflows.family(ids, patience=CALLER_PATIENCE)):
        cancelled += workflows.cancel(family, verdict=verdict, patience=CALLER_PATIENCE)
    _tell_of(installation, cancelled)
    return cancelled


def _tell_of(installation: Installation, ids: Collection[str]) -> None:
    """Wake those that await them."""
    if not ids:
        return
    republish_after = installation.config.republish_after
    woken = installation.store.awaits.notify(ids, republish_after, patience=CALLER_PATIENCE)
    if woken and (refused := send_stored(installation.app, woken)):
        installation.store.workflows.unsent(refused, patience=CALLER_PATIENCE)
