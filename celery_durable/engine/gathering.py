"""Several steps at once, in threads: the thread of the workflow starts them, and records what is ready together."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

from ..exceptions import StepLost, Suspended
from ..store import StepRecord
from ..store.rows import Wakers
from .context import Attempt, logger
from .limits import is_foreign_limit
from .loop import FromThread
from .retry import Ended
from .step import Answer, Body, Call
from .waiting import NOTHING, StepCall, complete, must_find_out


class _Parked(BaseException):
    """A branch waits for long, and leaves its thread to others."""

    def __init__(self, seconds: float) -> None:
        self.due = time.monotonic() + seconds


@dataclass(slots=True)
class _Branch:
    """One step of the gathering, and what has become of it."""

    call: Call
    body: Body
    due: float = 0.0
    answer: Answer | None = None
    error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        return self.answer is not None or self.error is not None

    @property
    def is_lost(self) -> bool:
        return self.answer is not None and isinstance(self.answer.error, StepLost)


@dataclass(frozen=True, slots=True, eq=False)
class _Unsaved:
    """An outcome that is to be recorded."""

    record: StepRecord
    saved: Future[bool]


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
        self.inbox: queue.SimpleQueue[_Branch | _Unsaved] = queue.SimpleQueue()
        self.lock = threading.Lock()
        #: Outcomes whose branches wait until they are recorded.
        self.unsaved: set[_Unsaved] = set()
        self.closed = False
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
        while self.ready and self.running < self.places:
            self.running += 1
            self.attempt.after_crash |= self.suspects > 0
            self._start_thread(self.ready.pop(0))

    def _start_thread(self, branch: _Branch) -> None:
        # A thread of an executor would hold up the end of the process until its body has ended.
        threading.Thread(
            target=copy_context().run, args=(self._run_branch, branch), name="celery_durable branch", daemon=True
        ).start()

    def _run_branch(self, branch: _Branch) -> None:
        try:
            branch.answer = complete(branch.call.run(branch.body, self.waiting))
        except _Parked as parked:
            branch.due = parked.due
            branch.call.due_in = 0.0
        except BaseException as error:  # noqa: BLE001 - raised in the workflow's thread
            branch.error = error
        finally:
            self.attempt.engine.observers.tell("branch_ended", self.attempt.id, branch.call.key)
            self.inbox.put(branch)

    def _arrivals(self) -> list[_Branch | _Unsaved]:
        """Wait for what comes next, and take all that is there by then; nothing, if a parked branch is due first."""
        due = min((branch.due for branch in self.parked), default=None)
        patience = None if due is None or self.running >= self.places else max(due - time.monotonic(), 0.0)
        arrivals: list[_Branch | _Unsaved] = []
        try:
            arrivals.append(self.inbox.get(timeout=patience))
            while True:
                arrivals.append(self.inbox.get_nowait())
        except queue.Empty:
            return arrivals

    def _take(self, arrivals: list[_Branch | _Unsaved]) -> None:
        self._save([each for each in arrivals if isinstance(each, _Unsaved)])
        for branch in arrivals:
            if isinstance(branch, _Branch):
                self.running -= 1
                self.is_broken |= branch.error is not None
                self.suspects = 0 if branch.is_lost else max(self.suspects - 1, 0)
                if not branch.is_done:
                    self.parked.append(branch)

    def _save(self, unsaved: list[_Unsaved]) -> None:
        if unsaved:
            self._tell(unsaved, self._save_together([each.record for each in unsaved]))

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

    def _tell(self, unsaved: Iterable[_Unsaved], done: bool) -> None:
        for each in unsaved:
            if not each.saved.done():
                each.saved.set_result(done)
        with self.lock:
            self.unsaved.difference_update(unsaved)

    def _close(self) -> None:
        """From here on the branches that still run, if the workflow was interrupted, record by themselves."""
        with self.lock:
            self.closed = True
        self._tell(list(self.unsaved), False)

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
        unsaved = _Unsaved(record, Future())
        with self._gathering.lock:
            if self._gathering.closed:
                return False
            self._gathering.unsaved.add(unsaved)
        self._gathering.inbox.put(unsaved)
        return unsaved.saved.result()

    async def park(self, attempt: Attempt, reason: str, seconds: float | None, wakers: Wakers = NOTHING) -> None:
        """Leave the thread."""
        raise _Parked(seconds or 0.0)
