"""What ``install()`` has put together for one app, and how to find it."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any
from uuid import UUID

from celery import Celery, _state

from .config import Config, check_names, setting_names
from .connections import DjangoConnections
from .contrib.sentry import StepErrors
from .engine.context import Engine, current_attempt
from .engine.observer import Observers
from .exceptions import NotInstalled
from .late import late
from .monitoring import LogObserver
from .running import Running
from .seal import Seal
from .step_events import StepEvents
from .text import Hidden

if TYPE_CHECKING:
    from . import recovery, serialization, store
    from .recovery import Recovery, Send
    from .serialization import Codec
    from .store import Host, Listener, Store
else:
    recovery, serialization, store = late("recovery"), late("serialization"), late("store")

_ATTRIBUTE = "_celery_durable"
#: The name of the workflow that is nothing but one step, on the queue of that.
STEP_TASK = "celery_durable.step"
_KEY = re.compile(r"durable_(\w+)", re.IGNORECASE)


class Installation:
    """The parts of celery_durable for one app; each is built when it is first needed."""

    def __init__(self, app: Celery, settings: dict[str, Any]) -> None:
        self.app = app
        self.settings = settings
        self.running = Running()
        self.observers = Observers()
        self.observers.add(self.running)
        self.observers.add(LogObserver())
        self.observers.add(StepEvents(app, lambda: self.codec.seal.is_set))
        self.observers.add(DjangoConnections())
        self.observers.add(StepErrors())
        #: The node of this worker's main process, while there is one.
        self.node: Any = None

    @cached_property
    def config(self) -> Config:
        """The settings, validated; raises ConfigurationError."""
        return self.read_config()

    def read_config(self) -> Config:
        """Return the settings as they are by now, for whoever must not be the one that fixes them."""
        check_names(_durable_names(self.app))
        conf = self.app.conf
        given = {name: conf.get(f"durable_{name}") for name in setting_names()}
        installed = {name: value for name, value in self.settings.items() if value is not None}
        return Config.from_settings({**given, **installed})

    def url(self) -> str:
        """Return where the database is now, the password with it; raise ConfigurationError.

        Of a Django alias that may change: its tests make a database of their own.
        """
        config = self.config
        if config.database is None:
            return Hidden(config.database_url)
        from .contrib.django.databases import url_of

        return Hidden(url_of(config.database))

    def surrounding(self) -> Host | None:
        """Return the transaction on our database that the calling code has open by means of its framework."""
        alias = self.config.database
        if alias is None:
            return None
        from .contrib.django.transactions import open_on

        return open_on(alias)

    @cached_property
    def codec(self) -> Codec:
        """How values are stored."""
        config, conf = self.config, self.app.conf
        serializer, seal = config.serializer or conf.task_serializer, Seal.of(config.payload_codec)
        return serialization.Codec.of(serializer, conf.accept_content, config.max_payload, conf.task_compression, seal)

    @cached_property
    def store(self) -> Store:
        """Postgres, for tasks and callers; raises ConfigurationError."""
        shared = self._store(store.Store.shared)
        if self.config.database is not None:
            from .contrib.django.databases import release_before_drop

            release_before_drop(shared)
        return shared

    @cached_property
    def engine(self) -> Engine:
        """What all attempts share."""
        config = self.config
        return Engine(
            store=self.store,
            codec=self.codec,
            observers=self.observers,
            lease=config.lease,
            suspend_after=config.suspend_after,
            republish_after=config.republish_after,
            retention=max((age for age in config.kept.values() if age is not None), default=0.0),
            nondeterminism=config.nondeterminism,
        )

    def store_of_one_thread(self) -> Store:
        """Return a store with a connection of its own."""
        return self._store(store.Store.of_one_thread)

    def listener(self) -> Listener:
        """Return what hears of commits in outboxes, with a connection of its own."""
        config = self.config
        return store.Listener.of(self.url, config.schema, lease=config.lease)

    def recovery(
        self,
        send: Send,
        *,
        sweeper: str = "command",
        node: UUID | None = None,
        store: Store | None = None,
        patience: float,
    ) -> Recovery:
        """Return the duties of the recovery, which send with ``send``."""
        config = self.config
        return recovery.Recovery(
            engine=self.engine,
            store=store or self.store,
            send=send,
            kept=config.kept,
            patience=patience,
            sweeper=sweeper,
            node=node,
        )

    def _store(self, make: Callable[..., Store]) -> Store:
        config = self.config
        return make(
            self.url,
            config.schema,
            auto_migrate=config.auto_migrate,
            lease=config.lease,
            pgbouncer=config.pgbouncer,
        )


_apps: weakref.WeakSet[Celery] = weakref.WeakSet()
_lock = threading.Lock()


def register(app: Celery, installation: Installation) -> None:
    """Remember what was installed on an app."""
    with _lock:
        setattr(app, _ATTRIBUTE, installation)
        _apps.add(app)


def registered(app: Celery) -> Installation | None:
    """Return what was installed on this very app."""
    found: Installation | None = getattr(app, _ATTRIBUTE, None)
    return found


def installed_on(app: Celery) -> Installation:
    """Return what was installed on an app; raise NotInstalled."""
    found = registered(app)
    if found is None:
        raise NotInstalled(
            f"celery_durable isn't installed on the app {_label(app)}: call durable.install(app, database_url=…) "
            "where the app is made."
        )
    return found


def find(app: Celery | None = None) -> Installation:
    """Return the installation that a call means.

    That of ``app``; else of the running task's app, of Celery's current app, or of the only installed one that isn't
    closed.
    Raises NotInstalled, which names the candidates.
    """
    if app is not None:
        return installed_on(app)
    attempt = current_attempt()
    if attempt is not None:
        # Asked of the dictionary, so that no other app's engine is built for it.
        return next(found for found in installations() if vars(found).get("engine") is attempt.engine)
    task = _state.get_current_task()
    for candidate in (task.app if task is not None else None, _state._get_current_app()):
        if candidate is not None and (found := registered(candidate)) is not None:
            return found
    candidates = [candidate for candidate in _apps if candidate in _state._get_active_apps()]
    if len(candidates) == 1:
        return installed_on(candidates[0])
    if not candidates:
        raise NotInstalled()
    names = ", ".join(sorted(_label(candidate) for candidate in candidates))
    raise NotInstalled(f"celery_durable is installed on several apps ({names}): say which one with app=….")


def installations() -> Iterator[Installation]:
    """Return what is installed in this process."""
    return (found for app in list(_apps) if (found := registered(app)) is not None)


def _label(app: Celery) -> str:
    return str(app.main or hex(id(app)))


def _durable_names(app: Celery) -> list[str]:
    """Return the names of all durable_* settings that the app was given, known or not."""
    namespace = getattr(app, "namespace", None)
    names = set()
    for key in map(str, app.conf):
        # Without a namespace Celery finds only the lower-case name: in capitals it would be ignored in silence.
        match = _KEY.fullmatch(key.lower().removeprefix(f"{namespace.lower()}_") if namespace else key)
        if match:
            names.add(match[1])
    return sorted(names)
