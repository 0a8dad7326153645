"""What the command line reads and prints: durations and times, JSON of anything, text that can't steer a terminal."""

from __future__ import annotations

import io
import json
import math
import uuid
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import click
import pytest

import celery_durable as durable
from celery_durable.cli import durable as group
from celery_durable.cli.chart import draw, legend
from celery_durable.cli.command import DurableCommand, ask
from celery_durable.cli.filters import filters_in, ids_in, seconds_of, time_of
from celery_durable.cli.output import as_json, duration, echo_json, line, moment, number, progress, short, text_of
from celery_durable.timeline import Bar, Lane, Timeline

START = datetime(2026, 11, 28, 12, tzinfo=timezone.utc)


@dataclass
class Point:
    x: Any


class Broken:
    def __repr__(self) -> str:
        raise OSError("no repr")


class Mute(Exception):
    def __str__(self) -> str:
        raise OSError("no text")


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


# What is read


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("0", 0), ("1.5s", 1.5), ("30m", 1800), ("12h", 43200), ("7d", 604800), ("2w", 1209600)],
)
def test_durations(text: str, seconds: float) -> None:
    """A duration is seconds, or a number with a unit."""
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "-1", "1y", "1d2h", "nan", "inf", "1e9", "999999w", "1 d"])
def test_no_durations(text: str) -> None:
    """What isn't one is an error that says how they are written."""
    with pytest.raises(click.BadParameter, match="12h, 7d, 2w"):
        seconds_of(text)


def test_times() -> None:
    """A time is ISO 8601, without a zone a local one, or how long ago it was."""
    assert time_of("2026-11-28T12:00+00:00") == START
    assert time_of("2026-11-28T12:00") == datetime(2026, 11, 28, 12).astimezone()
    assert abs(time_of("1h") - (datetime.now(timezone.utc) - timedelta(hours=1))) < timedelta(seconds=10)


@pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01", "0001-01-01", "999999w"])
def test_no_times(text: str) -> None:
    """What isn't one is an error, also where it is too long ago for this machine's time zones."""
    try:
        assert time_of(text).tzinfo is not None
    except click.BadParameter:
        pass
    else:
        assert text == "0001-01-01"


def test_filters_are_what_was_given() -> None:
    """Options that weren't given, and those that aren't filters, are no filters."""
    given = {"state": (), "name": "x", "queue": None, "error": "", "loglevel": "INFO", "limit": 3}
    assert filters_in(given) == {"name": "x", "error": ""}


# JSON


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (None, None), (True, True), (1, 1), (10**30, 10**30), (0.5, 0.5), ("é", "é"),
        (math.inf, "inf"), (math.nan, "nan"), (START, "2026-11-28T12:00:00+00:00"),
        ((1, [2]), [1, [2]]), ({"a": {1: 2}}, {"a": {"1": 2}}), (Point(Point(1)), {"x": {"x": 1}}),
        (Point, repr(Point)),
        (b"\xff", r"b'\xff'"), ({3}, "{3}"), (uuid.UUID(int=1), repr(uuid.UUID(int=1))),
        (ValueError("no"), {"type": "ValueError", "message": "no"}),
        (Mute(), {"type": "Mute", "message": "<Mute whose text can't be made>"}),
        (durable.Omitted(16), {"size": 16}),
        (Broken(), "<Broken>"),
    ],
)  # fmt: skip
def test_json(value: Any, plain: Any) -> None:
    """Dataclasses are objects, times ISO 8601, errors their class and text, anything else its repr."""
    assert as_json(value) == plain
    json.dumps(as_json(value), allow_nan=False)


def test_json_of_a_number_without_end() -> None:
    """Python refuses to write it in decimals, and that mustn't hide the rest."""
    assert as_json([1, 10**10_000]) == [1, "<int>"]


def test_json_is_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed can't steer a terminal, nor fail to be encoded, and is read back as it was."""
    value = {"é\x1b[31m\u202e\x9b\ud800": "\x07\u2028"}
    echo_json(value)
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert "\x1b" not in printed
    assert json.loads(printed) == value


def test_json_of_what_is_nested_deeply(capsys: pytest.CaptureFixture[str]) -> None:
    """It is named instead of shown from some level on, and hides nothing beside it."""
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    echo_json([value, Point({"a": value, "b": 1})])
    printed = capsys.readouterr().out
    assert printed.count("<nested too deeply to be shown>") == 2
    assert json.loads(printed)[1]["x"]["b"] == 1
    while value:  # not all at once, which would take as deep a stack
        value = value.pop()


# Text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("order-1", "order-1"), ("a/b'c\"d é 漢", "a/b'c\"d é 漢"), ("<b>&amp;", "<b>&amp;"),
        ("[red]x[/red]", "[red]x[/red]"),
        ("\x1b[31m", r"\x1b[31m"), ("a\r\nb\tc", r"a\r\nb\tc"), ("\x9b2J", r"\x9b2J"), ("\u202eevil", r"\u202eevil"),
        ("\ud800", r"\ud800"), ("\u2028", r"\u2028"), ("\x7f", r"\x7f"),
    ],
)  # fmt: skip
def test_lines(text: str, shown: str) -> None:
    """What isn't printed as it is stands as its escape sequence; all else is left alone."""
    assert line(text) == shown


def test_long_text_is_cut() -> None:
    """And the cut is seen."""
    assert short("x" * 10, 10) == "x" * 10
    assert short("x" * 11, 10) == "x" * 9 + "…"
    assert text_of(Broken()) == "<Broken>"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 ms"), (0.0124, "12 ms"), (3.44, "3.4 s"), (125, "2 min 5 s"), (3660, "1 h 1 min"), (90000, "1 d 1 h")],
)
def test_durations_for_people(seconds: float, shown: str) -> None:
    """The two units that matter."""
    assert duration(seconds) == shown


def test_numbers_for_people() -> None:
    """A count that was given up says so."""
    assert number(1234) == "1,234"
    assert number(10_000, 10_000) == "10,000+"
    assert number(9_999, 10_000) == "9,999"


def test_moments() -> None:
    """Local time, without fractions; nothing for none."""
    assert moment(None) == ""
    assert moment(START) == f"{START.astimezone():%Y-%m-%d %H:%M:%S}"


def test_without_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is closed, no ids come by it, and nobody is there to be asked."""
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(click.UsageError, match="Which workflows"):
        ids_in((), {})
    assert ids_in(("-",), {}) == []
    with pytest.raises(click.ClickException, match="--yes"):
        ask("Cancel them?", yes=False)


@pytest.mark.parametrize("length", [4, None])
def test_progress(monkeypatch: pytest.MonkeyPatch, length: int | None) -> None:
    """A bar on a terminal, with or without a known end; nothing elsewhere."""
    for on_terminal in (True, False):
        err = io.StringIO()
        err.isatty = lambda on_terminal=on_terminal: on_terminal  # type: ignore[misc]
        monkeypatch.setattr("sys.stderr", err)
        with progress("Deleting", length) as advance:
            advance(4)
        assert ("Deleting" in err.getvalue()) == on_terminal


# The chart


def drawn(*bars: Bar, width: int = 10, seconds: float = 10, ascii_only: bool = False) -> str:
    lane = Lane("a", "a", "SUCCESS", bars)
    return draw(lane, Timeline(START, at(seconds), (lane,)), width, ascii_only=ascii_only).plain


def test_bars_lie_at_their_times() -> None:
    """A bar a try: failed ones, the waits between them, and the one that has settled the step."""
    row = drawn(
        Bar("try", at(0), at(2), "RETRY"), Bar("wait", at(2), at(5)), Bar("try", at(5), at(8), "SUCCESS"),
    )  # fmt: skip
    assert row == "✗✗───■■■  "


def test_bars_of_a_workflow() -> None:
    """It is queued, runs, crashes; the mark is seen, whatever lies on it."""
    row = drawn(
        Bar("queued", at(0), at(1)), Bar("running", at(1), at(4), "crashed"), Bar("crash", at(4), at(4), "crashed"),
        Bar("queued", at(4), at(6)), Bar("running", at(6), at(10)),
    )  # fmt: skip
    assert row == "┄━━━!┄━━━━"


def test_bars_without_unicode() -> None:
    """Where the terminal has ASCII only, so has the chart."""
    assert drawn(Bar("try", at(0), at(5), "SUCCESS"), Bar("wait", at(5), at(10)), ascii_only=True) == "#####-----"


def test_the_shortest_bar_is_seen() -> None:
    """Also at the very end, of a workflow that took no time at all, and of one whose clock went backwards."""
    assert drawn(Bar("try", at(10), at(10), "SUCCESS")) == " " * 9 + "■"
    assert drawn(Bar("try", at(0), at(0), "SUCCESS"), seconds=0) == "■" + " " * 9
    assert drawn(Bar("try", at(5), at(3), "SUCCESS")) == " " * 5 + "■" + " " * 4
    assert drawn(Bar("try", at(-5), at(30), "SUCCESS")) == "■" * 10


def test_legend() -> None:
    """It explains what there is, and nothing else."""
    lane = Lane("a", "a", "FAILURE", (Bar("try", at(0), at(1), "FAILURE"), Bar("try", at(1), at(2))))
    assert legend(Timeline(START, at(2), (lane,)), ascii_only=False).plain.split("   ") == ["✗ failed", "□ goes on", ""]


def test_every_kind_is_drawn() -> None:
    """Whatever kind a timeline has, there is a glyph for it."""
    source = (Path(durable.__file__).parent / "timeline.py").read_text()
    marks = [part for part in ("crash", "time-out", "hand-over", "retry") if f'"{part}"' in source]
    kinds = ["queued", "running", "suspended", "wait", *marks]
    assert all(drawn(Bar(kind, at(1), at(2))).strip() for kind in kinds)


# The group


def test_every_command_is_celerys() -> None:
    """Each is a command of Celery's with help, `--json`, and errors in one line."""
    assert group.help
    for name, command in group.commands.items():
        assert isinstance(command, DurableCommand), name
        assert command.help, name
        assert any(option.name == "as_json" for option in command.params), name
