"""How all of it stands: what an operator, and a probe, wants to know."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from celery import Celery

from .client import CALLER_PATIENCE
from .installation import Installation, find
from .store.migrate import missing_in
from .store.rows import NodeRow, Standings, SweepRow

#: Workflows are counted no further.
MOST = 10_000


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A worker's main process."""

    id: str
    hostname: str
    pid: int
    started_at: datetime
    #: Its last heartbeat.
    seen_at: datetime
    #: That is younger than its lease.
    alive: bool
    #: It shuts down: it takes no more workflows.
    draining: bool
    #: How many workflows it runs.
    running: int


@dataclass(frozen=True, slots=True)
class Health:
    """How all of it stands; ages and lags are in seconds, counts go up to 10,000."""

    #: What is wrong, and what to do, in sentences; nothing if all is well.
    problems: tuple[str, ...]
    #: The database's time.
    now: datetime
    #: Migrations that the database lacks.
    missing: tuple[int, ...]
    nodes: tuple[NodeInfo, ...]
    swept_at: datetime | None
    sweep_age: float | None
    #: Running workflows whose worker is gone, and which no sweep has rescued yet.
    orphans: int
    #: How long the most overdue timer has been due.
    timer_lag: float | None
    #: How long the oldest message has waited for a worker.
    claim_lag: float | None
    dead: int
    #: Outcomes that Celery hasn't delivered yet.
    undelivered: int

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def check_health(app: Celery | None = None) -> Health:
    """Return how all of it stands. Reads only, and takes no longer with ten million finished workflows.

    DEAD workflows and messages that wait for a worker are told, but are no problem by themselves.

    Raises NotInstalled, DatabaseUnavailable, SchemaVersionError.
    """
    installation = find(app)
    lists, lease = installation.store.lists, installation.config.lease
    standings = lists.standings(lease=lease, most=MOST, patience=CALLER_PATIENCE)
    nodes = [_node(row) for row in lists.nodes(patience=CALLER_PATIENCE)]
    sweeps = lists.sweeps(patience=CALLER_PATIENCE)
    missing = missing_in(installation.url(), installation.config.schema)
    last = sweeps[0] if sweeps else None
    return Health(
        problems=tuple(_problems(installation, standings, nodes, last, missing)),
        now=standings.now,
        missing=tuple(missing),
        nodes=tuple(nodes),
        swept_at=None if last is None else last.at,
        sweep_age=None if last is None else last.age,
        orphans=standings.orphans,
        timer_lag=standings.timer_lag,
        claim_lag=standings.claim_lag,
        dead=standings.dead,
        undelivered=standings.undelivered,
    )


def _problems(
    installation: Installation, standings: Standings, nodes: list[NodeInfo], last: SweepRow | None, missing: list[int]
) -> list[str]:
    config = installation.config
    bound = config.lease + 2 * config.recovery_interval
    problems = []
    if missing:
        problems.append(f"The schema lacks migrations {missing}: run `celery -A yourproject durable migrate`.")
    if not any(node.alive for node in nodes):
        problems.append("No worker is alive: workflows wait until one is started.")
    if last is None:
        problems.append("There has been no sweep: start a worker, or beat with a worker on its queue.")
    elif last.age > bound:
        problems.append(
            f"The last sweep was {last.age:.0f} s ago, {bound:.0f} s are allowed: is a worker, or beat, running?"
        )
    if standings.orphans and (last is None or last.age > config.recovery_interval * 2):
        problems.append(f"{standings.orphans} running workflow(s) have lost their worker, and nobody rescues them.")
    if standings.timer_lag is not None and standings.timer_lag > bound:
        problems.append(f"A timer has been due for {standings.timer_lag:.0f} s: the sweeps don't keep up.")
    return problems


def _node(row: NodeRow) -> NodeInfo:
    return NodeInfo(row.id, row.hostname, row.pid, row.started_at, row.seen_at, row.is_alive, row.draining, row.running)
