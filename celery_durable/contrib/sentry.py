"""Sentry's SDK: an error of a step is not yet one of the workflow."""

from __future__ import annotations

import sys
from typing import Any

from ..engine.context import current_attempt
from ..engine.observer import Observer


class StepErrors(Observer):
    """Keeps Sentry's Celery integration from reporting what steps raise in a workflow, where Sentry is in use.

    It reports whatever leaves a task's call. Of a step that is called in a workflow that would be an error which the
    workflow may catch, or be retried for, and again on each replay. The workflow's own failure is reported, once.
    """

    def claimed(self, workflow_id: str, attempt: int) -> None:
        """Filter in the scope that the integration makes for this delivery, and drops after it."""
        sdk = sys.modules.get("sentry_sdk")
        # Version 1 of the SDK has neither of both functions, and reports as it likes.
        if sdk is not None and hasattr(sdk, "get_client") and sdk.get_client().get_integration("celery") is not None:
            sdk.get_isolation_scope().add_event_processor(_without_step_errors)


def _without_step_errors(event: Any, hint: Any) -> Any:
    if current_attempt() is None or not _is_of_a_task(event):
        return event
    # It may become the workflow's own error, and must not count as reported then.
    sys.modules["sentry_sdk.integrations.dedupe"].DedupeIntegration.reset_last_seen()
    return None


def _is_of_a_task(event: Any) -> bool:
    values = (event.get("exception") or {}).get("values") or [{}]
    return any((each.get("mechanism") or {}).get("type") == "celery" for each in values)
