"""The body of an atomic step: one transaction with its checkpoint."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..exceptions import DatabaseUnavailable
from ..late import late
from .context import WHILE_ALIVE, logger
from .retry import Ended

if TYPE_CHECKING:
    from .. import store
    from ..store import Place, markers
    from ..store.markers import Mark, Markers
    from .step import Body, Call
else:
    store, markers = late("store"), late("store.markers")

#: How often an atomic step runs again because of other transactions before that is its error.
MOST_CONFLICTS = 20
#: Seconds that it lets pass before, at most.
LONGEST_YIELD = 0.05


def call_atomically(call: Call, body: Body) -> Ended:
    """Call a body and record its value in one transaction: both are there, or neither.

    An error of the body rolls back, and is then recorded or tried again like any other. A conflict with another
    transaction runs the body again. Whether a commit whose answer was lost has happened, a statement finds out
    that has to wait for it.
    """
    place = call.spec.atomic
    if isinstance(place, bool):
        return _called(call, partial(_call_here, call, body, None), partial(_find_here, call))
    try:
        is_home = call.attempt.engine.store.is_home(place, patience=WHILE_ALIVE)
    except Exception as error:  # noqa: BLE001 - what its library says of a place that isn't there is how the try ended
        return Ended(error=error)
    if is_home:
        return _called(call, partial(_call_here, call, body, place), partial(_find_here, call))
    elsewhere = _Elsewhere(call, body, place)
    return elsewhere.recorded(_called(call, elsewhere.call, elsewhere.find))


def _called(call: Call, once: Callable[[], Ended], find: Callable[[], Ended | None]) -> Ended:
    """Call once, and again after a conflict; after a lost answer, if nothing is found to have been committed."""
    last: Exception | None = None
    for _ in range(MOST_CONFLICTS):
        if last is not None and call.attempt.is_stale:
            call.attempt.look()
        try:
            return once()
        except store.Conflict as conflict:
            logger.info("%s runs again after a conflict: %s", call, conflict)
            last = conflict.error
            time.sleep(random.uniform(0, LONGEST_YIELD))  # noqa: S311 - lets the other one go first
        except DatabaseUnavailable as error:
            logger.warning("%s may have been committed or not: %s", call, error)
            found = find()
            if found is not None:
                return found
            last = error
        except Exception as error:  # noqa: BLE001 - whatever keeps it from being committed is how the try ended
            return Ended(error=error)
    return Ended(error=last)


def _called_in(transaction: Any, call: Call, body: Body) -> Ended:
    """Call a body that sees the transaction by ``durable.current``."""
    call.step.connection, call.step.session = transaction.connection, transaction.session
    try:
        return call.call_body(body)
    finally:
        call.step.connection = call.step.session = None


def _call_here(call: Call, body: Body, place: Place | None) -> Ended:
    """Call a body in a transaction that ends with its checkpoint."""
    attempt = call.attempt
    checkpoints = attempt.engine.store.checkpoints
    with checkpoints.transaction(attempt.engine.lease, patience=WHILE_ALIVE, place=place) as transaction:
        ended = _called_in(transaction, call, body)
        outcome = call.outcome_of(ended)
        if not outcome.ok:
            transaction.abandon(ended.error)
            return ended
        standing = transaction.save(attempt.fence, call.record_of(outcome.checkpoint))
        if standing is None or standing.settled is not None:
            transaction.abandon()
    return Ended(checkpoint=call.heed(standing).settled or outcome.checkpoint)


def _find_here(call: Call) -> Ended | None:
    """Return the outcome that a commit without an answer has left."""
    standing = call.heed(call.write_try(None))
    if standing.settled is not None:
        return Ended(checkpoint=standing.settled)
    call.attempt.judge(standing)
    return None


class _Elsewhere:
    """A step that is atomic in a database of the app's own, where a marker keeps what our checkpoint will.

    BEGIN there, a look at our fence, the body, the marker, COMMIT there, then our checkpoint. A worker that dies in
    between has left a marker, which answers the next attempt. An attempt that isn't the first reserves the step there
    before it looks, so that none of its predecessors, which may only have been away, can commit after that.
    """

    def __init__(self, call: Call, body: Body, place: Place) -> None:
        self._call = call
        self._body = body
        self._attempt = call.attempt
        self._markers: Markers = call.attempt.engine.store.markers_at(place)
        self._is_first = call.attempt.fence.attempt == 1

    def call(self) -> Ended:
        """Call the body, unless somebody has committed it."""
        if not self._is_first and (found := self.find(patience=0)) is not None:
            return found
        call = self._call
        with self._markers.transaction(self._attempt.engine.lease, patience=0) as transaction:
            mark = self._mark()
            ended = _called_in(transaction, call, self._body)
            outcome = call.outcome_of(ended)
            if not outcome.ok:
                transaction.abandon(ended.error)
                return ended
            assert outcome.checkpoint.payload is not None
            is_kept = transaction.keep(mark, outcome.checkpoint.payload)
            if not is_kept:
                transaction.abandon()
        if is_kept:
            return Ended(checkpoint=outcome.checkpoint)
        return self.find() or self.call()

    def find(self, *, patience: float = WHILE_ALIVE) -> Ended | None:
        """Return the value that was committed there; if there is none, no earlier try can commit any more."""
        self._is_first = False
        is_mine, payload = self._markers.reserve(self._mark(), patience=patience)
        if payload is not None:
            return Ended(checkpoint=self._call.checkpoint(payload, ok=True))
        if not is_mine:
            self._attempt.judge(None)
        return None

    def recorded(self, ended: Ended) -> Ended:
        """Write our checkpoint of what is committed there."""
        if ended.checkpoint is None:
            return ended
        attempt, call = self._attempt, self._call
        record = call.record_of(ended.checkpoint)
        standing = attempt.engine.store.checkpoints.save_slow(attempt.fence, record, patience=WHILE_ALIVE)
        self._markers.prune(attempt.engine.retention, attempt.engine.store.workflows.births_of)
        return Ended(checkpoint=call.heed(standing).settled or ended.checkpoint)

    def _mark(self) -> Mark:
        """Look at our fence, and return what this attempt writes there."""
        self._attempt.look()
        return markers.Mark(self._attempt.fence, self._attempt.born, self._call.key)
