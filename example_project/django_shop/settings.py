"""Settings of the project: those of its surroundings come from the environment."""

from __future__ import annotations

import os
from typing import Any

from psycopg.conninfo import conninfo_to_dict


def database(url: str) -> dict[str, Any]:
    """Return a Postgres URL as Django writes it."""
    facts = conninfo_to_dict(url)
    names = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host", "PORT": "port"}
    known = {name: str(facts.pop(libpq, "")) for name, libpq in names.items()}
    return {"ENGINE": "django.db.backends.postgresql", **known, "OPTIONS": facts}


DEBUG = os.environ.get("DEBUG", "1") == "1"
SECRET_KEY = os.environ.get("SECRET_KEY", "for a shop that sells nothing")
ALLOWED_HOSTS = os.environ.get("ALLOWED_HOSTS", "localhost,127.0.0.1").split(",")
ROOT_URLCONF = "example_project.django_shop.urls"

DATABASES = {"default": database(os.environ.get("DATABASE_URL", "postgresql://localhost/shop"))}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

CELERY_BROKER_URL = os.environ.get("BROKER_URL", "redis://localhost:6379/0")
# The other shop may use the same broker, and doesn't know these tasks.
CELERY_TASK_DEFAULT_QUEUE = "django_shop"
CELERY_DURABLE_DATABASE = "default"

# A folder gets one file a mail; without it they are printed by the worker.
EMAIL_FILE_PATH = os.environ.get("MAIL_DIR")
EMAIL_BACKEND = f"django.core.mail.backends.{'filebased' if EMAIL_FILE_PATH else 'console'}.EmailBackend"
DEFAULT_FROM_EMAIL = "shop@example.com"

USE_TZ = True
STATIC_URL = "static/"

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "celery_durable.contrib.django",
    "example_project.django_shop",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
