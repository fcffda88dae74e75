"""What a journal costs: the increment, the stalls of other threads, the wait for the disk, and keys a second."""

from __future__ import annotations

import json
import os
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

from statbuffer import StatBuffer
from statbuffer._cli.bench import Line, best_of, cost, no_garbage_collection, speed, time_calls
from statbuffer._cli.bench_sqlite import timed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from statbuffer import Batch

_NEVER: Final = 86_400.0
_ROUNDS: Final = 5
_WITHIN_NOISE: Final = 1.1
_AT_LEAST_BY_HAND: Final = 0.8
_MORE_STALL: Final = 0.010
"""Seconds: a thread may be held up by a move at most twice as long as by an idle flusher, and so much more."""

_UPSERT: Final = (
    "INSERT INTO pending SELECT key, value FROM json_each(?) WHERE true "
    "ON CONFLICT (key) DO UPDATE SET count = count + excluded.count"
)


def journal(scale: float) -> Iterable[Line]:
    """A buffer with a journal beside one without."""
    with tempfile.TemporaryDirectory(prefix="statbuffer-bench-") as directory:
        yield from _increment(Path(directory, "increment"), max(int(2_000_000 * scale), 100_000))
        yield from _stalls(Path(directory, "stalls"), int(100_000 * scale))
        yield _sync(Path(directory, "sync"))
        yield from _throughput(Path(directory), int(100_000 * scale))


class _Nothing:
    """A store that costs nothing."""

    exact = True

    def apply(self, batch: Batch) -> None:
        """Take it."""


def _buffer(path: Path | None) -> StatBuffer:
    return StatBuffer(_Nothing(), journal=path, interval=_NEVER, sync_interval=0.1, max_keys=10_000_000)


def _increment(path: Path, number: int) -> Iterable[Line]:
    with _buffer(path) as journaled, _buffer(None) as memory:
        for what, keys in (
            ("one key", ["/products/bright-scarf"] * number),
            ("10,000 keys", [f"/products/{page}" for page in range(10_000)] * (number // 10_000)),
        ):
            found = best_of(
                _ROUNDS,
                {
                    "journal": lambda keys=keys: time_calls(journaled.increment, keys),  # type: ignore[misc]
                    "memory": lambda keys=keys: time_calls(memory.increment, keys),  # type: ignore[misc]
                },
            )
            title = f"increment, {what}, moved every 0.1 s"
            yield cost(title, found["journal"], "without a journal", found["memory"], goal=_WITHIN_NOISE)
        memory.reset()


def _stalls(path: Path, number: int) -> Iterable[Line]:
    """How long a busy thread stands still while so many keys are moved, beside one with a flusher that has nothing to do."""
    quiet: list[float] = []
    busy: list[float] = []
    with _buffer(path) as views, no_garbage_collection():
        counts = {f"/products/{page}": 1 for page in range(number)}
        for turn in range(_ROUNDS):
            quiet += _gaps(lambda: time.sleep(0.5))
            fresh = {f"{key}/{turn}": count for key, count in counts.items()}
            views.update(fresh)
            busy += _gaps(views.sync)
    for what, pick in (("worst", max), ("p99.9 of those over 50 us", _p999)):
        ours, idle = pick(busy), pick(quiet)
        allowed = 2 * idle + _MORE_STALL
        yield Line(
            what=f"stall of a busy thread, {number:,} keys moved, {what}",
            figure=f"{ours * 1e3:,.1f} ms",
            peer="beside an idle flusher",
            peer_figure=f"{idle * 1e3:,.1f} ms",
            ratio=ours / idle,
            goal=f"at most {allowed * 1e3:,.1f} ms" if pick is max else "",
            reached=ours <= allowed if pick is max else None,
        )


def _gaps(work: Callable[[], object]) -> list[float]:
    """Return the seconds between two looks at the clock, of a thread that does nothing else while `work` runs."""
    gaps: list[float] = []
    done = threading.Event()

    def look() -> None:
        now, before = time.perf_counter, time.perf_counter()
        while not done.is_set():
            for _ in range(200):
                at = now()
                if at - before > 50e-6:  # noqa: PLR2004  # what is shorter is the loop itself
                    gaps.append(at - before)
                before = at

    thread = threading.Thread(target=look)
    thread.start()
    work()
    done.set()
    thread.join()
    return gaps or [50e-6]


def _p999(gaps: list[float]) -> float:
    return sorted(gaps)[int(len(gaps) * 0.999)]


def _sync(path: Path) -> Line:
    """1,000 keys, until they are on the disk, beside the same bytes written to a file by hand."""
    keys = [f"/products/{page}" for page in range(1_000)]
    text = json.dumps(dict.fromkeys(keys, 1)).encode()
    ours, hand = [], []
    with _buffer(path) as views, path.with_name("by-hand").open("wb", buffering=0) as file:
        for _ in range(60):
            views.update(keys)
            ours.append(timed(views.sync))
            started = time.perf_counter()
            file.write(text)
            (os.fdatasync if sys.platform == "linux" else os.fsync)(file.fileno())
            hand.append(time.perf_counter() - started)
    figure, peer = statistics.median(ours), statistics.median(hand)
    return cost("sync() of 1,000 keys, median", figure * 1e3, "write and fdatasync by hand", peer * 1e3, unit="ms")


def _throughput(directory: Path, number: int) -> Iterable[Line]:
    counts = {f"/products/{page}": page % 97 + 1 for page in range(number)}

    def ours() -> float:
        with tempfile.TemporaryDirectory(dir=directory) as path, _buffer(Path(path)) as views:
            views.update(counts)
            return timed(views.sync)

    def by_hand() -> float:
        with tempfile.TemporaryDirectory(dir=directory) as path, closing(_by_hand(Path(path, "hand.db"))) as connection:
            return timed(lambda: _upsert(connection, counts))

    found = best_of(_ROUNDS, {"ours": ours, "hand": by_hand})
    what = f"journal, {number:,} keys ({number / found['ours']:,.0f} keys/s)"
    yield speed(what, found["ours"], "one json_each upsert by hand, WAL", found["hand"], goal=_AT_LEAST_BY_HAND)


def _by_hand(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE pending(key TEXT PRIMARY KEY, count INTEGER) WITHOUT ROWID")
    return connection


def _upsert(connection: sqlite3.Connection, counts: dict[str, int]) -> None:
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(_UPSERT, (json.dumps(counts),))
    connection.execute("COMMIT")
