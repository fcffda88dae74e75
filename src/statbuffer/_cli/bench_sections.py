"""What is measured. Each section is called with a scale (1: the sizes of `make bench`) and returns its lines."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from statbuffer import Batch, StatBuffer
from statbuffer._cli.bench import Line, best_of, cost, speed, time_calls
from statbuffer._cli.bench_journal import journal
from statbuffer._cli.bench_sqlite import executemany, json_each, one_commit_each, timed
from statbuffer.sinks.sql import SQLSink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    Store = Callable[[Path, dict[str, int]], list[float]]

    from statbuffer._cli.bench import Function, Section, Turn

ROUNDS: Final = 7
_NEVER: Final = 86_400.0
"""Seconds of interval: nothing is delivered while increments are measured."""

NO_OP: Final = "no-op C method, [].count(key)"
INLINE: Final = "defaultdict, d[key] += 1 inline"
_OURS: Final = "statbuffer"
_AT_MOST_NO_OP: Final = 2.5
_AT_MOST_BYTES: Final = 128
_AT_LEAST_BY_HAND: Final = 0.8


class LockedDict:
    """What one writes first: a dict and a lock."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def increment(self, key: str, count: int = 1) -> None:
        with self._lock:
            self._counts[key] = self._counts.get(key, 0) + count


def _buffer() -> StatBuffer:
    return StatBuffer(lambda _key, _count: None, interval=_NEVER, max_keys=10_000_000)


def _time_inline(make: Callable[[int], list[str]], number: int) -> float:
    counts: defaultdict[str, int] = defaultdict(int)
    for key in make(number):
        counts[key] += 1
    return _loop_inline(counts, make(number))


def _loop_inline(counts: defaultdict[str, int], keys: list[str]) -> float:
    started = time.thread_time_ns()
    for key in keys:
        counts[key] += 1
    return (time.thread_time_ns() - started) / len(keys)


def _hot(number: int) -> list[str]:
    return ["/products/bright-scarf"] * number


_NAMES: Final = [f"/products/{page}" for page in range(10_000)]


def _many(number: int) -> list[str]:
    return (_NAMES * (number // len(_NAMES) + 1))[:number]


def _fresh(number: int) -> list[str]:
    """Strings that are built for this one call, so that their hash is not known yet."""
    return [f"/products/{page % 10_000}" for page in range(number)]


def increment(scale: float, *, peers: Mapping[str, Function] | None = None) -> Iterable[Line]:
    """One increment of a key that is pending."""
    number = max(int(300_000 * scale), 10_000)
    locked = LockedDict()
    with _buffer() as buffer:
        empty: list[str] = []
        functions: dict[str, Function] = {NO_OP: empty.count, "dict with a lock": locked.increment, **(peers or {})}
        for what, make in (("one key", _hot), ("10,000 keys", _many), ("fresh strings", _fresh)):
            measured = _increment_turns(buffer, functions, make, number)
            ours = measured.pop(_OURS)
            goals = {NO_OP: _AT_MOST_NO_OP, INLINE: 1.0}
            for peer, figure in measured.items():
                yield cost(f"increment, {what}", ours, peer, figure, goal=goals.get(peer))
        buffer.reset()
    yield from _new_keys(number)


def _increment_turns(
    buffer: StatBuffer, functions: Mapping[str, Function], make: Callable[[int], list[str]], number: int
) -> dict[str, float]:
    buffer.reset()
    for function in (buffer.increment, *functions.values()):
        for key in set(make(number)):  # all are pending already: what is measured is the count, not the new key
            function(key)
    turns: dict[str, Turn] = {
        _OURS: lambda: time_calls(buffer.increment, make(number)),
        INLINE: partial(_time_inline, make, number),
    }
    for name, function in functions.items():
        slow = name not in {NO_OP, "dict with a lock"}
        turns[name] = partial(_time_made, function, make, number // 10 if slow else number)
    return best_of(ROUNDS, turns)


def _time_made(function: Function, make: Callable[[int], list[str]], number: int) -> float:
    return time_calls(function, make(number))


def _new_keys(number: int) -> Iterable[Line]:
    def ours() -> float:
        keys = [f"/products/{page}" for page in range(number)]
        with _buffer() as buffer:
            figure = time_calls(buffer.increment, keys)
            buffer.reset()
        return figure

    def inline() -> float:
        return _loop_inline(defaultdict(int), [f"/products/{page}" for page in range(number)])

    found = best_of(ROUNDS, {_OURS: ours, INLINE: inline})
    yield cost(f"increment, {number:,} new keys", found[_OURS], INLINE, found[INLINE])


def update(scale: float) -> Iterable[Line]:
    """Many at once."""
    number = max(int(300_000 * scale), 10_000)
    with _buffer() as buffer:
        for what, make in (("one key", _hot), ("10,000 keys", _many), ("fresh strings", _fresh)):
            counter: Counter[str] = Counter()
            buffer.update(make(number))
            counter.update(make(number))

            found = best_of(
                ROUNDS,
                {
                    _OURS: partial(_time_update, buffer.update, make, number),
                    "ours": partial(_time_update, counter.update, make, number),
                },
            )
            yield cost(f"update, list, {what}", found[_OURS], "Counter.update", found["ours"], goal=1.0)
        buffer.reset()


def _time_update(function: Callable[[list[str]], object], make: Callable[[int], list[str]], number: int) -> float:
    keys = make(number)
    started = time.thread_time_ns()
    function(keys)
    return (time.thread_time_ns() - started) / number


_MEMORY_PROGRAM: Final = """
import sys, tracemalloc
from statbuffer import Batch, StatBuffer
number, kind = int(sys.argv[1]), sys.argv[2]
keys = [f"/products/{page}" for page in range(number)]
for key in keys: hash(key)
buffer = StatBuffer(lambda key, count: None, interval=86_400.0, max_keys=number).start()
counts = {}
tracemalloc.start()
if kind == "buffer":
    buffer.update(keys)
else:
    for key in keys: counts[key] = 1_000
print(tracemalloc.get_traced_memory()[0] / number)
buffer.reset()
buffer.stop(0)
"""


def memory(scale: float) -> Iterable[Line]:
    """Bytes for one pending key, beside the key itself: each measured in a process of its own."""
    number = int(1_000_000 * scale)
    ours, plain = _bytes_per_key(number, "buffer"), _bytes_per_key(number, "dict")
    yield Line(
        what=f"a pending key, of {number:,}",
        figure=f"{ours:,.0f} bytes",
        peer="dict of small ints",
        peer_figure=f"{plain:,.0f} bytes",
        ratio=ours / plain,
        goal=f"at most {_AT_MOST_BYTES} bytes",
        reached=ours <= _AT_MOST_BYTES,
    )


def _bytes_per_key(number: int, kind: str) -> float:
    arguments = [sys.executable, "-c", _MEMORY_PROGRAM, str(number), kind]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)  # noqa: S603  # our own program
    return float(done.stdout)


def flush(scale: float) -> Iterable[Line]:
    """From a dict into a SQLite file, until it is committed: rows that are new, then the same rows again."""
    number = int(100_000 * scale)
    counts = {f"/products/{page}": page % 97 + 1 for page in range(number)}
    stores: dict[str, Store] = {"sink": _apply, "buffer": _flush, "hand": json_each, "rows": executemany}
    best: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="statbuffer-bench-") as directory:
        for turn in range(5):
            for name, store in stores.items():
                seconds = store(Path(directory, f"{name.split()[0]}-{turn}.db"), counts)
                best[name] = [min(pair) for pair in zip(seconds, best.get(name, seconds), strict=True)]
        each = one_commit_each(Path(directory, "each.db"), counts)
    rows = best.pop("rows")
    yield from compare_flush(
        "SQLite", number, {"json_each upsert" if name == "hand" else name: best[name] for name in best}, each
    )
    peer = "by hand, executemany: hands the GIL over at each row, so only while nothing else runs"
    for index, what in enumerate(("new", "existing")):
        yield speed(f"SQLite, {number:,} {what} rows, one batch", best["sink"][index], peer, rows[index])


def compare_flush(database: str, number: int, best: dict[str, list[float]], each: float) -> Iterable[Line]:
    """Lines of one database; `best` has the seconds for new rows and for existing ones, by "sink", "buffer" and by hand."""
    hands = [name for name in best if name not in {"sink", "buffer"}]
    for index, what in enumerate(("new", "existing")):
        hand = min(hands, key=lambda name: best[name][index])
        peer, name = f"by hand, {hand}", f"{database}, {number:,} {what} rows"
        yield speed(f"{name}, one batch", best["sink"][index], peer, best[hand][index], goal=_AT_LEAST_BY_HAND)
        if "buffer" in best:
            yield speed(f"{name}, whole flush", best["buffer"][index], peer, best[hand][index])
    yield speed(
        f"{database}, {number:,} new rows, one batch", best["sink"][0], "by hand, a commit a key (a sample)", each
    )


def _apply(path: Path, counts: dict[str, int]) -> list[float]:
    sink = SQLSink(f"sqlite:///{path}")
    sink.open()
    seconds = [timed(partial(sink.apply, Batch("bench", seq, counts))) for seq in (1, 2)]
    assert sink.summary() == (len(counts), 2 * sum(counts.values()))
    sink.close()
    return seconds


def _flush(path: Path, counts: dict[str, int]) -> list[float]:
    """The same through a buffer: taken from the table in small steps, in batches as by default."""
    sink = SQLSink(f"sqlite:///{path}")
    with StatBuffer(sink, interval=_NEVER) as buffer:
        seconds = []
        for _ in range(2):
            buffer.update(counts)
            seconds.append(timed(buffer.flush))
    assert sink.summary() == (len(counts), 2 * sum(counts.values()))
    sink.close()
    return seconds


SECTIONS: Final[dict[str, Section]] = {
    "increment": increment,
    "update": update,
    "memory": memory,
    "flush": flush,
    "journal": journal,
}
