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

    A frame that is damaged hides all that was committed after it. What a killed process had not finished writing is no
    damage and not told: it ends in no commit. A power cut can leave a commit whose other frames never reached the disk;
    that is told, although it was never promised: from outside the two look alike.
    """
    wal = directory.live / f"{directory.file.name}-wal"
    with contextlib.suppress(FileNotFoundError):
        if wal.stat().st_size > _HEADER.size and (hidden := _hidden_commits(wal)):
            log.error(
                "journal %s: %d transactions at the end of its write-ahead log can't be read. Unless the machine lost power, "
                "that is damage, and counts are missing; a copy is kept as %s",
                directory,
                hidden,
                directory.keep_copy(),
            )


def _hidden_commits(wal: Path) -> int:
    """Count the commits of the log's present round after its first frame that is not sound.

    Format: https://www.sqlite.org/fileformat2.html#walformat
    """
    data = wal.read_bytes()
    magic, _, page, _, *salts, sum1, sum2 = _HEADER.unpack_from(data)
    order = ">" if magic & 1 else "<"
    sound = magic & ~1 == _MAGIC and page in _PAGE_SIZES and _checksum(data[:24], order, (0, 0)) == (sum1, sum2)
    if not sound:
        return 1
    sums, hidden = (sum1, sum2), 0
    for at in range(_HEADER.size, len(data) - _FRAME.size, _FRAME.size + page):
        _, commit, *own_salts, own1, own2 = _FRAME.unpack_from(data, at)
        content = data[at + _FRAME.size : at + _FRAME.size + page]
        if sound and len(content) == page:
            sums = _checksum(data[at : at + 8] + content, order, sums)
            sound = (sums, own_salts) == ((own1, own2), salts) and len(content) == page
        if (
            not sound and commit and (own_salts[0] == salts[0] or own_salts[1] == salts[1])
        ):  # an earlier round shares none
            hidden += 1
    return hidden


_PAGE_SIZES: Final = {2**power for power in range(9, 17)}


def _checksum(data: bytes, order: str, sums: tuple[int, int]) -> tuple[int, int]:
    one, two = sums
    words = struct.unpack(f"{order}{len(data) // 4}I", data[: len(data) // 8 * 8])
    for at in range(0, len(words), 2):
        one = (one + words[at] + two) & 0xFFFFFFFF
        two = (two + words[at + 1] + one) & 0xFFFFFFFF
    return one, two
