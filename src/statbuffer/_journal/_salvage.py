"""Reading a damaged journal: all rows whose checksums hold go to the live one, in one transaction, once.

What can't be read is lost; the file stays where it was set aside, and the log says what was found. Two rules keep what was
read from being counted twice: a move that its buffer has made again in the live file is left out (`writers.first` tells), and
moves that belong to a seal travel with its sealed batches, which alone are delivered.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sqlite3
from typing import TYPE_CHECKING, Any, Final

from statbuffer._batch import Batch
from statbuffer._journal._file import CHECKED, connect, is_damage, row_crc
from statbuffer._journal._rows import (
    add_dead,
    insert_move,
    insert_offer,
    insert_sealed,
    offer_next,
    read_writer,
    write_writer,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from statbuffer._journal._file import JournalFile

log = logging.getLogger("statbuffer")

_COLUMNS: Final = {
    table: tuple(crc.removeprefix("row_crc(").removesuffix(")").split(", ")) for table, crc in CHECKED.items()
}
_SEALS: Final = 2**32
"""Added to the number of a seal that was read from a damaged file; a live file never counts that far."""

Row = dict[str, Any]


def salvage(aside: Path, live: JournalFile, applied: Callable[[Batch], bool] | None) -> None:
    """Bring what can be read of `aside` into the live journal, under the relay's lock. Raises as a transaction and the sink."""
    found = _read(aside)
    if applied is not None and any(applied(Batch(row["journal"], row["seq"] + 1, {})) for row in found["meta"]):
        # its latest transactions are missing: what seems to wait was in a batch that the store has (see Seals.must_renew)
        found["moves"] = [row for row in found["moves"] if row["seal"]]
    with live.transaction() as connection:
        if not connection.execute("SELECT 1 FROM salvaged WHERE name = ?", (aside.name,)).fetchone():
            total = _bring(connection, found)
            connection.execute("INSERT INTO salvaged VALUES (?)", (aside.name,))
            log.error(
                "journal: %d counts in %d moves, %d sealed batches and %d dead letters were read from %s",
                total,
                len(found["moves"]),
                len(found["sealed"]),
                len(found["dead"]),
                aside,
            )
    (aside / "salvaged").touch()


def _read(aside: Path) -> dict[str, list[Row]]:
    """Return all sound rows, by table. From a copy: SQLite would finish and clear the write-ahead log."""
    found: dict[str, list[Row]] = {table: [] for table in (*CHECKED, "salvaged")}
    copy = aside.with_name(f"new-{aside.name}")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(aside, copy)
    try:
        with contextlib.closing(connect(copy / "journal.sqlite3")) as connection:
            connection.text_factory = lambda data: data.decode(errors="replace")
            for table, columns in _COLUMNS.items():
                found[table] = list(_sound_rows(connection, table, columns))
            found["salvaged"] = [{"name": name} for (name,) in _rows(connection, "SELECT name FROM salvaged")]
    except (sqlite3.Error, OSError) as error:
        log.error("journal: %s can't be read any further: %s", aside, error)  # noqa: TRY400  # it is damaged: that is known
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    return found


def _sound_rows(connection: sqlite3.Connection, table: str, columns: tuple[str, ...]) -> Iterator[Row]:
    key = columns[0]
    select = f"SELECT {', '.join(columns)}, crc FROM {table}"
    seen = set()
    for order in ("", " DESC"):  # from both ends, as far as either goes
        for *values, crc in _rows(connection, f"{select} ORDER BY {key}{order}"):
            row = dict(zip(columns, values, strict=True))
            if crc != row_crc(*values) or row[key] in seen:
                continue
            seen.add(row[key])
            text = _counts(connection, table, row[key])
            if "counts_crc" in row and row_crc(text) != row["counts_crc"]:
                continue
            yield row | {"counts": text}


def _rows(connection: sqlite3.Connection, sql: str) -> Iterator[tuple[Any, ...]]:
    try:
        yield from connection.execute(sql)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        if not is_damage(error):
            raise


def _counts(connection: sqlite3.Connection, table: str, number: Any) -> Any:
    sql = {"moves": "SELECT counts FROM contents WHERE move = ?", "sealed": "SELECT counts FROM sealed WHERE id = ?"}
    if table not in sql:
        return None
    try:
        row = connection.execute(sql[table], (number,)).fetchone()
    except (sqlite3.Error, UnicodeDecodeError):
        return None
    return row and row[0]


def _bring(connection: sqlite3.Connection, found: dict[str, list[Row]]) -> int:
    """Insert what was found; return the sum of the counts that will be delivered for it."""
    first = dict(connection.execute("SELECT writer, first FROM writers").fetchall())
    for row in found["writers"]:
        _bring_writer(connection, row)
    new_seals, total = _bring_seals(connection, found)
    for row in found["moves"]:
        if row["seal"] and row["seal"] not in new_seals:
            continue  # its batches were stored, or can't be read: to deliver it might count it twice
        if row["seq"] and row["seq"] >= first.get(row["writer"], row["seq"] + 1):
            continue
        _bring_move(connection, row, new_seals.get(row["seal"], 0))
        total += 0 if row["seal"] else int(row["total"])
    for row in found["dead"]:
        letter = {name: row[name] for name in ("key", "writer", "count", "reason", "batch")}
        add_dead(connection, **letter)
    connection.executemany("INSERT OR IGNORE INTO salvaged VALUES (:name)", found["salvaged"])
    return total


def _bring_writer(connection: sqlite3.Connection, row: Row) -> None:
    live = read_writer(connection, row["writer"])
    if live is not None:
        sums = {name: str(int(row[name]) + int(live[name])) for name in ("moved", "stored", "dropped")}
        row = live | sums | {"first": min(row["first"], live["first"]), "seq": max(row["seq"], live["seq"])}
    write_writer(connection, row)


def _bring_move(connection: sqlite3.Connection, row: Row, seal: int) -> None:
    names = ("writer", "seq", "moved", "not_before")
    insert_move(connection, row["counts"], int(row["total"]), seal=seal, **{name: row[name] for name in names})
    writer = read_writer(connection, row["writer"])
    if writer is None:  # its row could not be read: the watermark must be there all the same
        books = {"moved": row["total"], "stored": "0", "dropped": "0", "pid": None, "host": None, "at": row["at"]}
        write_writer(connection, books | {"writer": row["writer"], "first": row["seq"], "seq": row["seq"]})
    elif row["seq"] > writer["seq"]:
        write_writer(connection, writer | {"seq": row["seq"]})


def _bring_seals(connection: sqlite3.Connection, found: dict[str, list[Row]]) -> tuple[dict[int, int], int]:
    """Insert sealed batches; return the new number of each seal, and the sum of their counts.

    The batch that was on offer may be stored already, so it keeps its id, or, if that can't be read, is left out. Of the
    others none was offered: they get ids in their turn.
    """
    rows = sorted(found["sealed"], key=lambda row: int(row["id"]))
    offered, offer = _was_offered(found, rows)
    if offered is not None and offer is None:
        log.error("journal: %s counts may be stored or not, they are not delivered again", _total(offered))
        rows.remove(offered)
    new_seals: dict[int, int] = {}
    for row in rows:
        seal = new_seals.setdefault(row["seal"], _SEALS + row["seal"])
        number = insert_sealed(connection, seal, row["born"], row["counts"])
        if row is offered and offer is not None:
            insert_offer(connection, number, *offer)
    if rows and rows[0] is not offered:
        offer_next(connection)
    return new_seals, sum(map(_total, rows))


def _was_offered(found: dict[str, list[Row]], rows: list[Row]) -> tuple[Row | None, tuple[str, int] | None]:
    """Return the row that was on offer, if it can be read, and under which id, if that can be read."""
    for offer in found["offer"]:
        on_offer = [row for row in rows if row["id"] == offer["sealed"]]
        return (on_offer[0], (offer["writer"], offer["seq"])) if on_offer else (None, None)
    if not rows:
        return None, None
    for meta in found["meta"]:
        if meta["seq"]:
            return rows[0], (meta["journal"], meta["seq"])
    return rows[0], None


def _total(row: Row) -> int:
    return sum(json.loads(row["counts"]).values())
