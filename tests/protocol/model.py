"""The protocol as a machine for Hypothesis: workers, workflows and time, over the store's real statements.

The machine keeps what each worker believes (`Run`, `Worker`) and what has been promised (`Promises`); the statements
run in the sessions of `stage.py`, and may stop anywhere. After every rule the rows are compared with the promises.
"""

from __future__ import annotations

import itertools
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from random import Random
from typing import Any, ClassVar

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from celery_durable.serialization import Payload
from celery_durable.states import FINAL
from celery_durable.store import Birth, NodeFacts, StepRecord
from celery_durable.store.executing import Statement as Sql
from celery_durable.store.messages import Letter
from celery_durable.store.queries import Query
from celery_durable.store.rows import Fence, Standing, Wakers
from tests.integration.parties import Party
from tests.protocol.promises import Promises, body_of
from tests.protocol.rows import Rows
from tests.protocol.stage import FATES, Lock, Stage, Statement, things

LEASE, RETENTION, REPUBLISH_AFTER = 15.0, 3000.0, 60.0
MAX_CRASHES = 3
NAME, OTHER = "order", "another"
PARENT, CHILD = IDS = ("w1", "w2")
VERDICT = Payload(b"gave up")
#: More than a look may be old, more than a lease, more than a deadline, more than the retention.
TIMES = (1.5, 20.0, 200.0, 4000.0)

#: Three steps each: what the workflow functions do.
PARENTS = (
    ("step", "recv", "step"), ("bear", "await", "step"), ("try", "sleep", "step"), ("limited", "step", "send"),
    ("step", "bear", "await"), ("recv", "recv", "step"), ("send", "recv", "try"), ("bear", "recv", "await"),
)  # fmt: skip
CHILDREN = (
    ("step", "send", "step"), ("step", "sleep", "step"), ("recv", "send", "step"), ("try", "limited", "step"),
    ("recv", "step", "recv"),
)  # fmt: skip
BODIES = ("step", "try", "limited")

#: How statements fare in an example: mostly well, or badly in one way.
FATES_OF_EXAMPLES = {
    "well": ("answered",) * 20 + FATES,
    "mixed": ("answered",) * 6 + FATES,
    "open": ("answered",) * 3 + ("open",) * 2 + FATES,
    "slow": ("answered",) * 3 + ("slow",) * 2 + FATES,
    "lost": ("answered",) * 3 + ("lost", "unsent") + FATES,
}
#: How much more, or less, often than usual something happens in an example.
WHIMS = (0.1, 0.5, 1, 1, 3)
workers = (0, 1)
yes_or_no = (False, True)
#: After a statement whose answer isn't needed, in its place.
NOTHING: Sql = (Query("nothing", "SELECT WHERE false"), {})


@dataclass(eq=False)
class Worker:
    """A worker's main process, as it sees itself."""

    node: uuid.UUID
    is_alive: bool = True
    is_draining: bool = False
    as_of: Any = None
    #: A list that was collected and not sent yet, with the time before it was.
    collected: tuple[Any, list[str]] | None = None
    #: Outcomes that Celery has delivered, to be confirmed.
    delivered: set[str] = field(default_factory=set)
    #: Workflows of dead processes, which the database is yet to be told.
    held: set[str] = field(default_factory=set)
    #: Since when it isn't heard, in the machine's seconds.
    unheard: float = 0.0


@dataclass(eq=False, repr=False)
class Run:
    """One attempt, as the process that runs it sees it."""

    worker: Worker
    workflow: str
    token: uuid.UUID
    born: Any = None
    fence: Fence | None = None
    #: Settled keys, with their outcomes.
    history: dict[str, tuple[bool, bytes]] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)
    #: Seconds that a sleep, or the wait for a try, still lasts.
    due: dict[str, float] = field(default_factory=dict)
    is_alive: bool = True
    #: A statement is on its way.
    is_busy: bool = False
    #: The statement whose answer was lost.
    unsure: Statement | None = None
    #: The body that runs, and what it will return.
    body: tuple[str, bool, bytes] | None = None
    #: The fast statement wrote nothing.
    must_ask: bool = False
    #: What it waits for: a reason, seconds, what wakes it.
    waiting: tuple[str, float | None, Wakers] | None = None
    registered: bool = False
    #: The next body's try is written.
    announced: str | None = None
    after_crash: bool = False
    look_is_old: bool = False
    hands_over: bool = False
    #: How it ended for its process: "refused", "lost", "suspended", "released", "stopped", "finished".
    over: str | None = None
    #: Its outcome is with Celery.
    is_delivered: bool = False
    #: Somebody had the right to take it for dead.
    is_suspected: bool = False

    def __repr__(self) -> str:
        return f"run {str(self.token)[:4]} of {self.workflow}"

    @property
    def runs(self) -> bool:
        return self.is_alive and self.over is None

    @property
    def is_free(self) -> bool:
        """It can do the next thing."""
        return self.runs and not self.is_busy and self.unsure is None and self.fence is not None


@dataclass(frozen=True)
class Focus:
    """What all examples of a machine are about; as it is, nothing in particular."""

    #: How much more or less often something happens.
    weights: Mapping[str, float] = field(default_factory=dict)
    #: How statements fare.
    fate: str = ""
    #: What the workflow functions do.
    programs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """Something that can happen."""

    name: str
    weight: int
    when: Callable[[Protocol], Any]
    choices: dict[str, Sequence[Any]]


EVENTS: list[Event] = []


def event(weight: int, *, when: Callable[[Protocol], Any] = lambda self: True, **choices: Sequence[Any]) -> Any:
    """Let this happen, so many times as often as what has the weight 1, whenever it can."""

    def listed(method: Callable[..., None]) -> Callable[..., None]:
        EVENTS.append(Event(method.__name__, weight, when, choices))
        return method

    return listed


class Protocol(RuleBasedStateMachine):
    """Two workers, two workflows, three steps each."""

    stage: ClassVar[Stage]
    focus: ClassVar[Focus] = Focus()
    #: Counts all rules of all examples.
    steps: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.stage.clear()
        self.runs: list[Run] = []
        self.nodes = itertools.count(1)
        self.workers = [self._new_worker(), self._new_worker()]
        self.promises = Promises(self)
        self.programs = {PARENT: PARENTS[0], CHILD: CHILDREN[0]}
        self.timeouts: dict[str, float | None] = dict.fromkeys(IDS)
        self.values = itertools.count(1)
        #: What stood there before the next event.
        self.latest = self.rows()
        self.seeds: Counter[int] = Counter()
        self.time = 0.0

    @initialize(
        parent=st.sampled_from(PARENTS),
        child=st.sampled_from(CHILDREN),
        late=st.booleans(),
        salt=st.integers(0, 2**32 - 1),
    )
    def begin(self, parent: tuple[str, ...], child: tuple[str, ...], late: bool, salt: int) -> None:
        """Choose the functions, and whether the parent has a deadline; start the parent."""
        self.salt = salt
        chance = Random(salt)
        self.fates = FATES_OF_EXAMPLES[self.focus.fate or chance.choice(list(FATES_OF_EXAMPLES))]
        self.weights = {event.name: event.weight * chance.choice(WHIMS) for event in EVENTS}
        for name, factor in self.focus.weights.items():
            self.weights[name] *= factor
        self.programs = {PARENT: self.focus.programs.get(PARENT, parent), CHILD: self.focus.programs.get(CHILD, child)}
        self.timeouts[PARENT] = 100.0 if late else None
        self.publish_one(PARENT, "answered")
        for worker in self.workers:
            self.beat_of(worker, "answered")

    def teardown(self) -> None:
        """Whatever has happened: fair sweeps bring every workflow to its end, and leave nothing behind."""
        try:
            if self.is_whole:
                self.let_all_end()
        finally:
            self.stage.clear()

    is_whole = True

    @rule(seed=st.integers(0, 2**16 - 1))
    def happen(self, seed: int) -> None:
        """Something happens, chosen with all its circumstances by one number.

        Rules of Hypothesis' own would all be as likely, and most would have nothing to do.
        """
        # Hypothesis likes to draw a number again, in this example and the next: that mustn't be the same event again.
        chance = Random(f"{self.salt}: {seed} for the {self.seeds[seed]}th time")
        self.seeds[seed] += 1
        possible = [event for event in EVENTS if event.when(self)]
        (event,) = chance.choices(possible, [self.weights[event.name] for event in possible])
        drawn = {
            name: chance.choice(self.fates if name == "fate" else choices) for name, choices in event.choices.items()
        }
        note(f"{event.name} {drawn}")
        getattr(self, event.name)(chance=chance, **drawn)

    # What is asked of the stage

    def make(self, statement: Statement, fate: str = "answered") -> None:
        """Make a statement, in a session that is idle."""
        if not self.stage.idle():
            return
        self.promises.concerns(statement)
        self.stage.make(statement, fate)

    def make_for(self, run: Run, statement: Statement, fate: str) -> None:
        """Make a statement of a run, which waits for the answer; without one it can only ask again, or die."""
        if not self.stage.idle():
            return

        asked_at = self.time

        def then(answer: Any) -> None:
            run.is_busy, run.look_is_old = False, self.time > asked_at
            if run.runs:
                statement.then(answer)

        def lost() -> None:
            run.is_busy = False
            run.unsure = statement

        run.is_busy, run.unsure = True, None
        tracked = Statement(
            statement.name, statement.do, then, lost, statement.locks, statement.things, statement.skips,
            statement.is_bulk,
        )  # fmt: skip
        self.make(tracked, fate)

    def rows(self) -> Rows:
        """What everybody sees now."""
        return Rows.seen_by(self.stage.observer)

    # Runs: what they can do next

    def key_of(self, run: Run) -> str | None:
        """The first step without an outcome."""
        for place, kind in enumerate(self.programs[run.workflow]):
            key = f"{kind}{place}"
            if key not in run.history:
                return key
            if not run.history[key][0]:
                return None  # it has failed, and so has the workflow
            if run.due.get(key, 0) > 0:
                return key
        return None

    def kind_of(self, run: Run) -> str | None:
        """What kind of step comes next."""
        key = self.key_of(run)
        return key[:-1] if key else None

    def at(self, *kinds: str | None) -> list[Run]:
        """Runs that come to such a step now, and whose body doesn't run."""
        return [
            run for run in self.runs
            if run.is_free and run.body is None and run.waiting is None and not run.must_ask and not run.hands_over
            and self.kind_of(run) in kinds
        ]  # fmt: skip

    def in_body(self) -> list[Run]:
        return [run for run in self.runs if run.is_free and run.body is not None]

    def waiting(self) -> list[Run]:
        return [run for run in self.runs if run.is_free and run.waiting is not None and not run.hands_over]

    def record(self, run: Run, key: str, ok: bool | None = None, value: bytes | None = None) -> StepRecord:
        """What a statement writes about a step."""
        payload = None if value is None else Payload(value)
        return StepRecord(key, int(key[-1]) + 1, run.tries.get(key, 0), None, None, None, ok, payload)

    def settle(self, run: Run, key: str, ok: bool, value: bytes) -> None:
        run.history[key] = (ok, value)
        run.body, run.must_ask, run.waiting, run.registered, run.announced = None, False, None, False, None
        run.after_crash = False

    def give_up(self, run: Run, key: str) -> None:
        """The other workflow isn't there, or has finished: the function raises."""
        self.promises.given_up.add(run.workflow)
        self.settle(run, key, False, b"an error")

    def stands(self, run: Run, standing: Standing | None) -> bool:
        """Whether a run may go on after this answer; if not, it ends as the engine's does."""
        if standing is None:
            run.over = "lost"
        elif standing.state != "RUNNING" or standing.late:
            run.over = "stopped"
        elif standing.draining:
            run.body, run.must_ask, run.waiting, run.hands_over = None, False, None, True
        else:
            return True
        return False

    def advance_one(
        self, run: Run, fate: str, *, ok: bool = True, dispatched: bool = False, tells: bool = True
    ) -> None:
        """The next thing that a run does."""
        if run.hands_over:
            self.release_one(run, fate)
        elif run.waiting is not None:
            self.suspend_one(run, fate)
        elif run.body is not None:
            self.checkpoint_one(run, fate)
        elif self.kind_of(run) is None:
            self.finish_one(run, fate, dispatched=dispatched, tells=tells)
        elif self.kind_of(run) not in BODIES:
            self.call_one(run, fate)
        elif run.announced is None and (run.after_crash or self.kind_of(run) == "limited"):
            self.announce_one(run, fate)
        elif run.look_is_old:
            self.look_one(run, fate)
        else:
            self.enter_one(run, ok)

    def free(self) -> list[Run]:
        return [run for run in self.runs if run.is_free]

    @event(
        120,
        when=lambda self: self.free(),
        fate=FATES,
        ok=(True,) * 9 + (False,),
        dispatched=yes_or_no,
        tells=yes_or_no,
    )
    def advance(self, chance: Random, fate: str, ok: bool, dispatched: bool, tells: bool) -> None:
        """A run does the next thing: a look, a body, its checkpoint, a call, a suspension, a hand-over, its end.

        ``ok``: the body returns. ``dispatched``: nothing waits for Celery to deliver the end. ``tells``: those that
        await it are told in the same round trip.
        """
        run = chance.choice(self.free())
        self.advance_one(run, fate, ok=ok, dispatched=dispatched, tells=tells)

    # Births

    @event(3, workflow=IDS, fate=FATES)
    def publish(self, chance: Random, workflow: str, fate: str) -> None:
        """A start, perhaps of an id that is taken."""
        self.publish_one(workflow, fate)

    def publish_one(self, workflow: str, fate: str, name: str = NAME) -> None:
        birth = self.birth(workflow, name)
        before = self.rows().workflows.get(workflow)

        def then(answer: Any) -> None:
            if before is not None and not self.promises.pruning:
                assert not answer.born, f"{workflow} was there already"

        self.make(
            Statement(
                "publish", lambda party: party.workflows.publish(birth, patience=0), then, nothing,
                {workflow: Lock.SHARE}, things(f"birth {workflow}"),
            ),
            fate,
        )  # fmt: skip

    @event(1, when=lambda self: self.latest.workflows and not self.stage.busy(), workflow=IDS)
    def conflict(self, chance: Random, workflow: str) -> None:
        """A start of another task under an id that is taken leaves it as it is."""
        before = self.rows().workflows.get(workflow)
        if before is not None:
            self.publish_one(workflow, "answered", OTHER)
            assert self.rows().workflows[workflow] == before

    def birth(self, workflow: str, name: str = NAME, parent: str | None = None) -> Birth:
        return Birth(
            workflow, name, "celery", "{}", b"[]", "application/json", "utf-8", MAX_CRASHES, REPUBLISH_AFTER,
            timeout=self.timeouts[workflow], parent_id=parent,
        )  # fmt: skip

    # Claims

    @event(30, when=lambda self: self.enqueued(), which=workers, fate=FATES)
    def claim(self, chance: Random, which: int, fate: str) -> None:
        """A message has come to a worker."""
        self.claim_for(self.workers[which], chance.choice(self.enqueued()), fate)

    def enqueued(self) -> list[str]:
        """What can be claimed, unless there are too many runs already."""
        if sum(run.runs for run in self.runs) > 4:
            return []
        return [workflow for workflow, row in self.latest.workflows.items() if row.state == "ENQUEUED"]

    @event(2, workflow=IDS, which=workers, fate=FATES)
    def claim_in_vain(self, chance: Random, workflow: str, which: int, fate: str) -> None:
        """A message has come twice, or late."""
        self.claim_for(self.workers[which], workflow, fate)

    def claim_for(self, worker: Worker, workflow: str, fate: str, name: str = NAME) -> Run:
        run = Run(worker, workflow, uuid.uuid4())
        self.runs.append(run)
        mark = f"confirm {worker.node} {workflow}"
        if any(session.statement is not None and mark in session.statement.things for session in self.stage.busy()):
            run.over = "refused"  # a confirmation takes less time than a resume, its message and a cancel together
            return run

        seen = self.rows().workflows.get(workflow)
        # What a resumed workflow's last owner has on its way is waited for, if that owner is gone.
        lock = Lock.NO_KEY if seen is None or seen.node is None else Lock.UPDATE

        def then(claim: Any) -> None:
            if claim is None:
                run.over = "refused"
                return
            row = self.rows().workflows.get(workflow)
            run.born = None if row is None else row.created_at
            run.fence = claim.fence
            run.after_crash = claim.crashes > 0
            for key, step in claim.history.items():
                run.tries[key] = step.tries
                run.due[key] = step.due_in
                if step.ok is not None:
                    run.history[key] = (step.ok, step.payload.data)
                elif step.due_in > 0 and key.startswith("try"):
                    run.waiting = ("retry", step.due_in, Wakers())
            self.promises.claimed(run)

        self.make_for(
            run,
            Statement(
                "claim",
                lambda party: party.workflows.claim(workflow, name, run.token, worker.node, retries=0, patience=0),
                then, nothing, {workflow: lock},
            ),
            fate,
        )  # fmt: skip
        return run

    # Steps

    def announcing(self) -> list[Run]:
        return [
            run for run in self.at(*BODIES)
            if run.announced is None and (self.kind_of(run) == "limited" or run.after_crash)
        ]  # fmt: skip

    def announce_one(self, run: Run, fate: str) -> None:
        key, fence, spent = self.key_of(run), run.fence, run.after_crash
        assert key is not None
        assert fence is not None
        if spent:
            run.tries[key] = run.tries.get(key, 0) + 1
        record = self.record(run, key)
        kill_in = 5.0 if key.startswith("limited") else None

        def then(standing: Standing | None) -> None:
            if self.stands(run, standing):
                if standing is not None and standing.settled is not None:
                    self.settle(run, key, bool(standing.settled.ok), standing.settled.payload.data)
                else:
                    run.announced = key
                    run.after_crash = False

        self.make_for(
            run,
            Statement(
                "save_try",
                lambda party: party.checkpoints.save_try(
                    fence, record, None, spent=spent, kill_in=kill_in, patience=0
                ),
                then, nothing, {run.workflow: Lock.KEY_SHARE}, things(f"{run.workflow}/{key}"),
            ),
            fate,
        )  # fmt: skip

    def entering(self) -> list[Run]:
        announcing = self.announcing()
        return [run for run in self.at(*BODIES) if run not in announcing and not run.look_is_old]

    def enter_one(self, run: Run, ok: bool) -> None:
        key = self.key_of(run)
        assert key is not None
        value = f"{run.workflow} {key} {next(self.values)}".encode()
        self.promises.enters(run, key)
        run.body = (key, ok, value)
        run.tries[key] = run.tries.get(key, 0) + (run.announced != key or key.startswith("limited"))
        self.promises.bodies[value] = run

    @event(8, when=lambda self: self.in_body(), fate=FATES)
    def checkpoint_slow(self, chance: Random, fate: str) -> None:
        """An atomic step has ended: the slow statement at once."""
        run = chance.choice(self.in_body())
        run.must_ask = True
        self.checkpoint_one(run, fate)

    def checkpoint_one(self, run: Run, fate: str) -> None:
        assert run.body is not None
        assert run.fence is not None
        key, ok, value = run.body
        fence, record = run.fence, self.record(run, key, ok, value)

        def then_fast(done: bool) -> None:
            if done:
                self.settle(run, key, ok, value)
            else:
                run.must_ask = True

        def then_slow(standing: Standing | None) -> None:
            settled = None if standing is None else standing.settled
            if self.stands(run, standing):
                self.settle(run, key, ok, value)
                if settled is not None:
                    self.settle(run, key, bool(settled.ok), settled.payload.data)

        do: Callable[[Party], Any]
        if run.must_ask:
            name, then = "save_slow", then_slow
            do = lambda party: party.checkpoints.save_slow(fence, record, patience=0)  # noqa: E731
        else:
            name, then = "save", then_fast
            do = lambda party: party.checkpoints.save(fence, record, patience=0)  # noqa: E731
        locks = {run.workflow: Lock.KEY_SHARE}
        self.make_for(run, Statement(name, do, then, nothing, locks, things(f"{run.workflow}/{key}")), fate)

    @event(8, when=lambda self: self.failing(), fate=FATES, delay=(0.0, 60.0))
    def fail(self, chance: Random, fate: str, delay: float) -> None:
        """A try has failed, and another one follows: at once, or after a suspension."""
        run = chance.choice(self.failing())
        assert run.body is not None
        assert run.fence is not None
        key, fence = run.body[0], run.fence
        record = self.record(run, key)

        def then(standing: Standing | None) -> None:
            if self.stands(run, standing):
                if standing is not None and standing.settled is not None:
                    self.settle(run, key, bool(standing.settled.ok), standing.settled.payload.data)
                    return
                self.promises.failed(run, key)
                run.body = run.announced = None
                if delay:
                    run.waiting = ("retry", delay, Wakers())

        self.make_for(
            run,
            Statement(
                "save_try", lambda party: party.checkpoints.save_try(fence, record, delay, patience=0), then, nothing,
                {run.workflow: Lock.KEY_SHARE}, things(f"{run.workflow}/{key}"),
            ),
            fate,
        )  # fmt: skip

    def failing(self) -> list[Run]:
        return [run for run in self.in_body() if run.body is not None and run.body[0].startswith("try")
                and not run.must_ask]  # fmt: skip

    def looking(self) -> list[Run]:
        return [run for run in self.at(*BODIES) if run.look_is_old]

    def look_one(self, run: Run, fate: str) -> None:
        fence = run.fence
        assert fence is not None

        def then(look: Any) -> None:
            mine = look is not None and look.mine
            self.stands(run, Standing(look.state, look.draining, look.late) if mine else None)

        self.make_for(
            run, Statement("look", lambda party: party.workflows.look(fence, patience=0), then, nothing), fate
        )

    # Other calls

    def call_one(self, run: Run, fate: str) -> None:
        getattr(self, f"_{self.kind_of(run)}")(run, self.key_of(run), run.fence, fate)

    def _sleep(self, run: Run, key: str, fence: Fence, fate: str) -> None:
        record = self.record(run, key, True, b"null")

        def then(found: Any) -> None:
            if self.stands(run, found and found.standing):
                run.history[key] = (True, b"null")
                run.due[key] = found.due_in
                run.waiting = ("sleep", found.due_in, Wakers())

        locks, names = {run.workflow: Lock.KEY_SHARE}, things(f"{run.workflow}/{key}")
        if run.due.get(key, 0) > 0:
            run.waiting = ("sleep", run.due[key], Wakers())
        else:
            self.make_for(
                run,
                Statement("sleep", lambda party: party.awaits.sleep(fence, record, 100.0, None, patience=0), then,
                          nothing, locks, names),
                fate,
            )  # fmt: skip

    def _recv(self, run: Run, key: str, fence: Fence, fate: str) -> None:
        record = self.record(run, key, True, b"default")
        there = self.promises.oldest(self.rows(), run.workflow)

        def then(found: Any) -> None:
            if self.stands(run, found and found.standing):
                if found.checkpoint is None:
                    run.waiting = ("message", None, Wakers(topics=frozenset({""})))
                else:
                    self.promises.received(there, found.checkpoint.payload.data, key)
                    self.settle(run, key, True, found.checkpoint.payload.data)

        self.make_for(
            run,
            Statement(
                "receive", lambda party: party.messages.receive(fence, record, "", None, patience=0), then, nothing,
                {run.workflow: Lock.KEY_SHARE}, things(f"{run.workflow}/{key}", f"message {run.workflow} *"),
            ),
            fate,
        )  # fmt: skip

    def _await(self, run: Run, key: str, fence: Fence, fate: str) -> None:
        record = self.record(run, key)
        locks = {run.workflow: Lock.KEY_SHARE}

        def then_registered(_: Any) -> None:
            run.registered = True

        def then(settled: Any) -> None:
            (one,) = settled or [None]
            if self.stands(run, one and one.found.standing):
                outcome = one.found.checkpoint
                if outcome is not None:
                    self.settle(run, key, bool(outcome.ok), outcome.payload.data)
                elif one.is_known:
                    run.waiting = ("child", None, Wakers(waits={key: 0}))
                else:
                    self.give_up(run, key)

        if not run.registered:
            self.make_for(
                run,
                Statement(
                    "register", lambda party: party.awaits.register(fence, [CHILD], [key], patience=0),
                    then_registered, nothing, locks, things("awaiting"),
                ),
                fate,
            )  # fmt: skip
            return
        self.make_for(
            run,
            Statement(
                "settle", lambda party: party.awaits.settle(fence, [record], [CHILD], None, None, patience=0), then,
                nothing, locks, things(f"{run.workflow}/{key}", "awaiting"),
            ),
            fate,
        )  # fmt: skip

    def _bear(self, run: Run, key: str, fence: Fence, fate: str) -> None:
        record, birth = self.record(run, key, True, b"child"), self.birth(CHILD, parent=PARENT)

        def then(start: Any) -> None:
            if self.stands(run, start and start.standing):
                assert start.child_id == CHILD
                self.settle(run, key, True, b"child")

        self.make_for(
            run,
            Statement(
                "bear", lambda party: party.workflows.bear(fence, record, birth, patience=0), then, nothing,
                {run.workflow: Lock.SHARE, CHILD: Lock.SHARE}, things(f"{run.workflow}/{key}", f"birth {CHILD}"),
            ),
            fate,
        )  # fmt: skip

    def _send(self, run: Run, key: str, fence: Fence, fate: str) -> None:
        other = CHILD if run.workflow == PARENT else PARENT
        # The key is made of the sender's id and the step's: every attempt has the same.
        mark = f"{run.workflow}/{key}"
        record = self.record(run, key, True, b"sent")
        letter = Letter(other, "", mark, Payload(body_of(other, mark)))

        def then(posted: Any) -> None:
            if self.stands(run, posted and posted.standing):
                if posted.kept:
                    self.settle(run, key, True, b"sent")
                else:
                    self.give_up(run, key)

        self.make_for(
            run,
            Statement(
                "send_as_step", lambda party: party.messages.send_as_step(fence, record, letter, patience=0), then,
                nothing, {run.workflow: Lock.KEY_SHARE}, things(f"{run.workflow}/{key}", f"message {other} {mark}"),
            ),
            fate,
        )  # fmt: skip

    @event(40, when=lambda self: any(run.unsure is not None and run.runs for run in self.runs), fate=FATES)
    def repeat(self, chance: Random, fate: str) -> None:
        """Without an answer a statement is made again."""
        run = chance.choice([run for run in self.runs if run.unsure is not None and run.runs])
        assert run.unsure is not None
        self.make_for(run, run.unsure, fate)

    # Ends of attempts

    def suspend_one(self, run: Run, fate: str) -> None:
        assert run.waiting is not None
        fence, (reason, seconds, wakers) = run.fence, run.waiting
        assert fence is not None

        def then(answer: Any) -> None:
            run.over = "suspended"
            if not answer[0]:
                self.unsent(run)

        self.make_for(
            run,
            Statement(
                "suspend",
                lambda party: party.workflows.suspend(
                    fence, reason, seconds, wakers, republish_after=REPUBLISH_AFTER, patience=0
                ),
                then, nothing, {run.workflow: Lock.UPDATE},
            ),
            fate,
        )  # fmt: skip

    def unsent(self, run: Run) -> None:
        """An end that may have been its own: what it had to send may not have been sent."""
        run.over = "lost"
        self.make(
            Statement("unsent", lambda party: party.workflows.unsent([run.workflow], patience=0), ignore, nothing,
                      {run.workflow: Lock.NO_KEY})
        )  # fmt: skip

    def leaving(self) -> list[Run]:
        return [run for run in self.runs if run.is_free and run.hands_over]

    def release_one(self, run: Run, fate: str) -> None:
        fence = run.fence
        assert fence is not None

        def then(message: Any) -> None:
            run.over = "released"
            if message is None:
                self.unsent(run)

        self.make_for(
            run,
            Statement("release", lambda party: party.workflows.release(fence, REPUBLISH_AFTER, patience=0), then,
                      nothing, {run.workflow: Lock.UPDATE}),
            fate,
        )  # fmt: skip

    def finish_one(self, run: Run, fate: str, *, dispatched: bool, tells: bool) -> None:
        fence = run.fence
        assert fence is not None
        ok = all(outcome[0] for outcome in run.history.values())
        state = "SUCCESS" if ok else "FAILURE"
        payload = Payload(f"{run.workflow} ended {next(self.values)}".encode())
        if dispatched:
            self.promises.delivered.add((run.workflow, run.born, fence.attempt, state))
        tells = tells and fate in ("answered", "lost")
        locks = {run.workflow: Lock.UPDATE}
        if tells:
            locks |= {other: Lock.NO_KEY for other in IDS if other != run.workflow}

        def do(party: Party) -> bool:
            then = party.awaits.notifying([run.workflow], REPUBLISH_AFTER) if tells else NOTHING
            return party.workflows.finish(
                fence, state, payload, then, error=None if ok else "ValueError: no", dispatched=dispatched, patience=0
            )[0]

        def then(done: bool) -> None:
            look = None
            if not done:
                look = self.look_at(fence)
            if done or (look is not None and look.mine and look.state == state):
                run.over = "finished"
            elif look is not None and look.mine and (look.state in ("CANCELLED", "ENQUEUED") or look.late):
                run.over = "stopped"
            else:
                run.over = "lost"

        self.make_for(
            run, Statement("finish", do, then, nothing, locks, things("awaiting") if tells else things()), fate
        )

    def look_at(self, fence: Fence) -> Any:
        """An answer of the observer's: nothing can hold it up."""
        return self.onlooker.workflows.look(fence, patience=0)

    @property
    def onlooker(self) -> Party:
        return self.stage.onlooker

    # Deliveries

    @event(10, when=lambda self: self.delivering())
    def deliver(self, chance: Random) -> None:
        """Celery's tracer is done with the end of a run."""
        self.deliver_one(chance.choice(self.delivering()))

    def delivering(self) -> list[Run]:
        return [
            run for run in self.runs
            if run.is_alive and run.worker.is_alive and run.over in ("finished", "stopped") and not run.is_delivered
        ]  # fmt: skip

    def deliver_one(self, run: Run) -> None:
        run.is_delivered = True
        run.worker.delivered.add(run.workflow)
        assert run.fence is not None
        for state in ("SUCCESS", "FAILURE", "CANCELLED"):
            self.promises.delivered.add((run.workflow, run.born, run.fence.attempt, state))

    @event(10, when=lambda self: any(worker.is_alive and worker.delivered for worker in self.workers), fate=FATES)
    def confirm(self, chance: Random, fate: str) -> None:
        """A node says what was delivered."""
        self.confirm_of(chance.choice([w for w in self.workers if w.is_alive and w.delivered]), fate)

    def confirm_of(self, worker: Worker, fate: str) -> None:
        ids = sorted(worker.delivered - self.executing(worker))
        if not ids:
            return

        def then(_: Any) -> None:
            worker.delivered -= set(ids)

        self.make(
            Statement("confirm", lambda party: party.workflows.confirm(worker.node, ids, patience=0), then, nothing,
                      dict.fromkeys(ids, Lock.UPDATE),
                      things(*(f"confirm {worker.node} {workflow}" for workflow in ids)), is_bulk=True),
            fate,
        )  # fmt: skip

    @event(3, workflow=IDS, which=workers, fate=FATES)
    def adopt(self, chance: Random, workflow: str, which: int, fate: str) -> None:
        """A worker takes over the delivery of an outcome."""
        self.adopt_by(self.workers[which], workflow, fate)

    def adopt_by(self, worker: Worker, workflow: str, fate: str, name: str = NAME) -> None:
        def then(outcome: Any) -> None:
            if outcome is not None and worker.is_alive:
                row = self.rows().workflows.get(workflow)
                worker.delivered.add(workflow)
                if row is not None:
                    self.promises.delivered.add((workflow, row.created_at, row.attempt, outcome.state))

        self.make(
            Statement("adopt", lambda party: party.workflows.adopt(workflow, name, worker.node, patience=0), then,
                      nothing, {workflow: Lock.NO_KEY}),
            fate,
        )  # fmt: skip

    # Workers

    def executing(self, worker: Worker) -> set[str]:
        """Workflows whose requests haven't left a worker."""
        return {
            run.workflow for run in self.runs
            if run.worker is worker and run.is_alive
            and (run.over is None or (run.over in ("finished", "stopped") and not run.is_delivered))
        }  # fmt: skip

    def listed(self, worker: Worker) -> list[str]:
        """What a worker's registry holds."""
        return sorted(self.executing(worker) | worker.delivered | worker.held)

    def _new_worker(self) -> Worker:
        return Worker(uuid.UUID(int=next(self.nodes)))

    @event(2, which=workers)
    def collect(self, chance: Random, which: int) -> None:
        """A heartbeat has collected its list, and takes a while until it is written."""
        worker = self.workers[which]
        worker.collected = (worker.as_of, self.listed(worker))

    @event(5, which=workers, fate=FATES)
    def beat(self, chance: Random, which: int, fate: str) -> None:
        """A heartbeat, with the list that was collected for it."""
        self.beat_of(self.workers[which], fate)

    def beat_of(self, worker: Worker, fate: str) -> None:
        as_of, active = worker.collected or (worker.as_of, self.listed(worker))
        facts = NodeFacts(worker.node, "worker@test", 1, LEASE)
        worker.collected = None

        def then(answer: Any) -> None:
            worker.as_of, worker.unheard = answer.seen, 0.0
            worker.is_draining = answer.draining

        self.make(
            Statement(
                "beat",
                lambda party: party.nodes.beat(
                    facts, active=active, accepted={}, as_of=as_of, draining=worker.is_draining, patience=0
                ),
                then, nothing, things=things(f"node {worker.node}"),
            ),
            fate,
        )  # fmt: skip

    @event(2, which=workers, trouble=("drain", "hand_over", "kill"), fate=FATES)
    def end_worker(self, chance: Random, which: int, trouble: str, fate: str) -> None:
        """A worker begins to shut down, ends cold, or dies; another one takes its place."""
        worker = self.workers[which]
        if trouble == "drain":
            worker.is_draining = True  # its next heartbeat says so
        elif trouble == "hand_over":
            self.hand_over(worker, fate)
        else:
            self.die(worker)

    def hand_over(self, worker: Worker, fate: str) -> None:
        """A cold shutdown: what runs is handed over, its processes are killed, and the worker is gone."""
        ids = [run.workflow for run in self.runs if run.worker is worker and run.runs]

        def then(handed: list[str]) -> None:
            for run in self.runs:
                if run.worker is worker and run.workflow in handed:
                    run.is_suspected = True

        self.make(
            Statement("hand_over", lambda party: party.workflows.hand_over(worker.node, ids, patience=0), then,
                      nothing, dict.fromkeys(ids, Lock.UPDATE), is_bulk=True),
            fate,
        )  # fmt: skip
        self.die(worker)

    @event(3, when=lambda self: any(run.runs for run in self.runs), notices=yes_or_no)
    def lose_process(self, chance: Random, notices: bool) -> None:
        """The process of a run dies; its worker notices that, or only finds that it isn't there any more."""
        run = chance.choice([run for run in self.runs if run.runs])
        run.is_alive, run.is_suspected = False, True
        run.worker.delivered.discard(run.workflow)
        if notices:
            run.worker.held.add(run.workflow)

    @event(8, when=lambda self: any(worker.is_alive and worker.held for worker in self.workers), fate=FATES)
    def report_lost(self, chance: Random, fate: str) -> None:
        """A worker hands back what its dead process ran, unless another one runs it here by now."""
        worker = chance.choice([w for w in self.workers if w.is_alive and w.held])
        self.rescue(worker, sorted(worker.held - self.executing(worker)), fate)

    def die(self, worker: Worker) -> None:
        worker.is_alive = False
        for run in self.runs:
            if run.worker is worker:
                run.is_alive, run.is_suspected = False, True
        self.workers[self.workers.index(worker)] = self._new_worker()

    # Others

    @event(8, workflow=IDS, mark=tuple("abcd"), fate=FATES)
    def send(self, chance: Random, workflow: str, mark: str, fate: str) -> None:
        """A client's message, perhaps a doubled one."""
        self.send_one(workflow, mark, fate)

    def send_one(self, workflow: str, mark: str, fate: str) -> None:
        letter = Letter(workflow, "", mark, Payload(body_of(workflow, mark)))

        def then(answer: Any) -> None:
            if answer[0]:
                self.promises.sent(workflow, mark)

        self.make(
            Statement(
                "send", lambda party: party.messages.send(letter, REPUBLISH_AFTER, patience=0), then, nothing,
                {workflow: Lock.NO_KEY}, things(f"message {workflow} {mark}"),
            ),
            fate,
        )  # fmt: skip

    @event(2, workflow=IDS, mark=tuple("ef"), fate=FATES)
    def put(self, chance: Random, workflow: str, mark: str, fate: str) -> None:
        """A message in a transaction of the caller's own."""
        letter = Letter(workflow, "", mark, Payload(body_of(workflow, mark)))
        self.make(
            Statement("put", lambda party: put(party, letter), ignore, nothing,
                      things=things(f"message {workflow} {mark}")),
            fate,
        )  # fmt: skip

    @event(4, ids=((PARENT,), (CHILD,), IDS), fate=FATES)
    def cancel(self, chance: Random, ids: tuple[str, ...], fate: str) -> None:
        """Workflows are cancelled, whatever they do."""
        self.cancel_all(sorted(ids), fate)

    def cancel_all(self, ids: list[str], fate: str) -> None:
        self.make(
            Statement("cancel", lambda party: party.workflows.cancel(ids, verdict=VERDICT, patience=0), ignore, nothing,
                      dict.fromkeys(ids, Lock.NO_KEY), is_bulk=True),
            fate,
        )  # fmt: skip

    @event(12, when=lambda self: self.resumable(), fate=FATES)
    def resume(self, chance: Random, fate: str) -> None:
        """A workflow that has ended without success goes on."""
        workflow = chance.choice(self.resumable())
        self.make(
            Statement("resume", lambda party: party.workflows.resume([workflow], REPUBLISH_AFTER, patience=0), ignore,
                      nothing, {workflow: Lock.UPDATE}, is_bulk=True),
            fate,
        )  # fmt: skip

    def resumable(self) -> list[str]:
        rows = self.latest.workflows
        return [workflow for workflow, row in rows.items() if row.state in ("CANCELLED", "FAILURE", "DEAD")]

    # Sweeps

    @event(5, fate=FATES)
    def rescue_orphans(self, chance: Random, fate: str) -> None:
        """The rescue duty."""
        self.rescue(None, [], fate)

    def rescue(self, worker: Worker | None, lost: list[str], fate: str) -> None:
        before, node = self.rows(), worker and worker.node

        def then(rescued: list[tuple[str, str]]) -> None:
            for workflow, _ in rescued:
                for run in self.runs:
                    run.is_suspected |= run.workflow == workflow
            if worker is not None:
                worker.held -= set(lost)

        def do(party: Party) -> Any:
            rescued = party.workflows.rescue(
                node, lost, lease=LEASE, verdict=VERDICT, error="no", limit=100, patience=0
            )
            for workflow, _ in rescued:
                assert before.may_be_rescued(workflow, LEASE, node, tuple(lost)), f"{workflow} is no orphan"
            return rescued

        locks = dict.fromkeys(IDS, Lock.UPDATE)
        names = things(*(f"{workflow}/{kind}{n}" for workflow in IDS for n, kind in enumerate(self.programs[workflow])))
        self.make(Statement("rescue", do, then, nothing, locks, names, skips=True, is_bulk=True), fate)

    @event(12, duty=("expire", "tell", "notify", "wake", "republish", "redispatch", "prune"), fate=FATES)
    def sweep(self, chance: Random, duty: str, fate: str) -> None:
        """One of the other duties."""
        self.sweep_one(duty, fate)

    def sweep_one(self, duty: str, fate: str) -> None:
        before = self.rows()
        locks = dict.fromkeys(IDS, Lock.NO_KEY)
        names = things("awaiting", *(f"message {workflow} *" for workflow in IDS))
        self.promises.pruning |= duty == "prune"

        def do(party: Party) -> Any:
            found = getattr(self, f"_do_{duty}")(party)
            if duty == "redispatch":
                assert all(before.may_be_redispatched(workflow, LEASE) for workflow in found), f"{found} have an owner"
            if duty == "prune":
                assert all(before.may_be_pruned(workflow, RETENTION) for workflow in found), f"{found} are needed"
            return found

        skips = duty not in ("tell", "notify")
        self.make(Statement(duty, do, ignore, nothing, locks, names, skips=skips, is_bulk=True), fate)

    def _do_expire(self, party: Party) -> list[str]:
        return party.workflows.expire(verdict=VERDICT, limit=100, patience=0)

    def _do_tell(self, party: Party) -> list[str]:
        return ids_of(party.messages.tell(None, REPUBLISH_AFTER, limit=100, patience=0)[1])

    def _do_notify(self, party: Party) -> list[str]:
        targets = self.onlooker.awaits.come(limit=100, patience=0)
        return ids_of(party.awaits.notify(targets, REPUBLISH_AFTER, patience=0))

    def _do_wake(self, party: Party) -> list[str]:
        return party.workflows.wake(limit=100, patience=0)

    def _do_republish(self, party: Party) -> list[str]:
        return ids_of(party.workflows.republish(republish_after=REPUBLISH_AFTER, limit=100, patience=0))

    def _do_redispatch(self, party: Party) -> list[str]:
        return ids_of(party.workflows.redispatch(republish_after=REPUBLISH_AFTER, lease=LEASE, limit=100, patience=0))

    def _do_prune(self, party: Party) -> list[str]:
        return party.workflows.prune(kept=dict.fromkeys(FINAL, RETENTION), limit=100, patience=0)

    # Time, and what is on its way

    @event(
        5,
        when=lambda self: not self.stage.busy("slow"),
        seconds=TIMES,
        heard=((), (0,), (1,), (0, 1), (0, 1)),
    )
    def pass_time(self, chance: Random, seconds: float, heard: tuple[int, ...]) -> None:
        """Time passes, in which some workers are heard all the while. With none it is a database that was away."""
        if seconds < RETENTION or not self.stage.busy():  # no transaction lasts so long
            self.age(seconds, [self.workers[which] for which in heard])

    def age(self, seconds: float, heard: list[Worker]) -> None:
        self.time += seconds
        execute = self.stage.observer.execute
        for statement in AGE:
            execute(statement, {"seconds": seconds})
        execute(
            "UPDATE celery_durable.node SET seen = clock_timestamp() WHERE id IN (SELECT id FROM celery_durable.node"
            " WHERE id = ANY(%s) FOR UPDATE SKIP LOCKED)", [[worker.node for worker in heard]],
        )  # fmt: skip
        back = timedelta(seconds=seconds)
        for worker in self.workers:
            worker.as_of = worker.as_of and worker.as_of - back
            worker.collected = worker.collected and (
                worker.collected[0] and worker.collected[0] - back, worker.collected[1]
            )  # fmt: skip
            worker.unheard = 0.0 if worker in heard else worker.unheard + seconds
        for run in self.runs:
            run.look_is_old = True
            run.due = {key: due - seconds for key, due in run.due.items()}
            run.is_suspected |= run.worker.unheard >= LEASE
        self.promises.forget_who_changed()

    # Failover

    @event(1, when=lambda self: not self.stage.busy() and self.lost_by_failover())
    def fail_over(self, chance: Random) -> None:
        """The standby that is promoted hadn't got the last claim yet, nor what followed: its number comes again."""
        workflow = chance.choice(self.lost_by_failover())
        for statement in FAIL_OVER:
            self.stage.observer.execute(statement, {"id": workflow})
        self.promises.forget(workflow)
        for run in self.runs:
            run.is_suspected |= run.workflow == workflow

    def lost_by_failover(self) -> list[str]:
        """Workflows whose last attempt has done nothing for others yet."""
        rows = self.latest
        taken = {message.workflow for message in rows.messages.values() if message.taken_by is not None}
        return [
            workflow for workflow, row in rows.workflows.items()
            if row.state == "RUNNING" and workflow not in taken
            and all(kind in BODIES for kind in self.programs[workflow][:2])
        ]  # fmt: skip

    @event(12, when=lambda self: self.stage.busy("open"), how=("commit", "commit", "lose", "roll back"))
    def end_transaction(self, chance: Random, how: str) -> None:
        """What was open is committed, with or without an answer, or rolled back."""
        session = chance.choice(self.stage.busy("open"))
        if how == "roll back":
            self.stage.roll_back(session)
        else:
            # What is committed now comes before all that waits for it.
            self.promises.check(Rows.seen_by(session.party.connection))
            self.stage.commit(session, lost=how == "lose")

    @event(8, when=lambda self: self.stage.busy("slow"))
    def go_on(self, chance: Random) -> None:
        """A statement that had its snapshot goes on."""
        self.stage.go_on(chance.choice(self.stage.busy("slow")))

    @event(4, when=lambda self: self.stage.busy())
    def cut(self, chance: Random) -> None:
        """A connection breaks, and its statement goes on: who made it makes it again beside it."""
        self.stage.cut(chance.choice(self.stage.busy()))

    @invariant()
    def all_promises_are_kept(self) -> None:
        """Every invariant that can be seen in rows."""
        type(self).steps += 1
        self.is_whole = False
        self.latest = self.rows()
        self.promises.check(self.latest)
        self.is_whole = True

    # The end

    def let_all_end(self) -> None:
        """A new worker, whose every statement is answered, and sweeps; the broker has lost all there was."""
        while unfinished := self.stage.busy("slow", "open"):
            if unfinished[0].status == "slow":
                self.stage.go_on(unfinished[0])
            else:
                self.stage.commit(unfinished[0], lost=True)
        for worker in list(self.workers):
            self.die(worker)
        last = self.workers[0]
        self.beat_of(last, "answered")
        self.age(LEASE + 1, [last])
        for _ in range(60):
            if self.sweep_fairly(last):
                break
        else:
            raise AssertionError(
                f"invariant 13: not at its end after many sweeps: {self.rows().workflows}; {self.stage}"
            )
        self.promises.at_the_end(self.rows())
        for _ in range(3):
            self.age(RETENTION + 1, [last])
            self.sweep_one("prune", "answered")
        rows = self.rows()
        left = [rows.workflows, rows.checkpoints, rows.messages, rows.awaiting]
        assert not any(left), f"left behind: {left}"

    def sweep_fairly(self, last: Worker) -> bool:
        """Time passes, all duties are done, their messages are taken; whether all has ended by now."""
        self.age(400, [last])
        self.beat_of(last, "answered")
        messages: list[str] = []
        self.rescue(None, [], "answered")
        self.sweep_one("expire", "answered")
        for duty in ("tell", "notify", "redispatch", "republish"):
            messages += getattr(self, f"_do_{duty}")(self.onlooker)
        self.sweep_one("wake", "answered")
        for number, workflow in enumerate(IDS):
            row = self.rows().workflows.get(workflow)
            if row is not None and row.state == "SUSPENDED" and row.topics:
                self.send_one(workflow, f"last {self.time} {number}", "answered")
        for workflow in messages:
            row = self.rows().workflows[workflow]
            if row.state == "ENQUEUED":
                self.run_to_its_end(self.claim_for(last, workflow, "answered", row.name))
            else:
                self.adopt_by(last, workflow, "answered", row.name)
        self.confirm_of(last, "answered")
        self.promises.check(self.rows())
        return all(row.finished_at is not None and row.dispatched for row in self.rows().workflows.values())

    def run_to_its_end(self, run: Run) -> None:
        """All that a worker does in one attempt."""
        while run.runs:
            run.look_is_old = False
            self.advance_one(run, "answered")
            self.promises.check(self.rows())
        if run in self.delivering():
            self.deliver_one(run)


AGE = tuple(
    f"UPDATE celery_durable.{table} SET "
    + ", ".join(f"{column} = {column} - make_interval(secs => %(seconds)s)" for column in columns)
    + f" WHERE ctid = ANY(ARRAY(SELECT ctid FROM celery_durable.{table} FOR {lock} SKIP LOCKED))"
    for table, lock, columns in (
        ("workflow", "NO KEY UPDATE",
         ("claimed_at", "deadline", "wake_at", "publish_at", "published_at", "started_at", "finished_at")),
        ("checkpoint", "UPDATE", ("started_at", "at", "wake_at", "kill_at")),
        ("node", "UPDATE", ("started_at", "seen", "unbroken", "as_of")),
    )
)  # fmt: skip


FAIL_OVER = (
    "DELETE FROM celery_durable.checkpoint c USING celery_durable.workflow w"
    " WHERE w.id = %(id)s AND c.workflow = w.id AND c.attempt = w.attempt",
    "UPDATE celery_durable.workflow SET state = 'ENQUEUED', attempt = attempt - 1, node = NULL, token = NULL,"
    " publish_at = clock_timestamp() WHERE id = %(id)s",
)


def ids_of(messages: list[Any]) -> list[str]:
    return [message.workflow_id for message in messages]


def put(party: Party, letter: Letter) -> None:
    """Write a message as `Messages.put_in` does, without the savepoint of a caller's transaction."""
    params = {"workflow": letter.workflow, "topic": letter.topic, "idempotency_key": letter.idempotency_key,
              "body": letter.payload.data, "content_type": letter.payload.content_type}  # fmt: skip
    party.messages._run("put", 0, **params)


def nothing() -> None:
    """Nobody waits for the answer."""


def ignore(answer: Any) -> None:
    """Nobody needs the answer."""
