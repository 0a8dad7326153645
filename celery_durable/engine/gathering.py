"""Several steps at once: bodies run in threads, and the thread of the workflow records what is ready together.

A step is a coroutine that gives way where its outcome is to be recorded. Until there a thread of the gathering runs it,
which then takes the next one; the thread of the workflow records, and runs the rest. So a thread is as long in use as a
body, and trivial bodies need few of them.
"""

from __future__ import annotations

import inspect
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..exceptions import ControlFlow, StepLost, Suspended
from ..store import StepRecord
from ..store.rows import Wakers
from .context import Attempt, logger
from .limits import is_foreign_limit
from .loop import FromThread
from .process import Threads
from .retry import Ended
from .step import Answer, Body, Call
from .waiting import NOTHING, StepCall, must_find_out

#: Bodies that end within so many seconds take turns in one thread, which is faster than to make one for each.
_AT_ONCE = 0.001


class _Parked(BaseException):
    """A branch waits for long, and leaves its thread to others."""

    def __init__(self, seconds: float) -> None:
        self.due = time.monotonic() + seconds


@dataclass(frozen=True, slots=True)
class _Unsaved:
    """What a step gives way with: an outcome that is to be recorded."""

    record: StepRecord

    def __await__(self) -> Generator[_Unsaved, bool, bool]:
        return (yield self)


@dataclass(slots=True, eq=False)
class _Branch:
    """One step of the gathering, and what has become of it."""

    call: Call
    body: Body
    due: float = 0.0
    answer: Answer | None = None
    error: BaseException | None = None
    #: What it waits for, while ``is_unsaved``.
    unsaved: _Unsaved | None = None
    #: Its thread has done what it can for it.
    has_arrived: bool = False
    #: Its own, in whichever thread it goes on.
    context: Context | None = None
    _run: Coroutine[Any, Any, Answer] | None = None

    def begin(self, waiting: _InBranch) -> None:
        """Run it until its outcome is to be recorded; or it has ended, or is parked."""
        self._run = self.call.run(self.body, waiting)
        try:
            self._advance(None)
        except BaseException as error:  # noqa: BLE001 - raised in the workflow's thread
            self.error = error

    def go_on(self, saved: bool) -> None:
        """Run the rest of it; raises what isn't the step's own."""
        try:
            self._advance(saved)
        except (Exception, ControlFlow) as error:
            if is_foreign_limit(error):
                raise
            self.error = error

    def _advance(self, saved: bool | None) -> None:
        assert self._run is not None
        assert self.context is not None
        try:
            self.unsaved = self.context.run(self._run.send, saved)
        except StopIteration as done:
            self.answer, self.unsaved = done.value, None
        except _Parked as parked:
            self.due = parked.due
            self.call.due_in = 0.0

    @property
    def is_done(self) -> bool:
        return self.answer is not None or self.error is not None

    @property
    def is_unsaved(self) -> bool:
        """Whether its outcome is still to be recorded, wherever the thread that was about to do so was interrupted."""
        return self._run is not None and inspect.getcoroutinestate(self._run) == inspect.CORO_SUSPENDED

    @property
    def is_lost(self) -> bool:
        return self.answer is not None and isinstance(self.answer.error, StepLost)


def gather_calls(attempt: Attempt, calls: Sequence[tuple[Call, Body]], max_concurrency: int) -> list[Answer]:
    """Run steps at once, and return what they answer in the given order, when all have.

    What has finished is kept when one fails or the worker dies. While one backs off for long, the others run;
    when all that are left do, the workflow is suspended.
    """
    return Gathering(attempt, [_Branch(call, body) for call, body in calls], max_concurrency).run()


class Gathering:
    """One gather under way."""

    def __init__(self, attempt: Attempt, branches: list[_Branch], max_concurrency: int) -> None:
        self.attempt = attempt
        self.branches = branches
        self.max_concurrency = max_concurrency
        self.waiting = _InBranch(self)
        self.threads = Threads(max_concurrency, "celery_durable branch")
        #: Branches that a thread has done what it can for.
        self.inbox: queue.SimpleQueue[_Branch] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.closed = False
        #: Has whoever records outside of the workflow's thread.
        self.alone = threading.Lock()
        for branch in branches:
            if branch.call.is_settled:
                branch.answer = branch.call.replay()
        self.ready = [branch for branch in branches if not branch.is_done]
        self.parked: list[_Branch] = []
        self.running = 0
        #: An error of no step has come up, such as an exit: no further step starts.
        self.is_broken = False
        self.suspects = self._suspects()

    def _suspects(self) -> int:
        """Return how many steps must run one at a time, each with its try written before its body.

        After a second crash in a row that is as many as can have been running then, the first of those left.
        """
        at_once = min(len(self.ready), self.max_concurrency)
        if at_once <= 1:
            return 0
        if must_find_out(self.attempt):
            return at_once
        self.attempt.take_suspicion()
        return 0

    def run(self) -> list[Answer]:
        """Run until every branch has its outcome, or none can go on."""
        if self.ready:
            try:
                self._run()
            finally:
                self._close()
        return self._answers()

    def _run(self) -> None:
        while True:
            self._start()
            if not self.running:
                return
            self._take(self._arrivals())

    @property
    def places(self) -> int:
        """How many branches may run at once."""
        return 1 if self.suspects else self.max_concurrency

    def _start(self) -> None:
        if self.attempt.unwinding is not None or self.is_broken:
            return
        now = time.monotonic()
        self.ready += [branch for branch in self.parked if branch.due <= now]
        self.parked = [branch for branch in self.parked if branch.due > now]
        starting = []
        while self.ready and self.running < self.places:
            self.running += 1
            self.attempt.after_crash |= self.suspects > 0
            branch = self.ready.pop(0)
            branch.context, branch.has_arrived = copy_context(), False
            starting.append(partial(self._begin, branch))
        self.threads.queue(starting)

    def _begin(self, branch: _Branch) -> None:
        """Run a branch in this thread, as far as that goes; if it has waited for one until the end, not at all."""
        if self.closed:
            return
        branch.begin(self.waiting)
        self.attempt.engine.observers.tell("branch_ended", self.attempt.id, branch.call.key)
        with self.lock:
            if not self.closed:
                branch.has_arrived = True
                self.inbox.put(branch)
                return
        self._record_in_thread([branch])

    def _arrivals(self) -> list[_Branch]:
        """Wait for what comes next, and take all that is there by then; nothing, if a parked branch is due first."""
        due = min((branch.due for branch in self.parked), default=None)
        patience = None if due is None or self.running >= self.places else max(due - time.monotonic(), 0.0)
        arrivals: list[_Branch] = []
        try:
            arrivals.append(self._first_arrival(patience))
            # Whoever goes on here while bodies wait has seen another one wait for something, in the only thread.
            self.threads.grow()
            while True:
                arrivals.append(self.inbox.get_nowait())
        except queue.Empty:
            return arrivals

    def _first_arrival(self, patience: float | None) -> _Branch:
        """Wait for a branch; raises queue.Empty if there is none in time."""
        if self.threads.waiting:
            try:
                return self.inbox.get(timeout=_AT_ONCE)
            except queue.Empty:
                self.threads.grow()
        return self.inbox.get(timeout=patience)

    def _take(self, arrivals: list[_Branch]) -> None:
        self._record(arrivals)
        for branch in arrivals:
            self.running -= 1
            self.is_broken |= branch.error is not None
            self.suspects = 0 if branch.is_lost else max(self.suspects - 1, 0)
            if not branch.is_done:
                self.parked.append(branch)

    def _record(self, branches: list[_Branch]) -> None:
        """Record the outcomes of these together, and let each go on; one that can't be is replaced by an error."""
        unsaved = [branch for branch in branches if branch.is_unsaved]
        if not unsaved:
            return
        if self._save_together([branch.unsaved.record for branch in unsaved if branch.unsaved]):
            for branch in unsaved:
                branch.go_on(True)
        elif thread := self._record_apart(unsaved):  # where nothing interrupts it
            thread.join()

    def _save_together(self, records: list[StepRecord]) -> bool:
        try:
            return self.attempt.save(records)
        except Exception as error:
            if is_foreign_limit(error):
                raise
            # Nothing is lost: each branch now finds out for itself, and the one that is to blame raises this again.
            name = self.attempt.id
            logger.warning("%d steps of workflow %s couldn't be recorded at once: %r", len(records), name, error)
            return False

    def _record_apart(self, branches: list[_Branch]) -> threading.Thread | None:
        """Let branches record by themselves in a thread; here, if there is no room for one more."""
        record = partial(self._record_in_thread, branches)
        thread = threading.Thread(target=record, name="celery_durable record", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            self._record_alone(branches)
            return None
        return thread

    def _record_in_thread(self, branches: Iterable[_Branch]) -> None:
        """Let branches record by themselves; what isn't a step's own, the workflow's thread raises, if it waits."""
        for branch in branches:
            try:
                self._record_alone([branch])
            except BaseException as error:  # noqa: BLE001 - no thread may end by it
                branch.error = error
                if self.closed:
                    name = self.attempt.id
                    logger.warning("Step %s of workflow %s wasn't recorded: %r", branch.call.key, name, error)

    def _record_alone(self, branches: Iterable[_Branch]) -> None:
        """Let branches record by themselves."""
        for branch in branches:
            with self.alone:
                while branch.is_unsaved:
                    branch.go_on(False)

    def _close(self) -> None:
        """From here on the branches that still run, if the workflow was interrupted, record by themselves."""
        with self.lock:
            self.closed = True
        self.threads.end()
        left = [branch for branch in self.branches if branch.has_arrived and branch.is_unsaved]
        if left:
            self._record_apart(left)

    def _answers(self) -> list[Answer]:
        self.attempt.check_going()
        for branch in self.branches:
            if branch.error is not None:
                raise branch.error
        if self.parked:
            first = min(self.parked, key=lambda branch: branch.due)
            left = max(first.due - time.monotonic(), 0.0)
            raise self.attempt.unwind(Suspended(f"retry of step {first.call.key}", left))
        return [branch.answer for branch in self.branches if branch.answer is not None]


class _InBranch(FromThread):
    """A thread of a gathering; once that is over, it starts no further body."""

    def __init__(self, gathering: Gathering) -> None:
        self._gathering = gathering

    async def call(self, step: StepCall, body: Callable[..., Any]) -> Ended:
        """Run a body once."""
        if self._gathering.closed:
            raise _Parked(0.0)
        return await super().call(step, body)

    async def save(self, attempt: Attempt, record: StepRecord) -> bool:
        """Let the workflow's thread record an outcome, with those that are ready by now."""
        return False if self._gathering.closed else await _Unsaved(record)

    async def park(self, attempt: Attempt, reason: str, seconds: float | None, wakers: Wakers = NOTHING) -> None:
        """Leave the thread."""
        raise _Parked(seconds or 0.0)
