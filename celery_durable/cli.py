"""``celery -A proj durable …``. Every celery command imports this module, so it imports little."""

from __future__ import annotations

from typing import Any

import click
from celery.bin.base import CeleryCommand, handle_preload_options


@click.group(help="Durable workflows: the database schema, and one sweep of the recovery.")
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
