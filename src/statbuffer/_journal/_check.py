"""Whether a journal's file is what was written: SQLite's own check, and the checksums of the rows."""

from __future__ import annotations

import contextlib
import logging
import struct
from typing import TYPE_CHECKING, Final

from statbuffer._journal._file import CHECKED, SCHEMA

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

    from statbuffer._journal._directory import Directory

log = logging.getLogger("statbuffer")

_LAST_ROW: Final = 2**62
"""A table whose next row id has passed this was not filled by counting."""


def problems(connection: sqlite3.Connection) -> list[str]:
    """Return what is wrong with the file, in words; nothing if it is sound. Reads it whole; leaves the GIL alone."""
    rows = connection.execute("PRAGMA integrity_check(10)").fetchall()
    if rows != [("ok",)]:
        return [str(text) for (text,) in rows]
    found = []
    for table, crc in CHECKED.items():
        (wrong,) = connection.execute(f"SELECT count(*) FROM {table} WHERE crc IS NOT {crc}").fetchone()
        if wrong:
            found.append(f"{wrong} rows of {table} have another checksum than they were written with")
    for table, join in (("moves", "LEFT JOIN contents ON move = id"), ("sealed", "")):
        (wrong,) = connection.execute(
            f"SELECT count(*) FROM {table} {join} WHERE counts_crc IS NOT row_crc(counts)"
        ).fetchone()
        if wrong:
            found.append(f"the counts of {wrong} rows of {table} have another checksum than they were written with")
    for what, sql in _RELATIONS.items():
        (wrong,) = connection.execute(f"SELECT count(*) FROM {sql}").fetchone()
        if wrong:
            found.append(what)
    return found


_RELATIONS: Final = {
    "there is not one row in meta": "(SELECT 1 FROM (SELECT count(*) AS n FROM meta) WHERE n <> 1)",
    "there is not one row in pulse": "(SELECT 1 FROM (SELECT count(*) AS n FROM pulse) WHERE n <> 1)",
    "counts without a move": "contents WHERE move NOT IN (SELECT id FROM moves)",
    "what is on offer is not the first of what is sealed": (
        "(SELECT 1 FROM (SELECT (SELECT min(id) FROM sealed) AS first, (SELECT sealed FROM offer) AS offered) "
        "WHERE first IS NOT offered)"
    ),
    "moves without their seal": "moves WHERE seal <> 0 AND seal NOT IN (SELECT seal FROM sealed)",
    "a row id that counting never reached": f"sqlite_sequence WHERE seq > {_LAST_ROW} OR typeof(seq) <> 'integer'",
}
assert set(CHECKED) <= set(SCHEMA)


# The write-ahead log: SQLite ends at the first frame whose checksum is wrong, and says nothing

_HEADER: Final = struct.Struct(">8I")
_FRAME: Final = struct.Struct(">6I")
_MAGIC: Final = 0x377F0682  # the lowest bit says whether checksums are big-endian


def inspect_wal(directory: Directory) -> None:
    """Say so, and keep a copy, if the write-ahead log is cut short by damage. Nobody else has the journal open.

    A process that was killed, or a power cut, leaves at most a last write that was never promised; a frame that is damaged
    hides all that was committed after it. From outside the two look alike, so both are told.
    """
    wal = directory.live / f"{directory.file.name}-wal"
    with contextlib.suppress(FileNotFoundError):
        if wal.stat().st_size > _HEADER.size and (unreadable := _unreadable_frames(wal)):
            log.error(
                "journal %s: %d pages at the end of its write-ahead log can't be read: a write that was under way when the "
                "machine stopped, or damage, and then counts are missing; a copy is kept as %s",
                directory,
                unreadable,
                directory.copy_aside(),
            )


def _unreadable_frames(wal: Path) -> int:
    """Count the frames of the log's present round after the last one that is sound.

    Format: https://www.sqlite.org/fileformat2.html#walformat
    """
    data = wal.read_bytes()
    magic, _, page, _, *salts, sum1, sum2 = _HEADER.unpack_from(data)
    order = ">" if magic & 1 else "<"
    frame = _FRAME.size + page
    if magic & ~1 != _MAGIC or _checksum(data[:24], order, (0, 0)) != (sum1, sum2) or page not in _PAGE_SIZES:
        return max(1, (len(data) - _HEADER.size) // 4096)
    sums, unreadable = (sum1, sum2), 0
    for at in range(_HEADER.size, len(data), frame):
        header = data[at : at + _FRAME.size]
        if len(header) < _FRAME.size:
            break
        _, _, *own_salts, own1, own2 = _FRAME.unpack(header)
        if own_salts != salts and not unreadable:
            # the first frame of an earlier round ends this one, unless it is one of this round whose salt was damaged
            unreadable += _of_this_round(data[at + frame :], frame, salts)
            break
        content = data[at + _FRAME.size : at + frame]
        sums = _checksum(header[:8] + content, order, sums)
        if sums != (own1, own2) or len(content) < page:
            unreadable += 1 + _of_this_round(data[at + frame :], frame, salts)
            break
    return unreadable


_PAGE_SIZES: Final = {2**power for power in range(9, 17)}


def _of_this_round(data: bytes, frame: int, salts: list[int]) -> int:
    headers = (data[at : at + _FRAME.size] for at in range(0, len(data), frame))
    return sum(list(_FRAME.unpack(header)[2:4]) == salts for header in headers if len(header) == _FRAME.size)


def _checksum(data: bytes, order: str, sums: tuple[int, int]) -> tuple[int, int]:
    one, two = sums
    words = struct.unpack(f"{order}{len(data) // 4}I", data[: len(data) // 8 * 8])
    for at in range(0, len(words), 2):
        one = (one + words[at] + two) & 0xFFFFFFFF
        two = (two + words[at + 1] + one) & 0xFFFFFFFF
    return one, two
