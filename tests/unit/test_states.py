"""The states of a workflow, and the drawing of the ways between them."""

from __future__ import annotations

from celery import states as celery_states

from celery_durable import states


def test_every_state_is_live_or_final() -> None:
    """No state is both, none is neither."""
    assert states.ALL == states.LIVE | states.FINAL
    assert not states.LIVE & states.FINAL
    assert len(states.ALL) == 7


def test_every_state_can_be_entered_and_has_its_exits() -> None:
    """The table of transitions knows every state, and leads to known states only."""
    assert set(states.TRANSITIONS) == states.ALL | {None}
    reached = frozenset().union(*states.TRANSITIONS.values())
    assert reached == states.ALL


def test_a_success_is_for_ever() -> None:
    """Other ends may be resumed, a success never changes."""
    ends = {state for state in states.FINAL if not states.TRANSITIONS[state]}
    assert ends == {states.SUCCESS}


def test_every_live_state_can_be_cancelled() -> None:
    """A deadline holds wherever the workflow is."""
    assert all(states.CANCELLED in states.TRANSITIONS[state] for state in states.LIVE)


def test_celery_has_a_name_for_each_state() -> None:
    """What Celery's own tools are told is a state that they know."""
    assert set(states.CELERY) == states.ALL
    assert set(states.CELERY.values()) <= celery_states.ALL_STATES
    assert {states.CELERY[state] in celery_states.READY_STATES for state in states.FINAL} == {True}
    assert {states.CELERY[state] in celery_states.READY_STATES for state in states.LIVE} == {False}
