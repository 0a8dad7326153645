"""What has been promised so far, and whether the rows keep it.

Which invariant of `docs/protocol.md` is checked where stands at each check. Not seen here: that nothing is born from a
message of ours without a row (11; no statement of this machine starts anything but a start), and what bodies do when
their process is frozen in them.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from tests.protocol.rows import Rows
from tests.protocol.stage import Statement

if TYPE_CHECKING:
    from tests.protocol.model import Protocol, Run

#: Under these states nothing of the attempt may be written any more.
ENDS = ("SUCCESS", "FAILURE", "DEAD", "SUSPENDED")


def body_of(workflow: str, mark: str) -> bytes:
    """What a message says is told by its key: the row loses its body when it is taken."""
    return f"message {workflow} {mark}".encode()


class Promises:
    """Kept from rule to rule; `check` compares them with what everybody sees."""

    def __init__(self, machine: Protocol) -> None:
        self._machine = machine
        #: The run that made each value.
        self.bodies: dict[bytes, Run] = {}
        #: Workflow, birth, attempt and state of each outcome that Celery has had.
        self.delivered: set[tuple[str, Any, int, str]] = set()
        #: Workflows that may fail without a failed step.
        self.given_up: set[str] = set()
        #: A workflow may have been removed.
        self.pruning = False
        self._outcomes: dict[tuple[str, Any, str], tuple[bool, bytes]] = {}
        self._tokens: dict[tuple[str, Any, int], Any] = {}
        self._ended: set[Any] = set()
        self._tries: dict[tuple[str, Any, str], int] = {}
        self._sent: set[tuple[str, Any, str]] = set()
        self._messages: dict[int, tuple[bytes, str | None]] = {}
        self._rows: Rows | None = None
        self._recent: list[Statement] = []

    # What is promised

    def concerns(self, statement: Statement) -> None:
        """A statement is made."""
        self._recent.append(statement)

    def claimed(self, run: Run) -> None:
        """Invariant 3: an attempt has one token."""
        assert run.fence is not None
        known = self._tokens.setdefault((run.workflow, run.born, run.fence.attempt), run.token)
        assert known == run.token, f"invariant 3: two tokens for attempt {run.fence.attempt} of {run.workflow}"

    def enters(self, run: Run, key: str) -> None:
        """Invariants 5 and 6: a body begins."""
        rows = self._machine.rows()
        row = rows.workflows.get(run.workflow)
        if row is not None and row.token == run.token and row.state == "RUNNING":
            assert key not in rows.outcomes(run.workflow), f"invariant 5: {key} of {run.workflow} runs again"
        for other in self._machine.runs:
            if other is not run and other.runs and other.body and other.workflow == run.workflow:
                twice = other.body[0] == key and other.born == run.born and not other.is_suspected
                assert not twice, f"invariant 6: two bodies of {key} of {run.workflow}, and nobody was suspected"

    def failed(self, run: Run, key: str) -> None:
        """A failed try is recorded: rule 12 never gives it back."""
        row = self._machine.rows().workflows.get(run.workflow)
        if row is not None and row.token == run.token:
            self._tries[run.workflow, run.born, key] = run.tries[key]

    def sent(self, workflow: str, mark: str) -> None:
        """A sender knows that its message is kept."""
        row = self._machine.rows().workflows.get(workflow)
        if row is not None and row.finished_at is None:
            self._sent.add((workflow, row.created_at, mark))

    def oldest(self, rows: Rows, workflow: str) -> int | None:
        """The message that has to be taken next, unless an older one comes."""
        waiting = [m.seq for m in rows.messages.values() if m.workflow == workflow and m.taken_by is None]
        return min(waiting, default=None)

    def received(self, oldest: int | None, body: bytes, key: str) -> None:
        """Invariant 10: messages are taken in order."""
        (seq,) = [seq for seq, (known, _) in self._messages.items() if known == body] or [None]
        if seq is not None and oldest is not None:
            assert seq <= oldest, f"invariant 10: {key} has taken message {seq}, and {oldest} was there"

    def forget(self, workflow: str) -> None:
        """A failover has lost its last attempt, and the outcomes of that."""
        rows = self._machine.rows()
        born, last = rows.workflows[workflow].created_at, rows.workflows[workflow].attempt + 1
        self._ended.add(self._tokens.pop((workflow, born, last), None))
        settled = rows.outcomes(workflow)
        gone = {place for place in self._outcomes if place[:2] == (workflow, born) and place[2] not in settled}
        self._outcomes = {place: outcome for place, outcome in self._outcomes.items() if place not in gone}
        self._tries = {place: tries for place, tries in self._tries.items() if place[0] != workflow}
        self.forget_who_changed()

    def forget_who_changed(self) -> None:
        """Time has passed: all rows were changed by it."""
        self._rows = None

    # Whether it is kept

    def check(self, rows: Rows) -> None:
        """Compare; then take what is new for promised."""
        before, self._rows = self._rows, rows
        self._check_writers(before, rows)
        for workflow, row in rows.workflows.items():
            self._check_token(row)
            self._check_outcomes(rows, row)
            self._check_tries(rows, row)
            self._check_rest(rows, row)
            forgotten = rows.is_forgotten(workflow)
            assert forgotten is None, f"invariant 7: nothing wakes {workflow}: {forgotten}"
        self._check_histories(rows)
        self._check_messages(rows)
        self._note_ends(rows)
        self._recent = [session.statement for session in self._machine.stage.busy() if session.statement is not None]

    def _check_writers(self, before: Rows | None, rows: Rows) -> None:
        """Invariant 13: a transaction changes one workflow, unless it is one of those for many."""
        if before is not None and not any(statement.is_bulk for statement in self._recent):
            writers = Counter(
                row.changed_by
                for workflow, row in rows.workflows.items()
                if workflow in before.workflows and before.workflows[workflow].changed_by != row.changed_by
            )
            several = [str(statement) for statement in self._recent if max(writers.values(), default=0) > 1]
            assert not several, f"invariant 13: two workflows changed by one transaction of {several}"

    def _check_token(self, row: Any) -> None:
        """Invariant 3."""
        if row.state == "RUNNING":
            known = self._tokens.setdefault((row.id, row.created_at, row.attempt), row.token)
            assert known == row.token, f"invariant 3: two tokens for attempt {row.attempt} of {row.id}"

    def _check_outcomes(self, rows: Rows, row: Any) -> None:
        """Invariants 1, 3 and 4."""
        settled = rows.outcomes(row.id)
        for (workflow, born, key), promised in list(self._outcomes.items()):
            if workflow == row.id and born == row.created_at:
                if key in settled:
                    now = settled[key].ok, settled[key].value
                    assert now == promised, f"invariant 1: {key} of {row.id} was {promised} and is {now}"
                else:
                    assert not promised[0], f"invariant 1: {key} of {row.id} was {promised} and is gone"
                    del self._outcomes[workflow, born, key]
        for key, step in settled.items():
            if (row.id, row.created_at, key) not in self._outcomes:
                self._outcomes[row.id, row.created_at, key] = (step.ok, step.value)
                token = self._tokens.get((row.id, row.created_at, step.attempt))
                assert token is not None, f"invariant 3: {key} of {row.id} belongs to no attempt"
                assert token not in self._ended, f"invariant 4: {key} of {row.id} was recorded after its attempt"
                run = self.bodies.get(bytes(step.value))
                assert run is None or run.token == token, f"invariant 3: {key} of {row.id} is under another's token"

    def _check_tries(self, rows: Rows, row: Any) -> None:
        """Rule 12."""
        for (workflow, born, key), promised in list(self._tries.items()):
            if workflow == row.id and born == row.created_at:
                step = rows.checkpoints.get((workflow, key))
                if step is None or step.ok is not None:
                    del self._tries[workflow, born, key]
                else:
                    assert step.tries >= promised, f"rule 12: {key} of {row.id} has had a failed try given back"

    def _check_rest(self, rows: Rows, row: Any) -> None:
        """Rules 11 and 17, and invariants 8 and 9 as far as CHECK constraints don't see to them."""
        assert row.crashes <= row.max_crashes or row.state in ("DEAD", "CANCELLED"), f"rule 11: {row.crashes} crashes"
        if row.dispatched:
            end = (row.id, row.created_at, row.attempt, row.state)
            assert end in self.delivered, f"invariant 9: the end of {row.id} counts as delivered, and nobody has it"

    def _check_histories(self, rows: Rows) -> None:
        """Invariant 2."""
        for run in self._machine.runs:
            row = rows.workflows.get(run.workflow)
            if run.runs and run.fence is not None and row is not None and row.token == run.token:
                for key, step in rows.outcomes(run.workflow).items():
                    assert step.attempt >= run.fence.attempt or key in run.history, (
                        f"invariant 2: attempt {run.fence.attempt} of {run.workflow} has no {key} of {step.attempt}"
                    )

    def _check_messages(self, rows: Rows) -> None:
        """Invariant 10: taken by one, together with its checkpoint, and never lost."""
        for seq, message in rows.messages.items():
            body, taken_by = self._messages.get(seq, (body_of(message.workflow, message.idempotency_key), None))
            assert taken_by in (None, message.taken_by), f"invariant 10: {taken_by} took it, now {message.taken_by}"
            self._messages[seq] = (body, message.taken_by)
            if message.taken_by is not None and message.workflow in rows.workflows:
                step = rows.checkpoints.get((message.workflow, message.taken_by))
                has_it = step is not None and step.ok and bytes(step.value) == body
                assert has_it, f"invariant 10: {message.taken_by} has taken {body!r}, and has {step}"
        there = {(message.workflow, message.idempotency_key) for message in rows.messages.values()}
        for workflow, born, mark in self._sent:
            row = rows.workflows.get(workflow)
            if row is not None and row.created_at == born:
                assert (workflow, mark) in there, f"a message to {workflow} is lost: {mark}"

    def _note_ends(self, rows: Rows) -> None:
        """Which attempts have ended, as of now."""
        current = {row.token for row in rows.workflows.values() if row.state not in ENDS}
        self._ended |= {token for token in self._tokens.values() if token not in current}

    def at_the_end(self, rows: Rows) -> None:
        """Invariant 13: every workflow has an end that it deserves."""
        for workflow, row in rows.workflows.items():
            outcomes = {key: step.ok for key, step in rows.outcomes(workflow).items()}
            program = [f"{kind}{place}" for place, kind in enumerate(self._machine.programs[workflow])]
            if row.state == "SUCCESS":
                assert outcomes == dict.fromkeys(program, True), f"{workflow} is a success with {outcomes}"
            if row.state == "FAILURE":
                assert workflow in self.given_up or not all(outcomes.values()), f"{workflow} has failed with {outcomes}"
