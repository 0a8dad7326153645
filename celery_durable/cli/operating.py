"""Commands that keep workflows running: recover, health, prune, migrate, advise."""

from __future__ import annotations

from typing import Any

import click
from celery.bin.base import CeleryOption, handle_preload_options

import celery_durable as durable

from .command import DurableCommand, app_of, ask, import_tasks, json_option, yes_option
from .filters import BATCH, seconds_of
from .output import as_json as plain
from .output import duration, echo_json, line, progress


@click.command(cls=DurableCommand)
@json_option
@click.pass_context
@handle_preload_options
def recover(ctx: click.Context, as_json: bool, **options: Any) -> None:
    """Run all duties of the recovery once, and say what each has found."""
    from ..beat import TASK

    found = app_of(ctx).tasks[TASK]()
    if as_json:
        echo_json(found)
        return
    for duty, count in found.items():
        click.echo(f"{duty}: {count}")


@click.command(cls=DurableCommand)
@json_option
@click.pass_context
@handle_preload_options
def health(ctx: click.Context, as_json: bool, **options: Any) -> None:
    """Say what is wrong, each problem in a line; the exit status is 1 then, and 0 if all is well."""
    found = durable.check_health(app=app_of(ctx))
    if as_json:
        echo_json({"ok": found.ok, **plain(found)})
    else:
        for problem in found.problems or (_all_is_well(found),):
            click.echo(line(problem))
    ctx.exit(0 if found.ok else 1)


@click.command(cls=DurableCommand)
@click.option(
    "--older-than",
    cls=CeleryOption,
    type=seconds_of,
    metavar="DURATION",
    help="Not durable_retention, but 90s, 12h, 7d.",
)
@yes_option
@json_option
@click.pass_context
@handle_preload_options
def prune(ctx: click.Context, older_than: float | None, yes: bool, as_json: bool, **options: Any) -> None:
    """Delete workflows that finished longer ago than the retention allows, in batches, while all else goes on."""
    from ..client import CALLER_PATIENCE
    from ..installation import installed_on

    installation = installed_on(app_of(ctx))
    kept = installation.config.kept
    if older_than is not None:
        if any(age is None or older_than < age for age in kept.values()):
            ask(f"Delete what finished {duration(older_than)} ago, which durable_retention keeps?", yes=yes)
        kept = dict.fromkeys(kept, older_than)
    deleted = 0
    with progress("Deleting") as advance:
        while ids := installation.store.workflows.prune(kept=kept, limit=BATCH, patience=CALLER_PATIENCE):
            deleted += len(ids)
            advance(len(ids))
    if as_json:
        echo_json({"deleted": deleted})
    else:
        click.echo(f"{deleted:,} deleted")


@click.command(cls=DurableCommand)
@click.option("--check", cls=CeleryOption, is_flag=True, help="Exit with status 1 if a migration is missing.")
@click.option("--sql", "as_sql", cls=CeleryOption, is_flag=True, help="Print the SQL that is missing, change nothing.")
@click.option("--markers", cls=CeleryOption, is_flag=True, help="Print SQL for other databases with atomic steps.")
@json_option
@click.pass_context
@handle_preload_options
def migrate(ctx: click.Context, check: bool, as_sql: bool, markers: bool, as_json: bool, **options: Any) -> None:
    """Bring the database schema up to date."""
    from ..installation import installed_on
    from ..store import markers as marking
    from ..store import migrate as migrations

    installation = installed_on(app_of(ctx))
    url, schema = installation.url(), installation.config.schema
    if markers:
        click.echo(marking.script(schema))
        return
    if as_sql:
        for number in migrations.missing_in(url, schema):
            click.echo(migrations.script(schema, number))
    elif check:
        missing = migrations.missing_in(url, schema)
        _tell("missing", missing, as_json)
        ctx.exit(1 if missing else 0)
    else:
        _tell("applied", migrations.migrate(url, schema), as_json)


@click.command(cls=DurableCommand)
@json_option
@click.pass_context
@handle_preload_options
def advise(ctx: click.Context, as_json: bool, **options: Any) -> None:
    """Say which tasks look like workflows or steps, and what fights with durability; contact nobody."""
    import os
    from dataclasses import replace

    from ..advice import advise

    app = ctx.obj.app
    import_tasks(app)
    app.finalize()
    found = [replace(each, file=os.path.relpath(each.file) if each.file else "") for each in advise(app)]
    if as_json:
        echo_json(found)
        return
    for each in found:
        place = f"{each.file}:{each.line}" if each.file else "settings"
        click.echo(f"{place}: {each.task or 'the app'}: {each.what}. {each.remedy}.")
    click.echo(f"{len(found)} findings" if found else "nothing to say")


def _tell(what: str, numbers: list[int], as_json: bool) -> None:
    if as_json:
        echo_json({what: numbers})
    else:
        click.echo(f"{what}: {numbers}" if numbers else "up to date")


def _all_is_well(found: durable.Health) -> str:
    alive = sum(node.alive for node in found.nodes)
    running = sum(node.running for node in found.nodes)
    swept = "never" if found.sweep_age is None else f"{duration(found.sweep_age)} ago"
    return f"ok: workers: {alive}, running: {running}, dead: {found.dead}, last sweep: {swept}"
