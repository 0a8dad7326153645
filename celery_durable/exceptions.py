"""Everything that celery_durable raises.

::

    DurableError(Exception)
      ConfigurationError                a setting or a task is declared wrongly
        NotInstalled                    no install() on this app
        SchemaVersionError              database and code don't fit each other
      DatabaseUnavailable               Postgres can't be reached (a kombu OperationalError too)
      WorkflowNotFound                  no workflow has this id
      WorkflowConflict                  the id is taken by another task
      WorkflowFinished                  too late: the workflow has ended
      WorkflowCancelledError            the awaited workflow was cancelled
      WorkflowDead                      the awaited workflow was given up
      NotInWorkflow                     a durable call outside a workflow
      NotAllowedInStep                  a durable call inside a step
      NondeterminismError               a replay did something else than the first run
      SerializationError                a value that can't be stored or read back (a kombu EncodeError too)
        CodecError                      the setting ``payload_codec`` is missing, or can't encode or decode
      PayloadTooLarge                   a value over the ``max_payload`` setting
      StepError                         a step's error whose own class can't be rebuilt
      StepLost                          a step killed its worker each time it ran
      StepTimeout                       a step's soft time limit (a SoftTimeLimitExceeded and TimeoutError)

    ControlFlow(BaseException)          unwinds a workflow body; never catch it
      Suspended                         waiting, the worker slot is given back
      Cancelled                         cancelled or past the deadline
      HandedOver                        the worker shuts down, another one goes on
      OwnershipLost                     another worker has this workflow now
"""

from __future__ import annotations

from typing import Any

from celery.exceptions import MaxRetriesExceededError as MaxRetriesExceededError
from celery.exceptions import SoftTimeLimitExceeded as SoftTimeLimitExceeded
from kombu.exceptions import EncodeError, OperationalError


class DurableError(Exception):
    """Base of all errors of celery_durable; the class docstring is the default message."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*(args or (self.default_message(),)))

    @classmethod
    def default_message(cls) -> str:
        """Return the first sentence of the class docstring."""
        return (cls.__doc__ or cls.__name__).strip().split("\n")[0]


class ConfigurationError(DurableError):
    """A setting or a task is declared in a way that can't work."""


class NotInstalled(ConfigurationError):
    """No Celery app with celery_durable was found: call durable.install(app) first."""


class SchemaVersionError(ConfigurationError):
    """The database schema and this version of celery_durable don't fit each other."""


class DatabaseUnavailable(DurableError, OperationalError):
    """Postgres can't be reached.

    A start that raises this has sent no message. If the connection broke while the row was being committed, the
    workflow may exist all the same, and recovery starts it: trying again with the same ``task_id`` is safe.
    """


class WorkflowNotFound(DurableError, LookupError):
    """No workflow has this id."""


class WorkflowConflict(DurableError):
    """This workflow id is already taken by another task."""


class WorkflowFinished(DurableError):
    """The workflow has already ended."""


class WorkflowCancelledError(DurableError):
    """The workflow was cancelled."""


class WorkflowDead(DurableError):
    """The workflow was given up: it crashed too often, or a replay did something else than the first run."""


class NotInWorkflow(DurableError):
    """This call is only possible in a running workflow."""


class NotAllowedInStep(DurableError):
    """This call isn't possible inside a step: make it in the workflow, between steps."""


class NondeterminismError(DurableError):
    """A replay called a step otherwise than the first run did."""


class SerializationError(DurableError, EncodeError, ValueError):
    """A value can't be serialized for the database, or can't be read back."""


class CodecError(SerializationError):
    """The setting durable_payload_codec is missing here, or can't encode or decode a value."""


class PayloadTooLarge(DurableError, ValueError):
    """A serialized value is larger than the setting durable_max_payload allows."""


class StepError(DurableError):
    """A step failed with an error whose own class can't be rebuilt here.

    ``type_name`` is the original class, ``traceback_text`` the original traceback (maybe empty).
    """

    def __init__(self, message: str = "", type_name: str = "", traceback_text: str = "") -> None:
        super().__init__(message, type_name, traceback_text)
        self.type_name = type_name
        self.traceback_text = traceback_text

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{self.type_name}: {message}" if self.type_name else message


class StepLost(DurableError):
    """A step's worker process died each time that the step ran."""


class StepTimeout(SoftTimeLimitExceeded, TimeoutError):
    """A try of a step ran longer than its soft_time_limit."""

    def __str__(self) -> str:
        return " ".join(str(arg) for arg in self.args)


class ControlFlow(BaseException):
    """Unwinds a workflow body; an ``except Exception`` doesn't see it."""


class Suspended(ControlFlow):
    """The workflow waits and gives its worker slot back; it is resumed by replay.

    ``reason`` says for what, ``seconds`` until when at the latest (None: until something arrives), ``wakers`` what may
    arrive.
    """

    def __init__(self, reason: str, seconds: float | None = None, wakers: Any = None) -> None:
        super().__init__(reason, seconds)
        self.reason = reason
        self.seconds = seconds
        self.wakers = wakers


class Cancelled(ControlFlow):
    """The workflow was cancelled, or its deadline has passed."""


class HandedOver(ControlFlow):
    """The worker shuts down: the workflow goes on elsewhere after the last completed step."""


class OwnershipLost(ControlFlow):
    """Another worker has taken this workflow over; nothing more of this attempt is recorded."""


#: Billiard ends a pool process by SystemExit(signal number - 256); a user's own exit has no such code.
_LOWEST_USER_EXIT = -128


def ends_process(error: BaseException) -> bool:
    """Tell whether this is meant for the process or its greenlet, and isn't how the app's code has ended."""
    if isinstance(error, SystemExit):
        return isinstance(error.code, int) and error.code < _LOWEST_USER_EXIT
    return isinstance(error, KeyboardInterrupt) or type(error).__name__ == "GreenletExit"
