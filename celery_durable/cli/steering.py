"""Commands that steer workflows: cancel, resume, fork, send."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import click
from celery.bin.base import CeleryOption, handle_preload_options

import celery_durable as durable

from .. import states
from .command import DurableCommand, app_of, ask, json_option, standard_input, yes_option
from .filters import BATCH, counted, filter_options, filters_in, ids_in, matching, told
from .output import echo_json, line, progress

#: Acts on some workflows, and returns what has become of each.
Act = Callable[[list[str]], list[dict[str, Any]]]

_ids = click.argument("ids", nargs=-1)


@click.command(cls=DurableCommand)
@_ids
@click.option("--children", cls=CeleryOption, is_flag=True, help="With all that they have started.")
@filter_options
@yes_option
@json_option
@click.pass_context
@handle_preload_options
def cancel(ctx: click.Context, ids: Sequence[str], children: bool, yes: bool, as_json: bool, **options: Any) -> None:
    """End workflows as CANCELLED: by IDS (- reads them from standard input, one a line), or by filters."""
    app, filters = app_of(ctx), filters_in(options)

    def act(chosen: list[str]) -> list[dict[str, Any]]:
        cancelled = set(durable.cancel_workflows(chosen, children=children, app=app))
        # With children there are more than were asked for.
        others = sorted(cancelled - set(chosen))
        return [{"id": each, "cancelled": each in cancelled} for each in [*chosen, *others]]

    done = _each(app, "Cancel", act, ids, filters, states.LIVE, yes=yes)
    _tell(done, as_json, lambda each: "cancelled" if each["cancelled"] else "had ended before", filters)


@click.command(cls=DurableCommand)
@_ids
@filter_options
@yes_option
@json_option
@click.pass_context
@handle_preload_options
def resume(ctx: click.Context, ids: Sequence[str], yes: bool, as_json: bool, **options: Any) -> None:
    """Let workflows go on that are CANCELLED, DEAD or in FAILURE: by IDS (- reads them), or by filters."""
    app, filters = app_of(ctx), filters_in(options)

    def act(chosen: list[str]) -> list[dict[str, Any]]:
        return [{"id": handle.id} for handle in durable.resume_workflows(chosen, app=app)]

    done = _each(app, "Resume", act, ids, filters, states.FINAL - {states.SUCCESS}, yes=yes)
    _tell(done, as_json, lambda each: "resumed", filters)


@click.command(cls=DurableCommand)
@_ids
@click.option("--from-step", cls=CeleryOption, help="Key of the first step that runs anew; without it all do.")
@click.option("--new-id", cls=CeleryOption, help="Id of the fork, if there is only one.")
@filter_options
@yes_option
@json_option
@click.pass_context
@handle_preload_options
def fork(
    ctx: click.Context,
    ids: Sequence[str],
    from_step: str | None,
    new_id: str | None,
    yes: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Start new workflows with what others had completed before a step: by IDS (- reads them), or by filters."""
    app, filters = app_of(ctx), filters_in(options)
    if new_id is not None and (filters or len(ids) != 1):
        raise click.UsageError("--new-id is for the fork of one workflow, named by its id.")

    def act(chosen: list[str]) -> list[dict[str, Any]]:
        if new_id is None:
            handles = durable.fork_workflows(chosen, from_step, app=app)
        else:
            handles = [durable.fork_workflow(each, from_step, new_id, app=app) for each in chosen]
        forks = [durable.get_workflow_status(handle.id, max_payload=0, app=app) for handle in handles]
        return [{"id": each.id, "forked_from": each.forked_from} for each in forks]

    done = _each(app, "Fork", act, ids, filters, states.ALL, yes=yes)
    if filters or as_json:
        _tell(done, as_json, lambda each: "forked", filters)
    else:
        _tell(done, as_json, lambda each: f"forked from {line(each['forked_from'])}", filters)


@click.command(cls=DurableCommand)
@click.argument("id")
@click.argument("message")
@click.option("--topic", cls=CeleryOption, help="Topic that the workflow receives.")
@click.option("--idempotency-key", cls=CeleryOption, help="The same key again sends nothing.")
@json_option
@click.pass_context
@handle_preload_options
def send(
    ctx: click.Context,
    id: str,
    message: str,
    topic: str | None,
    idempotency_key: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Send the workflow ID a MESSAGE, which is JSON; - reads it from standard input."""
    app = app_of(ctx)
    durable.send(id, _parsed(standard_input().read() if message == "-" else message), topic, idempotency_key, app=app)
    if as_json:
        echo_json({"id": id, "topic": topic, "idempotency_key": idempotency_key})
    else:
        click.echo(f"{line(id)}: sent")


def _parsed(message: str) -> Any:
    try:
        return json.loads(message)
    except (ValueError, RecursionError) as error:
        raise click.ClickException(
            f"The message isn't JSON ({error}): a text needs its quotes, '\"like this\"'."
        ) from error


def _each(
    app: Any, verb: str, act: Act, ids: Sequence[str], filters: Mapping[str, Any], fitting: Iterable[str], *, yes: bool
) -> list[dict[str, Any]]:
    """Act on all workflows that are meant: those that were named at once, those that match when that is confirmed."""
    named = ids_in(ids, filters)
    if named is not None:
        return _in_batches(verb, act, len(named), (named[at : at + BATCH] for at in range(0, len(named), BATCH)))
    filters = {"state": sorted(fitting), **filters}
    counts = counted(app, filters)
    if not counts:
        return []
    ask(f"{verb} these workflows: {told(counts)}?", yes=yes)
    return _in_batches(verb, act, sum(counts.values()), matching(app, filters))


def _in_batches(verb: str, act: Act, length: int, batches: Iterator[list[str]]) -> list[dict[str, Any]]:
    done: list[dict[str, Any]] = []
    with progress(verb, length) as advance:
        for batch in batches:
            try:
                done += act(batch)
            except durable.exceptions.DurableError as error:
                if not done:
                    raise
                raise click.ClickException(f"{line(str(error))} Before that: {len(done)}.") from error
            advance(len(batch))
    return done


def _tell(done: list[dict[str, Any]], as_json: bool, word: Callable[[dict[str, Any]], str], filters: Any) -> None:
    """Print what has become of each, or, of those that were found by filters, of how many."""
    if as_json:
        echo_json(done)
    elif not done:
        click.echo("nothing to do")
    elif filters:
        click.echo(", ".join(f"{count:,} {each}" for each, count in Counter(map(word, done)).items()))
    else:
        for each in done:
            click.echo(f"{line(each['id'])}: {word(each)}")
