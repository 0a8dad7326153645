"""``celery -A proj durable …``. Every celery command imports this module, so it imports little."""

from __future__ import annotations

from typing import Any

import click
from celery.bin.base import CeleryCommand, handle_preload_options


@click.group(help="Durable workflows: the database schema, one sweep of the recovery, advice.")
def durable() -> None:
    """The group that Celery finds by its entry point."""


@durable.command(cls=CeleryCommand)
@click.option("--check", is_flag=True, help="Exit with status 1 if a migration is missing; change nothing.")
@click.option("--sql", "show_sql", is_flag=True, help="Print the missing migrations as SQL; change nothing.")
@click.option("--markers", is_flag=True, help="Print the SQL of the table that atomic steps need in other databases.")
@click.pass_context
@handle_preload_options
def migrate(ctx: click.Context, check: bool, show_sql: bool, markers: bool) -> None:
    """Bring the database schema up to date."""
    from .store import markers as marking
    from .store import migrate as migrations

    installation = _installation(ctx)
    with _errors_in_one_line():
        url, schema = installation.url(), installation.config.schema
        if markers:
            click.echo(marking.script(schema))
            return
        missing = migrations.missing_in(url, schema)
        if show_sql:
            for number in missing:
                click.echo(migrations.script(schema, number))
        elif check:
            click.echo(f"missing: {missing}" if missing else "up to date")
            ctx.exit(1 if missing else 0)
        else:
            applied = migrations.migrate(url, schema)
            click.echo(f"applied: {applied}" if applied else "up to date")


@durable.command(cls=CeleryCommand)
@click.pass_context
@handle_preload_options
def recover(ctx: click.Context) -> None:
    """Run all duties of the recovery once, and say what each has found."""
    from .beat import TASK

    installation = _installation(ctx)
    with _errors_in_one_line():
        for duty, count in installation.app.tasks[TASK]().items():
            click.echo(f"{duty}: {count}")


@durable.command(cls=CeleryCommand)
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects.")
@click.pass_context
@handle_preload_options
def advise(ctx: click.Context, as_json: bool) -> None:
    """Say which tasks look like workflows or steps, and what fights with durability; contact nobody."""
    import json
    import os
    from dataclasses import asdict, replace

    from .advice import advise

    app = ctx.obj.app
    try:
        app.loader.import_default_modules()
        app.finalize()
    except Exception as error:
        raise click.ClickException(f"The app can't be imported: {' '.join(str(error).split())}") from error
    found = [replace(each, file=os.path.relpath(each.file) if each.file else "") for each in advise(app)]
    if as_json:
        click.echo(json.dumps([asdict(each) for each in found], indent=2))
        return
    for each in found:
        place = f"{each.file}:{each.line}" if each.file else "settings"
        click.echo(f"{place}: {each.task or 'the app'}: {each.what}. {each.remedy}.")
    click.echo(f"{len(found)} findings" if found else "nothing to say")


def _installation(ctx: click.Context) -> Any:
    from .installation import installed_on

    app = ctx.obj.app
    with _errors_in_one_line():
        app.loader.import_default_modules()
        return installed_on(app)


class _errors_in_one_line:  # noqa: N801 - reads as the context manager that it is
    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        from .exceptions import DurableError

        if isinstance(error, DurableError):
            raise click.ClickException(str(error)) from error
