"""The test kit, used as its users do: in this process, with their own fakes in its memory."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import uuid
import warnings
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from celery import Celery, chain, current_task
from psycopg.conninfo import conninfo_to_dict

import celery_durable as durable
from celery_durable.exceptions import (
    ConfigurationError,
    DatabaseUnavailable,
    DurableError,
    NondeterminismError,
    NotInstalled,
    SerializationError,
    WorkflowCancelledError,
    WorkflowFinished,
    WorkflowNotFound,
)
from celery_durable.store.testkit import new_database
from celery_durable.testing import (
    History,
    deliver,
    history_of,
    replay,
    survives_crashes,
    with_steps_done,
)
from tests.fixtures.fix_wait import wait_until

pytest_plugins = ["celery_durable.testing.plugin"]

#: A sleep that no test would wait for.
LONG = timedelta(days=3)


@pytest.fixture(scope="session")
def durable_server(postgres_server: str) -> str:
    """The server that the other tests have."""
    return postgres_server


class Shop:
    """Workflows on the test's app, and what their steps have done."""

    def __init__(self, app: Celery) -> None:
        self.app = app
        self.calls: list[Any] = []
        shop = self

        @self.step
        def charge(order: int) -> str:
            shop.calls.append(("charge", order))
            return f"paid {order}"

        @self.step
        def ship(order: int, payment: str) -> str:
            shop.calls.append(("ship", order))
            return f"shipped {order}, {payment}"

        @self.workflow
        def checkout(order: int) -> str:
            return ship(order, charge(order))

        @self.workflow
        def patient(order: int) -> str:
            payment = charge(order)
            durable.sleep(LONG)
            return ship(order, payment)

        @self.workflow
        def approval(order: int) -> Any:
            return charge(order), durable.recv("answer")

        self.charge, self.ship, self.checkout, self.patient, self.approval = charge, ship, checkout, patient, approval

    def workflow(self, function: Any = None, **options: Any) -> Any:
        """Declare a workflow."""
        declare = self.app.task(base=durable.Workflow, shared=False, **options)
        return declare if function is None else declare(_named(function))

    def step(self, function: Any = None, **options: Any) -> Any:
        """Declare a step."""
        declare = self.app.task(base=durable.Step, shared=False, **options)
        return declare if function is None else declare(function)

    def count(self, name: str) -> int:
        """How often a step has run."""
        return sum(call[0] == name for call in self.calls)


@pytest.fixture
def shop(durable_app: Celery) -> Shop:
    return Shop(durable_app)


# Running.


def test_a_run_returns_outcome_and_history(shop: Shop, durable_run: Any) -> None:
    """A workflow runs to its end in this process, and its outcome and its steps can be looked at."""
    outcome, history = durable_run(shop.checkout, 7)
    assert (outcome.state, outcome.result, outcome.error) == ("SUCCESS", "shipped 7, paid 7", None)
    assert [step.output for step in history] == ["paid 7", "shipped 7, paid 7"]
    assert [step.name for step in history] == [step.name for step in durable.list_workflow_steps(outcome.id)]
    assert (history.args, history.result) == ((7,), outcome.result)
    assert history["charge"].state == "SUCCESS"
    assert shop.calls == [("charge", 7), ("ship", 7)]


def test_named_arguments_and_options(shop: Shop, durable_run: Any) -> None:
    """Arguments by name, and a signature with Celery's options."""
    assert durable_run(shop.checkout, order=3).get() == "shipped 3, paid 3"
    assert durable_run(shop.checkout.s(4).set(task_id="order-4")).id == "order-4"


def test_tests_begin_with_empty_tables(shop: Shop, durable_run: Any) -> None:
    """What another test has written, this test doesn't see: the same id is free again."""
    assert durable.list_workflows() == []
    assert durable_run(shop.checkout.s(4).set(task_id="order-4")).state == "SUCCESS"


def test_the_apps_database_is_none_of_the_developers(durable_postgres: str, postgres_server: str) -> None:
    """The session's database is one that was made for it."""
    with psycopg.connect(durable_postgres) as connection:
        assert connection.info.dbname.startswith("durable_test_")
    assert durable_postgres != postgres_server


def test_retries_take_no_time(shop: Shop, durable_run: Any) -> None:
    """A step that backs off for hours is tried again at once, with its real policy."""
    tries: list[int] = []

    @shop.step(autoretry_for=(ConnectionError,), max_retries=3, retry_backoff=3600, retry_backoff_max=9999)
    def flaky() -> int:
        tries.append(durable.current.step.attempt)
        if len(tries) < 3:
            raise ConnectionError("away")
        return len(tries)

    @shop.workflow
    def persistent() -> int:
        return flaky()

    run = durable_run(persistent)
    assert (run.get(), tries) == (3, [1, 2, 3])
    assert run.history[0].tries == 3


def test_a_failure_is_the_outcomes_error(shop: Shop, durable_run: Any) -> None:
    """What the workflow raises is kept, rebuilt, and raised by get()."""

    @shop.workflow
    def failing() -> None:
        raise LookupError("no stock", 3)

    run = durable_run(failing)
    assert run.state == "FAILURE"
    assert run.error.args == ("no stock", 3)
    with pytest.raises(LookupError, match="no stock"):
        run.get()


def test_time_is_skipped(shop: Shop, durable_run: Any) -> None:
    """A sleep of days takes no time, and the workflow's own clock shows that it has passed."""

    @shop.workflow
    def timed() -> float:
        before = durable.now()
        durable.sleep(LONG)
        return (durable.now() - before).total_seconds()

    assert durable_run(timed).get() >= LONG.total_seconds()


def test_a_test_that_has_the_clock_lets_time_pass(shop: Shop, durable_run: Any, durable_clock: Any) -> None:
    """With durable_clock a run stops at a timer, until the test has let enough time pass."""
    began = durable_clock.now()
    run = durable_run(shop.patient, 1)
    with pytest.raises(ConfigurationError, match="not -1"):
        durable_clock.advance(-1)
    assert (run.state, run.outcome.waiting_for, shop.count("ship")) == ("SUSPENDED", "sleep", 0)
    durable_clock.advance(days=2, hours=23, minutes=59)
    assert (durable_run.go_on(run).state, shop.count("ship")) == ("SUSPENDED", 0)
    durable_clock.advance(60)
    assert (durable_run.go_on(run).get(), shop.count("ship")) == ("shipped 1, paid 1", 1)
    assert durable_clock.now() - began >= LONG


def test_timers_fire_in_their_order(shop: Shop, durable_run: Any, durable_clock: Any) -> None:
    """What becomes due on the way runs at its own time, one after the other."""

    @shop.step
    def note(name: str) -> None:
        shop.calls.append((name, durable_clock.now()))

    @shop.workflow
    def alarm(name: str, days: int) -> None:
        durable.sleep(timedelta(days=days))
        note(name)
        durable.sleep(timedelta(days=days))
        note(name)

    began = durable_clock.now()
    durable_run(alarm, "slow", 3)
    durable_run(alarm, "quick", 2)
    durable_clock.advance(timedelta(days=7))
    assert [(name, round((at - began) / timedelta(days=1))) for name, at in shop.calls] == [
        ("quick", 2), ("slow", 3), ("quick", 4), ("slow", 6),
    ]  # fmt: skip


def test_all_times_are_the_clocks(shop: Shop, durable_run: Any, durable_clock: Any) -> None:
    """What the database writes by itself, and what the workflow sees, is the time that the test has set."""
    durable_clock.advance(timedelta(days=1000))
    now = durable_clock.now()
    run = durable_run(shop.workflow(lambda: durable.now().isoformat(), name="timed"))
    times = [run.outcome.created_at, run.outcome.started_at, datetime.fromisoformat(run.get())]
    assert all(timedelta(0) <= time - now < timedelta(minutes=1) for time in times)
    assert now - datetime.now(timezone.utc) > timedelta(days=999)


def test_a_delayed_start_and_a_deadline(shop: Shop, durable_run: Any, durable_clock: Any) -> None:
    """A countdown holds a start, and the deadline of a workflow that waits for a message ends it."""

    @shop.workflow(workflow_timeout=timedelta(days=1))
    def waiting() -> Any:
        return durable.recv()

    run = durable_run(waiting.s().set(countdown=3600))
    assert run.state == "ENQUEUED"
    durable_clock.advance(3600)
    assert durable_run.go_on(run).state == "SUSPENDED"
    durable_clock.advance(timedelta(days=1))
    run = durable_run.go_on(run)
    assert run.state == "CANCELLED"
    with pytest.raises(WorkflowCancelledError, match="workflow_timeout"):
        run.get()


def test_a_message_is_delivered(shop: Shop, durable_run: Any) -> None:
    """A run that waits for a message stops there, and goes on with the message; its deadline doesn't end it before."""
    run = durable_run(shop.approval.s(1).set(workflow_timeout=60))
    assert run.state == "SUSPENDED"
    with pytest.raises(DurableError, match="waits for message answer"):
        run.get()
    run = deliver(run.id, {"yes": True}, "answer")
    assert run is not None
    assert run.get() == ["paid 1", {"yes": True}]
    with pytest.raises(WorkflowFinished):
        deliver(run, "late", "answer")


def test_a_timeout_of_a_wait(shop: Shop, durable_run: Any, durable_clock: Any) -> None:
    """The default of a recv comes when its time has passed, not before."""

    @shop.workflow
    def asking() -> Any:
        return durable.recv("answer", timeout=LONG, default="none")

    run = durable_run(asking)
    durable_clock.advance(LONG / 2)
    assert durable_run.go_on(run).state == "SUSPENDED"
    durable_clock.advance(LONG)
    assert durable_run.go_on(run).get() == "none"


def test_children_run_too(shop: Shop, durable_run: Any) -> None:
    """Child workflows, steps that are sent away, gathers and first-of waits are all run here."""

    @shop.workflow
    def parent() -> Any:
        child = shop.patient.delay(1)
        step = shop.charge.delay(2)
        both = durable.gather(shop.charge.s(3), shop.charge.s(4))
        first = durable.wait_first([shop.checkout.delay(5), shop.checkout.delay(6)])
        return child.get(), step.get(), both, first.get()[:7]

    assert durable_run(parent).get() == ["shipped 1, paid 1", "paid 2", ["paid 3", "paid 4"], "shipped"]
    assert {each.state for each in durable.list_workflows()} == {"SUCCESS"}


def test_async_workflows(shop: Shop, durable_run: Any) -> None:
    """Async workflows with async steps, sleeps, children and messages of their own."""

    @shop.step
    async def fetch(number: int) -> int:
        await asyncio.sleep(0)
        return number

    @shop.workflow
    async def reading() -> Any:
        first = await asyncio.gather(fetch(1), fetch(2))
        await durable.asleep(LONG)
        child = await shop.checkout.adelay(3)
        return first, await child.aget(), await durable.arecv("answer", timeout=1, default="none")

    assert durable_run(reading).get() == [[1, 2], "shipped 3, paid 3", "none"]


def test_a_chain_of_workflows(shop: Shop, durable_run: Any) -> None:
    """The workflows of a chain run one after the other; it ends where one of them fails."""

    @shop.workflow
    def shout(text: str) -> str:
        return text.upper()

    @shop.workflow
    def failing(text: str) -> str:
        raise ValueError(text)

    assert durable_run(chain(shop.checkout.s(1), shout.s())).get() == "SHIPPED 1, PAID 1"
    assert durable_run(shop.checkout.s(2).set(link=shout.s())).get() == "shipped 2, paid 2"
    assert [each.result for each in durable.list_workflows(name=shout.name)] == [
        "SHIPPED 2, PAID 2",
        "SHIPPED 1, PAID 1",
    ]
    run = durable_run(chain(shop.checkout.s(1), failing.s(), shout.s()))
    assert (run.state, run.outcome.name) == ("FAILURE", failing.name)


def test_a_workflow_that_delay_has_started(shop: Shop, durable_run: Any) -> None:
    """What delay() starts waits until the test lets it go on; so does a resumed workflow."""
    handle = shop.checkout.delay(8)
    assert handle.state == "PENDING"
    assert durable_run.go_on(handle).get() == handle.get(timeout=1) == "shipped 8, paid 8"
    waiting = shop.approval.delay(9)
    assert durable.cancel_workflow(waiting.id)
    assert durable_run.go_on(waiting).state == "CANCELLED"
    durable.resume_workflow(waiting.id)
    assert durable_run.go_on(waiting).state == "SUSPENDED"


def test_cancelled_within(shop: Shop, durable_run: Any) -> None:
    """A workflow that cancels itself ends there, and what it names by on_cancel is run."""

    @shop.workflow
    def undo(order: int) -> None:
        shop.calls.append(("undo", order))

    @shop.workflow(on_cancel=undo.s(1))
    def aborting() -> None:
        @durable.as_step
        def give_up() -> None:
            """Stands for a step that finds out."""

        give_up()
        durable.cancel_workflow(durable.current.workflow_id)
        shop.charge(1)

    assert durable_run(aborting).state == "CANCELLED"
    assert shop.calls == [("undo", 1)]


def test_atomic_steps(shop: Shop, durable_run: Any) -> None:
    """An atomic step writes in its own transaction, in the same database."""

    @shop.step(atomic=True)
    def book() -> int:
        durable.current.connection.execute("CREATE TABLE IF NOT EXISTS booking (id serial)")
        return durable.current.connection.execute("INSERT INTO booking DEFAULT VALUES RETURNING id").fetchone()[0]

    @shop.workflow
    def booking() -> int:
        return book()

    assert durable_run(booking).get() >= 1


def test_atomic_steps_of_sqlalchemy(shop: Shop, durable_run: Any, durable_postgres: str) -> None:
    """A step that is atomic in an engine of the app's own commits with its checkpoint, and survives."""
    from sqlalchemy import create_engine, text

    engine = create_engine(durable_postgres.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE IF NOT EXISTS entry (workflow text UNIQUE)"))

    @shop.step(atomic=engine)
    def enter(workflow_id: str) -> None:
        durable.current.connection.execute(text("INSERT INTO entry VALUES (:id)"), {"id": workflow_id})

    @shop.workflow
    def entering() -> None:
        enter(durable.current.workflow_id)

    try:
        survives_crashes(entering)  # a second INSERT would be an error
    finally:
        engine.dispose()


def test_a_plain_task_that_each_replay_would_send_is_an_error(shop: Shop, durable_run: Any) -> None:
    """What a worker warns of once is an error in tests, every time, with the line to write."""

    @shop.app.task(shared=False)
    def mail() -> None:
        """Send a mail."""

    @shop.workflow
    def sending() -> None:
        mail.delay()

    for _ in range(2):
        run = durable_run(sending)
        assert run.state == "DEAD"
        with pytest.raises(NondeterminismError, match=r"durable\.as_step\(mail\)\.delay"):
            run.get()


def test_a_workflow_without_an_end(shop: Shop, durable_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that sleeps for ever is an error that names the clock."""
    monkeypatch.setattr("celery_durable.testing.bench.MOST_ATTEMPTS", 20)

    @shop.workflow
    def endless() -> None:
        while True:
            durable.sleep(LONG)

    with pytest.raises(AssertionError, match="durable_clock"):
        durable_run(endless)


@pytest.mark.parametrize("kind", ["plain task", "step", "text", "function", "class", "signature"])
def test_what_is_no_workflow_is_refused(shop: Shop, durable_run: Any, kind: str) -> None:
    """A plain task, a step, a name and a function are errors that say what to pass."""

    @shop.app.task(shared=False)
    def plain() -> None:
        """Do nothing."""

    what = {
        "plain task": plain, "step": shop.charge, "text": "checkout", "function": lambda: None,
        "class": durable.Workflow, "signature": plain.s(),
    }[kind]  # fmt: skip
    for use in (durable_run, survives_crashes, lambda it: with_steps_done(it, {}), lambda it: replay(_history(), it)):
        with pytest.raises(ConfigurationError, match="isn't"):
            use(what)


def test_a_workflow_of_another_app_is_refused(shop: Shop, durable_run: Any, database_url: str) -> None:
    """It would be written to that app's own database: the error names the option for one's own app."""
    other = Celery("other", set_as_current=False)
    durable.install(other, database_url=database_url)
    with pytest.raises(ConfigurationError, match="durable_app = package"):
        durable_run(Shop(other).checkout, 1)


# Steps that are done already.


def test_steps_done_already(shop: Shop, durable_run: Any) -> None:
    """Named steps answer without running, with a value or an error; the others run."""
    run = durable_run(with_steps_done(shop.checkout, {"charge": "paid elsewhere"}), 1)
    assert (run.get(), shop.calls) == ("shipped 1, paid elsewhere", [("ship", 1)])
    run = durable_run(with_steps_done(shop.checkout, {"charge": LookupError("no card")}), 1)
    assert (type(run.error), run.error.args) == (LookupError, ("no card",))
    twice = shop.workflow(_twice(shop), name="twice")
    assert durable_run(with_steps_done(twice, {"charge#2": "second"}), 1).get() == ["paid 1", "second"]


def test_steps_of_one_name(shop: Shop, durable_run: Any) -> None:
    """Of several steps that end alike that of the workflow's module is meant; elsewhere the error names them."""

    @shop.step(name="other.charge")
    def other(order: int) -> str:
        return "other"

    @shop.workflow(name="further.order")
    def further(order: int) -> str:
        return other(order)

    assert durable_run(with_steps_done(shop.checkout, {"charge": "done"}), 1).get() == "shipped 1, done"
    with pytest.raises(ConfigurationError, match=r"may be other\.charge or .*charge: write the whole name"):
        durable_run(with_steps_done(further, {"charge": "done"}), 1)
    assert durable_run(with_steps_done(further, {"other.charge": "done"}), 1).get() == "done"


def test_a_step_that_nobody_asks_for(shop: Shop, durable_run: Any) -> None:
    """A misspelled key is an error at the end, with the nearest one."""
    with pytest.raises(AssertionError, match=r"'chrage'.*never asked.*charge'"):
        durable_run(with_steps_done(shop.checkout, {"chrage": 1}), 1)


def test_a_patch_is_taken_with_steps_done(shop: Shop, durable_run: Any) -> None:
    """A step that is done beforehand doesn't make the workflow look as if it were an old one."""

    @shop.workflow
    def changed(order: int) -> str:
        return ("new " if durable.patched("x") else "old ") + shop.charge(order)

    assert durable_run(with_steps_done(changed, {"charge": "done"}), 1).get() == "new done"


# Histories and replays.


def test_a_history_is_plain_json(shop: Shop, durable_run: Any, tmp_path: Path) -> None:
    """It goes to a file and back, unchanged, and is JSON that can be read."""

    @shop.step
    def dated() -> Any:
        return {"at": datetime(2020, 1, 1, tzinfo=timezone.utc), "id": uuid.UUID(int=1)}

    @shop.workflow
    def mixed(order: int, *, note: str) -> Any:
        try:
            shop.app.tasks[failing.name](order)
        except ValueError:
            return dated(), note

    @shop.step
    def failing(order: int) -> None:
        raise ValueError(order)

    history = durable_run(mixed, 1, note="grün").history
    history.save(tmp_path / "mixed.json")
    text = (tmp_path / "mixed.json").read_text()
    assert "grün" in text
    assert json.loads(text)["arguments"]["value"] == [[1], {"note": "grün"}]
    assert History.load(tmp_path / "mixed.json") == history == History.from_json(history.to_json())
    assert history_of(history.id) == history_of(history.id, app=shop.app) == history
    assert (history.kwargs, history["failing"].error.args) == ({"note": "grün"}, (1,))
    assert history["dated"].output["at"] == datetime(2020, 1, 1, tzinfo=timezone.utc)
    replay(History.load(tmp_path / "mixed.json"), mixed)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"format": 2}', '{"format": 1, "id": 1}', "\x00", "[" * 99999]
)
def test_a_broken_history(text: str, tmp_path: Path) -> None:
    """What isn't a history is an error that names the file and how to record one."""
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(SerializationError, match=r"broken\.json.*history_of"):
        History.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": [{"key": 1, "seq": 1, "tries": 1}]}, {"steps": [{"key": "x", "seq": "1", "tries": 1}]},
        {"steps": [{"key": "x", "seq": 1, "tries": 1, "fingerprint": "no digest"}]},
        {"steps": [{"key": "x", "seq": 1, "tries": 1, "value": "no base64", "base64": True}]},
        {"arguments": {"value": "xy"}}, {"arguments": {"value": [1, {}]}}, {"arguments": {"error": {}}},
        {"outcome": None}, {"id": None}, {"retries": []},
    ],
    ids=str,
)  # fmt: skip
def test_a_history_with_something_out_of_place(change: dict[str, Any]) -> None:
    """A history that was edited or cut is refused where it is read, not in the middle of a replay."""
    with pytest.raises(SerializationError, match="history_of"):
        History.from_json(json.dumps({**json.loads(_history().to_json()), **change}))


def test_a_replay_runs_nothing(shop: Shop, durable_run: Any) -> None:
    """Unchanged code replays a finished workflow without a body, a statement or a database."""

    @shop.workflow
    def everything(order: int) -> Any:
        durable.sleep(1)
        child = shop.checkout.delay(order)
        both = durable.gather(shop.charge.s(2), shop.charge.s(3))
        durable.set_event("state", "asked")
        durable.send(child.id, "hello")
        return (
            durable.recv("answer", timeout=1, default="none"),
            child.get(),
            both,
            str(durable.uuid4()),
            durable.random(),
        )

    history = durable_run(everything, 1).history
    done, workflows = list(shop.calls), durable.list_workflows()
    replay(history, everything)
    assert (shop.calls, durable.list_workflows()) == (done, workflows)


def test_a_replay_needs_no_database(shop: Shop, durable_run: Any) -> None:
    """In CI there may be none."""
    history = durable_run(shop.checkout, 1).history
    elsewhere = Celery("elsewhere", set_as_current=False)
    durable.install(elsewhere, database_url="postgresql://nobody@127.0.0.1:1/nothing")
    replay(history, Shop(elsewhere).checkout)


CHANGES = {
    "other arguments": (lambda shop: lambda order: shop.ship(order, shop.charge(order + 1)), r"\(1\).*\(2\)"),
    "a step is gone": (lambda shop: lambda order: shop.charge(order), "ship.*without asking"),
    "a step is new": (lambda shop: lambda order: (shop.charge(order), shop.charge(order), shop.ship(order, "x")),
                      r"next was .*ship.*charge#2"),
    "a step is new at the end": (lambda shop: lambda order: (shop.ship(order, shop.charge(order)), shop.charge(2)),
                                 r"it returned 'shipped 1, paid 1'.*charge#2"),
    "another order": (lambda shop: lambda order: (shop.ship(order, "paid 1"), shop.charge(order)), "it returned"),
    "another outcome": (lambda shop: lambda order: shop.ship(order, shop.charge(order)) + "!", "paid 1!"),
    "an error": (lambda shop: lambda order: 1 / (len(shop.ship(order, shop.charge(order))) - 17), "ZeroDivisionError"),
    "a wait is new": (lambda shop: lambda order: (durable.sleep(9), shop.ship(order, shop.charge(order)))[1], "sleep"),
    "a child is new": (lambda shop: lambda order: (current_task.delay(2), shop.ship(order, "x")), "delay"),
    "a wait for the first is new":
        (lambda shop: lambda order: durable.wait_first([durable.WorkflowHandle("x")]), "wait_first"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_replay_is_strict(shop: Shop, durable_run: Any, change: str) -> None:
    """Code that does something else than was recorded is found, with both sides."""
    make, said = CHANGES[change]
    history = durable_run(shop.workflow(_original(shop), name="order"), 1).history
    done = list(shop.calls)
    with pytest.raises(NondeterminismError, match=f"(?s){said}"):
        replay(history, _redeclared(shop, make(shop)))
    assert shop.calls == done


def test_patched_code_replays(shop: Shop, durable_run: Any) -> None:
    """A change that patched() guards passes: old histories take the old code, and may go on with new at their end."""
    history = durable_run(shop.workflow(_original(shop), name="order"), 1).history

    def guarded(order: int) -> str:
        payment = shop.charge(order, 2) if durable.patched("two") else shop.charge(order)
        shipped = shop.ship(order, payment)
        if durable.patched("again"):
            shop.charge(9)
        return shipped

    replay(history, _redeclared(shop, guarded))

    def too_late(order: int) -> str:
        durable.deprecate_patch("two")
        return shop.ship(order, shop.charge(order))

    with pytest.raises(NondeterminismError, match="deprecate_patch"):
        replay(history, _redeclared(shop, too_late))


def test_an_unfinished_history_is_replayed_to_where_it_was(shop: Shop, durable_run: Any) -> None:
    """A workflow that waits is replayed up to its wait; a change before that is found."""
    history = durable_run(shop.approval, 1).history
    assert history.state == "SUSPENDED"
    replay(history, shop.approval)

    def other(order: int) -> Any:
        return durable.recv("other"), shop.charge(order)

    with pytest.raises(NondeterminismError, match=r"charge.*recv"):
        replay(history, _redeclared(shop, other, history.name))


@pytest.mark.parametrize("kind", ["gather", "async"])
@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_concurrent_steps_are_replayed_to_where_they_were(
    shop: Shop, durable_run: Any, kind: str, left_out: int
) -> None:
    """Of steps that run at once any may be recorded when a worker dies; a further one is found if all were."""

    @shop.step
    async def fetch(number: int) -> int:
        shop.calls.append(("fetch", number))
        return number

    def threads(count: int) -> Any:
        return lambda: durable.gather(*map(fetch.s, range(count)))

    def tasks(count: int) -> Any:
        async def order() -> Any:
            return list(await asyncio.gather(*map(fetch, range(count))))

        return order

    make = {"gather": threads, "async": tasks}[kind]
    history = durable_run(shop.workflow(make(3), name="order")).history
    done = list(shop.calls)
    facts = json.loads(history.to_json())
    del facts["steps"][left_out]
    unfinished = History.from_json(json.dumps({**facts, "outcome": None, "state": "RUNNING"}))
    replay(unfinished, _redeclared(shop, make(3)))
    replay(history, _redeclared(shop, make(3)))
    with pytest.raises(NondeterminismError):
        replay(history, _redeclared(shop, make(4)))
    assert shop.calls == done


def test_failures_and_async_workflows_replay(shop: Shop, durable_run: Any) -> None:
    """Failed workflows, async ones, and such that unwind while several branches run."""

    @shop.step
    async def fetch(number: int) -> int:
        if number == 3:
            raise ValueError(number)
        return number

    @shop.workflow
    async def reading(last: int) -> Any:
        numbers = await asyncio.gather(fetch(1), fetch(2))
        await durable.asleep(1)
        return [*numbers, await fetch(last)]

    for last in (3, 4):
        replay(durable_run(reading, last).history, reading)

    @shop.workflow(bind=True, autoretry_for=(ValueError,), max_retries=1, default_retry_delay=60)
    def again(self: Any) -> Any:
        if self.request.retries == 0:
            raise ValueError("not yet")
        return shop.charge(1), self.request.retries

    run = durable_run(again)
    assert run.get() == ["paid 1", 1]
    replay(run.history, again)


def test_a_workflow_of_another_name(shop: Shop, durable_run: Any) -> None:
    """The workflow that is named counts, whatever it is called by now; an error names both."""
    history = durable_run(shop.checkout, 1).history
    replay(history, shop.workflow(lambda order: shop.ship(order, shop.charge(order)), name="renamed"))
    with pytest.raises(NondeterminismError, match=r"\(.*checkout\) can't be replayed by .*patient"):
        replay(history, shop.patient)


def test_what_is_no_history(shop: Shop, durable_run: Any) -> None:
    """A text in place of a history says how to come by one."""
    history = durable_run(shop.checkout, 1).history
    with pytest.raises(ConfigurationError, match=r"History\.load"):
        replay(history.to_json(), shop.checkout)  # type: ignore[arg-type]


class TestPickle:
    """An app whose values are no JSON."""

    @pytest.fixture
    def durable_project_app(self) -> Celery:
        app = Celery("pickling", set_as_current=False)
        app.conf.update(task_serializer="pickle", accept_content=["pickle"])
        return app

    def test_values_that_are_no_json(self, durable_app: Celery, durable_run: Any) -> None:
        """Arguments and results of another serializer are kept as base64, and read as far as the app accepts them."""
        shop = Shop(durable_app)

        @shop.workflow
        def complex_order(number: complex) -> Any:
            return {shop.charge(number): number}

        run = durable_run(complex_order, 1j)
        assert run.get() == {"paid 1j": 1j}
        history = History.from_json(run.history.to_json())
        assert history == run.history
        replay(history, complex_order)
        durable.install(
            other := Celery("other", set_as_current=False), database_url="postgresql://nobody@127.0.0.1:1/x"
        )
        with pytest.raises(SerializationError, match="accept_content"):
            replay(
                history, other.task(base=durable.Workflow, shared=False, name=complex_order.name)(_named(lambda: None))
            )


# Crashes.


def test_a_workflow_survives_all_crashes(shop: Shop) -> None:
    """Each instant is tried, and no kept step runs again."""

    @shop.workflow
    def order(number: int) -> Any:
        payment = shop.charge(number)
        durable.sleep(LONG)
        child = shop.checkout.delay(number + 1)
        return payment, child.get(), str(durable.uuid4()), durable.recv("answer")

    tried = survives_crashes(order, (1,), messages=[("answer", "yes")])
    assert tried.run.state == "SUCCESS"
    assert "before the body of step" in tried.instants[2]
    assert {"before it is suspended", "after its outcome is kept"} <= set(tried.instants)
    assert len(tried.instants) > 25
    # Two runs without a crash, one for each instant, and of each body one more that was in flight.
    assert len(tried.instants) + 2 <= shop.calls.count(("charge", 1)) <= len(tried.instants) + 4


def test_failing_and_retried_workflows_survive(shop: Shop) -> None:
    """A failure is an outcome like any other, and tries are counted."""
    tries: list[int] = []

    @shop.step(max_retries=2, autoretry_for=(ConnectionError,), retry_backoff=60)
    def flaky() -> None:
        tries.append(durable.current.step.attempt)
        if len(tries) % 2:
            raise ConnectionError("away")

    @shop.workflow
    def failing() -> None:
        flaky()
        raise LookupError("no stock")

    assert isinstance(survives_crashes(failing, before=tries.clear).run.error, LookupError)


@pytest.mark.parametrize("kind", ["gather", "async"])
def test_concurrent_steps_survive(shop: Shop, kind: str) -> None:
    """Steps that run at once die together, and those that were kept don't run again."""

    @shop.step
    async def fetch(number: int) -> int:
        return number

    @shop.workflow
    def threads() -> Any:
        return durable.gather(shop.charge.s(1), shop.charge.s(2), shop.charge.s(3)), durable.sleep(1)

    @shop.workflow
    async def tasks() -> Any:
        return await asyncio.gather(fetch(1), fetch(2), fetch(3)), await durable.asleep(1)

    survives_crashes({"gather": threads, "async": tasks}[kind])


def test_links_survive(shop: Shop) -> None:
    """A worker that dies after an outcome, before Celery has told the next of a chain, leaves that to another."""

    @shop.workflow
    def shout(text: str) -> str:
        return text.upper()

    assert survives_crashes(chain(shop.checkout.s(1), shout.s())).run.result == "SHIPPED 1, PAID 1"


def _memory_decides(shop: Shop) -> Any:
    seen: list[int] = []

    def order() -> Any:
        seen.append(1)
        if len(seen) % 2:
            shop.charge(1)
        shop.charge(2)
        shop.charge(3)

    return order


def _effect_outside(shop: Shop) -> Any:
    seen: list[int] = []

    def order() -> Any:
        seen.append(1)
        shop.charge(1)
        return len(seen)

    return order, seen.clear


def _double_effect(shop: Shop) -> Any:
    stock = [10]

    @shop.step
    def take() -> int:
        stock[0] -= 1
        return stock[0]

    return (lambda: take()), lambda: stock.__setitem__(0, 10)


def _double_effect_refused(shop: Shop) -> Any:
    taken: list[int] = []

    @shop.step
    def take() -> None:
        if taken:
            raise LookupError("taken")
        taken.append(1)

    return (lambda: take()), taken.clear


def _fake_that_is_used_up(shop: Shop) -> Any:
    function, _ = _double_effect_refused(shop)
    return function


def _failure_that_is_swallowed(shop: Shop) -> Any:
    function, _ = _double_effect_refused(shop)

    def order() -> None:
        with suppress(LookupError):
            function()

    return order


def _later_chance(shop: Shop) -> Any:
    """Has luck at first: its second run can be replayed, and isn't as its first one."""
    seen: list[int] = []

    def order() -> None:
        seen.append(1)
        if len(seen) == 1 or (len(seen) > 3 and len(seen) % 2):
            shop.charge(1)
        else:
            shop.ship(1, "x")

    return order


def _chance(shop: Shop) -> Any:
    return lambda: shop.charge(random.random())


def _chance_in_result(shop: Shop) -> Any:
    return lambda: (shop.charge(1), random.random())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_memory_decides, r"first called with \(2\).*Code outside of steps|ends in DEAD"),
        (_effect_outside, "Code outside of steps"),
        (_double_effect, r"killed after the body of step .*take'.*idempotency_key"),
        (_double_effect_refused, r"killed after the body of step .*take', before.*LookupError.*idempotency_key"),
        (_fake_that_is_used_up, r"two runs without a crash the step .*take' ends as .*before="),
        (_failure_that_is_swallowed, r"two runs without a crash the step .*take' ends as .*before="),
        (_later_chance, "Code outside of steps"),
        (_chance, r"first called with .*durable\.random"),
        (_chance_in_result, "can't be replayed.*durable"),
    ],
)
def test_what_does_not_survive(shop: Shop, make: Any, said: str) -> None:
    """A workflow that isn't deterministic, or whose step isn't the same twice, fails with what to do."""
    made = make(shop)
    function, before = made if isinstance(made, tuple) else (made, None)
    workflow = shop.workflow(lambda: function(), name="order")
    with pytest.raises(AssertionError, match=f"(?s){said}"):
        survives_crashes(workflow, before=before)


def test_a_kept_step_that_runs_again_is_found(shop: Shop, durable_postgres: str) -> None:
    """A checkpoint that is lost in a crash, which only a fault of the database could do, isn't overlooked."""

    @shop.workflow
    def forgetful() -> Any:
        try:
            return shop.charge(1), shop.charge(2)
        except SystemExit:
            with psycopg.connect(durable_postgres) as connection:
                connection.execute("DELETE FROM celery_durable.checkpoint")
            raise

    with pytest.raises(AssertionError, match=r"after the checkpoint of step .*charge', the body .* ran 2 times"):
        survives_crashes(forgetful)


def test_arguments_are_a_tuple(shop: Shop) -> None:
    """A text in their place would be taken for its characters."""
    with pytest.raises(ConfigurationError, match="as a tuple"):
        survives_crashes(shop.checkout, "42")


def test_survivors_must_have_an_end(shop: Shop) -> None:
    """A workflow that waits for a message says how to pass it."""
    with pytest.raises(AssertionError, match=r"waits for message answer.*messages="):
        survives_crashes(shop.approval, (1,))


def test_what_a_dead_worker_does_leaves_no_trace(shop: Shop) -> None:
    """A finally of the workflow runs at such a death, and its durable calls do nothing."""

    @shop.workflow
    def tidy() -> str:
        try:
            return str(shop.charge(1))
        finally:
            shop.ship(1, "x")

    assert survives_crashes(tidy).run.result == "paid 1"


# Messages, ids and installations that there aren't.


def test_unknown_ids(shop: Shop, durable_run: Any) -> None:
    """An id that there isn't is an error wherever it is given."""
    for use in (history_of, lambda id: deliver(id, 1), durable_run.go_on):
        with pytest.raises(WorkflowNotFound, match="'nothing'"):
            use("nothing")
    with pytest.raises(WorkflowNotFound, match="no id"):
        deliver(None, 1)


@pytest.mark.parametrize(("ini", "said"), [("nowhere:app", "can't be imported"), ("os:environ", "no Celery app")])
def test_an_app_that_there_is_not(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, ini: str, said: str
) -> None:
    """A wrong name in pytest.ini is said so."""
    usual = request.config.getini
    monkeypatch.setattr(request.config, "getini", lambda name: ini if name == "durable_app" else usual(name))
    with pytest.raises(ConfigurationError, match=f"durable_app names '{ini}'.*{said}"):
        request.getfixturevalue("durable_app")


def test_no_installation(postgres_server: str) -> None:
    """Without install() the error says what is missing."""
    app = Celery("bare", set_as_current=False)
    bare = app.task(base=durable.Workflow, shared=False)(_named(lambda: None))
    for use in (survives_crashes, lambda it: history_of("x", app=app), lambda it: replay(_history(bare.name), it)):
        with pytest.raises(NotInstalled):
            use(bare)


@pytest.mark.parametrize(
    ("url", "error", "said"),
    [
        ("postgresql://me:secret@127.0.0.1:1/shop", DatabaseUnavailable, "DATABASE_URL can't be reached.*embedded"),
        ("postgresql://me:sec%ret@host", ConfigurationError, "DATABASE_URL isn't"),
    ],
)
def test_a_database_url_that_leads_nowhere(url: str, error: type[Exception], said: str) -> None:
    """The error names DATABASE_URL, says what to do, and shows no password."""
    with pytest.raises(error, match=said) as raised, new_database(url):
        pass
    assert "sec" not in str(raised.value)


def test_a_role_with_a_search_path_of_its_own(postgres_server: str) -> None:
    """Time can be set for it, too; where the connection itself has a path, it is said that time can't be."""
    role = f"role_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(postgres_server, autocommit=True) as server:
        server.execute(f"CREATE ROLE {role} LOGIN SUPERUSER")  # type: ignore[arg-type]
        try:
            server.execute(f"ALTER ROLE {role} SET search_path = its_own")  # type: ignore[arg-type]
            place = urlsplit(postgres_server)
            theirs = place._replace(netloc=f"{role}@{place.netloc.rpartition('@')[2]}").geturl()
            with new_database(theirs) as url:
                assert survives_crashes(_installed(url).patient, (1,)).run.state == "SUCCESS"
                mark = "&" if "?" in url else "?"
                with pytest.raises(ConfigurationError, match="search_path"):
                    survives_crashes(_installed(f"{url}{mark}options=-csearch_path%3Dits_own").patient, (1,))
        finally:
            server.execute(f"DROP ROLE {role}")  # type: ignore[arg-type]


def test_a_database_is_dropped_whatever_ends_its_process(postgres_server: str) -> None:
    """Nothing is left on the server of DATABASE_URL, even by SIGKILL."""
    code = (
        "import os, signal, sys\n"
        "from celery_durable.store.testkit import new_database\n"
        "with new_database(sys.argv[1]) as url:\n"
        "    print(url, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, postgres_server], timeout=60, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    name = conninfo_to_dict(done.stdout.strip())["dbname"]
    with psycopg.connect(postgres_server, autocommit=True) as server:
        wait_until(lambda: not server.execute("SELECT FROM pg_database WHERE datname = %s", [name]).fetchall())


def test_time_in_a_database_of_ones_own(database_url: str) -> None:
    """Without the kit's clock workflows still run, but time can't be skipped, and that is said."""
    shop = _installed(database_url)
    assert survives_crashes(shop.checkout, (1,)).run.state == "SUCCESS"
    with pytest.raises(ConfigurationError, match="durable_postgres"):
        survives_crashes(shop.patient, (1,))


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def _installed(url: str) -> Shop:
    app = Celery("own", broker="memory://", set_as_current=False)
    durable.install(app, database_url=url)
    return Shop(app)


def _history(name: str = "x") -> History:
    facts = {"format": 1, "id": "x", "name": name, "state": "SUCCESS", "retries": 0, "root_id": None, "parent_id": None,
             "arguments": {"value": [[], {}]}, "outcome": {"value": None}, "steps": []}  # fmt: skip
    return History.from_json(json.dumps(facts))


def _named(function: Any) -> Any:
    """Give a lambda a name, which Celery needs."""
    if function.__name__ == "<lambda>":
        function.__name__ = function.__qualname__ = "order"
    return function


def _twice(shop: Shop) -> Any:
    return lambda order: [shop.charge(order), shop.charge(order)]


def _original(shop: Shop) -> Any:
    def order(order: int) -> str:
        return str(shop.ship(order, shop.charge(order)))

    return order


def _redeclared(shop: Shop, function: Any, name: str = "order") -> Any:
    """Declare the code of a later deploy under the same name, as another process would."""
    later = Celery("later", set_as_current=False)
    durable.install(later, database_url="postgresql://nobody@127.0.0.1:1/nothing")
    return later.task(base=durable.Workflow, shared=False, name=name)(_named(function))
