"""The seam to watch the engine: every hook reaches every observer, and none can break the engine."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest

from celery_durable.engine.observer import HOOKS, AttemptReport, Observer, Observers
from celery_durable.monitoring import LogObserver


class Recorder(Observer):
    def __init__(self) -> None:
        self.heard: list[tuple[str, tuple[Any, ...]]] = []

    def __getattribute__(self, name: str) -> Any:
        if name in HOOKS:
            return lambda *facts: self.heard.append((name, facts))
        return super().__getattribute__(name)


class Broken(Observer):
    def claimed(self, workflow_id: str, attempt: int) -> None:
        raise RuntimeError("broken watcher")


def facts_for(hook: str) -> list[Any]:
    attempt = AttemptReport("w1", "w1", "shop.order", 1, "w1@host", 0.5)
    examples = {"attempt": 1, "workflow_ids": ["w1"], "error": ValueError("x"), "report": attempt}
    names = list(inspect.signature(getattr(Observer, hook)).parameters)[1:]
    return [examples.get(name, name) for name in names]


def test_the_hooks_are_the_methods_in_order() -> None:
    """Crash tests take their list from here."""
    assert HOOKS[0] == "publishing"
    assert {name for name, _ in inspect.getmembers(Observer, inspect.isfunction)} == set(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_observer_hears_every_hook(hook: str) -> None:
    """With the same facts, one after the other."""
    observers, first, second = Observers(), Recorder(), Recorder()
    observers.add(first)
    observers.add(Observer())
    observers.add(second)
    facts = facts_for(hook)
    observers.tell(hook, *facts)
    assert first.heard == second.heard == [(hook, tuple(facts))]


def test_a_broken_observer_is_logged_and_the_others_hear(caplog: pytest.LogCaptureFixture) -> None:
    """A watcher is never fatal."""
    observers, recorder = Observers(), Recorder()
    observers.add(Broken())
    observers.add(recorder)
    observers.tell("claimed", "w1", 1)
    assert recorder.heard == [("claimed", ("w1", 1))]
    assert "broken watcher" in caplog.text


@pytest.mark.parametrize("hook", HOOKS)
def test_the_log_takes_every_hook(hook: str, caplog: pytest.LogCaptureFixture) -> None:
    """No log line breaks on its own facts."""
    observers = Observers()
    observers.add(LogObserver())
    with caplog.at_level(logging.DEBUG):
        observers.tell(hook, *facts_for(hook))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_first_attempt_is_no_news_but_a_second_is(caplog: pytest.LogCaptureFixture) -> None:
    """At INFO an operator sees what is worth a look."""
    log = LogObserver()
    with caplog.at_level(logging.INFO, "celery_durable"):
        log.claimed("w1", 1)
        assert not caplog.records
        log.claimed("w1", 2)
    assert "attempt 2" in caplog.text
