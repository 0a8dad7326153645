"""Proves from the ledger, the database and the journal of faults that nothing was lost and nothing done twice."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tests.chaos.faults import Fault
from tests.chaos.kinds import EXPECTED, NAP
from tests.chaos.ledger import Entry
from tests.chaos.load import Started
from tests.chaos.stage import LEASE, SLACK, SWEEP

#: A commit is a moment later than the time that its row tells.
TICK = 0.05
#: PROTOCOL 4: a step may begin for so long after the last look at the workflow, so for so long after a cancellation.
STALE = 1.0
#: What a process that stood still, or a busy machine, may add between a look and the body's first line.
LATE = 1.0
#: PROTOCOL: a killed worker's workflow can be claimed again after a lease and a sweep.
BOUND = LEASE + SWEEP + SLACK


@dataclass(frozen=True)
class Row:
    """A workflow in the database at the end."""

    id: str
    name: str
    state: str
    result: Any


@dataclass(frozen=True)
class Outcome:
    """A settled checkpoint in the database, its time on the ledger's clock."""

    workflow: str
    key: str
    ok: bool | None
    value: Any
    at: float


@dataclass(frozen=True)
class Evidence:
    """All that is known when everything has ended."""

    started: Sequence[Started]
    undone: Sequence[str]
    purchases: frozenset[str]
    rows: dict[str, Row]
    outcomes: dict[tuple[str, str], Outcome]
    effects: Sequence[tuple[str, str, str]]
    entries: Sequence[Entry]
    faults: Sequence[Fault]


def findings(evidence: Evidence) -> Iterator[str]:
    """Every promise that wasn't kept, as a sentence."""
    yield from _ends(evidence)
    yield from _transactions(evidence)
    yield from _results(evidence)
    yield from _effects(evidence)
    yield from _reruns(evidence)
    yield from _cancellations(evidence)
    yield from _naps(evidence)
    yield from _late_recoveries(evidence)


def recoveries(evidence: Evidence) -> Iterator[tuple[Fault, float]]:
    """How long after the death of a worker the recovery enqueued what it had run, where no other fault was near."""
    rescued: dict[str, list[float]] = defaultdict(list)
    for entry in evidence.entries:
        if entry.what == "rescue":
            rescued[entry.workflow].append(entry.at)
    for fault in evidence.faults:
        if fault.name == "worker killed" and not _is_disturbed(fault, evidence.faults):
            last = {entry.workflow: entry for entry in evidence.entries if entry.at < fault.end}
            for workflow, entry in last.items():
                if entry.pid in fault.pids and entry.what == "begin":
                    after = [at for at in rescued[workflow] if at > fault.begin]
                    yield fault, min(after, default=float("inf")) - fault.begin


def flat(value: Any) -> Iterator[str]:
    """All texts in a result."""
    if isinstance(value, str):
        yield value
    for each in value if isinstance(value, list) else ():
        yield from flat(each)


def labels(value: Any) -> Any:
    """A result as `kinds.py` has it: without the words by which runs of a body differ."""
    if isinstance(value, list):
        return [labels(each) for each in value]
    return value.split(" ")[0] if isinstance(value, str) and _nonce(value) else value


def _ends(evidence: Evidence) -> Iterator[str]:
    """Every started workflow reached its right outcome, and so did all that they have started."""
    steered = {each.id: each for each in evidence.started if each.cancelled_at is not None}
    for each in evidence.started:
        row = evidence.rows.get(each.id)
        if row is None:
            yield f"{each} was started, and isn't there"
            continue
        if row.state == "SUCCESS" and labels(row.result) != EXPECTED[each.kind](each.number):
            yield f"{each} returned {row.result}, not {EXPECTED[each.kind](each.number)}"
    for row in evidence.rows.values():
        one = steered.get(row.id)
        wanted = "CANCELLED" if one is not None and one.resumed_at is None else "SUCCESS"
        if row.state != wanted:
            yield f"{row} should be {wanted}"


def _transactions(evidence: Evidence) -> Iterator[str]:
    """What was started in a transaction is there exactly if the transaction was committed."""
    for workflow_id in evidence.undone:
        if workflow_id in evidence.rows or workflow_id in evidence.purchases:
            yield f"{workflow_id} was rolled back, and is there"
    for workflow_id in evidence.purchases - evidence.rows.keys():
        yield f"{workflow_id} was committed, and was never started"


def _results(evidence: Evidence) -> Iterator[str]:
    """Every word in a result is that of the one run whose outcome was recorded."""
    ended = {entry.nonce: entry for entry in evidence.entries if entry.what == "end"}
    kept = {_nonce(text) for outcome in evidence.outcomes.values() for text in flat(outcome.value)}
    for row in evidence.rows.values():
        for text in flat(row.result):
            nonce = _nonce(text)
            if nonce and (nonce not in ended or nonce not in kept):
                yield f"{row} has {text!r}, which no body has returned, or no checkpoint keeps"
    for (workflow, key), outcome in evidence.outcomes.items():
        for text in flat(outcome.value):
            entry = ended.get(_nonce(text) or "")
            if entry is not None and entry.workflow == workflow and entry.key != key:
                yield f"{outcome} keeps the outcome of {entry}"


def _effects(evidence: Evidence) -> Iterator[str]:
    """Atomic effects are there exactly once, as the checkpoint says."""
    there: dict[tuple[str, str], list[str]] = defaultdict(list)
    for workflow, key, nonce in evidence.effects:
        there[workflow, key].append(nonce)
    for (workflow, key), outcome in evidence.outcomes.items():
        if key.startswith("tests.chaos.app.book") and outcome.ok:
            nonces = there.pop((workflow, key), [])
            if nonces != [_nonce(str(outcome.value))]:
                yield f"{outcome} has the effects {nonces}"
    for where, nonces in there.items():
        yield f"{where} has the effects {nonces} without a checkpoint"


def _reruns(evidence: Evidence) -> Iterator[str]:
    """No body began after its outcome was recorded, and none ran again without a failed try or a fault of its own."""
    runs: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    ends: dict[str, Entry] = {}
    for entry in evidence.entries:
        if entry.what == "begin":
            runs[entry.workflow, entry.key].append(entry)
        elif entry.what in ("end", "fail"):
            ends[entry.nonce] = entry
    for where, begins in runs.items():
        begins.sort(key=lambda entry: entry.at)
        yield from _begun_after_the_end(evidence, where, begins)
        yield from _unexcused(evidence, begins, ends)


def _begun_after_the_end(evidence: Evidence, where: tuple[str, str], begins: Sequence[Entry]) -> Iterator[str]:
    outcome = evidence.outcomes.get(where)
    for entry in begins:
        late = outcome is not None and outcome.ok is not None and entry.at > outcome.at + TICK
        if late and not _stood_still(evidence.faults, entry):
            yield f"{entry} began after {outcome}"


def _unexcused(evidence: Evidence, begins: Sequence[Entry], ends: dict[str, Entry]) -> Iterator[str]:
    used: set[int] = set()
    for first, second in pairwise(begins):
        end = ends.get(first.nonce)
        failed = end is not None and end.what == "fail" and end.at <= second.at
        if failed or _stood_still(evidence.faults, second):
            continue
        atomic = first.key.startswith("tests.chaos.app.book")
        excuses = [
            number
            for number, fault in enumerate(evidence.faults)
            if number not in used and fault.excuses(first.pid, first.at, second.at, atomic=atomic)
        ]
        if not excuses:
            yield f"{second} ran again without a cause after {first}, which came to {end}"
        # A process is hit once; connections are lost again and again.
        used.update(number for number in excuses[:1] if first.pid in evidence.faults[number].pids)


def _cancellations(evidence: Evidence) -> Iterator[str]:
    """Once a cancellation has returned, no next step starts, until the workflow is resumed."""
    steered = {each.id: each for each in evidence.started if each.cancelled_at is not None}
    for entry in evidence.entries:
        one = steered.get(entry.workflow) if entry.what == "begin" else None
        if one is None or one.cancelled_at is None:
            continue
        until = one.resumed_at if one.resumed_at is not None else float("inf")
        if one.cancelled_at + STALE + LATE < entry.at < until and not _stood_still(evidence.faults, entry):
            yield f"{entry} began {entry.at - one.cancelled_at:.2f} s after its workflow was cancelled"


def _naps(evidence: Evidence) -> Iterator[str]:
    """No sleep ended early, whatever the workers' clocks say."""
    ended = {entry.nonce: entry for entry in evidence.entries if entry.what == "end"}
    begun = {entry.nonce: entry for entry in evidence.entries if entry.what == "begin"}
    for row in evidence.rows.values():
        if row.name.endswith(".sleeping") and row.state == "SUCCESS":
            before, after = (_nonce(text) or "" for text in row.result[:2])
            if before in ended and after in begun and begun[after].at - ended[before].at < NAP - TICK:
                yield f"{row} slept for {begun[after].at - ended[before].at:.2f} s only"


def _late_recoveries(evidence: Evidence) -> Iterator[str]:
    """What a dead worker had run is enqueued again within a lease and a sweep."""
    for fault, seconds in recoveries(evidence):
        if seconds > BOUND:
            yield f"{fault}: what it had run was enqueued again {seconds:.1f} s later, not within {BOUND:g} s"


def _is_disturbed(fault: Fault, faults: Sequence[Fault]) -> bool:
    """Whether another fault was so near that the bound doesn't hold: it counts from an undisturbed cluster on."""
    others = (other for other in faults if other is not fault and (other.pids or other.breaks_transactions))
    return any(other.begin < fault.end + BOUND and other.end > fault.begin - BOUND for other in others)


def _stood_still(faults: Sequence[Fault], entry: Entry) -> bool:
    """Whether the process was stopped between its look and the body: no look can tell (PROTOCOL 4)."""
    return any(
        fault.name == "worker paused" and entry.pid in fault.pids and fault.begin - LATE <= entry.at <= fault.end + LATE
        for fault in faults
    )


def _nonce(text: str) -> str | None:
    word = text.rpartition(" ")[2]
    return word if len(word) == 32 and all(each in "0123456789abcdef" for each in word) else None


def decoded(value: bytes | None) -> Any:
    """A JSON value of the database."""
    return None if value is None else json.loads(value)
