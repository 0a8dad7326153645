"""The fields of log records: where they come from, and what stands for nothing."""

from __future__ import annotations

import io
import json
import logging
import logging.config
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

import celery_durable as durable
from celery_durable.engine.context import RunningStep, running, running_step
from celery_durable.logs import FIELDS, WorkflowFilter, about, add_workflow, watch_celery

FORMAT = "%(workflow_id)s %(workflow_name)s %(attempt)s %(step)s: %(message)s"
NOTHING = ("-", "-", "-", "-")


class Unequal:
    """As an array of numpy: its comparisons have no truth."""

    def __eq__(self, other: object) -> Any:
        raise ValueError("ambiguous")

    __hash__ = object.__hash__


@contextmanager
def in_workflow(workflow_id: str = "order-7", attempt: int = 2) -> Iterator[None]:
    """Be the function of a workflow."""
    fence = SimpleNamespace(attempt=attempt)
    with running(SimpleNamespace(id=workflow_id, name="shop.order", fence=fence, root=None)):  # type: ignore[arg-type]
        yield


def step(key: str = "shop.charge#2") -> RunningStep:
    """A step whose body runs."""
    return RunningStep("shop.charge", key, "key")


def record(filter: WorkflowFilter | None = None, **extra: Any) -> logging.LogRecord:
    """A record that has passed a filter."""
    made = logging.getLogger("shop").makeRecord("shop", logging.INFO, "shop.py", 1, "It is so.", (), None, extra=extra)
    assert (filter or WorkflowFilter()).filter(made)
    return made


def fields(made: logging.LogRecord) -> tuple[Any, ...]:
    """What a record says of its workflow."""
    return tuple(getattr(made, name) for name in FIELDS)


def test_outside_there_is_a_dash() -> None:
    """Every format string finds its fields, and says that there is nothing."""
    made = record()
    assert fields(made) == NOTHING
    assert logging.Formatter(FORMAT).format(made) == "- - - -: It is so."


def test_json_has_null_where_it_is_wanted() -> None:
    """A field of numbers stays one."""
    made = record(WorkflowFilter(outside=None))
    assert json.dumps({name: getattr(made, name) for name in FIELDS}) == (
        '{"workflow_id": null, "workflow_name": null, "attempt": null, "step": null}'
    )


def test_a_function_and_its_step() -> None:
    """The step is there for as long as its body runs."""
    with in_workflow():
        assert fields(record()) == ("order-7", "shop.order", 2, "-")
        with running_step(step()):
            assert fields(record()) == ("order-7", "shop.order", 2, "shop.charge#2")
        assert fields(record()) == ("order-7", "shop.order", 2, "-")


def test_around_the_function() -> None:
    """A delivery knows its workflow before and after the function runs."""
    with about("order-7", "shop.order") as subject:
        assert fields(record()) == ("order-7", "shop.order", "-", "-")
        subject["attempt"] = 3
        assert fields(record()) == ("order-7", "shop.order", 3, "-")
        with in_workflow(attempt=3), running_step(step()):
            assert fields(record()) == ("order-7", "shop.order", 3, "shop.charge#2")
    assert fields(record()) == NOTHING


def test_what_a_line_names_itself_stays() -> None:
    """The node tells of workflows that run elsewhere; a workflow tells of another one."""
    assert fields(record(workflow_id="order-8")) == ("order-8", "-", "-", "-")
    with in_workflow():
        assert fields(record(workflow_id="order-8")) == ("order-8", "-", "-", "-")
        assert fields(record(workflow_id="order-7")) == ("order-7", "shop.order", 2, "-")
        assert fields(record(step="mine")) == ("order-7", "shop.order", 2, "mine")


def test_handlers_may_differ() -> None:
    """A record goes through the filters of all handlers, and each has its own idea of nothing."""
    dash, null = WorkflowFilter(), WorkflowFilter(outside=None)
    made = record(dash)
    null.filter(made)
    assert fields(made) == (None, None, None, None)
    dash.filter(made)
    assert fields(made) == NOTHING


def test_odd_values_break_no_line() -> None:
    """What a record was given by somebody else can be anything."""
    odd = Unequal()
    assert record(step=odd, workflow_id=7).step is odd  # type: ignore[attr-defined]
    assert record(workflow_id=odd).workflow_name == "-"  # type: ignore[attr-defined]


def test_a_thread_of_the_codes_own_belongs_to_none() -> None:
    """Contexts aren't inherited by threads; what gather makes has a copy of its own."""
    seen: list[tuple[Any, ...]] = []
    with in_workflow(), running_step(step()):
        thread = Thread(target=lambda: seen.append(fields(record())))
        thread.start()
        thread.join()
    assert seen == [NOTHING]


def test_an_event_of_structlog() -> None:
    """Only what applies is added, and nothing is replaced."""
    assert add_workflow(None, "info", {"event": "paid"}) == {"event": "paid"}
    with in_workflow(), running_step(step()):
        assert add_workflow(None, "info", {"event": "paid", "attempt": 9}) == {
            "event": "paid", "workflow_id": "order-7", "workflow_name": "shop.order", "attempt": 9,
            "step": "shop.charge#2",
        }  # fmt: skip


@pytest.fixture
def untouched_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Celery's set-up, undone afterwards."""
    names = (None, "celery", "celery.task", "celery.redirected", "shop")
    loggers = [logging.getLogger(name) for name in names]
    before = [(each.handlers[:], each.level, each.propagate) for each in loggers]
    monkeypatch.setattr("celery.app.log.Logging._setup", False)
    yield
    for each, (handlers, level, propagate) in zip(loggers, before, strict=True):
        each.handlers, each.propagate = handlers, propagate
        each.setLevel(level)


@pytest.mark.usefixtures("untouched_logging")
def test_celerys_formats_may_name_the_fields() -> None:
    """Installing is enough, however often; the worker's own lines and those of tasks have them."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.update(worker_log_format=f"worker {FORMAT}", worker_task_log_format=f"task {FORMAT}")
    durable.install(app, database_url="postgresql://localhost/shop")
    watch_celery()
    logging.getLogger().handlers, stream = [], io.StringIO()
    app.log.setup_logging_subsystem(loglevel="INFO", logfile=stream)
    for logger in (logging.getLogger(), logging.getLogger("celery.task")):
        assert [type(each) for each in logger.handlers[0].filters] == [WorkflowFilter]
    with in_workflow(), running_step(step()):
        logging.getLogger("shop").info("paid")
        logging.getLogger("celery.task.shop").info("paid")
    logging.getLogger("celery_durable").warning("late", extra={"workflow_id": "order-8"})
    assert stream.getvalue().splitlines() == [
        "worker order-7 shop.order 2 shop.charge#2: paid",
        "task order-7 shop.order 2 shop.charge#2: paid",
        "worker order-8 - - -: late",
    ]


@pytest.mark.usefixtures("untouched_logging")
def test_a_dict_config_may_name_the_filter(capsys: pytest.CaptureFixture[str]) -> None:
    """As Django's LOGGING has it."""
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "filters": {"workflow": {"()": "celery_durable.logs.WorkflowFilter", "outside": "none"}},
            "formatters": {"plain": {"format": FORMAT}},
            "handlers": {
                "console": {
                    "class": "logging.StreamHandler",
                    "filters": ["workflow"],
                    "formatter": "plain",
                    "stream": "ext://sys.stdout",
                }
            },
            "loggers": {"shop": {"handlers": ["console"], "level": "INFO", "propagate": False}},
        }
    )
    logging.getLogger("shop").info("open")
    with in_workflow():
        logging.getLogger("shop").info("ordered")
    assert capsys.readouterr().out == "none none none none: open\norder-7 shop.order 2 none: ordered\n"
