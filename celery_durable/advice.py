"""What ``celery durable advise`` says: which tasks look like workflows or steps, and what fights with durability.

Everything is read: from the source of the tasks, their options and the app's configuration. Nothing is called, and
nobody is contacted. Each sign is one that a reader finds at the line that is named.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from celery import Celery

from .reading import Body, Sign, read_body, short
from .task import Step, Workflow

#: Celery's own defaults, in seconds, of the transports whose messages come again if they aren't acknowledged in time.
VISIBILITY_TIMEOUTS = {"redis": 3600, "rediss": 3600, "sentinel": 3600, "sqs": 1800}


@dataclass(frozen=True, slots=True)
class Finding:
    """One piece of advice, and the line to write. Without a task it is about a setting; line 0: it wasn't found."""

    kind: Literal["workflow", "step", "option"]
    file: str
    line: int
    task: str
    what: str
    remedy: str


def advise(app: Celery) -> list[Finding]:
    """Return all findings on an app whose tasks have been imported, in the order of their places."""
    tasks = own_tasks(app.tasks)
    bodies = {name: read_body(task, tasks) for name, task in tasks.items()}
    findings = [finding for name, task in tasks.items() for finding in _of_task(task, bodies[name], app.conf)]
    findings += _of_settings(app.conf, tasks)
    return sorted(findings, key=lambda each: (each.file, each.line, each.task, each.kind))


def own_tasks(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tasks that the app's authors have written."""
    return {name: task for name, task in tasks.items() if not name.startswith(("celery.", "celery_durable."))}


# Findings of a task


def _of_task(task: Any, body: Body, conf: Any) -> Iterator[Finding]:
    say = functools.partial(_finding, task, body)
    durable = isinstance(task, Workflow | Step)
    workflow = None if durable else workflow_signs(task, body)
    step = None if durable or workflow else step_signs(task, body)
    if workflow:
        yield say("workflow", f"looks like a workflow: it {'; it '.join(workflow)}", _workflow_remedy(body))
    if step:
        yield say("step", f"looks like a step: it {'; it '.join(step)}", _step_remedy(task))
    if isinstance(task, Workflow):
        yield from _in_a_workflow(say, body)
    yield from _waits(say, task, body)
    yield from _delays(say, body, conf)
    if durable or workflow or step:
        yield from _options(say, task, conf)
        yield from _results(say, body)
    if workflow or isinstance(task, Workflow):
        yield from _chords(say, body, conf)


def _finding(task: Any, body: Body, kind: Any, what: str, remedy: str, line: int | None = None) -> Finding:
    return Finding(kind, body.file, line or body.line, task.name, what, remedy)


def workflow_signs(task: Any, body: Body) -> list[str]:
    """Return what makes a task look like a workflow; nothing if it doesn't."""
    parts = [*body.calls, *body.sends, *body.effects, *body.reaches]
    signs = []
    if len(body.calls) + len(body.sends) > 1 or body.sends:
        signs.append(_listed("calls", body.calls))
        signs.append(_listed("sends", body.sends))
    signs.append(_listed("makes", body.canvases))
    if len(body.effects) + len(body.reaches) > 1:
        signs.append(_listed("has several effects,", [*body.effects, *body.reaches]))
    if body.progress:
        signs.append(_listed("keeps its progress by", body.progress))
    if len(body.statuses) > 1 or (body.statuses and any(signs)):
        signs.append(_listed("keeps its state by", body.statuses))
    signs = [sign for sign in signs if sign]
    if signs and len(parts) > 1 and _is_retried(task, body):
        signs.append("is retried as a whole, what has succeeded included")
    return signs


def step_signs(task: Any, body: Body) -> list[str]:
    """Return what makes a task look like a step; nothing if it doesn't."""
    signs = [_listed("has one effect,", [*body.effects, *body.reaches])]
    if _is_retried(task, body):
        signs.append("is retried")
    return [sign for sign in signs if sign]


def _is_retried(task: Any, body: Body) -> bool:
    return bool(getattr(task, "autoretry_for", ()) or body.retries)


def _listed(verb: str, signs: list[Sign]) -> str:
    return f"{verb} {', '.join(map(str, signs))}" if signs else ""


def _workflow_remedy(body: Body) -> str:
    pieces = ["@app.task(base=durable.Workflow)"]
    if names := _named(sign for sign in [*body.calls, *body.sends] if not isinstance(sign.target, Workflow | Step)):
        pieces.append(f"@app.task(base=durable.Step) on {names}")
    if body.sends or body.canvases:
        names = _named(body.sends) or "their tasks"
        pieces.append(f"call {names} in place of sending, since a step's outcome is kept")
    if body.effects or body.reaches:
        pieces.append("with each effect in a step: durable.as_step(function)(…)")
    if body.progress:
        pieces.append("with each turn of the loop a step, and durable.set_event('progress', …) for who looks")
    return "; ".join(pieces)


def _named(signs: Iterable[Sign]) -> str:
    return ", ".join(dict.fromkeys(short(sign.target.name) for sign in signs))


def _step_remedy(task: Any) -> str:
    return (
        f"@app.task(base=durable.Step), or unchanged in a workflow: durable.as_step({short(task.name)})(…); give the "
        "other side durable.current.idempotency_key"
    )


def _in_a_workflow(say: Any, body: Body) -> Iterator[Finding]:
    for sign in body.effects:
        what = f"{sign.text} in the workflow itself is done again by each replay"
        yield say("option", what, "put it in a step: durable.as_step(function)(…)", sign.line)
    for sign in body.sends:
        if not isinstance(sign.target, Workflow | Step):
            name = short(sign.target.name)
            yield say(
                "option", f"{name}, a plain task, is sent again by each replay",
                f"durable.as_step({name}).delay(…)", sign.line,
            )  # fmt: skip


def _waits(say: Any, task: Any, body: Body) -> Iterator[Finding]:
    for sign in body.waits:
        if isinstance(task, Workflow) and (sign.target is None or isinstance(sign.target, Workflow | Step)):
            continue  # a handle, or one that may be: waited for without a worker
        what = f"{sign.text} holds a worker while it waits for another, and is lost if either dies"
        if sign.target is None:
            remedy = "base=durable.Workflow on both tasks: then get() gives the worker back"
        else:
            name = short(sign.target.name)
            remedy = f"base=durable.Workflow here, and in place of get(): durable.as_step({name})(…)"
        yield say("option", what, remedy, sign.line)


def _delays(say: Any, body: Body, conf: Any) -> Iterator[Finding]:
    limit = visibility_timeout(conf)
    for sign in body.delays:
        if limit is not None and sign.seconds > limit and not isinstance(sign.target, Workflow):
            yield say(
                "option",
                f"{sign.text} waits for {sign.seconds:g} s, longer than the visibility timeout ({limit:g} s): the "
                "broker delivers the message again and again meanwhile",
                "base=durable.Workflow on what is sent: the database keeps its time",
                sign.line,
            )  # fmt: skip


def _options(say: Any, task: Any, conf: Any) -> Iterator[Finding]:
    for option in ("acks_late", "reject_on_worker_lost"):
        if getattr(task, option, None) and not conf.get(f"task_{option}"):
            what = f"{option}=True has the broker deliver a crashed task again, from the top; recovery does it better"
            yield say("option", what, f"remove {option}=True where base= is durable.Workflow or durable.Step")
    if task.serializer != conf.task_serializer and task.serializer != "json":
        what = f"serializer={task.serializer!r} keeps arguments that no SQL can read, and that new code may not load"
        yield say("option", what, "remove it, or serializer='json', and pass keys, not objects")
    if getattr(task, "ignore_result", False) and not conf.task_ignore_result and not isinstance(task, Step):
        what = "ignore_result=True makes get() return None to callers outside of workflows"
        yield say("option", what, "remove ignore_result=True if anybody asks for the outcome")


def _results(say: Any, body: Body) -> Iterator[Finding]:
    for sign in body.not_json:
        what = f"{sign.text} is a result that JSON can't hold: as a step's or workflow's it is an error"
        yield say("option", what, "return a list, or a dict of plain values", sign.line)


def _chords(say: Any, body: Body, conf: Any) -> Iterator[Finding]:
    expires = conf.get("result_chord_expires") or conf.result_expires
    seconds = expires.total_seconds() if isinstance(expires, timedelta) else expires
    for sign in body.canvases:
        if sign.text == "a chord" and seconds:
            yield say(
                "option",
                f"a chord's counters expire after {seconds:g} s: a member that waits longer, or is recovered later, "
                "never lets the body run",
                "durable.gather(*(step.s(item) for item in items)), then the body; or a longer result_expires",
                sign.line,
            )  # fmt: skip


# Findings of the settings


def visibility_timeout(conf: Any) -> float | None:
    """Return after how many seconds the broker delivers a message again that isn't acknowledged; None: never."""
    scheme = str(conf.broker_url or "").partition(":")[0].partition("+")[0]
    default = VISIBILITY_TIMEOUTS.get(scheme)
    if default is None:
        return None
    return float((conf.broker_transport_options or {}).get("visibility_timeout", default))


def _of_settings(conf: Any, tasks: Mapping[str, Any]) -> Iterator[Finding]:
    for name, what, remedy in _settings(conf, tasks):
        file, line = place_of_setting(name, tasks.values())
        yield Finding("option", file, line, "", what, remedy)


def _settings(conf: Any, tasks: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    if conf.task_always_eager:
        what = "task_always_eager=True runs every workflow as a plain function in its caller: nothing is durable"
        yield "task_always_eager", what, "set it in the settings of the tests only"
    for name in ("task_serializer", "result_serializer"):
        value = conf.get(name)
        if value != "json":
            what = f"{name}={value!r} keeps what no SQL can read, and what new code may not load"
            yield name, what, f"{name} = 'json'"
    if unsafe := sorted({"pickle", "application/x-python-serialize"} & set(conf.accept_content or ())):
        what = f"accept_content with {', '.join(unsafe)} lets whoever can write to the broker run code in the worker"
        yield "accept_content", what, "accept_content = ['json'], once no message in flight is pickled"
    if conf.task_ignore_result:
        what = "task_ignore_result=True makes get() return None to callers outside of workflows"
        yield "task_ignore_result", what, "ignore_result=False on the workflows whose outcome anybody asks for"
    limit, (longest, slowest) = visibility_timeout(conf), _longest(conf, tasks)
    if limit is not None and longest > limit:
        yield (
            "visibility_timeout",
            f"the visibility timeout ({limit:g} s) is shorter than the time limit of {slowest} ({longest:g} s): what "
            "waits behind it in the worker is delivered again",
            f"broker_transport_options = {{'visibility_timeout': {longest + 60:g}}}",
        )


def _longest(conf: Any, tasks: Mapping[str, Any]) -> tuple[float, str]:
    """Return the longest time limit, and whose it is."""
    limits = [(_limit(task, conf), name) for name, task in tasks.items()]
    return max(limits, default=(0, ""))


def _limit(task: Any, conf: Any) -> float:
    found = (getattr(task, "time_limit", None), getattr(task, "soft_time_limit", None))
    given = [each for each in found if each] or [each for each in (conf.task_time_limit,) if each]
    return max((each.total_seconds() if isinstance(each, timedelta) else float(each) for each in given), default=0)


def place_of_setting(name: str, tasks: Iterable[Any]) -> tuple[str, int]:
    """Return where the app's own modules set something; no file and 0 if they don't say it by its name."""
    for file in _files_beside(tasks):
        for node in ast.walk(_parsed(file)):
            if name in _names_set_by(node):
                return file, int(getattr(node, "lineno", 0))
    return "", 0


def _names_set_by(node: Any) -> Iterator[str]:
    """Yield the settings that a node sets: as keyword, key, variable or attribute, in Django's namespace, too."""
    names: list[Any] = []
    if isinstance(node, ast.Assign):
        names = [getattr(target, "id", getattr(target, "attr", None)) for target in node.targets]
    elif isinstance(node, ast.Call):
        names = [keyword.arg for keyword in node.keywords]
    elif isinstance(node, ast.Dict):
        names = [getattr(key, "value", None) for key in node.keys]
    for name in names:
        if isinstance(name, str):
            yield name.lower().removeprefix("celery_")


def _files_beside(tasks: Iterable[Any]) -> list[str]:
    """Return the files of the loaded modules that share a package with a task, or hold one."""
    tops = {task.__module__.partition(".")[0] for task in tasks} | {"settings"}
    loaded = [(name, getattr(module, "__file__", None)) for name, module in list(sys.modules.items())]
    return sorted({file for name, file in loaded if file and file.endswith(".py") and name.partition(".")[0] in tops})


def _parsed(file: str) -> ast.AST:
    try:
        with open(file, "rb") as source:
            return ast.parse(source.read())
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])
