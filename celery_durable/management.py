"""Workflows steered from outside: cancelled, resumed, forked, one or many."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from typing import Any, TypeVar

from celery import Celery

from . import states
from .calls import caller_of, forbid_in_plain_function
from .cancellation import cancel_all
from .client import CALLER_PATIENCE, list_workflows
from .engine.context import current_step
from .engine.step import StepSpec, call_step
from .envelope import Envelope, check_id, send_stored
from .exceptions import DatabaseUnavailable, WorkflowConflict, WorkflowNotFound
from .handle import WorkflowHandle
from .installation import Installation, find
from .outboxes import current, forbid_in_outbox
from .publisher import announced
from .store import Fork
from .store.rows import StoredMessage

T = TypeVar("T")

#: Most workflows that a filter without a limit may mean.
MOST = 10_000


def cancel_workflow(id: str, children: bool = False, app: Celery | None = None) -> bool:
    """End a workflow as CANCELLED at once, whatever its state; False if it had ended before.

    A step that runs isn't interrupted, unless it is ``cancellable``: it may still record its outcome, and no next one
    starts. Its ``on_cancel`` is started in the same statement. ``children``: with all that it has started, and what
    those have; they are ended after it. If this dies or raises between, call it again: it still finds the children. In
    an ``outbox`` that is done by the caller's commit, and True is returned.

    Raises WorkflowNotFound, NotAllowedInStep, NotInstalled, DatabaseUnavailable.
    """
    installation = find(app)
    return id in _steered("cancel_workflow", lambda: _cancel(installation, [check_id(id)], children), id, children)


def cancel_workflows(
    ids: Iterable[str] | None = None, children: bool = False, app: Celery | None = None, **filters: Any
) -> list[str]:
    """End many workflows as CANCELLED, as ``cancel_workflow``: by ids, or by the filters of ``list_workflows``.

    All of them or none: an id that doesn't exist raises WorkflowNotFound, and nothing is cancelled. Their ``children``
    come after that, as with ``cancel_workflow``. Returns the ids of those that hadn't ended before.

    Raises ValueError without ids and filters, and if more than 10,000 match and no ``limit`` is given;
    NotAllowedInStep, NotInstalled, DatabaseUnavailable.
    """
    installation = find(app)
    chosen = _chosen(installation, ids, filters, states.LIVE)
    return _steered("cancel_workflows", lambda: _cancel(installation, chosen(), children), *_said(ids, filters))


def resume_workflow(id: str, app: Celery | None = None) -> WorkflowHandle[Any]:
    """Let a workflow go on that is CANCELLED, DEAD or in FAILURE; return its handle.

    Its completed steps don't run again, failed ones run anew with all their tries, and no deadline holds any more.
    Once this has returned, it is as durable as a start: a broker that doesn't answer only delays it.

    Raises WorkflowNotFound, WorkflowConflict if it is in any other state, NotAllowedInStep, NotInstalled,
    DatabaseUnavailable.
    """
    installation = find(app)
    (resumed,) = _steered("resume_workflow", lambda: _resume(installation, [check_id(id)]), id)
    return WorkflowHandle(resumed, app=installation.app)


def resume_workflows(
    ids: Iterable[str] | None = None, app: Celery | None = None, **filters: Any
) -> list[WorkflowHandle[Any]]:
    """Let many workflows go on, as ``resume_workflow``: by ids, or by the filters of ``list_workflows``.

    All of them or none: if one of them can't be resumed, WorkflowConflict names it, and nothing is resumed.

    Raises ValueError without ids and filters, and if more than 10,000 match and no ``limit`` is given;
    WorkflowNotFound, NotAllowedInStep, NotInstalled, DatabaseUnavailable.
    """
    installation = find(app)
    chosen = _chosen(installation, ids, filters, states.FINAL - {states.SUCCESS})
    resumed = _steered("resume_workflows", lambda: _resume(installation, chosen()), *_said(ids, filters))
    return [WorkflowHandle(each, app=installation.app) for each in resumed]


def fork_workflow(
    id: str, from_step: str | None = None, new_id: str | None = None, app: Celery | None = None
) -> WorkflowHandle[Any]:
    """Start a new workflow with the arguments of another one and what that had completed before a step.

    ``from_step`` is the key of a step, as ``list_workflow_steps`` shows it; None runs all steps anew. Steps that run
    have other idempotency keys than those of the other workflow. Chains and links of it follow the new one, too, which
    has an ``on_cancel`` of its own; it is no member of its group or chord.

    Raises WorkflowNotFound; ValueError for a step that there isn't, with those that there are; WorkflowConflict if
    ``new_id`` is taken; NotAllowedInStep, NotInstalled, DatabaseUnavailable.
    """
    installation = find(app)
    names = None if new_id is None else [check_id(new_id, "new_id")]
    (forked,) = _steered(
        "fork_workflow", lambda: _fork(installation, [check_id(id)], from_step, names), id, from_step, new_id
    )
    return WorkflowHandle(forked, app=installation.app)


def fork_workflows(
    ids: Iterable[str] | None = None, from_step: str | None = None, app: Celery | None = None, **filters: Any
) -> list[WorkflowHandle[Any]]:
    """Fork many workflows, as ``fork_workflow``: by ids, or by the filters of ``list_workflows``; all of them or none.

    Raises ValueError without ids and filters, if one of them has no such step, and if more than 10,000 match and no
    ``limit`` is given; WorkflowNotFound, NotAllowedInStep, NotInstalled, DatabaseUnavailable.
    """
    installation = find(app)
    chosen = _chosen(installation, ids, filters, states.ALL)
    forked = _steered(
        "fork_workflows", lambda: _fork(installation, chosen(), from_step, None), *_said(ids, filters), from_step
    )
    return [WorkflowHandle(each, app=installation.app) for each in forked]


def _steered(name: str, steer: Callable[[], list[str]], *said: Any) -> list[str]:
    """Do it; in a workflow once, as a step of it."""
    what = name.replace("_", " ")
    attempt = caller_of(what)
    if attempt is None:
        forbid_in_plain_function(what)
        return steer()
    done: list[str] = call_step(attempt, StepSpec(f"durable.{name}"), lambda *said: steer(), said, {})
    return done


def _said(ids: Iterable[str] | None, filters: dict[str, Any]) -> tuple[Any, Any]:
    return (None if ids is None else list(ids), filters)


def _chosen(
    installation: Installation, ids: Iterable[str] | None, filters: dict[str, Any], fitting: Iterable[str]
) -> Callable[[], list[str]]:
    """Return what finds the workflows that are meant, in the states that fit if no state is named."""
    if ids is not None:
        if filters:
            raise ValueError("Name the workflows by ids, or by filters, not by both.")
        wanted = sorted({check_id(each) for each in ids})
        return lambda: wanted
    if not filters:
        raise ValueError("Which workflows? Pass ids, or filters such as name=… or state=….")
    asked = {"state": sorted(fitting), "limit": MOST + 1, "max_payload": 0, **filters}

    def find_them() -> list[str]:
        found = sorted(each.id for each in list_workflows(app=installation.app, **asked))
        if "limit" not in filters and len(found) > MOST:
            raise ValueError(
                f"More than {MOST:,} workflows match, and nothing was done: narrow the filters, or pass limit=…, which "
                "takes the newest ones, and call it again for the others."
            )
        return found

    return find_them


def _cancel(installation: Installation, ids: Sequence[str], children: bool) -> list[str]:
    if current(installation) is not None:
        cancel_all(installation, ids, children=children)
        return list(ids)
    _check_known(installation, ids)
    return cancel_all(installation, ids, children=children)


def _resume(installation: Installation, ids: Sequence[str]) -> list[str]:
    forbid_in_outbox("resume workflows")
    if not ids:
        return []
    workflows, republish_after = installation.store.workflows, installation.config.republish_after
    try:
        messages, answer_lost = workflows.resume(ids, republish_after, patience=0), False
    except DatabaseUnavailable:
        messages, answer_lost = workflows.resume(ids, republish_after, patience=CALLER_PATIENCE), True
    if len(messages) == len(ids):
        _send(installation, messages)
    elif answer_lost and _all_enqueued(installation, ids):
        workflows.unsent(ids, patience=CALLER_PATIENCE)  # by the first statement, which has sent nothing
    else:
        _check_known(installation, ids)
        raise _unresumable(installation, ids)
    return list(ids)


def _all_enqueued(installation: Installation, ids: Sequence[str]) -> bool:
    rows = [installation.store.workflows.by_id(each, patience=CALLER_PATIENCE) for each in ids]
    return all(row is not None and row.state == states.ENQUEUED for row in rows)


def _unresumable(installation: Installation, ids: Sequence[str]) -> WorkflowConflict:
    rows = [installation.store.workflows.by_id(each, patience=CALLER_PATIENCE) for each in ids]
    wrong = [
        f"{row.id} is {row.state}" for row in rows if row is not None and row.state in states.LIVE | {states.SUCCESS}
    ]
    shown = ", ".join(wrong[:10]) or "one of them has changed meanwhile"
    return WorkflowConflict(
        f"Only workflows that have ended without success can be resumed, but {shown}: none was resumed."
    )


def _fork(installation: Installation, ids: Sequence[str], from_step: str | None, names: list[str] | None) -> list[str]:
    forbid_in_outbox("fork workflows")
    if not ids:
        return []
    _check_known(installation, ids)
    workflows = installation.store.workflows
    hooks = workflows.hooks_of(ids, patience=CALLER_PATIENCE)
    forks = [
        Fork(
            message.workflow_id,
            _cut(installation, message.workflow_id, from_step),
            _under(installation, message, names[0] if names else _new_id(message.workflow_id)),
            _under(installation, hook, _new_id(hook.workflow_id)) if (hook := hooks.get(message.workflow_id)) else None,
        )
        for message in workflows.messages_of(ids, patience=CALLER_PATIENCE)
    ]
    published = _forked(installation, forks)
    _send(installation, [
        StoredMessage(each.workflow_id, published[each.workflow_id], 0, each.envelope, each.body, each.content_type,
                      each.content_encoding)
        for each in (fork.message for fork in forks)
    ])  # fmt: skip
    return [fork.message.workflow_id for fork in forks]


def _forked(installation: Installation, forks: Sequence[Fork]) -> dict[str, datetime]:
    """Write the forks; after a lost answer those that are there are our own."""
    workflows, republish_after = installation.store.workflows, installation.config.republish_after
    try:
        return workflows.fork(forks, republish_after, patience=0)
    except DatabaseUnavailable:
        try:
            return workflows.fork(forks, republish_after, patience=CALLER_PATIENCE)
        except WorkflowConflict:
            rows = [workflows.by_id(fork.message.workflow_id, patience=CALLER_PATIENCE) for fork in forks]
            if any(row is None or row.forked_from != fork.source for row, fork in zip(rows, forks, strict=True)):
                raise
            return {fork.message.workflow_id: datetime.now(timezone.utc) for fork in forks}


def _under(installation: Installation, message: StoredMessage, new_id: str) -> StoredMessage:
    """Return a message for another workflow, which begins anew."""
    envelope = Envelope.of_stored(message).under(new_id, installation.codec)
    with announced(installation, envelope, forked_from=message.workflow_id):
        return envelope.stored(new_id, 0)


def _cut(installation: Installation, workflow_id: str, from_step: str | None) -> int:
    """Return the place of a step; 0: before all of them."""
    if from_step is None:
        return 0
    steps = installation.store.checkpoints.of_workflow(workflow_id, patience=CALLER_PATIENCE)
    for step in steps:
        if step.key == from_step:
            return step.seq
    keys = ", ".join(step.key for step in steps[:50]) or "none"
    raise ValueError(f"The workflow {workflow_id} has no step {from_step!r}; it has: {keys}.")


def _new_id(workflow_id: str) -> str:
    """Return an id for a fork; in a workflow it is the same if that statement is made again."""
    step = current_step()
    return str(uuid.uuid4() if step is None else uuid.uuid5(uuid.UUID(step.idempotency_key), workflow_id))


def _check_known(installation: Installation, ids: Sequence[str]) -> None:
    known = installation.store.workflows.names_of(ids, patience=CALLER_PATIENCE)
    unknown = [each for each in ids if each not in known]
    if unknown:
        raise WorkflowNotFound(f"There is no workflow {', '.join(map(repr, unknown[:10]))}; nothing was done.")


def _send(installation: Installation, messages: Sequence[StoredMessage]) -> None:
    if refused := send_stored(installation.app, messages):
        installation.store.workflows.unsent(refused, patience=CALLER_PATIENCE)
