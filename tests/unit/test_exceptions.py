"""The error tree: what can be caught as what, and what a message says."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from kombu.exceptions import EncodeError, OperationalError

from celery_durable import exceptions
from celery_durable.exceptions import ControlFlow, DurableError, StepError, StepTimeout, Suspended


def declared() -> list[type[BaseException]]:
    return [
        each
        for each in vars(exceptions).values()
        if isinstance(each, type) and issubclass(each, BaseException) and each.__module__ == exceptions.__name__
    ]


def test_the_drawing_shows_every_class_under_its_base() -> None:
    """The tree in the module's docstring is the tree of the classes."""
    drawn = re.findall(r"^    ( *)(\w+)", exceptions.__doc__ or "", re.MULTILINE)
    parents: dict[int, str] = {}
    found = {}
    for indent, name in drawn:
        parents[len(indent)] = name
        found[name] = parents.get(len(indent) - 2)
    assert set(found) == {each.__name__ for each in declared()}
    for name, parent in found.items():
        if parent is not None and name != "StepTimeout":
            assert issubclass(getattr(exceptions, name), getattr(exceptions, parent)), name


@pytest.mark.parametrize("cls", [each for each in declared() if issubclass(each, ControlFlow)])
def test_control_flow_passes_except_exception(cls: type[BaseException]) -> None:
    """A body's `except Exception` can't swallow what unwinds it."""
    assert not issubclass(cls, Exception)


@pytest.mark.parametrize("cls", [each for each in declared() if issubclass(each, DurableError)])
def test_every_error_says_something_without_arguments(cls: type[Any]) -> None:
    """The class docstring is the default message."""
    assert str(cls()).strip() if cls is not StepError else cls().args


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (exceptions.DatabaseUnavailable, OperationalError),
        (exceptions.SerializationError, EncodeError),
        (exceptions.SerializationError, ValueError),
        (exceptions.PayloadTooLarge, ValueError),
        (exceptions.WorkflowNotFound, LookupError),
        (exceptions.NotInstalled, exceptions.ConfigurationError),
        (exceptions.SchemaVersionError, exceptions.ConfigurationError),
        (StepTimeout, SoftTimeLimitExceeded),
        (StepTimeout, TimeoutError),
    ],
)
def test_handlers_that_exist_already_catch_ours(ours: type[BaseException], theirs: type[BaseException]) -> None:
    """Code written for Celery and kombu needs no new except clause."""
    assert issubclass(ours, theirs)


def test_a_step_error_keeps_what_it_stands_for() -> None:
    """It survives pickling, as Celery's pools need it to."""
    error = pickle.loads(pickle.dumps(StepError("no money", "shop.Refused", "Traceback …")))
    assert str(error) == "shop.Refused: no money"
    assert (error.type_name, error.traceback_text) == ("shop.Refused", "Traceback …")


def test_a_timeout_reads_as_its_message() -> None:
    """Celery's own class would print itself around it."""
    assert str(StepTimeout("The step took too long")) == "The step took too long"


def test_a_suspension_says_why_and_how_long() -> None:
    """The reason becomes the workflow's waiting_for."""
    assert (Suspended("retry", 3.0).reason, Suspended("retry", 3.0).seconds) == ("retry", 3.0)
