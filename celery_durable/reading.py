"""What the source of a task's function says that it does: calls, sends, effects, waits, progress.

Nothing is called and nothing is imported: a name stands for what the function's own module has under it by now.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import FunctionType, ModuleType
from typing import Any

from celery import Task, canvas

#: What reaches other systems, by the modules that do it.
EFFECTS = (
    "aiohttp", "boto3", "botocore", "braintree", "django.core.mail", "ftplib", "http.client", "httpx", "paramiko",
    "requests", "sendgrid", "slack_sdk", "smtplib", "stripe", "subprocess", "twilio", "urllib.request", "urllib3",
)  # fmt: skip
_SENDS = {"delay", "apply_async", "delay_on_commit", "apply_async_on_commit"}
_SIGNATURES = {"s", "si", "signature", "subtask"}
_CANVASES = {canvas.chain, canvas._chain, canvas.group, canvas.chord, canvas._chord}
_STATUS = {"state", "status"}
_PROGRESS = {"cursor", "done", "offset", "position", "processed", "progress"}
_UPDATE = re.compile(r"\bUPDATE\b.*?\bSET\b(.*?)(?:\bWHERE\b|$)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Sign:
    """Something that a body does, and where."""

    text: str
    line: int
    target: Any = None
    seconds: float = 0

    def __str__(self) -> str:
        return f"{self.text} (line {self.line})"


@dataclass(slots=True)
class Body:
    """What was seen in a task's function."""

    file: str
    line: int
    calls: list[Sign] = field(default_factory=list)
    sends: list[Sign] = field(default_factory=list)
    canvases: list[Sign] = field(default_factory=list)
    effects: list[Sign] = field(default_factory=list)
    reaches: list[Sign] = field(default_factory=list)
    progress: list[Sign] = field(default_factory=list)
    statuses: list[Sign] = field(default_factory=list)
    retries: list[Sign] = field(default_factory=list)
    waits: list[Sign] = field(default_factory=list)
    delays: list[Sign] = field(default_factory=list)
    not_json: list[Sign] = field(default_factory=list)


def read_body(task: Any, tasks: Mapping[str, Any]) -> Body:
    """Return what a task's function does, as far as its source says so."""
    function = _function_of(task)
    source = _source_of(function)
    if source is None:
        code = getattr(function, "__code__", None)
        return Body(getattr(code, "co_filename", ""), getattr(code, "co_firstlineno", 0))
    file, first, node = source
    reader = _Reader(task, tasks, function, first, Body(file, first))
    reader.read(node)
    return reader.body


def _function_of(task: Any) -> Any:
    # Celery's autoretry puts a wrapper of its own around the function that was written.
    run = getattr(task, "_orig_run", None) or task.run
    return inspect.unwrap(getattr(run, "__func__", run))


def _source_of(function: Any) -> tuple[str, int, ast.AST] | None:
    try:
        lines, first = inspect.getsourcelines(function)
        node = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return (inspect.getsourcefile(function) or "", first, node) if is_function else None


def short(name: str) -> str:
    """Return the last part of a task's name: most likely that of its function."""
    return name.rpartition(".")[2]


class _Reader(ast.NodeVisitor):
    """Notes what one function does."""

    def __init__(self, task: Any, tasks: Mapping[str, Any], function: Any, first: int, body: Body) -> None:
        self.task = task
        self.tasks = tasks
        self.function = function
        self.first = first
        self.body = body
        self.loops = 0
        #: What names of the body stand for: modules and tasks that it imports, clients and results that it makes.
        self.local: dict[str, Any] = {}

    def read(self, node: Any) -> None:
        for statement in node.body:
            self.visit(statement)

    # Statements

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            name = alias.name if alias.asname else alias.name.partition(".")[0]
            self.local[alias.asname or name] = sys.modules.get(name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        package = self.function.__module__.split(".")[: -node.level or None] if node.level else []
        module = sys.modules.get(".".join([*package, *filter(None, [node.module])]))
        for alias in node.names:
            self.local[alias.asname or alias.name] = getattr(module, alias.name, None)

    def visit_For(self, node: Any) -> None:
        self.visit(node.iter)
        self.loop([*node.body, *node.orelse])

    visit_AsyncFor = visit_For  # noqa: N815

    def visit_While(self, node: ast.While) -> None:
        self.visit(node.test)
        self.loop([*node.body, *node.orelse])

    def loop(self, statements: list[ast.stmt]) -> None:
        self.loops += 1
        for statement in statements:
            self.visit(statement)
        self.loops -= 1

    def visit_With(self, node: Any) -> None:
        for item in node.items:
            if isinstance(item.optional_vars, ast.Name):
                self.local[item.optional_vars.id] = self.made_by(item.context_expr)
        self.generic_visit(node)

    visit_AsyncWith = visit_With  # noqa: N815

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.local[target.id] = self.made_by(node.value)
            elif isinstance(target, ast.Attribute):
                self.column(target.attr, f"{ast.unparse(target)} = …", node)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Attribute):
            self.column(node.target.attr, f"{ast.unparse(node.target)} += …", node)
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        value = node.value
        is_set = isinstance(value, ast.Call) and self.resolved(value.func) in (set, frozenset)
        if is_set or isinstance(value, ast.Set | ast.SetComp | ast.GeneratorExp | ast.Lambda):
            self.note(self.body.not_json, ast.unparse(node), node)
        self.generic_visit(node)

    def visit_Yield(self, node: Any) -> None:
        if not self.body.not_json:
            self.note(self.body.not_json, "a generator", node)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: Any) -> None:
        """What a function in the body does belongs to whoever calls that."""

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    # Expressions

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.BitOr) and self.is_signature(node.right):
            self.note(self.body.canvases, "a chain", node)
            return
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            for columns in _UPDATE.findall(node.value):
                for name in re.findall(r"(\w+)\s*=", columns):
                    self.column(name.lower(), f"its {name} column", node)

    def visit_Call(self, node: ast.Call) -> None:
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        target = self.task_of(node.func)
        sent = self.sent_by(node)
        if target is not None:
            self.note(self.body.calls, short(target.name), node, target)
        elif sent is not None and sent.name != self.task.name:
            self.note(self.body.sends, short(sent.name), node, sent)
        elif self.is_canvas(node.func):
            self.canvas(node)
        elif method == "get" and self.is_result(node.func):
            self.wait(node)
        elif self.is_self(node.func, "update_state"):
            self.note(self.body.progress, "self.update_state", node)
        elif self.is_self(node.func, "retry"):
            self.note(self.body.retries, "self.retry", node)
        elif method == "update":
            for keyword in node.keywords:
                self.column(keyword.arg or "", f"update({keyword.arg}=…)", node)
        else:
            self.effect(node)
        if method in {*_SENDS, "retry", "set"}:
            self.delay(node, sent or self.signature_target(node.func))
        self.generic_visit(node)

    def canvas(self, node: ast.Call) -> None:
        kind = self.resolved(node.func)
        name = next(name for name in ("chain", "group", "chord") if kind in _kinds(name))
        self.note(self.body.canvases, f"a {name}", node)

    def wait(self, node: Any) -> None:
        made = self.result_of(node.func.value)
        self.note(self.body.waits, f"{ast.unparse(node.func)}()", node, made if isinstance(made, Task) else None)

    def delay(self, node: ast.Call, target: Any) -> None:
        for keyword in node.keywords:
            seconds = literal_seconds(keyword.value) if keyword.arg in ("countdown", "eta") else None
            if seconds is not None:
                text = f"{keyword.arg}={ast.unparse(keyword.value)}"
                self.body.delays.append(Sign(text, self.line(node), target, seconds))

    def effect(self, node: ast.Call) -> None:
        function = self.resolved(node.func)
        if isinstance(function, _Client) or _reaches_out(function):
            # Making a client reaches nobody yet.
            if not (inspect.isclass(function) or _is_factory(function)):
                self.note(self.body.effects, ast.unparse(node.func), node)
        elif self.is_own(function) and (deeper := _effect_in(function)):
            self.note(self.body.reaches, f"{ast.unparse(node.func)}: {deeper}", node)

    def column(self, name: str, text: str, node: Any) -> None:
        if name in _STATUS:
            self.note(self.body.statuses, text, node)
        elif name in _PROGRESS and self.loops:
            self.note(self.body.progress, text, node)

    def note(self, signs: list[Sign], text: str, node: Any, target: Any = None) -> None:
        signs.append(Sign(text, self.line(node), target))

    def line(self, node: Any) -> int:
        return int(self.first + node.lineno - 1)

    # What names stand for

    def resolved(self, node: ast.AST) -> Any:
        """Return what an expression of names and dots stands for; None if that isn't known without running it."""
        if isinstance(node, ast.Name):
            if node.id in self.local:
                return self.local[node.id]
            return self.function.__globals__.get(node.id, getattr(builtins, node.id, None))
        if isinstance(node, ast.Attribute):
            owner = self.resolved(node.value)
            if isinstance(owner, _Client):
                return owner
            # Only modules and classes: anything else might run code when it is asked.
            is_plain = isinstance(owner, ModuleType) or (inspect.isclass(owner) and _reaches_out(owner))
            return getattr(owner, node.attr, None) if is_plain else None
        return None

    def made_by(self, node: ast.AST) -> Any:
        """Return what a name stands for that is given this value."""
        if isinstance(node, ast.Await):
            return self.made_by(node.value)
        if isinstance(node, ast.Call):
            function = self.resolved(node.func)
            if (inspect.isclass(function) or _is_factory(function)) and _reaches_out(function):
                return _Client()
            if (sent := self.sent_by(node)) is not None or self.is_canvas_start(node):
                return _Result(sent)
        return None

    def task_of(self, node: ast.AST) -> Any:
        """Return the other task of the app that a name stands for."""
        found = self.resolved(node)
        return self.tasks[found.name] if isinstance(found, Task) and found.name in self.tasks else None

    def sent_by(self, node: ast.AST) -> Any:
        """Return the task that a call sends: ``task.delay()``, ``task.s().delay()``, ``app.send_task("name")``."""
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            return None
        if node.func.attr == "send_task" and node.args and isinstance(node.args[0], ast.Constant):
            return self.tasks.get(str(node.args[0].value))
        if node.func.attr not in _SENDS:
            return None
        return self.task_of(node.func.value) or self.signature_target(node.func)

    def signature_target(self, node: ast.AST) -> Any:
        """Return the task whose signature has this method called: ``task.s(…).set``."""
        inner = node.value if isinstance(node, ast.Attribute) else None
        while isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute):
            if inner.func.attr in _SIGNATURES:
                return self.task_of(inner.func.value)
            inner = inner.func.value
        return None

    def is_signature(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and (
            self.is_canvas(node.func) or self.signature_target(ast.Attribute(node, "set")) is not None
        )

    def is_canvas(self, node: ast.AST) -> bool:
        found = self.resolved(node)
        return inspect.isclass(found) and found in _CANVASES

    def is_canvas_start(self, node: ast.Call) -> bool:
        """Tell whether a canvas is sent: ``group(…)()``, ``chain(…).delay()``."""
        inner = node.func.value if isinstance(node.func, ast.Attribute) and node.func.attr in _SENDS else node.func
        return isinstance(inner, ast.Call) and self.is_canvas(inner.func)

    def is_result(self, node: Any) -> bool:
        return self.result_of(node.value) is not None

    def result_of(self, node: ast.AST) -> Any:
        """Return the task, or a mark, whose result an expression is; None if it is none."""
        if isinstance(node, ast.Name):
            made = self.local.get(node.id)
            return (made.task or made) if isinstance(made, _Result) else None
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            made = self.made_by(node)
            if isinstance(made, _Result):
                return made.task or made
            return _Result(None) if name in ("AsyncResult", "GroupResult") else None
        return None

    def is_self(self, node: ast.AST, method: str) -> bool:
        """Tell whether this is a method of the task itself, as ``self``, by its name, or as ``current_task``."""
        return isinstance(node, ast.Attribute) and node.attr == method and (
            (isinstance(node.value, ast.Name) and node.value.id in ("self", "current_task"))
            or self.task_of(node.value) is self.task
        )  # fmt: skip

    def is_own(self, function: Any) -> bool:
        """Tell whether a function is the project's own."""
        top = self.function.__module__.partition(".")[0]
        return isinstance(function, FunctionType) and function.__module__.partition(".")[0] == top


class _Client:
    """Stands for an object through which others are reached: a session, a connection."""


@dataclass(frozen=True, slots=True)
class _Result:
    """Stands for the result of what was sent."""

    task: Any


def _kinds(name: str) -> tuple[Any, ...]:
    return getattr(canvas, name), getattr(canvas, f"_{name}", None)


def _reaches_out(found: Any) -> bool:
    name = found.__name__ if isinstance(found, ModuleType) else getattr(found, "__module__", None)
    if not isinstance(name, str) or isinstance(found, Task) or _is_error(found):
        return False
    return any(name == each or name.startswith(f"{each}.") for each in EFFECTS)


def _is_factory(found: Any) -> bool:
    return getattr(found, "__name__", "") in ("client", "resource", "session", "get_connection")


def _is_error(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, BaseException)


def _effect_in(function: Any) -> str:
    """Return what a function of the project reaches by itself."""
    source = _source_of(function)
    if source is None:
        return ""
    reader = _Shallow(function, source[1], Body(source[0], source[1]))
    reader.read(source[2])
    return next((sign.text for sign in reader.body.effects), "")


class _Shallow(_Reader):
    """Notes the effects of a function that isn't a task, but not those of what it calls."""

    def __init__(self, function: Any, first: int, body: Body) -> None:
        super().__init__(None, {}, function, first, body)

    def is_own(self, function: Any) -> bool:
        return False


def literal_seconds(node: ast.AST) -> float | None:
    """Return a duration that the source itself says: arithmetic of numbers, a timedelta, or now plus one."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.BinOp):
        left, right = literal_seconds(node.left), literal_seconds(node.right)
        if isinstance(node.op, ast.Mult) and left is not None and right is not None:
            return left * right
        if isinstance(node.op, ast.Add) and right is not None and (left is not None or _is_now(node.left)):
            return (left or 0) + right
        return None
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name == "total_seconds" and isinstance(node.func, ast.Attribute):
            return literal_seconds(node.func.value)
        return _of_timedelta(node) if name == "timedelta" else None
    return None


def _is_now(node: ast.AST) -> bool:
    function = node.func if isinstance(node, ast.Call) else None
    return (function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")) in ("now", "utcnow")


def _of_timedelta(node: ast.Call) -> float | None:
    units = ["days", "seconds", "microseconds", "milliseconds", "minutes", "hours", "weeks"]
    given = [*zip(units, node.args, strict=False), *((str(each.arg), each.value) for each in node.keywords)]
    values = {unit: literal_seconds(value) for unit, value in given}
    if None in values.values() or not values.keys() <= set(units):
        return None
    return timedelta(**{unit: value for unit, value in values.items() if value is not None}).total_seconds()
