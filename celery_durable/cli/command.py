"""What all commands have in common: Celery's conventions, errors in one line, ``--json``."""

from __future__ import annotations

import errno
import io
import logging
import sys
from typing import Any, TextIO

import click
from celery.bin.base import CeleryCommand, CeleryOption

from .output import line

json_option = click.option("--json", "as_json", cls=CeleryOption, is_flag=True, help="Print JSON, for scripts.")
yes_option = click.option("-y", "--yes", cls=CeleryOption, is_flag=True, help="Don't ask.")


#: It warns each time when a statement is tried again: a command says itself how that has ended.
_store_logger = logging.getLogger("celery_durable.store")


class DurableCommand(CeleryCommand):
    """A command of Celery's that tells an error in one line, and ends with status 1 then.

    What is written into a pipe that nobody reads any more ends it, too, without a word.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run it."""
        _never_fail_to_print()
        _store_logger.addFilter(_is_error)
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # click's own affair
            raise click.ClickException(_told(error)) from error
        finally:
            _store_logger.removeFilter(_is_error)


def app_of(ctx: click.Context) -> Any:
    """Return the app that the command is for, its tasks imported; raise NotInstalled."""
    from ..installation import installed_on

    app = ctx.obj.app
    import_tasks(app)
    return installed_on(app).app


def import_tasks(app: Any) -> None:
    """Import the modules of an app's tasks; they are code that may fail in any way."""
    from ..exceptions import DurableError

    try:
        app.loader.import_default_modules()
    except DurableError:
        raise
    except Exception as error:
        raise click.ClickException(f"The app can't be imported: {_told(error)}") from error


def ask(question: str, *, yes: bool) -> None:
    """Ask before something is done, unless that was answered by ``--yes``; raise where nobody can be asked."""
    if yes:
        return
    if not standard_input().isatty():
        raise click.ClickException(f"{question} Nobody is there to be asked: pass --yes.")
    click.confirm(question, abort=True, err=True)


def standard_input() -> TextIO:
    """Return it; where it is closed, an empty one."""
    return sys.stdin or io.StringIO()


def _told(error: Exception) -> str:
    from ..exceptions import DurableError
    from ..text import safe_str, summary

    # These are sentences for people; of any other error the class says more than its text.
    is_sentence = isinstance(error, DurableError | ValueError)
    return line(safe_str(error) if is_sentence else summary(error))


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _never_fail_to_print() -> None:
    """What a terminal's encoding hasn't got is shown by its number."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
