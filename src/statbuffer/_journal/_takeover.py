"""Taking over a journal: what another process, another day or another machine has left in its directory.

All under the relay's lock, before anything is sealed or delivered.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from typing import TYPE_CHECKING, Final

from statbuffer._batch import new_writer_id
from statbuffer._journal._check import problems
from statbuffer._journal._file import MOVE_CRC, Damaged, connect
from statbuffer._journal._rows import add_up, offer, write_meta
from statbuffer._journal._salvage import salvage

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable
    from pathlib import Path

    from statbuffer._batch import Batch
    from statbuffer._journal import Journal

log = logging.getLogger("statbuffer")

_KEEP_WRITERS: Final = 86_400.0
"""Seconds after which the books of a buffer that has nothing here any more are forgotten."""


class Takeover:
    """What the process that delivers does first. `applied` asks the store for a batch, where it can tell."""

    def __init__(self, journal: Journal, applied: Callable[[Batch], bool] | None) -> None:
        self._journal = journal
        self._file = journal.relay_file
        self._applied = applied
        self._copied = False
        self._inherited = 0  # the latest move that was there when this process took over
        self._asides: list[Path] = []

    def adopt(self) -> None:
        """Look through what another process has left. Raises `Damaged`, `NotApplied`."""
        directory = self._journal.directory
        self.check()
        self._find_asides()
        for left in directory.path.glob("new-*"):
            if time.time() - left.stat().st_mtime > 60:  # noqa: PLR2004  # somebody died while making it
                shutil.rmtree(left, ignore_errors=True)
        with self._file.transaction() as connection:
            journal, inode = connection.execute("SELECT journal, inode FROM meta").fetchone()
            if inode != directory.file.stat().st_ino:
                log.warning(
                    "journal %s was copied or restored (it was %s): it gets an id of its own", directory, journal
                )
                self._copied = True
            self._forget_writers(connection)
            (self._inherited,) = connection.execute("SELECT coalesce(max(id), 0) FROM moves").fetchone()

    def check(self) -> None:
        """Raise `Damaged` if the file is not what was written."""
        with self._file.snapshot() as connection:
            if found := problems(connection):
                raise Damaged("; ".join(found[:5]))
        self._journal.directory.suspect.unlink(missing_ok=True)

    def set_aside(self) -> None:
        """Replace a damaged file by a new one that has what could be read of it."""
        directory = self._journal.directory
        directory.suspect.unlink(missing_ok=True)
        if directory.live.exists():
            aside = directory.set_aside()
            log.error(
                "journal %s is damaged; it is set aside as %s, and what can be read of it is delivered",
                directory,
                aside,
            )
        self._find_asides()

    def _find_asides(self) -> None:
        self._asides = self._journal.directory.to_salvage()
        self.salvage()

    def salvage(self) -> None:
        """Read what was set aside. Of two that have a batch on offer the second has to wait until that is settled."""
        while self._asides and not self._is_offering():
            salvage(self._asides[0], self._file, self._applied)
            del self._asides[0]

    def _is_offering(self) -> bool:
        with self._file.snapshot() as connection:
            return connection.execute("SELECT 1 FROM offer").fetchone() is not None

    def must_renew(self, batch: Batch) -> bool:
        """Look whether a batch that was sealed here has an id that the store has seen; if so, mend it. Raises as the sink.

        Such a file is an old state of one that went on: restored, or its write-ahead log was cut short. A seal takes all that
        waits, so what waited in that state was in the batch that the store has: it is left out. What has been moved since
        goes on under a new id.
        """
        if self._applied is not None and self._applied(batch):
            self._leave_out(batch)
            return True
        if not self._copied:
            return False
        with self._file.transaction() as connection:
            (sealed,) = connection.execute("SELECT sealed FROM offer").fetchone()
            connection.execute("DELETE FROM offer")
            self._renew(connection)
            offer(connection, sealed)
        return True

    def _leave_out(self, batch: Batch) -> None:
        copy = self._keep_copy()
        with self._file.transaction() as connection:
            (totals,) = connection.execute(
                "SELECT group_concat(total, ' ') FROM moves WHERE id <= ?", (self._inherited,)
            ).fetchone()
            connection.execute("DELETE FROM moves WHERE id <= ?", (self._inherited,))
            connection.execute("DELETE FROM contents WHERE move <= ?", (self._inherited,))
            connection.execute("DELETE FROM sealed")
            connection.execute("DELETE FROM offer")
            connection.execute(f"UPDATE moves SET seal = 0, crc = {MOVE_CRC.format(seal='0')} WHERE seal <> 0")
            self._renew(connection)
        log.error(
            "%r is an old copy: the store has batch %s already, which was never offered. %d counts that it held are left out, "
            "since the store most likely has them; a copy is kept as %s",
            self._journal,
            batch.id,
            add_up(totals),
            copy,
        )

    def _keep_copy(self) -> Path:
        """Copy the file by SQLite's own means: who opens and closes it beside SQLite undoes this process's locks."""
        folder = self._journal.directory.unused("kept")
        folder.mkdir()
        with self._file.snapshot() as connection, contextlib.closing(connect(folder / "journal.sqlite3")) as copy:
            connection.backup(copy)
        return folder

    def _renew(self, connection: sqlite3.Connection) -> None:
        (target,) = connection.execute("SELECT target FROM meta").fetchone()
        write_meta(connection, new_writer_id(), 0, target, self._journal.directory.file.stat().st_ino)
        self._copied = False

    def _forget_writers(self, connection: sqlite3.Connection) -> None:
        connection.execute(
            "DELETE FROM writers WHERE at < ? AND writer NOT IN (SELECT writer FROM moves UNION SELECT writer FROM dead)",
            (time.time() - _KEEP_WRITERS,),
        )
