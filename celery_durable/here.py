"""``durable.current``: what runs here."""

from __future__ import annotations

import sys
import uuid
from datetime import timedelta
from typing import Any, NoReturn

from .config import seconds
from .engine.context import Attempt, PlainStep, RunningStep, current_attempt, current_plain_step, current_step
from .engine.retry import check_reason
from .exceptions import NotInWorkflow
from .inline import running_task
from .task import Step


class TaskStep:
    """A step that a worker runs as a plain Celery task: Celery's own retry and limits hold."""

    deadline = None

    def __init__(self, task: Any) -> None:
        self._task = task
        self.name: str = task.name
        self.attempt: int = (task.request.retries or 0) + 1

    def remaining(self) -> None:
        """Return None: Celery's limits don't say."""

    def retry(self, exc: Exception | None = None, countdown: float | timedelta | None = None) -> NoReturn:
        """Let Celery retry the task."""
        delay = None if countdown is None else seconds(countdown, "countdown", zero=True)
        error = sys.exc_info()[1] if exc is None else check_reason(exc)
        raise self._task.retry(exc=error, countdown=delay)


class Current:
    """The workflow and the step that the calling code belongs to; true only in a workflow."""

    def __bool__(self) -> bool:
        return current_attempt() is not None

    @property
    def workflow_id(self) -> str:
        """The id of the running workflow; raises NotInWorkflow outside."""
        return self._attempt().id

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1; raises NotInWorkflow outside."""
        return self._attempt().fence.attempt

    @property
    def step(self) -> RunningStep | TaskStep | PlainStep:
        """The running step, with ``name``, ``attempt``, ``deadline``, ``remaining()`` and ``retry(exc, countdown)``.

        ``attempt`` is the number of the try, from 1; ``deadline`` the end of the try on ``time.monotonic``'s clock,
        ``remaining()`` the seconds until then, both None without a limit. A step that a worker runs as a plain task
        has them, too, by Celery's own means; in one that is called plainly, ``retry`` raises the error. Raises
        NotInWorkflow where no step runs.
        """
        step = current_step()
        if step is not None:
            return step
        task, plain = running_task(), current_plain_step()
        if isinstance(task, Step) and task.request.id and (plain is None or plain.name == task.durable_spec.name):
            return TaskStep(task)
        if plain is not None:
            return plain
        raise NotInWorkflow("durable.current.step is only there in a step that a workflow has called.")

    @property
    def cancelled(self) -> bool:
        """Whether the workflow was cancelled, has run out of time, or was taken over by another worker.

        For loops in long steps, which nothing interrupts; asks the database at most once a second. False outside a
        workflow, in a thread that doesn't have the step's context, and while the database can't be reached.
        """
        attempt = current_attempt()
        return attempt is not None and attempt.is_over()

    @property
    def connection(self) -> Any:
        """The connection of an ``atomic`` step, in the transaction that its checkpoint will be in.

        With ``atomic=True`` it is psycopg's, with an alias Django's, with an engine or a sessionmaker SQLAlchemy's. It
        can't be committed by the step. Raises NotInWorkflow in any other step, and outside one.
        """
        step = current_step()
        if step is None or step.connection is None:
            raise NotInWorkflow("durable.current.connection is only there in a step with atomic=….")
        return step.connection

    @property
    def session(self) -> Any:
        """The Session of a step that is ``atomic`` in an engine or a sessionmaker of SQLAlchemy's.

        It is flushed when the body has returned, and ends with the step: what is left of it is detached then. Raises
        NotInWorkflow in any other step, and outside one.
        """
        step = current_step()
        if step is None or step.session is None:
            raise NotInWorkflow(
                "durable.current.session is only there in a step with atomic=engine or atomic=sessionmaker."
            )
        return step.session

    @property
    def idempotency_key(self) -> str:
        """What makes repeating this step harmless, where the outside honours such keys.

        In a step: one key per step, the same on every try and every attempt. In a plain task: the task's id,
        the same on each delivery. Elsewhere: a fresh one.
        """
        step = current_step()
        if step is not None:
            return step.idempotency_key
        task = running_task()
        if task is not None and task.request.id:
            return str(task.request.id)
        return str(uuid.uuid4())

    def _attempt(self) -> Attempt:
        attempt = current_attempt()
        if attempt is None:
            raise NotInWorkflow("durable.current says something only in a running workflow.")
        return attempt


current = Current()
