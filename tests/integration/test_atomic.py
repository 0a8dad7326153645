"""Atomic steps: the effect and its checkpoint are both there, or neither."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from celery.exceptions import Ignore
from psycopg.rows import dict_row
from psycopg.types.numeric import FloatLoader

import celery_durable as durable
from celery_durable.engine.context import running
from celery_durable.exceptions import HandedOver, NotInWorkflow, OwnershipLost, StepTimeout
from celery_durable.store import Store
from celery_durable.store.pool import lent, pooled
from celery_durable.store.transaction import Transaction
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.proxy import PostgresProxy
from tests.integration.attempts import Killed, begin, crash, order, status, steps

pytestmark = pytest.mark.oldest

CANCEL = (
    "UPDATE celery_durable.workflow SET state = 'CANCELLED', finished_at = clock_timestamp(), dispatched = false, "
    "publish_at = NULL WHERE id = 'w1'"
)
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
LEASE = 1.5


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """One database for all tests here, with tables of the user's own."""
    with psycopg.connect(emptied_database_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS booking (id serial PRIMARY KEY, label text NOT NULL)")
        connection.execute("CREATE TABLE IF NOT EXISTS counter (name text PRIMARY KEY, value integer NOT NULL)")
        connection.execute("TRUNCATE booking, counter")
    return emptied_database_url


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    shop = Inprocess(database_url, broker_url, suspend_after=2)
    yield shop
    shop.close()


@pytest.fixture
def far_shop(proxy: PostgresProxy, broker_url: str) -> Iterator[Inprocess]:
    """One that reaches the database through the proxy."""
    shop = Inprocess(proxy.url, broker_url, suspend_after=2, lease=LEASE, heartbeat_interval=0.5)
    yield shop
    shop.close()


@pytest.fixture
def calls() -> list[Any]:
    """What bodies did, in order."""
    return []


def execute(query: str, *params: Any) -> Any:
    """Execute in the step's transaction."""
    return durable.current.connection.execute(query, params or None)


def book(label: str = "flight") -> str:
    """The effect of a step."""
    execute("INSERT INTO booking (label) VALUES (%s)", label)
    return label


def atomic(body: Any, name: str = "book", **options: Any) -> Any:
    return durable.as_step(body, name=name, atomic=True, **options)


def booked(sql: Sql) -> list[str]:
    return [row.label for row in sql.all("SELECT label FROM booking ORDER BY id")]


def error_of(step: Any, *args: Any) -> str:
    try:
        return str(step(*args))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_the_effect_and_the_outcome_are_kept_together(shop: Inprocess, sql: Sql, calls: list[Any]) -> None:
    """And a replay runs neither again."""
    step = atomic(lambda: calls.append("ran") or book())
    order(shop, step)
    attempt = begin(shop)
    with running(attempt):
        assert step() == "flight"
    assert crash(shop, attempt) == "ENQUEUED"
    assert shop.run("w1") == "flight"
    assert (calls, booked(sql), steps(shop)["book"].output) == (["ran"], ["flight"], "flight")


def test_before_the_commit_nobody_sees_either(shop: Inprocess, sql: Sql) -> None:
    """A body that dies leaves nothing."""

    def body() -> None:
        book()
        assert booked(sql) == []
        raise Killed

    step = atomic(body)
    order(shop, step)
    with running(begin(shop)), pytest.raises(Killed):
        step()
    assert booked(sql) == []
    assert steps(shop) == {}


def test_an_error_rolls_back_and_is_kept(shop: Inprocess, sql: Sql, calls: list[Any]) -> None:
    """Each retry has a transaction of its own."""

    def body() -> str:
        calls.append(execute("SELECT pg_current_xact_id()::text").fetchone()[0])
        book(f"try {len(calls)}")
        if len(calls) < 3:
            raise ConnectionError("not yet")
        return "done"

    order(shop, atomic(body, max_retries=5, retry_backoff=0.01))
    assert shop.run("w1") == "done"
    assert booked(sql) == ["try 3"]
    assert len(set(calls)) == 3
    info = steps(shop)["book"]
    assert (info.tries, [error.type for error in info.errors]) == (3, ["builtins.ConnectionError"] * 2)


def test_an_error_without_retries_is_kept(shop: Inprocess, sql: Sql) -> None:
    """The workflow sees it on every replay, and nothing of the effect is there."""

    def body() -> None:
        book()
        raise LookupError("no seats")

    order(shop, lambda: error_of(atomic(body)))
    assert shop.run("w1") == "LookupError: no seats"
    assert booked(sql) == []
    assert isinstance(steps(shop)["book"].error, LookupError)


@pytest.mark.parametrize("value", [object(), threading.Lock(), "x" * 20_000], ids=["object", "lock", "large"])
def test_a_value_that_cannot_be_kept_rolls_back(database_url: str, broker_url: str, sql: Sql, value: Any) -> None:
    """The effect isn't kept without an outcome: the error is the outcome, and it isn't tried again."""
    shop = Inprocess(database_url, broker_url, max_payload=10_000)
    order(shop, lambda: error_of(atomic(lambda: book() and value, max_retries=3)))
    assert re.match("SerializationError|PayloadTooLarge", shop.run("w1"))
    assert booked(sql) == []
    assert steps(shop)["book"].tries == 1
    shop.close()


# Other transactions.


def test_a_deadlock_is_tried_again_from_the_body(shop: Inprocess, sql: Sql, calls: list[Any]) -> None:
    """Both of two steps that wait for each other come through, once each; none of that counts as a failed try."""
    sql.execute("INSERT INTO counter VALUES ('a', 0), ('b', 0)")
    barrier = threading.Barrier(2)

    def body(first: str, second: str) -> None:
        calls.append(first)
        bump(first)
        if len(calls) <= 2:
            barrier.wait(20)
        bump(second)

    order(shop, lambda: durable.gather(atomic(body).s("a", "b"), atomic(body).s("b", "a")))
    assert shop.run("w1") == [None, None]
    assert sql.all("SELECT value FROM counter") == [(2,), (2,)]
    assert len(calls) >= 3
    assert [step.tries for step in steps(shop).values()] == [1, 1]


def bump(name: str) -> None:
    execute("UPDATE counter SET value = value + 1 WHERE name = %s", name)


def test_a_serialization_failure_is_tried_again_from_the_body(shop: Inprocess, sql: Sql, calls: list[Any]) -> None:
    """However many steps want the same row, each has its effect once."""
    sql.execute("INSERT INTO counter VALUES ('a', 0)")

    def body() -> None:
        execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        ((value,),) = execute("SELECT value FROM counter").fetchall()
        calls.append(value)
        execute("UPDATE counter SET value = %s", value + 1)

    order(shop, lambda: durable.gather(*[atomic(body).s() for _ in range(12)]) and None)
    shop.run("w1")
    assert sql.value("SELECT value FROM counter") == 12
    assert len(calls) > 12


def test_a_conflict_that_never_ends_is_an_error(shop: Inprocess, calls: list[Any]) -> None:
    """After some runs."""

    def body() -> None:
        calls.append("ran")
        raise psycopg.errors.SerializationFailure("again")

    order(shop, lambda: error_of(atomic(body)))
    assert shop.run("w1") == "SerializationFailure: again"
    assert len(calls) == 20


def test_a_workflow_that_is_cancelled_meanwhile_does_not_run_the_body_again(
    shop: Inprocess, sql: Sql, calls: list[Any]
) -> None:
    """Before another run of it, the last look is old."""

    def body() -> None:
        calls.append("ran")
        sql.execute(CANCEL)
        attempt.last_look -= 10
        raise psycopg.errors.SerializationFailure("again")

    step = atomic(body)
    order(shop, step)
    attempt = begin(shop)
    with running(attempt), pytest.raises(durable.exceptions.Cancelled):
        step()
    assert calls == ["ran"]


def test_a_constraint_that_fails_at_the_commit_is_the_steps_error(shop: Inprocess, sql: Sql) -> None:
    """Nothing was committed, and the error is kept."""
    sql.execute("CREATE TABLE IF NOT EXISTS seat (number integer UNIQUE DEFERRABLE INITIALLY DEFERRED)")

    def body() -> None:
        book()
        execute("INSERT INTO seat VALUES (1), (1)")

    order(shop, lambda: error_of(atomic(body)))
    assert shop.run("w1").startswith("UniqueViolation")
    assert booked(sql) == []
    assert steps(shop)["book"].error is not None


def test_atomic_steps_side_by_side_have_a_connection_each(shop: Inprocess, sql: Sql) -> None:
    """And none of them is one of our own statements'."""
    barrier = threading.Barrier(4)

    def body() -> int:
        barrier.wait(20)
        assert durable.get_workflow_status("w1", app=shop.app).state == "RUNNING"
        book()
        return int(execute("SELECT pg_backend_pid()").fetchone()[0])

    order(shop, lambda: durable.gather(*[atomic(body).s() for _ in range(4)]))
    assert len(set(shop.run("w1"))) == 4
    assert len(booked(sql)) == 4


def test_a_statement_of_ours_in_an_atomic_step_waits_for_no_other_atomic_step(database_url: str) -> None:
    """However few connections there are: those that steps have are others."""
    url = database_url
    few = {"lease": 6.0, "pgbouncer": False, "max_size": 1}
    store = Store(
        pooled(lambda: url, **few), lambda: url, "celery_durable", auto_migrate=False, lent=lent(lambda: url, **few)
    )
    with store.checkpoints.transaction(1, patience=0):
        assert store.workflows.by_id("w1", patience=0) is None
    store.close()


# What a body can do to its transaction.


def copies() -> None:
    copy = durable.current.connection.cursor().copy("COPY booking (label) FROM STDIN")
    copy.__enter__().write_row(["copied"])
    leftovers.append(copy)


def streams() -> None:
    rows = durable.current.connection.cursor().stream("SELECT generate_series(1, 100000)")
    next(rows)
    leftovers.append(rows)


def swallows() -> None:
    with contextlib.suppress(psycopg.errors.UndefinedTable):
        execute("SELECT FROM nowhere")


def enters(block: Any) -> None:
    block.__enter__()
    leftovers.append(block)


leftovers: list[Any] = []
MISUSES = {
    "commit": (lambda: durable.current.connection.commit(), "ProgrammingError: Explicit commit"),
    "rollback": (lambda: durable.current.connection.rollback(), "ProgrammingError: Explicit rollback"),
    "autocommit": (lambda: setattr(durable.current.connection, "autocommit", False), "ProgrammingError"),
    "isolation": (lambda: setattr(durable.current.connection, "isolation_level", 4), "ProgrammingError"),
    "close": (lambda: durable.current.connection.close(), "StepError: The step has closed its connection"),
    "copy": (copies, "StepError: The step has left a COPY"),
    "stream": (streams, "StepError: The step has left a COPY or a stream"),
    "swallow": (swallows, "StepError: A statement of the step has failed, and the error was swallowed"),
    "block": (lambda: enters(durable.current.connection.transaction()), "StepError: The step has left a block"),
    "pipeline": (lambda: enters(durable.current.connection.pipeline()), "StepError: The step has left a block"),
    "role": (lambda: execute("SET ROLE pg_monitor") and None, "InsufficientPrivilege"),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of what is left open, in the end
@pytest.mark.parametrize("misuse", MISUSES)
def test_a_body_that_spoils_its_transaction_has_failed(shop: Inprocess, sql: Sql, misuse: str) -> None:
    """It is told how, nothing is committed, and the next step works."""
    spoil, message = MISUSES[misuse]

    def body() -> None:
        book()
        spoil()

    order(shop, lambda: [error_of(atomic(body)), atomic(book, "next")()])
    said, following = shop.run("w1")
    assert said.startswith(message)
    assert following == "flight"
    assert booked(sql) == ["flight"]
    leftovers.clear()


def test_a_body_that_commits_by_sql_is_told_so(shop: Inprocess, sql: Sql) -> None:
    """What it has committed itself can't be undone, but it isn't taken for atomic."""

    def body() -> None:
        book()
        execute("COMMIT")

    order(shop, lambda: [error_of(atomic(body)), atomic(book, "next")()])
    said, _ = shop.run("w1")
    assert said.startswith("StepError: The step has ended its transaction itself")
    assert booked(sql) == ["flight", "flight"]


def test_a_part_of_a_body_may_fail(shop: Inprocess, sql: Sql) -> None:
    """In a transaction block of its own."""

    def body() -> None:
        book("kept")
        with contextlib.suppress(LookupError), durable.current.connection.transaction():
            book("undone")
            raise LookupError
        with durable.current.connection.pipeline():
            book("also kept")

    order(shop, atomic(body))
    shop.run("w1")
    assert booked(sql) == ["kept", "also kept"]


def changes_everything() -> int:
    """Leave in the session whatever can be left."""
    connection = durable.current.connection
    for statement in (
        "SET search_path TO pg_catalog",
        "SET statement_timeout TO '1 min'",
        "SET default_transaction_isolation TO 'serializable'",
        "SET TIME ZONE 'Asia/Tokyo'",
        "CREATE TEMPORARY TABLE mine (number integer)",
        "PREPARE mine AS SELECT 1",
        "SELECT pg_advisory_lock(42)",
        "LISTEN mine",
    ):
        connection.execute(statement)
    connection.row_factory = dict_row
    connection.cursor_factory = psycopg.ClientCursor
    connection.adapters.register_loader("text", FloatLoader)
    return int(connection.info.backend_pid)


def sees() -> dict[str, Any]:
    """What is left in the session."""
    rows = execute(
        "SELECT current_setting('search_path'), current_setting('statement_timeout'), current_setting('TimeZone'),"
        " current_setting('transaction_isolation'), to_regclass('pg_temp.mine') IS NULL,"
        " (SELECT count(*) FROM pg_prepared_statements WHERE name = 'mine'),"
        " (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'),"
        " (SELECT count(*) FROM pg_listening_channels()), pg_backend_pid()"
    ).fetchall()
    return dict(
        zip(("path", "timeout", "zone", "level", "temp", "prepared", "locks", "ears", "pid"), rows[0], strict=True)
    )


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_session_is_left_to_the_next_step(shop: Inprocess, fails: bool) -> None:
    """Neither to an atomic one nor to our own statements, whether it was committed or not."""

    def body() -> int:
        pid = changes_everything()
        if fails:
            raise LookupError(pid)
        return pid

    order(shop, lambda: [atomic(sees, "before")(), error_of(atomic(body, "changes")), atomic(sees, "after")()])
    before, pid, after = shop.run("w1")
    assert after == before
    assert str(before["pid"]) in pid
    assert before == {
        "path": '"$user", public', "timeout": "0", "zone": before["zone"], "level": "read committed", "temp": True,
        "prepared": 0, "locks": 0, "ears": 0, "pid": before["pid"],
    }  # fmt: skip


def test_behind_pgbouncer_nothing_is_prepared_or_discarded(proxy: PostgresProxy, broker_url: str) -> None:
    """The session is somebody else's in the next moment."""
    shop = Inprocess(proxy.url, broker_url, pgbouncer=True)

    def body() -> int:
        for _ in range(10):
            book()
        return int(execute("SELECT count(*) FROM pg_prepared_statements").fetchone()[0])

    order(shop, lambda: [atomic(body)() for _ in range(3)])
    proxy.reset()
    assert shop.run("w1") == [0, 0, 0]
    assert not any("DISCARD" in statement for statement in proxy.statements())
    shop.close()


def test_what_an_atomic_step_costs(far_shop: Inprocess, proxy: PostgresProxy) -> None:
    """BEGIN, the bound, the checkpoint, COMMIT and tidying up; a step that isn't atomic pays nothing of it."""
    order(far_shop, int)
    with running(begin(far_shop)):
        for expected in (7 + 1, 5 + 1):  # the first one connects, and reads the isolation level
            proxy.reset()
            atomic(book)()
            assert len(proxy.statements()) <= expected
        assert [statement.split()[0] for statement in proxy.statements()] == [
            "BEGIN", "INSERT", "--", "--", "COMMIT", "DISCARD",
        ]  # fmt: skip


# How the run stands at the end of the body.


def test_during_a_shutdown_it_is_recorded(shop: Inprocess, sql: Sql) -> None:
    """Then the workflow is handed over."""
    step = atomic(lambda: book() and shop.drain())
    order(shop, step)
    with running(begin(shop)), pytest.raises(HandedOver):
        step()
    assert booked(sql) == ["flight"]
    assert steps(shop)["book"].state == "SUCCESS"


@pytest.mark.parametrize("how", [CANCEL, "UPDATE celery_durable.workflow SET deadline = clock_timestamp()"])
def test_after_a_cancellation_it_is_recorded(shop: Inprocess, sql: Sql, how: str) -> None:
    """Its effect and its outcome, and the workflow goes no further."""
    step = atomic(lambda: book() and sql.execute(how))
    order(shop, lambda: [step(), atomic(book, "next")()])
    assert isinstance(shop.run("w1"), Ignore)
    assert booked(sql) == ["flight"]
    assert steps(shop)["book"].state == "SUCCESS"


def test_a_run_that_was_taken_over_commits_nothing(shop: Inprocess, sql: Sql) -> None:
    """The other worker's effect is the only one."""
    step = atomic(lambda: book() and sql.execute("UPDATE celery_durable.workflow SET token = %s", uuid.uuid4()))
    order(shop, step)
    with running(begin(shop)), pytest.raises(OwnershipLost):
        step()
    assert booked(sql) == []
    assert steps(shop) == {}


def test_timeouts_of_the_step_are_for_its_own_statements(shop: Inprocess, sql: Sql) -> None:
    """Its checkpoint waits for as long as it takes."""
    holder = Sql(sql.connection.info.dsn)

    def body() -> None:
        book()
        execute("SET LOCAL statement_timeout TO '100 ms'")
        execute("SET LOCAL lock_timeout TO '100 ms'")
        threads.submit(hold)
        wait_until(lambda: not lockable(sql), message="the workflow's row is locked")

    def hold() -> None:
        with holder.connection.transaction():
            holder.execute("SELECT FROM celery_durable.workflow FOR UPDATE")
            wait_until(lambda: sql.value(WAITING), message="the checkpoint waits")
            holder.execute("SELECT pg_sleep(0.2)")

    with ThreadPoolExecutor(1) as threads:
        order(shop, atomic(body))
        assert shop.run("w1") is None
    assert booked(sql) == ["flight"]
    holder.close()


def test_an_outcome_that_is_there_already_is_adopted(shop: Inprocess, sql: Sql) -> None:
    """And the effect of this run undone: it has happened."""

    def body() -> str:
        book("mine")
        attempt.save([record])
        return "mine"

    order(shop, int)
    attempt = begin(shop)
    step = atomic(body)
    with running(attempt):
        other = durable.as_step(lambda: "theirs", name="other")
        assert other() == "theirs"
        row = sql.one("DELETE FROM celery_durable.checkpoint RETURNING *")
        record = _record(row)
        assert step() == "theirs"
    assert booked(sql) == []


def _record(row: Any) -> Any:
    from celery_durable.serialization import Payload
    from celery_durable.store import StepRecord

    return StepRecord("book", 9, 1, None, None, None, True, Payload(row.value, row.content_type))


def test_the_connection_is_there_in_the_body_alone(shop: Inprocess) -> None:
    """A step within it shares it; one that isn't atomic has none."""
    nested = atomic(book, "nested")
    plain = durable.as_step(lambda: error_of(lambda: durable.current.connection), name="plain")

    def function() -> list[str]:
        step = atomic(lambda: [nested(), error_of(lambda: durable.current.connection.info.dbname)])
        return [*step(), plain(), error_of(lambda: durable.current.connection)]

    order(shop, function)
    results = shop.run("w1")
    assert results[0] == "flight"
    assert results[1].startswith("durable_test_")
    assert results[2].startswith("NotInWorkflow")
    assert results[3].startswith("NotInWorkflow")
    with pytest.raises(NotInWorkflow, match="atomic="):
        durable.current.connection  # noqa: B018 - raises


@pytest.mark.parametrize("query", ["SELECT pg_sleep(30)", "LOCK TABLE counter"])
def test_an_interrupted_statement_is_undone_at_once(shop: Inprocess, sql: Sql, query: str) -> None:
    """Its session ends, and the next step has another one."""
    holder = Sql(sql.connection.info.dsn)

    def body() -> None:
        book()
        execute(query)

    with holder.connection.transaction():
        holder.execute("LOCK TABLE counter")
        order(shop, lambda: [error_of(atomic(body, soft_time_limit=0.2)), atomic(book, "next")()])
        began = time.monotonic()
        said, following = shop.run("w1")
        assert time.monotonic() - began < 5
    assert said.startswith(StepTimeout.__name__)
    assert following == "flight"
    assert booked(sql) == ["flight"]
    wait_until(
        lambda: not sql.value("SELECT count(*) FROM pg_stat_activity WHERE query = %s", query),
        message="the statement has ended",
    )
    holder.close()


# Connections that are lost.

#: By what the proxy recognizes each statement.
STATEMENTS = {
    "begin": "BEGIN ISOLATION",
    "effect": "INTO booking",
    "bound": "idle_in_transaction",
    "save": "-- A step, slow",
    "commit": "COMMIT",
    "discard": "DISCARD ALL",
}
WHEN = pytest.mark.parametrize("when", ["before", "during", "after"])


@WHEN
@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_cut_connection_leaves_one_effect(
    far_shop: Inprocess, proxy: PostgresProxy, sql: Sql, statement: str, when: Any
) -> None:
    """Wherever it is cut, whether the commit has arrived or not; and no try is spent."""
    order(far_shop, lambda: [atomic(book, "first")(), atomic(book, "second")("hotel")])
    cut = proxy.cut(STATEMENTS[statement], when)
    assert far_shop.run("w1") == ["flight", "hotel"]
    cut.wait_reached(0)
    assert booked(sql) == ["flight", "hotel"]
    assert {step.key: step.tries for step in steps(far_shop).values()} == {"first": 1, "second": 1}


def test_an_outage_in_the_body_is_waited_for(
    far_shop: Inprocess, proxy: PostgresProxy, sql: Sql, calls: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The connection is ours, so the body isn't to blame: it runs again when the database is back."""

    def body() -> str:
        calls.append("ran")
        if len(calls) == 1:
            proxy.refuse()
            proxy.disconnect()
            threading.Thread(target=back_soon).start()
        return book()

    def back_soon() -> None:
        wait_until(lambda: "trying again" in caplog.text, message="a statement has failed meanwhile")
        proxy.accept()

    order(far_shop, atomic(body))
    with caplog.at_level(logging.WARNING):
        assert far_shop.run("w1") == "flight"
    assert (booked(sql), calls) == (["flight"], ["ran", "ran"])


def test_a_session_that_cannot_be_had_is_waited_for(
    shop: Inprocess, postgres_server: str, sql: Sql, calls: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Our own statements have one still; the body isn't run in vain, and no try is spent."""
    server = Sql(postgres_server)
    database = sql.value("SELECT current_database()")

    def allow() -> None:
        wait_until(lambda: caplog.text.count("trying again") > 3, message="it goes on trying")
        server.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")

    order(shop, int)
    with running(begin(shop)), caplog.at_level(logging.WARNING), ThreadPoolExecutor(1) as threads:
        server.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
        threads.submit(allow)
        assert atomic(lambda: calls.append("ran") or book())() == "flight"
    assert (booked(sql), calls) == (["flight"], ["ran"])
    assert steps(shop)["book"].tries == 1
    server.close()


def test_an_outage_before_the_body_is_waited_for(
    far_shop: Inprocess, proxy: PostgresProxy, sql: Sql, calls: list[Any]
) -> None:
    """It runs once."""
    order(far_shop, int)
    with running(begin(far_shop)):
        proxy.refuse()
        proxy.disconnect()
        threading.Timer(0.3, proxy.accept).start()
        assert atomic(lambda: calls.append("ran") or book())() == "flight"
    assert (booked(sql), calls) == (["flight"], ["ran"])


def test_a_worker_that_hangs_before_the_commit_loses_its_transaction(
    database_url: str, broker_url: str, sql: Sql, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a lease; until then it holds its workflow's row, then the workflow can be rescued."""
    shop = Inprocess(database_url, broker_url, lease=LEASE, heartbeat_interval=0.5)
    step = atomic(lambda: calls.append("ran") or book())
    order(shop, step)
    attempt = begin(shop)
    hangs, goes_on = threading.Event(), threading.Event()
    end = Transaction.end

    def hang(transaction: Transaction) -> None:
        hangs.set()
        goes_on.wait(20)
        end(transaction)

    def run() -> None:
        attempt.thread = threading.get_ident()
        with running(attempt), pytest.raises(OwnershipLost):
            step()

    with ThreadPoolExecutor(1) as threads, monkeypatch.context() as patched:
        patched.setattr(Transaction, "end", hang)
        running_step = threads.submit(run)
        hangs.wait(20)
        assert not lockable(sql)
        wait_until(lambda: lockable(sql), 5, "the database has ended the transaction")
        assert crash(shop, attempt) == "ENQUEUED"
        goes_on.set()
        running_step.result(20)
    assert booked(sql) == []
    assert shop.run("w1", shop.new_node()) == "flight"
    assert (booked(sql), calls) == (["flight"], ["ran", "ran"])
    shop.close()


def lockable(sql: Sql) -> bool:
    try:
        sql.execute("SELECT FROM celery_durable.workflow FOR UPDATE NOWAIT")
    except psycopg.errors.LockNotAvailable:
        return False
    return True


def test_a_worker_that_hangs_in_the_body_keeps_its_transaction(far_shop: Inprocess, sql: Sql) -> None:
    """A long pause between statements is the body's own affair; and it doesn't hold the workflow's row."""

    def body() -> None:
        book()
        assert lockable(sql)
        assert execute("SHOW idle_in_transaction_session_timeout").fetchone() == ("0",)

    order(far_shop, atomic(body))
    far_shop.run("w1")
    assert booked(sql) == ["flight"]
    assert status(far_shop).state == "SUCCESS"
