"""What a buffer has beyond its table when it has a journal: the way from there to the store, and what can be asked of it.

The buffer's own flusher delivers to the journal as to any sink. This is the other half, which all buffers of the host share.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from statbuffer._batch import Batch
from statbuffer._errors import FlushFailed, FlushTimeout, NotApplied, StatBufferError, Stopped
from statbuffer._journal import Journal
from statbuffer._keys import encode
from statbuffer._relay import LOOK, Relay

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping

    from statbuffer._clock import Clock
    from statbuffer._journal import Account
    from statbuffer._options import Options
    from statbuffer._stats import Stats
    from statbuffer.sinks import Sink

log = logging.getLogger("statbuffer")

_LOOKS: Final = 3
"""How often a process that ends looks for what others have left since: while they live, they will deliver themselves."""


def open_journal(sink: Sink, options: Options, monotonic: Callable[[], float]) -> Journal:
    """Return the journal that the options name, for counts that go to `sink`; nothing is opened."""
    assert options.journal is not None
    return Journal(
        options.journal,
        target=target_of(sink),
        fsync=options.fsync,
        bytes_max=options.journal_bytes_max,
        monotonic=monotonic,
    )


def target_of(sink: Sink) -> str:
    """Return what counts are for that go to this sink."""
    return str(getattr(sink, "target", type(sink).__qualname__))


class Journaled:
    """One buffer's share in the journal of its host."""

    def __init__(self, journal: Journal, sink: Sink, options: Options, clock: Clock, *, name: str, writer: str) -> None:
        self._journal = journal
        self._sink = sink
        self._clock = clock
        self._writer = writer
        self._account: Account | None = None
        self._halted = False
        self.relay = Relay(journal, sink, options, clock, name=f"{name}-relay")
        journal.on_move = self.relay.wake

    # Delivering

    def flush(self, key: str | None, timeout: float | None) -> None:
        """Wait until all that this buffer has moved to the journal (of one key text) is stored. Raises as `flush` does."""
        deadline = math.inf if timeout is None else self._clock.monotonic() + timeout
        before = self._read_account()
        upto: int | None = None
        while True:
            try:
                if upto is None:
                    upto = self._journal.ask_flush()
                    self.relay.wake()
                progress = self.relay.progress
                if not self._journal.has_moves(self._writer, upto, key):
                    break
                problem = None
            except NotApplied as error:
                problem, progress = str(error), self.relay.progress
            if self._halted:
                raise Stopped("the buffer was stopped before all was stored; the rest is in the journal")
            left = deadline - self._clock.monotonic()
            if left <= 0:
                account = self._read_account()
                raise FlushTimeout(timeout or 0.0, account.journaled if account else 0, problem or self.last_error())
            self._clock.wait(progress, min(LOOK, left))
        self._raise_for_losses(before, self._read_account())

    @staticmethod
    def _raise_for_losses(before: Account | None, after: Account | None) -> None:
        if after is not None:
            dead = after.dead - (before.dead if before else 0)
            dropped = after.dropped - (before.dropped if before else 0)
            if dead > 0 or dropped > 0:
                raise FlushFailed(max(dead, 0), max(dropped, 0))

    def finish(self, timeout: float | None) -> None:
        """Deliver what is in the journal, if this process is the one to do so, and end the relay; at once with timeout 0.

        A process that ends at the same time and finds the lock taken leaves its counts here. So, once the lock is free, one
        more look: whoever has moved counts before that saw it taken, whoever moves some later finds it free.
        """
        deadline = math.inf if timeout is None else self._clock.monotonic() + timeout
        for _ in range(_LOOKS):
            left = deadline - self._clock.monotonic()
            if left <= 0:
                break
            self.relay.resume()  # it may have been halted by a stop() that a signal handler has interrupted
            self._drain(deadline)
            self.relay.halt(close=False)
            ended = self._clock.wait(self.relay.ended, max(0.0, deadline - self._clock.monotonic()))
            if not ended or self._is_empty():
                break
        self._halted = True
        self.relay.halt(close=True)

    def _is_empty(self) -> bool:
        try:
            return self._journal.is_empty()
        except NotApplied:
            return True

    def _drain(self, deadline: float) -> None:
        upto: int | None = None
        self.relay.tried.clear()
        self.relay.wake()
        self._clock.wait(self.relay.tried, None if deadline == math.inf else deadline - self._clock.monotonic())
        while self.relay.delivers and (left := deadline - self._clock.monotonic()) > 0:
            progress = self.relay.progress
            try:
                upto = self._journal.ask_flush() if upto is None else upto
                if not self._journal.has_moves(None, upto):
                    return
            except NotApplied as error:
                log.warning("%r: %s", self._journal, error)
            self.relay.wake()
            self._clock.wait(progress, min(LOOK, left))

    def resume(self) -> None:
        """Have what is in the journal delivered."""
        self._halted = False
        self.relay.resume()

    # Asking

    def left(self) -> int:
        """Return the sum of this buffer's counts that are in the journal and not settled."""
        account = self._read_account()
        return account.journaled if account else 0

    def last_error(self) -> str | None:
        """Return what the latest failure on the way from the journal to the store said, here or in the process that delivers."""
        own = self.relay.error or self.relay.delivery.last_error
        return own or (None if self.relay.delivers else self._pulse().get("last_error"))

    def _failing(self) -> bool:
        own = self.relay.error is not None or self.relay.delivery.failing
        return own or (not self.relay.delivers and bool(self._pulse().get("failing")))

    def _pulse(self) -> dict[str, Any]:
        try:
            return self._journal.pulse()
        except StatBufferError:
            return {}

    def _read_account(self) -> Account | None:
        try:
            self._account = self._journal.account(self._writer)
        except StatBufferError as error:  # the latest one known is the best there is
            log.debug("%r can't be read: %s", self._journal, error)
        return self._account

    def complete(self, stats: Stats, batch: Batch | None) -> Stats:
        """Return a buffer's stats with what has become of the counts since they left it. The ledger's lock is held.

        `stats.stored` comes in as what was moved to the journal; `batch` is on its way there, or there without an answer.
        """
        account = self._read_account()
        seals = self.relay.seals
        stats = replace(
            stats,
            batches=seals.batches,
            attempts=seals.attempts,
            failures=seals.failures,
            last_flush_seconds=seals.last_flush_seconds,
            failing=stats.failing or self._failing(),
            last_error=stats.last_error or self.last_error(),
        )
        if account is None:
            return stats
        moved, in_flight = stats.stored, stats.in_flight
        if batch is not None and batch.seq <= account.seq:
            moved, in_flight = moved + in_flight, 0
        forgotten = max(0, moved - account.moved)  # settled so long ago that the journal has dropped its books
        lost = moved - forgotten - account.journaled - account.stored - account.dead - account.dropped
        return replace(
            stats,
            stored=account.stored + forgotten,
            in_flight=in_flight,
            journaled=account.journaled,
            dead=account.dead,
            dropped=stats.dropped + account.dropped + lost,
            oldest_pending_seconds=max(stats.oldest_pending_seconds, self._age(account)),
        )

    def _age(self, account: Account) -> float:
        return 0.0 if account.oldest is None else self._clock.monotonic() - account.oldest

    def has(self, batch: Batch) -> bool:
        """Return whether a batch of this buffer, whose answer was lost, is in the journal."""
        account = self._journal.account(self._writer)
        return account is not None and account.seq >= batch.seq

    def totals(
        self, keys: list[Hashable], read: Callable[[Iterable[Hashable]], Mapping[Hashable, int]]
    ) -> dict[Hashable, int]:
        """Return what is in the journal, of all buffers of the host, and in the store."""
        while True:
            settled, waiting, offered = self._journal.unsettled(keys)
            applied = self._is_applied(offered)
            stored = read(keys)
            if (settled, applied) == (self._journal.unsettled([])[0], self._is_applied(offered)):
                break
        twice = self._journal.on_offer(keys) if applied else {}
        return {key: waiting.get(key, 0) - twice.get(key, 0) + stored.get(key, 0) for key in keys}

    def _is_applied(self, offered: tuple[str, int] | None) -> bool:
        applied = getattr(self._sink, "applied", None)
        return offered is not None and applied is not None and bool(applied(Batch(*offered, {})))


def text_of(key: Hashable) -> str | None:
    """Return a key's text, None for a key that has none: nothing of it can be in a journal."""
    try:
        return encode(key)
    except TypeError:
        return None
