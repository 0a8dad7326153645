"""A step, or an unmodified task, that a workflow has sent to another worker: a workflow of that one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from celery import Celery

from .engine.context import current_attempt
from .exceptions import Suspended
from .installation import STEP_TASK
from .late import late
from .shapes import Shape, shape_of
from .task import Step, Workflow

if TYPE_CHECKING:
    from . import adapter
else:
    adapter = late("adapter")


class StepTask(Workflow[Any, Any]):
    """The base of the one task that does this; kept in its parent, and shown, under the step's own name."""

    abstract = True
    Strategy = "celery_durable.strategy:of_step"

    def _label(self, args: tuple[Any, ...]) -> str:
        return str(args[0])

    def durable_shape(self, args: Sequence[Any] | None) -> Shape | None:
        """Return that of the step."""
        step = self.app.tasks.get(args[0]) if args else None
        return step.durable_spec.shape if isinstance(step, Step) else shape_of(step) if step is not None else None


def add_step_task(app: Celery) -> None:
    """Register the task that runs a step."""

    @app.task(name=STEP_TASK, base=StepTask, shared=False)
    def run_step(name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Run a step as the only one of a workflow; a worker that doesn't know it leaves it to others."""
        task = app.tasks.get(name)
        if task is None:
            _leave_to_others(name)
        step = task if isinstance(task, Step) else adapter.as_step(task)
        return step.durable_step.call(tuple(args), kwargs)


def _leave_to_others(name: str) -> None:
    attempt = current_attempt()
    assert attempt is not None
    raise attempt.unwind(Suspended(f"a worker that has the task {name}", attempt.engine.republish_after))
