"""For your tests: a clock that you turn, a store in memory, a store that fails on demand, and a suite for your own sink.

clock = FakeClock()
sink = MemorySink()
with StatBuffer(sink, clock=clock, interval=5.0) as views:
    views.increment("/home")
    clock.advance(5.1)                   # returns when the flusher has done all that was due by then
    assert sink.counts == {"/home": 1}
"""

from __future__ import annotations

import math
import random
import threading
from collections import Counter
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any

from statbuffer._batch import Batch, new_writer_id
from statbuffer._errors import NotApplied, Rejected

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

    from statbuffer._clock import Alarm
    from statbuffer.sinks import Sink

__all__ = ["FakeClock", "Fault", "FaultySink", "MemorySink", "check_sink"]


class _FakeAlarm:
    """An alarm whose waiter sleeps until it is rung or the fake time has come."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self._rung = False

    def ring(self) -> None:
        with self._clock.changed:
            self._rung = True
            self._clock.wake_sleeper(self)

    def wait(self, timeout: float | None) -> None:
        with self._clock.changed:
            if not self._rung:
                self._clock.sleep_until(self, math.inf if timeout is None else self._clock.monotonic() + timeout)
            self._rung = False


class FakeClock:
    """Time that moves only when you `advance` it, with real threads. Pass it as `StatBuffer(..., clock=clock)`.

    While a caller waits inside `flush()` or `stop()`, and every thread of the buffer sleeps, time jumps to the next
    moment at which something happens, so nothing hangs and nothing takes real time.
    """

    def __init__(self, now: float = 1_000.0) -> None:
        self._now = now
        self.changed = threading.Condition(threading.RLock())
        self._busy = 0  # threads of buffers that are not asleep
        self._threads: set[int] = set()  # those threads
        self._sleepers: dict[object, float] = {}  # alarm, or a thread's token -> clock time

    def monotonic(self) -> float:
        """Return the fake time in seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move time on, stopping at each moment when a sleeper is due; return when all threads sleep again."""
        with self.changed:
            target = self._now + seconds
            self._settle()
            while (moment := min(self._sleepers.values(), default=math.inf)) <= target:
                self._move_to(moment)
                self._settle()
            self._now = max(self._now, target)

    def sleep(self, seconds: float) -> None:
        """Sleep in fake time: a buffer's own thread until somebody advances the clock that far, any other advances it.

        A callback can sleep with `workers=1` only: the clock does not know the threads of a pool.
        """
        if threading.get_ident() not in self._threads:
            self.advance(seconds)
            return
        with self.changed:
            self.sleep_until(object(), self._now + seconds)

    def alarm(self) -> Alarm:
        """Return an alarm on this clock."""
        return _FakeAlarm(self)

    def wait(self, event: threading.Event, timeout: float | None) -> bool:
        """Wait for an event that a buffer's thread sets; while all of those sleep, time jumps."""
        with self.changed:
            deadline = math.inf if timeout is None else self._now + timeout
            while not event.is_set() and self._now < deadline:
                if self._busy:
                    self.changed.wait()
                    continue
                moment = min(deadline, *self._sleepers.values(), math.inf)
                if moment == math.inf:
                    raise RuntimeError("every thread sleeps for ever: this wait would never end")
                self._move_to(moment)
            return event.is_set()

    def spawn(self, target: Callable[[], None], name: str) -> None:
        """Run `target` in a daemon thread that `advance` waits for."""
        with self.changed:
            self._busy += 1
        threading.Thread(target=self._run, args=(target,), name=name, daemon=True).start()

    def defer(self, target: Callable[[], object]) -> None:
        """Run `target` in a thread that `advance` waits for."""
        self.spawn(lambda: (target(), None)[1], "deferred")

    def sleep_until(self, sleeper: object, moment: float) -> None:
        """Put the calling thread to sleep; `changed` is held."""
        self._sleepers[sleeper] = moment
        self._busy -= 1
        self.changed.notify_all()
        while sleeper in self._sleepers:
            self.changed.wait()

    def wake_sleeper(self, sleeper: object) -> None:
        """Wake one sleeper; `changed` is held. It counts as busy from here on, so nobody overtakes it."""
        if self._sleepers.pop(sleeper, None) is not None:
            self._busy += 1
            self.changed.notify_all()

    def _move_to(self, moment: float) -> None:
        self._now = max(self._now, moment)
        for sleeper in [sleeper for sleeper, due in self._sleepers.items() if due <= self._now]:
            self.wake_sleeper(sleeper)

    def _settle(self) -> None:
        while self._busy:
            self.changed.wait()

    def _run(self, target: Callable[[], None]) -> None:
        self._threads.add(threading.get_ident())
        try:
            target()
        finally:
            with self.changed:
                self._threads.discard(threading.get_ident())
                self._busy -= 1
                self.changed.notify_all()


class MemorySink:
    """An exact sink that keeps its counts in a dict: the store of your tests."""

    exact = True
    target = "memory"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watermarks: dict[str, int] = {}
        self.counts: Counter[Hashable] = Counter()
        """What is stored. A key whose count came to 0 stays."""
        self.batches: list[Batch] = []
        """The batches that were applied, without the repeats."""

    def apply(self, batch: Batch) -> None:
        """Add the batch's counts, unless it was applied before."""
        with self._lock:
            if batch.seq <= self._watermarks.get(batch.writer, 0):
                return
            self._watermarks[batch.writer] = batch.seq
            self.batches.append(batch)
            for key, count in batch.counts.items():
                self.counts[key] += count

    def applied(self, batch: Batch) -> bool:
        """Return whether the batch is stored."""
        with self._lock:
            return batch.seq <= self._watermarks.get(batch.writer, 0)

    def totals(self, keys: Iterable[Hashable]) -> dict[Hashable, int]:
        """Return what is stored for `keys`; keys that were never stored are left out."""
        with self._lock:
            return {key: self.counts[key] for key in keys if key in self.counts}

    def __repr__(self) -> str:
        return f"<MemorySink: {len(self.counts)} keys>"


class Fault(Enum):
    """What a `FaultySink` does at one call of `apply`."""

    NONE = "store the batch and answer"
    REFUSE = "store nothing and say so: NotApplied"
    LOSE_REQUEST = "store nothing and answer nothing: ConnectionError"
    LOSE_ANSWER = "store the batch and answer nothing: ConnectionError"


class FaultySink:
    """Wraps a sink and fails on demand.

    `script` gives the faults of the first calls, one a call (an exception instance is raised as it is, with nothing
    stored); after it, a seeded sink draws them for ever (`rate` is the share of calls that fail) and an unseeded one
    stores. `reject` maps keys to the reason for which they are rejected. `slow` seconds pass on `clock` at each call.
    """

    def __init__(
        self,
        inner: Sink,
        script: Iterable[Fault | BaseException] = (),
        *,
        seed: int | None = None,
        rate: float = 0.5,
        reject: Mapping[Hashable, str] | None = None,
        slow: float = 0.0,
        clock: FakeClock | None = None,
    ) -> None:
        self.inner = inner
        self.exact = inner.exact
        self.reject = dict(reject or {})
        self.offered: list[Batch] = []
        """Every batch that was offered, the repeats too."""
        self._script = iter(script)
        self._random = None if seed is None else random.Random(seed)  # noqa: S311  # a repeatable test
        self._rate = rate
        self._slow = slow
        self._clock = clock or FakeClock()

    def apply(self, batch: Batch) -> None:
        """Pass the batch on, or fail as the script says."""
        self.offered.append(batch)
        if self._slow:
            self._clock.sleep(self._slow)
        fault = next(self._script, None) or self._draw()
        if isinstance(fault, BaseException):
            raise fault
        if fault is Fault.REFUSE:
            raise NotApplied("FaultySink refuses")
        if fault is Fault.LOSE_REQUEST:
            raise ConnectionError("FaultySink loses the request")
        self._apply(batch)
        if fault is Fault.LOSE_ANSWER:
            raise ConnectionError("FaultySink loses the answer")

    def __getattr__(self, name: str) -> Any:
        """Have all else done by the wrapped sink: `totals`, `check_key`, `open` and the like, if it has them."""
        return getattr(self.inner, name)

    def _apply(self, batch: Batch) -> None:
        rejected = {key: self.reject[key] for key in batch.counts if key in self.reject}
        if rejected and not (hasattr(self.inner, "applied") and self.inner.applied(batch)):
            raise Rejected.many(rejected)
        self.inner.apply(batch)

    def _draw(self) -> Fault:
        if self._random is None or self._random.random() >= self._rate:
            return Fault.NONE
        return self._random.choice([Fault.REFUSE, Fault.LOSE_REQUEST, Fault.LOSE_ANSWER])

    def __repr__(self) -> str:
        return f"<FaultySink around {self.inner!r}>"


def check_sink(
    make_sink: Callable[[], Sink],
    *,
    key: Callable[[int], Hashable] = lambda number: f"key-{number}",
    read: Callable[[Sink, Sequence[Hashable]], Mapping[Hashable, int]] | None = None,
) -> list[str]:
    """Try a sink against the contract of `statbuffer.sinks.Sink`; return the clauses that held.

    `make_sink` returns a sink on a store that holds none of the suite's keys, at each call; `key` makes the keys (say
    `lambda n: ("tenant", n)`); `read(sink, keys)` reads the stored counts of a sink that has no `totals`. Raises
    `AssertionError` naming the clause that does not hold. A sink that is not exact is not offered repeats.
    """
    held = []
    for clause in _CLAUSES:
        sink = make_sink()
        with _opened(sink):
            if clause is _check_repeats and not sink.exact:
                continue
            reader = read or (lambda sink, keys: sink.totals(keys))  # type: ignore[attr-defined]
            try:
                clause(_Bench(sink, key, reader))
            except AssertionError as error:
                raise AssertionError(f"{sink!r} breaks the contract: {clause.__doc__} {error}") from error
            held.append(str(clause.__doc__))
    return held


@contextmanager
def _opened(sink: Sink) -> Iterator[None]:
    if hasattr(sink, "open"):
        sink.open()
    try:
        yield
    finally:
        if hasattr(sink, "close"):
            sink.close()


class _Bench:
    """One sink under test, and what it should hold."""

    def __init__(
        self,
        sink: Sink,
        key: Callable[[int], Hashable],
        read: Callable[[Sink, Sequence[Hashable]], Mapping[Hashable, int]],
    ) -> None:
        self.sink = sink
        self.writer = new_writer_id()
        self.key = key
        self._read = read
        self._expected: Counter[Hashable] = Counter()

    def batch(self, seq: int, counts: Mapping[int, int], writer: str | None = None) -> Batch:
        return Batch(writer or self.writer, seq, {self.key(number): count for number, count in counts.items()})

    def apply(self, batch: Batch, *, repeat: bool = False) -> None:
        self.sink.apply(batch)
        if repeat:
            self.compare()
        else:
            self.expect(batch)

    def expect(self, batch: Batch) -> None:
        self.add(batch)
        self.compare()

    def add(self, batch: Batch) -> None:
        for key, count in batch.counts.items():
            self._expected[key] += count

    def compare(self) -> None:
        stored = self._read(self.sink, list(self._expected))
        for key, count in self._expected.items():
            assert stored.get(key, 0) == count, f"{key!r:.80} should be {count}, is {stored.get(key, 0)}"


def _check_adds(bench: _Bench) -> None:
    """A batch is added to what is stored, key by key, below zero too."""
    bench.apply(bench.batch(1, {1: 5, 2: -3}))
    bench.apply(bench.batch(2, {2: 10, 3: 1}))
    bench.apply(bench.batch(3, {1: -7}))


def _check_wide_counts(bench: _Bench) -> None:
    """Counts are exact up to 63 bits."""
    bench.apply(bench.batch(1, {1: 2**62 + 1, 2: -(2**62) - 1, 3: 2**53 + 1}))
    bench.apply(bench.batch(2, {1: -(2**62), 3: 2}))


def _check_large_batch(bench: _Bench) -> None:
    """A batch of 10,000 keys is stored whole."""
    bench.apply(bench.batch(1, {number: number + 1 for number in range(10_000)}))
    bench.apply(bench.batch(2, dict.fromkeys(range(0, 20_000, 2), 1)))


def _check_repeats(bench: _Bench) -> None:
    """An exact sink stores a batch id once; numbers may be skipped, and each writer has its own."""
    first, second = bench.batch(1, {1: 1}), bench.batch(5, {1: 10, 2: 10})
    bench.apply(first)
    bench.apply(first, repeat=True)
    bench.apply(second)
    bench.apply(second, repeat=True)
    bench.apply(first, repeat=True)
    other = bench.batch(1, {1: 100}, writer=new_writer_id())
    bench.apply(other)
    bench.apply(other, repeat=True)


def _check_rejection(bench: _Bench) -> None:
    """A sink that rejects a batch stores nothing of it, names keys of the batch, and takes the rest afterwards."""
    bench.apply(bench.batch(1, {1: 2**62}))
    overflow = bench.batch(2, dict.fromkeys(range(4), 2**62))
    reasons = _rejections(bench, overflow)
    if not reasons:  # a store of unbounded integers
        bench.expect(overflow)
        return
    assert all(key in overflow.counts for key in reasons), "Rejected names keys that are not in the batch"
    bench.compare()
    bench.apply(bench.batch(3, {number: 2**62 for number in range(4) if bench.key(number) not in reasons}))


def _rejections(bench: _Bench, batch: Batch) -> Mapping[Hashable, str]:
    try:
        bench.sink.apply(batch)
    except Rejected as error:
        return error.reasons
    return {}


def _check_threads(bench: _Bench) -> None:
    """Batches of many writers at once are all stored."""
    batches = [bench.batch(1, dict.fromkeys(range(50), 1), writer=new_writer_id()) for _ in range(8)]
    threads = [threading.Thread(target=_apply_until_stored, args=(bench.sink, batch)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batch in batches:
        bench.add(batch)
    bench.compare()


def _apply_until_stored(sink: Sink, batch: Batch, tries: int = 100) -> None:
    for _ in range(tries):
        try:
            sink.apply(batch)
        except NotApplied:
            continue
        return


_CLAUSES = (_check_adds, _check_wide_counts, _check_large_batch, _check_repeats, _check_rejection, _check_threads)
