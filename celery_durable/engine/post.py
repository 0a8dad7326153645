"""What a workflow gives to others: messages and events, each with its own checkpoint in one transaction."""

from __future__ import annotations

from functools import partial

from ..exceptions import WorkflowFinished, WorkflowNotFound
from ..serialization import Payload
from ..store import Letter
from .context import WHILE_ALIVE, boot_time
from .retry import Ended
from .step import Call
from .wait import record_of
from .waiting import Waiting

#: A workflow that sends tells of its own messages; more than this were sent by others, whom the sweep helps.
_MOST_TOLD = 100


async def post(call: Call, letter: Letter, waiting: Waiting) -> None:
    """Send a message once; raise WorkflowNotFound or WorkflowFinished, alike on every replay."""
    attempt, messages = call.attempt, call.attempt.engine.store.messages
    if call.is_settled:
        call.replay().get()
        return
    attempt.check_going()
    tell, sent_at = attempt.engine.observers.tell, boot_time()
    tell("call_starting", attempt.id, call.key)
    record = record_of(call, call.encode(None))
    posted = await waiting.run(partial(messages.send_as_step, attempt.fence, record, letter, patience=WHILE_ALIVE))
    attempt.judge(None if posted is None else posted.standing)
    attempt.confirm(sent_at)
    assert posted is not None
    if not posted.kept:
        call.waiting = waiting
        (await call.settle(Ended(error=_refusal(letter, posted.state)))).get()
    tell("call_recorded", attempt.id, call.key)
    republish_after = attempt.engine.republish_after
    _, woken = await waiting.run(
        partial(messages.tell, letter.workflow, republish_after, limit=_MOST_TOLD, patience=WHILE_ALIVE)
    )
    await waiting.run(partial(attempt.send, woken))


async def publish(call: Call, event: str, payload: Payload, waiting: Waiting) -> None:
    """Publish an event once."""
    attempt = call.attempt
    if call.is_settled:
        call.replay()
        return
    attempt.check_going()
    store, sent_at = attempt.engine.store, boot_time()
    attempt.engine.observers.tell("call_starting", attempt.id, call.key)
    then = store.awaits.notifying([attempt.id], attempt.engine.republish_after)
    standing, woken = await waiting.run(
        partial(store.events.set, attempt.fence, record_of(call, call.encode(None)), event, payload, then,
                patience=WHILE_ALIVE)
    )  # fmt: skip
    attempt.engine.observers.tell("call_recorded", attempt.id, call.key)
    await waiting.run(partial(attempt.send, woken))
    attempt.judge(standing)
    attempt.confirm(sent_at)


def _refusal(letter: Letter, state: str | None) -> Exception:
    if state is None:
        return WorkflowNotFound(f"There is no workflow {letter.workflow!r} to send a message to.")
    return WorkflowFinished(f"The workflow {letter.workflow} is {state}: it takes no messages any more.")
