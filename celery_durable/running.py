"""What runs here: each process of a worker notes its workflows and steps, and the main process reads that.

A note is some bytes in memory that the worker shares with the processes which it forks: no statement, no message, no
lock. It is there to be shown; nothing is decided by it.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property

from billiard import current_process

from .engine.observer import Observer

#: Pool processes that can leave a note, and the bytes of one: those of more aren't shown.
SLOTS = 512
SLOT = 4096
#: Workflows of one process, as a green pool may have them.
_MOST = 10_000
#: Before each note: a number that is odd while the note is written, and its length.
_HEAD = struct.Struct("<II")
_READS = 5
_BETWEEN = "\x00"


@dataclass
class Note:
    """One workflow that runs; times are the worker's, in seconds since the epoch."""

    id: str
    attempt: int
    since: float
    #: Since when each step runs, by its key; several in a ``gather``.
    steps: dict[str, float] = field(default_factory=dict)

    @cached_property
    def head(self) -> bytes:
        """What stands before the steps where it is shared."""
        return _BETWEEN.join((self.id, str(self.attempt), f"{self.since:.3f}")).encode()


class Running(Observer):
    """Notes what this process runs."""

    def __init__(self) -> None:
        self._notes: OrderedDict[str, Note] = OrderedDict()
        self._memory: mmap.mmap | None = None
        self._owner = 0
        #: Of which process the place is known.
        self._pid = 0
        self._start: int | None = None

    def share(self) -> None:
        """Read what the processes note that this one forks from now on."""
        self._memory = mmap.mmap(-1, SLOTS * SLOT)
        self._owner = os.getpid()

    def notes(self) -> dict[str, Note]:
        """Return what runs in this process and in those that it has forked; also what was never said to have ended."""
        found = [note for note in map(self._read, range(SLOTS)) if note is not None]
        # A process that has died may have left a note of an earlier attempt.
        return {note.id: note for note in sorted([*found, *self._notes.values()], key=lambda note: note.attempt)}

    # The hooks.

    def claimed(self, workflow_id: str, attempt: int) -> None:
        """Called when an attempt has begun."""
        if self._is_pool_process():
            self._notes.clear()  # one at a time; how an earlier one has ended may not have been told
        self._notes[workflow_id] = Note(workflow_id, attempt, time.time())
        while len(self._notes) > _MOST:
            self._notes.popitem(last=False)
        self._write()

    def step_starting(self, workflow_id: str, key: str) -> None:
        """Called before each try of a step's body."""
        if note := self._notes.get(workflow_id):
            note.steps[key] = time.time()
            self._write()

    call_starting = step_starting

    def step_recorded(self, workflow_id: str, key: str) -> None:
        """Called when the checkpoint is committed."""
        if (note := self._notes.get(workflow_id)) and note.steps.pop(key, None):
            self._write()

    call_recorded = try_recorded = branch_ended = step_recorded

    def finished(self, workflow_id: str, state: str) -> None:
        """Called when the outcome is committed."""
        self._end(workflow_id)

    def suspended(self, workflow_id: str, reason: str) -> None:
        """Called when the suspension is committed."""
        self._end(workflow_id)

    def handed_over(self, workflow_id: str) -> None:
        """Called when the hand-over is committed."""
        self._end(workflow_id)

    def fenced(self, workflow_id: str) -> None:
        """Called when another worker owns the workflow."""
        self._end(workflow_id)

    def _end(self, workflow_id: str) -> None:
        if self._notes.pop(workflow_id, None):
            self._write()

    # The shared memory.

    def _is_pool_process(self) -> bool:
        return self._memory is not None and os.getpid() != self._owner

    def _write(self) -> None:
        memory, start = self._memory, self._place()
        if memory is None or start is None:
            return
        data = _packed(next(iter(self._notes.values()), None))
        number, _ = _HEAD.unpack_from(memory, start)
        number = (number | 1) & 0xFFFFFFFF
        _HEAD.pack_into(memory, start, number, 0)
        memory[start + _HEAD.size : start + _HEAD.size + len(data)] = data
        _HEAD.pack_into(memory, start, (number + 1) & 0xFFFFFFFF, len(data))

    def _place(self) -> int | None:
        """Return where the note of this process begins; it is looked up once, as each step is noted."""
        if self._pid != os.getpid():
            self._pid, self._start = os.getpid(), self._found_place()
        return self._start

    def _found_place(self) -> int | None:
        slot = getattr(current_process(), "index", SLOTS) if self._is_pool_process() else SLOTS
        return slot * SLOT if isinstance(slot, int) and 0 <= slot < SLOTS else None

    def _read(self, slot: int) -> Note | None:
        if self._memory is None:
            return None
        start = slot * SLOT
        for _ in range(_READS):
            before = _HEAD.unpack_from(self._memory, start)
            data = self._memory[start + _HEAD.size : start + _HEAD.size + min(before[1], SLOT - _HEAD.size)]
            if before[0] % 2 == 0 and before == _HEAD.unpack_from(self._memory, start):
                return _unpacked(data)
        return None


def _packed(note: Note | None) -> bytes:
    """Return a note as bytes; of more steps than there is room for, the last ones are left out."""
    if note is None:
        return b""
    data = note.head
    for key, since in list(note.steps.items()):
        more = f"{_BETWEEN}{key}{_BETWEEN}{since:.3f}".encode()
        if len(data) + len(more) <= SLOT - _HEAD.size:
            data += more
    return data


def _unpacked(data: bytes) -> Note | None:
    if not data:
        return None
    workflow_id, attempt, since, *steps = data.decode().split(_BETWEEN)
    return Note(workflow_id, int(attempt), float(since), dict(zip(steps[::2], map(float, steps[1::2]), strict=True)))
