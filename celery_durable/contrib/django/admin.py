"""Workflows in the admin: to look at, and to steer with the permission to change them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils.html import format_html, format_html_join

import celery_durable as durable

from ... import states
from .models import Workflow
from .schema import alias_of_workflows

_FACTS = (
    "id", "name", "queue", "state", "waiting_for", "attempt", "crashes", "created_at", "started_at", "finished_at",
    "wake_at", "deadline", "parent_id", "root_id", "forked_from",
)  # fmt: skip
#: Characters of one value that a page shows.
_MOST_SHOWN = 10_000


@admin.register(Workflow)
class WorkflowAdmin(admin.ModelAdmin):
    """Nothing is added or deleted here: workflows are started by the project, and go with their retention."""

    list_display = ("id", "name", "state", "waiting_for", "attempt", "created_at", "finished_at")
    list_filter = ("state", "queue")
    search_fields = ("id__exact", "name")
    search_help_text = "A workflow's id, or a part of its task's name"
    show_full_result_count = False
    fields = readonly_fields = (*_FACTS, "arguments", "outcome", "steps")
    actions = ("cancel", "resume", "fork")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Workflow]:
        """Read from the database of the workflows, whatever a router says."""
        return Workflow.objects.using(alias_of_workflows())

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> Workflow | None:
        """Read all that a page shows, once; what keeps it from being read is a message on that page."""
        workflow: Workflow | None = super().get_object(request, object_id, from_field)
        if workflow is not None:
            try:
                workflow.shown = durable.get_workflow_status(workflow.id)
                workflow.shown_steps = durable.list_workflow_steps(workflow.id)
            except durable.exceptions.DurableError as error:
                self.message_user(request, str(error), messages.ERROR)
        return workflow

    def changeform_view(
        self,
        request: HttpRequest,
        object_id: str | None = None,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        """Show no buttons to save what can't be changed."""
        buttons = {"show_save": False, "show_save_and_continue": False, "show_save_and_add_another": False}
        return super().changeform_view(request, object_id, form_url, {**(extra_context or {}), **buttons})

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Nobody has it."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Workflow | None = None) -> bool:
        """Nobody has it."""
        return False

    def save_model(self, request: HttpRequest, obj: Workflow, form: Any, change: bool) -> None:
        """Refuse: what isn't readonly would be written past all rules."""
        raise PermissionDenied

    @admin.display(description="arguments")
    def arguments(self, workflow: Workflow) -> str:
        """Show how it was called."""
        status = workflow.shown
        if status is None:
            return "-"
        if status.args is None:
            return "(They can't be read here.)"
        named = (f"{name}={_shown(value)}" for name, value in (status.kwargs or {}).items())
        return ", ".join([*map(_shown, status.args), *named]) or "-"

    @admin.display(description="outcome")
    def outcome(self, workflow: Workflow) -> str:
        """Show what it has returned or raised."""
        status = workflow.shown
        if status is None or (status.error is None and status.state != states.SUCCESS):
            return "-"
        return _shown(status.result if status.error is None else status.error)

    @admin.display(description="steps")
    def steps(self, workflow: Workflow) -> str:
        """Show what it has done."""
        rows = (
            (step.key, step.state, step.tries, step.started_at, step.finished_at or "", _outcome_of(step))
            for step in workflow.shown_steps
        )
        return format_html(
            "<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>",
            format_html_join(
                "", "<th>{}</th>", ((each,) for each in ("step", "state", "tries", "from", "to", "outcome"))
            ),
            format_html_join("", "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>", rows),
        )

    @admin.action(description="Cancel selected workflows", permissions=["change"])
    def cancel(self, request: HttpRequest, chosen: QuerySet[Workflow]) -> None:
        """End them as CANCELLED; those that have ended already are left alone."""
        self._steer(request, chosen, "cancelled", durable.cancel_workflows)

    @admin.action(description="Resume selected workflows", permissions=["change"])
    def resume(self, request: HttpRequest, chosen: QuerySet[Workflow]) -> None:
        """Let those go on that have ended without success."""
        self._steer(request, chosen, "resumed", durable.resume_workflows)

    @admin.action(description="Start selected workflows again as new ones", permissions=["change"])
    def fork(self, request: HttpRequest, chosen: QuerySet[Workflow]) -> None:
        """Start new ones with the same arguments."""
        self._steer(request, chosen, "started again", durable.fork_workflows)

    def _steer(
        self, request: HttpRequest, chosen: QuerySet[Workflow], done: str, act: Callable[[list[str]], Iterable[Any]]
    ) -> None:
        """Act on all that are chosen, or on none; say what has come of it."""
        try:
            count = len(list(act([str(workflow.id) for workflow in chosen])))
        except durable.exceptions.DurableError as error:
            self.message_user(request, str(error), messages.ERROR)
        else:
            self.message_user(request, f"{count} workflow(s) {done}.", messages.SUCCESS)


def _outcome_of(step: durable.StepInfo) -> str:
    if step.finished_at is None:
        return ""
    return _shown(step.output if step.error is None else step.error)


def _shown(value: Any) -> str:
    """Return a value as text of a length that a page bears."""
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"[:_MOST_SHOWN]
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text[:_MOST_SHOWN]
