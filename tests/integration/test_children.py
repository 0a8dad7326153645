"""Children: started once with their parent's checkpoint, awaited without a worker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from celery import chord, group
from celery.exceptions import Ignore, Retry
from celery.exceptions import TimeoutError as CeleryTimeoutError

import celery_durable as durable
from celery_durable.engine.context import running
from celery_durable.exceptions import (
    ConfigurationError,
    NotAllowedInStep,
    NotInWorkflow,
    OwnershipLost,
    WorkflowCancelledError,
    WorkflowConflict,
    WorkflowNotFound,
)
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.inprocess import Inprocess
from tests.integration.attempts import begin, crash, order, status, steps

LATE = "UPDATE celery_durable.{} SET wake_at = clock_timestamp() WHERE wake_at IS NOT NULL"


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """One database for all of these tests, which is cheaper."""
    return emptied_database_url


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    with closing(Inprocess(database_url, broker_url)) as shop:
        yield shop


def nothing() -> int:
    return 1


@pytest.fixture
def double(shop: Inprocess) -> Any:
    """A workflow that can fail."""

    @shop.workflow(name="double")
    def double(value: int) -> int:
        if value < 0:
            raise LookupError(f"no {value}")
        return value * 2

    return double


def children(shop: Inprocess) -> list[durable.WorkflowStatus]:
    """The children of w1, the oldest first."""
    return durable.list_workflows(parent_id="w1", app=shop.app)[::-1]


def run_all(shop: Inprocess) -> Any:
    """Let workers do what there is to do, and return what becomes of w1."""
    told = shop.run("w1")
    while isinstance(told, Retry):
        enqueued = durable.list_workflows(state="ENQUEUED", app=shop.app)
        assert enqueued, "somebody can go on"
        for each in sorted(enqueued, key=lambda each: each.id == "w1"):
            told = shop.run(each.id) if each.id != "w1" else told
        if status(shop).state == "ENQUEUED":
            told = shop.run("w1")
    return told


def test_a_child_is_awaited_without_a_worker(shop: Inprocess, double: Any) -> None:
    """Its parent suspends, its end wakes that."""
    order(shop, lambda: double.delay(21).get())
    told = shop.run("w1")
    assert isinstance(told, Retry)
    (child,) = children(shop)
    assert (status(shop).state, status(shop).waiting_for) == ("SUSPENDED", f"workflow {child.id}")
    assert (child.parent_id, child.root_id) == ("w1", "w1")
    assert shop.run(child.id) == 42
    assert status(shop).state == "ENQUEUED"
    assert shop.run("w1") == 42
    assert {key: step.child_id for key, step in steps(shop).items()} == dict.fromkeys(
        ("double.delay", "durable.get"), child.id
    )


def test_a_child_is_started_once(shop: Inprocess, double: Any, sql: Sql) -> None:
    """However often its parent's worker dies, and with the same id."""
    ids: list[str] = []

    def body() -> Any:
        ids.append(double.delay(1).id)
        durable.sleep(100)

    order(shop, body)
    for _ in range(3):
        shop.run("w1")
        durable.send("w1", "wakes nobody", app=shop.app)
        sql.execute(LATE.format("workflow"))
        shop.installation.store.workflows.wake(limit=10, patience=0)
    assert (len(ids), len(set(ids)), len(children(shop))) == (3, 1, 1)


@pytest.mark.parametrize("kind", ["workflow", "step"])
def test_the_id_of_a_child_follows_from_its_parents(shop: Inprocess, double: Any, sql: Sql, kind: str) -> None:
    """And from the place of its start: whoever starts it a second time starts the same one."""
    child = double if kind == "workflow" else shop.step(nothing, name="step")
    order(shop, lambda: None)
    ids = []
    for _ in range(2):
        attempt = begin(shop)
        with running(attempt):
            ids.append([child.apply_async((1,) if kind == "workflow" else ()).id for _ in range(2)])
        crash(shop, attempt)
        sql.execute("DELETE FROM celery_durable.checkpoint")
        sql.execute("DELETE FROM celery_durable.workflow WHERE parent_id IS NOT NULL")
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 2


def test_a_child_and_its_checkpoint_are_one(shop: Inprocess, double: Any, sql: Sql) -> None:
    """A start that is fenced off leaves neither."""

    def body() -> Any:
        crash(shop, attempts[0])
        return double.delay(1)

    order(shop, body)
    attempts = [begin(shop)]
    with running(attempts[0]), pytest.raises(OwnershipLost):
        body()
    assert children(shop) == []
    assert sql.value("SELECT count(*) FROM celery_durable.checkpoint") == 0


def test_a_childs_error_is_its_parents(shop: Inprocess, double: Any) -> None:
    """Of the same type on every replay; one who catches it goes on."""
    seen: list[Any] = []

    def body() -> Any:
        try:
            double.delay(-1).get()
        except LookupError as error:
            seen.append((type(error), str(error)))
        return double.delay(1).get()

    order(shop, body)
    assert run_all(shop) == 2
    assert seen == [(LookupError, "no -1")] * 2


def test_a_child_that_was_cancelled(shop: Inprocess, double: Any) -> None:
    """Its parent is told, and woken by the cancellation itself."""
    order(shop, lambda: double.delay(1).get())
    shop.run("w1")
    assert durable.cancel_workflow(children(shop)[0].id, app=shop.app)
    assert status(shop).state == "ENQUEUED"
    assert isinstance(shop.run("w1"), WorkflowCancelledError)


def test_an_error_may_be_returned(shop: Inprocess, double: Any) -> None:
    """`propagate=False`, as in Celery."""
    order(shop, lambda: repr(double.delay(-1).get(propagate=False)))
    assert run_all(shop) == "LookupError('no -1')"


def test_a_wait_for_a_child_may_end_before(shop: Inprocess, double: Any, sql: Sql) -> None:
    """Its timeout counts from the first call, and what it has come to is kept."""

    def body() -> Any:
        handle = double.delay(1)
        try:
            handle.get(timeout=100)
        except CeleryTimeoutError:
            return [double.delay(2).get(), handle.get()]
        return "too soon"

    order(shop, body)
    shop.run("w1")
    wake_at = status(shop).wake_at
    assert wake_at is not None
    sql.execute(LATE.format("checkpoint"))
    sql.execute(LATE.format("workflow"))
    assert shop.installation.store.workflows.wake(limit=10, patience=0) == ["w1"]
    assert run_all(shop) == [4, 2]


def test_several_are_awaited_at_once(shop: Inprocess, double: Any) -> None:
    """Handles, signatures of workflows and of steps; the last one that ends wakes the parent, once."""

    @shop.step(name="add")
    def add(one: int, two: int) -> int:
        return one + two

    def body() -> Any:
        return durable.gather(double.delay(1), add.s(1, 2), double.s(2), double.delay(3))

    order(shop, body)
    shop.run("w1")
    ids = [each.id for each in children(shop)]
    assert [shop.run(each) for each in ids[:2]] != []
    assert status(shop).state == "SUSPENDED"
    shop.run(ids[2])
    assert status(shop).state == "ENQUEUED"
    assert shop.run("w1") == [2, 3, 4, 6]
    assert status(shop).attempt == 2


def test_the_first_error_in_the_order_of_the_arguments(shop: Inprocess, double: Any) -> None:
    """Or all of them among the values."""
    signatures = [double.s(value) for value in (1, -2, -1)]

    def body() -> Any:
        found = [str(value) for value in durable.gather(*signatures, return_exceptions=True)]
        try:
            durable.gather(*signatures)
        except LookupError as error:
            return [*found, str(error)]

    order(shop, body)
    assert run_all(shop) == ["2", "no -2", "no -1", "no -2"]


def test_the_first_that_ends(shop: Inprocess, double: Any) -> None:
    """Is the same on every replay, whatever ends later; the others run on."""
    found: list[str] = []

    def body() -> Any:
        handles = [double.delay(value) for value in range(3)]
        found.append(durable.wait_first(handles).id)
        return durable.gather(*handles)

    order(shop, body)
    shop.run("w1")
    ids = [each.id for each in children(shop)]
    shop.run(ids[1])
    assert isinstance(shop.run("w1"), Retry)
    for each in (ids[0], ids[2]):
        assert status(shop).state == "SUSPENDED"
        shop.run(each)
    assert shop.run("w1") == [0, 2, 4]
    assert found == [ids[1]] * 2


def test_one_that_has_ended_needs_no_wait(shop: Inprocess, double: Any) -> None:
    """Nobody suspends for what is there."""
    double.apply_async((4,), task_id="done")
    shop.run("done")
    handle = durable.WorkflowHandle("done", app=shop.app)
    order(shop, lambda: [handle.get(), durable.wait_first([handle]).id, durable.gather(handle)])
    assert shop.run("w1") == [8, "done", [8]]
    assert status(shop).attempt == 1


def test_a_child_under_an_id_of_ones_own(shop: Inprocess, double: Any) -> None:
    """One that is there already is awaited; one of another task is a conflict."""
    shop.workflow(nothing, name="other").apply_async(task_id="other")
    double.apply_async((5,), task_id="mine")

    def body() -> Any:
        value = double.apply_async((5,), task_id="mine").get()
        try:
            double.apply_async((1,), task_id="other")
        except WorkflowConflict:
            return value
        return "no conflict"

    order(shop, body)
    assert run_all(shop) == 10


def test_a_group_is_children(shop: Inprocess, double: Any, sql: Sql) -> None:
    """Celery's own: its ids are made by chance, and a replay finds the children all the same."""

    def body() -> Any:
        result = group(double.s(value) for value in (1, 2)).delay()
        durable.sleep(100)
        return result.get()

    order(shop, body)
    shop.run("w1")
    sql.execute(LATE.format("checkpoint"))
    sql.execute(LATE.format("workflow"))
    shop.installation.store.workflows.wake(limit=10, patience=0)
    assert run_all(shop) == [2, 4]
    assert len(children(shop)) == 2


@pytest.mark.parametrize("kinds", ["steps", "a workflow and a step", "tasks as steps"])
def test_a_group_of_steps_is_children(shop: Inprocess, double: Any, kinds: str) -> None:
    """Each a workflow of that one step: also where a result backend would let Celery wait in the worker."""
    shop.app.conf.result_backend = "cache+memory://"

    @shop.step(name="add")
    def add(value: int) -> int:
        return value + 1

    @shop.app.task(name="plain", shared=False)
    def plain(value: int) -> int:
        return value + 1

    members = {
        "steps": (add, add),
        "a workflow and a step": (double, add),
        "tasks as steps": (durable.as_step(plain), durable.as_step(plain)),
    }[kinds]

    def body() -> Any:
        result = group(member.s(value) for member, value in zip(members, (2, 3), strict=True)).delay()
        durable.recv()
        return [[each.id for each in result], result.get()]

    order(shop, body)
    assert isinstance(shop.run("w1"), Retry)
    ids = [each.id for each in children(shop)]
    durable.send("w1", "go on", app=shop.app)
    assert run_all(shop) == [ids, [4 if kinds == "a workflow and a step" else 3, 4]]
    assert [each.id for each in children(shop)] == ids


def test_a_group_of_steps_in_an_async_workflow(shop: Inprocess) -> None:
    """Its handles are gathered as those of workflows."""

    @shop.step(name="add")
    def add(value: int) -> int:
        return value + 1

    async def body() -> Any:
        return await durable.agather(*group(add.s(1), add.s(2)).delay())

    order(shop, body)
    assert run_all(shop) == [2, 3]


@pytest.mark.filterwarnings("ignore:The workflow order sends the task plain")
def test_a_group_with_a_plain_task_is_not_awaited(shop: Inprocess, double: Any) -> None:
    """Celery would wait for it in the worker; the error says how the task becomes a child."""

    @shop.app.task(name="plain", shared=False)
    def plain(value: int) -> int:
        return value

    def body() -> None:
        for members in ([plain.s(1)], [double.s(1), plain.s(1)]):
            result = group(members).delay()
            for wait in (result.get, result.join, result.join_native):
                with pytest.raises(ConfigurationError, match=r"durable\.as_step\(task\)\.s"):
                    wait()

    order(shop, body)
    assert shop.run("w1") is None


def test_a_signature_of_a_task_as_a_step(shop: Inprocess) -> None:
    """Is a child wherever Celery copies it to; outside a workflow it is the task's own."""

    @shop.app.task(name="plain", shared=False)
    def plain(value: int) -> int:
        return value + 1

    signature = durable.as_step(plain).s(1).clone()

    def body() -> Any:
        with pytest.raises(ConfigurationError, match=r"base=durable\.Step"):
            durable.as_step(plain, soft_time_limit=3).s(1).delay()
        return durable.gather(signature, signature.delay())

    order(shop, body)
    shop.run("w1")
    (child,) = children(shop)
    assert child.name == "celery_durable.step"
    assert shop.run(child.id) == 2
    assert shop.run("w1") == [2, 2]
    assert signature.apply().get() == 2
    assert not isinstance(signature.delay(), durable.WorkflowHandle)


def test_async_names(shop: Inprocess, double: Any) -> None:
    """Nothing of it blocks the event loop, and all of it is awaited together."""

    async def body() -> Any:
        first = await double.adelay(1)
        both = await asyncio.gather(first.aget(), (await double.adelay(2)).aget())
        return [both, await durable.agather(first, double.s(3)), (await durable.await_first([first])).id == first.id]

    order(shop, body)
    assert run_all(shop) == [[2, 4], [2, 6], True]


def test_what_goes_on_beside_a_wait(shop: Inprocess, double: Any) -> None:
    """Is waited for before the worker is given back: also a sleep of asyncio's, however the tasks are awaited."""

    async def other(value: int) -> Any:
        await asyncio.sleep(0.1)
        return await (await double.adelay(value)).aget()

    async def waited(*coroutines: Any) -> list[Any]:
        tasks = [asyncio.ensure_future(each) for each in coroutines]
        await asyncio.wait(tasks)
        return [task.result() for task in tasks]

    async def body() -> Any:
        first = await asyncio.gather(durable.arecv(), other(1), waited(other(2), durable.arecv("late")))
        return [*first, await asyncio.ensure_future(other(3))]

    order(shop, body)
    assert isinstance(shop.run("w1"), Retry)
    assert len(children(shop)) == 2
    durable.send("w1", "hello", app=shop.app)
    durable.send("w1", "late", topic="late", app=shop.app)
    assert run_all(shop) == ["hello", 2, [4, "late"], 6]


def test_the_blocking_names_in_an_async_workflow(shop: Inprocess, double: Any) -> None:
    """They say what to await."""

    async def body() -> list[str]:
        handle = await double.adelay(1)
        said = []
        for call in (handle.get, lambda: durable.wait_first([handle]), lambda: durable.gather(handle)):
            with pytest.raises(NotInWorkflow, match="await") as caught:
                call()
            said.append(str(caught.value))
        return said

    order(shop, body)
    assert len(shop.run("w1")) == 3


def test_a_step_neither_starts_nor_waits(shop: Inprocess, double: Any) -> None:
    """It may read how a workflow stands."""
    double.apply_async((1,), task_id="other")
    handle = durable.WorkflowHandle("other", app=shop.app)

    def body() -> str:
        for call in (
            lambda: double.delay(1),
            handle.get,
            lambda: durable.wait_first([handle]),
            lambda: durable.gather(handle),
            lambda: durable.enqueue_many([double.s(1)]),
            lambda: durable.cancel_workflow("other", app=shop.app),
            lambda: durable.fork_workflow("other", app=shop.app),
        ):
            with pytest.raises(NotAllowedInStep):
                call()
        return handle.state

    order(shop, durable.as_step(body, name="step"))
    assert shop.run("w1") == "PENDING"


REFUSED: dict[str, Callable[[Any, durable.WorkflowHandle[Any]], Any]] = {
    "group": lambda child, handle: group(child.s(1), child.s(2)).delay(),
    "chain": lambda child, handle: (child.s(1) | child.s()).delay(),
    "chord": lambda child, handle: chord([child.s(1)], child.si(2)).delay(),
    "send_task": lambda child, handle: child.app.send_task(child.name, (1,)),
    "wait": lambda child, handle: handle.wait(timeout=1),
    "adelay": lambda child, handle: child.adelay(1),
    "aget": lambda child, handle: handle.aget(),
    "agather": lambda child, handle: durable.agather(child.s(1)),
    "await_first": lambda child, handle: durable.await_first([handle]),
    "asleep": lambda child, handle: durable.asleep(1),
    "arecv": lambda child, handle: durable.arecv(),
    "asend": lambda child, handle: durable.asend("other", 1),
    "aset_event": lambda child, handle: durable.aset_event("key", 1),
    "aget_event": lambda child, handle: durable.aget_event("other", "key"),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_a_step_neither_starts_nor_waits_by_another_way(shop: Inprocess, double: Any, call: Any) -> None:
    """Celery's canvas, a start by name, Celery's other name of get, and what is to be awaited."""
    shop.app.conf.result_backend = "cache+memory://"
    handle = durable.WorkflowHandle("other", app=shop.app)
    order(shop, durable.as_step(lambda: call(double, handle), name="step"))
    shop.run("w1")
    assert isinstance(status(shop).error, NotAllowedInStep)
    assert len(durable.list_workflows(app=shop.app)) == 1


def test_wait_suspends_as_get_does(shop: Inprocess, double: Any) -> None:
    """It is Celery's other name of it."""
    order(shop, lambda: double.delay(2).wait())
    assert run_all(shop) == 4
    assert status(shop).attempt == 2


def test_what_cannot_be_awaited(shop: Inprocess, broker_url: str) -> None:
    """Oneself, another app's, one that isn't there, and no handle at all."""
    with closing(Inprocess(shop.installation.config.database_url, broker_url)) as other:

        def body() -> None:
            for handle, error in (
                (durable.WorkflowHandle("w1", app=shop.app), ValueError),
                (durable.WorkflowHandle("w9", app=other.app), ConfigurationError),
                (durable.WorkflowHandle("w9", app=shop.app), WorkflowNotFound),
            ):
                for wait in (
                    handle.get,
                    lambda each=handle: durable.gather(each),
                    lambda each=handle: durable.wait_first([each]),
                ):
                    with pytest.raises(error):
                        wait()
            with pytest.raises(ValueError, match="at least one"):
                durable.wait_first([])
            with pytest.raises(TypeError, match="handles"):
                durable.wait_first(["w9"])

        order(shop, body)
        assert shop.run("w1") is None


def test_that_there_is_no_workflow_is_an_outcome(shop: Inprocess, double: Any) -> None:
    """A replay sees the same, also when there is one by then."""
    seen: list[str] = []

    def body() -> Any:
        try:
            return durable.WorkflowHandle("other", app=shop.app).get()
        except WorkflowNotFound as error:
            seen.append(str(error))
        return durable.recv()

    order(shop, body)
    shop.run("w1")
    double.apply_async((1,), task_id="other")
    durable.send("w1", "done", app=shop.app)
    assert shop.run("w1") == "done"
    assert len(set(seen)) == 1


def test_a_child_that_nobody_awaits_wakes_nobody(shop: Inprocess, double: Any) -> None:
    """Its parent sleeps on."""

    def body() -> None:
        double.delay(1)
        durable.sleep(100)

    order(shop, body)
    shop.run("w1")
    shop.run(children(shop)[0].id)
    assert status(shop).state == "SUSPENDED"
    assert isinstance(shop.run("w1"), Ignore)


def test_a_step_that_is_sent_away(shop: Inprocess) -> None:
    """Runs under its own retry policy as a workflow of that one step, and is shown under its name."""
    runs: list[int] = []

    @shop.step(name="flaky", autoretry_for=(OSError,), max_retries=2, default_retry_delay=0, queue="far", priority=4)
    def flaky(value: int) -> int:
        runs.append(durable.current.step.attempt)
        if len(runs) < 3:
            raise OSError(value)
        return value

    order(shop, lambda: flaky.delay(7).get())
    shop.run("w1")
    (child,) = children(shop)
    assert (child.name, child.queue, list(steps(shop))) == ("celery_durable.step", "far", ["flaky.delay"])
    (message,) = shop.installation.store.workflows.messages_of([child.id], patience=0)
    assert json.loads(message.envelope)["properties"]["priority"] == 4
    assert shop.run(child.id) == 7
    assert runs == [1, 2, 3]
    assert shop.run("w1") == 7
    assert [step.key for step in durable.list_workflow_steps(child.id, app=shop.app)] == ["flaky"]


def test_an_unmodified_task_that_is_sent_away(shop: Inprocess) -> None:
    """By `as_step`; options hold where it is called, so they are refused."""

    @shop.app.task(name="plain", shared=False)
    def plain(value: int) -> int:
        return value + 1

    order(shop, lambda: durable.as_step(plain).delay(1).get())
    assert run_all(shop) == 2

    def refused() -> None:
        with pytest.raises(ConfigurationError, match=r"base=durable\.Step"):
            durable.as_step(plain, soft_time_limit=3).delay(1)

    shop.workflow(refused, name="refused").apply_async(task_id="w2")
    assert shop.run("w2") is None


def test_a_worker_without_the_task_leaves_a_sent_step_to_others(shop: Inprocess, sql: Sql) -> None:
    """It isn't failed; it waits for a worker that has it."""
    step = shop.step(nothing, name="new")
    order(shop, lambda: step.delay().get())
    shop.run("w1")
    (child,) = children(shop)
    task = shop.app.tasks.pop("new")
    assert isinstance(shop.run(child.id), Retry)
    assert "the task new" in str(durable.get_workflow_status(child.id, app=shop.app).waiting_for)
    shop.app.tasks["new"] = task
    sql.execute(LATE.format("workflow"))
    assert child.id in shop.installation.store.workflows.wake(limit=10, patience=0)
    assert shop.run(child.id) == 1
