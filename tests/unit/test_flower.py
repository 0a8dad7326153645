"""The tab in Flower without a Flower: its axis of time, its picture, its words, and how it is installed."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, fromstring

import pytest

from celery_durable.client import Omitted, WorkflowStatus
from celery_durable.errors import TryError
from celery_durable.exceptions import SerializationError
from celery_durable.flower import shown
from celery_durable.flower.axis import Axis
from celery_durable.flower.drawing import HEAD, ROW, Picture, Row, draw
from celery_durable.flower.parts import Links
from celery_durable.flower.reads import Seen
from celery_durable.flower.story import MOST_LANES, Story
from celery_durable.flower.templating import with_tab
from celery_durable.history import AttemptInfo, MessageInfo, StepInfo
from celery_durable.timeline import Bar, Lane

START = datetime(2026, 11, 28, 9, 20, 3, tzinfo=timezone.utc)
DAY = 86400
EVIL = "\"'</svg></title><script>alert(1)</script>&amp;"


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def bar(kind: str, start: float, end: float, state: str | None = None, label: str = "") -> Bar:
    return Bar(kind, at(start), at(end), state, label)


def lane(key: str, *bars: Bar, state: str = "SUCCESS") -> Lane:
    return Lane(key, key, state, bars)


def drawn(*rows: tuple[int, Lane], end: float) -> Picture:
    return draw([Row(each, depth) for depth, each in rows], START, at(end), timezone.utc)


def elements(svg: str, kind: str) -> list[Element]:
    return [each for each in fromstring(svg).iter() if kind in each.get("class", "").split()]


def left(element: Element) -> float:
    return float(element.attrib["x"].rstrip("%"))


def width(element: Element) -> float:
    return float(element.attrib["width"].rstrip("%"))


class TestAxis:
    def test_time_goes_on_evenly(self) -> None:
        """Without long idle spans a place is a share of the time."""
        axis = Axis(10, [(0, 4), (6, 10)])
        assert [axis.at(time) for time in (0, 2.5, 5, 10)] == pytest.approx([0, 25, 50, 100])
        assert axis.folds == []

    def test_a_long_idle_span_is_folded(self) -> None:
        """Steps of ten milliseconds beside a sleep of three days are as wide as if it weren't there."""
        axis = Axis(3 * DAY, [(0, 0.01), (0.01, 0.02), (3 * DAY - 0.01, 3 * DAY)])
        (fold,) = axis.folds
        assert fold.end - fold.start == pytest.approx(3 * DAY - 0.03)
        assert axis.at(0.01) - axis.at(0) > 25
        assert fold.right - fold.left < 10

    def test_what_runs_is_never_folded(self) -> None:
        """However long it does."""
        assert Axis(3 * DAY, [(0, 0.01), (0.02, 3 * DAY)]).folds == []

    def test_many_waits(self) -> None:
        """A hundred sleeps leave more than half of the width to what runs."""
        axis = Axis(100 * 3600, [(hour * 3600, hour * 3600 + 0.01) for hour in range(100)])
        assert len(axis.folds) == 100
        assert sum(fold.right - fold.left for fold in axis.folds) == pytest.approx(45)

    def test_every_part_is_seen(self) -> None:
        """One that is short beside another one isn't a hair."""
        axis = Axis(DAY + 100, [(0, 0.01), (DAY, DAY + 100)])
        assert axis.parts[0].right - axis.parts[0].left > 10

    @pytest.mark.parametrize("busy", [[], [(0.0, 0.0)], [(3.0, 3.0)], [(0, 10)], [(0, 2), (1, 3), (1, 1)], [(0, 1e-9)]])
    @pytest.mark.parametrize("end", [0.0, 10.0, 1e9])
    def test_any_time_has_a_place(self, end: float, busy: list[tuple[float, float]]) -> None:
        """From left to right in order, also at the edges and beyond them."""
        axis = Axis(end, [(start, min(stop, end)) for start, stop in busy if start <= end])
        places = [axis.at(end * share) for share in (-1, 0, 0.1, 0.3, 0.5, 0.9, 1, 2)]
        assert places == sorted(places)
        assert places[0] == 0
        assert places[-1] == pytest.approx(100) or end == 0

    @pytest.mark.parametrize("end", [1e-5, 0.02, 1, 59, 3600, 90_000, 1e8])
    def test_ticks_are_few_and_round(self, end: float) -> None:
        """At most ten, whatever the length, and not upon each other."""
        ticks = list(Axis(end, [(0, end)]).ticks())
        assert 2 <= len(ticks) <= 11
        assert all(after.left - before.left > 8 for before, after in pairwise(ticks))


class TestDrawing:
    def test_a_life(self) -> None:
        """A bar a try, waits, the states of the workflow, and marks at a crash and a hand-over."""
        own = lane(
            "", bar("queued", 0, 1), bar("running", 1, 5, "crashed"), bar("crash", 5, 5, "crashed"),
            bar("running", 6, 8), bar("hand-over", 8, 8), bar("suspended", 8, 9),
        )  # fmt: skip
        step = lane("charge", bar("try", 1, 2, "RETRY"), bar("wait", 2, 4), bar("try", 4, 5, "SUCCESS"))
        picture = drawn((0, own), (1, step), end=9)
        assert [len(elements(picture.body, kind)) for kind in ("running", "queued", "suspended", "wait")] == [
            2,
            1,
            1,
            1,
        ]
        assert [len(elements(picture.body, kind)) for kind in ("retry", "success", "crash", "hand-over")] == [
            1,
            1,
            1,
            1,
        ]
        (crash,) = elements(picture.body, "crash")
        assert [each.text for each in crash.iter("text")] == ["✕"]
        assert picture.kinds == (
            "crash", "hand-over", "queued", "running", "suspended", "try-retry", "try-success", "wait",
        )  # fmt: skip
        assert fromstring(picture.body).get("height") == str(2 * ROW)
        assert fromstring(picture.head).get("height") == str(HEAD)

    def test_places_and_lengths(self) -> None:
        """A bar is where its time is."""
        picture = drawn((0, lane("", bar("running", 0, 10))), (1, lane("a", bar("try", 5, 10, "SUCCESS"))), end=10)
        (tried,) = elements(picture.body, "try")
        assert (left(tried), width(tried)) == pytest.approx((50, 50))

    def test_no_bar_is_too_short_to_be_seen(self) -> None:
        """It has a width, and the style sheet draws a line around it."""
        picture = drawn((0, lane("", bar("running", 0, DAY))), (1, lane("a", bar("try", 1, 1, "SUCCESS"))), end=DAY)
        (tried,) = elements(picture.body, "try")
        assert width(tried) > 0

    def test_a_wait_in_place_is_idle(self) -> None:
        """While the workflow has its worker and only waits, the time is folded; else it isn't."""
        own = lane("", bar("running", 0, 100))
        steps = [lane("a", bar("try", 0, 1, "RETRY"), bar("wait", 1, 99), bar("try", 99, 100, "SUCCESS"))]
        assert len(elements(drawn((0, own), (1, steps[0]), end=100).body, "fold")) == 1
        assert elements(drawn((0, own), end=100).body, "fold") == []

    def test_a_child_that_runs_is_not_idle(self) -> None:
        """However long its parent waits for it."""
        own = lane("", bar("running", 0, 1), bar("suspended", 1, 100))
        child = lane("child.delay", bar("try", 0.5, 0.5, "SUCCESS"), bar("running", 1, 100))
        assert elements(drawn((0, own), (1, child), end=100).body, "fold") == []

    def test_any_text_is_text(self) -> None:
        """Names and labels with markup in them make no elements."""
        own = lane(EVIL, bar("running", 0, 1, EVIL, EVIL), bar("crash", 1, 1, EVIL, EVIL))
        picture = drawn((0, own), (1, lane(EVIL, bar("try", 0, 1, EVIL, EVIL))), end=1)
        assert not list(fromstring(picture.body).iter("script"))
        assert EVIL in "".join(fromstring(picture.body).itertext())
        assert "<script" not in picture.body + picture.head

    def test_odd_kinds_and_times(self) -> None:
        """A bar that ends before it begins, or of a kind that nobody knows, harms nothing."""
        odd = lane("a", bar("try", 5, 3), bar("try", -5, 50, "SUCCESS"), bar("nap", 1, 2), bar("wait", 9, 8))
        picture = drawn((0, lane("", bar("queued", 0, 4))), (1, odd), end=4)
        assert all(0 <= left(each) <= 100 for each in elements(picture.body, "bar"))

    def test_days_are_told_where_there_are_several(self) -> None:
        """Clock times stand at the start of each part."""
        bars = [bar("running", 0, 1), bar("suspended", 1, 3 * DAY), bar("running", 3 * DAY, 3 * DAY + 1)]
        clocks = [each.text for each in elements(drawn((0, lane("", *bars)), end=3 * DAY + 1).head, "clock")]
        assert clocks == ["Nov 28 09:20:03", "Dec 01 09:20:03"]
        lengths = [each.text for each in elements(drawn((0, lane("", *bars)), end=3 * DAY + 1).head, "length")]
        assert lengths == ["2 d 23 h"] or lengths == ["3 d"]


class TestStory:
    def test_very_many_steps(self) -> None:
        """The first and the last are shown, in bounded space, and how many aren't."""
        story = Story(seen(steps=[step(number) for number in range(2000)]), (), LINKS, timezone.utc)
        assert len(story.steps) == len(story.labels) == MOST_LANES
        assert story.left_out == 2001 - MOST_LANES
        assert (story.labels[0].text, story.labels[-1].text) == ("order", "work#1999")
        assert sum(len(each.value or "") for each in story.steps) < 400_000

    def test_errors_of_tries(self) -> None:
        """Each is told with its time and traceback; a value that can't be read says why."""
        told = TryError("shop.Refused", f"no {EVIL}", "Traceback …", at(1), at(0.5))
        failed = step(0, state="FAILURE", errors=(told, told), error=ValueError("no"), tries=2)
        broken = step(1, error=SerializationError("it can't be read back"))
        first, second = Story(seen(steps=[failed, broken]), (), LINKS, timezone.utc).steps
        assert [each.title.partition(" · ")[0] for each in first.errors] == ["Try 1", "Try 2"]
        assert (first.tried, first.value, first.errors[1].traceback) == ("2 tries", None, "Traceback …")
        assert (second.value, "can't be read back" in second.errors[0].message) == (None, True)

    def test_a_sleep_waits_until_it_is_due(self) -> None:
        """Though it is settled when it begins."""
        asleep = step(0, name="durable.sleep", tries=0, finished_at=at(0), wake_at=at(3 * DAY))
        (shown_step,) = Story(seen("SUSPENDED", steps=[asleep]), (), LINKS, timezone.utc).steps
        assert (shown_step.state, shown_step.value) == ("WAITING", None)
        assert "until 2026-12-01 09:20:03" in shown_step.when

    def test_children_are_nested_once(self) -> None:
        """In the lane of the step that has started it; its steps are below it if it is opened."""
        child = seen("SUCCESS", id="c", steps=[step(0)])
        steps = [step(0, name="pack.delay", child_id="c"), step(1, name="durable.get", tries=0, child_id="c")]
        closed = Story(seen(steps=steps, children={"c": child}), (), LINKS, timezone.utc)
        assert [(each.text, each.depth, each.toggle) for each in closed.labels] == [
            ("order", 0, None), ("pack.delay", 1, "unfold c"), ("durable.get#1", 1, None),
        ]  # fmt: skip
        opened = Story(seen(steps=steps, children={"c": child}), ["c"], LINKS, timezone.utc)
        assert [(each.text, each.depth) for each in opened.labels][2] == ("work", 2)
        assert opened.labels[1].toggle == "unfold "

    def test_messages_and_events(self) -> None:
        """What can't be read, or is large, is told in its place."""
        messages = [
            MessageInfo(1, "", Omitted(2**24), "k", at(0), None),
            MessageInfo(2, "t", ValueError("no"), "k", at(0), "r"),
        ]
        story = Story(seen(messages=messages, events={"e": {"a": 1}}), (), LINKS, timezone.utc)
        assert [each.text for each in story.messages] == ["16.0 MiB: too large for this page.", "no"]
        assert story.events == [("e", '{"a": 1}')]


class TestShown:
    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(0, "0 ms"), (0.00042, "0.42 ms"), (0.0123, "12.3 ms"), (0.5, "500 ms"), (1, "1 s"), (59.94, "59.9 s"),
         (59.96, "1 min"), (61, "1 min 1 s"), (3600, "1 h"), (3605, "1 h"), (3 * DAY + 7200, "3 d 2 h"), (-1, "-1 s")],
    )  # fmt: skip
    def test_durations(self, seconds: float, text: str) -> None:
        """In the two largest units."""
        assert shown.duration(seconds) == text

    @pytest.mark.parametrize(
        ("value", "text"),
        [(None, "null"), ("a", '"a"'), ([1, 2], "[1, 2]"), ({"é": 1}, '{"é": 1}'), ("\x00\ud800", r'"\u0000\ud800"'),
         ({1}, "{1}"), (Omitted(300), "300 bytes: too large for this page."), (ValueError("no"), "no")],
    )  # fmt: skip
    def test_values(self, value: Any, text: str) -> None:
        """As JSON, or else as Python shows it; always text that can be sent."""
        assert shown.value(value) == text
        assert shown.value(value).encode()

    def test_hostile_values(self) -> None:
        """One that can't be shown, one that is deep, and one that is large."""

        class Broken:
            def __repr__(self) -> str:
                raise RuntimeError

        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        assert shown.value(Broken()) == "<Broken>"
        assert len(shown.value(deep)) <= shown.MOST
        assert len(shown.value("x" * 10**6)) == shown.MOST

    @pytest.mark.parametrize(
        ("key", "short"),
        [("shop.tasks.charge#2", "charge#2"), ("charge", "charge"), ("durable.sleep#3", "durable.sleep#3"),
         ("shop.charge.delay#2", "charge.delay#2"), ("shop.work[1.2]#3", "work[1.2]#3"), ("", "")],
    )  # fmt: skip
    def test_short_names(self, key: str, short: str) -> None:
        """The module goes, the number stays."""
        assert shown.last(key) == short
        assert shown.module(key) + shown.last(key) == key

    def test_counts(self) -> None:
        """A count that has reached its bound says so."""
        assert (shown.number(9_999, 10_000), shown.number(10_000, 10_000)) == ("9,999", "10,000+")


class TestInstall:
    def test_only_for_flower(self) -> None:
        """Other commands don't get it, and a second install() changes nothing; Flower's last route stays the last."""
        code = """
import sys, flower.urls as urls
from celery_durable import flower
before = list(urls.handlers)
assert not flower.is_starting()
sys.argv = ["celery", "-A", "shop", "flower"]
assert flower.is_starting()
flower.install()
once = list(urls.handlers)
flower.install()
assert urls.handlers == once and len(once) == len(before) + 5 and once[-1] is before[-1]
"""
        assert_runs(code)

    def test_importing_needs_no_flower(self) -> None:
        """Nor a tornado: install() alone does."""
        assert_runs("import sys; sys.modules.update(flower=None, tornado=None); import celery_durable.flower")

    def test_a_navigation_bar_without_our_place(self) -> None:
        """There is no tab, and the pages are there all the same."""
        assert with_tab("<nav></nav>") == "<nav></nav>"
        assert with_tab("<ul></ul><ul></ul>").count("Workflows") == 1


def assert_runs(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60
    )
    assert done.returncode == 0, done.stderr


LINKS = Links(
    workflow=lambda id: f"page {id}",
    unfolded=lambda ids: f"unfold {' '.join(sorted(ids))}",
    task=lambda id: None,
    worker=lambda name: None,
    listed=lambda **query: "list",
)


def seen(state: str = "SUCCESS", id: str = "w", **facts: Any) -> Seen:
    final = at(10) if state == "SUCCESS" else None
    status = WorkflowStatus(
        id=id, name="shop.order", state=state, queue="celery", args=(1,), kwargs={}, result=None, error=None, attempt=1,
        crashes=0, created_at=at(0), started_at=at(0), finished_at=final, wake_at=None, deadline=None, waiting_for=None,
        parent_id=None, root_id=id, forked_from=None, node=None, dispatched=None,
    )  # fmt: skip
    attempts = [AttemptInfo(1, "w1@test", None, at(0), final, state if final else "suspended")]
    none: dict[str, Any] = {"steps": [], "messages": [], "events": {}, "children": {}}
    return Seen(status=status, attempts=attempts, now=at(10), **{**none, **facts})


def step(number: int, name: str = "work", **facts: Any) -> StepInfo:
    usual = {
        "state": "SUCCESS", "output": "x" * 400, "error": None, "tries": 1, "started_at": at(0), "finished_at": at(0.1),
        "child_id": None,
    }  # fmt: skip
    key = f"{name}#{number}" if number else name
    return StepInfo(key=key, name=name, seq=number, **{**usual, **facts})
