"""README and docs against the code: blocks are run or parsed, tables compared, links followed.

`tests/acceptance/test_readme.py`, `test_tutorial.py` and `test_adoption.py` run what needs a worker,
`tests/integration/test_testing_plugin.py` what are tests themselves.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from celery.bin.celery import celery as celery_command
from flower.options import default_options as flower_options

import celery_durable as durable
from celery_durable import states
from celery_durable.cli import durable as durable_command
from celery_durable.engine.retry import DEFAULT_RETRIES
from celery_durable.options import STEP_OPTIONS
from docs.tables import filled, of_the_code
from tests.costs.sizing import worked_example
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.pages import CHECKOUT, PAGES, Block, blocks, patched, read, rows

LANGUAGES = {"console", "diff", "pycon", "python", "sql", "text", "yaml", "{toctree}"}
SETUP = ConfigParser()
SETUP.read(CHECKOUT / "setup.cfg")
RUNS_ALONE = [
    "docs/settings.md",
    "docs/guarantees.md",
    "docs/steps.md",
    "docs/code-changes.md",
    "docs/canvas.md",
    "docs/from-canvas.md",
    "docs/waiting.md",
    "docs/managing.md",
    "docs/patterns.md",
    "docs/django.md",
    "docs/sqlalchemy.md",
    "docs/tracing.md",
    "docs/metrics.md",
    "docs/logs.md",
    "docs/encryption.md",
    "docs/flower.md",
    "docs/scaling.md",
]
NEEDS_A_WORKER = ["README.md", "docs/adopting.md", "docs/tutorial.md"]
RUN_BY_PYTEST = ["docs/testing.md"]
QUOTES_FILES = ["example_project/README.md"]
OPEN_COMMANDS = {".", "cat", "docker", "jq", "pkill", "rm"}

PAPERS = "\n".join(read(str(page.relative_to(CHECKOUT))) for page in PAGES)


@pytest.mark.parametrize("block", blocks(), ids=str)
def test_every_block_is_tested(block: Block) -> None:
    """A block in a language that no test knows, or Python on a page that no test runs, is an oversight."""
    assert block.language in LANGUAGES
    if block.language in ("python", "pycon", "diff"):
        assert block.page in RUNS_ALONE + NEEDS_A_WORKER + RUN_BY_PYTEST + QUOTES_FILES


@pytest.mark.parametrize("page", RUNS_ALONE)
def test_python_blocks_run(page: str) -> None:
    """The Python blocks of a page run one after the other, in a process of their own, without a warning."""
    code = "\n".join(block.text for block in blocks("python", page=page))
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_diff_applies() -> None:
    """The README's diff applies to the file that it names, and what comes out is Python."""
    (diff,) = blocks("diff", page="README.md")
    name = re.findall(r"^--- (\S+)$", diff.text, re.MULTILINE)[0]
    ast.parse(patched(read(name), diff.text))


@pytest.mark.parametrize("block", blocks("python", page="example_project/README.md"), ids=str)
def test_quoted_code_is_the_real_code(block: Block) -> None:
    """What the example project's page shows is what its files have, but for docstrings."""
    files = ("plain", "tasks", "django_shop/tasks", "django_shop/views")
    real = {_unparsed(node) for name in files for node in _functions(f"example_project/{name}.py")}
    for node in ast.parse(block.text).body:
        assert _unparsed(node) in real


@pytest.mark.parametrize("block", blocks("sql"), ids=str)
def test_sql_runs(block: Block, sql: Sql) -> None:
    """Each query runs on a migrated database."""
    for statement in filter(str.strip, block.text.split(";")):
        sql.connection.execute(statement.encode())


@pytest.mark.parametrize(
    "command", [pytest.param(line, id=f"{block}-{line[:30]}") for block in blocks("console") for line in block.commands]
)
def test_commands_can_be_typed(command: str) -> None:
    """Each command names a target, module, option, path or marker that exists."""
    words = shlex.split(command, comments=True)
    parts = [list(part) for is_bar, part in groupby(words, key=lambda word: word == "|") if not is_bar]
    for part in parts:
        _check_typed(part)


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml(block: Block) -> None:
    """Each block is YAML, and the commands of its probes could be typed."""
    read_back = yaml.safe_load(block.text)
    assert read_back
    for words in _commands_in(read_back):
        _check_typed(shlex.split(words[-1]) if words[:2] == ["sh", "-c"] else words)


def _commands_in(value: Any) -> Iterator[list[str]]:
    if isinstance(value, list) and value[0] in ("CMD", "celery", "sh"):
        yield value[1:] if value[0] == "CMD" else value
    elif isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _commands_in(each)


def _check_typed(words: list[str]) -> None:
    while re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    if words[-1] == "&":
        del words[-1]
    program, *args = words
    assert program in OPEN_COMMANDS | CHECKS.keys()
    if program in CHECKS:
        CHECKS[program](args)


def test_the_worked_example_is_the_cost_models() -> None:
    """What Scaling computes follows from the tables of the cost model; else run `python -m tests.costs`."""
    text = read("docs/scaling.md")
    assert filled(text, {"sizing": worked_example()}) == text


def test_tables_are_those_of_the_code() -> None:
    """Tables of settings and options stand in the pages as the code has them; else run `python -m docs.tables`."""
    tables = of_the_code()
    pages = {page: page.read_text() for page in PAGES}
    for page, text in pages.items():
        assert filled(text, tables) == text, f"{page.name} has old tables: python -m docs.tables"
    assert all(f"<!-- table: {name} -->" in "".join(pages.values()) for name in tables)


def test_step_options_table() -> None:
    """docs/steps.md lists every option of a step, and says what Celery's retry options do to `max_retries`."""
    listed = {row[0].strip("`"): row[-1] for row in rows("docs/steps.md") if len(row) == 4 and row[0].startswith("`")}
    assert listed.keys() >= {"name", *STEP_OPTIONS}
    assert f" {DEFAULT_RETRIES} where " in listed["max_retries"]


def test_states_table() -> None:
    """docs/states.md lists every state, and what Celery shows for it."""
    listed = {row[0]: row[-1] for row in rows("docs/states.md") if row[0] != "state"}
    assert listed == states.CELERY
    (drawing,) = blocks("text", page="docs/states.md")
    assert set(re.findall(r"[A-Z]{4,}", drawing.text)) == states.ALL


def test_architecture_tables() -> None:
    """docs/architecture.md shows every room, and names only statements that exist."""
    text = read("docs/architecture.md")
    for entry in (CHECKOUT / "celery_durable").iterdir():
        if entry.suffix == ".py" and entry.name != "__init__.py":
            assert f"`{entry.name}`" in text
        elif entry.is_dir() and not entry.name.startswith("_"):
            assert f"`{entry.name}/`" in text
    sql = "".join(path.read_text() for path in (CHECKOUT / "celery_durable/store").glob("*.sql"))
    statements = set(re.findall(r"^-- name: (\w+)$", sql, re.MULTILINE))
    shown = {name for row in rows("docs/architecture.md") for name in re.findall(r"^`(\w+)`", row[1])}
    assert {"publish", "claim", "save", "finish"} <= shown
    assert {name for name in shown if "." not in name} <= statements


@pytest.mark.parametrize("name", [name for name in durable.__all__ if not name.startswith("_")])
def test_every_exported_name_is_mentioned(name: str) -> None:
    """Each public name is somewhere in the papers."""
    assert f"durable.{name}" in PAPERS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_links(page: Path) -> None:
    """Every link to a file of the project leads to one."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def _functions(path: str) -> list[ast.stmt]:
    return [node for node in ast.parse(read(path)).body if isinstance(node, ast.FunctionDef)]


def _unparsed(node: ast.stmt) -> str:
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        del node.body[0]
    return ast.unparse(node)


def _check_make(args: list[str]) -> None:
    makefile = read("Makefile")
    targets, variables = re.findall(r"^([a-z]+):", makefile, re.MULTILINE), re.findall(r"\$\(([A-Z]+)\)", makefile)
    assert all(arg in targets or arg.partition("=")[0] in variables for arg in args)


def _check_celery(args: list[str]) -> None:
    command: click.Command = celery_command
    while isinstance(command, click.Group):
        context = click.Context(command)
        _, rest, _ = command.make_parser(context).parse_args(args)
        args = rest[1:]
        command = durable_command if rest[0] == "durable" else command.commands[rest[0]]
    command.make_parser(click.Context(command, **command.context_settings)).parse_args(args)
    if command.name == "flower":
        names = [arg.partition("=")[0] for arg in args]
        assert all(name.removeprefix("--") in flower_options for name in names), names


def _check_python(args: list[str]) -> None:
    kind, what = args[:2]
    assert kind in ("-c", "-m")
    if kind == "-c":
        ast.parse(what)
    else:
        # A module of ours is found without an import of its package, which may make an app and install itself on it.
        ours = CHECKOUT.joinpath(*what.split("."))
        assert ours.is_dir() or ours.with_suffix(".py").exists() or importlib.util.find_spec(what) is not None


def _check_pip(args: list[str]) -> None:
    command, what = args
    extra = re.fullmatch(r"\.\[(\w+)\]", what)
    assert command == "install"
    if extra is not None:
        assert extra[1] in SETUP["options.extras_require"]
    else:
        assert what.partition("[")[0] in {"celery", "flower"}


def _check_pytest(args: list[str]) -> None:
    markers = [line.partition(":")[0] for line in SETUP["tool:pytest"]["markers"].split("\n")]
    if args[0] == "-m":
        assert set(args[1].split()) - {"not", "and", "or"} <= set(markers)
    else:
        assert all((CHECKOUT / path).exists() for path in args)


CHECKS = {
    "celery": _check_celery,
    "make": _check_make,
    "pip": _check_pip,
    "pytest": _check_pytest,
    "python": _check_python,
}
