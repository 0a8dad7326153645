"""The order shop as a Django project: orders by the ORM, checkouts durable.

Importing the app here lets `@shared_task` find it in every process of the project: web, worker and shell.
"""

from .celery import app as celery_app

__all__ = ["celery_app"]
