"""The body of an atomic step: one transaction with its checkpoint."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

from ..exceptions import DatabaseUnavailable
from ..store import Conflict
from .context import WHILE_ALIVE, logger
from .retry import Ended

if TYPE_CHECKING:
    from .step import Body, Call

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
    last: Exception | None = None
    for _ in range(MOST_CONFLICTS):
        if last is not None and call.attempt.is_stale:
            call.attempt.look()
        try:
            return _call_in_transaction(call, body)
        except Conflict as conflict:
            logger.info("%s runs again after a conflict: %s", call, conflict)
            last = conflict.error
            time.sleep(random.uniform(0, LONGEST_YIELD))  # noqa: S311 - lets the other one go first
        except DatabaseUnavailable as error:
            logger.warning("%s may have been committed or not: %s", call, error)
            standing = call.heed(call.write_try(None))
            if standing.settled is not None:
                return Ended(checkpoint=standing.settled)
            call.attempt.judge(standing)
            last = error
        except Exception as error:  # noqa: BLE001 - whatever keeps it from being committed is how the try ended
            return Ended(error=error)
    return Ended(error=last)


def _call_in_transaction(call: Call, body: Body) -> Ended:
    """Call a body in a transaction that ends with its checkpoint."""
    attempt = call.attempt
    checkpoints = attempt.engine.store.checkpoints
    with checkpoints.transaction(attempt.engine.lease, patience=WHILE_ALIVE) as transaction:
        call.step.connection = transaction.connection
        try:
            ended = call.call_body(body)
        finally:
            call.step.connection = None
        outcome = call.outcome_of(ended)
        if not outcome.ok:
            transaction.abandon(ended.error)
            return ended
        standing = transaction.save(attempt.fence, call.record_of(outcome.checkpoint))
        if standing is None or standing.settled is not None:
            transaction.abandon()
    return Ended(checkpoint=call.heed(standing).settled or outcome.checkpoint)
