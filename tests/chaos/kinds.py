"""What each workflow of `app.py` must return; a body's label stands for what it returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MESSAGES = 5
NAP = 1.2
"""Seconds of the sleep between the steps `before` and `after` of `sleeping`."""


def sequential(number: int) -> list[Any]:
    return [f"s{step}" for step in range(2 + number % 6)]


def gathered(number: int) -> list[Any]:
    return [*(f"g{step}" for step in range(6)), "after"]


def retrying(number: int) -> list[Any]:
    return ["r0", "r1", "r2"]


def sleeping(number: int) -> list[Any]:
    return ["before", "after", "last"]


def receiving(number: int) -> list[Any]:
    return [[f"chat {turn}", f"talk {turn}", f"m{turn}"] for turn in range(MESSAGES)]


def listening(number: int) -> list[Any]:
    return [number, f"hello from {number}", number, ["one", "two"]]


def having_children(number: int) -> list[Any]:
    children = [sequential(number), sleeping(number), sequential(0), sequential(1), retrying(number)]
    return [True, "between", children]


def booking(number: int) -> list[Any]:
    return ["b0", "between", "b1"]


def asynchronous(number: int) -> list[Any]:
    return [*([f"{name}0", f"{name}1"] for name in "xyz"), "end"]


def linked(number: int) -> list[Any]:
    return ["c0", "c1", "c2"]


def long_running(number: int) -> list[Any]:
    return [f"l{step}" for step in range(12)]


Expected = Callable[[int], list[Any]]

#: How many of a hundred workflows are of each kind.
SHARES: dict[str, int] = {
    "sequential": 22,
    "gathered": 10,
    "retrying": 10,
    "sleeping": 10,
    "receiving": 8,
    "listening": 8,
    "having_children": 6,
    "booking": 10,
    "asynchronous": 6,
    "linked": 5,
    "long_running": 5,
}
EXPECTED: dict[str, Expected] = {name: globals()[name] for name in SHARES}
