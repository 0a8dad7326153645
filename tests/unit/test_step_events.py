"""Reports of steps as Celery's monitoring events, and what a broker that is away can't do to a step."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from celery.events.state import State
from celery.utils.saferepr import saferepr

from celery_durable import step_events
from celery_durable.config import Config
from celery_durable.engine.observer import StepReport
from celery_durable.step_events import (
    MOST_WAITING,
    WATCHED_PROPERTY,
    StepEvents,
    event_of,
    is_watched,
    sends_task_events,
)
from tests.fixtures.fix_wait import wait_until


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class UnshowableError(Exception):
    __str__ = __repr__ = Unshowable.__repr__


def report(**facts: Any) -> StepReport:
    """A successful try of `charge(7, currency="EUR")`, but for what is said otherwise."""
    usual: dict[str, Any] = {
        "workflow_id": "order-7", "workflow_name": "shop.order", "root_id": "cart-7", "worker": "w1@host",
        "id": "key-of-charge", "name": "shop.charge", "key": "shop.charge#2", "args": (7,),
        "kwargs": {"currency": "EUR"}, "state": "SUCCESS", "value": {"paid": True}, "error": None, "retries": 0,
        "runtime": 0.5, "started": 1_700_000_000.25, "watched": True,
    }  # fmt: skip
    return StepReport(**{**usual, **facts})


def raised(error: Exception) -> Exception:
    """An error with a traceback."""
    try:
        raise error
    except Exception as caught:
        return caught


def shown(*reports: StepReport) -> Any:
    """What Celery's own view makes of these reports: the task of the last one."""
    state = State()
    for clock, each in enumerate(reports):
        event = {**event_of(each), "clock": clock, "pid": 1, "utcoffset": 0}
        state.event({**event, "local_received": event["timestamp"]})
    return state.tasks[reports[-1].id]


def test_a_success_is_a_task_of_its_worker() -> None:
    """With all that Flower has a column for."""
    task = shown(report())
    assert (task.state, task.name, task.worker.hostname) == ("SUCCESS", "shop.charge", "w1@host")
    assert (task.args, task.kwargs, task.result) == ("(7,)", "{'currency': 'EUR'}", "{'paid': True}")
    assert (task.parent_id, task.root_id, task.retries) == ("order-7", "cart-7", 0)
    assert (task.runtime, task.started, task.received) == (0.5, 1_700_000_000.25, 1_700_000_000.25)
    assert task.succeeded == pytest.approx(time.time(), abs=60)
    assert task.exception is None


def test_a_failure_has_its_error_and_traceback() -> None:
    """As text, with what caused it."""
    error = ValueError("declined")
    error.__cause__ = raised(KeyError("card"))
    task = shown(report(state="FAILURE", value=None, error=raised(error), retries=2))
    assert (task.state, task.exception, task.retries) == ("FAILURE", "ValueError('declined')", 2)
    assert "in raised" in task.traceback
    assert task.traceback.index("KeyError: 'card'") < task.traceback.index("ValueError: declined")
    assert task.result is None


def test_a_failed_try_is_shown_until_the_next_one_ends() -> None:
    """RETRY with its error; then, under the same id, what came of it."""
    first = report(state="RETRY", value=None, error=raised(ConnectionError("once")))
    assert (shown(first).state, shown(first).exception) == ("RETRY", "ConnectionError('once')")
    task = shown(first, report(retries=1))
    assert (task.state, task.retries, task.result) == ("SUCCESS", 1, "{'paid': True}")


def test_a_workflow_without_root_is_its_own() -> None:
    """Nothing is shown under an empty id."""
    assert event_of(report(root_id=""))["root_id"] == "order-7"


@pytest.mark.parametrize(
    "value",
    [Unshowable(), [Unshowable()], {Unshowable(): 1}, 10**5000, "\ud800 \x00", b"\xff", "x" * 10**6, [[]] * 10**4],
    ids=["repr", "nested", "key", "number", "surrogate", "bytes", "long text", "long list"],
)
def test_every_value_has_a_short_text(value: Any) -> None:
    """What can't be shown is named by its type, nothing is long, and all of it can be sent in any encoding."""
    event = event_of(report(args=(value,), kwargs={"value": value}, value=value, error=None))
    for text in (event["args"], event["kwargs"], event["result"]):
        assert 0 < len(text) <= 2048
        assert text.encode()


@pytest.mark.parametrize(
    "value",
    [
        0, -1, 10**18, pytest.param(10**5000, id="huge"), 1.5, float("nan"), True, None, "", "it's", (), (7,),
        (1, None), (1, "a"), [], [1, [2]], list(range(10)), list(range(11)), {}, {"currency": "EUR"}, {1}, b"raw",
        Fraction(1, 3),
    ],
)  # fmt: skip
def test_a_text_is_celerys_own(value: Any) -> None:
    """Whichever way it was made."""
    event = event_of(report(args=(value,), value=value))
    texts = {"result": value, "args": (value,)}
    assert {name: event[name] for name in texts} == {name: text_of(each) for name, each in texts.items()}


def text_of(value: Any) -> str:
    try:
        return saferepr(value, 1024)
    except ValueError:
        return f"<{type(value).__name__}>"


def test_what_can_not_be_shown_hides_nothing_else() -> None:
    """The other arguments are there."""
    assert event_of(report(args=("first", [Unshowable()], "last")))["args"].startswith("('first', [<Unrepresentable")


def test_an_error_that_can_not_be_shown_is_named() -> None:
    """Its type is known, whatever its own methods raise."""
    event = event_of(report(state="FAILURE", value=None, error=raised(UnshowableError())))
    assert "UnshowableError" in event["exception"]
    assert "UnshowableError" in event["traceback"]


def test_of_a_long_traceback_the_end_is_kept() -> None:
    """That is where the error is."""
    text = event_of(report(state="FAILURE", value=None, error=raised(ValueError("x" * 20_000 + "end"))))["traceback"]
    assert len(text) <= 10_000
    assert text.rstrip().endswith("end")


@pytest.mark.parametrize("setting", ["auto", True, False])
@pytest.mark.parametrize("flag", [True, False, None])
def test_the_setting_decides_or_leaves_it_to_the_worker(setting: Any, flag: bool | None) -> None:
    """`auto` is what the worker said of its events when it gave the message to its pool."""
    properties = None if flag is None else {WATCHED_PROPERTY: flag}
    expected = bool(flag) if setting == "auto" else setting
    assert is_watched(Context(properties=properties), Config(step_events=setting)) is expected


@pytest.mark.parametrize(
    ("enabled", "groups", "expected"),
    [(True, None, True), (True, ["worker", "task"], True), (True, ["worker"], False), (False, None, False)],
)
def test_a_dispatcher_sends_task_events_or_not(enabled: bool, groups: list[str] | None, expected: bool) -> None:
    """`-E`, or `enable_events` at run time."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    with app.connection_for_write() as connection:
        dispatcher = app.events.Dispatcher(connection, hostname="w1@host", enabled=enabled, groups=groups)
        assert sends_task_events(dispatcher) is expected
    assert sends_task_events(None) is False


@contextmanager
def broker_that(answers: str) -> Iterator[tuple[int, list[socket.socket]]]:
    """A port where nobody listens, or somebody who hangs up or says nothing; and the connections so far."""
    connections: list[socket.socket] = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if answers != "refuses":
            listener.listen(64)
            threading.Thread(target=accept_all, args=(listener, connections, answers), daemon=True).start()
        yield listener.getsockname()[1], connections
        listener.shutdown(socket.SHUT_RDWR) if answers != "refuses" else None
    for each in connections:
        each.close()


def accept_all(listener: socket.socket, connections: list[socket.socket], answers: str) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        if answers == "hangs up":
            connection.close()
        connections.append(connection)


@pytest.mark.parametrize("transport", ["redis", "amqp"])
@pytest.mark.parametrize("answers", ["refuses", "hangs up", "says nothing"])
def test_a_broker_that_is_away_costs_a_step_nothing(
    answers: str, transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Many steps are told in no time, however many events are lost by that; and the process ends within bounds."""
    with broker_that(answers) as (port, connections):
        watcher = StepEvents(Celery("shop", broker=f"{transport}://127.0.0.1:{port}//", set_as_current=False))
        watcher.step_ended(report())
        if answers != "refuses":
            wait_until(lambda: connections, message="the broker is tried")
        began = time.monotonic()
        for _ in range(MOST_WAITING + 500):
            watcher.step_ended(report())
        assert time.monotonic() - began < 3, "5,500 steps, a fifth of a millisecond each in bad times"
        began = time.monotonic()
        watcher._leave()
        assert time.monotonic() - began < 1.5
    assert caplog.text.count("the oldest are lost") == 1
    assert caplog.text.count("the broker didn't take them in time") == 1


def test_an_outage_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """However often the broker is tried."""
    monkeypatch.setattr(step_events, "_RETRY", 0.01)
    with broker_that("hangs up") as (port, connections), caplog.at_level(logging.INFO):
        watcher = StepEvents(Celery("shop", broker=f"redis://127.0.0.1:{port}/0", set_as_current=False))
        for number in range(10):
            watcher.step_ended(report())
            wait_until(lambda least=number: len(connections) > least, message="the broker is tried again")
        watcher._leave()
    assert len([record for record in caplog.records if "takes no monitoring events" in record.message]) == 1


def test_a_process_without_steps_ends_at_once() -> None:
    """Nothing is waited for where nothing was sent, as nobody watches."""
    watcher = StepEvents(Celery("shop", broker="redis://127.0.0.1:1/0", set_as_current=False))
    watcher.step_ended(report(watched=False))
    began = time.monotonic()
    watcher._leave()
    assert time.monotonic() - began < 0.1


@pytest.mark.parametrize("error", [None, ValueError("hush-7f3Kq9")], ids=repr)
def test_with_a_payload_codec_no_value_is_shown(error: Exception | None) -> None:
    """Neither arguments nor a result, nor what an error says; the class of that is."""
    state = "SUCCESS" if error is None else "FAILURE"
    given = report(args=("hush-7f3Kq9",), kwargs={"x": "hush-7f3Kq9"}, value="hush-7f3Kq9", error=error, state=state)
    shown, hidden = event_of(given), event_of(given, hidden=True)
    assert "hush-7f3Kq9" in repr(shown)
    assert "hush-7f3Kq9" not in repr(hidden)
    assert shown.keys() == hidden.keys()
    assert hidden["args"] == "<encoded>"
    assert hidden.get("exception") == (None if error is None else "ValueError(<encoded>)")
