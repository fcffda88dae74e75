"""The one thread of a buffer: it waits until something is due, takes it, and hands it over.

Concurrency: callers leave work in `_inbox` and `_asked` (appends to a deque are atomic) and ring the alarm; only the
flusher's thread takes work out, so neither the delivery nor the list of waiters needs a lock. `_lock` guards which thread
is the flusher's; it is reentrant because a finalizer that counts may run inside it. The thread ends when it has been
idle for `timeout` seconds and `wake()` starts a new one: whoever adds work after the thread looked for work the last
time finds `_thread` unset, or is seen by that last look.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from typing import TYPE_CHECKING, Final

from statbuffer._errors import BufferFull

if TYPE_CHECKING:
    from collections.abc import Hashable

    from statbuffer._batch import Settlement
    from statbuffer._clock import Clock
    from statbuffer._delivery import Delivery
    from statbuffer._options import Options
    from statbuffer._stats import Ledger
    from statbuffer._table import CounterTable

log = logging.getLogger("statbuffer")

_END: Final = -1.0


class _All:
    """The key of a request for all keys."""

    def __repr__(self) -> str:
        return "ALL"


ALL: Final = _All()


class Request:
    """Somebody waits until a key, or all that was accepted until `at`, is settled."""

    def __init__(self, key: Hashable, at: float, *, last_chance: bool) -> None:
        self.key = key
        self.at = at
        self.last_chance = last_chance
        self.done = threading.Event()
        self.dead = 0
        self.dropped = 0
        self.abandoned = False
        """The buffer was stopped first."""
        self.to_take = False
        """The key's count is in the table and has to be taken yet; else it is in flight."""

    def note(self, settled: Settlement) -> None:
        """Add up what of the wanted counts will never be stored."""
        self.dead += settled.total(key for key in settled.dead if self.key in (ALL, key))
        self.dropped += settled.total(key for key in settled.dropped if self.key in (ALL, key))


class Flusher:
    """Schedules the delivery of one table to one sink."""

    def __init__(
        self, table: CounterTable, ledger: Ledger, delivery: Delivery, options: Options, clock: Clock, *, name: str
    ) -> None:
        self._table = table
        self._ledger = ledger
        self._delivery = delivery
        self._options = options
        self._clock = clock
        self._name = name
        self._lock = threading.RLock()
        self._alarm = clock.alarm()
        self._thread: int | None = None
        self._starting = False
        self._inbox: deque[tuple[Hashable, int]] = deque()
        self._asked: deque[Request] = deque()
        self._waiting: list[Request] = []
        self._idle_since: float | None = None
        self._halted = False
        self.space = threading.Event()
        """Set at the next take, when there may be room for a new key, and replaced by a new one."""
        self.ended = threading.Event()
        """Set while there is no thread."""
        self.ended.set()

    # Any thread

    def wake(self) -> bool:
        """Make sure that the thread runs and looks for work. Return False if no thread could be started."""
        with self._lock:
            if self._thread is None and not self._starting:
                self._starting = True
                self.ended.clear()
                try:
                    self._clock.spawn(self._run, self._name)
                except RuntimeError:  # no more threads: the count is accepted, and the next new key asks again
                    self._starting = False
                    self.ended.set()
                    log.exception("the flusher thread of %s can't be started; counts wait in memory", self._name)
                    return False
        self._alarm.ring()
        return True

    def is_current_thread(self) -> bool:
        """Whether the caller runs in the flusher's own thread, where waiting for the flusher would be for ever."""
        return self._thread == threading.get_ident()

    def ask(self, key: Hashable, *, last_chance: bool = False) -> Request:
        """Have `key`, or `ALL`, delivered at once; the request says when that is settled.

        While the store fails, it is asked again `backoff` after the latest attempt; at the `last_chance`, at once.
        """
        request = Request(key, self._clock.monotonic(), last_chance=last_chance)
        self._asked.append(request)
        self.wake()
        return request

    def post(self, key: Hashable, count: int) -> None:
        """Leave an increment for the flusher to apply. Signal handlers and finalizers too: takes no lock."""
        if len(self._inbox) >= self._options.max_keys:
            raise BufferFull(key, self._options.max_keys)
        self._inbox.append((key, count))
        if self._thread is None:
            self._clock.defer(self.wake)
        else:
            self._alarm.ring()

    def halt(self) -> None:
        """Have the thread end after the attempt that is under way, whatever is left."""
        self._halted = True
        self._alarm.ring()

    def resume(self) -> None:
        """Take up work again after `halt`."""
        self._halted = False
        if self._has_work():
            self.wake()

    def apply_inbox(self) -> None:
        """Count what was posted. The flusher's thread, or `stop` and `reset` in theirs; one item goes to one of them."""
        while self._inbox:
            try:
                key, count = self._inbox.popleft()
            except IndexError:
                return
            try:
                self._table.increment(key, count)
            except BufferFull:
                self._inbox.appendleft((key, count))
                return
            except Exception:
                log.exception("async_increment(%.200r, %d) was not accepted", key, count)

    # The flusher's thread

    def _run(self) -> None:
        with self._lock:
            self._thread, self._starting = threading.get_ident(), False
        while True:
            try:
                pause = self._step()
            except BaseException:  # without its thread the buffer would keep its counts for ever
                log.exception("%s met an error of its own and goes on", self._name)
                pause = self._options.backoff
            if pause == _END:
                if self._retire():
                    return
            else:
                self._alarm.wait(None if pause == math.inf else max(pause, 0.0))

    def _step(self) -> float:
        """Do all that is due; return the seconds until there is more to do, or `_END`."""
        while not self._halted:
            self.apply_inbox()
            self._accept_requests()
            now = self._clock.monotonic()
            if self._delivery.resume_at > now:
                return self._delivery.resume_at - now
            if self._delivery.batch is None and not self._take(now):
                self._finish_requests()
                return self._until_next(now)
            settled = self._delivery.attempt()
            if settled is not None:
                self._note(settled)
        return _END

    def _take(self, now: float) -> bool:
        with self._ledger.lock:  # a reader of the books finds the counts in the table or in the batch
            batch, born = self._ledger.take(now, self._options.batch_keys)
            if batch is not None:
                self._delivery.load(batch, born)
        space, self.space = self.space, threading.Event()
        space.set()
        for request in self._waiting:
            if batch is not None and request.key is not ALL and request.key in batch.counts:
                request.to_take = False
        return batch is not None

    def _until_next(self, now: float) -> float:
        due = self._table.next_due()
        if due is not None:
            self._idle_since = None
            return due - now
        self._delivery.forget_failures()
        if self._idle_since is None:
            self._idle_since = now
        left = self._idle_since + self._options.timeout - now
        return left if left > 0 else _END

    def _retire(self) -> bool:
        """End this thread, unless work came in at the last moment."""
        self._table.release()
        if self._halted:
            self._abandon_requests()
        with self._lock:
            self._thread = self._idle_since = None
            if self._starting:
                return True
            if self._halted or not self._has_work():
                self.ended.set()
                return True
            self._thread = threading.get_ident()
        return False

    def _has_work(self) -> bool:
        in_flight = self._delivery.batch is not None
        return bool(len(self._table) or self._inbox or self._asked or self._waiting or in_flight)

    def _abandon_requests(self) -> None:
        """Tell those who still wait that nobody delivers any more."""
        waiting, self._waiting = self._waiting, []
        for request in [*waiting, *self._asked]:
            request.abandoned = True
            request.done.set()
        self._asked.clear()

    def _accept_requests(self) -> None:
        while self._asked:
            request = self._asked.popleft()
            self._delivery.hurry(at_once=request.last_chance)
            if request.key is ALL:
                self._table.make_due()
            else:
                request.to_take = self._table.make_key_due(request.key)
            self._waiting.append(request)
        self._finish_requests()

    def _note(self, settled: Settlement) -> None:
        for request in self._waiting:
            request.note(settled)
            if request.key is not ALL and request.key in settled.returned:
                request.to_take = True
        self._finish_requests()

    def _finish_requests(self) -> None:
        if not self._waiting:
            return
        batch = self._delivery.batch
        oldest = min(self._table.oldest(), self._delivery.born)
        left = []
        for request in self._waiting:
            if request.key is ALL:
                waits = oldest <= request.at
            else:
                to_take = request.to_take and self._table.count(request.key) != 0  # it may have come to zero since
                waits = to_take or (batch is not None and request.key in batch.counts)
            if waits:
                left.append(request)
            else:
                request.done.set()
        self._waiting = left
