"""``durable.current``: what runs here."""

from __future__ import annotations

import uuid

from celery import _state

from .engine.context import Attempt, RunningStep, current_attempt, current_step
from .exceptions import NotInWorkflow


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
    def step(self) -> RunningStep:
        """The running step: ``name``, ``attempt`` (number of the try, from 1), ``deadline``, ``remaining()``.

        Raises NotInWorkflow outside a step of a workflow.
        """
        step = current_step()
        if step is None:
            raise NotInWorkflow("durable.current.step is only there in a step that a workflow has called.")
        return step

    @property
    def idempotency_key(self) -> str:
        """What makes repeating this step harmless, where the outside honours such keys.

        In a step: one key per step, the same on every try and every attempt. In a plain task: the task's id,
        the same on each delivery. Elsewhere: a fresh one.
        """
        step = current_step()
        if step is not None:
            return step.idempotency_key
        task = _state.get_current_task()
        if task is not None and task.request.id:
            return str(task.request.id)
        return str(uuid.uuid4())

    def _attempt(self) -> Attempt:
        attempt = current_attempt()
        if attempt is None:
            raise NotInWorkflow("durable.current says something only in a running workflow.")
        return attempt


current = Current()
