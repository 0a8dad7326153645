"""Traces: one for a workflow's whole life, a span for each attempt and each try, beside OpenTelemetry's own."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import psycopg
import pytest
from celery import Celery, _state
from celery.exceptions import Ignore, Retry
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import SpanKind, TraceFlags

import celery_durable as durable
from celery_durable.contrib import opentelemetry
from celery_durable.engine.context import Attempt, boot_time, running
from celery_durable.engine.observer import Observer
from celery_durable.engine.step import Call, StepSpec
from celery_durable.engine.waiting import complete
from celery_durable.envelope import Envelope
from celery_durable.exceptions import NotInstalled, StepTimeout, WorkflowConflict
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.workers import ROOT
from tests.integration.attempts import DUE, begin, crash, order

WAKE = "UPDATE celery_durable.workflow SET state = 'ENQUEUED', publish_at = clock_timestamp()"
WITHOUT_SDK = """
import sys
sys.modules["opentelemetry.sdk"] = None
from celery import Celery
import celery_durable as durable
from celery_durable.contrib import opentelemetry
app = Celery("shop", set_as_current=False)
durable.install(app, database_url="postgresql://localhost/shop")
opentelemetry.install(app)
"""


class Refused(Exception):
    """An error of a shop."""


class Expected(Exception):
    """One that is no surprise."""


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """One database for all of these tests, which is cheaper."""
    return emptied_database_url


class Traced:
    """An app whose workflows run here, and the spans that are exported."""

    def __init__(self, shop: Inprocess, provider: TracerProvider | None = None) -> None:
        self.shop = shop
        self.exporter = InMemorySpanExporter()
        self.provider = provider or TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("tests")

    @property
    def spans(self) -> list[ReadableSpan]:
        """All that have ended, by their starts."""
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def named(self, name: str) -> list[ReadableSpan]:
        """Those with this name."""
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        """The only one with this name."""
        (span,) = self.named(name)
        return span

    def parent(self, span: ReadableSpan) -> ReadableSpan | None:
        """The span that a span is in."""
        found = [each for each in self.spans if span.parent and each.context.span_id == span.parent.span_id]
        return found[0] if found else None

    def traces(self) -> set[int]:
        """The ids of all traces."""
        return {span.context.trace_id for span in self.spans}

    def headers(self, workflow_id: str = "w1") -> dict[str, Any]:
        """The headers of the stored message of a workflow."""
        (message,) = self.shop.installation.store.workflows.messages_of([workflow_id], patience=0)
        return dict(Envelope.of_stored(message).headers)

    def run(self, workflow_id: str = "w1", **more: Any) -> Any:
        """Deliver the stored message, with what it has of a trace."""
        kept = {name: value for name, value in self.headers(workflow_id).items() if name.startswith("trace")}
        return self.shop.run(workflow_id, **kept, **more)


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    with closing(Inprocess(database_url, broker_url, suspend_after=2)) as shop:
        yield shop


@pytest.fixture
def traced(shop: Inprocess) -> Traced:
    """The shop, traced by us alone."""
    traced = Traced(shop)
    opentelemetry.install(shop.app, traced.provider)
    return traced


@contextmanager
def instrumented(traced: Traced) -> Iterator[None]:
    """Let OpenTelemetry's own instrumentation be active as well, which only knows Celery's current app."""
    before = _state._tls.current_app
    traced.shop.app.set_current()
    CeleryInstrumentor().instrument(tracer_provider=traced.provider)
    try:
        yield
    finally:
        CeleryInstrumentor().uninstrument()
        _state._tls.current_app = before


@pytest.fixture(params=["alone", "beside"])
def traced_so(request: pytest.FixtureRequest, traced: Traced) -> Iterator[Traced]:
    """The shop, traced by us alone, and beside OpenTelemetry's own instrumentation of Celery."""
    if request.param == "alone":
        yield traced
    else:
        with instrumented(traced):
            yield traced


@pytest.fixture
def charge(shop: Inprocess) -> Any:
    """A step."""

    @shop.step(name="charge")
    def charge(amount: Any = 1) -> Any:
        return amount

    return charge


def facts(span: ReadableSpan, *names: str) -> list[Any]:
    """Attributes of ours."""
    return [(span.attributes or {}).get(f"celery_durable.{name}") for name in names]


def outline(span: ReadableSpan) -> tuple[str, str, str | None]:
    """Its name, its status, and how the attempt or the try has ended."""
    ending, state = facts(span, "attempt.ending", "step.state")
    return span.name, span.status.status_code.name, ending or state


def errors(span: ReadableSpan) -> list[Any]:
    """The errors that are recorded in a span."""
    return [dict(event.attributes or {})["exception.type"] for event in span.events if event.name == "exception"]


def waits(shop: Inprocess, charge: Any) -> None:
    def function() -> list[Any]:
        return [charge(1), durable.recv("go", timeout=60), charge(2)]

    order(shop, function)


def test_a_suspended_workflow_is_one_trace(traced_so: Traced, charge: Any) -> None:
    """One span for the start, one for each attempt, one for each try of a step; what is replayed has none."""
    traced = traced_so
    with traced.tracer.start_as_current_span("POST /orders"):
        waits(traced.shop, charge)
    assert isinstance(traced.run(), Retry)
    durable.send("w1", 7, "go", app=traced.shop.app)
    assert traced.run() == [1, 7, 2]
    assert [outline(span) for span in traced.spans] == [
        ("POST /orders", "UNSET", None),
        ("apply_async/order", "UNSET", None),
        ("run/order", "UNSET", "suspended"),
        ("step/charge", "UNSET", "SUCCESS"),
        ("run/order", "UNSET", "SUCCESS"),
        ("step/charge", "UNSET", "SUCCESS"),
    ]
    post, start, first, one, second, two = traced.spans
    assert [traced.parent(span) for span in (start, first, one, second, two)] == [post, start, first, start, second]
    assert len(traced.traces()) == 1
    assert [span.kind for span in (start, first, one)] == [SpanKind.PRODUCER, SpanKind.CONSUMER, SpanKind.INTERNAL]
    for span in (start, first, one, second, two):
        assert facts(span, "workflow.id", "workflow.name") == ["w1", "order"]
    assert [facts(span, "attempt.number", "workflow.root_id") for span in (first, second)] == [[1, "w1"], [2, "w1"]]
    names = ("step.name", "step.key", "step.try", "attempt.number")
    assert facts(one, *names) == ["charge", "charge", 1, 1]
    assert facts(two, *names) == ["charge", "charge#2", 1, 2]
    (event,) = first.events
    assert (event.name, dict(event.attributes or {})) == (
        "suspended", {"celery_durable.workflow.waiting_for": "message go"}
    )  # fmt: skip
    assert second.events == ()


def test_the_span_of_a_caller_is_not_described(traced: Traced, charge: Any) -> None:
    """OpenTelemetry's own instrumentation leaves it current where it doesn't know the task."""
    with instrumented(traced), traced.tracer.start_as_current_span("POST /orders"):
        _state._tls.current_app = None
        waits(traced.shop, charge)
    assert facts(traced.one("POST /orders"), "workflow.id") == [None]


def test_a_start_without_a_trace_begins_one(traced: Traced, charge: Any) -> None:
    """The span of the start is its root."""
    waits(traced.shop, charge)
    traced.run()
    start = traced.one("apply_async/order")
    assert start.parent is None
    assert traced.parent(traced.one("run/order")) is start


def test_each_try_has_a_span(traced: Traced, sql: Sql) -> None:
    """An error for which a step is tried again is recorded, and is none of the trace; the last one is."""
    shop, tries = traced.shop, []

    @shop.step(name="flaky", autoretry_for=(Refused,), max_retries=5, default_retry_delay=0)
    def flaky() -> int:
        tries.append(durable.current.step.attempt)
        if len(tries) < 3:
            raise Refused("no")
        return len(tries)

    @shop.step(name="fails", autoretry_for=(Refused,), max_retries=1, default_retry_delay=60)
    def fails() -> None:
        raise Refused("never")

    @shop.step(name="expected", throws=(Expected,))
    def expected() -> None:
        raise Expected("of course")

    def function() -> int:
        done = flaky()
        for step in (fails, expected):
            try:
                step()
            except (Refused, Expected):
                continue
        return int(done)

    order(shop, function)
    assert isinstance(traced.run(), Retry)
    sql.execute(DUE)
    sql.execute(WAKE)
    assert traced.run() == 3
    flakies = traced.named("step/flaky")
    assert [(outline(span)[1:], *facts(span, "step.try"), errors(span)) for span in flakies] == [
        (("UNSET", "RETRY"), 1, [f"{__name__}.Refused"]),
        (("UNSET", "RETRY"), 2, [f"{__name__}.Refused"]),
        (("UNSET", "SUCCESS"), 3, []),
    ]
    first, last = traced.named("step/fails")
    assert (outline(first)[1:], *facts(first, "step.try", "attempt.number")) == (("UNSET", "RETRY"), 1, 1)
    assert (outline(last)[1:], *facts(last, "step.try", "attempt.number")) == (("ERROR", "FAILURE"), 2, 2)
    assert last.status.description == "Refused: never"
    assert errors(last) == [f"{__name__}.Refused"]
    calm = traced.one("step/expected")
    assert outline(calm)[1:] == ("UNSET", "FAILURE")
    assert errors(calm) == [f"{__name__}.Expected"]
    assert [outline(span)[1:] for span in traced.named("run/order")] == [("UNSET", "suspended"), ("UNSET", "SUCCESS")]


def test_a_result_that_cannot_be_kept_is_an_error_of_its_step(traced: Traced) -> None:
    """The body has returned, but the step has failed."""
    order(traced.shop, lambda: durable.as_step(object, name="odd")())
    traced.run()
    span = traced.one("step/odd")
    assert outline(span)[1:] == ("ERROR", "FAILURE")
    assert errors(span) == ["celery_durable.exceptions.SerializationError"]


def current_name() -> str:
    return str(getattr(trace.get_current_span(), "name", None))


async def acurrent_name() -> str:
    await asyncio.sleep(0)
    return current_name()


def directly(shop: Inprocess) -> Callable[..., Any]:
    step = durable.as_step(current_name, name="look")
    return lambda: [step(), current_name()]


def atomically(shop: Inprocess) -> Callable[..., Any]:
    step = durable.as_step(current_name, name="look", atomic=True)
    return lambda: [step(), current_name()]


def asynchronously(shop: Inprocess) -> Callable[..., Any]:
    step = durable.as_step(acurrent_name, name="look")
    return lambda: [step(), current_name()]


def in_a_gather(shop: Inprocess) -> Callable[..., Any]:
    steps = [durable.as_step(each, name="look") for each in (current_name, acurrent_name)]
    return lambda: [*durable.gather(*(step.s() for step in steps)), current_name()]


def on_the_loop(shop: Inprocess) -> Callable[..., Any]:
    step = durable.as_step(acurrent_name, name="look")

    async def function() -> list[str]:
        return [*await asyncio.gather(step(), step()), current_name()]

    return function


def off_the_loop(shop: Inprocess) -> Callable[..., Any]:
    step = durable.as_step(current_name, name="look")

    async def function() -> list[str]:
        return [*await durable.agather(step.s(), step.s()), await step.acall(), current_name()]

    return function


@pytest.mark.parametrize(
    "how", [directly, atomically, asynchronously, in_a_gather, on_the_loop, off_the_loop], ids=lambda how: how.__name__
)
def test_the_span_of_a_step_is_current_in_its_body(traced_so: Traced, how: Callable[..., Any]) -> None:
    """Wherever that runs; and that of the attempt between the steps. Spans that are made there are their children."""
    traced, shop = traced_so, traced_so.shop
    seen = []

    class Within(Observer):
        def step_returned(self, workflow_id: str, key: str) -> None:
            seen.append(current_name())

    shop.installation.observers.add(Within())
    function = how(shop)
    if asyncio.iscoroutinefunction(function):
        shop.workflow(function, name="order").apply_async(task_id="w1")
    else:
        order(shop, function)
    *inside, between = traced.run()
    assert inside
    assert set(inside) == {"step/look"}
    assert {between, *seen} == {"run/order"}
    steps = traced.named("step/look")
    assert len(steps) == len(inside)
    assert {traced.parent(span) for span in steps} == {traced.one("run/order")}
    assert {outline(span)[1:] for span in steps} == {("UNSET", "SUCCESS")}
    assert current_name() == "None"


def test_children_are_in_the_trace(traced_so: Traced, charge: Any) -> None:
    """Of their parent's attempt that has started them; and so are steps that were sent away, and what follows in a
    chain.
    """
    traced, shop = traced_so, traced_so.shop

    @shop.workflow(name="pack")
    def pack(value: int, *more: int) -> int:
        return int(charge(value))

    def function() -> int:
        handles = [pack.delay(1), charge.delay(2), *durable.enqueue_many([pack.s(3)])]
        return sum(durable.gather(*handles))

    order(shop, function)
    assert isinstance(traced.run(), Retry)
    children = durable.list_workflows(parent_id="w1", app=shop.app)
    assert len(children) == 3
    for child in children:
        traced.run(child.id)
    assert traced.run() == 6
    assert len(traced.traces()) == 1
    first, _ = traced.named("run/order")
    starts = [span for span in traced.spans if span.name.startswith("apply_async/") and span.parent]
    assert sorted(span.name for span in starts) == [
        "apply_async/celery_durable.step", "apply_async/pack", "apply_async/pack"
    ]  # fmt: skip
    assert {traced.parent(span) for span in starts} == {first}
    for child in children:
        start, run = (span for span in traced.spans if facts(span, "workflow.id", "step.key") == [child.id, None])
        assert traced.parent(run) == start


def test_what_follows_in_a_chain_is_in_the_trace(traced: Traced, charge: Any) -> None:
    """It is sent by Celery's tracer when the attempt is over, and its span isn't."""
    shop = traced.shop

    @shop.workflow(name="pack")
    def pack(value: int) -> int:
        return value

    (pack.s(1).set(task_id="w1") | pack.s()).apply_async()
    assert traced.run() == 1
    (second,) = durable.list_workflows(name="pack", state="ENQUEUED", app=shop.app)
    traced.run(second.id)
    assert len(traced.traces()) == 1
    first_start, first, second_start, second_run = traced.spans
    assert [traced.parent(span) for span in (first, second_start, second_run)] == [first_start, first, second_start]


@pytest.mark.parametrize("within", [False, True], ids=["alone", "in a request"])
def test_a_fork_is_linked(traced_so: Traced, charge: Any, within: bool) -> None:
    """It is another trace, or part of that in which it is made, with a link to the start of what it was forked from."""
    traced = traced_so
    waits(traced.shop, charge)
    traced.run()
    start = traced.one("apply_async/order")
    with traced.tracer.start_as_current_span("POST /fork") if within else nullcontext():
        durable.fork_workflow("w1", from_step="durable.recv", new_id="w2", app=traced.shop.app)
    assert "tracestate" not in traced.headers("w2")
    traced.run("w2")
    fork, run = traced.spans[-2:]
    assert [fork.name, run.name] == ["apply_async/order", "run/order"]
    assert facts(fork, "workflow.id", "workflow.forked_from") == ["w2", "w1"]
    assert [link.context.span_id for link in fork.links] == [start.context.span_id]
    assert fork.context.trace_id == run.context.trace_id != start.context.trace_id
    assert traced.parent(run) == fork
    parent = traced.parent(fork)
    assert (parent and parent.name) == ("POST /fork" if within else None)


def test_a_crash_is_told_by_the_next_attempt(traced_so: Traced, charge: Any) -> None:
    """The span of the attempt that has died never ends."""
    traced = traced_so
    waits(traced.shop, charge)
    for _ in range(2):
        assert crash(traced.shop, begin(traced.shop)) == "ENQUEUED"
    traced.run()
    run = traced.one("run/order")
    assert facts(run, "attempt.number", "attempt.ending") == [3, "suspended"]
    recovered, _ = run.events
    assert (recovered.name, dict(recovered.attributes or {})) == ("recovered", {"celery_durable.attempt.crashes": 2})
    assert len(traced.traces()) == 1


def test_a_workflow_that_was_given_up_is_an_error_in_its_trace(traced: Traced, charge: Any) -> None:
    """No attempt is there to tell of it; whoever delivers the outcome does."""
    order(traced.shop, charge, max_recovery_attempts=0)
    assert crash(traced.shop, begin(traced.shop)) == "DEAD"
    traced.run()
    run = traced.one("run/order")
    assert outline(run)[1:] == ("ERROR", None)
    assert errors(run) == ["celery_durable.exceptions.WorkflowDead"]
    assert len(traced.traces()) == 1


def test_a_hand_over_and_a_resume_stay_in_the_trace(traced_so: Traced, charge: Any) -> None:
    """None of both is an error."""
    traced, shop = traced_so, traced_so.shop
    runs: list[int] = []

    def function() -> Any:
        charge()
        runs.append(len(runs))
        if len(runs) == 1:
            shop.drain()
        charge()
        if len(runs) == 2:
            raise Refused("not yet")
        return "done"

    order(shop, function)
    assert isinstance(traced.run(), Retry)
    node = shop.new_node()
    assert isinstance(traced.run(node=node), Refused)
    durable.resume_workflow("w1", app=shop.app)
    shop.installation.store.workflows.confirm(node, ["w1"], patience=0)
    assert traced.run(node=node) == "done"
    assert [outline(span)[1:] for span in traced.named("run/order")] == [
        ("UNSET", "handed over"), ("ERROR", "FAILURE"), ("UNSET", "SUCCESS")
    ]  # fmt: skip
    assert len(traced.traces()) == 1


def test_a_workflows_error_is_recorded_once(traced_so: Traced, charge: Any) -> None:
    """By whoever has made its span."""
    traced, shop = traced_so, traced_so.shop

    def function() -> None:
        raise Refused("no")

    order(shop, function)
    traced.run()
    run = traced.one("run/order")
    assert outline(run)[1:] == ("ERROR", "FAILURE")
    assert errors(run) == [f"{__name__}.Refused"]


def test_an_error_that_a_workflow_expects(traced: Traced) -> None:
    """By Celery's `throws`: it is recorded, and is no error of the trace."""

    def function() -> None:
        raise Expected("no")

    order(traced.shop, function, throws=(Expected,))
    traced.run()
    run = traced.one("run/order")
    assert outline(run)[1:] == ("UNSET", "FAILURE")
    assert errors(run) == [f"{__name__}.Expected"]


def test_a_workflows_own_retry_stays_in_the_trace(traced_so: Traced, sql: Sql) -> None:
    """It says why, and is no error."""
    traced, shop, runs = traced_so, traced_so.shop, []

    def function() -> str:
        runs.append(1)
        if len(runs) == 1:
            raise Refused("the first time")
        return "done"

    order(shop, function, autoretry_for=(Refused,), default_retry_delay=0, max_retries=2)
    assert isinstance(traced.run(), Retry)
    sql.execute(WAKE)
    assert traced.run(retries=1) == "done"
    first, second = traced.named("run/order")
    assert [outline(span)[1:] for span in (first, second)] == [("UNSET", "retried"), ("UNSET", "SUCCESS")]
    assert f"{__name__}.Refused" in errors(first)
    assert len(traced.traces()) == 1


def test_an_attempt_that_was_overtaken(traced: Traced, sql: Sql) -> None:
    """Its step has run, and nothing is kept of it: the span has an end, and no state."""
    shop = traced.shop

    def lose() -> None:
        sql.execute("UPDATE celery_durable.workflow SET token = gen_random_uuid(), attempt = 2")

    order(shop, lambda: durable.as_step(lose, name="lose")())
    assert isinstance(traced.run(), Ignore)
    assert outline(traced.one("run/order"))[1:] == ("UNSET", "fenced")
    assert outline(traced.one("step/lose"))[1:] == ("UNSET", None)


def test_a_cancellation_is_no_error(traced: Traced) -> None:
    """Neither of the workflow nor of the step that runs on to its end."""
    shop = traced.shop

    def cancel() -> None:
        thread = threading.Thread(target=durable.cancel_workflow, args=("w1",), kwargs={"app": shop.app})
        thread.start()
        thread.join()

    order(shop, lambda: durable.as_step(cancel, name="runs on")())
    assert isinstance(traced.run(), Ignore)
    assert outline(traced.one("run/order"))[1:] == ("UNSET", "CANCELLED")
    assert outline(traced.one("step/runs on"))[1:] == ("UNSET", "SUCCESS")


def test_a_try_that_was_killed_is_told_by_the_next_attempt(traced: Traced, sql: Sql) -> None:
    """Its own span was never exported."""
    shop = traced.shop
    order(shop, lambda: durable.as_step(abs, name="hangs")(-1))
    attempt = begin(shop)
    with running(attempt):
        complete(Call(attempt, StepSpec("hangs"), (-1,), {}).save_try(None))
    sql.execute("UPDATE celery_durable.checkpoint SET overran = true")
    crash(shop, attempt)
    assert isinstance(traced.run(), StepTimeout)
    run = traced.one("run/order")
    step, workflow = (dict(event.attributes or {}) for event in run.events if event.name == "exception")
    assert [each["exception.type"] for each in (step, workflow)] == ["celery_durable.exceptions.StepTimeout"] * 2
    assert step["celery_durable.step.key"] == "hangs"
    assert traced.named("step/hangs") == []


def test_a_try_without_an_outcome_is_not_taken_for_the_next_workflows(traced: Traced, sql: Sql) -> None:
    """This process has lost a workflow in a step; the next one's step of the same name was killed elsewhere."""
    shop = traced.shop

    def lose() -> None:
        sql.execute("UPDATE celery_durable.workflow SET token = gen_random_uuid(), attempt = 2")

    task = order(shop, lambda: durable.as_step(lose, name="hangs")())
    assert isinstance(traced.run(), Ignore)
    task.apply_async(task_id="w2")
    claim = shop.installation.store.workflows.claim("w2", "order", uuid.uuid4(), shop.node, retries=0, patience=0)
    assert claim is not None
    attempt = Attempt.of(shop.installation.engine, "order", claim, boot_time())
    with running(attempt):
        complete(Call(attempt, StepSpec("hangs"), (), {}).save_try(None))
    sql.execute("UPDATE celery_durable.checkpoint SET overran = true")
    crash(shop, attempt)
    assert isinstance(traced.run("w2"), StepTimeout)
    _, run = traced.named("run/order")
    errors = [dict(event.attributes or {}) for event in run.events if event.name == "exception"]
    assert errors[0].get("celery_durable.step.key") == "hangs"


def test_nothing_of_what_a_workflow_works_with_is_in_its_spans(traced_so: Traced) -> None:
    """Arguments, results, messages and events are secrets until somebody says otherwise."""
    traced, shop, secret = traced_so, traced_so.shop, "s3cr3t"

    def function(value: str, *, more: str) -> str:
        child = shop.app.tasks["child"].delay(value)
        durable.send(child.id, value, idempotency_key="1")
        durable.set_event("seen", value)
        return str(durable.as_step(str.upper)(value))

    def child(value: str) -> Any:
        return durable.recv()

    shop.workflow(child, name="child")
    shop.workflow(function, name="order").apply_async((secret,), {"more": secret}, task_id="w1")
    assert traced.run() == secret.upper()
    exported = "".join(span.to_json() for span in traced.spans).lower()
    assert "step/" in exported
    assert secret not in exported


def test_a_trace_that_is_not_sampled_stays_so(shop: Inprocess, charge: Any) -> None:
    """In all attempts: what has decided is in the message."""
    producer, worker = Traced(shop, TracerProvider(sampler=ParentBased(ALWAYS_OFF))), Traced(shop)
    with producer.tracer.start_as_current_span("POST /orders"):
        opentelemetry.install(shop.app, worker.provider)
        waits(shop, charge)
    assert not int(worker.headers()["traceparent"][-2:], 16) & TraceFlags.SAMPLED
    worker.run()
    durable.send("w1", 7, "go", app=shop.app)
    assert worker.run() == [1, 7, 1 + 1]
    assert worker.spans == producer.spans == []


def test_without_a_provider_nothing_is_recorded(shop: Inprocess, charge: Any) -> None:
    """And nothing is added to a message."""
    opentelemetry.install(shop.app)
    traced = Traced(shop)
    waits(shop, charge)
    assert "traceparent" not in traced.headers()
    assert isinstance(traced.run(), Retry)
    assert traced.spans == []


def test_a_provider_that_breaks_touches_no_workflow(
    traced: Traced, charge: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What goes wrong is in the log."""

    class Broken(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            raise RuntimeError("no tracing today")

    traced.provider.add_span_processor(Broken())
    with caplog.at_level(logging.ERROR):
        waits(traced.shop, charge)
        assert isinstance(traced.run(), Retry)
        durable.send("w1", 7, "go", app=traced.shop.app)
        assert traced.run() == [1, 7, 2]
    assert "no tracing today" in caplog.text
    assert current_name() == "None"


class Speechless(Exception):
    """An error that can't be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_an_error_that_cannot_be_shown(traced: Traced) -> None:
    """It isn't recorded, but its span is exported."""

    def fail() -> None:
        raise Speechless

    order(traced.shop, lambda: durable.as_step(fail, name="fail")())
    traced.run()
    assert outline(traced.one("step/fail"))[2] == "FAILURE"
    assert outline(traced.one("run/order"))[2] == "FAILURE"


def test_an_eager_call_in_a_workflow(traced_so: Traced, charge: Any) -> None:
    """It is no attempt, and leaves that in which it is made as it is."""
    traced, shop = traced_so, traced_so.shop

    @shop.workflow(name="inner")
    def inner() -> str:
        return current_name()

    def function() -> list[str]:
        return [inner.apply().get(), charge(current_name())]

    order(shop, function)
    assert traced.run()[1] == "run/order"
    assert traced.parent(traced.one("step/charge")) == traced.one("run/order")
    assert outline(traced.one("run/order"))[2] == "SUCCESS"


def test_a_message_whose_headers_are_no_trace(traced: Traced, charge: Any) -> None:
    """What comes from a broker may be anything."""
    waits(traced.shop, charge)
    for odd in (7, ["00-1"], "nonsense", None):
        assert isinstance(traced.shop.run("w1", traceparent=odd, tracestate=odd, baggage=odd), Retry | Ignore)
    assert traced.named("run/order")[0].parent is None


def test_a_start_that_fails(traced: Traced, charge: Any) -> None:
    """Its span has the error, and is current no longer."""
    waits(traced.shop, charge)

    @traced.shop.workflow(name="other")
    def other() -> None:
        return None

    with pytest.raises(WorkflowConflict):
        other.apply_async(task_id="w1")
    span = traced.one("apply_async/other")
    assert span.status.status_code.name == "ERROR"
    assert errors(span) == ["celery_durable.exceptions.WorkflowConflict"]
    assert current_name() == "None"


def test_starts_in_an_outbox_and_of_many(traced_so: Traced, charge: Any, database_url: str) -> None:
    """Each message has the context of its start."""
    traced, shop = traced_so, traced_so.shop

    @shop.workflow(name="order")
    def task() -> int:
        return 1

    with traced.tracer.start_as_current_span("POST /orders"):
        with psycopg.connect(database_url) as connection, durable.outbox(connection):
            task.apply_async(task_id="w1")
        durable.enqueue_many([task.s().set(task_id=f"w{number}") for number in (2, 3)])
    for workflow_id in ("w1", "w2", "w3"):
        traced.run(workflow_id)
    assert len(traced.traces()) == 1
    assert {traced.parent(run).name for run in traced.named("run/order")} == {"apply_async/order"}  # type: ignore[union-attr]


def test_installed_twice(traced: Traced, charge: Any) -> None:
    """It is as once; and an app without celery_durable is told so."""
    opentelemetry.install(traced.shop.app)
    waits(traced.shop, charge)
    traced.run()
    assert len(traced.spans) == 3
    with closing(Celery("plain", set_as_current=False)) as plain, pytest.raises(NotInstalled):
        opentelemetry.install(plain)


def test_without_the_sdk() -> None:
    """Only OpenTelemetry's API is needed."""
    subprocess.run([sys.executable, "-c", WITHOUT_SDK], cwd=ROOT, check=True, timeout=60)
