"""Commands that keep workflows running: recover, health, prune, migrate, advise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
from celery.bin.base import CeleryOption, handle_preload_options

import celery_durable as durable

from .. import states
from .command import DurableCommand, app_of, ask, import_tasks, json_option, yes_option
from .filters import BATCH, MOST, seconds_of
from .output import as_json as plain
from .output import duration, echo_json, line, number, progress

_final_state = click.Choice(sorted(states.FINAL), case_sensitive=False)


@click.command(cls=DurableCommand)
@json_option
@click.pass_context
@handle_preload_options
def recover(ctx: click.Context, as_json: bool, **options: Any) -> None:
    """Run all duties of the recovery once, and say what each has found."""
    from ..beat import TASK
    from ..recovery import DUTIES

    app = app_of(ctx)
    durable.list_workflows(limit=0, app=app)  # without a database that is one error, and not one of each duty
    found = app.tasks[TASK]()
    if failed := [duty for duty in DUTIES if duty not in found]:
        raise click.ClickException(f"These duties failed, and are left to the next sweep: {', '.join(failed)}.")
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
@click.option("--state", cls=CeleryOption, type=_final_state, multiple=True, help="Only those that ended like this.")
@click.option(
    "--older-than", cls=CeleryOption, type=seconds_of, metavar="DURATION", help="Not durable_retention, but 12h or 7d."
)
@yes_option
@json_option
@click.pass_context
@handle_preload_options
def prune(
    ctx: click.Context, state: Sequence[str], older_than: float | None, yes: bool, as_json: bool, **options: Any
) -> None:
    """Delete what finished longer ago than durable_retention allows, in batches, while all else goes on."""
    from ..client import CALLER_PATIENCE
    from ..installation import installed_on

    installation = installed_on(app_of(ctx))
    workflows, chosen = installation.store.workflows, state or states.FINAL
    allowed = {each: age for each, age in installation.config.kept.items() if each in chosen}
    kept = allowed if older_than is None else dict.fromkeys(allowed, older_than)
    old = workflows.count_old(kept=kept, most=MOST, patience=CALLER_PATIENCE)
    if old and any(_is_sooner(kept[each], age) for each, age in allowed.items()):
        ask(f"Delete {number(old, MOST)} workflows, also such as durable_retention keeps?", yes=yes)
    deleted = 0
    with progress("Delete", old if old < MOST else None) as advance:
        while ids := workflows.prune(kept=kept, limit=BATCH, patience=CALLER_PATIENCE):
            deleted += len(ids)
            advance(len(ids))
    if as_json:
        echo_json({"deleted": deleted})
    else:
        click.echo(f"{deleted:,} deleted")


@click.command(cls=DurableCommand)
@click.option("--check", cls=CeleryOption, is_flag=True, help="Exit with status 1 if a migration is missing.")
@click.option("--sql", "as_sql", cls=CeleryOption, is_flag=True, help="Print it as SQL, and change nothing.")
@click.option("--grant", cls=CeleryOption, metavar="ROLE", help="Let this role do all that workers and callers do.")
@click.option("--markers", cls=CeleryOption, is_flag=True, help="Print SQL for other databases with atomic steps.")
@json_option
@click.pass_context
@handle_preload_options
def migrate(
    ctx: click.Context, check: bool, as_sql: bool, grant: str | None, markers: bool, as_json: bool, **options: Any
) -> None:
    """Bring the database schema up to date."""
    from ..installation import installed_on
    from ..store import markers as marking
    from ..store import migrate as migrations
    from ..store import roles

    if check + as_sql + markers > 1 or (grant and (check or markers)):
        raise click.UsageError("Give one of --check, --sql and --markers; --grant goes with --sql, or alone.")
    installation = installed_on(app_of(ctx))
    url, schema = installation.url(), installation.config.schema
    if markers:
        _tell_sql([marking.script(schema)], as_json)
    elif as_sql:
        texts = [migrations.script(schema, each) for each in migrations.missing_in(url, schema)]
        _tell_sql([*texts, roles.grants(schema, grant)] if grant else texts, as_json)
    elif check:
        missing = migrations.missing_in(url, schema)
        _tell("missing", missing, as_json)
        ctx.exit(1 if missing else 0)
    else:
        applied = migrations.migrate(url, schema)
        if grant:
            roles.grant(url, schema, grant)
        _tell("applied", applied, as_json, **({"granted": grant} if grant else {}))


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


def _tell(what: str, numbers: list[int], as_json: bool, **more: str) -> None:
    if as_json:
        echo_json({what: numbers, **more})
        return
    click.echo(f"{what}: {numbers}" if numbers else "up to date")
    for name, value in more.items():
        click.echo(f"{name}: {line(value)}")


def _tell_sql(texts: list[str], as_json: bool) -> None:
    if as_json:
        echo_json({"sql": texts})
        return
    for text in texts:
        click.echo(text)


def _is_sooner(age: float | None, kept: float | None) -> bool:
    """Tell whether something would be deleted at an age at which it is to be kept."""
    return age is not None and (kept is None or age < kept)


def _all_is_well(found: durable.Health) -> str:
    alive = sum(node.alive for node in found.nodes)
    running = sum(node.running for node in found.nodes)
    swept = "never" if found.sweep_age is None else f"{duration(found.sweep_age)} ago"
    return f"ok: workers: {alive}, running: {running}, dead: {found.dead}, last sweep: {swept}"
