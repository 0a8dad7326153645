"""A workflow run once for every instant at which its worker can die."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from celery import Celery

from .. import states
from ..client import row_of
from ..exceptions import ConfigurationError, NondeterminismError
from ..installation import installed_on
from ..messages import send
from .bench import Bench, Killed, on_bench
from .history import History
from .replaying import replay
from .runs import AtEveryHook, Run, WithStepsDone, first_of, go_on, observed, signature_of, start

#: In the order in which a run passes them.
INSTANTS = {
    "claiming": "before it is claimed",
    "claimed": "after it is claimed",
    "step_starting": "before the body of step {}",
    "step_returned": "after the body of step {}, before its checkpoint",
    "step_recorded": "after the checkpoint of step {}",
    "try_failed": "after a try of step {} has failed, before that is kept",
    "try_recorded": "after a failed try of step {} is kept",
    "call_starting": "before the call {}",
    "call_registered": "in the middle of the call {}",
    "call_recorded": "after the call {} is kept",
    "suspending": "before it is suspended",
    "suspended": "after it is suspended",
    "finishing": "before its outcome is kept",
    "finished": "after its outcome is kept",
}
#: Instants whose second fact is the key of a step or call.
_KEYED = {hook for hook, text in INSTANTS.items() if "{}" in text}

Body = tuple[str, str]

_PURE = (
    "Code outside of steps runs again in each attempt: put what depends on time, chance or memory, and what has "
    "effects, into steps, or take durable.now(), durable.uuid4() and durable.random()."
)
_FAKES = "If a fake only counts its calls, let before=… reset it."


@dataclass(frozen=True)
class Survival:
    """What ``survives_crashes`` has tried: how the undisturbed run ended, and at which instants the worker died."""

    run: Run
    instants: tuple[str, ...]


@dataclass
class _Watch(AtEveryHook):
    """Notes what a run passes, and ends its worker at one instant."""

    #: The hook and the how-manieth passing of it; None: nobody dies.
    target: tuple[str, int] | None = None
    passes: list[tuple[str, str, str | None]] = field(default_factory=list)
    starts: Counter[Body] = field(default_factory=Counter)
    starts_later: Counter[Body] = field(default_factory=Counter)
    in_flight: set[Body] = field(default_factory=set)
    is_dead: bool = False
    has_died: bool = False
    ids: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._count: Counter[str] = Counter()
        self._lock = threading.Lock()

    def passed(self, hook: str, *facts: Any) -> None:
        """Note it; die, or be dead."""
        if hook not in INSTANTS:
            return
        with self._lock:
            if not self.is_dead:
                self._note(hook, facts[0], facts[1] if hook in _KEYED else None)
            if self.is_dead:
                raise Killed

    def revive(self) -> None:
        """Another worker goes on."""
        self.is_dead = False

    def _note(self, hook: str, workflow_id: str, key: str | None) -> None:
        self._count[hook] += 1
        self.passes.append((hook, workflow_id, key))
        if workflow_id not in self.ids:
            self.ids.append(workflow_id)
        body = (workflow_id, key or "")
        if hook in ("step_recorded", "try_recorded") and not self.has_died:
            self.in_flight.discard(body)
        if self.target == (hook, self._count[hook]):
            self.is_dead = self.has_died = True
        elif hook == "step_starting":
            self.starts[body] += 1
            if self.has_died:
                self.starts_later[body] += 1
            else:
                self.in_flight.add(body)


def survives_crashes(
    workflow: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    messages: Iterable[tuple[str | None, Any]] = (),
    before: Callable[[], Any] | None = None,
    app: Celery | None = None,
) -> Survival:
    """Run a workflow once for every instant at which a worker can die; assert that each crash changes nothing.

    The worker dies before and after each body, after each checkpoint, around each suspension and around the outcome,
    one instant a run; the recovery rescues the workflow, and it goes on to its end. Asserted is that it ends as it does
    undisturbed and with the same checkpoints, that each run can be replayed, that no step which was kept runs again,
    and that a body in flight runs once more at most. It runs in this process, so that fakes in its memory count on. A
    step that may run twice must still be harmless: look at your fakes for that.

    ``messages`` are pairs of topic (or None) and message, sent to the workflow when it starts. ``before`` is called
    before each run: let it reset fakes whose answers depend on how often they were called. What isn't the same in
    two undisturbed runs isn't compared. ``finally`` and ``except BaseException`` of the workflow run at such a death,
    although they wouldn't at a SIGKILL; durable calls in them do nothing.

    Returns the instants that were tried. Raises AssertionError, which says at which instant, what differs and what to
    do; ConfigurationError if this is no workflow; NotInstalled.
    """
    if not isinstance(args, list | tuple):
        raise ConfigurationError(f"survives_crashes() takes the arguments as a tuple, (42,), not {args!r:.100}.")
    plain = workflow.workflow if isinstance(workflow, WithStepsDone) else workflow
    task = first_of(signature_of(plain)).type
    if app is not None and installed_on(app) is not installed_on(task.app):
        raise ConfigurationError(f"The workflow {task.name} isn't one of the app {app.main!r}.")
    with on_bench(task.app) as bench:
        trial = _Trial(
            bench, workflow, plain, tuple(args), dict(kwargs or {}), list(messages), before or (lambda: None)
        )
        skips, bench.skips_time = bench.skips_time, True
        try:
            return trial.survive()
        finally:
            bench.skips_time = skips


@dataclass
class _Trial:
    """The runs of one workflow."""

    bench: Bench
    workflow: Any
    #: Without what is done beforehand.
    plain: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    messages: list[tuple[str | None, Any]]
    before: Callable[[], Any]

    def survive(self) -> Survival:
        """Try all instants."""
        first, watch = self.run_undisturbed()
        second, _ = self.run_undisturbed()
        expected = _Expected(_facts(first), _facts(second))
        expected.check_agreement()
        self.check_replay(second, "Run again on its own checkpoints")
        tried, counts = [], Counter[str]()
        for hook, workflow_id, key in watch.passes:
            counts[hook] += 1
            instant = INSTANTS[hook].format(repr(key)) + ("" if workflow_id == first.id else f" (in {workflow_id})")
            disturbed = self.run_disturbed((hook, counts[hook]), instant, expected)
            self.check_replay(disturbed, f"After its worker was killed {instant}")
            tried.append(instant)
        return Survival(first, tuple(tried))

    def check_replay(self, run: Run, when: str) -> None:
        """Raise AssertionError if the function does something else on its own checkpoints."""
        if self.workflow is not self.plain or getattr(self.plain, "subtask_type", None) == "chain":
            return
        try:
            replay(run.history, self.plain)
        except NondeterminismError as error:
            raise AssertionError(f"{when}, the workflow does something else: {error} {_PURE}") from error

    def run_undisturbed(self) -> tuple[Run, _Watch]:
        """Run it without a crash."""
        watch = _Watch()
        return self._run(watch, "without a crash"), watch

    def run_disturbed(self, target: tuple[str, int], instant: str, expected: _Expected) -> Run:
        """Run it with a crash, and compare."""
        watch = _Watch(target)
        kept: dict[Body, tuple[bool, bytes, int]] = {}

        def died() -> None:
            watch.revive()
            kept.update(self.bench.kit.settled(watch.ids))

        self.bench.died = died
        run = self._run(watch, instant)
        self._check_kept(watch, kept, instant)
        self._check_bodies(watch, instant)
        expected.check(run, instant)
        return run

    def _run(self, watch: _Watch, instant: str) -> Run:
        self.before()
        with observed(self.bench.installation, watch):
            ids = start(self.bench, self.workflow, self.args, self.kwargs)
            for topic, message in self.messages:
                send(ids[-1], message, topic, app=self.bench.app)
            run = go_on(self.bench, *ids)
        if run.state not in states.FINAL:
            raise AssertionError(
                f"Killed {instant}, "
                * watch.has_died
                + f"the workflow doesn't end: it is {run.state} and waits for {run.outcome.waiting_for}. Pass what it "
                "waits for in messages=[(topic, message), …]."
            )
        return run

    def _check_kept(self, watch: _Watch, kept: dict[Body, tuple[bool, bytes, int]], instant: str) -> None:
        now = self.bench.kit.settled(watch.ids)
        for body, (ok, value, _) in kept.items():
            if ok and watch.starts_later[body]:
                raise _violation(instant, f"the step {body[1]!r} ran again, although its checkpoint was kept")
            if ok and body in now and now[body][1] != value:
                raise _violation(instant, f"the checkpoint of step {body[1]!r} has changed")

    def _check_bodies(self, watch: _Watch, instant: str) -> None:
        for body, (_, _, tries) in self.bench.kit.settled(watch.ids).items():
            most = tries + (body in watch.in_flight)
            if tries and watch.starts[body] > most and not row_of(self.bench.installation, body[0]).retries:
                raise _violation(
                    instant, f"the body of step {body[1]!r} ran {watch.starts[body]} times, and {most} is what it may"
                )


@dataclass(frozen=True)
class _Facts:
    """What is compared of two runs."""

    state: str
    outcome: Any
    steps: dict[str, Any]


@dataclass(frozen=True)
class _Expected:
    """How the run ends undisturbed, twice."""

    first: _Facts
    second: _Facts

    def check_agreement(self) -> None:
        """Raise AssertionError if one of the undisturbed runs has failed where the other hasn't."""
        first, second = self.first, self.second
        for key in first.steps.keys() & second.steps.keys():
            if first.steps[key][0] != second.steps[key][0]:
                raise _disagreement(f"the step {key!r}", first.steps[key], second.steps[key])
        if first.state != second.state:
            raise _disagreement("it", (first.state, first.outcome), (second.state, second.outcome))

    def check(self, run: Run, instant: str) -> None:
        """Raise AssertionError if a disturbed run has ended otherwise."""
        facts = _facts(run)
        for key, value in self.first.steps.items():
            if key in facts.steps and value == self.second.steps.get(key) != facts.steps[key]:
                raise _violation(
                    instant, f"the step {key!r} has the outcome {facts.steps[key]!r}, and undisturbed {value!r}",
                    "Its body isn't the same when it runs twice: make it idempotent by "
                    f"durable.current.idempotency_key, or atomic. {_FAKES}",
                )  # fmt: skip
        if facts.state != self.first.state:
            raise _violation(
                instant, f"it ends in {facts.state} ({run.error!r}), and undisturbed in {self.first.state}", _PURE
            )  # fmt: skip
        if self.first.steps.keys() == self.second.steps.keys() != facts.steps.keys():
            more, less = sorted(facts.steps.keys() - self.first.steps), sorted(self.first.steps.keys() - facts.steps)
            raise _violation(
                instant, f"it takes another way: steps that it has now only are {more}, and undisturbed only {less}",
                _PURE,
            )  # fmt: skip
        if self.first.outcome == self.second.outcome != facts.outcome:
            raise _violation(
                instant, f"its outcome is {facts.outcome!r}, and undisturbed {self.first.outcome!r}",
                _PURE,
            )  # fmt: skip


def _facts(run: Run) -> _Facts:
    history: History = run.history
    outcome = None if history.outcome is None else (history.outcome.ok, _plain(history.outcome))
    steps = {step.key: (step.state, None if step.kept is None else _plain(step.kept)) for step in history}
    return _Facts(run.state, outcome, steps)


def _plain(kept: Any) -> Any:
    return kept.data if kept.ok else repr(kept.error)


def _disagreement(what: str, first: Any, second: Any) -> Exception:
    return AssertionError(
        f"In two runs without a crash {what} ends as {first!r} and then as {second!r}: the second one sees what the "
        f"first has left. {_FAKES}"
    )


def _violation(
    instant: str, what: str, advice: str = "Please report it: that is a bug of celery_durable's."
) -> Exception:
    return AssertionError(f"With its worker killed {instant}, {what}. {advice}")
