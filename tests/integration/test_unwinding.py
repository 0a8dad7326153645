"""How a workflow function is left when it waits, is cancelled, handed over or taken over; what it can't do then."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any

import pytest
from celery import group
from celery.exceptions import Ignore, Retry

import celery_durable as durable
from celery_durable.engine.context import current_attempt
from celery_durable.exceptions import Cancelled, ControlFlow, HandedOver, OwnershipLost, Suspended
from tests.fixtures.fix_postgres import Sql, _new_database
from tests.fixtures.inprocess import Inprocess
from tests.integration.attempts import DUE, LATE, begin, clear, crash, order, status, steps

pytestmark = pytest.mark.oldest

WAKE = "UPDATE celery_durable.workflow SET wake_at = clock_timestamp()"
#: What unwinds a function; what Celery is told then, and how the workflow stands.
ENDS: dict[type[ControlFlow], tuple[type[Exception], str]] = {
    Suspended: (Retry, "SUSPENDED"),
    Cancelled: (Ignore, "CANCELLED"),
    HandedOver: (Retry, "ENQUEUED"),
    OwnershipLost: (Ignore, "RUNNING"),
}
whatever_unwinds = pytest.mark.parametrize("reason", ENDS)


@pytest.fixture(scope="module")
def database_url(postgres_server: str, template_database: str) -> Iterator[str]:
    """One database for all of these tests, which is cheaper; each begins with empty tables."""
    with _new_database(postgres_server, template_database) as url:
        yield url


@pytest.fixture(autouse=True)
def empty_tables(sql: Sql) -> None:
    clear(sql)


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    shop = Inprocess(database_url, broker_url, suspend_after=2)
    yield shop
    shop.close()


@pytest.fixture
def calls() -> list[Any]:
    """What bodies did, in order."""
    return []


@pytest.fixture
def unwound(shop: Inprocess, sql: Sql) -> Callable[[type[ControlFlow]], None]:
    """A durable call that unwinds the function, for the reason that is asked for."""

    def take_over() -> None:
        attempt = current_attempt()
        assert attempt is not None
        crash(shop, attempt)
        begin(shop)

    steps: dict[type[ControlFlow], Callable[[], Any]] = {
        Cancelled: lambda: sql.execute(LATE), HandedOver: shop.drain, OwnershipLost: take_over,
    }  # fmt: skip

    def unwind(reason: type[ControlFlow]) -> None:
        if reason is Suspended:
            durable.sleep(100)
        durable.as_step(steps[reason], name="unwinds")()

    return unwind


def wake(shop: Inprocess, sql: Sql) -> None:
    """Let the time of every wait have come."""
    sql.execute(DUE)
    sql.execute(WAKE)
    assert shop.installation.store.workflows.wake(limit=9, patience=0)


def assert_left(shop: Inprocess, told: Any, reason: type[ControlFlow]) -> None:
    celery_is_told, state = ENDS[reason]
    assert isinstance(told, celery_is_told)
    assert status(shop).state == state
    assert status(shop).result is None


@whatever_unwinds
def test_except_exception_does_not_stop_it(shop: Inprocess, unwound: Any, calls: list[Any], reason: Any) -> None:
    """Nor does ``suppress(Exception)``: what they guard isn't taken for failed."""

    def body() -> str:
        try:
            with contextlib.suppress(Exception):
                unwound(reason)
        except Exception:
            calls.append("handled")
        calls.append("went on")
        return "swallowed"

    order(shop, body)
    assert_left(shop, shop.run("w1"), reason)
    assert calls == []


@whatever_unwinds
def test_a_swallowed_base_exception_is_no_success(shop: Inprocess, unwound: Any, reason: Any) -> None:
    """What the function returns then means nothing."""

    def body() -> str:
        with contextlib.suppress(BaseException):
            unwound(reason)
        return "swallowed"

    order(shop, body)
    assert_left(shop, shop.run("w1"), reason)


@whatever_unwinds
def test_a_return_in_finally_is_no_success(shop: Inprocess, unwound: Any, reason: Any) -> None:
    """It swallows what unwinds the function as well."""

    def body() -> str:
        try:
            unwound(reason)
        finally:
            return "swallowed"  # noqa: B012

    order(shop, body)
    assert_left(shop, shop.run("w1"), reason)


@whatever_unwinds
def test_an_error_while_unwinding_is_no_failure(shop: Inprocess, unwound: Any, reason: Any) -> None:
    """A clean-up that fails doesn't end the workflow."""

    def body() -> None:
        try:
            unwound(reason)
        finally:
            raise ValueError("the clean-up failed")

    order(shop, body)
    assert_left(shop, shop.run("w1"), reason)


@whatever_unwinds
def test_finally_runs(shop: Inprocess, unwound: Any, calls: list[Any], reason: Any) -> None:
    """Whatever unwinds the function."""

    def body() -> None:
        try:
            unwound(reason)
        finally:
            calls.append("finally")

    order(shop, body)
    assert_left(shop, shop.run("w1"), reason)
    assert calls == ["finally"]


def test_finally_runs_at_each_suspension(shop: Inprocess, sql: Sql, calls: list[Any]) -> None:
    """And once more at the end: it isn't the place for an effect that happens once."""

    def body() -> str:
        try:
            durable.sleep(100)
            durable.sleep(100)
            return "done"
        finally:
            calls.append("finally")

    order(shop, body)
    for count in (1, 2):
        assert isinstance(shop.run("w1"), Retry)
        assert len(calls) == count
        wake(shop, sql)
    assert shop.run("w1") == "done"
    assert calls == ["finally"] * 3


def test_context_managers_are_left_at_each_suspension(shop: Inprocess, sql: Sql, calls: list[Any]) -> None:
    """From the inside out, with the reason as their error, and entered again by the replay."""

    @contextlib.contextmanager
    def entered(name: str) -> Iterator[None]:
        calls.append(f"enter {name}")
        try:
            yield
        except BaseException as error:
            calls.append(f"{name}: {type(error).__name__}")
            raise
        else:
            calls.append(f"leave {name}")

    def body() -> None:
        with entered("outer"), contextlib.ExitStack() as stack:
            stack.enter_context(entered("inner"))
            durable.sleep(100)

    order(shop, body)
    shop.run("w1")
    assert calls == ["enter outer", "enter inner", "inner: Suspended", "outer: Suspended"]
    calls.clear()
    wake(shop, sql)
    shop.run("w1")
    assert calls == ["enter outer", "enter inner", "leave inner", "leave outer"]


def test_a_context_manager_that_swallows_everything(shop: Inprocess, sql: Sql, calls: list[Any]) -> None:
    """The workflow waits all the same, and goes on behind the wait when its time has come."""

    class Swallows:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> bool:
            return True

    def body() -> str:
        with Swallows():
            durable.sleep(100)
            calls.append("woke")
        return "done"

    order(shop, body)
    assert isinstance(shop.run("w1"), Retry)
    assert calls == []
    wake(shop, sql)
    assert shop.run("w1") == "done"
    assert calls == ["woke"]


@pytest.fixture
def durable_calls(shop: Inprocess, calls: list[Any]) -> dict[str, Callable[[], Any]]:
    """Every durable call; ``other`` is a workflow that exists."""

    @shop.workflow(name="child")
    def child() -> None: ...

    @shop.step(name="work")
    def work() -> None:
        calls.append("work")

    @shop.app.task(name="plain", shared=False)
    def plain() -> None:
        calls.append("plain")

    child.apply_async(task_id="other")
    other = durable.WorkflowHandle("other", app=shop.app)
    moment = datetime(2000, 1, 1, tzinfo=timezone.utc)
    return {
        "step": work,
        "as_step": durable.as_step(lambda: calls.append("lambda"), name="lambda"),
        "nested": lambda: durable.as_step(plain)(),
        "sleep": lambda: durable.sleep(0),
        "sleep_until": lambda: durable.sleep_until(moment),
        "send": lambda: durable.send("other", 1),
        "recv": lambda: durable.recv(timeout=0),
        "set_event": lambda: durable.set_event("key", 1),
        "get_event": lambda: durable.get_event("other", "key", timeout=0),
        "gather": lambda: durable.gather(work.s()),
        "gather of nothing": lambda: durable.gather(),
        "gather of children": lambda: durable.gather(child.s(), child.s()),
        "wait_first": lambda: durable.wait_first([other]),
        "delay": child.delay,
        "apply_async": lambda: child.apply_async(task_id="by name"),
        "step.delay": work.delay,
        "as_step(task).delay": lambda: durable.as_step(plain).delay(),
        "group": lambda: group(child.s(), child.s()).delay(),
        "get": other.get,
        "enqueue_many": lambda: durable.enqueue_many([child.s()]),
        "cancel_workflow": lambda: durable.cancel_workflow("other"),
        "resume_workflow": lambda: durable.resume_workflow("other"),
        "fork_workflow": lambda: durable.fork_workflow("other"),
        "now": durable.now,
        "uuid4": durable.uuid4,
        "random": durable.random,
        "patched": lambda: durable.patched("change"),
        "deprecate_patch": lambda: durable.deprecate_patch("change"),
    }


@pytest.mark.parametrize("name", [
    "step", "as_step", "nested", "sleep", "sleep_until", "send", "recv", "set_event", "get_event", "gather",
    "gather of nothing", "gather of children", "wait_first", "delay", "apply_async", "step.delay",
    "as_step(task).delay", "group", "get", "enqueue_many", "cancel_workflow", "resume_workflow", "fork_workflow", "now",
    "uuid4", "random", "patched", "deprecate_patch",
])  # fmt: skip
def test_a_durable_call_while_unwinding_raises_the_same_again(
    shop: Inprocess, sql: Sql, durable_calls: Any, calls: list[Any], name: str
) -> None:
    """And does nothing: what compensates in ``finally`` isn't run by a suspension."""
    seen: list[BaseException] = []

    def body() -> None:
        try:
            durable.sleep(100)
        except BaseException as first:
            try:
                durable_calls[name]()
            except BaseException as again:
                seen.extend([first, again])
            raise

    order(shop, body)
    assert_left(shop, shop.run("w1"), Suspended)
    assert len(seen) == 2
    assert isinstance(seen[0], Suspended)
    assert seen[0] is seen[1]
    assert calls == []
    assert list(steps(shop)) == ["durable.sleep"]
    rows = sql.all("SELECT id, state FROM celery_durable.workflow ORDER BY id")
    assert [tuple(row) for row in rows] == [("other", "ENQUEUED"), ("w1", "SUSPENDED")]
    for table in ("message", "event", "awaiting", "cancellation"):
        assert sql.value(f"SELECT count(*) FROM celery_durable.{table}") == 0


@pytest.mark.parametrize("reason", [Cancelled, HandedOver, OwnershipLost])
def test_every_other_reason_is_raised_again_too(
    shop: Inprocess, unwound: Any, calls: list[Any], reason: type[ControlFlow]
) -> None:
    """As often as the function calls."""
    seen = []
    work = durable.as_step(lambda: calls.append("work"), name="work")

    def body() -> str:
        for call in (lambda: unwound(reason), work, durable.recv, durable.uuid4):
            try:
                call()
            except BaseException as error:
                seen.append(type(error))
        return "swallowed"

    order(shop, body)
    assert_left(shop, shop.run("w1"), reason)
    assert seen == [reason] * 4
    assert calls == []


def test_what_was_swallowed_takes_the_same_way_on_a_replay(shop: Inprocess, sql: Sql) -> None:
    """Calls made while unwinding have no keys, so later ones have theirs."""

    def body() -> list[Any]:
        with contextlib.suppress(BaseException):
            durable.sleep(100)
        with contextlib.suppress(BaseException):
            durable.sleep(200)
        return [str(durable.uuid4()), "done"]

    order(shop, body)
    for key in ("durable.sleep", "durable.sleep#2"):
        assert isinstance(shop.run("w1"), Retry)
        assert list(steps(shop))[-1] == key
        wake(shop, sql)
    value = shop.run("w1")
    assert uuid.UUID(value[0])
    assert list(steps(shop)) == ["durable.sleep", "durable.sleep#2", "durable.uuid4"]


# On the event loop


def test_async_except_exception_and_finally(shop: Inprocess, sql: Sql, calls: list[Any]) -> None:
    """As in a sync function: nothing is handled, ``finally`` and ``async with`` end at each suspension."""

    @contextlib.asynccontextmanager
    async def session() -> Any:
        try:
            yield
        finally:
            calls.append("closed")

    async def body() -> str:
        try:
            async with session():
                await durable.asleep(100)
        except Exception:
            calls.append("handled")
        finally:
            calls.append("finally")
        return "done"

    order(shop, body)
    assert isinstance(shop.run("w1"), Retry)
    assert calls == ["closed", "finally"]
    wake(shop, sql)
    assert shop.run("w1") == "done"
    assert calls == ["closed", "finally"] * 2


def test_async_swallowed_base_exception_is_no_success(shop: Inprocess) -> None:
    """Every durable call raises it again, those of tasks as well."""
    seen = []

    async def caught(awaitable: Callable[[], Any]) -> None:
        try:
            await awaitable()
        except BaseException as error:
            seen.append(type(error))

    async def body() -> str:
        await caught(lambda: durable.asleep(100))
        calls = (
            lambda: durable.asleep(0), lambda: durable.arecv(timeout=0), lambda: durable.asend("w1", 1),
            lambda: durable.aset_event("key", 1), lambda: durable.aget_event("w1", "key", timeout=0),
            lambda: durable.agather(), durable.as_step(lambda: 1, name="work").acall,
        )  # fmt: skip
        for call in calls:
            await caught(call)
        await asyncio.gather(caught(lambda: durable.asleep(0)))
        return "swallowed"

    order(shop, body)
    assert_left(shop, shop.run("w1"), Suspended)
    assert seen == [Suspended] * 9
    assert list(steps(shop)) == ["durable.sleep"]


def test_tasks_of_a_function_are_unwound_with_it(shop: Inprocess, sql: Sql, calls: list[Any]) -> None:
    """Each task's ``finally`` runs at the suspension, and the group that holds the reasons isn't a failure."""

    async def part(number: int) -> int:
        try:
            await durable.asleep(100)
            return number
        finally:
            calls.append(number)

    async def body() -> list[int]:
        try:
            return await asyncio.gather(part(1), part(2))
        except Exception:
            return ["handled"]  # type: ignore[list-item]

    order(shop, body)
    assert_left(shop, shop.run("w1"), Suspended)
    assert sorted(calls) == [1, 2]
    wake(shop, sql)
    assert shop.run("w1") == [1, 2]
    assert sorted(calls) == [1, 1, 2, 2]
