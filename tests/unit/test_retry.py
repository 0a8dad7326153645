"""Retry policies: which errors are tried again, how often, and after which delay."""

from __future__ import annotations

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from celery_durable.engine.retry import Ended, GivenUp, RetryPolicy, TryAgain, tried_again
from celery_durable.engine.waiting import complete
from celery_durable.exceptions import StepTimeout, Suspended


class Flaky:
    """A body that fails a number of times, and what its retries told."""

    def __init__(self, failures: int, error: type[BaseException] = ValueError) -> None:
        self.failures = failures
        self.error = error
        self.calls = 0
        self.told: list[tuple[str, float]] = []
        self.waits: list[float] = []

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error(f"failure {self.calls}")
        return "done"

    def run(self, policy: RetryPolicy, failed_tries: int = 0) -> str:
        ended = complete(
            tried_again(
                policy, complete(self.once()), self.once, failed_tries=failed_tries, failed=self.failed, wait=self.wait
            )
        )
        if ended.error is not None:
            raise ended.error
        return str(ended.value)

    async def once(self) -> Ended:
        try:
            return Ended(self())
        except (Exception, TryAgain) as error:
            return Ended(error=error)

    async def failed(self, ended: Ended, delay: float) -> None:
        self.told.append((str(ended.error), delay))

    async def wait(self, seconds: float) -> None:
        self.waits.append(seconds)


def policy(**options: object) -> RetryPolicy:
    defaults = {"max_retries": 3, "autoretry_for": (ValueError,), "retry_backoff": 1.0, "retry_jitter": False}
    return RetryPolicy(**{**defaults, **options})  # type: ignore[arg-type]


def test_a_body_is_called_until_it_returns() -> None:
    """Each failure is told with the delay that follows, and the delays are passed."""
    body = Flaky(2)
    assert body.run(policy()) == "done"
    assert body.told == [("failure 1", 1.0), ("failure 2", 2.0)]
    assert body.waits == [1.0, 2.0]


@pytest.mark.parametrize("max_retries", [0, 1, 3])
def test_the_last_error_is_raised_without_another_wait(max_retries: int) -> None:
    """n retries are n + 1 calls and n waits; the error is the body's own."""
    body = Flaky(99)
    with pytest.raises(ValueError, match=f"failure {max_retries + 1}"):
        body.run(policy(max_retries=max_retries))
    assert (body.calls, len(body.told), len(body.waits)) == (max_retries + 1, max_retries, max_retries)


def test_none_means_for_ever() -> None:
    """max_retries=None never gives up."""
    assert Flaky(500).run(policy(max_retries=None)) == "done"


def test_earlier_attempts_have_used_up_their_tries() -> None:
    """Number and delay of the next try go on from where the crashed attempt was."""
    body = Flaky(99)
    with pytest.raises(ValueError, match="failure 2"):
        body.run(policy(), failed_tries=2)
    assert body.waits == [4.0]


def test_an_error_that_no_option_names_is_raised_at_once() -> None:
    """Retries are for what was declared."""
    body = Flaky(1, KeyError)
    with pytest.raises(KeyError):
        body.run(policy())
    assert body.calls == 1


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({}, ValueError(), True),
        ({}, UnicodeError(), True),
        ({}, KeyError(), False),
        ({"dont_autoretry_for": (UnicodeError,)}, UnicodeError(), False),
        ({"dont_autoretry_for": (UnicodeError,)}, ValueError(), True),
        ({"autoretry_for": (), "retry_if": lambda error: "503" in str(error)}, OSError("503"), True),
        ({"autoretry_for": (), "retry_if": lambda error: "503" in str(error)}, OSError("404"), False),
        ({"retry_if": lambda error: False}, ValueError(), True),
        ({"retry_if": lambda error: True, "dont_autoretry_for": (OSError,)}, OSError(), False),
        ({"autoretry_for": (Exception,)}, StepTimeout(), True),
        ({"autoretry_for": (Exception,)}, SoftTimeLimitExceeded(), False),
        ({"autoretry_for": (BaseException,)}, Suspended("sleep"), False),
        ({"autoretry_for": (BaseException,)}, KeyboardInterrupt(), False),
    ],
)
def test_which_errors_are_worth_another_try(options: dict[str, object], error: BaseException, expected: bool) -> None:
    """autoretry_for or retry_if, never dont_autoretry_for, never control flow or Celery's own soft limit."""
    assert policy(**options).applies_to(error) is expected


def test_a_body_that_asks_is_called_again() -> None:
    """Whatever the policy says: it has counted itself, and may say when; else the policy's delay passes."""
    asked = iter([TryAgain(KeyError("a"), 0.25), TryAgain(None, None), None])
    waits: list[float] = []

    async def body() -> Ended:
        return Ended("done", error=next(asked))

    async def failed(ended: Ended, delay: float) -> None: ...

    async def wait(seconds: float) -> None:
        waits.append(seconds)

    first = complete(body())
    ended = complete(tried_again(policy(max_retries=0), first, body, failed_tries=0, failed=failed, wait=wait))
    assert (ended.error, waits) == (None, [0.25, 2.0])


def test_a_body_that_has_given_up_is_not_called_again() -> None:
    """Not even if the policy would."""
    assert not policy(max_retries=None).goes_on(Ended(error=GivenUp(ValueError())), 1)


def test_control_flow_is_never_caught() -> None:
    """A suspension unwinds the workflow through any policy."""
    body = Flaky(1, Suspended)
    with pytest.raises(Suspended):
        body.run(policy(autoretry_for=(BaseException,)))
    assert body.told == []


def test_a_predicate_that_breaks_is_the_error() -> None:
    """Its mistake is shown, not swallowed."""
    with pytest.raises(ZeroDivisionError):
        Flaky(1).run(policy(retry_if=lambda error: bool(1 / 0)))


@pytest.mark.parametrize(
    ("options", "delays"),
    [
        ({"retry_backoff": 1.0}, [1, 2, 4, 8]),
        ({"retry_backoff": 0.5}, [0.5, 1, 2, 4]),
        ({"retry_backoff": 0.5, "retry_backoff_rate": 1.0}, [0.5, 0.5, 0.5, 0.5]),
        ({"retry_backoff": 2.0, "retry_backoff_rate": 3.0}, [2, 6, 18, 54]),
        ({"retry_backoff": 1.0, "retry_backoff_max": 3.0}, [1, 2, 3, 3]),
        ({"retry_backoff": None, "default_retry_delay": 7.0}, [7, 7, 7, 7]),
        ({"retry_backoff": None}, [180, 180, 180, 180]),
    ],
)
def test_delays_grow_as_declared(options: dict[str, object], delays: list[float]) -> None:
    """Fractions count, the cap holds, a rate of 1 is a fixed interval."""
    assert [policy(**options).delay_after(tries) for tries in (1, 2, 3, 4)] == delays


@pytest.mark.parametrize("rate", [2.0, 5.0, 10.0, 1e308])
def test_a_delay_of_very_many_tries_is_the_cap(rate: float) -> None:
    """The arithmetic doesn't overflow in a retry for ever."""
    assert policy(retry_backoff_rate=rate, retry_backoff_max=600.0).delay_after(100_000) == 600.0


def test_jitter_stays_between_zero_and_the_delay() -> None:
    """It is spread over all of that range, as in Celery."""
    jittery = policy(retry_backoff=8.0, retry_jitter=True)
    delays = [jittery.delay_after(1) for _ in range(500)]
    assert 0 <= min(delays) < 2
    assert 6 < max(delays) <= 8
