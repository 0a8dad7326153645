"""The heartbeat: a native thread that says that a worker lives, and does nothing else.

It never speaks to the broker and makes no statement whose time depends on how much there is to do: a backlog
or a broker that hangs must not make a living worker look dead.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime

from .exceptions import DatabaseUnavailable
from .native import Loop
from .request import Registry
from .store import NodeFacts, Store

logger = logging.getLogger("celery_durable.node")

#: A heartbeat doesn't wait for a database that is away: the next one is due.
_NO_PATIENCE = 0.0


class Heartbeat(Loop):
    """Writes what is active here, every so many seconds.

    ``began``: it was written once; ``elected``: this node does the sweeps.
    """

    def __init__(
        self,
        store: Store,
        facts: NodeFacts,
        registry: Registry,
        interval: float,
        *,
        when_elected: Callable[[], None],
        able: Callable[[], bool],
    ) -> None:
        super().__init__("heartbeat")
        self.elected = self.began = False
        self._store = store
        self._facts = facts
        self._registry = registry
        self._interval = interval
        self._when_elected = when_elected
        self._able = able
        self._as_of: datetime | None = None
        self._draining = False

    def start(self) -> None:
        """Register in the database, then go on in a thread of its own."""
        try:
            self.beat()
        except DatabaseUnavailable as error:
            logger.error("%s The worker goes on trying.", error)
        super().start()

    def drain(self) -> None:
        """Let all runs of this node be handed over. Safe in a signal handler."""
        self._draining = True
        self.bell.ring()

    def turn(self) -> float:
        """Beat; sooner again if the database was away."""
        began = time.monotonic()
        return began + (self._interval if self.attempt(self.beat) else min(self.RETRY, self._interval))

    def beat(self) -> None:
        """Write one heartbeat."""
        # The time of the list is that of the answer before it was collected: what was claimed by then is in it.
        active, accepted = self._registry.snapshot()
        answer = self._store.nodes.beat(
            self._facts,
            active=active,
            accepted=accepted,
            as_of=self._as_of,
            draining=self._draining,
            able=self._able(),
            patience=_NO_PATIENCE,
        )
        self.began, self._as_of = True, answer.seen
        newly_elected = answer.elected and not self.elected
        self.elected = answer.elected
        if newly_elected:
            self._when_elected()

    def leave(self) -> None:
        """Sign off."""
        self.attempt(lambda: self._store.nodes.leave(self._facts.id, patience=_NO_PATIENCE))
        self._store.close()
