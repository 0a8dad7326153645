"""One attempt in process: replay, outcomes alike on first run and replay, and what Celery's tracer is told."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from celery.exceptions import Ignore, Retry

import celery_durable as durable
from celery_durable.engine.context import Attempt, boot_time, current_attempt, running
from celery_durable.exceptions import (
    Cancelled,
    NondeterminismError,
    NotAllowedInStep,
    NotInWorkflow,
    OwnershipLost,
    PayloadTooLarge,
    SerializationError,
    StepError,
    StepLost,
    StepTimeout,
    Suspended,
    WorkflowDead,
)
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.inprocess import Inprocess

pytestmark = pytest.mark.oldest


DUE = "UPDATE celery_durable.checkpoint SET wake_at = clock_timestamp()"
LATE = "UPDATE celery_durable.workflow SET deadline = clock_timestamp() - interval '1 s'"


class Refused(Exception):
    """An error with a constructor of its own."""

    def __init__(self, *, code: int) -> None:
        super().__init__(f"refused with {code}")
        self.code = code


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    shop = Inprocess(database_url, broker_url, max_payload=10_000, suspend_after=2)
    yield shop
    shop.close()


@pytest.fixture
def calls() -> list[Any]:
    """What bodies did, in order."""
    return []


def begin(shop: Inprocess, workflow_id: str = "w1") -> Attempt:
    """Claim as a worker does, and stop there: the attempt is the test's."""
    row = shop.installation.store.workflows.by_id(workflow_id, patience=0)
    assert row is not None
    claim = shop.installation.store.workflows.claim(
        workflow_id, row.name, uuid.uuid4(), shop.node, retries=0, patience=0
    )
    assert claim is not None
    return Attempt.of(shop.installation.engine, row.name, claim, boot_time())


def release(shop: Inprocess, attempt: Attempt) -> None:
    assert shop.installation.store.workflows.release(attempt.fence, 60, patience=0)


def crash(shop: Inprocess, attempt: Attempt) -> str:
    verdict = shop.installation.codec.encode_error(WorkflowDead("too many"))
    ((_, state),) = shop.installation.store.workflows.rescue(
        attempt.fence.node, [attempt.id], lease=15, verdict=verdict, error="no", limit=9, patience=0
    )
    return state


def status(shop: Inprocess, workflow_id: str = "w1") -> durable.WorkflowStatus:
    return durable.get_workflow_status(workflow_id, app=shop.app)


def steps(shop: Inprocess, workflow_id: str = "w1") -> list[durable.StepInfo]:
    return durable.list_workflow_steps(workflow_id, app=shop.app)


def order(shop: Inprocess, function: Any, *args: Any, **options: Any) -> Any:
    """Declare a workflow of this function, and start it as w1."""

    def body(*args: Any) -> Any:
        return function(*args)

    task = shop.workflow(body, name="order", **options)
    task.apply_async(args, task_id="w1")
    return task


def test_a_workflow_runs_and_its_steps_are_kept(shop: Inprocess) -> None:
    """Repeated calls of one name are counted."""
    work = durable.as_step(lambda number: number * 10, name="work")
    order(shop, lambda count: [work(number) for number in range(count)], 3)
    assert shop.run("w1") == [0, 10, 20]
    assert status(shop).result == [0, 10, 20]
    assert [(step.key, step.name, step.output) for step in steps(shop)] == [
        ("work", "work", 0), ("work#2", "work", 10), ("work#3", "work", 20),
    ]  # fmt: skip


def test_a_completed_step_never_runs_again(shop: Inprocess, calls: list[Any]) -> None:
    """The next attempt goes on after it, with the same value."""
    work = durable.as_step(lambda number: calls.append(number) or [number], name="work")
    order(shop, lambda: [work(1), work(2)])
    attempt = begin(shop)
    with running(attempt):
        assert work(1) == [1]
    release(shop, attempt)
    assert shop.run("w1") == [[1], [2]]
    assert calls == [1, 2]


def test_a_value_is_the_stored_one_on_the_first_run_too(shop: Inprocess) -> None:
    """A tuple that JSON makes a list of is a list at once, so no replay can differ."""
    pair = durable.as_step(lambda: (1, {2: "x"}), name="pair")
    seen: list[Any] = []
    order(shop, lambda: seen.append(pair()))
    attempt = begin(shop)
    with running(attempt):
        seen.append(pair())
    release(shop, attempt)
    shop.run("w1")
    assert seen == [[1, {"2": "x"}]] * 2


def local_error() -> Exception:
    class Local(ValueError):
        pass

    return Local("lost")


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), KeyError("k"), OSError(2, "gone", "/f"), Refused(code=402), ValueError(object()), local_error()],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_the_same_on_the_first_run_and_on_a_replay(shop: Inprocess, error: Exception) -> None:
    """Class, text, arguments, attributes and the note that names step and try."""
    seen: list[tuple[Any, ...]] = []

    def fail() -> None:
        raise error

    def body() -> None:
        try:
            durable.as_step(fail, name="fail")()
        except Exception as caught:
            seen.append((type(caught), str(caught), repr(caught.args), caught.__notes__))  # type: ignore[attr-defined]

    order(shop, body)
    attempt = begin(shop)
    with running(attempt):
        body()
    release(shop, attempt)
    shop.run("w1")
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert seen[0][3] == ["Raised by step 'fail' of workflow w1, try 1."]


def test_the_live_error_is_the_cause_on_the_first_run(shop: Inprocess) -> None:
    """Its traceback leads into the body."""
    error = ValueError("x")

    def fail() -> None:
        raise error

    order(shop, lambda: None)
    with running(begin(shop)), pytest.raises(ValueError, match="x") as caught:
        durable.as_step(fail, name="fail")()
    assert caught.value is not error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("value", "error"), [(object(), SerializationError), ("x" * 20_000, PayloadTooLarge)], ids=["odd", "large"]
)
def test_a_result_that_cannot_be_kept_is_the_steps_outcome(
    shop: Inprocess, calls: list[Any], value: Any, error: type[Exception]
) -> None:
    """Its effect has happened: the body isn't run again, not even with retries left."""
    retries: dict[str, Any] = {"autoretry_for": (Exception,), "retry_backoff": 0.01}
    work = durable.as_step(lambda: calls.append(1) or value, name="work", **retries)
    order(shop, work)
    attempt = begin(shop)
    with running(attempt), pytest.raises(error, match="The result of step 'work'"):
        work()
    release(shop, attempt)
    shop.run("w1")
    assert status(shop).state == "FAILURE"
    assert isinstance(status(shop).error, error)
    assert calls == [1]


@pytest.mark.parametrize(
    ("value", "error"), [(object(), SerializationError), ("x" * 20_000, PayloadTooLarge)], ids=["odd", "large"]
)
def test_a_result_of_a_workflow_that_cannot_be_kept_is_its_failure(
    shop: Inprocess, value: Any, error: type[Exception]
) -> None:
    """The error says what to do."""
    order(shop, lambda: value)
    shop.run("w1")
    assert (status(shop).state, type(status(shop).error)) == ("FAILURE", error)


def test_a_stored_value_that_cannot_be_read_fails_the_workflow(shop: Inprocess, sql: Sql) -> None:
    """With the step's name; its row is kept for whoever looks into it."""
    work = durable.as_step(lambda: 1, name="work")
    order(shop, work)
    attempt = begin(shop)
    with running(attempt):
        work()
    release(shop, attempt)
    sql.execute("UPDATE celery_durable.checkpoint SET value = '\\x80ff'")
    shop.run("w1")
    assert status(shop).state == "FAILURE"
    assert "The result of step 'work' can't be read back" in str(status(shop).error)
    (step,) = steps(shop)
    assert isinstance(step.error, SerializationError)


def test_retries_are_made_and_recorded(shop: Inprocess, calls: list[Any]) -> None:
    """The outcome tells the number of tries; each had the same idempotency key."""

    def flaky() -> str:
        calls.append((durable.current.step.attempt, durable.current.idempotency_key))
        if len(calls) < 3:
            raise ConnectionError("reset")
        return "done"

    order(shop, durable.as_step(flaky, name="flaky", max_retries=5, retry_backoff=0.01))
    assert shop.run("w1") == "done"
    assert [number for number, _ in calls] == [1, 2, 3]
    assert len({key for _, key in calls}) == 1
    (step,) = steps(shop)
    assert (step.tries, step.state) == (3, "SUCCESS")


def test_tries_of_earlier_attempts_count(shop: Inprocess, sql: Sql, calls: list[Any]) -> None:
    """A hand-over or a crash gives none back."""

    def fail() -> None:
        calls.append(durable.current.step.attempt)
        raise ConnectionError("reset")

    step = durable.as_step(fail, name="fail", max_retries=3, retry_backoff=100, retry_jitter=False)
    order(shop, step)
    for _ in range(3):
        attempt = begin(shop)
        with running(attempt), pytest.raises(Suspended):
            step()
        release(shop, attempt)
        sql.execute(DUE)
    shop.run("w1")
    assert calls == [1, 2, 3, 4]
    assert isinstance(status(shop).error, ConnectionError)


def test_a_long_delay_gives_the_worker_back(shop: Inprocess) -> None:
    """A short one is waited for in place."""

    def fail() -> None:
        raise ConnectionError("reset")

    order(shop, durable.as_step(fail, name="fail", max_retries=3, retry_backoff=100, retry_jitter=False))
    assert isinstance(shop.run("w1"), Retry)
    found = status(shop)
    assert (found.state, found.waiting_for, found.node) == ("SUSPENDED", "retry of step fail", None)
    due = shop.installation.store.workflows.next_due(patience=0)
    assert due is not None
    assert 90 < due <= 100


def test_a_step_that_kills_its_worker_spends_its_tries(shop: Inprocess, calls: list[Any]) -> None:
    """Then it is lost, an error that the workflow can catch; the first crash takes no try."""

    class Killed(SystemExit):
        """Stands for SIGKILL: nothing after it is run. Raised as Celery's pool ends a process."""

        def __init__(self) -> None:
            super().__init__(9 - 256)

    def die() -> None:
        calls.append(durable.current.step.attempt)
        raise Killed

    step = durable.as_step(die, name="die", max_retries=2)
    order(shop, step, max_recovery_attempts=10)
    for _ in range(4):
        attempt = begin(shop)
        with running(attempt), pytest.raises(Killed):
            step()
        assert crash(shop, attempt) == "ENQUEUED"
    assert calls == [1, 1, 2, 3]
    shop.run("w1")
    assert isinstance(status(shop).error, StepLost)
    assert len(calls) == 4


def test_a_step_is_timed_out_and_tried_again(shop: Inprocess, calls: list[Any]) -> None:
    """Its limit is for each try, and the timeout an error like others."""

    def slow() -> str:
        calls.append(durable.current.step.remaining())
        if len(calls) == 1:
            threading.Event().wait(30)
        return "done"

    step = durable.as_step(slow, name="slow", soft_time_limit=0.2, autoretry_for=(StepTimeout,), retry_backoff=0.01)
    order(shop, step)
    assert shop.run("w1") == "done"
    assert all(0 < remaining <= 0.2 for remaining in calls)
    assert len(calls) == 2


def test_other_arguments_on_a_replay_stop_the_workflow(shop: Inprocess) -> None:
    """DEAD, with both argument lists in the reason, even if the body swallows the error."""
    numbers = iter([1, 2])
    work = durable.as_step(lambda number: number, name="work")

    def body() -> Any:
        try:
            return work(next(numbers))
        except NondeterminismError:
            return "swallowed"

    order(shop, body)
    attempt = begin(shop)
    with running(attempt):
        body()
    release(shop, attempt)
    shop.run("w1")
    found = status(shop)
    assert found.state == "DEAD"
    assert isinstance(found.error, NondeterminismError)
    assert "first called with (1), and is now called with (2)" in str(found.error)


def test_nondeterminism_may_only_warn(database_url: str, broker_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """By choice; the kept value is the answer."""
    shop = Inprocess(database_url, broker_url, nondeterminism="warn")
    numbers = iter([1, 2])
    work = durable.as_step(lambda number: number, name="work")
    order(shop, lambda: work(next(numbers)))
    attempt = begin(shop)
    with running(attempt):
        work(next(numbers))
    release(shop, attempt)
    with caplog.at_level(logging.WARNING):
        assert shop.run("w1") == 1
    assert "first called with (1), and is now called with (2)" in caplog.text
    shop.close()


def test_arguments_that_cannot_be_serialized_do_not_matter(shop: Inprocess) -> None:
    """A step may take a lock or a session."""
    work = durable.as_step(lambda lock, number: number, name="work")
    order(shop, lambda: work(threading.Lock(), 1))
    attempt = begin(shop)
    with running(attempt):
        work(threading.Lock(), 1)
    release(shop, attempt)
    assert shop.run("w1") == 1


def test_an_attempt_that_was_taken_over_stops_before_its_next_step(shop: Inprocess, calls: list[Any]) -> None:
    """It runs no further body, and its outcome isn't recorded."""
    work = durable.as_step(lambda number: calls.append(number), name="work")

    def body() -> str:
        with_the_zombie()
        work(1)
        work(2)
        return "zombie"

    def with_the_zombie() -> None:
        attempt = current_attempt()
        assert attempt is not None
        if attempt.fence.attempt == 1:
            crash(shop, attempt)
            begin(shop)
            attempt.last_look -= 60

    order(shop, body)
    assert isinstance(shop.run("w1"), Ignore)
    assert calls == []
    assert (status(shop).state, status(shop).attempt) == ("RUNNING", 2)


def test_a_body_that_swallows_its_unwinding_is_not_a_success(shop: Inprocess, sql: Sql) -> None:
    """And every durable call of it raises the same again."""
    seen: list[type[BaseException]] = []
    work = durable.as_step(lambda: sql.execute(LATE), name="work")

    def body() -> str:
        for _ in range(2):
            try:
                work()
            except BaseException as error:
                seen.append(type(error))
        return "swallowed"

    order(shop, body)
    assert isinstance(shop.run("w1"), Ignore)
    assert seen == [Cancelled, Cancelled]
    assert status(shop).state == "CANCELLED"


def test_a_durable_call_in_a_thread_of_the_user_is_an_error(shop: Inprocess) -> None:
    """The order of its calls wouldn't be the same on every replay."""
    work = durable.as_step(lambda: 1, name="work")
    seen: list[BaseException] = []

    def call() -> None:
        try:
            work()
        except NotInWorkflow as error:
            seen.append(error)

    def body() -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    order(shop, body)
    shop.run("w1")
    assert len(seen) == 1
    assert "make threads inside a step" in str(seen[0])
    assert steps(shop) == []


def test_a_durable_call_in_a_copied_context_is_an_error_too(shop: Inprocess) -> None:
    """A thread that inherits the context variables is still another thread."""
    work = durable.as_step(lambda: 1, name="work")
    seen: list[str] = []

    def call() -> None:
        try:
            work()
        except NotInWorkflow as error:
            seen.append(str(error))

    def body() -> None:
        thread = threading.Thread(target=contextvars.copy_context().run, args=(call,))
        thread.start()
        thread.join()

    order(shop, body)
    shop.run("w1")
    assert len(seen) == 1


def test_threads_inside_a_step_are_the_steps_own_business(shop: Inprocess) -> None:
    """There, a step is a plain call."""
    inner = durable.as_step(lambda: 5, name="inner")
    seen: list[int] = []

    def outer() -> None:
        thread = threading.Thread(target=lambda: seen.append(inner()))
        thread.start()
        thread.join()

    order(shop, durable.as_step(outer, name="outer"))
    shop.run("w1")
    assert seen == [5]
    assert [step.key for step in steps(shop)] == ["outer"]


def test_a_nested_step_is_part_of_the_outer_one(shop: Inprocess) -> None:
    """Only the outer one is kept."""
    inner = durable.as_step(lambda: 5, name="inner")
    order(shop, durable.as_step(lambda: inner() + 1, name="outer"))
    assert shop.run("w1") == 6
    assert [step.key for step in steps(shop)] == ["outer"]


@pytest.mark.parametrize("soft_time_limit", [None, 60], ids=["unlimited", "limited"])
def test_an_async_step_in_a_sync_one_runs_to_its_end(shop: Inprocess, soft_time_limit: int | None) -> None:
    """Nothing could await it; in a workflow, as a plain task, and as a plain call."""

    @shop.step(name="inner", soft_time_limit=soft_time_limit)
    async def inner() -> int:
        await asyncio.sleep(0)
        return 5

    @shop.step(name="outer")
    def outer() -> int:
        return inner() + 1

    order(shop, lambda: outer())
    assert shop.run("w1") == 6
    assert shop.deliver("t1", ("outer", b"[[], {}, {}]", "application/json", "utf-8")) == 6
    assert outer() == 6


def test_an_async_step_in_an_event_loop_of_a_step_is_awaited(shop: Inprocess) -> None:
    """There something can."""

    async def inner() -> int:
        return 5

    async def both() -> int:
        return await step() + await step.acall()

    step = durable.as_step(inner, name="inner")
    order(shop, durable.as_step(lambda: asyncio.run(both()), name="outer"))
    assert shop.run("w1") == 10


def test_a_step_cannot_start_a_workflow(shop: Inprocess) -> None:
    """A crash after the start would start another one."""

    def nothing() -> None: ...

    child = shop.workflow(nothing, name="child")
    order(shop, durable.as_step(lambda: child.delay().id, name="starts"))
    shop.run("w1")
    assert isinstance(status(shop).error, NotAllowedInStep)
    assert len(durable.list_workflows(app=shop.app)) == 1


def test_a_bound_step_sees_itself(shop: Inprocess) -> None:
    """Its workflow is the parent, its retries are the step's."""
    seen: list[Any] = []

    def body(self: Any) -> None:
        seen.append((self.request.parent_id, self.request.retries, self.request.id == durable.current.idempotency_key))
        if len(seen) == 1:
            raise ValueError("once")

    step = shop.step(body, name="bound", bind=True, autoretry_for=(ValueError,), default_retry_delay=0)
    order(shop, lambda: step())
    shop.run("w1")
    assert seen == [("w1", 0, True), ("w1", 1, True)]


def test_self_retry_in_an_inline_step_fails_the_try(shop: Inprocess) -> None:
    """Its policy decides about the next one."""
    tries: list[int] = []

    def body(self: Any) -> int:
        tries.append(1)
        if len(tries) < 3:
            raise self.retry(exc=ValueError("again"))
        return len(tries)

    step = shop.step(body, name="bound", bind=True, autoretry_for=(ValueError,), max_retries=5, default_retry_delay=0)
    order(shop, lambda: step())
    assert shop.run("w1") == 3


def test_odd_strings_pass_through_a_whole_workflow(shop: Inprocess) -> None:
    """NUL and lone surrogates in arguments, values and errors."""
    odd = "a\x00b\ud800c"
    work = durable.as_step(lambda text: [text], name="work")

    def fail(text: str) -> None:
        raise ValueError(text)

    def body(text: str) -> str:
        assert work(text) == [text]
        durable.as_step(fail, name="fail")(text)
        return text

    order(shop, body, odd)
    shop.run("w1")
    found = status(shop)
    assert found.args == (odd,)
    assert isinstance(found.error, ValueError)
    assert found.error.args == (odd,)


def test_sys_exit_in_a_body_is_a_failure(shop: Inprocess) -> None:
    """It doesn't end the worker."""
    order(shop, lambda: sys.exit(3))
    shop.run("w1")
    assert "sys.exit(3)" in str(status(shop).error)


def test_an_error_of_the_workflow_is_told_to_celery_and_kept(shop: Inprocess) -> None:
    """Both see the same one."""

    def body() -> None:
        raise LookupError("no such order")

    order(shop, body)
    told, kept = shop.run("w1"), status(shop).error
    assert (type(told), told.args) == (type(kept), kept and kept.args) == (LookupError, ("no such order",))


def test_the_outcome_of_a_taken_over_run_is_void(shop: Inprocess) -> None:
    """The fence is the last word, after all steps."""
    order(shop, lambda: crash_and_claim(shop))
    assert isinstance(shop.run("w1"), Ignore)
    assert (status(shop).state, status(shop).attempt) == ("RUNNING", 2)


def crash_and_claim(shop: Inprocess) -> str:
    attempt = current_attempt()
    assert attempt is not None
    crash(shop, attempt)
    begin(shop)
    return "void"


def test_a_step_of_a_taken_over_run_is_fenced(shop: Inprocess) -> None:
    """Its body has run, and its outcome isn't written."""
    order(shop, lambda: None)
    zombie = begin(shop)
    with running(zombie), pytest.raises(OwnershipLost):
        durable.as_step(lambda: crash_and_claim(shop), name="work")()
    assert steps(shop) == []


class Odd(BaseException):
    """No Exception, as gevent's Timeout isn't."""


@pytest.mark.parametrize("error", [Odd("odd"), GeneratorExit(), SystemExit(1), asyncio.CancelledError()], ids=repr)
def test_what_is_no_exception_is_the_steps_outcome_too(shop: Inprocess, calls: list[Any], error: BaseException) -> None:
    """It is kept as a readable error, and the workflow may catch it; nothing waits for a crash that wasn't one."""

    def fail() -> None:
        calls.append(1)
        raise error

    order(shop, durable.as_step(fail, name="fail"))
    shop.run("w1")
    told = status(shop)
    assert (told.state, calls) == ("FAILURE", [1])
    assert isinstance(told.error, StepError)
    assert told.error.type_name.rpartition(".")[2] == type(error).__name__
    assert "in fail" in told.error.traceback_text


@pytest.mark.parametrize("error", [Odd("odd"), GeneratorExit(), asyncio.CancelledError()], ids=repr)
def test_what_is_no_exception_is_the_workflows_failure_too(shop: Inprocess, error: BaseException) -> None:
    """It has an outcome, whatever its function raises."""

    def fail() -> None:
        raise error

    order(shop, fail)
    shop.run("w1")
    assert (status(shop).state, type(status(shop).error)) == ("FAILURE", StepError)


def test_arguments_are_kept_as_they_were_before_the_body(shop: Inprocess) -> None:
    """A body that changes its argument doesn't change what is said of the call."""
    step = durable.as_step(lambda names: names.append("b"), name="change")
    order(shop, lambda: step(["a"]))
    shop.run("w1")
    rows = shop.installation.store.checkpoints.of_workflow("w1", patience=0)
    assert [row.args for row in rows] == ["['a']"]


@pytest.mark.parametrize("kind", ["step", "as_step"])
def test_a_task_is_sent_once_by_all_attempts(shop: Inprocess, kind: str) -> None:
    """delay() in a workflow is kept with the id of the message, and a replay gives the same handle."""

    def mail(text: str) -> None:
        """Never run here."""

    task = shop.step(name="mail")(mail) if kind == "step" else shop.app.task(name="mail", shared=False)(mail)
    sender = task if kind == "step" else durable.as_step(task)
    ids: list[str] = []
    order(shop, lambda: [ids.append(sender.delay("hello").id), sender.delay("bye").id][1])
    attempt = begin(shop)
    with running(attempt):
        first = sender.delay("hello").id
    release(shop, attempt)
    second = shop.run("w1")
    assert ids == [first]
    assert second != first
    with shop.app.connection_for_read() as connection:
        queue = connection.SimpleQueue("celery")
        sent = [queue.get(timeout=5).headers["id"] for _ in range(queue.qsize())]
    assert [id for id in sent if id != "w1"] == [first, second]
