"""A payment provider, as they are: `python -m example_project.payments --ledger payments.db`.

    POST /charges    {"order": "order-17", "cents": 1250}, header Idempotency-Key    -> {"id": "pay-1"}

Of twenty calls five fail with a 503, one hangs before it books the charge and one after; the seed shuffles
them. Two calls with one idempotency key are one charge. Calls without a key are charges, each of them.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

DECK = ["ok"] * 13 + ["fail"] * 5 + ["hang before", "hang after"]


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
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            order, cents = str(body["order"]), int(body["cents"])
        except (KeyError, TypeError, ValueError):
            self._answer(HTTPStatus.BAD_REQUEST, {"error": "expected order and cents"})
        else:
            self._answer(*self._charge(order, cents))

    def _charge(self, order: str, cents: int) -> tuple[HTTPStatus, object]:
        mood = self.server.mood()
        if mood == "fail":
            return HTTPStatus.SERVICE_UNAVAILABLE, {"error": "try again later"}
        if mood == "hang before":
            time.sleep(self.server.hang)
        try:
            charge = self.server.ledger.book(self.headers.get("Idempotency-Key"), order, cents)
        except KeyReused as error:
            return HTTPStatus.UNPROCESSABLE_ENTITY, {"error": str(error)}
        if mood == "hang after":
            time.sleep(self.server.hang)
        return HTTPStatus.CREATED, charge._asdict()

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
