"""`celery -A … durable …` as people and probes run it: in a terminal, in pipes, with real workers."""

from __future__ import annotations

import json
import re
import shlex
import subprocess

import pytest

from tests.fixtures.commands import ROOT, Commands
from tests.fixtures.site import Site

ODD = "or/der-'1' \"é 漢\" <b>&amp; [red]x[/red] \x1b[31m"
ORDER = "tests.fixtures.apps.shop.order"
#: More than a pipe holds.
MANY = """
    INSERT INTO celery_durable.workflow (id, name, queue, state, max_crashes, wake_at, waiting_for)
    SELECT 'many' || n, 'many', 'celery', 'SUSPENDED', 10, clock_timestamp() + interval '1 year', 'sleep'
    FROM generate_series(1, 2000) AS n
"""
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def site(standing_site: Site) -> Site:
    """One shop for all of these tests: a command takes long enough."""
    return standing_site


@pytest.fixture
def commands(site: Site) -> Commands:
    return Commands(site.workers.env)


def test_operations(site: Site, commands: Commands) -> None:
    """What an operator does in a bad hour: sees what failed and why, resumes all of it, and sees it go on."""
    for number in range(3):
        site.shop.fails_with.apply_async((f"r{number}",), task_id=f"failed-{number}")
    for number in range(3):
        site.finished(f"failed-{number}")
    listed = commands.durable("list", "--state=FAILURE", "--error=refused")
    assert listed.count("Refused") == 3
    assert "refuse" in commands.durable("show", "failed-0", "--tracebacks")
    command = f"{shlex.join(commands.command)} durable"
    script = f"set -o pipefail; {command} list --ids --state=FAILURE | {command} resume - --json"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=commands.env, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert {each["id"] for each in json.loads(done.stdout)} == {f"failed-{number}" for number in range(3)}
    for number in range(3):
        assert site.finished(f"failed-{number}").attempt == 2


def test_probe(site: Site, commands: Commands) -> None:
    """The exit status of `health` is 0 beside a living worker, and 1, with the reason in a line, without a database."""
    assert commands.durable("health").startswith("ok: workers: 1, ")
    away = "postgresql://nobody@127.0.0.1:1/nothing"
    said = commands.durable("health", status=1, env={"DATABASE_URL": away})
    assert "durable_database_url" in said


@pytest.mark.parametrize("options", [["--json"], []], ids=["json", "table"])
def test_closed_pipe(site: Site, commands: Commands, options: list[str]) -> None:
    """Whoever reads only the beginning gets that, and no complaint."""
    if not site.sql.value("SELECT count(*) FROM celery_durable.workflow WHERE name = 'many'"):
        site.sql.execute(MANY)
    process = subprocess.Popen(
        [*commands.command, "durable", "list", "--limit=2000", *options], cwd=ROOT, env=commands.env,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) in (0, 1)  # as click has it
    process.stderr.close()


def test_confirmation(site: Site, commands: Commands) -> None:
    """A command by filters asks, with the count; no is no, and yes is done, with a bar."""
    site.shop.receiver.apply_async(("never",), task_id="asked")
    asked = ("durable", "cancel", "--name=tests.fixtures.apps.shop.receiver")
    screen = commands.terminal(*asked, answer="n\n", status=1)
    assert re.search(r"Cancel these workflows: 1 \w+\? \[y/N\]: n\s+Aborted!", screen)
    assert site.status("asked").state != "CANCELLED"
    screen = commands.terminal(*asked, answer="y\n")
    assert "1/1" in screen
    assert "1 cancelled" in screen
    assert site.status("asked").state == "CANCELLED"


def test_colours(site: Site, commands: Commands) -> None:
    """Only in a terminal that is to have them; what a workflow is called never gets through as a control sequence."""
    site.finished(site.shop.order.apply_async(("a",), task_id=ODD).id)
    look = ("durable", "list", "--name", ORDER)
    coloured = commands.terminal(*look)
    assert "\x1b[32mSUCCESS" in coloured
    plain = commands.terminal("--no-color", *look)
    assert "\x1b" not in plain.replace("\x1b[?25h", "")
    for screen in (_ESCAPES.sub("", coloured), plain, commands.run(*look)):
        shown = "".join(screen.split())
        assert r"[red]x[/red]\x1b[31m" in shown
        assert all(len(each) <= 100 for each in screen.splitlines()) or screen == commands.run(*look)
    ascii_only = commands.run(*look, env={"PYTHONIOENCODING": "ascii"})
    assert r"\xe9 \u6f22" in ascii_only


def test_timeline(site: Site, commands: Commands) -> None:
    """A crash, the tries of a step and the waits between them are drawn, within the width of the terminal."""
    site.finished(site.shop.doomed.apply_async(("d",), task_id="doomed").id)
    site.finished(site.shop.flaky_order.apply_async(("f", 2), task_id="flaky").id)
    screen = _ESCAPES.sub("", commands.terminal("durable", "show", "doomed"))
    assert all(len(each) <= 100 for each in screen.splitlines())
    (own,) = [each for each in screen.splitlines() if "DEAD" in each and "━" in each]
    assert own.count("!") == 3
    page = commands.durable("show", "flaky", env={"PYTHONIOENCODING": "ascii"})
    (tries,) = [each for each in page.splitlines() if "SUCCESS" in each and "#" in each]
    assert re.search(r" x[-x]*#+ ", tries)
