"""OpenTelemetry: a workflow is one trace, whatever its worker goes through; a span for each attempt and each try.

The context of a trace is in the headers of the workflow's message, and so is kept with it: what is sent again after a
suspension, a crash or a hand-over continues the same trace. Where OpenTelemetry's own instrumentation of Celery is
active, its spans are those of starts and attempts, and ours are only those of steps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import MutableMapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from celery import Celery, Task, signals
from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.propagate import extract, get_global_textmap, inject
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, TracerProvider

from ..engine.observer import AttemptReport, Observer, StepReport
from ..engine.waiting import StepCall
from ..installation import installed_on
from ..text import summary
from ..version import __version__

_WORKFLOW = "celery_durable.workflow"
_ATTEMPT = "celery_durable.attempt"
_STEP = "celery_durable.step"

_traced: WeakSet[Celery] = WeakSet()


def install(app: Celery, tracer_provider: TracerProvider | None = None) -> None:
    """Trace an app's workflows, from their starts to their ends; calling it again does nothing.

    Call it after ``durable.install()``, where the app is made: what starts workflows needs it as much as what runs
    them. ``tracer_provider``: the global one by default, which may be set later, as in a pool process that is forked.
    Without an SDK nothing is recorded. An error of tracing is logged, and no workflow is touched by it.

    Raises NotInstalled.
    """
    installation = installed_on(app)
    if installation.app not in _traced:
        _traced.add(installation.app)
        installation.observers.add(Tracing(installation.app, tracer_provider))


class _Current:
    """A span that is current from when this is made until it is left."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self._token: Token[Context] | None = context.attach(trace.set_span_in_context(span))

    def leave(self) -> None:
        """Make current again what was before."""
        if self._token is not None:
            context.detach(self._token)
            self._token = None


@dataclass(eq=False)
class _Try:
    """A try of a step whose outcome isn't committed yet."""

    key: str
    current: _Current
    throws: tuple[type[BaseException], ...]
    #: When its body ended, in nanoseconds since the epoch.
    ended_at: int | None = None


@dataclass(eq=False)
class _Running:
    """An attempt in this process."""

    span: Span
    #: None: OpenTelemetry's own instrumentation has made the span, and ends it.
    current: _Current | None = None
    #: The tries of steps that have no outcome yet.
    tries: set[_Try] = field(default_factory=set)
    #: How it has ended; None while that isn't committed.
    ending: str | None = None
    #: Nothing more of it counts.
    is_over: bool = False


# Hooks and Celery's signals are told in the context of the code that they are about, or one that was copied from it: so
# each finds what its predecessor has left, in threads, in greenlets and on the event loop.
_publishing: ContextVar[_Current | None] = ContextVar("celery_durable_publishing", default=None)
_delivery: ContextVar[Token[Context] | None] = ContextVar("celery_durable_delivery", default=None)
_running: ContextVar[_Running | None] = ContextVar("celery_durable_running", default=None)
_try: ContextVar[_Try | None] = ContextVar("celery_durable_try", default=None)


class Tracing(Observer):
    """Makes the spans of one app's workflows."""

    def __init__(self, app: Celery, tracer_provider: TracerProvider | None) -> None:
        self._app = app
        self._tracer = trace.get_tracer("celery_durable", __version__, tracer_provider)
        # Only Celery knows when it has sent what follows a workflow: its links, the rest of its chain.
        signals.task_prerun.connect(self._delivered)
        signals.task_failure.connect(self._failed)
        signals.task_retry.connect(self._retried)
        signals.task_postrun.connect(self._done)

    # A start.

    def publishing(self, workflow_id: str, headers: MutableMapping[str, Any], forked_from: str | None) -> None:
        """Begin the span of a start, and give its context to the message. A fork is linked to what it was forked from,
        and is no part of that one's trace.
        """
        facts = {f"{_WORKFLOW}.id": workflow_id, f"{_WORKFLOW}.name": str(headers["task"])}
        sender = trace.get_current_span(extract(headers, context=Context())).get_span_context()
        if forked_from is None and _celery_is_instrumented():
            span = trace.get_current_span()
            # Of a task that Celery's current app doesn't know, that instrumentation has ended its span by now.
            if span.get_span_context().span_id == sender.span_id:
                span.set_attributes(facts)
            return
        links = []
        if forked_from is not None:
            facts[f"{_WORKFLOW}.forked_from"] = forked_from
            links = [Link(sender)] if sender.is_valid else []
        span = self._tracer.start_span(
            f"apply_async/{headers['task']}", kind=SpanKind.PRODUCER, attributes=facts, links=links
        )
        _publishing.set(_Current(span))
        if span.get_span_context().is_valid:
            for name in get_global_textmap().fields:
                headers.pop(name, None)
            inject(headers)

    def publish_ended(self, workflow_id: str, error: BaseException | None) -> None:
        """End the span of a start."""
        current = _publishing.get()
        if current is None:
            return
        _publishing.set(None)
        current.leave()
        try:
            if error is not None:
                _fail(current.span, error)
        finally:
            current.span.end()

    # An attempt.

    def _delivered(self, task: Any = None, **kwargs: Any) -> None:
        """Continue the trace of a workflow's message."""
        if self._is_ours(task) and not _celery_is_instrumented():
            _delivery.set(context.attach(extract(task.request, getter=_OF_REQUEST)))

    def attempt_started(self, report: AttemptReport) -> None:
        """Begin the span of an attempt, or take the one that is there for it."""
        facts: dict[str, str | int] = {
            f"{_WORKFLOW}.id": report.workflow_id,
            f"{_WORKFLOW}.name": report.name,
            f"{_WORKFLOW}.root_id": report.root_id,
            f"{_ATTEMPT}.number": report.attempt,
        }
        span = trace.get_current_span()
        if _celery_is_instrumented() and span.get_span_context().is_valid:
            span.set_attributes(facts)
            running = _Running(span)
        else:
            span = self._tracer.start_span(f"run/{report.name}", kind=SpanKind.CONSUMER, attributes=facts)
            running = _Running(span, _Current(span))
        if report.crashes:
            span.add_event("recovered", {f"{_ATTEMPT}.crashes": report.crashes})
        _running.set(running)

    def suspended(self, workflow_id: str, reason: str) -> None:
        """Say what the workflow waits for."""
        if (running := _running.get()) is not None:
            running.span.add_event("suspended", {f"{_WORKFLOW}.waiting_for": reason})

    def attempt_ended(self, report: AttemptReport, ending: str) -> None:
        """Say how the attempt has ended."""
        if (running := _running.get()) is not None:
            running.ending = ending
            running.span.set_attribute(f"{_ATTEMPT}.ending", ending)

    def _failed(self, sender: Any = None, exception: Any = None, task_id: str = "", **kwargs: Any) -> None:
        """Record the error of a workflow. One that was given up for its crashes has no attempt to tell of it."""
        running = _running.get()
        if not self._is_ours(sender) or (running is None and _celery_is_instrumented()):
            return
        expected = tuple(sender.throws or ())
        if running is None:
            facts = {f"{_WORKFLOW}.id": task_id, f"{_WORKFLOW}.name": sender.name}
            with self._tracer.start_as_current_span(
                f"run/{sender.name}", kind=SpanKind.CONSUMER, attributes=facts
            ) as span:
                _record(span, exception, expected)
        elif running.current is not None:
            _record(running.span, exception, expected)

    def _retried(self, sender: Any = None, reason: Any = None, **kwargs: Any) -> None:
        """Record why a whole workflow is retried, which Celery's signal says of suspensions, too."""
        running, error = _running.get(), getattr(reason, "exc", None)
        if self._is_ours(sender) and running is not None and running.ending == "retried" and error is not None:
            running.span.record_exception(error)

    def _done(self, task: Any = None, **kwargs: Any) -> None:
        """End the span of the attempt, if it is ours, and forget the trace."""
        if not self._is_ours(task):
            return
        running, delivery = _running.get(), _delivery.get()
        for left in (_running, _delivery, _try):
            left.set(None)
        if running is not None:
            running.is_over = True
            for each in list(running.tries):
                _abandon(each)
            if running.current is not None:
                running.current.leave()
                running.span.end()
        if delivery is not None:
            context.detach(delivery)

    def _is_ours(self, task: Any) -> bool:
        """Tell whether a message of one of the app's workflows is being worked on, and no eager call."""
        is_workflow = isinstance(task, Task) and getattr(task, "is_durable_workflow", False)
        return is_workflow and task.app is self._app and not task.request.is_eager

    # A try of a step.

    def body_starting(self, workflow_id: str, key: str, call: StepCall) -> None:
        """Begin the span of a try, in which its body runs."""
        span = self._tracer.start_span(
            f"step/{call.spec.name}",
            attributes={
                f"{_WORKFLOW}.id": workflow_id,
                f"{_WORKFLOW}.name": call.attempt.name,
                f"{_ATTEMPT}.number": call.attempt.fence.attempt,
                f"{_STEP}.name": call.spec.name,
                f"{_STEP}.key": key,
                f"{_STEP}.try": call.step.attempt,
            },
        )
        begun = _Try(key, _Current(span), call.spec.throws)
        _try.set(begun)
        if (running := _running.get()) is not None:
            running.tries.add(begun)

    def body_ended(self, workflow_id: str, key: str) -> None:
        """Let the span of a try be current no longer; it ends here, whenever its outcome is committed."""
        tried = _try.get()
        if tried is None:
            return
        tried.current.leave()
        tried.ended_at = time.time_ns()
        if (running := _running.get()) is not None and running.is_over:
            _abandon(tried)

    def step_ended(self, report: StepReport) -> None:
        """End the span of a try as the try has ended. One that was killed left none: its error is the attempt's."""
        tried, running = _try.get(), _running.get()
        if tried is None or tried.key != report.key:
            if report.error is not None and running is not None:
                running.span.record_exception(report.error, {f"{_STEP}.key": report.key})
            return
        _try.set(None)
        if running is not None:
            running.tries.discard(tried)
        span = tried.current.span
        span.set_attribute(f"{_STEP}.state", report.state)
        try:
            if report.error is not None:
                _record(span, report.error, (Exception,) if report.state == "RETRY" else tried.throws)
        finally:
            span.end(tried.ended_at)


def _abandon(tried: _Try) -> None:
    """End the span of a try whose outcome isn't kept, unless its body still runs."""
    if tried.ended_at is not None:
        tried.current.span.end(tried.ended_at)


def _record(span: Span, error: BaseException, expected: tuple[type[BaseException], ...]) -> None:
    """Record an error; one that its author expects is none of the span's."""
    if isinstance(error, expected):
        span.record_exception(error)
    else:
        _fail(span, error)


def _fail(span: Span, error: BaseException) -> None:
    span.record_exception(error)
    span.set_status(Status(StatusCode.ERROR, summary(error)))


def _celery_is_instrumented() -> bool:
    """Tell whether OpenTelemetry's own instrumentation of Celery makes spans in this process."""
    module = sys.modules.get("opentelemetry.instrumentation.celery")
    return module is not None and bool(module.CeleryInstrumentor().is_instrumented_by_opentelemetry)


class _OfRequest(Getter[Any]):
    """Reads the headers of a message from Celery's request; what isn't text isn't ours."""

    def get(self, carrier: Any, key: str) -> list[str] | None:
        value = getattr(carrier, key, None)
        return [value] if isinstance(value, str) else None

    def keys(self, carrier: Any) -> list[str]:
        return []


_OF_REQUEST = _OfRequest()
