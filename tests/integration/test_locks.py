"""Which statement waits for which: rules 1 and 6 of the protocol as a table, each cell with two real transactions."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from celery_durable.serialization import Payload
from celery_durable.states import FINAL
from celery_durable.store import Birth
from celery_durable.store.messages import Letter
from celery_durable.store.rows import Fence
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.integration.parties import NAME, VERDICT, Party, Race, outcome

Act = Callable[["Locks", Party], Any]

WAITS, GOES_ON, SKIPS = "waits", "goes on", "skips"

#: Statements by what they do to the workflow that an attempt has, which is the same one in all of them.
RECORDS: dict[str, Act] = {
    "save": lambda locks, party: party.save(locks.fence, key=fresh()),
    "save_slow": lambda locks, party: party.save_slow(locks.fence, key=fresh()),
    "save_try": lambda locks, party: party.save_try(locks.fence, 1, key=fresh()),
    "sleep": lambda locks, party: party.awaits.sleep(locks.fence, outcome(fresh(), b"0"), 60, None, patience=0),
    "receive": lambda locks, party: party.receive(locks.fence),
    "register": lambda locks, party: party.awaits.register(locks.fence, ["nobody"], [fresh()], patience=0),
    "settle": lambda locks, party: party.awaits.settle(
        locks.fence, [outcome(fresh(), b"0")], ["nobody"], 60, None, patience=0
    ),
    "send_as_step": lambda locks, party: locks.send_as_step(party, locks.fence, locks.other),
}
ENDS: dict[str, Act] = {
    "finish": lambda locks, party: party.finish(locks.fence),
    "suspend": lambda locks, party: party.suspend(locks.fence),
    "release": lambda locks, party: party.release(locks.fence),
    "again": lambda locks, party: party.again(locks.fence),
    "hand_over": lambda locks, party: party.hand_over(locks.fence),
}
FLAGS: dict[str, Act] = {
    "cancel": lambda locks, party: party.workflows.cancel([locks.id], verdict=VERDICT, patience=0),
    "send": lambda locks, party: party.send(locks.id, b"1"),
    "notify": lambda locks, party: party.awaits.notify([locks.ended], 60, patience=0),
}
BIRTHS: dict[str, Act] = {"bear": lambda locks, party: locks.bear(party)}
SWEEPS: dict[str, Act] = {"rescue": lambda locks, party: party.rescue(locks.fence)}

#: Rows: the transaction that is open. Columns: the statement that comes.
TABLE = [
    #         records  births   ends   flags    sweeps
    (RECORDS, (GOES_ON, GOES_ON, WAITS, GOES_ON, SKIPS)),
    (BIRTHS, (GOES_ON, GOES_ON, WAITS, WAITS, SKIPS)),
    (ENDS, (WAITS, WAITS, WAITS, WAITS, SKIPS)),
    (FLAGS, (GOES_ON, WAITS, WAITS, WAITS, SKIPS)),
    (SWEEPS, (WAITS, WAITS, WAITS, WAITS, SKIPS)),
]
COLUMNS = (RECORDS, BIRTHS, ENDS, FLAGS, SWEEPS)
ROWS = [(name, act, expected) for acts, expected in TABLE for name, act in acts.items()]


def fresh() -> str:
    """A key that no other step, message or workflow has."""
    return uuid.uuid4().hex


class Locks(Race):
    """A workflow that `a` runs, one that it can send to, and an ended one that it awaits."""

    def __init__(self, url: str, sql: Sql) -> None:
        super().__init__(url, sql)
        self.threads = ThreadPoolExecutor()
        self.other, self.ended = fresh(), fresh()
        self.a.publish(self.other)
        self.a.publish(self.ended)
        self.fence = self.claimed()
        self.a.awaits.register(self.fence, [self.ended], ["end"], patience=0)
        self.a.workflows.cancel([self.ended], verdict=VERDICT, patience=0)

    def send_as_step(self, party: Party, fence: Fence, target: str) -> Any:
        """A message of one workflow to another."""
        letter = Letter(target, "", fresh(), Payload(b"1"))
        return party.messages.send_as_step(fence, outcome(fresh(), b"null"), letter, patience=0)

    def bear(self, party: Party) -> Any:
        """A child of the workflow."""
        birth = Birth(fresh(), NAME, "celery", "{}", b"[]", "application/json", "utf-8", 3, 60.0, parent_id=self.id)
        return party.workflows.bear(self.fence, outcome(fresh(), b"null"), birth, patience=0)

    def put(self, party: Party) -> None:
        """A message of which nobody has told."""
        party.connection.execute(
            "INSERT INTO celery_durable.message (workflow, topic, idempotency_key, body, told)"
            " VALUES (%s, '', %s, '', false)",
            [self.id, fresh()],
        )

    def meet(self, opened: Act, coming: Act) -> str:
        """Let a statement come while another one's transaction is open; both leave nothing behind."""
        self.b.connection.execute("BEGIN")
        with self.a.transaction(commit=False):
            opened(self, self.a)
            answer = self.threads.submit(coming, self, self.b)
            wait_until(lambda: answer.done() or self.b.waits(self.sql), message="it is done, or waits for a lock")
            is_waiting = not answer.done()
        result = answer.result()
        self.b.connection.execute("ROLLBACK")
        if is_waiting:
            return WAITS
        return SKIPS if coming in SWEEPS.values() and result == [] else GOES_ON

    def close(self) -> None:
        """Close all connections."""
        self.threads.shutdown()
        super().close()


@pytest.fixture
def locks(emptied_database_url: str) -> Iterator[Locks]:
    """One workflow, and three sides that want to change it."""
    sql = Sql(emptied_database_url)
    locks = Locks(emptied_database_url, sql)
    yield locks
    locks.close()
    sql.close()


@pytest.mark.parametrize(("opened", "expected"), [pytest.param(row[1], row[2], id=row[0]) for row in ROWS])
def test_who_waits_for_whom(locks: Locks, opened: Act, expected: tuple[str, ...]) -> None:
    """What records waits for what ends, and the other way round; a flag and a record never wait for each other."""
    found = {name: locks.meet(opened, coming) for column in COLUMNS for name, coming in column.items()}
    wanted = {name: cell for column, cell in zip(COLUMNS, expected, strict=True) for name in column}
    assert found == wanted


def test_resume_waits_for_the_step_that_still_runs(locks: Locks) -> None:
    """A resume waits for the record of the step in which the workflow was cancelled, and goes on after it."""
    with locks.a.transaction():
        assert locks.a.save_slow(locks.fence)
        locks.cancel(locks.c)
        resumed = locks.blocked(locks.b, lambda: locks.b.workflows.resume([locks.id], 60, patience=0))
    assert [message.workflow_id for message in resumed.result()] == [locks.id]
    assert locks.outcomes() == {"one": b"1"}


def test_two_that_send_to_each_other_do_not_wait(locks: Locks) -> None:
    """Workflows that send to each other in open transactions both commit, and both are told afterwards."""
    theirs = locks.b.claim(locks.other)
    assert theirs is not None
    with locks.a.transaction(), locks.b.transaction():
        locks.send_as_step(locks.a, locks.fence, locks.other)
        locks.send_as_step(locks.b, theirs.fence, locks.id)
    assert locks.c.messages.tell(None, 60, limit=10, patience=0)[0] == 2


def test_a_childs_end_and_a_cancel_of_both_do_not_deadlock(locks: Locks) -> None:
    """A cancel of parent and child that has the parent waits for the child's end, which doesn't want the parent."""
    parent, child = sorted([fresh(), fresh()])
    locks.a.publish(parent)
    locks.a.publish(child)
    waiter, target = locks.a.claim(parent), locks.b.claim(child)
    assert waiter is not None
    assert target is not None
    locks.a.awaits.register(waiter.fence, [child], ["end"], patience=0)
    with locks.b.transaction():
        # The first half of its round trip; the second is a transaction of its own.
        locks.b.workflows.finish(
            target.fence, "SUCCESS", Payload(b"2"), locks.b.awaits.notifying(["nobody"], 60), error=None,
            dispatched=True, patience=0,
        )  # fmt: skip
        cancel = lambda: locks.c.workflows.cancel([child, parent], verdict=VERDICT, patience=0)  # noqa: E731
        cancelled = locks.blocked(locks.c, cancel)
    assert cancelled.result() == [parent]
    assert locks.b.awaits.notify([child], 60, patience=0) == []


def test_cancels_in_opposite_orders_do_not_deadlock(locks: Locks) -> None:
    """Two cancels that name the same workflows in opposite orders lock them in one order."""
    first, second = sorted([locks.id, locks.other])

    def cancel(party: Party, *ids: str) -> list[str]:
        return party.workflows.cancel(ids, verdict=VERDICT, patience=0)

    with locks.a.transaction():
        locks.a.connection.execute("SELECT FROM celery_durable.workflow WHERE id = %s FOR UPDATE", [second])
        one = locks.blocked(locks.b, lambda: cancel(locks.b, first, second))
        other = locks.blocked(locks.c, lambda: cancel(locks.c, second, first))
    assert sorted([one.result(), other.result()]) == [[], [first, second]]


@pytest.mark.parametrize("tells", ["send", "tell", "notify"])
def test_many_that_tell_one_workflow_do_not_deadlock(locks: Locks, tells: str) -> None:
    """While a step's transaction is open, any number of senders or ended children may tell its workflow at once."""
    each, parties = 25, [locks.party() for _ in range(6)]
    targets = [fresh() for _ in range(each * len(parties))]
    if tells == "notify":
        for target in targets:
            locks.b.publish(target)
        locks.a.awaits.register(locks.fence, targets, ["end"] * len(targets), patience=0)
        locks.b.workflows.cancel(targets, verdict=VERDICT, patience=0)

    def tell(party: Party, mine: list[str]) -> None:
        for target in mine:
            if tells == "send":
                party.send(locks.id, b"1")
            elif tells == "tell":
                locks.put(party)
                party.messages.tell(locks.id, 60, limit=1, patience=0)
            else:
                party.awaits.notify([target], 60, patience=0)

    before = locks.row().signal
    with locks.a.transaction(), ThreadPoolExecutor() as threads:
        assert locks.a.save_slow(locks.fence)
        shares = [targets[number :: len(parties)] for number in range(len(parties))]
        for done in [threads.submit(tell, party, mine) for party, mine in zip(parties, shares, strict=True)]:
            done.result()
    assert locks.row().signal >= before + (len(targets) if tells != "tell" else 1)


#: For each duty: what makes a workflow one for it, and the duty.
STATES: dict[str, tuple[str, Act]] = {
    "rescue": (
        "state = 'RUNNING', publish_at = NULL, node = gen_random_uuid(), token = gen_random_uuid(),"
        " claimed_at = clock_timestamp() - interval '1 hour'",
        lambda locks, party: [row[0] for row in party.sweep()],
    ),
    "expire": ("deadline = clock_timestamp()", lambda locks, party: party.expire()),
    "wake": (
        "state = 'SUSPENDED', publish_at = NULL, wake_at = clock_timestamp()",
        lambda locks, party: party.workflows.wake(limit=10, patience=0),
    ),
    "republish": (
        "publish_at = clock_timestamp(), published_at = NULL",
        lambda locks, party: [
            message.workflow_id for message in party.workflows.republish(republish_after=60, limit=10, patience=0)
        ],
    ),
    "redispatch": (
        "state = 'SUCCESS', publish_at = NULL, finished_at = clock_timestamp(), dispatched = false,"
        " published_at = NULL",
        lambda locks, party: [
            message.workflow_id
            for message in party.workflows.redispatch(republish_after=60, lease=15, limit=10, patience=0)
        ],
    ),
    "prune": (
        "state = 'SUCCESS', publish_at = NULL, finished_at = clock_timestamp() - interval '1 hour', dispatched = true",
        lambda locks, party: party.workflows.prune(kept=dict.fromkeys(FINAL, 60), limit=10, patience=0),
    ),
}


@pytest.mark.parametrize("duty", STATES)
def test_sweeps_pass_over_what_an_administrator_has_locked(locks: Locks, duty: str) -> None:
    """A duty does what it can beside a row that somebody has locked, and that row when it is free again."""
    become, sweep = STATES[duty]
    locked, free = sorted([fresh(), fresh()])
    for workflow_id in (locked, free):
        locks.a.publish(workflow_id)
        locks.sql.execute(f"UPDATE celery_durable.workflow SET {become} WHERE id = %s", workflow_id)
    locks.sql.execute("UPDATE celery_durable.node SET unbroken = unbroken - interval '1 hour'")
    locks.sql.execute("DELETE FROM celery_durable.workflow WHERE NOT id = ANY(%s)", [locked, free])
    with locks.a.transaction():
        locks.a.connection.execute("SELECT FROM celery_durable.workflow WHERE id = %s FOR UPDATE", [locked])
        assert sweep(locks, locks.b) == [free]
    assert sweep(locks, locks.b) == [locked]


@pytest.mark.parametrize("is_pruned", [True, False])
def test_a_start_waits_for_the_end_of_a_prune_of_its_id(locks: Locks, is_pruned: bool) -> None:
    """A start of an id that is being removed waits, and is born if it was; else it finds the old one."""
    locks.sql.execute("UPDATE celery_durable.workflow SET finished_at = finished_at - interval '1 hour',"
                      " dispatched = true, node = NULL WHERE id = %s", locks.ended)  # fmt: skip
    locks.sql.execute("DELETE FROM celery_durable.awaiting")
    with locks.a.transaction(commit=is_pruned):
        assert locks.a.workflows.prune(kept=dict.fromkeys(FINAL, 60), limit=10, patience=0) == [locks.ended]
        born = locks.blocked(locks.b, lambda: locks.b.publish(locks.ended))
    assert born.result() is is_pruned
