"""Commands that look at workflows: list, show."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import click
from celery.bin.base import CeleryOption, handle_preload_options

import celery_durable as durable

from .command import DurableCommand, app_of, json_option
from .filters import MOST, counted, filter_options, filters_in, told
from .output import as_json as plain
from .output import echo_json, line

#: Bytes of a value that is shown without being asked for.
_SHOWN = 64 * 1024

_full = click.option("--full", cls=CeleryOption, is_flag=True, help="Load values of more than 64 KiB, too.")


@click.command("list", cls=DurableCommand)
@filter_options
@click.option("--search", cls=CeleryOption, help_group="Filters", help="Id, or a part of the name or of the error.")
@click.option("--limit", cls=CeleryOption, type=click.IntRange(min=0), default=100, show_default=True)
@click.option("--after", cls=CeleryOption, metavar="ID", help="The next page: only what is older than this workflow.")
@click.option("--count", cls=CeleryOption, is_flag=True, help=f"Count them by state, each up to {MOST:,}.")
@click.option("--ids", "only_ids", cls=CeleryOption, is_flag=True, help="Print ids, one a line, for other commands.")
@_full
@json_option
@click.pass_context
@handle_preload_options
def list_(
    ctx: click.Context,
    search: str | None,
    limit: int,
    after: str | None,
    count: bool,
    only_ids: bool,
    full: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """List workflows, the newest first."""
    app, filters = app_of(ctx), filters_in(options)
    if count:
        _count(app, filters, search, as_json)
        return
    place = None if after is None else durable.get_workflow_status(after, max_payload=0, app=app)
    size = 0 if only_ids or not as_json else None if full else _SHOWN
    found = durable.list_workflows(**filters, search=search, after=place, limit=limit, max_payload=size, app=app)
    if as_json:
        echo_json(found)
    elif only_ids:
        for status in found:
            click.echo(line(status.id))  # one that has several lines would be several ids to the next command
    else:
        _print_list(ctx, app, filters, search, found, limit)


@click.command(cls=DurableCommand)
@click.argument("id")
@click.option("--tracebacks", cls=CeleryOption, is_flag=True, help="Show the errors of all tries with tracebacks.")
@_full
@json_option
@click.pass_context
@handle_preload_options
def show(ctx: click.Context, id: str, tracebacks: bool, full: bool, as_json: bool, **options: Any) -> None:
    """Show a workflow: how it stands, what it has done, and its timeline."""
    app, size = app_of(ctx), None if full else _SHOWN
    status = durable.get_workflow_status(id, max_payload=size, app=app)
    attempts = durable.list_workflow_attempts(id, app=app)
    steps = durable.list_workflow_steps(id, max_payload=size, app=app)
    messages = durable.list_workflow_messages(id, max_payload=size, app=app)
    events = durable.list_workflow_events(id, max_payload=size, app=app)
    if as_json:
        more = {"attempts": attempts, "steps": steps, "messages": messages, "events": events}
        echo_json({**plain(status), **more})
        return
    from ..timeline import timeline
    from .tables import Page

    page = Page(no_color=ctx.obj.no_color)
    page.facts(status, full=full)
    page.timeline(timeline(status, attempts, steps, datetime.now(timezone.utc)), steps)
    page.attempts(attempts)
    page.messages(messages)
    page.events(events)
    page.errors(status, steps, tracebacks=tracebacks)


def _count(app: Any, filters: dict[str, Any], search: str | None, as_json: bool) -> None:
    if search is not None:
        raise click.UsageError("--count goes with all filters but --search.")
    counts = counted(app, filters)
    if as_json:
        echo_json(counts)
    else:
        click.echo(told(counts))


def _print_list(
    ctx: click.Context,
    app: Any,
    filters: dict[str, Any],
    search: str | None,
    found: list[durable.WorkflowStatus],
    limit: int,
) -> None:
    from .tables import Page

    if not found:
        click.echo("no workflow matches")
        return
    Page(no_color=ctx.obj.no_color).workflows(found)
    if search is None:
        click.echo(told(counted(app, filters)))
    if len(found) == limit:
        click.echo(f"There may be more: --after {line(found[-1].id)}")
