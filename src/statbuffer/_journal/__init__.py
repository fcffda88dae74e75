"""The journal: a local SQLite file that holds counts between memory and the store, for all processes of a host.

The way of a count: each buffer moves what it has taken from its table here, every `sync_interval` (`Journal.apply`: one row
with the whole batch, and the buffer's watermark, in one transaction). One process of the host, which holds the relay's lock,
seals what is ready: it merges the moves by key into sealed batches, delivers those one after the other as batches
`(journal id, seq)`, and deletes each when it is stored (`_seals.py`, `_relay.py`).

Why a log of moves and not a table of keys: a move costs one row whatever the number of its keys, so hot keys are written as
often as they are moved but looked up once an interval, when a seal merges them, in one statement that leaves the GIL alone
(1,000 hot keys: 0.2 ms a move, against 13 ms for the upsert; 100,000 keys: 10-19 against 57-77 ms). While the store is down
the relay folds the moves of each buffer into one, so that the file grows with the keys and not with the time.

Loss: a move is repeated with the same (writer, seq) until it is answered, and the watermark tells whether it is there. A seal
is on the disk, synced, before the store sees it, and stays as it is until the store has answered: so a batch id never names two
contents. That holds with `fsync=False` too, which leaves only the moves unsynced. Moves stay until all batches of their seal
are settled: they tell whose the counts were, for `stats()`, dead letters and what a callback failed to store.

Copies: the file knows its inode. One that was copied or restored has another, and gets a new id, so that its batches are not
taken for repeats. Before a process offers its first own batch it also asks the store whether that id is taken: if so, the file
is an old state of one that went on, and what it held is left out (`Seals.must_renew`). Two copies that are used at the same time
deliver what both of them hold twice: nothing local can know that.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from statbuffer._batch import DeadLetter
from statbuffer._errors import NotApplied, SinkError
from statbuffer._journal._check import inspect_wal
from statbuffer._journal._directory import Directory
from statbuffer._journal._file import CHECKED, JournalFile
from statbuffer._journal._rows import (
    add_up,
    dump_counts,
    dump_texts,
    insert_move,
    read_writer,
    write_meta,
    write_writer,
)
from statbuffer._keys import UnknownText, decode, encode, encode_counts

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Collection, Hashable, Iterable, Iterator

    from statbuffer._batch import Batch

log = logging.getLogger("statbuffer")


@dataclass(frozen=True, slots=True)
class Account:
    """The counts of one buffer that were moved to the journal, as sums."""

    seq: int
    moved: int
    journaled: int
    stored: int
    dead: int
    dropped: int
    oldest: float | None
    """Clock time at which the oldest of those that are not settled was moved."""


class Journal:
    """A buffer's side of the journal: an exact sink for its batches, and what it wants to know of them later.

    `target` says what the counts are for: a directory serves one target, so that the counts of two buffers that deliver to
    different places are never mixed. All methods but `apply` may be called from any thread.
    """

    exact = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        target: str,
        fsync: bool,
        bytes_max: int,
        monotonic: Any = time.monotonic,
    ) -> None:
        self.directory = Directory(path)
        self.target = target
        self._bytes_max = bytes_max
        self._monotonic = monotonic
        self._mover = JournalFile(self.directory, target=target, durable=fsync)
        self._reader = JournalFile(self.directory, target=target, durable=fsync)
        self._relay_file = JournalFile(self.directory, target=target, durable=True)
        self._files = (self._mover, self._reader, self._relay_file)
        self._host = socket.gethostname()
        self._closed = True
        self.on_move: Callable[[], None] = lambda: None
        """Called by the flusher's thread when it has moved a batch here."""
        self.flush_next = False
        """Whether the next batch that is moved here is to be delivered at once."""

    @property
    def relay_file(self) -> JournalFile:
        """The connection for whoever holds the relay's lock. It always waits for the disk: see Loss above."""
        return self._relay_file

    def open(self) -> None:
        """Make the journal ready. Raises `SinkError` (it can't work as it is), `NotApplied` (not just now)."""
        self._closed = False
        entering = not self.directory.users_lock.held
        self.directory.prepare()
        if entering:
            with self.directory.alone() as alone:
                if alone:
                    inspect_wal(self.directory)
        with self.reading() as connection:
            row = connection.execute(f"SELECT target FROM meta WHERE crc IS {CHECKED['meta']}").fetchone()
        if row is not None and row[0] != self.target:  # without a sound row the relay sets the file aside
            try:
                self._change_target(row[0])
            except SinkError:
                self.close()  # it is not ours
                raise

    def _change_target(self, found: str) -> None:
        """An empty journal that nobody else has open may serve another target from now on."""
        with self.directory.alone() as alone, self._mover.transaction() as connection:
            busy = connection.execute("SELECT 1 FROM moves UNION ALL SELECT 1 FROM dead LIMIT 1").fetchone()
            if busy or not alone:
                why = "it still holds counts for that" if busy else "a process has it open for that"
                raise SinkError(
                    f"journal {self.directory} is for {found}, this buffer delivers to {self.target}, and {why}: give each "
                    f"buffer a directory of its own (or, if {found} is what moved, deliver it first: statbuffer relay --once)"
                )
            journal, seq, inode = connection.execute("SELECT journal, seq, inode FROM meta").fetchone()
            write_meta(connection, journal, seq, self.target, inode)

    def check_key(self, key: Hashable) -> None:
        """Raise `TypeError` for a key that can't be kept as text."""
        encode(key)

    def apply(self, batch: Batch) -> None:
        """Move a batch here; it is on the disk (with fsync) when this returns. The flusher's thread."""
        counts = encode_counts(batch.counts)
        now = self._monotonic()
        with self._mover.transaction() as connection:
            row = read_writer(connection, batch.writer)
            if row is not None and row["seq"] >= batch.seq:
                self.on_move()
                return
            self._refuse_when_full(connection)
            if row is None:
                row = {"writer": batch.writer, "first": batch.seq, "moved": "0", "stored": "0", "dropped": "0"}
            row |= {"seq": batch.seq, "moved": str(int(row["moved"]) + batch.total)}
            write_writer(connection, row | {"pid": os.getpid(), "host": self._host, "at": time.time()})
            insert_move(connection, counts, batch.total, writer=batch.writer, seq=batch.seq, moved=now)
            if self.flush_next:
                self.flush_next = False
                connection.execute("UPDATE pulse SET flush_to = (SELECT max(id) FROM moves)")
        self.on_move()

    def _refuse_when_full(self, connection: sqlite3.Connection) -> None:
        pages, free, size = (
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        used = (pages - free) * size
        if used >= self._bytes_max:
            raise NotApplied(
                f"journal {self.directory} holds {used} bytes and may hold {self._bytes_max} (journal_bytes_max): the store "
                "has been down for long, or the bound is small; counts wait in memory meanwhile"
            )

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Look at one state of the file. Raises `NotApplied`, `Damaged`, `SinkError`."""
        with self._reader.snapshot() as connection:
            yield connection
        if self._closed:  # a look at what a stopped buffer has left keeps nothing open
            self._reader.close()

    # What becomes of what was moved

    def account(self, writer: str) -> Account | None:
        """Return the books of one buffer; None if nothing of it is known (any more: it had been settled for a day)."""
        with self.reading() as connection:
            row = read_writer(connection, writer)
            mine = "FROM moves WHERE writer = ?"
            totals, oldest = connection.execute(
                f"SELECT group_concat(total, ' '), min(moved) {mine}", (writer,)
            ).fetchone()
            (letters,) = connection.execute(
                "SELECT group_concat(count, ' ') FROM dead WHERE writer = ?", (writer,)
            ).fetchone()
        if row is None:
            return None
        return Account(
            seq=row["seq"],
            moved=int(row["moved"]),
            journaled=add_up(totals),
            stored=int(row["stored"]),
            dead=add_up(letters),
            dropped=int(row["dropped"]),
            oldest=oldest,
        )

    def ask_flush(self) -> int:
        """Have all that is here delivered at once, by whoever delivers; return the latest id that this is about."""
        with self._mover.transaction() as connection:
            (top,) = connection.execute("SELECT coalesce(max(id), 0) FROM moves").fetchone()
            connection.execute("UPDATE pulse SET flush_to = ?", (top,))
        return int(top)

    def flush_wish(self) -> int:
        """Return the latest id that a flush was asked for."""
        with self.reading() as connection:
            return int(connection.execute("SELECT coalesce(max(flush_to), 0) FROM pulse").fetchone()[0])

    def has_moves(self, writer: str | None, upto: int, key: str | None = None) -> bool:
        """Return whether counts (of one key text) that `writer`, or anybody, had moved here by id `upto` are not settled."""
        sql = "SELECT 1 FROM moves JOIN contents ON move = id WHERE origin <= ?"
        values: tuple[Any, ...] = (upto,)
        if writer is not None:
            sql += " AND writer = ?"
            values += (writer,)
        if key is not None:
            sql += " AND json_type(counts, '$.\"' || ? || '\"') IS NOT NULL"
            values += (key,)
        with self.reading() as connection:
            return connection.execute(sql + " LIMIT 1", values).fetchone() is not None

    def is_empty(self) -> bool:
        """Return whether nothing waits to be delivered."""
        with self.reading() as connection:
            return connection.execute("SELECT 1 FROM moves LIMIT 1").fetchone() is None

    def unsettled(self, keys: Iterable[Hashable]) -> tuple[int, dict[Hashable, int], tuple[str, int] | None]:
        """Return (a number that changes whenever something is settled, counts by key, the batch on offer).

        The counts are those of all buffers. The batch on offer, if there is one, is among them, stored already or not;
        `on_offer` tells its counts.
        """
        counts: dict[Hashable, int] = defaultdict(int)
        texts = dump_texts(encode(key) for key in keys)
        with self.reading() as connection:
            (settled,) = connection.execute("SELECT max(settled) FROM pulse").fetchone()
            offered = connection.execute("SELECT writer, seq FROM offer").fetchone()
            (found,) = connection.execute(
                "WITH wanted AS (SELECT value FROM json_each(?)) "
                "SELECT json_group_array(json_array(key, value)) FROM ("
                "SELECT each.key, each.value FROM moves JOIN contents ON move = moves.id, json_each(counts) each "
                "WHERE seal = 0 AND each.key IN wanted UNION ALL "
                "SELECT each.key, each.value FROM sealed, json_each(counts) each WHERE each.key IN wanted)",
                (texts,),
            ).fetchone()
        for text, count in json.loads(found):
            counts[decode(text)] += count
        return settled, dict(counts), offered

    def on_offer(self, keys: Iterable[Hashable]) -> dict[Hashable, int]:
        """Return the counts of `keys` in the batch that is, or was, being offered to the store."""
        texts = dump_texts(encode(key) for key in keys)
        with self.reading() as connection:
            (found,) = connection.execute(
                "SELECT json_group_array(json_array(each.key, each.value)) FROM sealed JOIN offer ON sealed.id = offer.sealed, "
                "json_each(counts) each WHERE each.key IN (SELECT value FROM json_each(?))",
                (texts,),
            ).fetchone()
        return {decode(text): count for text, count in json.loads(found)}

    def pulse(self) -> dict[str, Any]:
        """Return how the relay is, as it last said."""
        names = ("settled", "failing", "last_error", "pid", "host", "at")
        with self.reading() as connection:
            row = connection.execute(f"SELECT {', '.join(names)} FROM pulse").fetchone()
        return dict(zip(names, row or (), strict=False))

    # Dead letters

    def dead_letters(self) -> tuple[DeadLetter, ...]:
        """Return what the store rejected for good, of all buffers of the host, one letter a key."""
        with self.reading() as connection:
            rows = connection.execute("SELECT key, count, reason, batch FROM dead ORDER BY id").fetchall()
        letters: dict[Hashable, DeadLetter] = {}
        for text, count, reason, batch in rows:
            key = _key_or_text(text)
            before = letters[key].count if key in letters else 0
            letters[key] = DeadLetter(key, before + count, reason, batch)
        return tuple(letters.values())

    def revive(self, keys: Collection[Hashable] | None = None) -> int:
        """Have dead letters (of `keys`, or all) delivered again; return the sum of their counts."""
        now = self._monotonic()
        with self._mover.transaction() as connection:
            rows = connection.execute("SELECT id, writer, key, count FROM dead ORDER BY id").fetchall()
            chosen = [row for row in rows if keys is None or _key_or_text(row[2]) in keys]
            for number, writer, key, count in chosen:
                connection.execute("DELETE FROM dead WHERE id = ?", (number,))
                insert_move(connection, dump_counts({key: count}), count, writer=writer, seq=0, moved=now)
        return sum(row[3] for row in chosen)

    # Life

    def before_fork(self) -> None:
        """Close all connections, after the transactions that are under way."""
        for file in self._files:
            file.before_fork()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        for file in self._files:
            file.after_fork_in_parent()

    def after_fork(self) -> None:
        """Go on in a child: with locks of its own, and without its parent's share of the relay's."""
        for file in self._files:
            file.after_fork_in_child()
        self.directory.forget()

    def close(self) -> None:
        """Close the connections. What is in the journal stays, and can still be asked for."""
        self._closed = True
        for file in self._files:
            file.close()
        with contextlib.suppress(OSError):
            self.directory.close()

    def __repr__(self) -> str:
        return f"<Journal {self.directory}>"


def _key_or_text(text: str) -> Any:
    try:
        return decode(text)
    except UnknownText:
        return text


__all__ = ["Account", "Journal"]
