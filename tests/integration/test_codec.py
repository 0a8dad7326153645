"""A payload codec under whole workflows: nothing of theirs lies in Postgres in the clear, and all goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from celery.exceptions import Ignore, Retry
from sqlalchemy import create_engine

import celery_durable as durable
from celery_durable.engine.context import running
from celery_durable.envelope import HEADER, Envelope
from celery_durable.exceptions import CodecError, SerializationError, WorkflowCancelledError
from celery_durable.seal import HIDDEN
from celery_durable.testing import History, history_of, replay
from tests.fixtures.codecs import Encrypted, Failing, new_key
from tests.fixtures.fix_postgres import Sql, _new_database
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.readings import as_bytes, readings
from tests.integration.attempts import begin, clear, crash, order, status, steps

SECRET = "hush-7f3Kq9-zebra-of-the-north"
#: All that can have text in it.
COLUMNS = """
    SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'celery_durable'
        AND data_type NOT IN ('boolean', 'integer', 'bigint', 'uuid', 'interval', 'timestamp with time zone')
"""
KEYS = [new_key(), new_key(), new_key()]
#: Where each of these workflows' values lies in the clear if there is no codec.
PLACES = {
    "checkpoint.args", "checkpoint.errors", "checkpoint.value", "event.value", "input.body", "input.envelope",
    "marker.value", "message.body", "on_cancel.body", "on_cancel.envelope", "output.value", "workflow.error",
}  # fmt: skip


class Refused(Exception):
    """Has an argument and an attribute."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.hint = text


@pytest.fixture(scope="module")
def database_url(postgres_server: str, template_database: str) -> Iterator[str]:
    """One database for all of these tests, which is cheaper; each begins with empty tables."""
    with _new_database(postgres_server, template_database) as url:
        yield url


@pytest.fixture(scope="module")
def other_url(postgres_server: str) -> Iterator[str]:
    with _new_database(postgres_server, "template0") as url:
        yield url


@pytest.fixture(autouse=True)
def empty_tables(sql: Sql) -> None:
    clear(sql)


@pytest.fixture
def open_shop(database_url: str, broker_url: str) -> Iterator[Callable[..., Inprocess]]:
    """Make a process of the shop, with these settings."""
    shops: list[Inprocess] = []

    def open_shop(codec: Any = None, **settings: Any) -> Inprocess:
        shops.append(Inprocess(database_url, broker_url, payload_codec=codec, auto_migrate=True, **settings))
        return shops[-1]

    yield open_shop
    for shop in shops:
        shop.close()


@pytest.fixture
def failing() -> Failing:
    return Failing(Encrypted(KEYS[0]))


@pytest.fixture
def shop(open_shop: Callable[..., Inprocess], failing: Failing) -> Inprocess:
    return open_shop(failing)


def echoing(shop: Inprocess, name: str = "order") -> Any:
    """A workflow that returns its argument."""

    def echo(text: str) -> str:
        return text

    return shop.workflow(echo, name=name)


def declare(shop: Inprocess, elsewhere: Any = None) -> Any:
    """A workflow that has its secret in everything that a workflow can have."""

    @shop.step(name="flaky", autoretry_for=(Refused,), max_retries=2, default_retry_delay=0)
    def flaky(text: str, *, named: str) -> str:
        if durable.current.step.attempt == 1:
            raise Refused(text)
        return text

    @shop.step(name="broken")
    def broken(text: str) -> None:
        raise Refused(text)

    @shop.step(name="large", compression="gzip")
    def large(text: str) -> list[str]:
        return [text] * 500

    @shop.step(name="atomic", atomic=True)
    def atomic(text: str) -> str:
        return text

    @shop.workflow(name="child")
    def child(text: str) -> str:
        return text + str(durable.recv())

    @shop.workflow(name="refund")
    def refund(text: str) -> str:
        return text

    @shop.workflow(name="order", on_cancel=refund.s(SECRET), compression="gzip")
    def body(workflow_id: str, text: str, *, named: str) -> Any:
        seen = [flaky(text, named=named), large(text)[0], atomic(text)]
        if elsewhere is not None:
            seen.append(durable.as_step(lambda: text, name="elsewhere", atomic=elsewhere)())
        try:
            broken(text)
        except Refused as error:
            seen.append(error.hint)
        durable.set_event("told", text)
        started = child.apply_async((text,), task_id=f"child-of-{workflow_id}")
        durable.send(started.id, text)
        seen += [durable.recv("hint", default=text), started.get()]
        seen.append(durable.get_event(workflow_id, "told"))
        if durable.recv("end") == SECRET:
            raise Refused("".join(seen))
        return seen

    return body


def in_the_clear(*databases: Sql) -> set[str]:
    """The columns that somebody without the key could read the secret in."""
    return {
        f"{table}.{column}"
        for sql in databases
        for table, column in sql.all(COLUMNS)
        for (value,) in sql.all(f"SELECT {column} FROM celery_durable.{table} WHERE {column} IS NOT NULL")
        if any(SECRET.encode() in each for each in readings(as_bytes(value)))
    }


@pytest.mark.parametrize("encrypted", [True, False], ids=["encrypted", "in the clear"])
def test_nothing_lies_in_the_clear(
    open_shop: Callable[..., Inprocess], sql: Sql, other_url: str, encrypted: bool
) -> None:
    """Neither in a column of ours nor in a marker in another database; without a codec this finds all of them."""
    shop = open_shop(Encrypted(KEYS[0]) if encrypted else None)
    engine = create_engine(other_url.replace("postgresql://", "postgresql+psycopg://"))
    seen = set()
    with closing(Sql(other_url)) as other:
        other.execute("DROP SCHEMA IF EXISTS celery_durable CASCADE")
        task = declare(shop, engine)
        for workflow_id, end in (("w1", "well"), ("w2", SECRET)):
            seen |= live(shop, task, workflow_id, end, lambda: in_the_clear(sql, other))
        engine.dispose()
    assert seen == (set() if encrypted else PLACES)


def live(shop: Inprocess, task: Any, workflow_id: str, end: str, look: Callable[[], set[str]]) -> set[str]:
    """Let a workflow run to its end; what was to be seen on the way."""
    task.apply_async((workflow_id, SECRET), {"named": SECRET}, task_id=workflow_id)
    seen = look()
    assert isinstance(shop.run(workflow_id), Retry)
    durable.send(workflow_id, SECRET, topic="hint", app=shop.app)
    seen |= look()
    shop.run(f"child-of-{workflow_id}")
    shop.run(workflow_id)
    durable.send(workflow_id, end, topic="end", app=shop.app)
    seen |= look()
    outcome = shop.run(workflow_id)
    told = outcome.hint if isinstance(outcome, Refused) else "".join(outcome)
    assert isinstance(outcome, Refused) is (end == SECRET)
    assert told.replace(SECRET, "") == ""
    return seen | look()


def test_all_of_it_can_be_seen_by_the_app(shop: Inprocess) -> None:
    """Arguments, results, events and errors, those of the tries, too."""
    task = declare(shop)
    live(shop, task, "w1", "well", set)
    seen = status(shop)
    assert (seen.args, seen.kwargs) == (("w1", SECRET), {"named": SECRET})
    assert seen.result == [SECRET] * 5 + [2 * SECRET, SECRET]
    found = steps(shop)
    assert found["flaky"].output == SECRET
    assert [(told.type.rpartition(".")[2], told.message) for told in found["flaky"].errors] == [("Refused", SECRET)]
    assert isinstance(found["broken"].error, Refused)
    assert durable.list_workflow_events("w1", app=shop.app) == {"told": SECRET}
    assert [each.result for each in durable.list_workflows(name="child", app=shop.app)] == [2 * SECRET]


def test_headers_show_no_arguments(shop: Inprocess) -> None:
    """Unless the caller says what they shall show."""
    task = echoing(shop)
    task.apply_async((SECRET,), task_id="w1")
    task.apply_async((SECRET,), task_id="w2", argsrepr="(a name)")
    shown = [headers_of(shop, each) for each in ("w1", "w2")]
    assert [(each["argsrepr"], each["kwargsrepr"]) for each in shown] == [(HIDDEN, HIDDEN), ("(a name)", HIDDEN)]


def headers_of(shop: Inprocess, workflow_id: str) -> Any:
    (message,) = shop.installation.store.workflows.messages_of([workflow_id], patience=0)
    return Envelope.of_stored(message).headers


def test_a_crashed_workflow_is_replayed(shop: Inprocess) -> None:
    """Its steps don't run again, and are called with what they were called with."""
    runs = []

    def body(text: str) -> Any:
        return durable.as_step(lambda given: runs.append(given) or given, name="step")(text)

    order(shop, body, SECRET)
    attempt = begin(shop)
    with running(attempt):
        body(SECRET)
    crash(shop, attempt)
    assert shop.run("w1") == SECRET
    assert runs == [SECRET]


def test_other_arguments_are_still_found(shop: Inprocess) -> None:
    """What they were at first can be told, although it isn't stored in the clear."""
    given = iter(["first", "second"])

    def body() -> None:
        durable.as_step(lambda text: text, name="step")(next(given))
        durable.recv()

    order(shop, body)
    shop.run("w1")
    durable.send("w1", None, app=shop.app)
    told = str(shop.run("w1"))
    assert "first called with ('first'), and is now called with ('second')" in told
    assert status(shop).state == "DEAD"


def test_resumed_and_forked(shop: Inprocess, sql: Sql) -> None:
    """With the messages and steps as they are stored."""
    fails = [True]

    def body(text: str) -> Any:
        seen = durable.as_step(lambda: text, name="step")()
        if fails:
            raise Refused(text)
        return seen

    order(shop, body, SECRET)
    shop.run("w1")
    assert status(shop).state == "FAILURE"
    fails.clear()
    durable.resume_workflow("w1", app=shop.app)
    assert shop.run("w1") == SECRET
    fork = durable.fork_workflow("w1", app=shop.app)
    assert shop.run(fork.id) == SECRET
    assert in_the_clear(sql) == set()


def test_a_fork_leaves_its_chord(shop: Inprocess, sql: Sql) -> None:
    """Its message is written anew for that, and sealed again."""
    task = echoing(shop)
    chord = {"task": "note", "args": [SECRET], "kwargs": {}, "options": {}, "subtask_type": None}
    task.apply_async((SECRET,), task_id="w1", chord=chord)
    fork = durable.fork_workflow("w1", app=shop.app)
    row = shop.installation.store.workflows.by_id(fork.id, patience=0)
    assert row is not None
    codec = shop.installation.codec
    args, _, embed = codec.load_message(row.body, row.content_type, row.content_encoding, "it")
    assert (args, embed["chord"]) == ([SECRET], None)
    assert in_the_clear(sql) == set()


def test_a_workflow_retried_by_celery(shop: Inprocess, sql: Sql) -> None:
    """Its new message is sealed, too."""

    def body(self: Any, text: str) -> str:
        if not self.request.retries:
            raise self.retry(exc=Refused(text), countdown=0)
        return text

    task = shop.workflow(body, name="order", bind=True, max_retries=1)
    task.apply_async((SECRET,), task_id="w1")
    shop.run("w1")
    assert in_the_clear(sql) == set()
    wake(shop)
    assert shop.run("w1", retries=1) == SECRET


def test_a_foreign_message_is_sealed_when_it_is_adopted(shop: Inprocess, sql: Sql) -> None:
    """Whoever sent it doesn't have us; our row has its arguments in no header either."""
    echoing(shop)
    body = json.dumps([[SECRET], {}, {}]).encode()
    headers = {HEADER: None, "argsrepr": SECRET, "kwargsrepr": SECRET}
    assert shop.deliver("w1", ("order", body, "application/json", "utf-8"), **headers) == SECRET
    assert in_the_clear(sql) == set()
    assert status(shop).args == (SECRET,)


def test_a_history_is_read_without_the_key(shop: Inprocess, open_shop: Callable[..., Inprocess]) -> None:
    """It is kept for tests, which don't have that of production."""
    live(shop, declare(shop), "w1", "well", set)
    history = History.from_json(history_of("w1", app=shop.app).to_json())
    assert history.args == ("w1", SECRET)
    assert history["flaky"].output == SECRET
    assert str(history["broken"].error) == SECRET
    replay(history, declare(open_shop()))


# Keys that come and go


def test_a_rotation_under_a_running_workflow(open_shop: Callable[..., Inprocess]) -> None:
    """A new key is known everywhere before it is used; the old one goes when nothing is left that it has encrypted."""
    stages = [KEYS[:1], KEYS[:2], [KEYS[1], KEYS[0]]]
    shops = [open_shop(Encrypted(*keys)) for keys in stages]

    def body(text: str) -> Any:
        return [text, *(durable.recv() for _ in stages)]

    for shop in shops:
        shop.workflow(body, name="order")
    shops[0].app.tasks["order"].apply_async((SECRET,), task_id="w1")
    for number, shop in enumerate(shops):
        shop.run("w1")
        durable.send("w1", number, app=shop.app)
    assert shops[-1].run("w1") == [SECRET, 0, 1, 2]
    assert status(shops[1]).result == [SECRET, 0, 1, 2]
    shops[-1].app.tasks["order"].apply_async((SECRET,), task_id="w2")
    late = open_shop(Encrypted(KEYS[1]))
    assert durable.get_workflow_status("w2", app=late.app).args == (SECRET,)
    assert durable.get_workflow_status("w1", app=late.app).args is None


def test_without_the_key_all_but_the_values_is_shown(shop: Inprocess, open_shop: Callable[..., Inprocess]) -> None:
    """Lists, states and names; in place of a value an error that names the setting."""
    live(shop, declare(shop), "w1", "well", set)
    for codec in (None, Encrypted(KEYS[2])):
        other = open_shop(codec)
        seen = {each.id: each for each in durable.list_workflows(app=other.app)}
        assert (seen["w1"].state, seen["w1"].args, seen["w1"].result) == ("SUCCESS", None, None)
        assert_names_the_setting(seen["w1"].error)
        found = steps(other)
        assert found["large"].state == "SUCCESS"
        assert_names_the_setting(found["large"].error)
        assert_names_the_setting(found["broken"].error)
        (told,) = found["flaky"].errors
        assert told.type.endswith("Refused")
        assert "durable_payload_codec" in told.message
        with pytest.raises(CodecError, match="durable_payload_codec"):
            durable.fork_workflow("w1", app=other.app)
        with pytest.raises(CodecError, match="durable_payload_codec"):
            history_of("w1", app=other.app)


def assert_names_the_setting(error: Any) -> None:
    assert isinstance(error, SerializationError)
    assert "durable_payload_codec" in str(error)


def test_without_a_codec_a_row_of_before_is_read(open_shop: Callable[..., Inprocess]) -> None:
    """Where the setting is new, workflows that run go on, and what they write from now on is sealed."""
    before, after = open_shop(), open_shop(Encrypted(KEYS[0]))

    def body(text: str) -> Any:
        return [durable.as_step(lambda: text, name="step")(), durable.recv()]

    for shop in (before, after):
        shop.workflow(body, name="order")
    before.app.tasks["order"].apply_async((SECRET,), task_id="w1")
    before.run("w1")
    durable.send("w1", 1, app=after.app)
    assert after.run("w1") == [SECRET, 1]
    assert status(before).args == (SECRET,)
    assert_names_the_setting(status(before).error)


def test_a_step_that_cannot_be_read_is_no_failed_step(
    shop: Inprocess, failing: Failing, caplog: pytest.LogCaptureFixture
) -> None:
    """The workflow's code doesn't see it: it waits until a codec can read it, and says so."""
    seen: list[Any] = []

    def body(text: str) -> Any:
        try:
            seen.append(durable.as_step(lambda: text, name="step")())
        except Exception as error:
            seen.append(error)
        return durable.recv()

    order(shop, body, SECRET)
    shop.run("w1")
    durable.send("w1", SECRET, app=shop.app)
    message = opened(shop, "w1")
    failing.fails = ["decode"]
    assert isinstance(shop.deliver("w1", message), Retry)
    assert status(shop).state == "SUSPENDED"
    assert status(shop).waiting_for == "payload codec for step"
    assert "waits for a payload codec that can go on with it" in caplog.text
    failing.fails = []
    wake(shop)
    assert shop.run("w1") == SECRET
    assert seen == [SECRET, SECRET]


@pytest.mark.parametrize("failed", [True, False])
def test_a_body_is_not_called_while_nothing_can_be_sealed(shop: Inprocess, failing: Failing, failed: bool) -> None:
    """It would have its effect for nothing. An error that can't be read is no outcome either."""
    runs = []

    def effect() -> str:
        runs.append(1)
        if failed:
            raise Refused(SECRET)
        return SECRET

    order(shop, lambda: durable.as_step(effect, name="step")())
    failing.fails = ["encode", "decode"]
    message = opened(shop, "w1", sealed=False)
    assert isinstance(shop.deliver("w1", message), Retry)
    assert (runs, status(shop).waiting_for) == ([], "payload codec for step")
    failing.fails = []
    wake(shop)
    assert str(shop.run("w1")) == SECRET
    assert runs == [1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: durable.recv(default=SECRET),
        lambda: durable.send("w1", SECRET),
        lambda: durable.set_event("told", SECRET),
        lambda: durable.sleep(0),
        durable.uuid4,
        lambda: durable.current.workflow_id,
    ],
    ids=["recv", "send", "set_event", "sleep", "uuid4", "the result"],
)
def test_calls_wait_for_the_codec(shop: Inprocess, failing: Failing, call: Callable[[], Any]) -> None:
    """None of them fails, or lets the workflow fail."""

    def body() -> str:
        call()
        return SECRET

    order(shop, body)
    message = opened(shop, "w1")
    failing.fails = ["encode"]
    assert isinstance(shop.deliver("w1", message), Retry)
    assert status(shop).state == "SUSPENDED"
    assert str(status(shop).waiting_for).startswith("payload codec for ")
    failing.fails = []
    wake(shop)
    shop.run("w1")
    assert status(shop).state in ("SUCCESS", "SUSPENDED")
    assert status(shop).waiting_for in (None, "message")


@pytest.mark.parametrize("fails", ["encode", "decode"])
def test_steps_beside_each_other_wait_for_the_codec(shop: Inprocess, failing: Failing, fails: str) -> None:
    """Those of a gather, in threads: each runs once, whichever could be kept."""
    runs: list[int] = []
    work = durable.as_step(lambda number: runs.append(number) or number, name="step")

    def body() -> Any:
        done = durable.gather(*(work.s(number) for number in range(3)))
        return [*done, durable.recv()]

    check_waits(shop, failing, fails, body, [0, 1, 2, "end"])
    assert sorted(runs) == [0, 1, 2]


@pytest.mark.parametrize("fails", ["encode", "decode"])
def test_an_async_workflow_waits_for_the_codec(shop: Inprocess, failing: Failing, fails: str) -> None:
    """Its steps on the event loop, and in threads beside it."""
    runs: list[int] = []

    async def effect(number: int) -> int:
        runs.append(number)
        return number

    def plain(number: int) -> int:
        runs.append(number)
        return number

    async def body() -> Any:
        steps = [durable.as_step(effect, name="step").s(0), durable.as_step(plain, name="plain").s(1)]
        done = await durable.agather(*steps)
        return [*done, await durable.arecv()]

    check_waits(shop, failing, fails, body, [0, 1, "end"])
    assert sorted(runs) == [0, 1]


def check_waits(shop: Inprocess, failing: Failing, fails: str, body: Any, result: Any) -> None:
    """Let the codec fail in the first attempt, or in the one that follows a wait."""
    order(shop, body)
    message = opened(shop, "w1")
    if fails == "decode":
        shop.deliver("w1", message)
        assert status(shop).waiting_for == "message"
        durable.send("w1", "end", app=shop.app)
    failing.fails = [fails]
    assert isinstance(shop.deliver("w1", message), Retry)
    assert str(status(shop).waiting_for).startswith("payload codec for ")
    failing.fails = []
    if fails == "encode":
        durable.send("w1", "end", app=shop.app)
    wake(shop)
    assert shop.deliver("w1", message) == result


def test_a_child_waits_for_the_codec(shop: Inprocess, failing: Failing) -> None:
    """It is started later, once."""
    child = echoing(shop, "child")
    order(shop, lambda: child.delay(SECRET).id)
    message = opened(shop, "w1")
    failing.fails = ["encode"]
    assert isinstance(shop.deliver("w1", message), Retry)
    assert durable.list_workflows(name="child", app=shop.app) == []
    failing.fails = []
    wake(shop)
    assert shop.run("w1") == durable.list_workflows(name="child", app=shop.app)[0].id


def test_a_value_that_cannot_be_sealed_is_an_error(shop: Inprocess, failing: Failing, sql: Sql) -> None:
    """The effect has happened, and isn't made again; nothing of it is stored in the clear."""

    def effect() -> str:
        failing.fails = ["encode"]
        return SECRET

    def body() -> str:
        try:
            return str(durable.as_step(effect, name="step")())
        except SerializationError as error:
            failing.fails = []
            return str(error)

    order(shop, body)
    assert "CodecError, which durable_payload_codec couldn't encode: see the log." in shop.run("w1")
    assert in_the_clear(sql) == set()


def test_an_atomic_step_whose_value_cannot_be_sealed_is_rolled_back(
    shop: Inprocess, failing: Failing, sql: Sql
) -> None:
    """And runs again when it can be."""
    sql.execute("CREATE TABLE IF NOT EXISTS effects (text text)")

    def effect(fails: list[str]) -> str:
        durable.current.connection.execute("INSERT INTO effects VALUES ('once')")
        failing.fails = fails
        return SECRET

    tries = iter([["encode"], []])
    order(shop, lambda: durable.as_step(lambda: effect(next(tries)), name="step", atomic=True)())
    assert isinstance(shop.run("w1"), Retry)
    assert sql.value("SELECT count(*) FROM effects") == 0
    failing.fails = []
    wake(shop)
    assert shop.run("w1") == SECRET
    assert sql.value("SELECT count(*) FROM effects") == 1


def test_a_verdict_needs_no_codec(shop: Inprocess, open_shop: Callable[..., Inprocess], failing: Failing) -> None:
    """Whoever cancels a workflow, and whoever waits for it, may have none: there is no value of the app's in it."""
    task = echoing(shop)
    for workflow_id, other in (("w1", shop), ("w2", open_shop())):
        task.apply_async((SECRET,), task_id=workflow_id)
        failing.fails = ["encode", "decode"]
        assert durable.cancel_workflow(workflow_id, app=other.app)
        for each in (shop, other):
            with pytest.raises(WorkflowCancelledError):
                durable.WorkflowHandle(workflow_id, app=each.app).get()
        failing.fails = []


@pytest.mark.parametrize("act", ["start", "start many", "send", "fork"])
def test_whoever_starts_or_sends_is_told(shop: Inprocess, failing: Failing, sql: Sql, act: str) -> None:
    """Nothing is written, and nothing is sent."""
    task = echoing(shop)
    task.apply_async((SECRET,), task_id="w1", chord={"task": "note", "args": [], "kwargs": {}, "options": {}})
    acts = {
        "start": lambda: task.delay(SECRET),
        "start many": lambda: durable.enqueue_many([task.s(SECRET)]),
        "send": lambda: durable.send("w1", SECRET, app=shop.app),
        "fork": lambda: durable.fork_workflow("w1", app=shop.app),
    }
    failing.fails = ["encode"]
    with pytest.raises(SerializationError, match=r"can't be encoded by durable_payload_codec \(ConnectionError: the"):
        acts[act]()
    assert sql.value("SELECT count(*) FROM celery_durable.workflow") == 1
    assert sql.value("SELECT count(*) FROM celery_durable.message") == 0


def test_an_outcome_that_cannot_be_read_is_not_delivered(shop: Inprocess, failing: Failing) -> None:
    """Neither as another one: a worker that can read it does that."""
    order(shop, lambda: SECRET, ignore_result=False)
    message = opened(shop, "w1")
    assert shop.deliver("w1", message, ignore_result=False) == SECRET
    undeliver(shop)
    failing.fails = ["decode"]
    assert isinstance(shop.deliver("w1", message), Ignore)
    failing.fails = []
    undeliver(shop)
    assert shop.deliver("w1", message) == SECRET


def undeliver(shop: Inprocess) -> None:
    """Let an outcome be yet to deliver, by nobody who lives."""
    with closing(Sql(shop.installation.config.database_url)) as sql:
        sql.execute("UPDATE celery_durable.workflow SET dispatched = false, node = NULL")


def opened(shop: Inprocess, workflow_id: str, *, sealed: bool = True) -> tuple[str, bytes, str, str]:
    """A workflow's message as the worker's main process has opened it before the codec failed."""
    name, *message = shop.message(workflow_id)
    if sealed:
        return (name, *shop.installation.codec.open_message(*message, "it"))
    return name, b"[[], {}, {}]", "application/json", "utf-8"


def wake(shop: Inprocess) -> None:
    """Let the time of a wait have come."""
    with closing(Sql(shop.installation.config.database_url)) as sql:
        sql.execute("UPDATE celery_durable.workflow SET wake_at = clock_timestamp() WHERE state = 'SUSPENDED'")
    shop.installation.recovery(lambda messages: (), patience=0).wake()
