"""StatBuffer: what users hold."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar, Final

from statbuffer import _lifecycle
from statbuffer._clock import SYSTEM_CLOCK
from statbuffer._delivery import Delivery
from statbuffer._errors import (
    BufferFull,
    FlushFailed,
    FlushTimeout,
    NotApplied,
    NotStarted,
    StatBufferError,
    Stopped,
    Undelivered,
)
from statbuffer._flusher import ALL, Flusher, Request
from statbuffer._options import Options
from statbuffer._report import StopReport
from statbuffer._stats import Ledger, Stats
from statbuffer._table import CounterTable
from statbuffer.sinks import choose_sink

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping
    from types import TracebackType

    from typing_extensions import Self

    from statbuffer._batch import Batch, DeadLetter
    from statbuffer._clock import Clock
    from statbuffer._journal import Journal
    from statbuffer._journaled import Journaled
    from statbuffer.sinks import Sink

log = logging.getLogger("statbuffer")

_SHUTDOWN: Final[Any] = object()
"""Stands for the option `shutdown`, since None means no limit."""


class StatBuffer:
    """Counts in memory, delivers batches to a store in the background.

    Give it a sink, `StatBuffer("sqlite:///views.db", interval=1.0)`, or subclass it and define `handle_flush(key, count)`
    or `handle_batch(batch)`: `class PageViews(StatBuffer, interval=1.0)`. `sink` is a `Sink`, a URL or a callable
    `(key, count)`; options are those of `Options`, the ones given here come before the class's own. Wrong ones raise
    `OptionError`, a missing or doubled sink `TypeError`; nothing is opened before `start()`.

    All methods may be called from any thread.
    """

    class_options: ClassVar[Options] = Options()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__()
        cls.class_options = cls.class_options.replace(**options)

    def __init__(
        self,
        sink: Sink | str | Callable[[Any, int], object] | None = None,
        *,
        clock: Clock = SYSTEM_CLOCK,
        **options: Any,
    ) -> None:
        self.options = self.class_options.replace(**options)
        """The options in force; frozen."""
        self.sink = choose_sink(self, sink, workers=self.options.workers)
        self._clock = clock
        self._state = "new"
        self._state_lock = threading.RLock()
        self._full_request: Request | None = None
        self._journal: Journal | None = None
        if self.options.journal is not None:
            from statbuffer._journaled import open_journal

            self._journal = open_journal(self.sink, self.options, clock.monotonic)
        self._table_options = self.options.until_journal if self._journal else self.options
        self._table = CounterTable(
            interval=self._table_options.interval,
            jitter=self._table_options.jitter,
            tick=self._table_options.tick,
            max_keys=self.options.max_keys,
            clock=clock.monotonic,
            check_key=self._check_key if self._journal else getattr(self.sink, "check_key", None),
            on_full=self._on_full,
            wake=self._wake,
        )
        self._table.close()
        self._assemble()
        _lifecycle.know(self)

    def _assemble(self) -> None:
        """Make what a forked child must not share with its parent."""
        self._ledger = Ledger(self._table)
        options, clock, name = self._table_options, self._clock, f"statbuffer-{type(self).__name__}"
        self._delivery = Delivery(self._journal or self.sink, self._ledger, options, clock)
        self._flusher = Flusher(self._table, self._ledger, self._delivery, options, clock, name=name)
        self._journaled: Journaled | None = None
        if self._journal is not None:
            from statbuffer._journaled import Journaled

            writer = self._ledger.writer
            self._journaled = Journaled(self._journal, self.sink, self.options, clock, name=name, writer=writer)

    def _check_key(self, key: Hashable) -> None:
        """Raise `TypeError` for a key that the journal or the sink can't hold."""
        assert self._journal is not None
        self._journal.check_key(key)
        check = getattr(self.sink, "check_key", None)
        if check is not None:
            check(key)

    # Life

    def start(self) -> Self:
        """Make the sink ready and accept increments from now on; returns the buffer. A running buffer stays as it is.

        Raises `SinkError` if the sink, or the journal, can't work as it is configured. A store that only can't be reached
        now is no error: counts are kept until it can. With a journal, what earlier processes have left in it is delivered.
        """
        with self._state_lock:
            if self._state == "running":
                return self
            self._open()
            self._table.open()
            self._state = "running"
            for name in ("increment", "update"):
                if getattr(type(self), name) is getattr(StatBuffer, name):  # an override must stay in the way
                    self.__dict__[name] = getattr(self._table, name)
            self._flusher.resume()
            if self._journaled is not None:
                self._journaled.resume()
            _lifecycle.enter(self)
        return self

    def _open(self) -> None:
        deliveries = [self._delivery] + ([self._journaled.relay.delivery] if self._journaled else [])
        for delivery in deliveries:
            try:
                delivery.open()
            except NotApplied as error:
                log.warning("%r can't be reached yet; counts are kept until it can: %s", delivery.sink, error)
            except Exception:
                if self._journal is not None:
                    self._journal.close()
                raise

    def stop(self, timeout: float | None = _SHUTDOWN) -> StopReport:
        """Refuse increments from now on, deliver what is left, and report what could not be delivered.

        Returns after `timeout` seconds at the latest (default: the option `shutdown`; None: as long as it takes), even
        while the store hangs. What is left stays in the buffer: another `start()` goes on with it. With a journal all goes
        there first; if another process of the host delivers, the rest is left to that one.
        """
        if timeout is _SHUTDOWN:
            timeout = self.options.shutdown
        self._refuse_in_flusher("stop")
        with self._state_lock:
            if self._state in {"running", "stopping"}:  # stopping: a signal handler raised in the middle of it
                self._state = "stopping"
                for name in ("increment", "update"):
                    self.__dict__.pop(name, None)
                self._flusher.apply_inbox()
                self._table.close()
                self._drain(timeout)
                self._state = "stopped"
                _lifecycle.leave(self)
            return self._report()

    def _drain(self, timeout: float | None) -> None:
        """Deliver until nothing is left or the time is up; then end the thread, and close the sink unless it hangs."""
        deadline = None if timeout is None else self._clock.monotonic() + timeout
        if timeout != 0 and (len(self._table) or self._delivery.batch is not None):
            request = self._flusher.ask(ALL, last_chance=True)
            self._clock.wait(request.done, timeout)
        self._flusher.halt()
        ended = [self._flusher.ended]
        closing: list[Any] = [self.sink]
        if self._journaled is not None:
            self._journaled.finish(_left(deadline, self._clock))
            ended.append(self._journaled.relay.ended)
            closing.append(self._journal)
        if all(self._clock.wait(event, _left(deadline, self._clock)) for event in ended):
            for each in closing:
                if hasattr(each, "close"):
                    each.close()

    def _report(self) -> StopReport:
        journaled = self._journaled.left() if self._journaled else None
        dead: tuple[DeadLetter, ...] = ()
        with contextlib.suppress(StatBufferError):  # a journal that can't be read keeps them all the same
            dead = self.dead_letters()
        with self._ledger.lock:
            pending: Counter[Hashable] = Counter()
            for key, count in self._table.items():  # a key can be listed twice
                pending[key] += count
            return StopReport(
                pending=dict(pending),
                in_flight=self._delivery.batch,
                dead=dead,
                last_error=self._delivery.last_error or (self._journaled.last_error() if self._journaled else None),
                journaled=journaled,
            )

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        report = self.stop()
        if report.complete:
            return
        if error is None:
            raise Undelivered(report)
        log.error("%r stopped with counts that are not stored: %s", self, report)

    # Counting

    def increment(self, key: Hashable, count: int = 1) -> None:
        """Add `count` to what is pending for `key`. In the caller's thread, without I/O; `start()` makes it faster yet.

        Raises `TypeError` (key or count of a wrong type, or a key that the sink can't hold), `OverflowError` (past 64
        bits), `BufferFull`, `NotStarted`, `Stopped`; the increment that raised is not accepted.
        """
        self._require_running()
        self._table.increment(key, count)

    def update(self, counts: Mapping[Any, int] | Iterable[Hashable]) -> None:
        """Add a mapping of counts, or 1 for each key of an iterable, as `collections.Counter.update` does.

        Raises as `increment` does; the items before the one that raised are accepted, that one and the rest are not.
        """
        self._require_running()
        self._table.update(counts)

    def async_increment(self, key: Hashable, count: int = 1) -> None:
        """Leave an increment for the flusher's thread to make. Safe in signal handlers and finalizers: takes no lock.

        It is accepted (and shows in `stats()`) when the flusher makes it, at once. What is known to be wrong raises
        here: `TypeError`, `NotStarted`, `Stopped`, and `BufferFull` when `max_keys` increments wait; what turns out to
        be wrong later (a key that the sink can't hold, overflow) is logged as an error.
        """
        self._require_running()
        hash(key)
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"count={count!r}: expected an int")
        self._flusher.post(key, count)

    def _require_running(self) -> None:
        if self._state == "new":
            raise NotStarted(
                f"{self!r} is not started: call start() or use it in a with statement; nothing was counted"
            )
        if self._state != "running":
            raise Stopped(f"{self!r} is stopped; nothing was counted")

    def _on_full(self, key: Hashable) -> Hashable:
        """Decide on a new key in a full table: raise, wait, or return the key that gets its count. Caller's thread."""
        if self._state == "stopping":  # stop() lets in what async_increment has left, since there is no later
            return key
        self._flush_ahead()
        if self.options.on_full == "fold":
            return self.options.overflow_key
        if self.options.on_full == "block" and not self._flusher.is_current_thread():
            self._wait_for_room(key)
            return key
        raise BufferFull(key, self.options.max_keys)

    def _wait_for_room(self, key: Hashable) -> None:
        timeout = self.options.full_timeout
        deadline = None if timeout is None else self._clock.monotonic() + timeout
        while True:
            space = self._flusher.space
            if len(self._table) < self.options.max_keys or self._table.closed:
                return
            self._flush_ahead()
            left = None if deadline is None else deadline - self._clock.monotonic()
            if (left is not None and left <= 0) or not self._clock.wait(space, left):
                raise BufferFull(key, self.options.max_keys)

    def _flush_ahead(self) -> None:
        """A full buffer does not wait for its interval."""
        if self._full_request is None or self._full_request.done.is_set():
            self._full_request = self._flusher.ask(ALL)

    def _wake(self) -> bool:
        _lifecycle.on_thread_start()
        return self._flusher.wake()

    # Delivering

    def sync(self, timeout: float | None = None) -> None:
        """Move what is pending to the journal at once; return when all that was accepted until now is there.

        From then on no `kill -9` loses it, and with `fsync=True` (the default) no power cut. It may not be stored yet: that
        is what `flush` waits for. Raises `FlushTimeout` after `timeout` seconds (None: waits as long as it takes): the counts
        stay in the buffer. Raises `Stopped` if the buffer is stopped first, `RuntimeError` if it has no journal.
        """
        self._require_running()
        if self._journal is None:
            raise RuntimeError(f"{self!r} has no journal to sync to: pass journal=DIR, or use flush()")
        self._settle(ALL, timeout)

    def flush(self, key: Any = ALL, *, timeout: float | None = None) -> None:
        """Deliver at once what is pending (for `key`, or for all keys) and return when it is stored.

        Raises `FlushTimeout` after `timeout` seconds (None: waits as long as it takes): the counts stay in the buffer.
        Raises `FlushFailed` if some of them became dead letters or were dropped, `Stopped` if the buffer is stopped first.
        """
        self._require_running()
        deadline = None if timeout is None else self._clock.monotonic() + timeout
        self._settle(key, timeout)
        if self._journaled is not None:
            from statbuffer._journaled import text_of

            self._journaled.flush(None if key is ALL else text_of(key), _left(deadline, self._clock))

    def _settle(self, key: Any, timeout: float | None) -> None:
        """Have what is pending taken out of the table and delivered, to the store or to the journal, and wait for it."""
        self._refuse_in_flusher("flush")
        self._flusher.apply_inbox()
        request = self._flusher.ask(key)
        if not self._clock.wait(request.done, timeout):
            assert timeout is not None
            stats = self.stats()
            raise FlushTimeout(timeout, stats.pending + stats.in_flight, stats.last_error)
        if request.abandoned:
            raise Stopped(f"{self!r} was stopped before all was stored; what stop() returned lists the rest")
        if request.dead or request.dropped:
            raise FlushFailed(request.dead, request.dropped)

    def async_flush(self, key: Any = ALL) -> None:
        """Have what is pending (for `key`, or for all keys) delivered at once, without waiting for it."""
        self._require_running()
        if self._journal is None or self._journaled is None:
            self._flusher.ask(key)
        else:
            self._journal.flush_next = bool(len(self._table) or self._delivery.batch)
            self._flusher.ask(key)
            self._journaled.relay.ask_flush()

    def _refuse_in_flusher(self, method: str) -> None:
        if self._flusher.is_current_thread() or (self._journaled and self._journaled.relay.is_current_thread()):
            raise RuntimeError(f"{method}() in the flusher's own thread would wait for itself; use async_flush() there")

    def dead_letters(self) -> tuple[DeadLetter, ...]:
        """Return the counts that the store rejected for good, one letter a key; with a journal, those of the whole host."""
        if self._journal is not None:
            return self._journal.dead_letters()
        return self._ledger.dead_letters()

    def retry_dead_letters(self) -> int:
        """Put all dead letters back to be delivered again, once the reason is mended; return the sum of their counts."""
        self._require_running()
        if self._journaled is not None and self._journal is not None:
            total = self._journal.revive()
            self._journaled.relay.wake()
            return total
        return self._ledger.revive(self._clock.monotonic())

    def reset(self) -> int:
        """Discard what is pending and return its sum, which `stats()` shows as dropped. Meant for tests.

        A batch that is in flight is delivered all the same, and so is what is in the journal; dead letters stay.
        """
        self._flusher.apply_inbox()
        return self._ledger.discard(self.options.batch_keys)

    # Reading

    def count(self, key: Hashable) -> int:
        """Return what is pending for `key` in the table, 0 if nothing is."""
        return self._table.count(key)

    def total(self, key: Hashable) -> int:
        """Return what is stored, in flight and pending for `key`, and what is in the journal, of all processes of the host.

        Reads the store: raises what that raises. Waits for an attempt that is under way, so that no batch is seen twice or
        missed. `TypeError` if the sink can't read (a callback can't).
        """
        return self.totals([key])[key]

    def totals(self, keys: Iterable[Hashable]) -> dict[Hashable, int]:
        """Return `total(key)` for each of `keys`, with one look at the store."""
        wanted = list(keys)
        read = getattr(self.sink, "totals", None)
        if read is None:
            raise TypeError(f"{self.sink!r} can't read: it has no totals(keys); count(key) tells what is pending")
        with self._delivery.attempting:
            with self._ledger.lock:
                batch = self._delivery.batch
                unstored = {key: self._table.count(key) for key in wanted}
            if self._journaled is not None:
                applied, stored = batch is not None and self._journaled.has(batch), self._journaled.totals(wanted, read)
            else:
                applied, stored = self._read_settled(batch, lambda: read(wanted))
        if batch is not None and not applied:
            for key in unstored:
                unstored[key] += batch.counts.get(key, 0)
        return {key: count + stored.get(key, 0) for key, count in unstored.items()}

    def _read_settled(self, batch: Batch | None, read: Callable[[], Any]) -> tuple[bool, Any]:
        """Read the store, and tell whether that saw the batch: its lost answer may still be on its way to COMMIT."""
        while True:
            before, stored = self._is_applied(batch), read()
            if before == self._is_applied(batch):
                return before, stored

    def _is_applied(self, batch: Batch | None) -> bool:
        """Whether a batch in flight is stored already, its answer being lost."""
        applied = getattr(self.sink, "applied", None)
        return batch is not None and self._delivery.frozen and applied is not None and bool(applied(batch))

    def stats(self) -> Stats:
        """Return one consistent instant of the books; `stats().balanced` checks them."""
        with self._ledger.lock:
            accepted, pending = self._table.totals()
            oldest = min(self._table.oldest(), self._delivery.born)
            stats = Stats(
                accepted=accepted,
                stored=self._ledger.stored,
                pending=pending,
                in_flight=self._ledger.in_flight,
                journaled=0,
                dead=self._ledger.dead,
                dropped=self._ledger.dropped,
                keys=len(self._table),
                batches=self._ledger.batches,
                attempts=self._ledger.attempts,
                failures=self._ledger.failures,
                failing=self._delivery.failing,
                oldest_pending_seconds=max(0.0, self._clock.monotonic() - oldest),
                last_error=self._delivery.last_error,
                last_flush_seconds=self._ledger.last_flush_seconds,
                table_kind=self._table.kind,
            )
            return self._journaled.complete(stats, self._delivery.batch) if self._journaled else stats

    def __repr__(self) -> str:
        keys = len(self._table)
        state = self._state if self._state != "running" or not self._delivery.failing else "failing"
        return f"<{type(self).__name__} {state}: {keys} keys pending, to {self.sink!r}>"

    def _before_fork(self) -> None:
        self._tell("before_fork")

    def _after_fork_in_parent(self) -> None:
        self._tell("after_fork_in_parent")

    def _tell(self, what: str) -> None:
        """Tell the sink and the journal about a fork, where they want to know."""
        for each in (self.sink, self._journal):
            hook = getattr(each, what, None)
            if hook is not None:
                hook()

    def _after_fork(self) -> None:
        """Start anew in a forked child. The only thread of the child calls this, before anything else."""
        self._table.forget()
        self._state_lock = threading.RLock()
        self._full_request = None
        self._tell("after_fork")
        self._assemble()


def _left(deadline: float | None, clock: Clock) -> float | None:
    return None if deadline is None else max(0.0, deadline - clock.monotonic())
