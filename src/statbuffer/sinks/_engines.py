"""Engines for the SQL sink: made of a URL in a way that survives a bad network, or the user's own as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy import exc

from statbuffer._errors import MissingDriver, SinkError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL, Engine

_DRIVERS: Final = {"postgresql": "psycopg", "mysql": "pymysql", "mariadb": "pymysql"}
_EXTRAS: Final = {"postgresql": "postgres", "mysql": "mysql", "mariadb": "mysql"}
_SILENCE: Final = 30
"""Seconds without an answer after which a connection, or a lock, is given up."""


def engine_of(url_or_engine: str | URL | Engine) -> tuple[Engine, bool]:
    """Return the engine, and whether it is ours to close."""
    if isinstance(url_or_engine, sa.Engine):
        return url_or_engine, False
    try:
        url = sa.make_url(url_or_engine)
    except exc.ArgumentError as error:
        raise SinkError(
            f"not a database URL, expected one like 'sqlite:///views.db' or 'postgresql://user@host/db': {error}"
        ) from None
    family = url.get_backend_name()
    if url.drivername == family and family in _DRIVERS:
        url = url.set(drivername=f"{family}+{_DRIVERS[family]}")
    try:
        engine = sa.create_engine(url, **_engine_options(url))
    except exc.NoSuchModuleError:
        raise unknown_database(url.drivername) from None
    except ModuleNotFoundError as error:
        raise MissingDriver(error.name or url.drivername, _EXTRAS.get(family, "all")) from error
    except (exc.ArgumentError, TypeError, ValueError) as error:
        raise SinkError(f"{url.render_as_string(hide_password=True)} can't be used: {error}") from error
    if family == "postgresql":
        sa.event.listen(engine, "connect", _set_timeouts)
    return engine, True


def _engine_options(url: URL) -> dict[str, Any]:
    """How our own engines meet a network that fell silent; a user's engine, and what the URL says, stay as they are.

    A connection that dies without a word leaves a transaction in the server that holds the writer's row: the server ends
    it after `_SILENCE` seconds, and nobody waits longer for an answer or a lock.
    """
    family = url.get_backend_name()
    if family == "postgresql":
        arguments: dict[str, Any] = {
            "connect_timeout": 10,
            "keepalives_idle": _SILENCE,
            "keepalives_interval": 10,
            "keepalives_count": 3,
        }
        options: dict[str, Any] = {}
    elif family in {"mysql", "mariadb"}:
        arguments = {"connect_timeout": 10, "read_timeout": 2 * _SILENCE, "write_timeout": 2 * _SILENCE}
        arguments["init_command"] = f"SET SESSION wait_timeout = {2 * _SILENCE}, innodb_lock_wait_timeout = {_SILENCE}"
        options = {"pool_recycle": _SILENCE}  # younger than the server's wait_timeout
        options["isolation_level"] = "READ COMMITTED"  # gap locks make upserts of new keys deadlock
    elif url.database in {None, "", ":memory:"}:  # one database for all threads, not one for each
        return {"poolclass": sa.StaticPool, "connect_args": {"check_same_thread": False}}
    else:
        return {}
    return options | {"connect_args": {name: value for name, value in arguments.items() if name not in url.query}}


def _set_timeouts(connection: Any, _record: object) -> None:
    """Tell a new PostgreSQL session; as a startup parameter, a pooler in between might refuse it."""
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = '{_SILENCE}s'")
        cursor.execute(f"SET idle_in_transaction_session_timeout = '{_SILENCE}s'")
    connection.commit()


def is_file(engine: Engine) -> bool:
    """Whether the database is a file that this process opens itself: SQLite, and not in memory."""
    return engine.dialect.name == "sqlite" and not isinstance(engine.pool, (sa.StaticPool, sa.SingletonThreadPool))


def unknown_database(name: str) -> SinkError:
    return SinkError(f"database {name!r} is not supported: expected sqlite, postgresql, mysql or mariadb")
