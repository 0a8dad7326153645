"""Runs one attempt of a workflow: replay, steps, outcome. Knows neither Celery nor psycopg."""
