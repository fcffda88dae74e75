"""The same work by hand, as somebody who knows SQLite well would write it: one transaction, no SQLAlchemy, no watermark."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_TABLE: Final = "CREATE TABLE counters (key TEXT NOT NULL PRIMARY KEY, count BIGINT NOT NULL) WITHOUT ROWID"
_ADD_ROW: Final = "INSERT INTO counters VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET count = count + excluded.count"
_ADD_JSON: Final = (
    "INSERT INTO counters SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]') FROM json_each(?) WHERE true "
    "ON CONFLICT (key) DO UPDATE SET count = count + excluded.count"
)
_SAMPLE: Final = 500


def timed(function: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _json_each(connection: sqlite3.Connection, counts: dict[str, int]) -> None:
    connection.execute(_ADD_JSON, [json.dumps(sorted(counts.items()))])
    connection.commit()


def _executemany(connection: sqlite3.Connection, counts: dict[str, int]) -> None:
    connection.executemany(_ADD_ROW, sorted(counts.items()))
    connection.commit()


def _twice(
    store: Callable[[sqlite3.Connection, dict[str, int]], None],
) -> Callable[[Path, dict[str, int]], list[float]]:
    def run(path: Path, counts: dict[str, int]) -> list[float]:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(_TABLE)
            return [timed(lambda: store(connection, counts)) for _ in range(2)]

    return run


json_each: Final = _twice(_json_each)
executemany: Final = _twice(_executemany)


def one_commit_each(path: Path, counts: dict[str, int]) -> float:
    """Return the seconds that a commit for each key would take, reckoned from a sample."""
    sample = list(counts.items())[:_SAMPLE]
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(_TABLE)
        started = time.perf_counter()
        for pair in sample:
            connection.execute(_ADD_ROW, pair)
            connection.commit()
        return (time.perf_counter() - started) / len(sample) * len(counts)
