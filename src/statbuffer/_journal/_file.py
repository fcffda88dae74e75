"""The journal's SQLite file: its schema, its connections, and what an error of SQLite means for the counts.

Format, version 1. Times are seconds of the machine's monotonic clock, but `at`, which is of the wall clock. Sums are text,
since they may pass 64 bits. `counts` is a JSON object, key text (see `_keys`) to count. Every row whose damage would lose or
double counts carries `crc`, the CRC-32 of its other values; `counts_crc` is that of `counts`. SQLite has no checksums of its
own in the main file. Large texts are in rows that are never changed, apart from what is.

    meta      one row: the journal's id (the writer of its batches), the latest seq, what it delivers to, the file's inode
    writers   each buffer: the latest seq that it moved here (a watermark), the first one, and its books
    moves     what a buffer moved here, one row a batch. `seal`: 0 while it waits, else the seal in which it goes to the store.
              `origin`: the id of the oldest move that its counts were in
    contents  the counts of each move
    sealed    the batches of a seal, merged by key
    offer     at most one row: the first of `sealed` and the batch id under which it is, or was, offered to the store
    dead      dead letters
    pulse     one row that nothing depends on: wishes for a flush, and how the relay is
    salvaged  damaged files that were read into this one
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import threading
import zlib
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from statbuffer._batch import new_writer_id
from statbuffer._errors import NotApplied, SinkError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from statbuffer._journal._directory import Directory

VERSION: Final = 1
BUSY_SECONDS: Final = 10.0
"""How long one process waits for another's transaction."""

SCHEMA: Final = {
    "meta": "CREATE TABLE meta(id INTEGER PRIMARY KEY, journal TEXT, seq INTEGER, target TEXT, inode INTEGER, crc INTEGER)",
    "writers": (
        "CREATE TABLE writers(writer TEXT PRIMARY KEY, first INTEGER, seq INTEGER, moved TEXT, stored TEXT, dropped TEXT, "
        "pid INTEGER, host TEXT, at REAL, crc INTEGER) WITHOUT ROWID"
    ),
    "moves": (
        "CREATE TABLE moves(id INTEGER PRIMARY KEY AUTOINCREMENT, writer TEXT, seq INTEGER, origin INTEGER, moved REAL, "
        "not_before REAL, at REAL, total TEXT, seal INTEGER, counts_crc INTEGER, crc INTEGER)"
    ),
    "contents": "CREATE TABLE contents(move INTEGER PRIMARY KEY, counts TEXT)",
    "sealed": (
        "CREATE TABLE sealed(id INTEGER PRIMARY KEY AUTOINCREMENT, seal INTEGER, born REAL, counts_crc INTEGER, "
        "crc INTEGER, counts TEXT)"
    ),
    "offer": "CREATE TABLE offer(id INTEGER PRIMARY KEY, sealed INTEGER, writer TEXT, seq INTEGER, crc INTEGER)",
    "dead": (
        "CREATE TABLE dead(id INTEGER PRIMARY KEY, key TEXT, writer TEXT, count INTEGER, reason TEXT, batch TEXT, at REAL, "
        "crc INTEGER)"
    ),
    "pulse": (
        "CREATE TABLE pulse(id INTEGER PRIMARY KEY, flush_to INTEGER, settled INTEGER, failing INTEGER, last_error TEXT, "
        "pid INTEGER, host TEXT, at REAL)"
    ),
    "salvaged": "CREATE TABLE salvaged(name TEXT PRIMARY KEY) WITHOUT ROWID",
}
MIGRATIONS: Final[dict[int, tuple[str, ...]]] = {}
"""The statements that lead from each version to the next one."""

CHECKED: Final = {
    "meta": "row_crc(id, journal, seq, target, inode)",
    "writers": "row_crc(writer, first, seq, moved, stored, dropped, pid, host, at)",
    "moves": "row_crc(id, writer, seq, origin, moved, not_before, at, total, seal, counts_crc)",
    "sealed": "row_crc(id, seal, born, counts_crc)",
    "offer": "row_crc(id, sealed, writer, seq)",
    "dead": "row_crc(id, key, writer, count, reason, batch, at)",
}
"""What each row's `crc` must be."""
MOVE_CRC: Final = CHECKED["moves"].replace("seal,", "{seal},")
"""The same of a move, whose seal is about to become another."""


class Damaged(NotApplied):
    """The file can't be trusted. Nothing was written; whoever delivers sets it aside and reads from it what can be read."""


class Unanswered(OSError):
    """COMMIT failed, or the file was set aside meanwhile: what was written is there or not."""


def row_crc(*values: object) -> int:
    """Return the CRC-32 of a row's values."""
    return zlib.crc32("\x1f".join(map(str, values)).encode(errors="surrogatepass"))


class JournalFile:
    """One connection to the live file, for one user at a time: `transaction()` and `snapshot()` hold its lock.

    Fork: SQLite's locks belong to a process, and its memory of them goes wrong in a child. So every connection is closed
    before a fork (`before_fork`, from `os.register_at_fork`), which waits for the transaction that is under way.
    """

    def __init__(self, directory: Directory, *, target: str, durable: bool) -> None:
        self._directory = directory
        self._target = target
        self._durable = durable
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._inode = 0
        self._inherited = False

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Write, all or nothing. Raises `NotApplied` or `Damaged` if nothing was written, `Unanswered` if that is unknown."""
        with self._lock:
            connection = self._connected()
            with self._errors():
                connection.execute("BEGIN IMMEDIATE")
                yield connection
            try:
                connection.execute("COMMIT")
            except BaseException as error:
                self._drop()
                raise Unanswered(f"journal {self._directory}: COMMIT failed: {error}") from error
            if self._was_set_aside():
                self._drop()
                raise Unanswered(f"journal {self._directory}: the file was set aside while it was written")

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """Read one state of the file. Raises `NotApplied` or `Damaged`."""
        with self._lock:
            connection = self._connected()
            with self._errors():
                connection.execute("BEGIN")
                yield connection
                connection.execute("COMMIT")

    def close(self) -> None:
        """Close the connection; the next use opens another."""
        with self._lock:
            self._drop()

    def __del__(self) -> None:
        self._drop()

    def before_fork(self) -> None:
        """Close the connection and keep it closed until `after_fork_in_parent`."""
        self._lock.acquire()
        self._drop()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """Go on with a new lock. A connection that is still there came through a fork that Python did not see."""
        self._lock = threading.RLock()
        if self._connection is not None:
            _leaked.append(self._connection)  # to close it would undo the parent's locks
            self._connection, self._inherited = None, True

    def _connected(self) -> sqlite3.Connection:
        if self._inherited:
            raise NotApplied(
                f"journal {self._directory}: it was open when this process was forked by something other than Python; "
                "start() the buffer after the fork (uWSGI: lazy-apps = true); counts wait in memory"
            )
        if self._connection is not None and self._was_set_aside():
            self._drop()
        if self._connection is None:
            with self._errors():
                self._connection = self._open()
        return self._connection

    def _open(self) -> sqlite3.Connection:
        if not self._directory.file.exists():
            create(self._directory, self._target)
        connection = connect(self._directory.file)
        try:
            self._inode = self._directory.file.stat().st_ino
            self._require_format(connection)
            connection.execute(f"PRAGMA synchronous = {'FULL' if self._durable else 'NORMAL'}")
            connection.execute("PRAGMA fullfsync = 1")
            connection.execute(f"PRAGMA journal_size_limit = {16 * 2**20}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _require_format(self, connection: sqlite3.Connection) -> None:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise SinkError(
                f"journal {self._directory} has format {version}, this statbuffer knows {VERSION}: it was written by a later "
                "version, use that one; nothing was changed"
            )
        if version < VERSION:
            _migrate(connection)
        found = dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table' AND sql NOT NULL"))
        found.pop("sqlite_sequence", None)
        mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
        if found != SCHEMA or mode != "wal":
            raise Damaged("the file has another schema than it was made with")

    def _is_oddly_read_only(self, error: BaseException) -> bool:
        """Whether SQLite takes a file for read-only that is not: a byte of its header, which says who may write, is wrong."""
        says_so = isinstance(error, sqlite3.OperationalError) and str(error).startswith("attempt to write a readonly")
        return says_so and not self._was_set_aside() and os.access(self._directory.file, os.W_OK)

    def _was_set_aside(self) -> bool:
        try:
            return os.stat(self._directory.file).st_ino != self._inode  # noqa: PTH116  # at each use; Path.stat() is slower
        except OSError:
            return True

    def _drop(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Say what an error means. Nothing was committed: the connection, and with it the transaction, is thrown away."""
        try:
            yield
        except BaseException as error:
            self._drop()
            if is_damage(error) or self._is_oddly_read_only(error):
                with contextlib.suppress(OSError):
                    self._directory.suspect.touch()
                raise Damaged(f"journal {self._directory} is damaged: {error}") from error
            if isinstance(error, (sqlite3.Error, OSError)):
                raise NotApplied(f"journal {self._directory}: {error}") from error
            raise


_leaked: list[sqlite3.Connection] = []


def is_damage(error: BaseException) -> bool:
    """Whether an error says that the file is not what was written."""
    if isinstance(error, (Damaged, UnicodeDecodeError)):
        return True
    if type(error) is sqlite3.DatabaseError:  # SQLITE_CORRUPT and SQLITE_NOTADB have no class of their own
        return True
    signs = (
        "no such table",
        "no such column",
        "malformed",
        "could not decode",
        "unsupported file format",
        "user-defined function raised",  # row_crc was given text that is none
    )
    return isinstance(error, sqlite3.OperationalError) and str(error).lower().startswith(signs)


def connect(path: os.PathLike[str]) -> sqlite3.Connection:
    """Open a SQLite file as all code of the journal does: transactions by hand, any thread, `row_crc()` in SQL."""
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.create_function("row_crc", -1, row_crc, deterministic=True)
    return connection


def create(directory: Directory, target: str) -> None:
    """Make an empty journal, whole, and put it in place by a rename; if another process was faster, its one stays."""
    making = directory.path / f"new-{uuid4().hex}"
    making.mkdir(parents=True)  # somebody may have deleted all of it
    try:
        _make(making / directory.file.name, target)
        making.rename(directory.live)
    except OSError:
        if directory.live.exists() and not directory.file.exists():
            raise Damaged(
                f"journal {directory}: {directory.file.name} is gone, what SQLite keeps beside it is not"
            ) from None
        if not directory.file.exists():
            raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
    directory.sync()


def _make(path: Path, target: str) -> None:
    connection = connect(path)
    try:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN IMMEDIATE")
        for statement in SCHEMA.values():
            connection.execute(statement)
        values = (1, new_writer_id(), 0, target, path.stat().st_ino)
        connection.execute("INSERT INTO meta VALUES (?, ?, ?, ?, ?, ?)", (*values, row_crc(*values)))
        connection.execute("INSERT INTO pulse VALUES (1, 0, 0, 0, NULL, NULL, NULL, NULL)")
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
    finally:
        connection.close()


def _migrate(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    for version in range(connection.execute("PRAGMA user_version").fetchone()[0], VERSION):
        if version not in MIGRATIONS:
            raise Damaged(f"it says that it has format {version}, which never was")
        for statement in MIGRATIONS[version]:
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")


def values_with_crc(*values: Any) -> tuple[Any, ...]:
    """Return a row's values with their CRC at the end."""
    return (*values, row_crc(*values))
