"""Many workflows started at once: ``durable.enqueue_many``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import islice
from typing import Any

from . import outboxes
from .broker import producer as broker_producer
from .calls import caller_of, forbid_in_plain_function
from .client import CALLER_PATIENCE
from .envelope import logger
from .exceptions import ConfigurationError
from .handle import WorkflowHandle
from .installation import Installation, installed_on
from .publisher import Unpublished, check_taken, start_as_child, unpublished

#: Workflows in one statement.
BATCH = 1_000

_WHAT = "start workflows"


def enqueue_many(signatures: Iterable[Any]) -> list[WorkflowHandle[Any]]:
    """Start many workflows, ``checkout.s(42)``, and return their handles in the same order.

    A thousand rows are written in one statement, and their messages are then sent one by one, through one connection;
    otherwise each starts as by ``apply_async``. If this raises, some thousands may have been started: call it again
    with the same task ids (``checkout.s(42).set(task_id="order-42")``), and each starts once. In a workflow they are
    children, each started once in all attempts. In an ``outbox`` all start by the caller's commit.

    Raises ConfigurationError for anything but signatures of workflows and of the tasks of one app, and what
    ``apply_async`` raises.
    """
    attempt = caller_of(_WHAT)
    if attempt is not None:
        return [start_as_child(signature) for signature in signatures]
    forbid_in_plain_function(_WHAT)
    iterator, handles = iter(signatures), []
    while batch := [(signature, unpublished(signature)) for signature in islice(iterator, BATCH)]:
        handles += _start([kept for _, kept in batch], [signature.type for signature, _ in batch])
    return handles


def _start(batch: Sequence[Unpublished], tasks: Sequence[Any]) -> list[WorkflowHandle[Any]]:
    installation = installed_on(tasks[0].app)
    if any(task.app is not installation.app for task in tasks):
        raise ConfigurationError("enqueue_many() starts the workflows of one app: call it once for each app.")
    box = outboxes.current(installation)
    if box is not None:
        for each in batch:
            published, taken_by = box.publish(replace(each.birth, delay=each.birth.delay or 0.0))
            check_taken(each.birth, taken_by)
            each.started = published.holder or each.started
    else:
        ours = _published(installation, batch)
        _send(installation, ours)
        _check_others(installation, batch)
    return [WorkflowHandle(str(each.started), app=installation.app) for each in batch]


def _published(installation: Installation, batch: Sequence[Unpublished]) -> list[tuple[Unpublished, datetime]]:
    """Write the rows; return those whose messages are to be sent, and when they were published."""
    alone = [each for each in batch if each.birth.deduplication_id or each.birth.on_cancel]
    together = {each.birth.id: each for each in batch if each not in alone}
    workflows, ours = installation.store.workflows, []
    if together:
        born = workflows.publish_many([each.birth for each in together.values()], patience=CALLER_PATIENCE)
        ours = [(together[each], moment) for each, moment in born.items() if moment is not None]
    for each in alone:
        published = workflows.publish(each.birth, patience=CALLER_PATIENCE)
        each.started = published.holder or each.started
        if published.born and published.published_at is not None:
            ours.append((each, published.published_at))
    return ours


def _check_others(installation: Installation, batch: Sequence[Unpublished]) -> None:
    names = installation.store.workflows.names_of([each.birth.id for each in batch], patience=CALLER_PATIENCE)
    for each in batch:
        check_taken(each.birth, names.get(each.birth.id))


def _send(installation: Installation, ours: Sequence[tuple[Unpublished, datetime]]) -> None:
    """Wake the workers. The rows are safe: what the broker doesn't take, recovery sends later."""
    sent = 0
    try:
        with broker_producer(installation.app) as producer:
            for each, published_at in ours:
                each.envelope.send(installation.app, producer, published_at)
                sent += 1
    except Exception as error:  # noqa: BLE001 - every transport has its own errors
        logger.warning("%d workflows are stored, but their messages couldn't be sent (%r).", len(ours) - sent, error)
        installation.store.workflows.unsent([each.birth.id for each, _ in ours[sent:]], patience=CALLER_PATIENCE)
