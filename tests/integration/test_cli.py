"""`celery durable …` on a real database, each command in this process: what it does, prints, and refuses."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result

import celery_durable as durable
from celery_durable.cli import durable as group
from celery_durable.store.migrate import drop
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.roles import new_role

ODD = "or/der-'1' \"é 漢\" <b>&amp; [red]x[/red] \x1b[31m\u202e\r\n\t"
#: Five hundred and one of them: more than one batch.
MANY = """
    WITH born AS (
        INSERT INTO celery_durable.workflow (id, name, queue, state, max_crashes, publish_at)
        SELECT 'many' || n, 'many', 'celery', 'ENQUEUED', 10, clock_timestamp() FROM generate_series(1, 501) AS n
        RETURNING id
    )
    INSERT INTO celery_durable.input (workflow, envelope, body, content_type, content_encoding)
    SELECT born.id, i.envelope, i.body, i.content_type, i.content_encoding
    FROM born, (SELECT * FROM celery_durable.input LIMIT 1) AS i
"""


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """One database for all of these tests, which is cheaper."""
    return emptied_database_url


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    shop = Inprocess(database_url, broker_url)
    yield shop
    shop.close()


@pytest.fixture
def order(shop: Inprocess) -> Any:
    """A workflow that charges, publishes, receives, and ships; shipping may fail."""
    charge = durable.as_step(lambda value: value, name="charge")

    def ship(how: str) -> str:
        if how == "fail":
            raise OSError(f"no ship [bold]\x1b[1m{how}")
        return "shipped"

    @shop.workflow(name="order")
    def order(value: Any = 1, how: str = "well") -> Any:
        charge(value)
        durable.set_event("status", {"paid": True})
        if how == "wait":
            return durable.recv("approval")
        return [value, durable.as_step(ship, name="ship")(how)]

    return order


class Cli:
    """Runs commands of an app."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def __call__(self, *args: str, stdin: str | bytes = "", status: int = 0) -> str:
        """Run a command; one that fails must say why in one line."""
        result = self.result(*args, stdin=stdin)
        assert result.exit_code == status, (result.output, result.exception)
        if status == 1 and "--json" not in args:
            assert result.output.count("\n") == 1, result.output
        return result.output

    def json(self, *args: str, **options: Any) -> Any:
        """Run a command with --json; what it has printed."""
        return json.loads(self(args[0], "--json", *args[1:], **options))

    def result(self, *args: str, stdin: str | bytes = "") -> Result:
        """Run a command."""
        return CliRunner().invoke(group, args, input=stdin, obj=CLIContext(self._app, no_color=True, workdir=None))


@pytest.fixture
def cli(shop: Inprocess) -> Cli:
    return Cli(shop.app)


def ran(shop: Inprocess, order: Any, workflow_id: str, *args: Any) -> str:
    """A workflow that has run in this process."""
    order.apply_async(args, task_id=workflow_id)
    shop.run(workflow_id)
    return workflow_id


# list


def test_list(cli: Cli, shop: Inprocess, order: Any) -> None:
    """The newest first, in a table, with what there is to say of each and how many there are in each state."""
    ran(shop, order, "a")
    ran(shop, order, "b", 1, "fail")
    ran(shop, order, "c", 1, "wait")
    lines = [each.split() for each in cli("list").splitlines()]
    assert [each[:3] for each in lines[1:4]] == [
        ["c", "order", "SUSPENDED"], ["b", "order", "FAILURE"], ["a", "order", "SUCCESS"],
    ]  # fmt: skip
    assert "OSError:" in lines[2]
    assert cli("list").splitlines()[4] == "1 FAILURE, 1 SUCCESS, 1 SUSPENDED"


def test_list_as_json(cli: Cli, shop: Inprocess, order: Any) -> None:
    """Its names are those of WorkflowStatus, its times ISO 8601, its errors class and text."""
    ran(shop, order, "a", {"x": [1]})
    ran(shop, order, "b", 1, "fail")
    failed, done = cli.json("list")
    assert set(done) == {field for field in durable.WorkflowStatus.__slots__}
    assert (done["id"], done["args"], done["result"]) == ("a", [{"x": [1]}], [{"x": [1]}, "shipped"])
    assert datetime.fromisoformat(done["created_at"]) == durable.get_workflow_status("a", app=shop.app).created_at
    assert failed["error"] == {"type": "OSError", "message": "no ship [bold]\x1b[1mfail"}


def test_list_by_page(cli: Cli, shop: Inprocess, order: Any) -> None:
    """Each page begins after the last one of the page before; the last line names it."""
    for name in "abcde":
        order.apply_async(task_id=name)
    seen: list[str] = []
    after: list[str] = []
    while page := cli.json("list", "--limit=2", *after):
        seen += [each["id"] for each in page]
        after = ["--after", seen[-1]]
    assert seen == list("edcba")
    assert "--after d" in cli("list", "--limit=2")
    assert "--after" not in cli("list")
    assert "no workflow 'nope'" in cli("list", "--after=nope", status=1)


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ([], "edcba"), (["--limit=0"], ""), (["--state=enqueued"], "edc"), (["--name=order"], "edcba"),
        (["--state=SUCCESS", "--state=FAILURE"], "ba"), (["--name=nope"], ""), (["--name=' OR true --"], ""),
        (["--queue=celery"], "edcba"), (["--queue=%"], ""), (["--error=NO SHIP"], "b"), (["--error=%"], ""),
        (["--error="], "b"), (["--search=e"], "edcba"), (["--search=SHIP"], "b"), (["--search=nope"], ""),
        (["--created-after=1h"], "edcba"), (["--created-before=1h"], ""), (["--parent-id=a"], ""),
        (["--root-id=a"], "a"), (["--forked-from=a"], ""),
    ],
)  # fmt: skip
def test_filters(cli: Cli, shop: Inprocess, order: Any, filters: list[str], found: str) -> None:
    """Each filter finds what list_workflows does with it: some, all, or nothing."""
    ran(shop, order, "a")
    ran(shop, order, "b", 1, "fail")
    for name in "cde":
        order.apply_async(task_id=name)
    assert "".join(each["id"] for each in cli.json("list", *filters)) == found
    assert cli("list", "--ids", *filters) == "".join(f"{each}\n" for each in found)
    if not found:
        assert cli("list", *filters) == "no workflow matches\n"


def test_counts(cli: Cli, shop: Inprocess, order: Any) -> None:
    """By state, of those that match."""
    ran(shop, order, "a")
    order.apply_async(task_id="b")
    assert cli("list", "--count") == "1 ENQUEUED, 1 SUCCESS\n"
    assert cli.json("list", "--count", "--state=success") == {"SUCCESS": 1}
    assert cli.json("list", "--count", "--name=nope") == {}
    assert cli("list", "--count", "--name=nope") == "none\n"
    assert "--search" in cli("list", "--count", "--search=a", status=2)


# show


def test_show(cli: Cli, shop: Inprocess, order: Any) -> None:
    """Facts, arguments, events, messages, the timeline, and errors, with tracebacks if they are asked for."""
    ran(shop, order, "a", 7, "wait")
    durable.send("a", {"by": "ann"}, "approval", app=shop.app)
    shop.run("a")
    page = cli("show", "a")
    for part in ("SUCCESS", "(7, 'wait')", "{'by': 'ann'}", "approval", "charge", "{'paid': True}", "■"):
        assert part in page
    ran(shop, order, "b", 7, "fail")
    page = cli("show", "b")
    assert r"OSError: no ship [bold]\x1b[1mfail" in page
    assert "Traceback" not in page
    assert "in ship" in cli("show", "b", "--tracebacks")


def test_show_as_json(cli: Cli, shop: Inprocess, order: Any) -> None:
    """All that the functions of the package tell, under their names."""
    ran(shop, order, "a")
    found = cli.json("show", "a")
    assert set(found) == {*durable.WorkflowStatus.__slots__, "attempts", "steps", "messages", "events"}
    assert set(found["steps"][0]) == set(durable.StepInfo.__slots__)
    assert [step["key"] for step in found["steps"]] == [
        step.key for step in durable.list_workflow_steps("a", app=shop.app)
    ]
    assert found["events"] == {"status": {"paid": True}}
    assert found["attempts"][0]["ending"] == "SUCCESS"


@pytest.mark.parametrize("workflow_id", [ODD, "漢" * 80, "-- ", "a;b", "%", "\\"])
def test_odd_ids(cli: Cli, shop: Inprocess, order: Any, workflow_id: str) -> None:
    """Ids of any kind are found, and shown without their control characters and markup taking effect."""
    ran(shop, order, workflow_id, 1, "fail")
    for page in (cli("list"), cli("show", "--", workflow_id), cli("show", "--json", "--", workflow_id)):
        assert all(char.isprintable() or char == "\n" for char in page)
    assert "[red]x[/red]" in cli("list") or workflow_id != ODD
    assert cli.json("show", "--", workflow_id)["id"] == workflow_id
    assert cli.json("resume", "--", workflow_id) == [{"id": workflow_id}]


@pytest.mark.parametrize("workflow_id", ["nope", ODD, "", "x" * 10_000, "a\ud800"])
def test_unknown_ids(cli: Cli, shop: Inprocess, workflow_id: str) -> None:
    """An id that isn't there, or can't be one, is an error in a line that can be printed anywhere."""
    for command in (["show"], ["show", "--json"], ["cancel"], ["resume"], ["fork"]):
        said = cli(*command, "--", workflow_id, status=1)
        assert all(char.isprintable() or char == "\n" for char in said)


def test_large_values(cli: Cli, shop: Inprocess, order: Any) -> None:
    """A value of 16 MiB isn't loaded unless that is asked for, and never floods the terminal."""
    ran(shop, order, "a", "x" * (15 * 1024 * 1024))
    assert len(cli("show", "a")) < 10_000
    assert "15,728" in cli("show", "a")
    small = cli.json("show", "a")
    assert small["args"]["size"] > 15_000_000
    assert small["result"]["size"] > 15_000_000
    assert small["steps"][0]["output"]["size"] > 15_000_000
    assert cli.json("show", "a", "--full")["result"] == ["x" * (15 * 1024 * 1024), "shipped"]
    assert cli.json("list")[0]["args"]["size"] > 15_000_000


def test_values_that_cannot_be_read(cli: Cli, shop: Inprocess, order: Any, sql: Sql) -> None:
    """Undecodable ones, and those of an unknown serializer, are told as such, and hide nothing else."""
    ran(shop, order, "a")
    ran(shop, order, "b")
    sql.execute("UPDATE celery_durable.output SET value = '\\xff00', content_type = 'application/x-nobody'")
    sql.execute("UPDATE celery_durable.checkpoint SET value = '\\xff' WHERE workflow = 'a'")
    sql.execute("UPDATE celery_durable.checkpoint SET content_type = 'x/\x1b[31m' WHERE workflow = 'b'")
    sql.execute("UPDATE celery_durable.event SET value = '\\xff'")
    sql.execute("UPDATE celery_durable.input SET body = '\\xff', content_type = 'application/x-nobody'")
    for name in "ab":
        found = cli.json("show", name)
        assert (found["args"], found["error"]["type"]) == (None, "SerializationError")
        assert found["steps"][0]["error"]["type"] == "SerializationError"
        assert found["events"]["status"]["type"] == "SerializationError"
        page = cli("show", name)
        assert "SUCCESS" in page
        assert "\x1b" not in page
    assert len(cli.json("list")) == 2


def test_tables_need_rich(cli: Cli, shop: Inprocess, order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, tables are an error that says what to install; JSON, ids and counts go without."""
    ran(shop, order, "a")
    real = builtins.__import__

    def without_rich(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "rich":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    monkeypatch.delitem(sys.modules, "celery_durable.cli.tables", raising=False)
    for command in (["list"], ["show", "a"]):
        assert "pip install 'celery-durable[cli]'" in cli(*command, status=1)
        assert cli.json(*command)
    assert cli("list", "--ids") == "a\n"
    assert cli("list", "--count") == "1 SUCCESS\n"


# cancel, resume, fork


def test_by_ids(cli: Cli, shop: Inprocess, order: Any) -> None:
    """Named workflows need no confirmation; each is told of, and what had ended before is no error."""
    ran(shop, order, "a", 1, "fail")
    order.apply_async(task_id="b")
    assert cli("fork", "a", "--new-id=c", "--from-step=ship") == "c: forked from a\n"
    assert [step.key for step in durable.list_workflow_steps("c", app=shop.app)] == ["charge", "durable.set_event"]
    assert "it has: charge" in cli("fork", "a", "--from-step=nope", status=1)
    assert cli("cancel", "b", "a") == "b: cancelled\na: had ended before\n"
    assert cli.json("cancel", "b") == [{"id": "b", "cancelled": False}]
    assert cli("resume", "a", "b") == "a: resumed\nb: resumed\n"
    assert "a is ENQUEUED" in cli("resume", "a", status=1)
    (forked,) = cli.json("fork", "a")
    assert forked["forked_from"] == "a"
    assert durable.get_workflow_status(forked["id"], app=shop.app).forked_from == "a"


def test_all_of_those_named_or_none(cli: Cli, shop: Inprocess, order: Any) -> None:
    """One that isn't there: nothing is done."""
    order.apply_async(task_id="a")
    assert "'nope'" in cli("cancel", "a", "nope", status=1)
    assert durable.get_workflow_status("a", app=shop.app).state == "ENQUEUED"


def test_ids_from_standard_input(cli: Cli, shop: Inprocess, order: Any) -> None:
    """One a line, with - or without; empty lines are none, doubled ones count once."""
    for name in ("a", "b b", "c", "d"):
        order.apply_async(task_id=name)
    assert cli("cancel", "-", stdin="a\n\nb b\r\na\n") == "a: cancelled\nb b: cancelled\n"
    assert cli("cancel", stdin="c\n") == "c: cancelled\n"
    assert cli("cancel", "d", "-", stdin="a\n") == "d: cancelled\na: had ended before\n"
    assert cli("resume", "-", stdin=cli("list", "--ids", "--state=CANCELLED")).count("resumed") == 4
    assert cli("cancel", "-", stdin="") == "nothing to do\n"
    assert cli.json("cancel", "-", stdin="") == []
    assert "Which workflows?" in cli("cancel", stdin="", status=2)


def test_ids_of_several_lines(cli: Cli, shop: Inprocess, order: Any) -> None:
    """An id can't pass for others in a pipe, nor steer a terminal: it is printed in one line, and means nobody then."""
    for name in ("a", "b", "a\nb", "a\rb", "\x1b[31m"):
        order.apply_async(task_id=name)
    printed = cli("list", "--ids")
    assert sorted(printed.splitlines()) == sorted(["a", "b", "a\\nb", "a\\rb", "\\x1b[31m"])
    assert "nothing was done" in cli("cancel", "-", stdin=printed, status=1)
    assert cli("cancel", "a\nb") == "a\\nb: cancelled\n"
    assert cli.json("list", "--count") == {"CANCELLED": 1, "ENQUEUED": 4}


def test_many_from_standard_input(cli: Cli, shop: Inprocess, order: Any, sql: Sql) -> None:
    """As many as there are, in batches."""
    order.apply_async(task_id="a")
    sql.execute(MANY)
    said = cli("cancel", "-", stdin=cli("list", "--ids", "--limit=1000", "--name=many"))
    assert said.count(": cancelled\n") == 501
    assert cli.json("list", "--count") == {"CANCELLED": 501, "ENQUEUED": 1}


def test_by_filters(cli: Cli, shop: Inprocess, order: Any, sql: Sql) -> None:
    """All that match, in batches; how many is asked first, and without anybody to ask nothing is done."""
    order.apply_async(task_id="a")
    sql.execute(MANY)
    said = cli("cancel", "--name=many", status=1)
    assert "Cancel these workflows: 501 ENQUEUED?" in said
    assert "--yes" in said
    assert cli.json("list", "--count") == {"ENQUEUED": 502}
    assert cli("cancel", "--name=many", "--yes") == "501 cancelled\n"
    assert cli.json("list", "--count") == {"CANCELLED": 501, "ENQUEUED": 1}
    assert len(cli.json("resume", "--name=many", "--yes")) == 501
    assert cli("fork", "--name=order", "--yes") == "1 forked\n"
    assert cli("cancel", "--name=many", "--state=success", "--yes") == "nothing to do\n"
    assert cli.json("cancel", "--name=nope", "--yes") == []
    assert cli("cancel", "--created-after=1h", "-y") == "503 cancelled\n"


def test_ids_or_filters(cli: Cli, shop: Inprocess) -> None:
    """Not both, and a fork with a name of its own is one."""
    assert "not by both" in cli("cancel", "a", "--name=x", status=2)
    assert "--new-id" in cli("fork", "a", "b", "--new-id=c", status=2)
    assert "--new-id" in cli("fork", "--name=x", "--new-id=c", status=2)
    assert "no time" in cli("list", "--created-after=soon", status=2)
    assert "nope" in cli("list", "--state=nope", status=2)


def test_children(cli: Cli, shop: Inprocess, order: Any) -> None:
    """They are cancelled with their parent, and told of, too."""

    @shop.workflow(name="parent")
    def parent() -> Any:
        return order.delay().get()

    ran(shop, parent, "p")
    said = cli.json("cancel", "p", "--children")
    assert [each["cancelled"] for each in said] == [True, True]
    assert said[0]["id"] == "p"


# send


def test_send(cli: Cli, shop: Inprocess, order: Any) -> None:
    """A message is JSON, as an argument or by standard input; one key sends it once."""
    ran(shop, order, "a", 1, "wait")
    for _ in range(2):
        assert cli("send", "a", '{"by": "ann"}', "--topic=approval", "--idempotency-key=k") == "a: sent\n"
    assert cli.json("send", "a", "-", stdin="[1, null]")["id"] == "a"
    sent = durable.list_workflow_messages("a", app=shop.app)
    assert [(each.message, each.topic) for each in sent] == [({"by": "ann"}, "approval"), ([1, None], "")]
    shop.run("a")
    assert durable.get_workflow_status("a", app=shop.app).result == {"by": "ann"}
    assert "is SUCCESS" in cli("send", "a", "1", status=1)
    assert "to send a message to" in cli("send", "nope", "1", status=1)


@pytest.mark.parametrize("message", ["", "hello", "{", "[" * 100_000])
def test_messages_that_are_no_json(cli: Cli, shop: Inprocess, message: str) -> None:
    """The error says how a text is written."""
    assert "a text needs its quotes" in cli("send", "a", "--", message, status=1)


# recover, health, prune, migrate


def test_recover(cli: Cli, shop: Inprocess, order: Any, sql: Sql) -> None:
    """One sweep, and what each duty has found."""
    order.apply_async(task_id="a")
    sql.execute("UPDATE celery_durable.workflow SET deadline = clock_timestamp() - interval '1 s'")
    assert cli.json("recover")["expire"] == 1
    assert "expire: 0\n" in cli("recover")


def test_health(cli: Cli, shop: Inprocess, order: Any, sql: Sql) -> None:
    """0 if all is well, 1 with each problem in a line, in JSON, too."""
    cli("recover")
    assert cli("health").startswith("ok: workers: 1, running: 0, dead: 0, last sweep: ")
    found = cli.json("health")
    assert found["ok"] is True
    assert {field for field in durable.Health.__slots__} < set(found)
    sql.execute("UPDATE celery_durable.node SET seen = seen - interval '1 hour'")
    result = cli.result("health")
    assert result.exit_code == 1
    assert result.output == "".join(f"{each}\n" for each in durable.check_health(app=shop.app).problems)
    assert "No worker is alive" in result.output
    failed = cli.result("health", "--json")
    assert failed.exit_code == 1
    assert json.loads(failed.output)["problems"]


def test_recover_without_a_database(shop: Inprocess) -> None:
    """A sweep that can do nothing isn't called a success, and says why once."""
    away = Celery("away", broker=shop.app.conf.broker_url, set_as_current=False)
    durable.install(away, database_url="postgresql://nobody@127.0.0.1:1/nothing")
    assert "can't be reached at 127.0.0.1:1/nothing" in Cli(away)("recover", status=1)


def test_recover_of_which_a_part_fails(cli: Cli, shop: Inprocess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The duties that failed are named; why is in the log."""
    monkeypatch.setattr("celery_durable.recovery.Recovery.wake", lambda self: 1 / 0)
    result = cli.result("recover")
    assert result.exit_code == 1
    assert "These duties failed, and are left to the next sweep: wake." in result.output


def test_prune(cli: Cli, shop: Inprocess, order: Any, sql: Sql) -> None:
    """What is older than the retention; what is younger only if that is said, and confirmed."""
    for name, how in (("a", "well"), ("b", "well"), ("c", "well"), ("d", "fail")):
        ran(shop, order, name, 1, how)
    sql.execute("UPDATE celery_durable.workflow SET finished_at = finished_at - interval '20 days' WHERE id = 'a'")
    sql.execute("UPDATE celery_durable.workflow SET dispatched = true, node = NULL")
    assert cli("prune", "--older-than=30d") == "0 deleted\n"
    assert cli("prune", "--state=FAILURE") == "0 deleted\n"
    assert cli("prune") == "1 deleted\n"
    said = cli("prune", "--older-than=0", status=1)
    assert "Delete 3 workflows" in said
    assert "--yes" in said
    assert cli.json("list", "--count") == {"FAILURE": 1, "SUCCESS": 2}
    assert cli.json("prune", "--older-than=0", "--state=failure", "--yes") == {"deleted": 1}
    assert cli("prune", "--older-than=0", "--yes") == "2 deleted\n"
    assert cli.json("list") == []


def test_prune_by_state(database_url: str, broker_url: str, order: Any, shop: Inprocess, sql: Sql) -> None:
    """Each final state has its own retention; what is kept for ever isn't deleted without a word."""
    keeping = Celery("keeping", set_as_current=False)
    durable.install(keeping, database_url=database_url, retention={"FAILURE": None, "SUCCESS": 3600})
    cli = Cli(keeping)
    ran(shop, order, "a")
    ran(shop, order, "b", 1, "fail")
    sql.execute("UPDATE celery_durable.workflow SET finished_at = finished_at - interval '1 year'")
    sql.execute("UPDATE celery_durable.workflow SET dispatched = true, node = NULL")
    assert cli("prune") == "1 deleted\n"
    assert "--yes" in cli("prune", "--older-than=30d", status=1)
    assert cli("prune", "--older-than=30d", "--yes") == "1 deleted\n"


@pytest.fixture
def elsewhere(database_url: str, shop: Inprocess) -> Iterator[Cli]:
    """The commands of an app with a schema that isn't there yet."""
    app = Celery("elsewhere", set_as_current=False)
    durable.install(app, database_url=database_url, schema="elsewhere")
    yield Cli(app)
    drop(database_url, "elsewhere")


def test_migrate(elsewhere: Cli) -> None:
    """Missing migrations are named, printed or applied."""
    numbers = elsewhere.json("migrate", "--check", status=1)["missing"]
    assert numbers[0] == 1
    assert elsewhere("migrate", "--check", status=1) == f"missing: {numbers}\n"
    assert 'CREATE SCHEMA IF NOT EXISTS "elsewhere"' in elsewhere("migrate", "--sql")
    assert elsewhere.json("migrate") == {"applied": numbers}
    assert elsewhere("migrate", "--check") == "up to date\n"
    assert elsewhere.json("migrate", "--sql") == {"sql": []}
    assert "CREATE TABLE" in elsewhere("migrate", "--markers")
    assert "Give one of" in elsewhere("migrate", "--check", "--sql", status=2)


def test_grant(elsewhere: Cli, postgres_server: str, sql: Sql) -> None:
    """A role gets its rights with the migrations, or as SQL; one that isn't there is an error in one line."""
    with new_role(postgres_server, "shop") as role:
        assert f'"{role}"' in elsewhere("migrate", "--sql", "--grant", role)
        said = elsewhere("migrate", "--grant", role)
        assert said.startswith("applied: [1, ")
        assert said.endswith(f"granted: {role}\n")
        assert sql.value("SELECT has_table_privilege(%s, 'elsewhere.workflow', 'UPDATE')", role)
        assert elsewhere.json("migrate", "--grant", role) == {"applied": [], "granted": role}
    assert "CREATE ROLE makes one" in elsewhere("migrate", "--grant=nobody here", status=1)


def test_without_installation(shop: Inprocess) -> None:
    """An app on which it isn't installed is an error in one line, for every command that needs a database."""
    cli = Cli(Celery("plain", set_as_current=False))
    for command in (["list"], ["show", "a"], ["cancel", "a"], ["send", "a", "1"], ["health"], ["prune"], ["migrate"]):
        assert "isn't installed on the app plain" in cli(*command, status=1)
