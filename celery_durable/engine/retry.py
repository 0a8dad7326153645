"""When a step is tried again: a policy is a value, tenacity does the counting."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import tenacity
from tenacity import RetryCallState, retry_if_exception, stop_never

from .limits import is_foreign_limit

T = TypeVar("T")
Exceptions = tuple[type[BaseException], ...]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Celery's retry options of one step; delays are in seconds."""

    max_retries: int | None = 0
    autoretry_for: Exceptions = ()
    dont_autoretry_for: Exceptions = ()
    retry_if: Callable[[BaseException], bool] | None = None
    #: The first delay; None: ``default_retry_delay`` each time.
    retry_backoff: float | None = None
    retry_backoff_rate: float = 2.0
    retry_backoff_max: float = 600.0
    retry_jitter: bool = True
    default_retry_delay: float = 180.0
    #: Celery's own arithmetic: whole seconds, at least one.
    whole_seconds: bool = False

    def applies_to(self, error: BaseException) -> bool:
        """Tell whether this error is worth another try. Control flow never is."""
        if not isinstance(error, Exception) or is_foreign_limit(error):
            return False
        if isinstance(error, self.dont_autoretry_for):
            return False
        if self.retry_if is not None and self.retry_if(error):
            return True
        return isinstance(error, self.autoretry_for)

    def allows(self, failed_tries: int) -> bool:
        """Tell whether a body that failed so often may run once more."""
        return self.max_retries is None or failed_tries <= self.max_retries

    def delay_after(self, failed_tries: int) -> float:
        """Return the seconds between the nth failed try and the next one."""
        if self.retry_backoff is None:
            return self.default_retry_delay
        if self.whole_seconds:
            return self._celery_delay(failed_tries)
        # The exponent is bounded because a float overflows long before the cap could be passed.
        delay = self.retry_backoff * self.retry_backoff_rate ** min(failed_tries - 1, 500)
        delay = min(delay, self.retry_backoff_max)
        return random.uniform(0, delay) if self.retry_jitter else delay  # noqa: S311 - spreads load, keeps no secret

    def _celery_delay(self, failed_tries: int) -> float:
        # As celery.utils.time.get_exponential_backoff_interval has it.
        base = int(max(1.0, self.retry_backoff or 0))
        delay = min(int(self.retry_backoff_max), base * 2 ** min(failed_tries - 1, 500))
        return float(random.randrange(delay + 1) if self.retry_jitter else delay)  # noqa: S311


def call_with_retries(
    policy: RetryPolicy,
    body: Callable[[], T],
    *,
    failed_tries: int,
    failed: Callable[[Exception, float], None],
    wait: Callable[[float], None],
) -> T:
    """Call ``body`` until it returns, or raise its last exception.

    ``failed_tries`` were used up by earlier attempts. ``failed`` is told each error that another try follows,
    and its delay; ``wait`` passes the delay, or unwinds the workflow and doesn't come back.
    """

    def tries(state: RetryCallState) -> int:
        return failed_tries + state.attempt_number

    def note(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        assert isinstance(error, Exception), "only an Exception is tried again"
        failed(error, float(state.upcoming_sleep))

    def exhausted(state: RetryCallState) -> bool:
        return not policy.allows(tries(state))

    retrying = tenacity.Retrying(
        retry=retry_if_exception(policy.applies_to),
        stop=stop_never if policy.max_retries is None else exhausted,
        wait=lambda state: policy.delay_after(tries(state)),
        before_sleep=note,
        sleep=wait,
        reraise=True,
    )
    result: Any = retrying(body)
    return result
