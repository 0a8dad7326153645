"""The workflows of the papers, run: what their pages say of them is what happens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime, timezone
from types import ModuleType
from typing import Any

import pytest
from celery import _state

import celery_durable as durable
from celery_durable import task
from celery_durable.registration import Names
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.pages import blocks

#: What a page does for itself, and the test in its place.
SET_UP = (
    'app = Celery("shop", set_as_current=False)',
    'durable.install(app, database_url="postgresql://localhost/shop")',
)
DATABASE = "postgresql://localhost/shop"
#: All time passes for which anybody waits.
TIME_PASSES = """
    UPDATE celery_durable.checkpoint SET wake_at = clock_timestamp() WHERE wake_at IS NOT NULL;
    UPDATE celery_durable.workflow SET wake_at = clock_timestamp() WHERE wake_at IS NOT NULL
"""
MOST_ROUNDS = 50


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """One database for all of these tests, which is cheaper."""
    return emptied_database_url


class Reader:
    """Somebody who has made a module `shop` of a page, and workers for it."""

    def __init__(self, shop: Inprocess, sql: Sql) -> None:
        self._shop = shop
        self._sql = sql
        self.module = ModuleType("shop")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def load(self, page: str, database_url: str) -> None:
        """Run the blocks of the page."""
        code = "\n".join(block.text for block in blocks("python", page=page))
        for line in SET_UP:
            code = code.replace(line, "")
        vars(self.module)["app"] = self._shop.app
        exec(compile(code.replace(DATABASE, database_url), page, "exec"), vars(self.module))

    def work(self) -> None:
        """Let workers do what there is to do."""
        for _ in range(MOST_ROUNDS):
            enqueued = durable.list_workflows(state="ENQUEUED")
            if not enqueued:
                return
            for each in enqueued:
                self._shop.run(each.id)
        raise AssertionError(f"there is always more to do: {enqueued}")

    def pass_time(self) -> None:
        """Let the time of every wait have come, and work."""
        self._sql.execute(TIME_PASSES)
        self._shop.installation.store.workflows.wake(limit=100, patience=0)
        self.work()

    def start(self, name: str, *args: Any, **options: Any) -> str:
        """Start a workflow of the page, and work until it waits or has ended; its id."""
        workflow_id: str = getattr(self.module, name).apply_async(args, **options).id
        self.work()
        return workflow_id

    def waits_for(self, workflow_id: str) -> str | None:
        """What a suspended workflow waits for."""
        status = durable.get_workflow_status(workflow_id)
        assert status.state == "SUSPENDED", status
        return status.waiting_for

    def result(self, workflow_id: str) -> Any:
        """What a workflow has returned."""
        status = durable.get_workflow_status(workflow_id)
        assert status.state == "SUCCESS", status
        return status.result

    def keys(self, workflow_id: str) -> list[str]:
        """The keys of its steps, without the page's module."""
        return [each.key.removeprefix("shop.") for each in durable.list_workflow_steps(workflow_id)]


@pytest.fixture
def read(
    database_url: str, broker_url: str, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Reader]]:
    """Read a page: its shared tasks belong to this test alone."""
    monkeypatch.setattr(_state, "_on_app_finalizers", set())
    monkeypatch.setattr(task, "_shared_names", Names((durable.Workflow, durable.Step)))
    with closing(Inprocess(database_url, broker_url)) as shop:
        monkeypatch.setattr(_state, "default_app", shop.app)
        monkeypatch.setattr(_state._tls, "current_app", shop.app)

        def read(page: str) -> Reader:
            reader = Reader(shop, sql)
            monkeypatch.setitem(sys.modules, "shop", reader.module)
            reader.load(page, database_url)
            return reader

        yield read


@pytest.fixture
def patterns(read: Callable[[str], Reader]) -> Reader:
    return read("docs/patterns.md")


@pytest.fixture
def waiting(read: Callable[[str], Reader]) -> Reader:
    return read("docs/waiting.md")


@pytest.fixture
def managing(read: Callable[[str], Reader]) -> Reader:
    return read("docs/managing.md")


# Patterns


def test_polling(patterns: Reader) -> None:
    """A parcel that is on its way costs a row, however often it is asked for."""
    vars(patterns.module)["track"] = lambda parcel: "on its way"
    parcel = patterns.start("follow", "P1")
    for _ in range(3):
        assert patterns.waits_for(parcel) == "retry of step shop.arrival"
        patterns.pass_time()
    vars(patterns.module)["track"] = lambda parcel: "delivered"
    patterns.pass_time()
    assert (patterns.result(parcel), patterns.keys(parcel)) == ("delivered", ["arrival"])


def test_the_other_side_says_when(patterns: Reader) -> None:
    """The step's next try comes when it was told to, and not sooner."""
    busy = [patterns.TooManyRequests(3600)]

    def upload(article: str) -> str:
        if busy:
            raise busy.pop()
        return article

    def body() -> Any:
        return patterns.publish("a-1")

    vars(patterns.module).update(upload=upload, body=patterns.app.task(body, base=durable.Workflow, name="shop.body"))
    workflow = patterns.start("body")
    status = durable.get_workflow_status(workflow)
    assert status.wake_at is not None
    assert 3500 < (status.wake_at - datetime.now(timezone.utc)).total_seconds() <= 3600
    patterns.pass_time()
    assert patterns.result(workflow) == "a-1"


@pytest.mark.parametrize("approved", [True, False])
def test_an_approval(patterns: Reader, approved: bool) -> None:
    """The first click counts; everyone can see where it stands."""
    claim = patterns.start("expense", "C1", 1000)
    assert patterns.state_of(claim) == "waiting for approval"
    patterns.decide(claim, "Ann", approved)
    patterns.decide(claim, "Ann", not approved)
    patterns.work()
    assert patterns.result(claim) == ("1000 for C1" if approved else None)
    assert patterns.state_of(claim) == ("approved" if approved else "refused")


def test_an_approval_that_nobody_gives(patterns: Reader) -> None:
    """After two reminders it is refused."""
    claim = patterns.start("expense", "C1", 1000)
    for _ in range(3):
        assert patterns.waits_for(claim) == "message approval"
        patterns.pass_time()
    assert patterns.result(claim) is None
    assert [key for key in patterns.keys(claim) if "remind" in key] == ["remind", "remind#2"]
    assert patterns.state_of(claim) == "refused"


def test_a_saga(patterns: Reader) -> None:
    """What fails is undone in the reverse order; what is cancelled is undone by another workflow."""
    trip = patterns.start("trip", "T1")
    assert isinstance(durable.get_workflow_status(trip).error, patterns.SoldOut)
    assert patterns.keys(trip) == ["book_flight", "book_hotel", "cancel_hotel", "cancel_flight"]
    assert patterns.booked == set()
    handle = patterns.start_trip("T2")
    assert durable.cancel_workflow(handle.id)
    patterns.work()
    (undone,) = durable.list_workflows(parent_id=handle.id)
    assert (undone.name, undone.state) == ("shop.cancel_trip", "SUCCESS")


def test_a_fan_out(patterns: Reader) -> None:
    """Each page on the step's own queue; albums are children with children of their own."""
    archive = patterns.start("archive", [f"p{number}" for number in range(102)])
    assert patterns.result(archive) == 0
    albums = durable.list_workflows(parent_id=archive)[::-1]
    assert [len(each.result) for each in albums] == [100, 2]
    assert albums[1].result == ["p100.png", "p101.png"]
    assert {each.queue for each in durable.list_workflows(parent_id=albums[1].id)} == {"gpu"}


def test_an_agent(patterns: Reader) -> None:
    """It calls its tool, asks a person, and goes on with the answer."""
    replies = {
        "user": {"text": "", "asks": False, "calls": [{"name": "add", "arguments": {"a": 40, "b": 2}}]},
        "tool": {"text": "Is 42 right?", "asks": True, "calls": []},
    }

    def complete(messages: list[dict[str, Any]]) -> dict[str, Any]:
        last = messages[-1]
        if last["content"] != "yes":
            return replies[last["role"]]
        return {"text": f"Then it is {messages[2]['content'][0]}.", "asks": False, "calls": []}

    vars(patterns.module)["complete"] = complete
    agent = patterns.start("agent", "What is 40 + 2?")
    assert durable.get_event(agent, "question") == "Is 42 right?"
    durable.send(agent, "yes", topic="answer")
    patterns.work()
    assert patterns.result(agent) == "Then it is 42."
    forked = durable.fork_workflow(agent, from_step="shop.ask_model#3").id
    patterns.work()
    assert patterns.result(forked) == "Then it is 42."


def test_the_nightly_job(patterns: Reader) -> None:
    """A workflow for each customer, and a report."""
    night = patterns.start("nightly")
    assert patterns.result(night) == "2 of 2"
    bills = durable.list_workflows(parent_id=night, name="shop.bill")
    assert sorted(each.result for each in bills) == ["bill for Ann", "bill for Bob"]


# Waiting


@pytest.mark.parametrize("answer", ["fine", None])
def test_aftercare(waiting: Reader, answer: str | None) -> None:
    """It sleeps, mails, waits for an answer, and mails again if none comes."""
    order = waiting.start("aftercare", "O1")
    assert waiting.waits_for(order) == "sleep"
    waiting.pass_time()
    assert waiting.waits_for(order) == "message survey"
    if answer is None:
        waiting.pass_time()
    else:
        durable.send(order, answer, topic="survey")
        waiting.work()
    assert waiting.result(order) == answer
    assert len([key for key in waiting.keys(order) if "mail" in key]) == (2 if answer is None else 1)


def test_finally_runs_at_every_wait(waiting: Reader, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed twice, and the step that runs once."""
    visit = waiting.start("visit", "R1")
    waiting.pass_time()
    assert waiting.result(visit) is None
    assert capsys.readouterr().out.split() == ["knocked", "left", "knocked", "left"]
    assert waiting.keys(visit) == ["enter", "durable.sleep", "leave"]


def test_a_moment_and_a_draw(waiting: Reader) -> None:
    """A moment in the future is awaited; what was drawn is drawn once."""
    birthday = waiting.start("birthday", "Ann", datetime(2090, 4, 1, tzinfo=timezone.utc))
    assert waiting.waits_for(birthday) == "sleep"
    waiting.pass_time()
    assert waiting.result(birthday) == "Ann: Happy birthday!"
    names, year, _ = waiting.result(waiting.start("raffle", ["Ann", "Bob", "Cid", "Dan"]))
    assert (len(set(names)), year >= 2026) == (3, True)


def test_a_basket(waiting: Reader) -> None:
    """A second click sends nothing, and an hour of silence ends it."""
    basket = waiting.start("basket", "Ann")
    for item, click in (("tea", "1"), ("tea", "1"), ("cups", "2")):
        waiting.add_to_basket(basket, item, click)
        waiting.work()
    waiting.pass_time()
    assert waiting.result(basket) == ["tea", "cups"]


def test_events_children_and_a_race(waiting: Reader) -> None:
    """Invoices read what their deliveries publish; parents wait for them, together or for the first."""
    order = waiting.start("order", "O1")
    assert "There is no workflow 'delivery-1'" in str(durable.get_workflow_status(order).error)
    for parcel in ("1", "P1", "P2"):
        waiting.start("delivery", parcel, task_id=f"delivery-{parcel}")
    assert waiting.result(waiting.start("order", "O2")) == "O2: packed"
    first, all_of_them = waiting.result(waiting.start("race", ["P1", "P2"]))
    assert first in all_of_them[:2]
    assert all_of_them == ["P1: packed", "P2: packed", "desk: all sent"]
    waiting.pass_time()
    assert durable.get_event("delivery-P2", "state") == "delivered"


def test_an_async_workflow(waiting: Reader) -> None:
    """It sleeps beside a step, and publishes."""
    lunch = waiting.start("lunch", ["Ann", "Bob"])
    assert waiting.waits_for(lunch) == "sleep"
    waiting.pass_time()
    assert (waiting.result(lunch), durable.list_workflow_events(lunch)) == (2, {"state": "served"})


# Managing


def test_what_is_stopped_is_undone(managing: Reader) -> None:
    """By the workflow that its start has named."""
    order = managing.module.start(7).id
    managing.work()
    assert managing.waits_for(order) == "sleep"
    assert managing.stop(7) is True
    managing.work()
    (undone,) = durable.list_workflows(parent_id=order)
    assert managing.result(undone.id) == "no order 7"


def test_what_was_mended_goes_on(managing: Reader) -> None:
    """All that have failed are resumed."""
    charge = managing.charge

    def fail(order_id: int) -> None:
        raise OSError("no bank")

    vars(managing.module)["charge"] = fail
    order = managing.start("fulfil", 7)
    vars(managing.module)["charge"] = charge
    assert [each.id for each in managing.after_the_fix()] == [order]
    managing.work()
    managing.pass_time()
    assert managing.result(order) == "payment of 7"


def test_a_subscription(managing: Reader) -> None:
    """One at a time for a customer; its children run one after the other, and all of them can be stopped."""
    first, second = managing.sync("Ann"), managing.sync("Ann")
    assert first.id == second.id
    managing.work()
    (child,) = managing.stop_all_of(first.id)
    managing.work()
    assert durable.get_workflow_status(child).state == "CANCELLED"
    assert managing.sync("Ann").id != first.id
    managing.work()
    other = managing.signature.delay().id
    for _ in range(4):
        managing.pass_time()
    assert managing.result(other) == [f"payment of Ann-{number}" for number in range(3)]


def test_bills_and_an_outbox(managing: Reader, sql: Sql) -> None:
    """Many starts at once, each once; one with the caller's own row."""
    assert {handle.id for handle in managing.bill_all([1, 2]) + managing.bill_all([1, 2])} == {"order-1", "order-2"}
    sql.execute("DROP TABLE IF EXISTS orders")
    sql.execute("CREATE TABLE orders (id int, cents int)")
    vars(managing.module)["desk"] = managing.app.task(durable.recv, base=durable.Workflow, name="shop.desk")
    managing.start("desk", task_id="desk")
    handle = managing.checkout(3, 100)
    managing.work()
    managing.pass_time()
    assert managing.result(handle.id) == "payment of 3"
    assert sql.value("SELECT cents FROM orders WHERE id = 3") == 100
