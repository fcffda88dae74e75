"""The rows of the journal: how each kind is written, with its checksum. See the format in `_file.py`."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, Final

from statbuffer._journal._file import row_crc, values_with_crc

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Mapping

_WRITER: Final = ("writer", "first", "seq", "moved", "stored", "dropped", "pid", "host", "at")


def dump_counts(counts: Mapping[str, int]) -> str:
    """Return counts by key text as JSON."""
    return json.dumps(counts, ensure_ascii=False, separators=(",", ":"), check_circular=False)


def insert_move(
    connection: sqlite3.Connection,
    counts: str,
    total: int,
    *,
    writer: str,
    seq: int,
    moved: float,
    origin: int | None = None,
    not_before: float = 0.0,
    seal: int = 0,
) -> None:
    """Write counts (JSON by key text) that wait for a seal."""
    (row,) = connection.execute("SELECT coalesce(max(seq), 0) + 1 FROM sqlite_sequence WHERE name = 'moves'").fetchone()
    values = (row, writer, seq, origin or row, moved, not_before, time.time(), str(total), seal, row_crc(counts))
    connection.execute("INSERT INTO moves VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values_with_crc(*values))
    connection.execute("INSERT INTO contents VALUES (?, ?)", (row, counts))


def add_up(numbers: str | None) -> int:
    """Return the sum of what SQL's `group_concat(..., ' ')` made: one row, since each row takes a turn at the GIL."""
    return sum(map(int, numbers.split())) if numbers else 0


def read_writer(connection: sqlite3.Connection, writer: str) -> dict[str, Any] | None:
    """Return a buffer's row."""
    row = connection.execute(f"SELECT {', '.join(_WRITER)} FROM writers WHERE writer = ?", (writer,)).fetchone()
    return None if row is None else dict(zip(_WRITER, row, strict=True))


def write_writer(connection: sqlite3.Connection, row: Mapping[str, Any]) -> None:
    """Write a buffer's row."""
    values = values_with_crc(*(row[name] for name in _WRITER))
    connection.execute("INSERT OR REPLACE INTO writers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)


def dump_texts(texts: Iterable[str]) -> str:
    """Return key texts as a JSON array."""
    return json.dumps(list(texts), ensure_ascii=False)


def insert_sealed(connection: sqlite3.Connection, seal: int, born: float, counts: str) -> int:
    """Write one batch of a seal; return its row."""
    (row,) = connection.execute(
        "SELECT coalesce(max(seq), 0) + 1 FROM sqlite_sequence WHERE name = 'sealed'"
    ).fetchone()
    values = values_with_crc(row, seal, born, row_crc(counts))
    connection.execute("INSERT INTO sealed VALUES (?, ?, ?, ?, ?, ?)", (*values, counts))
    return int(row)


def offer_next(connection: sqlite3.Connection) -> None:
    """Put the first sealed batch on offer, if there is one."""
    (row,) = connection.execute("SELECT min(id) FROM sealed").fetchone()
    if row is not None:
        offer(connection, row)


def offer(connection: sqlite3.Connection, sealed: int) -> None:
    """Put a sealed batch on offer under the next id: it was never offered as it is now."""
    journal, seq, target, inode = connection.execute("SELECT journal, seq, target, inode FROM meta").fetchone()
    write_meta(connection, journal, seq + 1, target, inode)
    insert_offer(connection, sealed, journal, seq + 1)


def insert_offer(connection: sqlite3.Connection, sealed: int, writer: str, seq: int) -> None:
    """Note under which id a sealed batch is offered."""
    connection.execute("INSERT INTO offer VALUES (?, ?, ?, ?, ?)", values_with_crc(1, sealed, writer, seq))


def write_meta(connection: sqlite3.Connection, journal: str, seq: int, target: str, inode: int) -> None:
    """Write the one row that says what journal this is."""
    values = values_with_crc(1, journal, seq, target, inode)
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?, ?, ?, ?, ?)", values)


def add_dead(connection: sqlite3.Connection, *, key: str, writer: str, count: int, reason: str, batch: str) -> None:
    """Write a dead letter; one row for each key of a buffer, as long as its sum has 64 bits."""
    row = connection.execute("SELECT id, count FROM dead WHERE key = ? AND writer = ?", (key, writer)).fetchone()
    if row is not None and -(2**63) <= row[1] + count < 2**63:
        connection.execute("DELETE FROM dead WHERE id = ?", (row[0],))
        count += row[1]
    (number,) = connection.execute("SELECT coalesce(max(id), 0) + 1 FROM dead").fetchone()
    values = values_with_crc(number, key, writer, count, reason, batch, time.time())
    connection.execute("INSERT INTO dead VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
