"""Messages that a workflow function sends, and each replay would send again: who is warned, and who isn't."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from celery import chord, group

import celery_durable as durable
from celery_durable import registration
from tests.fixtures.inprocess import Inprocess

pytestmark = pytest.mark.oldest


@pytest.fixture
def shop(database_url: str, broker_url: str, queue_name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Inprocess]:
    monkeypatch.setattr(registration, "_warned", set())
    shop = Inprocess(database_url, broker_url)
    shop.app.conf.task_default_queue = queue_name
    shop.app.task(name="shop.mail", shared=False)(mail)
    yield shop
    shop.close()


def mail(*args: Any) -> None: ...


def warnings_of(shop: Inprocess, body: Any) -> list[warnings.WarningMessage]:
    """Run this as a workflow, twice, as a replay would; what that warns of."""

    def order() -> None:
        body()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task = shop.workflow(body if inspect.iscoroutinefunction(body) else order, name="order")
        for task_id in ("w1", "w2"):
            task.apply_async(task_id=task_id)
            shop.run(task_id)
            error = durable.get_workflow_status(task_id, app=shop.app).error
            assert error is None, error
    return caught


def test_a_plain_task_sent_by_a_workflow_warns_once(shop: Inprocess) -> None:
    """With the line to write, and where it is to be written."""
    plain = shop.app.tasks["shop.mail"]

    def order() -> None:
        plain.delay(1)
        plain.apply_async((2,), countdown=1)

    (warning,) = warnings_of(shop, order)
    assert issubclass(warning.category, RuntimeWarning)
    assert str(warning.message) == (
        "The workflow order sends the task shop.mail, and each replay will send it again: write "
        "durable.as_step(mail).delay(…)."
    )
    assert warning.filename == __file__
    assert order.__code__.co_firstlineno < warning.lineno <= order.__code__.co_firstlineno + 2


def test_as_an_error_it_fails_the_workflow_before_anything_is_sent(shop: Inprocess) -> None:
    """As under pytest's -W error, each time."""
    plain = shop.app.tasks["shop.mail"]

    def order() -> None:
        plain.delay(1)

    task = shop.workflow(order, name="order")
    for task_id in ("w1", "w2"):
        task.apply_async(task_id=task_id)
        shop.run(task_id)
        error = durable.get_workflow_status(task_id, app=shop.app).error
        assert isinstance(error, RuntimeWarning)
    with shop.app.connection_for_read() as connection:
        queue = connection.default_channel.queue_declare(shop.app.conf.task_default_queue)
        assert queue.message_count == 2, "those of the workflows"


@pytest.mark.parametrize(
    "canvas",
    [
        lambda plain: group(plain.s(1), plain.s(2)),
        lambda plain: plain.s(1) | plain.si(2),
        lambda plain: chord([plain.s(1), plain.s(2)], plain.si(3)),
        lambda plain: plain.map([1, 2]),
        lambda plain: plain.s(1).on_error(plain.si(2)),
    ],
    ids=["group", "chain", "chord", "map", "link"],
)
def test_a_canvas_of_plain_tasks_warns_too(shop: Inprocess, canvas: Any) -> None:
    """Its messages are no other than those of its tasks."""
    shop.app.conf.result_backend = "cache+memory://"
    plain = shop.app.tasks["shop.mail"]
    (warning,) = warnings_of(shop, lambda: canvas(plain).apply_async())
    assert "sends the task" in str(warning.message)


def test_tasks_sent_by_name_warn(shop: Inprocess) -> None:
    """A workflow, too: its own delay() would be a child."""
    shop.workflow(mail, name="shop.refund")

    def order() -> None:
        for name in ("shop.unknown", "shop.refund", "shop.refund"):
            shop.app.send_task(name)

    messages = [str(warning.message) for warning in warnings_of(shop, order)]
    assert [message.partition("write ")[2] for message in messages] == [
        "durable.as_step(unknown).delay(…).",
        "refund.delay(…).",
    ]


def test_an_async_workflow_is_warned_as_well(shop: Inprocess) -> None:
    """Its function runs in another thread."""
    plain = shop.app.tasks["shop.mail"]

    async def order() -> None:
        plain.delay(1)

    (warning,) = warnings_of(shop, order)
    assert "durable.as_step(mail).delay(…)" in str(warning.message)


def test_what_is_written_instead_does_not_warn(shop: Inprocess) -> None:
    """The wrapped task, steps, and workflows as children."""
    plain, child = shop.app.tasks["shop.mail"], shop.workflow(mail, name="child")
    step = shop.step(mail, name="step")

    def order() -> None:
        durable.as_step(plain).delay(1)
        step.delay(1)
        child.delay(1)

    assert warnings_of(shop, order) == []


def test_a_step_may_send_what_it_likes(shop: Inprocess) -> None:
    """It doesn't run again once it is done."""
    plain = shop.app.tasks["shop.mail"]
    send = durable.as_step(lambda: plain.delay(1).id, name="send")
    assert warnings_of(shop, lambda: [send(), durable.gather(send.s(), send.s())]) == []


def test_what_celery_sends_around_a_workflow_does_not_warn(shop: Inprocess) -> None:
    """Its links, the rest of its chain, and its own retry."""
    plain = shop.app.tasks["shop.mail"]
    retried: list[Any] = []

    def order(self: Any) -> None:
        if not retried:
            retried.append(1)
            raise self.retry(countdown=0.01)

    task = shop.workflow(order, name="order", bind=True)
    linked = shop.workflow(mail, name="linked")
    task.apply_async(task_id="w1")
    linked.apply_async(task_id="w2", link=plain.s(), link_error=plain.s(), chain=[plain.s(1)])
    shop.run("w1")
    shop.run("w2")
    with shop.app.connection_for_read() as connection:
        queue = connection.default_channel.queue_declare(shop.app.conf.task_default_queue)
        assert queue.message_count == 4, "two of workflows, a link, and the next of the chain"


def test_elsewhere_nobody_is_warned(shop: Inprocess) -> None:
    """A plain task, or no task at all."""
    plain = shop.app.tasks["shop.mail"]

    def outer() -> None:
        plain.delay(1)

    shop.app.task(name="outer", shared=False)(outer).apply().get()
    outer()
