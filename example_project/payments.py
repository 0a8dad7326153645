"""A payment provider, as they are: `python -m example_project.payments --ledger payments.db`.

    POST /charges    {"order": "order-17", "cents": 1250}, header Idempotency-Key    -> {"id": "pay-1"}
    POST /refunds    {"order": "order-17"}    -> {"cents": 1250}

Of twenty calls five fail with a 503, one hangs before it books the charge and one after; the seed shuffles
them. Two calls with one idempotency key are one charge. Calls without a key are charges, each of them. A refund
gives back all that an order was charged and that wasn't given back before.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

DECK = ["ok"] * 13 + ["fail"] * 5 + ["hang before", "hang after"]

Reply = tuple[HTTPStatus, object]


class Charge(NamedTuple):
    """A line of the ledger: money that was taken."""

    id: str
    order: str
    cents: int


class KeyReused(Exception):
    """One idempotency key for two different charges: the caller mixes up its keys."""


class Ledger:
    """The provider's book, in SQLite: what it was asked for, what it charged."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.executescript("""
            CREATE TABLE IF NOT EXISTS call (n INTEGER PRIMARY KEY, mood TEXT);
            CREATE TABLE IF NOT EXISTS charge (
                n INTEGER PRIMARY KEY, key TEXT UNIQUE, order_id TEXT, cents INTEGER
            );
            CREATE TABLE IF NOT EXISTS refund (charge INTEGER PRIMARY KEY);
        """)

    def note_call(self, mood: str) -> None:
        with self._lock:
            self._db.execute("INSERT INTO call (mood) VALUES (?)", (mood,))

    def book(self, key: str | None, order: str, cents: int) -> Charge:
        """Take the money, or find that it was taken under this key."""
        insert = "INSERT INTO charge (key, order_id, cents) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
        with self._lock:
            inserted = self._db.execute(insert, (key, order, cents))
            if inserted.rowcount == 1:
                return Charge(f"pay-{inserted.lastrowid}", order, cents)
            n, *kept = self._db.execute("SELECT n, order_id, cents FROM charge WHERE key = ?", (key,)).fetchone()
        if kept != [order, cents]:
            raise KeyReused(f"key {key} was used for {kept[0]}, {kept[1]} cents")
        return Charge(f"pay-{n}", order, cents)

    def give_back(self, order: str) -> int:
        """Give back the money for an order; return the cents, none if there is nothing to give."""
        insert = "INSERT INTO refund SELECT n FROM charge WHERE order_id = ? ON CONFLICT DO NOTHING"
        with self._lock:
            cents = self._balance(order)
            self._db.execute(insert, (order,))
        return cents

    def balance(self, order: str) -> int:
        """The cents that were taken for an order and not given back."""
        with self._lock:
            return self._balance(order)

    def _balance(self, order: str) -> int:
        select = (
            "SELECT coalesce(sum(cents), 0) FROM charge WHERE order_id = ? AND n NOT IN (SELECT charge FROM refund)"
        )
        (cents,) = self._db.execute(select, (order,)).fetchone()
        return int(cents)

    def charges(self) -> list[Charge]:
        with self._lock:
            rows = self._db.execute("SELECT n, order_id, cents FROM charge ORDER BY n").fetchall()
        return [Charge(f"pay-{n}", order, cents) for n, order, cents in rows]

    def calls(self) -> dict[str, int]:
        """How many calls were answered in each mood."""
        with self._lock:
            return dict(self._db.execute("SELECT mood, count(*) FROM call GROUP BY mood"))

    def close(self) -> None:
        self._db.close()


def moods(seed: int) -> Iterator[str]:
    """What happens to each call: a shuffled deck, then the next one."""
    shuffle = random.Random(seed).shuffle
    while True:
        deck = DECK.copy()
        shuffle(deck)
        yield from deck


class Payments(ThreadingHTTPServer):
    """Stops only when each call in progress has ended, so that the ledger is complete then."""

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], ledger: Ledger, seed: int, hang: float) -> None:
        super().__init__(address, Handler)
        self.ledger = ledger
        self.hang = hang
        self._moods = moods(seed)
        self._lock = threading.Lock()

    def mood(self) -> str:
        with self._lock:
            mood = next(self._moods)
        self.ledger.note_call(mood)
        return mood


class Handler(BaseHTTPRequestHandler):
    server: Payments

    def do_GET(self) -> None:
        self._answer(HTTPStatus.OK, self.server.ledger.calls())

    def do_POST(self) -> None:
        try:
            act = self._asked(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        except (KeyError, TypeError, ValueError):
            self._answer(HTTPStatus.BAD_REQUEST, {"error": "expected order and cents"})
        else:
            self._answer(*self._in_some_mood(act))

    def _asked(self, body: dict[str, Any]) -> Callable[[], Reply]:
        order = str(body["order"])
        if self.path == "/refunds":
            return partial(self._refund, order)
        return partial(self._charge, order, int(body["cents"]))

    def _in_some_mood(self, act: Callable[[], Reply]) -> Reply:
        mood = self.server.mood()
        if mood == "fail":
            return HTTPStatus.SERVICE_UNAVAILABLE, {"error": "try again later"}
        if mood == "hang before":
            time.sleep(self.server.hang)
        reply = act()
        if mood == "hang after":
            time.sleep(self.server.hang)
        return reply

    def _charge(self, order: str, cents: int) -> Reply:
        try:
            charge = self.server.ledger.book(self.headers.get("Idempotency-Key"), order, cents)
        except KeyReused as error:
            return HTTPStatus.UNPROCESSABLE_ENTITY, {"error": str(error)}
        return HTTPStatus.CREATED, charge._asdict()

    def _refund(self, order: str) -> Reply:
        return HTTPStatus.OK, {"cents": self.server.ledger.give_back(order)}

    def _answer(self, status: HTTPStatus, body: object) -> None:
        content = json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:
            self.log_message("the caller has gone away")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m example_project.payments")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8700, help="0: any free one (default: 8700)")
    parser.add_argument("--ledger", type=Path, default=Path("payments.db"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hang", type=float, default=3, metavar="SECONDS")
    options = parser.parse_args()

    server = Payments((options.host, options.port), Ledger(options.ledger), options.seed, options.hang)
    for stop in signal.SIGTERM, signal.SIGINT:
        signal.signal(stop, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"http://{options.host}:{server.server_address[1]}", flush=True)
    server.serve_forever(poll_interval=0.1)
    server.server_close()
    server.ledger.close()


if __name__ == "__main__":
    main()
