"""Handles of workflows: Celery's AsyncResult, which a workflow awaits without a worker."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from celery import Celery
from celery.backends.base import DisabledBackend
from celery.exceptions import TaskRevokedError
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import AsyncResult

from . import states
from .cancellation import cancel_all
from .client import CALLER_PATIENCE, outcome_of, row_of
from .config import timeout_of
from .engine.context import Attempt, current_attempt, current_step, in_plain_function
from .engine.loop import ON_LOOP
from .engine.step import Answer, Call, StepSpec
from .engine.wait import Ends
from .engine.waiting import IN_THREAD, complete
from .exceptions import ConfigurationError, DurableError, NotAllowedInStep, NotInWorkflow
from .installation import Installation, find
from .outboxes import forbid_in_outbox
from .shapes import Shape
from .store.rows import WorkflowRow

_FIRST_LOOK, _LONGEST_PAUSE = 0.02, 1.0

R = TypeVar("R")

if TYPE_CHECKING:

    class Result(AsyncResult, Generic[R]):
        id: str

        def get(self, timeout: float | None = None, propagate: bool = True, **kwargs: Any) -> R: ...
        @property
        def state(self) -> str: ...
        def ready(self) -> bool: ...
        def successful(self) -> bool: ...
        def failed(self) -> bool: ...
else:

    class Result(AsyncResult):
        """Subscripted by type checkers only."""

        def __class_getitem__(cls, item: Any) -> Any:
            return cls


class WorkflowHandle(Result[R]):
    """A Celery AsyncResult that reads Postgres where the app has no result backend."""

    def __init__(self, id: str, app: Celery | None = None, **kwargs: Any) -> None:
        super().__init__(id, app=find(app).app, **kwargs)
        #: What a workflow that awaits it rebuilds its result to; known where its task is.
        self.durable_shape: Shape | None = None

    def get(self, timeout: float | timedelta | None = None, propagate: bool = True, **kwargs: Any) -> R:
        """Wait for the workflow and return its result, or raise its error.

        In a workflow this is a durable call, which waits without a worker and sees the same outcome on every replay.
        ``timeout`` is in seconds or a timedelta; celery.exceptions.TimeoutError is raised when it has passed. With
        ``propagate=False`` the error is returned. Of a cancelled workflow that is WorkflowCancelledError, of one that
        was given up WorkflowDead. In a step and in an outbox it raises NotAllowedInStep.
        """
        attempt, limit = self._awaiting(), timeout_of(timeout)
        if attempt is not None:
            if attempt.on_loop:
                raise NotInWorkflow(
                    "get() would block the event loop: write `await handle.aget()` in an async workflow."
                )
            return self._got(complete(self._ends(attempt, limit).run(IN_THREAD)), propagate)
        return self._wait(limit, propagate) if self._reads_postgres else self._backends(limit, propagate, kwargs)

    wait = get

    def _backends(self, timeout: float | None, propagate: bool, options: dict[str, Any]) -> R:
        """Wait for what the result backend says; why a workflow was cancelled is only known in Postgres."""
        try:
            result: R = super().get(timeout=timeout, propagate=propagate, **options)
        except TaskRevokedError as error:
            installation = find(self.app)
            row = row_of(installation, self.id)
            raise outcome_of(installation, row)[1] or error from error
        return result

    def aget(
        self, timeout: float | timedelta | None = None, propagate: bool = True, **kwargs: Any
    ) -> Coroutine[Any, Any, R]:
        """Return what is awaited for the result, as ``get``, without blocking the event loop."""
        attempt = self._awaiting()
        if attempt is None or not attempt.on_loop:
            return asyncio.to_thread(self.get, timeout, propagate, **kwargs)
        return self._agot(attempt, self._ends(attempt, timeout_of(timeout)), propagate)

    def revoke(self, *args: Any, **kwargs: Any) -> None:
        """Cancel the workflow, as Celery's ``revoke`` cancels a task: in the database first."""
        cancel_all(find(self.app), [self.id], children=False)
        super().revoke(*args, **kwargs)

    def target_in(self, attempt: Attempt) -> str:
        """Return the id by which a workflow awaits this one; raise ConfigurationError or ValueError if it can't."""
        if find(self.app).engine is not attempt.engine:
            raise ConfigurationError(
                f"The workflow {self.id} is another app's: only workflows of one app await each other."
            )
        if self.parent is not None:
            raise ConfigurationError(
                "A workflow can't await a chain or chord of Celery's: await its tasks one after the other, each by "
                "`task.delay(…).get()`, or together by durable.gather(…)."
            )
        target = attempt.aliases.get(self.id, self.id)
        if target == attempt.id:
            raise ValueError(f"The workflow {target} can't await itself: it would never end.")
        return target

    def _awaiting(self) -> Attempt | None:
        if current_step() is not None:
            raise NotAllowedInStep("A step can't wait for a workflow: do that in the workflow, between steps.")
        if in_plain_function():
            raise NotInWorkflow(
                "A workflow function that is called directly, or in eager mode, runs without a database and can't wait "
                "for a workflow: run it by the fixture durable_run of celery_durable.testing."
            )
        forbid_in_outbox("wait for a workflow")
        attempt = current_attempt()
        if attempt is None:
            self._check_committed(find(self.app))
        else:
            attempt.check_caller()
        return attempt

    def _check_committed(self, installation: Installation) -> None:
        """Raise NotAllowedInStep if the transaction around this call has started it: that would wait for ever."""
        if installation.surrounding() is None:
            return
        if self.id not in installation.store.workflows.names_of([self.id], patience=CALLER_PATIENCE):
            raise NotAllowedInStep(
                f"The workflow {self.id} doesn't start before the transaction around this call is committed: wait "
                "for it afterwards."
            )

    def _ends(self, attempt: Attempt, timeout: float | None) -> Ends:
        target = self.target_in(attempt)
        late = None
        if timeout is not None:
            late = attempt.engine.codec.verdict(_too_late(target, timeout))
        return Ends([end_of(attempt, target, self.durable_shape)], [target], timeout, late)

    async def _agot(self, attempt: Attempt, ends: Ends, propagate: bool) -> R:
        return self._got(await attempt.flights.carry(ends.run(ON_LOOP)), propagate)

    def _got(self, answers: Sequence[Answer], propagate: bool) -> R:
        (answer,) = answers
        value: Any = answer.error if answer.error is not None and not propagate else answer.get()
        return cast(R, value)

    def __reduce_args__(self) -> tuple[Any, ...]:
        return (self.id,)

    def _get_task_meta(self) -> dict[str, Any]:
        if not self._reads_postgres:
            meta: dict[str, Any] = super()._get_task_meta()
            return meta
        return self._meta_of(row_of(find(self.app), self.id))

    @property
    def _reads_postgres(self) -> bool:
        return isinstance(self.backend, DisabledBackend)

    def _wait(self, timeout: float | None, propagate: bool) -> R:
        installation = find(self.app)
        for pause in pauses(timeout):
            row = row_of(installation, self.id)
            if row.state in states.FINAL:
                return self._outcome(installation, row, propagate)
            time.sleep(pause)
        raise _too_late(self.id, timeout)

    def _outcome(self, installation: Installation, row: WorkflowRow, propagate: bool) -> R:
        result, error = outcome_of(installation, row)
        if error is not None and propagate:
            raise error
        value: Any = result if error is None else error
        return cast(R, value)

    def _meta_of(self, row: WorkflowRow) -> dict[str, Any]:
        result, error = outcome_of(find(self.app), row)
        if row.state == states.SUSPENDED:
            error = DurableError(row.waiting_for)  # as a result backend has it
        return {
            "task_id": self.id,
            "status": states.CELERY[row.state],
            "result": error if error is not None else result,
            "traceback": None,
            "children": [],
            "date_done": row.finished_at,
        }


def start_of(attempt: Attempt, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Settle the key of the call that starts another workflow."""
    return Call(attempt, StepSpec(f"{name}.delay"), args, kwargs)


def end_of(attempt: Attempt, target: str, shape: Shape | None) -> Call:
    """Settle the key of the call that awaits another workflow."""
    return Call(attempt, StepSpec("durable.get", shape=shape), (target,), {})


def pauses(timeout: float | None) -> Iterator[float]:
    """Return the pauses of somebody who asks again and again, in seconds; they get longer, and end with the timeout."""
    give_up_at = math.inf if timeout is None else time.monotonic() + timeout
    pause = _FIRST_LOOK
    while (left := give_up_at - time.monotonic()) > 0 or pause == _FIRST_LOOK:
        yield max(min(pause, left), 0.0)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _too_late(workflow_id: str, timeout: float | None) -> CeleryTimeoutError:
    return CeleryTimeoutError(f"The workflow {workflow_id} hasn't finished in {timeout:g} s.")
