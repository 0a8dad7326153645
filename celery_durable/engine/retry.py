"""When a step is tried again: a policy is a value, tenacity does the counting."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..store.rows import Checkpoint
from .limits import is_foreign_limit

if TYPE_CHECKING:
    from tenacity import RetryCallState

Exceptions = tuple[type[BaseException], ...]

#: Celery's own default of ``max_retries``.
DEFAULT_RETRIES = 3


class TryAgain(BaseException):
    """What a body raises to ask for another try, by ``current.step.retry`` or Celery's ``self.retry``.

    ``error`` is why, ``delay`` the seconds until then; None: the policy's own. No ``except Exception`` of the body
    can swallow it.
    """

    def __init__(self, error: Exception | None, delay: float | None) -> None:
        super().__init__(error, delay)
        self.error = error
        self.delay = delay


class GivenUp(TryAgain):
    """What a body raises that has used up the tries it may ask for: its error is the step's, whatever the policy."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error, None)


def asked_in(error: BaseException) -> TryAgain | None:
    """Return the request for another try that this is, or that a group of the errors of asyncio tasks holds."""
    if isinstance(error, TryAgain):
        return error
    found = map(asked_in, getattr(error, "exceptions", ()))
    return next((again for again in found if again is not None), None)


def check_reason(error: Any) -> Exception:
    """Return the error for which a body asks for another try; raise TypeError for anything else."""
    if not isinstance(error, Exception):
        raise TypeError(f"The reason of a retry must be an exception, not {error!r}.")
    return error


class Ended(NamedTuple):
    """How a try has ended: with a value, or with an error."""

    value: Any = None
    error: Exception | TryAgain | None = None
    #: The outcome, if the try has recorded it itself.
    checkpoint: Checkpoint | None = None


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
    #: Retries that the body may ask for itself.
    asked_retries: int | None = DEFAULT_RETRIES

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

    def goes_on(self, ended: Ended, failed_tries: int) -> bool:
        """Tell whether another try follows one that was the nth and ended so."""
        if ended.error is None or isinstance(ended.error, GivenUp):
            return False
        if isinstance(ended.error, TryAgain):
            return True  # whoever asks has counted
        return self.allows(failed_tries) and self.applies_to(ended.error)

    def delay(self, ended: Ended, failed_tries: int) -> float:
        """Return the seconds between a try that was the nth and ended so, and the next one."""
        if isinstance(ended.error, TryAgain) and ended.error.delay is not None:
            return ended.error.delay
        return self.delay_after(failed_tries)

    def delay_after(self, failed_tries: int) -> float:
        """Return the seconds between the nth failed try and the next one."""
        if self.retry_backoff is None:
            return self.default_retry_delay
        try:
            delay = min(self.retry_backoff * self.retry_backoff_rate ** (failed_tries - 1), self.retry_backoff_max)
        except OverflowError:  # a float has room for few tries at a high rate
            delay = self.retry_backoff_max
        return random.uniform(0, delay) if self.retry_jitter else delay  # noqa: S311 - spreads load, keeps no secret


async def tried_again(
    policy: RetryPolicy,
    ended: Ended,
    body: Callable[[], Awaitable[Ended]],
    *,
    failed_tries: int,
    failed: Callable[[Ended, float], Awaitable[None]],
    wait: Callable[[float], Awaitable[None]],
) -> Ended:
    """Call ``body``, whose first try here has ``ended``, until it returns or is not to be tried again.

    Returns how its last try ended. ``failed_tries`` were used up by earlier attempts. ``failed`` is told each try that
    another one follows, and the delay; ``wait`` passes the delay, or unwinds the workflow and doesn't come back. A
    ``retry_if`` that raises ends the step with its own error.
    """
    # Not before it is needed: it takes as long to import as half of this library, and most tries succeed.
    import tenacity

    delays: list[float] = []

    def tries(state: RetryCallState) -> int:
        return failed_tries + state.attempt_number

    def goes_on(state: RetryCallState) -> bool:
        nonlocal ended
        try:
            return policy.goes_on(ended, tries(state))
        except Exception as broken:  # noqa: BLE001 - the predicate's mistake is shown as the step's error
            broken.__context__ = ended.error
            ended = Ended(error=broken)
            return False

    retrying = tenacity.Retrying(
        retry=goes_on,
        wait=lambda state: policy.delay(ended, tries(state)),
        sleep=delays.append,
    )
    for attempt in retrying:
        if delays:
            delay = delays.pop()
            await failed(ended, delay)
            await wait(delay)
            ended = await body()
        attempt.retry_state.set_result(ended)
    return ended
