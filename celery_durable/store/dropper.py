"""Drops a database of the test kit when its owner is gone.

`testkit.py` starts this file as a script of its own, `python -I -S dropper.py`, in a session of its own. One line of
JSON comes on stdin, which says what to drop and where psycopg is found; the next line, or the end of stdin, means that
the owner is done or has died, by whatever signal. A URL may have a password, so it's no argument: those can be seen.
"""

from __future__ import annotations

import json
import signal
import sys


def main() -> None:
    """Wait for the owner's end, then drop; what goes wrong is said on stderr, and by the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    what = json.loads(sys.stdin.readline())
    sys.stdin.readline()
    sys.path[:] = what["path"]
    drop(what["server"], what["name"])


def drop(server: str, name: str) -> None:
    """Drop a database, even under open connections; it may not be there."""
    import psycopg
    from psycopg import sql

    try:
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
    except psycopg.Error as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
