"""Prometheus: what the workers do, and how the database stands.

``install(app, port=9540)`` in the module of the app is all that most need. Each worker then answers at that port,
for all processes of its pool.
"""

from __future__ import annotations

import glob
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from celery import Celery, bootsteps, signals
from celery.utils.log import current_process_index
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, Metric, start_http_server, values
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from ..client import CALLER_PATIENCE
from ..engine.observer import AttemptReport, Observer, StepReport
from ..exceptions import ConfigurationError, DatabaseUnavailable
from ..health import Health, check_health
from ..installation import Installation, installed_on

logger = logging.getLogger("celery_durable.prometheus")

DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
#: Different steps of one workflow; names beyond that were made from data, and are told together.
MOST_STEPS = 100
OTHER = "other"
#: Workflows of one state are counted no further.
MOST_COUNTED = 100_000
#: Seconds for which an answer of the database is told again, and how many times as long as it has taken to be had.
KEPT, KEPT_TIMES = 10.0, 10.0
#: Seconds between two tries to have the port.
PORT_RETRY = 5.0
#: Bytes: room for the metrics of some hundred steps.
FILE_SIZE = 1 << 20

_ATTRIBUTE = "_celery_durable_metrics"
_STEP_BUCKETS = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_QUEUED_BUCKETS = (0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0)
_STEPS = "celery_durable_step_duration_seconds"


def install(app: Celery, port: int | None = None, addr: str = "0.0.0.0") -> None:  # noqa: S104 - what a scrape needs
    """Measure what this app's workers do; after ``durable.install(app)``, in the same module.

    With a ``port``, the main process of each worker serves the metrics of all its processes and those of the database
    by HTTP. A port that is taken is logged and tried again every five seconds; the worker works meanwhile. Without
    one, they are in ``prometheus_client``'s own registry, for an exporter that is there already: see also
    ``collector``.

    Raises NotInstalled, and ConfigurationError for what can't be a port and for another port than at an earlier call.
    """
    if port is not None and (not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 65536):
        raise ConfigurationError(f"The port of the metrics is a number from 1 to 65535, not {port!r}.")
    installation = installed_on(app)
    earlier = getattr(app, _ATTRIBUTE, None)
    if earlier is not None:
        if (earlier.port, earlier.addr) != (port, addr):
            raise ConfigurationError("The metrics of this app are installed already, with another port or address.")
        return
    exporter = Exporter(app, port, addr)
    setattr(app, _ATTRIBUTE, exporter)
    installation.observers.add(exporter.measuring)
    app.steps["worker"].add(MetricsStep)


def collector(app: Celery) -> Collector:
    """Return what tells how the database stands, to be registered where metrics are served: ``REGISTRY.register(…)``.

    It asks the database when it is scraped, every ten seconds at most. A database that is away is told by
    ``celery_durable_up 0``; nothing is raised then. Raises NotInstalled.
    """
    return DatabaseCollector(installed_on(app))


class Metrics:
    """What is counted in the processes that run workflows."""

    def __init__(self) -> None:
        self.started = Counter("celery_durable_attempts_started", "Attempts of workflows that began.", ["workflow"])
        self.ended = Counter(
            "celery_durable_attempts_ended",
            "Attempts of workflows that ended, by how; of those whose process died there is none.",
            ["workflow", "ending"],
        )
        self.queued = Histogram(
            "celery_durable_queued_seconds",
            "Time from the publication of a workflow's message to its claim by a worker.",
            ["workflow"],
            buckets=_QUEUED_BUCKETS,
        )
        self.steps = Histogram(
            _STEPS,
            "Time that each try of a step took: a success, a failure for good, or one that is followed by a retry.",
            ["workflow", "step", "outcome"],
            buckets=_STEP_BUCKETS,
        )
        self.recovered = Counter(
            "celery_durable_recovered", "Workflows for which a duty of the recovery had something to do.", ["duty"]
        )


class Measuring(Observer):
    """Counts."""

    def __init__(self) -> None:
        self._names = StepNames()
        #: By workflow, step and outcome; their names are known to be bounded.
        self._tries: dict[tuple[str, str, str], Histogram] = {}

    def attempt_started(self, report: AttemptReport) -> None:
        """Count an attempt, and how long its message was on its way."""
        metrics().started.labels(report.name).inc()
        if report.lag is not None:
            metrics().queued.labels(report.name).observe(report.lag)

    def attempt_ended(self, report: AttemptReport, ending: str) -> None:
        """Count the end of an attempt."""
        metrics().ended.labels(report.name, ending).inc()

    def step_ended(self, report: StepReport) -> None:
        """Count a try, and how long it took."""
        labels = (report.workflow_name, report.name, report.state)
        (self._tries.get(labels) or self._tries_of(*labels)).observe(report.runtime)

    def recovered(self, duty: str, workflow_ids: list[str]) -> None:
        """Count what a duty has found."""
        metrics().recovered.labels(duty).inc(len(workflow_ids))

    def _tries_of(self, workflow: str, name: str, state: str) -> Histogram:
        step = self._names.bounded(workflow, name)
        tries = metrics().steps.labels(workflow, step, state.lower())
        if step == name:
            self._tries[workflow, step, state] = tries
        return tries


class StepNames:
    """Keeps the number of label values bounded: a step's name may be made from data."""

    def __init__(self) -> None:
        self._known: dict[str, set[str]] | None = None
        self._warned = False

    def bounded(self, workflow: str, step: str) -> str:
        """Return the step's name, or ``other`` if its workflow has too many."""
        if self._known is None:
            self._known = _names_in_files()
        known = self._known.setdefault(workflow, set())
        if step in known:
            return step
        if len(known) >= MOST_STEPS:
            self._warn(workflow, step)
            return OTHER
        known.add(step)
        return step

    def _warn(self, workflow: str, step: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "The workflow %s has more than %d steps of different names, such as %r: their metrics are "
                "told together as %r. Give as_step() a name that doesn't depend on data.",
                workflow, MOST_STEPS, step, OTHER,
            )  # fmt: skip


def _names_in_files() -> dict[str, set[str]]:
    """Return the steps that other processes of the pool have told of, for a process that takes over their files."""
    names: dict[str, set[str]] = {}
    path = os.environ.get(DIRECTORY_VARIABLE)
    files = glob.glob(os.path.join(glob.escape(path), "histogram_*.db")) if path else []
    for metric in _merged(files):
        if metric.name == _STEPS:
            for sample in metric.samples:
                names.setdefault(sample.labels["workflow"], set()).add(sample.labels["step"])
    return names


def _merged(files: list[str]) -> Iterable[Metric]:
    """Return what files of metrics hold; one that is being made is looked at again."""
    for _ in range(5):
        try:
            filled = filter(os.path.getsize, files)
            return list(MultiProcessCollector.merge(filled))  # type: ignore[no-untyped-call]
        except Exception as error:  # noqa: BLE001 - a file may be in the making, or just be gone
            last = error
            time.sleep(0.02)
    logger.warning("The files with the metrics of this worker's processes can't be read (%r).", last)
    return []


_metrics: Metrics | None = None
_lock = threading.Lock()


def metrics() -> Metrics:
    """Return this process's metrics; made when they are first needed, for by then it is known where they belong."""
    global _metrics
    if _metrics is None:
        with _lock:
            _metrics = _metrics or Metrics()
    return _metrics


class DatabaseCollector(Collector):
    """How the database stands, asked when it is scraped; an answer is told again for a while."""

    def __init__(self, installation: Installation) -> None:
        self._installation = installation
        self._lock = threading.Lock()
        self._told: list[Metric] = []
        self._due = 0.0
        self._was_up = True

    def describe(self) -> list[Metric]:
        """Return what may be told; a registry asks for that, and the database isn't."""
        return [_gauge(name) for name in _GAUGES]

    def collect(self) -> list[Metric]:
        """Return the gauges."""
        with self._lock:
            began = time.monotonic()
            if began >= self._due:
                self._told = self._ask()
                ended = time.monotonic()
                self._due = ended + max(KEPT, KEPT_TIMES * (ended - began))
            return self._told

    def _ask(self) -> list[Metric]:
        try:
            health = check_health(self._installation.app)
            live = self._installation.store.lists.live(most=MOST_COUNTED, patience=CALLER_PATIENCE)
        except Exception as error:  # noqa: BLE001 - whatever it is, a scrape is answered
            self._went_down(error)
            return [_gauge("up", 0)]
        if not self._was_up:
            logger.warning("The database is there again for the metrics.")
        self._was_up = True
        return [*_health_gauges(health), _live_gauge(live)]

    def _went_down(self, error: Exception) -> None:
        if self._was_up:
            known = isinstance(error, DatabaseUnavailable)
            logger.warning("The metrics of the database can't be had: %s", error, exc_info=not known)
        self._was_up = False


_GAUGES = {
    "up": "Whether the database has answered the last scrape.",
    "workflows": "Workflows that haven't ended, by state; of one state, 100,000 are counted at most.",
    "dead_workflows": "DEAD workflows, which wait for somebody; counted up to 10,000.",
    "undelivered_outcomes": "Outcomes that Celery hasn't delivered yet; counted up to 10,000.",
    "orphans": "Running workflows whose worker is gone, and which no sweep has rescued yet.",
    "nodes": "Workers' main processes: alive, draining, or silent.",
    "sweep_age_seconds": "Time since the last sweep of the recovery.",
    "timer_lag_seconds": "How long the most overdue timer has been due.",
    "claim_lag_seconds": "How long the oldest message has waited for a worker.",
}


def _health_gauges(health: Health) -> Iterator[Metric]:
    plain = {
        "up": 1,
        "dead_workflows": health.dead,
        "undelivered_outcomes": health.undelivered,
        "orphans": health.orphans,
        "sweep_age_seconds": health.sweep_age,
        "timer_lag_seconds": health.timer_lag or 0,
        "claim_lag_seconds": health.claim_lag or 0,
    }
    yield from (_gauge(name, value) for name, value in plain.items() if value is not None)
    nodes = _gauge("nodes", labels=["state"])
    states = [("silent" if not node.alive else "draining" if node.draining else "alive") for node in health.nodes]
    for state in ("alive", "draining", "silent"):
        nodes.add_metric([state], states.count(state))
    yield nodes


def _live_gauge(live: Iterable[tuple[str, str, int]]) -> Metric:
    gauge = _gauge("workflows", labels=["state", "workflow"])
    for state, name, count in live:
        gauge.add_metric([state, name], count)
    return gauge


def _gauge(name: str, value: float | None = None, labels: list[str] | None = None) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"celery_durable_{name}", _GAUGES[name], value=value, labels=labels)


class Exporter:
    """One worker's metrics on their way out."""

    def __init__(self, app: Celery, port: int | None, addr: str) -> None:
        self.port = port
        self.addr = addr
        self.measuring = Measuring()
        self._app = app
        self._directory: str | None = None
        self._own_directory: str | None = None
        self._closing = threading.Event()
        self._server: Any = None

    def prepare(self, worker: Any) -> None:
        """Decide where the metrics are, before the pool forks and before there are any."""
        try:
            if _forks(worker):
                self._share()
            metrics()
        except OSError as error:
            self._remove()
            self._directory = None
            self._give_up(error)

    def serve(self) -> None:
        """Answer scrapes, in a thread: a green one where the pool is green."""
        if self.port is not None:
            self._closing.clear()
            signals.worker_shutdown.connect(self._close)
            threading.Thread(target=self._open, name="celery_durable metrics", daemon=True).start()

    def _share(self) -> None:
        """Let the metrics of this process, and of those that it forks, be in files."""
        given = os.environ.get(DIRECTORY_VARIABLE)
        if given is None and self.port is None:
            logger.warning(
                "Nobody sees the metrics of this worker's pool processes: give celery_durable.contrib.prometheus."
                "install() a port, or set %s before the worker starts.", DIRECTORY_VARIABLE,
            )  # fmt: skip
            return
        if given is None:
            self._own_directory = tempfile.mkdtemp(prefix="celery_durable_metrics_")
        self._directory = given or self._own_directory
        os.makedirs(str(self._directory), exist_ok=True)
        self._reserve(str(os.getpid()))
        os.environ[DIRECTORY_VARIABLE] = str(self._directory)
        if given is None:
            signals.worker_process_init.connect(self._take_slot)
        # Chosen when prometheus_client was imported, perhaps without the variable; none of our metrics is made yet.
        if not values.ValueClass._multiprocess:
            name = _slot if given is None else os.getpid
            values.ValueClass = values.MultiProcessValue(name)  # type: ignore[no-untyped-call]

    def _take_slot(self, **kwargs: Any) -> None:
        """This is a new process of the pool: it goes on with the files of the one in whose place it is."""
        global _place
        index = current_process_index(base=0)
        if index is None:
            return
        _place = (f"slot{index}", os.getpid())
        try:
            self._reserve(_place[0])
        except OSError as error:
            self._give_up(error)

    def _reserve(self, name: str) -> None:
        """Take the room on the disk for a process's files; a write to a full one would kill the process later."""
        if not hasattr(os, "posix_fallocate"):
            return  # as on macOS
        for kind in ("counter", "histogram"):
            with open(os.path.join(str(self._directory), f"{kind}_{name}.db"), "ab") as file:
                os.posix_fallocate(file.fileno(), 0, FILE_SIZE)

    def _give_up(self, error: OSError) -> None:
        logger.error("This process measures nothing: there is no room for its metrics (%s).", error)
        with suppress(ValueError):  # what the worker's main process has given up, its children don't have
            installed_on(self._app).observers.remove(self.measuring)

    def _open(self) -> None:
        registry, has_told = self._registry(), False
        while not self._closing.is_set():
            try:
                self._server, _ = start_http_server(self.port or 0, self.addr, registry)
            except OSError as error:
                if not has_told:
                    logger.error(
                        "The metrics can't be served at %s:%s (%s); it is tried again. Each worker on a host needs a "
                        "port of its own.", self.addr, self.port, error,
                    )  # fmt: skip
                has_told = True
                self._closing.wait(PORT_RETRY)
            else:
                os.register_at_fork(after_in_child=self._server.socket.close)
                logger.info("The metrics are served at http://%s:%s/metrics.", self.addr, self.port)
                return

    def _registry(self) -> CollectorRegistry:
        registry = CollectorRegistry()
        ours: Collector = Files(self._directory) if self._directory else REGISTRY
        registry.register(Together(ours, collector(self._app)))
        return registry

    def _close(self, **kwargs: Any) -> None:
        self._closing.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self._remove()

    def _remove(self) -> None:
        if self._own_directory is not None:
            # By SIGHUP Celery runs the program anew in this environment: that one makes a directory of its own.
            os.environ.pop(DIRECTORY_VARIABLE, None)
            shutil.rmtree(self._own_directory, ignore_errors=True)


class Files(Collector):
    """The metrics of all processes that have written into a directory."""

    def __init__(self, directory: str) -> None:
        self._files = os.path.join(glob.escape(directory), "*.db")

    def collect(self) -> Iterable[Metric]:
        """Return the sums."""
        return _merged(glob.glob(self._files))


class Together(Collector):
    """Several collectors as one; of two metrics of one name the first is told."""

    def __init__(self, *collectors: Collector) -> None:
        self._collectors = collectors

    def collect(self) -> Iterator[Metric]:
        """Return all of them."""
        told: set[str] = set()
        for each in self._collectors:
            for metric in each.collect():
                if metric.name not in told:
                    told.add(metric.name)
                    yield metric


class MetricsStep(bootsteps.StartStopStep):
    """Prepares the metrics before the pool forks, and serves them as soon as it has."""

    label = "durable metrics"
    requires = ("celery.worker.components:Pool",)

    def create(self, worker: Any) -> MetricsStep:
        """All steps are created before the first one starts."""
        getattr(worker.app, _ATTRIBUTE).prepare(worker)
        return self

    def start(self, worker: Any) -> None:
        """The pool is there."""
        getattr(worker.app, _ATTRIBUTE).serve()

    def stop(self, worker: Any) -> None:
        """Nothing yet: the last steps of a shutdown are counted, too."""

    terminate = stop


#: The place of this process in the pool, and its process id. A new process in that place goes on with the old one's
#: files, so that there aren't more and more of them.
_place: tuple[str, int] = ("", 0)


def _slot() -> str:
    """Return what this process's files are called by; no two that live at one time have the same."""
    pid = os.getpid()
    return _place[0] if _place[1] == pid else str(pid)


def _forks(worker: Any) -> bool:
    # The only pool whose processes the worker's main loop counts.
    return bool(getattr(worker.pool_cls, "uses_semaphore", False))
