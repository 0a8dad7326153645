"""Code that changes under running workflows: the old ones keep to the old code, new ones take the new."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery.exceptions import Retry

import celery_durable as durable
from celery_durable.exceptions import NondeterminismError, NotAllowedInStep, NotInWorkflow
from tests.fixtures.fix_postgres import Sql, _new_database
from tests.fixtures.inprocess import Inprocess
from tests.integration.attempts import begin, clear, crash, order, status, steps


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
    shop = Inprocess(database_url, broker_url)
    yield shop
    shop.close()


class Release:
    """A workflow whose code is replaced by each deploy."""

    def __init__(self, shop: Inprocess, first: Callable[[], Any]) -> None:
        self.shop = shop
        self.code = first
        order(shop, lambda: self.code())

    def run(self) -> Any:
        return self.shop.run("w1")

    def go_on(self) -> Any:
        """Let the workflow go on with a message."""
        durable.send("w1", None, app=self.shop.app)
        return self.run()


def step(name: str) -> Any:
    return durable.as_step(lambda: name, name=name)()


def old() -> list[Any]:
    return [step("pay"), durable.recv(), step("ship"), durable.recv()]


def patched() -> list[Any]:
    if durable.patched("gift"):
        return [step("wrap"), step("pay"), durable.recv(), step("ship"), durable.recv()]
    return old()


def deprecated() -> list[Any]:
    durable.deprecate_patch("gift")
    return [step("wrap"), step("pay"), durable.recv(), step("ship"), durable.recv()]


def new() -> list[Any]:
    return [step("wrap"), step("pay"), durable.recv(), step("ship"), durable.recv()]


OLD, NEW = ["pay", None, "ship", None], ["wrap", "pay", None, "ship", None]


def test_a_new_workflow_takes_the_new_code(shop: Inprocess) -> None:
    """On its first run and on every replay."""
    release = Release(shop, patched)
    release.run()
    release.go_on()
    assert release.go_on() == NEW


def test_a_workflow_that_had_come_past_keeps_to_the_old_code(shop: Inprocess) -> None:
    """On every replay, however far it gets."""
    release = Release(shop, old)
    release.run()
    release.code = patched
    assert isinstance(release.go_on(), Retry)
    assert release.go_on() == OLD
    assert "wrap" not in steps(shop)


def test_a_workflow_that_had_not_started_takes_the_new_code(shop: Inprocess) -> None:
    """It hasn't come past."""
    release = Release(shop, old)
    release.code = patched
    release.run()
    release.go_on()
    assert release.go_on() == NEW


def test_a_workflow_that_had_not_come_so_far_takes_the_new_code(shop: Inprocess) -> None:
    """What counts is where it stood at the deploy."""

    def late() -> list[Any]:
        before = [step("pay"), durable.recv()]
        return [*before, step("wrap" if durable.patched("gift") else "ship")]

    release = Release(shop, old)
    release.run()
    release.code = late
    assert release.go_on() == ["pay", None, "wrap"]


def test_the_answer_is_kept_over_a_crash(shop: Inprocess) -> None:
    """Its one step says that the new code was taken."""
    release = Release(shop, patched)
    release.run()
    durable.send("w1", None, app=shop.app)
    crash(shop, begin(shop))
    release.run()
    assert release.go_on() == NEW


def test_the_same_answer_at_every_call(shop: Inprocess) -> None:
    """In a loop that an old workflow is in the middle of, too."""

    def before() -> list[Any]:
        return [(step("work"), durable.recv())[0] for _ in range(3)]

    def after() -> list[Any]:
        return [(step("better" if durable.patched("better") else "work"), durable.recv())[0] for _ in range(3)]

    release = Release(shop, before)
    release.run()
    release.code = after
    release.go_on()
    release.go_on()
    assert release.go_on() == ["work"] * 3


def test_a_change_costs_one_step(shop: Inprocess) -> None:
    """Further calls cost nothing."""
    order(shop, lambda: [durable.patched("gift") for _ in range(5)])
    assert shop.run("w1") == [True] * 5
    assert len(steps(shop)) == 1


def test_changes_are_independent(shop: Inprocess) -> None:
    """A workflow may have come past one and not past another."""

    def both() -> list[Any]:
        first = durable.patched("first")
        step("pay")
        durable.recv()
        return [first, durable.patched("second"), durable.patched("third")]

    release = Release(shop, old)
    release.run()
    release.code = both
    assert release.go_on() == [False, True, True]


def test_ids_that_begin_alike(shop: Inprocess) -> None:
    """A change isn't taken for another one."""

    def before() -> list[Any]:
        return [durable.patched("v1 b"), durable.recv()]

    def after() -> list[Any]:
        return [durable.patched("v1"), *before()]

    release = Release(shop, before)
    release.run()
    release.code = after
    assert release.go_on() == [False, True, None]


def test_a_change_within_a_change(shop: Inprocess) -> None:
    """A later deploy patches again what an earlier one has patched."""

    def again() -> list[Any]:
        if not durable.patched("gift"):
            return old()
        return ["newest"] if durable.patched("newest") else patched()

    release = Release(shop, patched)
    release.run()
    release.code = again
    release.go_on()
    assert release.go_on() == NEW


# The old code is gone


def test_deprecated_for_a_workflow_of_the_new_code(shop: Inprocess) -> None:
    """It goes on."""
    release = Release(shop, patched)
    release.run()
    release.code = deprecated
    release.go_on()
    assert release.go_on() == NEW


def test_deprecated_for_a_new_workflow(shop: Inprocess) -> None:
    """It is marked, so that a worker which still has ``patched`` agrees."""
    release = Release(shop, deprecated)
    release.run()
    release.code = patched
    release.go_on()
    assert release.go_on() == NEW


def test_the_mark_may_go_in_the_end(shop: Inprocess) -> None:
    """When ``deprecate_patch`` is deleted, workflows that were marked go on."""
    release = Release(shop, deprecated)
    release.run()
    release.code = new
    release.go_on()
    assert release.go_on() == NEW


def test_deprecated_too_early(shop: Inprocess) -> None:
    """A workflow of the old code stops in DEAD and says why; the old code brought back, it is resumed."""
    release = Release(shop, old)
    release.run()
    release.code = deprecated
    release.go_on()
    assert status(shop).state == "DEAD"
    assert isinstance(status(shop).error, NondeterminismError)
    assert "gift" in str(status(shop).error)
    assert list(steps(shop)) == ["pay"]
    release.code = patched
    durable.resume_workflow("w1", app=shop.app)
    assert isinstance(release.run(), Retry)
    assert release.go_on() == OLD


def test_deprecated_too_early_cannot_be_swallowed(shop: Inprocess) -> None:
    """It is DEAD, whatever the function makes of the error."""

    def swallows() -> str:
        try:
            durable.deprecate_patch("gift")
        except Exception:
            return "swallowed"
        return "went on"

    release = Release(shop, old)
    release.run()
    release.code = swallows
    release.go_on()
    assert status(shop).state == "DEAD"


# On the event loop


def test_in_an_async_function(shop: Inprocess) -> None:
    """Called without await; in tasks as in the function."""

    async def part() -> bool:
        return durable.patched("gift")

    async def body() -> list[bool]:
        first = durable.patched("other")
        answers = await asyncio.gather(part(), part())
        await durable.arecv()
        durable.deprecate_patch("third")
        return [first, *answers, durable.patched("gift")]

    release = Release(shop, body)
    assert isinstance(release.run(), Retry)
    assert release.go_on() == [True] * 4


# Where


@pytest.mark.parametrize("change", ["", "x" * 10_240, "a\x00b", "\ud800", 5, None], ids=lambda each: f"{each!r:.12}")
@pytest.mark.parametrize("call", [durable.patched, durable.deprecate_patch])
def test_an_impossible_id(shop: Inprocess, call: Any, change: Any) -> None:
    """It is refused before anything is written."""
    order(shop, lambda: call(change))
    told = shop.run("w1")
    assert isinstance(told, TypeError | ValueError)
    assert "id of a change" in str(told)
    assert steps(shop) == {}


@pytest.mark.parametrize("change", ["x" * 255, "\U0001f381" * 255, "a change (2)#1", "%s"], ids=ascii)
def test_any_other_id(shop: Inprocess, change: str) -> None:
    """Text is text."""

    def body() -> bool:
        found = durable.patched(change)
        durable.recv()
        return found

    release = Release(shop, body)
    release.run()
    assert release.go_on() is True


@pytest.mark.parametrize("call", [durable.patched, durable.deprecate_patch])
def test_only_in_a_workflow(shop: Inprocess, call: Any) -> None:
    """Not outside, not in a step."""
    with pytest.raises(NotInWorkflow, match="know about patches"):
        call("gift")
    order(shop, durable.as_step(lambda: call("gift"), name="step"))
    assert isinstance(shop.run("w1"), NotAllowedInStep)


def test_not_in_a_thread_of_the_user(shop: Inprocess) -> None:
    """Not even if the workflow has asked already."""
    seen: list[BaseException] = []

    def caught() -> None:
        try:
            durable.patched("gift")
        except NotInWorkflow as error:
            seen.append(error)

    def body() -> None:
        durable.patched("gift")
        thread = threading.Thread(target=caught)
        thread.start()
        thread.join()

    order(shop, body)
    shop.run("w1")
    assert len(seen) == 1


def test_in_a_direct_call(shop: Inprocess, sql: Sql) -> None:
    """The new code, and nothing is written."""
    task = order(shop, lambda: durable.deprecate_patch("gift") or durable.patched("gift"))
    assert task() is True
    assert task.apply().get() is True
    assert sql.value("SELECT count(*) FROM celery_durable.checkpoint") == 0
