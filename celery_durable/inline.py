"""A Celery task as the body of a step: the request that it sees, and what its control flow means there.

=====================  ==============================================================================
in the task            in an inline step
=====================  ==============================================================================
``self.request``       its own: ``id`` is the idempotency key, ``parent_id`` the workflow, ``retries``
                       the failed tries, ``is_eager`` is true
``self.retry(…)``      the step is tried again, as Celery counts and delays it
``self.update_state``  stores the state of the workflow
``raise Ignore()``     the step is done, and its value is None
``raise Reject(…)``    with ``requeue=True`` it is tried again, else it has failed with a StepError
=====================  ==============================================================================
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import partial
from typing import Any

from celery import Task, _state
from celery.app.task import Context
from celery.exceptions import Ignore, Reject, Retry
from celery.utils.time import maybe_make_aware

from .engine.context import current_attempt, current_step
from .engine.retry import TryAgain
from .exceptions import StepError

_AUTORETRY = "celery.app.autoretry"

#: The requests of the async functions that run in this context, by the names of their tasks.
_requests: ContextVar[dict[str, Context]] = ContextVar("celery_durable_requests", default={})  # noqa: B039 - never changed


class InlineBody:
    """Calls ``run``, the body of a task, as a step.

    ``as_celery``: Celery's own ``autoretry_for`` decides about the next try and its delay; otherwise the step's
    policy does, and only an explicit ``self.retry`` is Celery's.
    """

    def __init__(self, task: Any, run: Callable[..., Any], *, as_celery: bool) -> None:
        self._task = task
        self._run = run
        self._as_celery = as_celery

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the body with a request of its own, so that a bound task sees itself and not its workflow."""
        request = _request(args, kwargs)
        with self._translated(), _pushed(self._task, request):
            value = self._run(*args, **kwargs)
        return self._awaited(value, request) if inspect.iscoroutine(value) else value

    async def _awaited(self, value: Any, request: Context) -> Any:
        with self._translated(), awaiting(self._task, request):
            return await value

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except Retry as retry:
            if not self._as_celery and _is_automatic(retry):
                raise retry.exc from retry.exc.__cause__
            raise TryAgain(retry.exc, _seconds_until(self._task, retry.when)) from retry
        except Ignore:
            return
        except Reject as reject:
            error = StepError(str(reject.reason), "celery.exceptions.Reject")
            if reject.requeue:
                raise TryAgain(error, None) from reject
            raise error from reject


def awaited_request(task: Any) -> Context | None:
    """Return the request of a task whose async function runs in this context."""
    return _requests.get().get(task.name)


@contextmanager
def awaiting(task: Any, request: Context) -> Iterator[None]:
    """Let the coroutine of a task see its request on the event loop, where many of them take turns."""
    token = _requests.set({**_requests.get(), task.name: request})
    try:
        yield
    finally:
        _requests.reset(token)


def update_state(task: Any, task_id: str | None, state: str | None, meta: Any, kwargs: dict[str, Any]) -> None:
    """Store a state: of the workflow, if the task runs inline and names no other."""
    attempt = current_attempt()
    if task_id is None and attempt is not None and current_step() is not None and is_inline(task):
        attempt.show_state(state, meta)
    else:
        type(task).update_state(task, task_id, state, meta, **kwargs)


def adopt(task: Any) -> None:
    """Let ``update_state`` of an unmodified task act on its workflow while it runs inline."""
    vars(task).setdefault("update_state", partial(_update_state, task))


def _update_state(
    task: Any, task_id: str | None = None, state: str | None = None, meta: Any = None, **kwargs: Any
) -> None:
    update_state(task, task_id, state, meta, kwargs)


def is_inline(task: Any) -> bool:
    """Tell whether the running body of a task is a step."""
    return bool(task.request.get("durable_inline"))


def _request(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Context:
    attempt, step = current_attempt(), current_step()
    assert attempt is not None
    assert step is not None
    return Context(
        id=step.idempotency_key,
        root_id=attempt.root_id,
        parent_id=attempt.id,
        args=args,
        kwargs=kwargs,
        retries=step.attempt - 1,
        called_directly=False,
        # Celery's retry then only counts, and leaves it to us to do it.
        is_eager=True,
        durable_inline=True,
        hostname=attempt.worker,
    )


@contextmanager
def _pushed(task: Any, request: Context) -> Iterator[None]:
    _state._task_stack.push(task)
    task.request_stack.push(request)
    try:
        yield
    finally:
        task.request_stack.pop()
        _state._task_stack.pop()


def _is_automatic(retry: Retry) -> bool:
    """Tell whether Celery's ``autoretry_for`` has asked for this retry, and not the body itself."""
    frames = []
    traceback = retry.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    names = [(frame.f_globals.get("__name__"), frame.f_code.co_name) for frame in frames]
    return any(
        outer == (_AUTORETRY, "run") and inner[1] == Task.retry.__name__
        for outer, inner in zip(names[:-1], names[1:], strict=True)
    )


def _seconds_until(task: Any, when: Any) -> float | None:
    if isinstance(when, datetime):
        when = (maybe_make_aware(when, task.app.timezone) - task.app.now()).total_seconds()
    return None if when is None else max(float(when), 0.0)
