"""For Django projects: put ``celery_durable.contrib.django`` into INSTALLED_APPS.

``CELERY_DURABLE_DATABASE = "default"`` says by its alias where the workflows live. ``manage.py migrate`` makes the
schema, what a request starts in ``transaction.atomic()`` starts by its commit, steps may be ``atomic="default"``, and
the admin shows workflows and steps. Django 4.2 to 6.0, with psycopg 3 or psycopg2.
"""
