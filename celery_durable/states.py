"""The states of a workflow, and the ways between them.

::

               start            claim             finish
      (none) --------> ENQUEUED ------> RUNNING ----------> SUCCESS | FAILURE
                        ^  ^  ^          |  |  |
          due, message, |  |  +----------+  |  | too many crashes, nondeterminism --> DEAD
          child done    |  +- orphan,       |
                        |     hand-over     | sleep, recv, get, long backoff
                      SUSPENDED <-----------+
      ENQUEUED | RUNNING | SUSPENDED -- cancel, deadline --> CANCELLED
      CANCELLED | DEAD | FAILURE -- resume --> ENQUEUED

The database enforces what each state implies (see ``store/migrations``).
"""

from __future__ import annotations

ENQUEUED = "ENQUEUED"
RUNNING = "RUNNING"
SUSPENDED = "SUSPENDED"
SUCCESS = "SUCCESS"
FAILURE = "FAILURE"
CANCELLED = "CANCELLED"
DEAD = "DEAD"

LIVE = frozenset({ENQUEUED, RUNNING, SUSPENDED})
FINAL = frozenset({SUCCESS, FAILURE, CANCELLED, DEAD})
ALL = LIVE | FINAL

TRANSITIONS: dict[str | None, frozenset[str]] = {
    None: frozenset({ENQUEUED}),
    ENQUEUED: frozenset({RUNNING, CANCELLED}),
    RUNNING: frozenset({ENQUEUED, SUSPENDED, SUCCESS, FAILURE, CANCELLED, DEAD}),
    SUSPENDED: frozenset({ENQUEUED, CANCELLED}),
    SUCCESS: frozenset(),
    FAILURE: frozenset({ENQUEUED}),
    CANCELLED: frozenset({ENQUEUED}),
    DEAD: frozenset({ENQUEUED}),
}

#: What Celery's own tools show for each state.
CELERY = {
    ENQUEUED: "PENDING",
    RUNNING: "STARTED",
    SUSPENDED: "RETRY",
    SUCCESS: "SUCCESS",
    FAILURE: "FAILURE",
    CANCELLED: "REVOKED",
    DEAD: "FAILURE",
}
