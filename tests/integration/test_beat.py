"""Workflows that beat starts: one for an entry and a tick, however many beats there are."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from celery import signals
from celery.beat import Scheduler, Service
from celery.schedules import BaseSchedule, crontab

import celery_durable as durable
from celery_durable import beat
from celery_durable.beat import _watch
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.inprocess import Inprocess

pytestmark = pytest.mark.oldest

HOUR = 3600.0
#: In the middle of an hour, and of a minute.
NOON = 500_000 * HOUR + 1830.0


class Clock:
    """The time of the beats."""

    def __init__(self) -> None:
        self.now = NOON

    def time(self) -> float:
        return self.now


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """One database for all of these tests, which is cheaper."""
    return emptied_database_url


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    shop = Inprocess(database_url, broker_url)
    yield shop
    shop.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(beat, "time", clock)
    return clock


@pytest.fixture
def nightly(shop: Inprocess) -> Any:
    """A workflow that says its number."""

    @shop.workflow(name="nightly")
    def nightly(number: int = 0) -> int:
        return number

    return nightly


def scheduler(shop: Inprocess, schedule: Any = timedelta(hours=1), **entry: Any) -> Scheduler:
    """A beat of its own, with one entry."""
    made = Scheduler(shop.app, lazy=True)
    made.add(**{"name": "every night", "task": "nightly", "schedule": schedule, **entry})
    _watch(SimpleNamespace(scheduler=made))
    return made


def fire(made: Scheduler) -> str:
    """Send the entry as a tick of the beat does; the id of what it has started."""
    (entry,) = made.schedule.values()
    made.reserve(entry)
    return str(made.apply_async(entry, producer=made.producer, advance=False).id)


def started(shop: Inprocess, name: str = "nightly") -> list[str]:
    return [each.id for each in durable.list_workflows(name=name, app=shop.app)]


class Moonrise(BaseSchedule):
    """Neither an interval nor a crontab: each day at about 5:25, to the microsecond of when it is asked."""

    def __repr__(self) -> str:
        return "moonrise"

    def remaining_estimate(self, last_run_at: datetime) -> timedelta:
        rise = last_run_at.replace(hour=5, minute=25, second=30)
        return (rise if rise > last_run_at else rise + timedelta(days=1)) - self.now()


class Unpredictable(BaseSchedule):
    """A schedule that can't be asked."""


@pytest.mark.parametrize("later", [20, 65, 5 * HOUR])
@pytest.mark.parametrize(
    "schedule",
    [
        timedelta(days=1),
        crontab(hour=3, minute=0),
        crontab(hour="3"),
        crontab(minute=5, hour=0, day_of_month=1),
        crontab(minute=0, hour=12, day_of_month=29, month_of_year=2),
        Moonrise(),
    ],
    ids=repr,
)
def test_two_beats_start_one_workflow(shop: Inprocess, nightly: Any, clock: Clock, schedule: Any, later: float) -> None:
    """Also if the second one is late, or was restarted and catches up: both come to the same id."""
    first, second = scheduler(shop, schedule), scheduler(shop, schedule)
    one = fire(first)
    clock.now += later
    assert fire(second) == one
    assert started(shop) == [one]
    assert shop.run(one) == 0


def test_a_schedule_that_does_not_say_when_it_is_due(shop: Inprocess, nightly: Any, clock: Clock) -> None:
    """Has the minute for a tick: what starts it at all starts it once."""
    beats = [scheduler(shop, Unpredictable()) for _ in range(2)]
    assert len({fire(each) for each in beats}) == 1


def test_a_tick_is_due_by_the_time_of_the_schedule(shop: Inprocess, nightly: Any, clock: Clock) -> None:
    """In its time zone 14:15 is 8:30 in UTC, half a minute ago: a day long that is its tick."""
    there = crontab(hour=14, minute=15)
    there.tz = ZoneInfo("Asia/Kathmandu")  # as django-celery-beat has it
    daily = scheduler(shop, there)
    first = fire(daily)
    clock.now += 24 * HOUR - 31
    assert fire(daily) == first
    clock.now += 1
    assert fire(daily) != first


def test_the_next_tick_starts_another_one(shop: Inprocess, nightly: Any, clock: Clock) -> None:
    """Again one of both beats'."""
    beats = [scheduler(shop), scheduler(shop)]
    first = {fire(each) for each in beats}
    clock.now += HOUR
    second = {fire(each) for each in beats}
    assert (len(first), len(second)) == (1, 1)
    assert set(started(shop)) == first | second
    assert len(first | second) == 2


def test_the_next_minute_of_a_crontab_starts_another_one(shop: Inprocess, nightly: Any, clock: Clock) -> None:
    """A crontab's tick is a minute."""
    every_minute = scheduler(shop, crontab())
    first = fire(every_minute)
    clock.now += 60
    assert fire(every_minute) != first
    assert len(started(shop)) == 2


def test_entries_are_told_apart_by_their_names(shop: Inprocess, nightly: Any, clock: Clock) -> None:
    """Two entries of one task start two workflows."""
    one, two = scheduler(shop, name="one"), scheduler(shop, name="two")
    assert fire(one) != fire(two)


def test_a_beat_that_starts_all_entries_by_itself(shop: Inprocess, nightly: Any, clock: Clock) -> None:
    """`Scheduler.apply_async` as others call it, who leave the count of its runs to it: each tick starts one."""
    hourly = scheduler(shop)
    ids = []
    for _ in range(3):
        ids.append(str(hourly.apply_async(hourly.schedule["every night"]).id))
        clock.now += HOUR
    assert len(set(ids)) == 3
    assert hourly.schedule["every night"].options == {}


def test_celerys_own_beat_starts_a_workflow(shop: Inprocess, nightly: Any) -> None:
    """The whole way, from the schedule of the app to a workflow with its arguments: beat tells us that it begins."""
    shop.app.conf.beat_schedule = {"often": {"task": "nightly", "schedule": timedelta(milliseconds=1), "args": (7,)}}
    services = [Service(shop.app, scheduler_cls=Scheduler) for _ in range(2)]
    for service in services:
        signals.beat_init.send(sender=service)
        assert "apply_async" in vars(service.scheduler)
    wait_until(lambda: services[0].scheduler.tick() is not None and started(shop), message="beat has started one")
    assert shop.run(started(shop)[0]) == 7


def test_an_entry_is_as_it_was(shop: Inprocess, nightly: Any, clock: Clock) -> None:
    """Its options are the user's: the id isn't kept in them, whether the start succeeds or fails."""
    hourly = scheduler(shop, options={"priority": 3})
    fire(hourly)
    assert hourly.schedule["every night"].options == {"priority": 3}


def test_options_of_an_entry_count(shop: Inprocess, nightly: Any, clock: Clock) -> None:
    """Such as the queue."""
    workflow_id = fire(scheduler(shop, options={"queue": "night"}))
    assert durable.get_workflow_status(workflow_id, app=shop.app).queue == "night"


def test_an_id_of_the_users_counts(shop: Inprocess, nightly: Any, clock: Clock) -> None:
    """Who names the workflow in the entry means one for all ticks."""
    hourly = scheduler(shop, options={"task_id": "only-one"})
    assert fire(hourly) == "only-one"
    clock.now += HOUR
    assert fire(hourly) == "only-one"
    assert started(shop) == ["only-one"]


def test_the_entry_of_a_plain_task_is_untouched(shop: Inprocess, clock: Clock) -> None:
    """Two beats send it twice, as Celery has it."""

    @shop.app.task(name="plain", shared=False)
    def plain() -> None: ...

    first, second = scheduler(shop, task="plain"), scheduler(shop, task="plain")
    assert fire(first) != fire(second)
    assert started(shop, "plain") == []


def test_a_task_that_the_beat_does_not_know_has_one_id_a_tick(shop: Inprocess, clock: Clock) -> None:
    """A beat needn't have imported all tasks; it sends those by name, and a worker may know it for a workflow."""
    first, second = scheduler(shop, task="elsewhere"), scheduler(shop, task="elsewhere")
    assert fire(first) == fire(second)
