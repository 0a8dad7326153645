"""Several steps at once, in threads: the thread of the workflow starts them, and records what is ready together."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass

from ..exceptions import Suspended
from ..store import StepRecord
from .context import Attempt
from .step import Answer, Body, Call
from .waiting import InThread, complete


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


@dataclass(frozen=True, slots=True)
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
        self.waiting = _InBranch(self)
        self.inbox: queue.SimpleQueue[_Branch | _Unsaved] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.closed = False
        for branch in branches:
            if branch.call.is_settled:
                branch.answer = branch.call.replay()
        self.ready = [branch for branch in branches if not branch.is_done]
        self.parked: list[_Branch] = []
        self.running = 0
        self.places = self._places(max_concurrency)
        self.max_concurrency = max_concurrency

    def _places(self, max_concurrency: int) -> int:
        """After a second crash in a row the steps run one at a time, until it is known which one crashes."""
        attempt = self.attempt
        if len(self.ready) > 1 and attempt.after_crash and attempt.crashes == 1:
            attempt.take_suspicion()
        return 1 if attempt.after_crash else max_concurrency

    def run(self) -> list[Answer]:
        """Run until every branch has its outcome, or none can go on."""
        if self.ready:
            threads = ThreadPoolExecutor(min(self.max_concurrency, len(self.ready)), "celery_durable branch")
            try:
                self._run(threads)
            finally:
                self._close()
                threads.shutdown(wait=False, cancel_futures=True)
        return self._answers()

    def _run(self, threads: ThreadPoolExecutor) -> None:
        while True:
            self._start(threads)
            if not self.running:
                return
            self._take(self._arrivals())

    def _start(self, threads: ThreadPoolExecutor) -> None:
        if self.attempt.unwinding is not None:
            return
        now = time.monotonic()
        self.ready += [branch for branch in self.parked if branch.due <= now]
        self.parked = [branch for branch in self.parked if branch.due > now]
        while self.ready and self.running < self.places:
            self.running += 1
            threads.submit(copy_context().run, self._run_branch, self.ready.pop(0))

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
        """Wait for what comes next, and take all that is there by then."""
        due = min((branch.due for branch in self.parked), default=None)
        patience = None if due is None or self.running >= self.places else max(due - time.monotonic(), 0.0)
        try:
            arrivals = [self.inbox.get(timeout=patience)]
            while True:
                arrivals.append(self.inbox.get_nowait())
        except queue.Empty:
            pass
        return arrivals

    def _take(self, arrivals: list[_Branch | _Unsaved]) -> None:
        self._save([each for each in arrivals if isinstance(each, _Unsaved)])
        for branch in arrivals:
            if isinstance(branch, _Branch):
                self.running -= 1
                self.places = self.max_concurrency
                if not branch.is_done:
                    self.parked.append(branch)

    def _save(self, unsaved: list[_Unsaved]) -> None:
        if not unsaved:
            return
        try:
            done = self.attempt.save([each.record for each in unsaved])
        except Exception as error:  # noqa: BLE001 - raised in each of the steps
            for each in unsaved:
                each.saved.set_exception(error)
            return
        for each in unsaved:
            each.saved.set_result(done)

    def _close(self) -> None:
        """From here on the branches that still run, if the workflow was interrupted, record by themselves."""
        with self.lock:
            self.closed = True
        while not self.inbox.empty():
            each = self.inbox.get()
            if isinstance(each, _Unsaved):
                each.saved.set_result(False)

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


class _InBranch(InThread):
    """A thread of a gathering."""

    def __init__(self, gathering: Gathering) -> None:
        self._gathering = gathering

    async def save(self, attempt: Attempt, record: StepRecord) -> bool:
        """Let the workflow's thread record an outcome, with those that are ready by now."""
        unsaved = _Unsaved(record, Future())
        with self._gathering.lock:
            if self._gathering.closed:
                return False
            self._gathering.inbox.put(unsaved)
        return unsaved.saved.result()

    async def park(self, attempt: Attempt, reason: str, seconds: float) -> None:
        """Leave the thread."""
        raise _Parked(seconds)
