"""A Celery task as the body of a step: the request that it sees, and what its control flow means there.

======================  ===============================================================================
in the task             in an inline step
======================  ===============================================================================
``self.request``        its own: ``id`` is the idempotency key, ``parent_id`` the workflow, ``retries``
                        the failed tries, ``is_eager`` is true
``self.retry(…)``       the step is tried again, as Celery counts and delays it, with the same arguments;
                        options of the message mean nothing. With ``throw=False`` what the body then
                        returns or raises counts
``self.update_state``   stores the state of the workflow
``raise Ignore()``      the step is done, and its value is None
``raise Reject(…)``     it has failed with a StepError; with ``requeue=True`` it is tried again, as often
                        as ``max_retries`` says and after the step's own delay
``self.replace(…)``     NotAllowedInStep
``on_failure`` & Co.    the task's handlers and Celery's signals aren't called, as for a task that is
                        called like a function; the workflow's own are
======================  ===============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import partial
from types import CoroutineType, FunctionType, MethodType
from typing import Any

from celery import _state
from celery.app.task import Context
from celery.exceptions import Ignore, Reject, Retry
from celery.utils.time import maybe_make_aware

from .config import seconds
from .engine.context import Attempt, RunningStep, current_attempt, current_step
from .engine.retry import GivenUp, TryAgain
from .exceptions import MaxRetriesExceededError, NotAllowedInStep, StepError

_AUTORETRY = "celery.app.autoretry"
#: The second one takes its place in a worker.
_CELERYS_CALLS = ("celery.app.task", "celery.app.trace")
_FOR_EVER = float("inf")

#: The requests of the async functions that run in this context, by the names of their tasks.
_awaited_task: ContextVar[Any] = ContextVar("celery_durable_awaited_task", default=None)
_requests: ContextVar[dict[str, Context]] = ContextVar("celery_durable_requests", default={})  # noqa: B039 - never changed


class InlineBody:
    """Calls ``run``, the body of a task, as a step.

    ``as_celery``: Celery's own ``autoretry_for`` decides about the next try and its delay; otherwise the step's
    policy does, and only an explicit ``self.retry`` is Celery's.
    """

    def __init__(self, task: Any, run: Callable[..., Any], *, as_celery: bool) -> None:
        self._task = task
        self._run = run
        # Celery's own __call__ only gives the body a request, which it has here already.
        self._is_bare = _is_celerys(run)
        self._as_celery = as_celery

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the body with a request of its own, so that a bound task sees itself and not its workflow."""
        task, attempt, step, value = self._task, current_attempt(), current_step(), None
        assert attempt is not None
        assert step is not None
        inline = _Try(task, step, self._as_celery)
        request = _request(inline, attempt, step, args, kwargs)
        request._protected = self._is_bare  # by which Celery knows that a call from now on is another one
        # Not as context managers, whose generators would cost as much as all of the rest: each step comes by here.
        _state._task_stack.push(task)
        task.request_stack.push(request)
        try:
            value = inline.checked((task.run if self._is_bare else self._run)(*args, **kwargs))
        except Exception:
            with inline.translated():
                raise
        finally:
            task.request_stack.pop()
            _state._task_stack.pop()
            inline.leave()
        return self._awaited(value, inline, request) if isinstance(value, CoroutineType) else value

    async def _awaited(self, value: Any, inline: _Try, request: Context) -> Any:
        with inline.translated(), awaiting(self._task, request):
            return inline.checked(await value)


class _Try:
    """One try of a task that runs inline."""

    def __init__(self, task: Any, step: RunningStep, as_celery: bool) -> None:
        self._task = task
        self._step = step
        self._as_celery = as_celery
        #: The error with which Celery has refused another try.
        self._refusal: Exception | None = None

    def retry(self, celerys: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Ask Celery for another try, which only counts: it is left to the step to do it."""
        handled = self._step.handled()
        if kwargs.get("max_retries") is None and not self._as_celery:
            kwargs = {**kwargs, **self._limit()}
        try:
            asked = celerys(*args, **kwargs)
        except Retry as raised:
            self._heed(raised, kwargs.get("exc"), handled)
            raise
        except Exception as refusal:
            if not _is_caught_by_autoretry(handled):
                self._refusal = refusal
            raise
        return self._heed(asked, kwargs.get("exc"), handled)

    def _heed(self, asked: Retry, given: Any, handled: BaseException | None) -> Retry:
        """Note why another try is asked for: Celery makes something else of an error that pickle can't keep."""
        request, again = self._task.request, asked.sig
        if again is not None and (list(again.args), again.kwargs) != (list(request.args), request.kwargs):
            raise NotAllowedInStep(
                f"{self._task.name} can't be retried with other arguments while it is a step, whose outcome is kept "
                "for the arguments that it was called with: leave args and kwargs out of self.retry()."
            )
        reasons = (given, asked.exc, handled)
        asked.durable_reason = next((reason for reason in reasons if isinstance(reason, Exception)), None)
        return asked

    def _limit(self) -> dict[str, Any]:
        """Return the ``max_retries`` of the step where the task itself has others."""
        limit = self._step.asked_retries
        return {} if limit == self._task.max_retries else {"max_retries": _FOR_EVER if limit is None else limit}

    def checked(self, value: Any) -> Any:
        """Return what the body has returned; a Retry is as good as raised."""
        if isinstance(value, Retry):
            raise value
        return value

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Make of Celery's control flow what it means for a step."""
        try:
            yield
        except Retry as asked:
            error = self._after(asked)
            raise error from _cause_of(error)
        except Ignore:
            return
        except Reject as reject:
            raise self._rejected(reject) from None
        except Exception as error:
            if error is self._refusal:
                raise GivenUp(error) from error
            raise
        finally:
            self.leave()

    def leave(self) -> None:
        """Forget what Celery leaves to the next run of the task, which may be another workflow's."""
        vars(self._task).pop("override_max_retries", None)

    def _after(self, asked: Retry) -> BaseException:
        """Return what the step shall raise for a retry."""
        caught = asked.__context__
        if caught is not None and caught is self._refusal:
            return GivenUp(self._refusal)
        if caught is not None and _is_caught_by_autoretry(caught) and not self._is_left_to_celery(caught):
            return self._rejected(caught) if isinstance(caught, Reject) else caught
        reason = vars(asked).get("durable_reason", asked.exc)
        if asked.sig is None and not self._step.may_ask:  # made by the body itself: Celery hasn't counted
            return GivenUp(MaxRetriesExceededError(f"It has asked too often: {asked}") if reason is None else reason)
        return TryAgain(reason, _seconds_until(self._task, asked.when))

    def _is_left_to_celery(self, error: BaseException) -> bool:
        return self._as_celery and isinstance(error, Exception)

    def _rejected(self, reject: Reject) -> TryAgain:
        error = StepError(str(reject.reason), "celery.exceptions.Reject")
        error.__cause__ = reject
        return TryAgain(error, None) if reject.requeue and self._step.may_ask else GivenUp(error)


def retry(task: Any, celerys: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Retry a task, which inline is a step: ``celerys`` is Celery's own ``retry``, or what the app has made of it."""
    inline = task.request.get("durable_inline")
    return celerys(*args, **kwargs) if inline is None else inline.retry(celerys, args, kwargs)


def replace(task: Any, celerys: Callable[..., Any], sig: Any) -> Any:
    """Replace a task as Celery does, but not a step."""
    if is_inline(task):
        raise NotAllowedInStep(
            f"{task.name} can't replace itself while it is a step: call the other task in the workflow instead, as a "
            "step of its own."
        )
    return celerys(sig)


def update_state(
    task: Any,
    celerys: Callable[..., Any],
    task_id: str | None = None,
    state: str | None = None,
    meta: Any = None,
    **kwargs: Any,
) -> None:
    """Store a state: of the workflow, if the task runs inline and names no other."""
    attempt = current_attempt()
    if attempt is not None and is_inline(task) and task_id in (None, task.request.id):
        attempt.show_state(state, meta)
    else:
        if attempt is not None and attempt.id == (task_id or task.request.id):
            attempt.end_started()
        celerys(task_id, state, meta, **kwargs)


def push_request(task: Any, celerys: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Let a task that calls itself see the inline request, which older Celery hides behind an empty one."""
    request = vars(task.request) if is_inline(task) else {}
    celerys(*args, **{**request, **kwargs})


def adopt(task: Any) -> None:
    """Let an unmodified task know when it runs inline."""
    for ours in (retry, replace, update_state, push_request):
        name = ours.__name__
        vars(task).setdefault(name, partial(ours, task, partial(getattr(task.__class__, name), task)))


def is_inline(task: Any) -> bool:
    """Tell whether the running body of a task is a step."""
    return task.request.get("durable_inline") is not None


def awaited_request(task: Any) -> Context | None:
    """Return the request of a task whose async function runs in this context."""
    return _requests.get().get(task.name)


@contextmanager
def awaiting(task: Any, request: Context) -> Iterator[None]:
    """Let the coroutine of a task see its request on the event loop, where many of them take turns."""
    token, outer = _requests.set({**_requests.get(), task.name: request}), _awaited_task.set(task)
    try:
        yield
    finally:
        _awaited_task.reset(outer)
        _requests.reset(token)


def running_task() -> Any:
    """Return the task whose function runs here, on the event loop as elsewhere; None if there is none."""
    return _state.get_current_task() or _awaited_task.get()


def _request(
    inline: _Try, attempt: Attempt, step: RunningStep, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Context:
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
        headers={},
        hostname=attempt.worker,
        durable_inline=inline,
    )


def _is_celerys(call: Callable[..., Any]) -> bool:
    """Tell whether this is Celery's own ``__call__`` of a task: not the app's, nor what a tracer has put there."""
    # By types, as what wrapt puts around a method has the method's own globals, and says that it is a method.
    if type(call) is not MethodType or type(call.__func__) is not FunctionType:
        return False
    return call.__func__.__globals__.get("__name__") in _CELERYS_CALLS


def _is_caught_by_autoretry(error: BaseException | None) -> bool:
    """Tell whether an error has passed the body, and Celery's ``autoretry_for`` has caught it."""
    traceback = None if error is None else error.__traceback__
    return traceback is not None and traceback.tb_frame.f_globals.get("__name__") == _AUTORETRY


def _cause_of(error: BaseException) -> BaseException | None:
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _seconds_until(task: Any, when: Any) -> float | None:
    if isinstance(when, datetime):
        when = (maybe_make_aware(when, task.app.timezone) - task.app.now()).total_seconds()
    if isinstance(when, int | float) and when < 0:
        when = 0
    return None if when is None else seconds(when, "countdown", zero=True)
