"""What the engine does, as log lines."""

from __future__ import annotations

import logging

from .engine.observer import Observer

logger = logging.getLogger("celery_durable")


class LogObserver(Observer):
    """Says at INFO what an operator wants to know, and at DEBUG the rest."""

    def claimed(self, workflow_id: str, attempt: int) -> None:
        """Tell of an attempt; later ones are worth more than the first."""
        level = logging.DEBUG if attempt == 1 else logging.INFO
        logger.log(level, "The workflow %s runs, attempt %d.", workflow_id, attempt)

    def step_recorded(self, workflow_id: str, key: str) -> None:
        """Tell of a completed step."""
        logger.debug("The workflow %s has completed the step %s.", workflow_id, key)

    def suspended(self, workflow_id: str, reason: str) -> None:
        """Tell of a wait."""
        logger.info("The workflow %s waits without a worker: %s.", workflow_id, reason)

    def handed_over(self, workflow_id: str) -> None:
        """Tell of a hand-over."""
        logger.info("The workflow %s is handed over: this worker shuts down.", workflow_id)

    def fenced(self, workflow_id: str) -> None:
        """Tell that an attempt was overtaken."""
        logger.warning("Another worker has taken the workflow %s over; this attempt is void.", workflow_id)

    def recovered(self, duty: str, workflow_ids: list[str]) -> None:
        """Tell what a sweep has found."""
        logger.info("Recovery: %s %d workflow(s).", duty, len(workflow_ids))
