"""One wait of a workflow: settled by a statement, or given up, with the worker, until something comes.

A wait is written once, as a coroutine, as a step is. It looks; if what it awaits isn't there it registers, and looks
once more; then it parks. In a thread that unwinds the function; on the event loop it does when nothing else goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

from ..exceptions import WorkflowNotFound
from ..serialization import Payload
from ..store import StepRecord
from ..store.rows import Checkpoint, Found, Standing, Wakers
from .context import WHILE_ALIVE, Attempt, boot_time
from .retry import Ended
from .step import Answer, Call
from .waiting import NOTHING, Waiting


@dataclass(frozen=True, slots=True)
class Looked:
    """What a look has found: which calls have their outcome, and when the others have theirs at the latest."""

    standing: Standing | None
    settled: Mapping[str, Checkpoint] = field(default_factory=dict)
    due_in: float | None = None
    #: Workflows that there aren't, by the keys of the calls that ask for them.
    unknown: Mapping[str, str] = field(default_factory=dict)


class Wait:
    """Calls that wait together: for one thing each, until all of them have their outcome."""

    #: What the workflow is shown to wait for.
    reason: str
    wakers: Wakers = NOTHING

    def __init__(self, calls: Sequence[Call]) -> None:
        self.attempt: Attempt = calls[0].attempt
        self.calls = calls
        self.open = [call for call in calls if not call.is_settled]

    def look(self) -> Looked:
        """Make the statement that settles what can be settled."""
        raise NotImplementedError

    def register(self) -> None:
        """Make the statement after which whoever brings something finds this workflow waiting."""

    async def run(self, waiting: Waiting) -> list[Answer]:
        """Wait for all outcomes, and return them in the order of the calls."""
        if self.open:
            await self._settle(waiting)
        return [
            call.replay() if call.is_settled else call.answer(self.attempt.history[call.key]) for call in self.calls
        ]

    async def _settle(self, waiting: Waiting) -> None:
        tell, key = self.attempt.engine.observers.tell, self.calls[0].key
        tell("call_starting", self.attempt.id, key)
        due_in = await self._look(waiting)
        if self.open and self.wakers.waits:
            await waiting.run(self.register)
            tell("call_registered", self.attempt.id, key)
            due_in = await self._look(waiting)
        while self.open:
            await waiting.park(self.attempt, self.reason, due_in, self.wakers)
            due_in = await self._look(waiting)
        tell("call_recorded", self.attempt.id, key)

    async def _look(self, waiting: Waiting) -> float | None:
        looked = await watched(self.attempt, self.look, waiting)
        self.attempt.history.update(looked.settled)
        for call in self.open:
            if call.key in looked.unknown:
                await refuse(call, looked.unknown[call.key], waiting)
        self.open = [call for call in self.open if call.key not in {*looked.settled, *looked.unknown}]
        return looked.due_in


async def watched(attempt: Attempt, look: Callable[[], Looked], waiting: Waiting) -> Looked:
    """Make a statement that tells how the run stands; unwind if it isn't well."""
    attempt.check_going()
    sent_at = boot_time()
    looked = await waiting.run(look)
    attempt.judge(looked.standing)
    attempt.confirm(sent_at)
    return looked


class Reception(Wait):
    """Waits for a message of a topic; after ``timeout`` seconds its default is the outcome."""

    def __init__(self, call: Call, topic: str, timeout: float | None, default: Payload) -> None:
        super().__init__([call])
        self.topic = topic
        self.timeout = timeout
        self.default = default
        self.reason = f"message {topic}" if topic else "message"
        self.wakers = Wakers(topics=frozenset({topic}))

    def look(self) -> Looked:
        """Take the oldest message."""
        (call,) = self.calls
        messages = self.attempt.engine.store.messages
        return _looked(messages.receive(
            self.attempt.fence, record_of(call, self.default), self.topic, self.timeout, patience=WHILE_ALIVE
        ))  # fmt: skip


class Listening(Wait):
    """Waits for an event of another workflow; after ``timeout`` seconds, or its end, the default is the outcome."""

    def __init__(self, call: Call, target: str, event: str, timeout: float | None, default: Payload) -> None:
        super().__init__([call])
        self.target = target
        self.event = event
        self.timeout = timeout
        self.default = default
        self.reason = f"event {event} of {target}"
        self.wakers = Wakers(waits={call.key: 0})

    def look(self) -> Looked:
        """Read the event."""
        (call,) = self.calls
        found = self.attempt.engine.store.events.receive(
            self.attempt.fence, record_of(call, self.default), self.target, self.event, self.timeout,
            patience=WHILE_ALIVE,
        )  # fmt: skip
        if found is None:
            return Looked(None)
        return _looked(found[0]) if found[1] else Looked(found[0].standing, unknown={call.key: self.target})

    def register(self) -> None:
        """Have this workflow told of the event."""
        self.attempt.engine.store.awaits.register(
            self.attempt.fence, [self.target], [self.calls[0].key], self.event, patience=WHILE_ALIVE
        )


class Ends(Wait):
    """Waits for the ends of other workflows, all of them; after ``timeout`` seconds ``late`` is the error."""

    def __init__(
        self, calls: Sequence[Call], targets: Sequence[str], timeout: float | None = None, late: Payload | None = None
    ) -> None:
        super().__init__(calls)
        self.targets = {call.key: target for call, target in zip(calls, targets, strict=True)}
        self.timeout = timeout
        self.late = late
        self.reason = f"workflow {targets[0]}" if len(targets) == 1 else f"{len(targets)} workflows"
        self.wakers = Wakers(waits={calls[0].key: 0})

    def look(self) -> Looked:
        """Read which have ended, and how."""
        settled = self.attempt.engine.store.awaits.settle(
            self.attempt.fence, [record_of(call) for call in self.open], [self.targets[call.key] for call in self.open],
            self.timeout, self.late, patience=WHILE_ALIVE,
        )  # fmt: skip
        if settled is None:
            return Looked(None)
        unknown = {each.key: self.targets[each.key] for each in settled if not each.is_known}
        outcomes = {each.key: each.found.checkpoint for each in settled if each.found.checkpoint is not None}
        due = [each.found.due_in for each in settled if each.found.checkpoint is None and each.found.due_in is not None]
        return Looked(settled[0].found.standing, outcomes, min(due, default=None), unknown)

    def register(self) -> None:
        """Have this workflow told of the last end."""
        targets = [self.targets[call.key] for call in self.open]
        self.attempt.engine.store.awaits.register(
            self.attempt.fence, targets, [self.calls[0].key] * len(targets), patience=WHILE_ALIVE
        )


async def first_of(call: Call, targets: Sequence[str], waiting: Waiting) -> Answer:
    """Wait for the first of some workflows that ends; its id is the outcome."""
    if call.is_settled:
        return call.replay()
    attempt, awaits = call.attempt, call.attempt.engine.store.awaits
    distinct = sorted(set(targets))
    wakers = Wakers(waits={call.key: len(distinct) - 1})
    registered = False
    while True:
        attempt.check_going()
        ended, known = await waiting.run(partial(awaits.first, distinct, patience=WHILE_ALIVE))
        unknown = [target for target in distinct if target not in known]
        if unknown:
            return await refuse(call, unknown[0], waiting)
        if ended is not None:
            call.waiting = waiting
            answer = await call.settle(Ended(ended))
            await waiting.run(partial(awaits.forget, attempt.fence, call.key, patience=WHILE_ALIVE))
            return answer
        if registered:
            await waiting.park(attempt, f"the first of {len(distinct)} workflows", None, wakers)
        else:
            register = partial(
                awaits.register, attempt.fence, distinct, [call.key] * len(distinct), patience=WHILE_ALIVE
            )
            await waiting.run(register)
            registered = True


async def sleep(call: Call, seconds: float | None, until: datetime | None, waiting: Waiting) -> None:
    """Let time pass; when it ends is fixed at the first call. A long sleep gives the worker back."""
    attempt, saved = call.attempt, call.saved
    left = attempt.left_of(saved) if saved else await _begin_sleep(call, seconds, until, waiting)
    if left > attempt.engine.suspend_after:
        await waiting.park(attempt, "sleep", left)
    elif left > 0:
        await waiting.pause(attempt, left)


async def _begin_sleep(call: Call, seconds: float | None, until: datetime | None, waiting: Waiting) -> float:
    attempt, tell = call.attempt, call.attempt.engine.observers.tell
    tell("call_starting", attempt.id, call.key)
    begin = partial(
        attempt.engine.store.awaits.sleep, attempt.fence, record_of(call, call.encode(None)), seconds, until,
        patience=WHILE_ALIVE,
    )  # fmt: skip
    looked = await watched(attempt, lambda: _looked(begin()), waiting)
    tell("call_recorded", attempt.id, call.key)
    return looked.due_in or 0.0


def record_of(call: Call, payload: Payload | None = None) -> StepRecord:
    """Return what is written of a call that isn't a step."""
    args, digest = call.note
    return StepRecord(
        key=call.key, seq=call.seq, tries=1, args=args, fingerprint=digest, errors=None, payload=payload
    )  # fmt: skip


async def refuse(call: Call, target: str, waiting: Waiting) -> Answer:
    """Record that there is no such workflow, so that a replay sees the same."""
    call.waiting = waiting
    return await call.settle(Ended(error=WorkflowNotFound(
        f"There is no workflow {target!r}: its id is wrong, or retention has removed it."
    )))  # fmt: skip


def _looked(found: Found | None) -> Looked:
    if found is None:
        return Looked(None)
    settled = {} if found.checkpoint is None else {found.checkpoint.key: found.checkpoint}
    return Looked(found.standing, settled, found.due_in)
