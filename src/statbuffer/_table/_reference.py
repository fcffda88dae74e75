"""The counter table in plain Python: the executable specification, and what is used where no C compiler was at hand.

A table knows nothing of stores, threads or policies. It counts, and it knows when each key is due.

Concurrency: one reentrant lock, since a key's `__eq__` and finalizers may call the table again from inside it. The hooks
are called without it. As in `_native.pyx`, each step leaves each count in exactly one place whatever a key's own code
does: a look-up's answer is used before any other code can run, and a cell's count is read after the cell has left.
What the native table stands and this one does not: a finalizer or signal handler that interrupts a step, on the same
thread, and counts. `StatBuffer.async_increment` is made for those.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import deque
from collections.abc import Mapping
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, Final

from statbuffer._errors import BufferFull
from statbuffer._table._checks import INT64_MAX, INT64_MIN, OVERFLOW, refuse, report, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

_STALE_ALLOWED: Final = 1024


class _Cell:
    __slots__ = ("count", "due")

    def __init__(self, due: int) -> None:
        self.count = 0
        self.due = due

    def add(self, n: int) -> None:
        total = self.count + n
        if not INT64_MIN <= total <= INT64_MAX:
            raise OverflowError(OVERFLOW.format(self.count, n))
        self.count = total


class _Bucket:
    """The keys that are due at one tick, and when the first of their counts was made."""

    __slots__ = ("born", "keys", "tick")

    def __init__(self, tick: int, born: float) -> None:
        self.tick = tick
        self.born = born
        self.keys: list[Hashable] = []


class CounterTable:
    """Pending counts by key, and when each is due.

    `interval`, `jitter` and `tick` are seconds; `clock` tells them. `check_key(key)` is asked for each key that is new to
    the table and may raise `TypeError`. `on_full(key)` is asked when a new key comes while `max_keys` are there: it
    raises, waits for room, or names another key to take the count. `wake()` is called when something is due earlier
    than all else; it returns whether the flusher heard it, and is called again with the next key if not.
    """

    kind: Final = "reference"

    def __init__(
        self,
        *,
        interval: float,
        jitter: float = 0.0,
        tick: float,
        max_keys: int,
        clock: Callable[[], float] = time.monotonic,
        check_key: Callable[[Any], object] | None = None,
        on_full: Callable[[Any], Any] | None = None,
        wake: Callable[[], bool] | None = None,
    ) -> None:
        self._interval = interval
        self._jitter = jitter
        self._tick = tick
        self.max_keys = max_keys
        self._clock = clock
        self._check_key = check_key
        self._on_full = on_full
        self._wake = wake
        self.closed = False
        self._cells: dict[Hashable, _Cell] = {}
        self._wheel: dict[int, _Bucket]
        self._ticks: list[int]  # heap of the wheel's ticks
        self._due: deque[_Bucket]  # buckets that are due already, whatever their tick
        self._entries: int  # keys in all buckets, the stale ones too
        self._inserting: int
        self._stuck: list[tuple[Hashable, int]]
        self._stuck_born: float
        self._stuck_until: float
        self._accepted: int
        self._left: int  # taken, less put back
        self._unwoken: bool
        self.forget()

    # Counting: the caller's thread

    def increment(self, key: Hashable, count: int = 1) -> None:
        """Add `count` to what is pending for `key`.

        The key is due `interval` (plus a random part of `jitter`) after its first increment, later by a tick at most; what
        comes in meanwhile is added and changes nothing about that. Raises `TypeError`, `OverflowError`, `Stopped` (the
        table is closed), or what the hooks raise, and then nothing was counted.
        """
        n = whole(count)
        with self._lock:
            if self.closed:
                refuse()
            cell = self._cells.get(key)
            if cell is not None:
                self._count(cell, n)
                return
        if n:
            self._insert(key, n)

    def update(self, counts: Mapping[Any, int] | Iterable[Hashable]) -> None:
        """Add a mapping of counts, or 1 for each key of an iterable; what stands before an item that raises is counted."""
        if self.closed:
            refuse()
        if isinstance(counts, Mapping):
            for key, count in counts.items():
                self.increment(key, count)
        else:
            for key in counts:
                self.increment(key)

    def _count(self, cell: _Cell, n: int) -> None:
        cell.add(n)
        self._accepted += n

    def _insert(self, key: Hashable, n: int) -> None:
        """Count a key that is not in the table. The hooks may do anything: what they may have changed is asked after."""
        if self._check_key is not None:
            self._check_key(key)
        if len(self._cells) >= self.max_keys:
            if self._on_full is None:
                raise BufferFull(key, self.max_keys)
            key = self._on_full(key)
        with self._lock:
            now = self._clock()
            if self.closed:
                refuse()
            spread = random.random() * self._jitter if self._jitter else 0.0  # noqa: S311  # spreads writes
            cell = _Cell(self._tick_of(now + self._interval + spread))
            present = self._settle(key, cell)
            self._count(present, n)
            earliest = present is cell and self._schedule(key, cell.due, now)
        self._ring(earliest=earliest)

    def _settle(self, key: Hashable, cell: _Cell) -> _Cell:
        """Return the key's cell, which is `cell` unless somebody was quicker."""
        self._inserting += 1
        try:
            return self._cells.setdefault(key, cell)
        finally:
            self._inserting -= 1

    def _tick_of(self, moment: float) -> int:
        tick = math.ceil(moment / self._tick)
        return tick if tick * self._tick >= moment else tick + 1  # a quotient may be rounded down

    def _schedule(self, key: Hashable, due: int, born: float) -> bool:
        """Enter a key in the wheel; return whether it is due earlier than all else."""
        bucket = self._wheel.get(due)
        earliest = False
        if bucket is None:
            fresh = _Bucket(due, born)  # allocates: a finalizer may run and be quicker
            bucket = self._wheel.setdefault(due, fresh)
            if bucket is fresh:
                earliest = len(self._cells) == 1 or (not self._due and (not self._ticks or due < self._ticks[0]))
                heappush(self._ticks, due)
        bucket.born = min(bucket.born, born)
        bucket.keys.append(key)
        self._entries += 1
        return earliest

    def _ring(self, *, earliest: bool) -> None:
        if self._wake is None or not (earliest or self._unwoken):
            return
        self._unwoken = True
        try:
            self._unwoken = not self._wake()
        except BaseException:  # noqa: BLE001  # the count is accepted: its caller must not hear otherwise
            report(self._wake)

    # Taking and putting back

    def take_due(self, now: float, limit: int) -> tuple[dict[Any, int], float]:
        """Move up to `limit` keys that are due by `now` out of the table.

        Returns their counts, which the caller owns from then on, and the clock time at which the oldest of them was made
        (inf for none). A count that has come to 0 is dropped.
        """
        with self._lock:
            counts: dict[Hashable, int] = {}
            born = math.inf
            if self._entries > 2 * len(self._cells) + _STALE_ALLOWED:
                self._sift()
            while self._ticks and self._ticks[0] * self._tick <= now:
                self._due.append(self._wheel.pop(heappop(self._ticks)))
            if self._stuck and self._stuck_until <= now:
                born = self._stuck_born
                self._take_stuck(counts)
            while self._due and len(counts) < limit:
                bucket = self._due[0]
                before = len(counts)
                while bucket.keys and len(counts) < limit:
                    self._entries -= 1
                    self._take_key(bucket.keys.pop(), bucket.tick, counts)
                if len(counts) > before:
                    born = min(born, bucket.born)
                if not bucket.keys and self._due and self._due[0] is bucket:
                    self._due.popleft()
            if self._cells and not self._entries and not self._stuck:
                born = 0.0
                self._rescue(counts, limit)
            return counts, (born if counts else math.inf)

    def _rescue(self, counts: dict[Hashable, int], limit: int) -> None:
        """Take cells that no entry leads to: of a key that its own `__eq__` had inserted twice, or whose hash has changed."""
        while self._cells and len(counts) < limit:
            key, cell = self._cells.popitem()
            if cell.count:
                self._hand_over(key, cell.count, counts)

    def take_all(self, limit: int) -> tuple[dict[Any, int], float]:
        """`make_due()`, then `take_due`."""
        with self._lock:
            self.make_due()
            return self.take_due(-math.inf, limit)

    def _take_key(self, key: Hashable, tick: int, counts: dict[Hashable, int]) -> None:
        try:
            found = self._cells.get(key)
            if found is None or found.due != tick:
                return  # taken ahead of its tick, and maybe seen again: not this entry's business
            cell = self._cells.pop(key, None)
        except BaseException:  # noqa: BLE001  # a key's own code
            self._keep(key, 0)
            return
        if cell is not None and cell.count:
            self._hand_over(key, cell.count, counts)

    def _hand_over(self, key: Hashable, n: int, counts: dict[Hashable, int]) -> None:
        try:
            total = counts.get(key, 0) + n
            if not INT64_MIN <= total <= INT64_MAX:
                raise OverflowError(OVERFLOW.format(total - n, n))  # noqa: TRY301  # kept for another take, as the rest
            counts[key] = total
        except BaseException:  # noqa: BLE001
            self._keep(key, n)
        else:
            self._left += n

    def _keep(self, key: Hashable, n: int) -> None:
        """Set aside what an exception, the current one, has kept from moving on; `n` 0: the count is in its cell yet."""
        report(key)
        if not self._stuck:
            self._stuck_born = self._clock()
        self._stuck_until = self._clock() + self._interval
        pair = (key, n)  # allocated before the list is looked up, since a finalizer may take it
        self._stuck.append(pair)

    def _take_stuck(self, counts: dict[Hashable, int]) -> None:
        fresh: list[tuple[Hashable, int]] = []  # allocated first: a finalizer may take what is stuck
        stuck = self._stuck
        self._stuck = fresh
        for key, count in stuck:
            if count:
                self._hand_over(key, count, counts)
                continue
            try:
                cell = self._cells.get(key)
            except BaseException:  # noqa: BLE001
                self._keep(key, 0)
                continue
            if cell is not None:
                self._take_key(key, cell.due, counts)

    def put_back(self, counts: Mapping[Any, int], *, delay: float, born: float) -> None:
        """Add counts that were taken; their keys are due in `delay` seconds, whatever they were. Never raises for a key."""
        earliest = False
        with self._lock:
            due = self._tick_of(self._clock() + delay)
            for key, n in counts.items():
                if not n:
                    continue
                self._left -= n
                try:
                    cell = self._settle(key, _Cell(due))
                    cell.add(n)
                except BaseException:  # noqa: BLE001
                    self._keep(key, n)
                    self._stuck_born = min(self._stuck_born, born)
                else:
                    cell.due = due
                    earliest = self._schedule(key, due, born) or earliest
        self._ring(earliest=earliest)

    def make_due(self) -> None:
        """Have all that is pending due at once; takes time by ticks, not by keys."""
        with self._lock:
            while self._ticks:
                self._due.append(self._wheel.pop(heappop(self._ticks)))
            self._stuck_until = -math.inf

    def make_key_due(self, key: Hashable) -> bool:
        """Have one key due at once; return whether it is pending."""
        with self._lock:
            bucket = _Bucket(self._tick_of(self._clock()), self.oldest())
            bucket.keys.append(key)
            cell = self._cells.get(key)
            if cell is None:
                return self._stuck_count(key) != 0
            cell.due = bucket.tick
            self._due.appendleft(bucket)
            self._entries += 1
            return True

    def _sift(self) -> None:
        """Drop the entries whose keys have left, or are due at another tick."""
        for bucket in [*self._due, *self._wheel.values()]:
            keys, bucket.keys = bucket.keys, []
            kept = [key for key in keys if self._is_due(key, bucket.tick)]
            bucket.keys.extend(kept)
            self._entries -= len(keys) - len(kept)

    def _is_due(self, key: Hashable, tick: int) -> bool:
        try:
            cell = self._cells.get(key)
        except BaseException:  # noqa: BLE001
            return True
        return cell is not None and cell.due == tick

    # Reading: any thread

    def count(self, key: Hashable) -> int:
        """Return what is pending for `key`, 0 if nothing is."""
        with self._lock:
            cell = self._cells.get(key)
            return (cell.count if cell is not None else 0) + self._stuck_count(key)

    def _stuck_count(self, key: Hashable) -> int:
        return sum(count for stuck, count in self._stuck if stuck is key or stuck == key)

    def __len__(self) -> int:
        return len(self._cells) + len(self._stuck)

    def items(self) -> list[tuple[Any, int]]:
        """Return the pairs of key and pending count."""
        with self._lock:
            pairs: list[tuple[Any, int]] = [(key, cell.count) for key, cell in self._cells.items()]
            return [pair for pair in pairs + self._stuck if pair[1]]

    def totals(self) -> tuple[int, int]:
        """Return the sums of what was accepted and of what is pending, at one instant."""
        with self._lock:
            return self._accepted, self._accepted - self._left

    def next_due(self) -> float | None:
        """Return the clock time of the earliest tick that is due; -inf if something is due already, None if nothing is."""
        with self._lock:
            if not len(self):
                return None
            if self._due:
                return -math.inf
            moments = [self._ticks[0] * self._tick] if self._ticks else []
            return min(moments + [self._stuck_until] * bool(self._stuck), default=None)

    def oldest(self) -> float:
        """Return the earliest clock time at which something pending was first counted; inf if nothing is pending."""
        with self._lock:
            line = [*self._due, *self._wheel.values()] if self._cells else []
            buckets = [bucket.born for bucket in line if bucket.keys]
            return min(buckets + [self._stuck_born] * bool(self._stuck), default=math.inf)

    # Life

    def close(self) -> None:
        """Refuse increments from now on; all else goes on working."""
        with self._lock:
            self.closed = True

    def open(self) -> None:
        """Accept increments again."""
        with self._lock:
            self.closed = False

    def forget(self) -> None:
        """Be empty, as if nothing had ever been counted: in a forked child, the counts are the parent's."""
        self._lock = threading.RLock()
        self._cells.clear()
        self._wheel = {}
        self._ticks = []
        self._due = deque()
        self._entries = 0
        self._inserting = 0
        self._stuck = []
        self._stuck_born = self._stuck_until = math.inf
        self._accepted = self._left = 0
        self._unwoken = False

    def release(self) -> None:
        """Give memory back, if nothing is pending. A dict that is cleared inside an insertion can hide the new key (CPython 3.11)."""
        with self._lock:
            if not self._cells and not self._inserting:
                self._cells.clear()
                self._wheel.clear()
                self._ticks.clear()
                self._due.clear()
                self._entries = 0
