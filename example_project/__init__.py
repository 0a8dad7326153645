"""An order shop on Celery. tasks.py is its job, durable; plain.py is the same job without us."""
