"""Changes of code under running workflows: ``durable.patched``, ``durable.deprecate_patch``."""

from __future__ import annotations

from .calls import check_name, only_in_workflow
from .engine.context import Attempt, in_plain_function
from .engine.step import StepSpec, call_step
from .exceptions import NondeterminismError

_WHAT = "know about patches"


def patched(change_id: str) -> bool:
    """Tell whether this workflow takes the new code of a change: False for one that had come past here without it.

    The answer is kept, and the same on every replay and at every call. Costs one step at the first call, nothing else.
    In a workflow function that is called directly, or in eager mode, it is True.

    Raises NotInWorkflow, NotAllowedInStep, ValueError for an id that can't be one.
    """
    _check(change_id)
    if in_plain_function():
        return True
    attempt = only_in_workflow(_WHAT)
    if change_id not in attempt.patches:
        attempt.patches[change_id] = _is_patched(attempt, change_id)
    return attempt.patches[change_id]


def deprecate_patch(change_id: str) -> None:
    """Say that only the new code of a change is left; to be deleted when no workflow is older than this.

    Stops a workflow that had come past here without the change in DEAD (NondeterminismError): its code is gone, and a
    deploy that brings it back lets it be resumed.

    Raises NotInWorkflow, NotAllowedInStep, ValueError for an id that can't be one.
    """
    _check(change_id)
    if in_plain_function():
        return
    attempt = only_in_workflow(_WHAT)
    if attempt.is_replaying and not _is_marked(attempt, change_id):
        attempt.nondeterminism = NondeterminismError(
            f"The workflow {attempt.id} has come past the change {change_id!r} on the old code, which deprecate_patch "
            "says is gone: deploy the code with patched() again, and resume it."
        )
        raise attempt.nondeterminism
    _mark(attempt, change_id)


def _is_patched(attempt: Attempt, change_id: str) -> bool:
    if attempt.is_replaying and not _is_marked(attempt, change_id):
        return False
    _mark(attempt, change_id)
    return True


def _mark(attempt: Attempt, change_id: str) -> None:
    if not attempt.patches.get(change_id):
        attempt.patches[change_id] = True
        call_step(attempt, StepSpec(_key(change_id)), lambda: None, (), {})


def _check(change_id: str) -> None:
    if "[" in check_name(change_id, "The id of a change"):
        raise ValueError(f"The id of a change can't contain a bracket, as {change_id!r} does.")


def _is_marked(attempt: Attempt, change_id: str) -> bool:
    name = _key(change_id)
    return any(key == name or key.startswith(f"{name}[") for key in attempt.history)


def _key(change_id: str) -> str:
    return f"durable.patched {change_id}"
