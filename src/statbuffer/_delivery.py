"""What becomes of a batch.

Loss and doubling: a batch that the sink did not answer for may be stored or not. It is *frozen*: the same id with the
same counts is offered until the sink answers, and nothing else is offered meanwhile. Counts that are known not to be
stored go back to the table, where they merge with what came in since and travel in a later batch, under a new id.

`next_step` decides and changes nothing; `Delivery` acts on it. Only the flusher's thread calls `load` and `attempt`.
"""

from __future__ import annotations

import logging
import math
import random
import threading
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

from statbuffer._batch import Settlement
from statbuffer._errors import NotApplied, PartlyApplied, Rejected

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from statbuffer._batch import Batch
    from statbuffer._clock import Clock
    from statbuffer._options import Options
    from statbuffer.sinks import Sink

log = logging.getLogger("statbuffer")

BACKOFF_CAP = 60.0
"""Seconds: no pause between two attempts is longer, unless `backoff` itself is."""


class Fate(Enum):
    """What to do with a batch after one attempt."""

    STORED = auto()
    PARTLY_STORED = auto()
    BURY = auto()
    """Make dead letters of the rejected keys, offer the rest as a new batch."""
    REPEAT = auto()
    """Outcome unknown: offer the same batch again, unchanged."""
    PUT_BACK = auto()
    DROP = auto()


def next_step(error: BaseException | None, *, frozen: bool, options: Options) -> Fate:
    """Decide on the answer of one attempt (`error` None: stored). `frozen`: an earlier try was not answered."""
    if error is None:
        return Fate.STORED
    if isinstance(error, PartlyApplied):
        return Fate.PARTLY_STORED
    if isinstance(error, Rejected):
        return Fate.BURY
    if options.restart == "temporary":
        return Fate.DROP
    if isinstance(error, NotApplied) and not frozen:
        return Fate.PUT_BACK
    return Fate.REPEAT


def pause_after(failures: int, options: Options) -> float:
    """Return the seconds to wait after so many failures in a row: `backoff`, doubled up to the cap, less up to 20 %."""
    doublings = 0 if options.restart == "permanent" else min(failures - 1, 32)
    pause = min(options.backoff * 2.0**doublings, max(BACKOFF_CAP, options.backoff))
    return pause * random.uniform(0.8, 1.0)  # noqa: S311  # spreads the retries of many processes, guards no secret


class Books(Protocol):
    """Where a settlement is written down: the ledger of a buffer, or a journal."""

    puts_back: bool
    """Whether a batch that is known not to be stored is taken apart; else it is offered again unchanged."""
    batches: int
    attempts: int
    failures: int
    last_flush_seconds: float | None

    def settle(self, settlement: Settlement) -> Batch | None:
        """Move the counts of a batch, all in one step; return the batch of `settlement.rest`, if there is any."""


class Delivery:
    """At most one batch in flight, and the memory of what failed."""

    def __init__(self, sink: Sink, books: Books, options: Options, clock: Clock) -> None:
        self.sink = sink
        self._books = books
        self._options = options
        self._clock = clock
        self._opened = False
        self._failures = 0
        self._key_failures: dict[Hashable, int] = {}
        self._last_attempt = -math.inf
        self.attempting = threading.Lock()
        """Held from an attempt's start until the books show its end: a reader of the store and the books holds it too."""
        self.batch: Batch | None = None
        self.born = math.inf
        self.frozen = False
        self.resume_at = -math.inf
        """Clock time before which nothing is offered."""
        self.last_error: str | None = None
        self._unwritten: Settlement | None = None
        """The sink has answered, but the books could not be written: only that is to be tried again."""

    @property
    def failing(self) -> bool:
        """Whether `max_attempts` or more attempts in a row have failed, for the whole sink or for some key."""
        worst_key = max(self._key_failures.values(), default=0)
        return max(self._failures, worst_key) >= self._options.max_attempts

    def open(self) -> None:
        """Make the sink ready, where it wants that. Raises what the sink raises; called again until it succeeds."""
        opener = getattr(self.sink, "open", None)
        if opener is not None and not self._opened:
            opener()
        self._opened = True

    def load(self, batch: Batch, born: float) -> None:
        """Make `batch` the one to offer; the one before must be settled."""
        self.batch, self.born, self.frozen = batch, born, False

    def hurry(self, *, at_once: bool) -> None:
        """Somebody waits: forget how long the pauses have become, but stay `backoff` away from the latest attempt.

        Unless `at_once`: the buffer stops, and there may be no other chance.
        """
        self.resume_at = min(self.resume_at, -math.inf if at_once else self._last_attempt + self._options.backoff)

    def forget(self) -> None:
        """Let go of the batch: somebody else has had charge of it since, or its books are gone."""
        self.batch, self.born, self.frozen, self._unwritten = None, math.inf, False, None

    def forget_failures(self) -> None:
        """Nothing is pending, so no key can be failing: some came to zero or were discarded before they succeeded."""
        self._key_failures.clear()

    def attempt(self) -> Settlement | None:
        """Offer the batch once. Return what became of it, or None if it stays in flight. Raises what the books raise."""
        batch = self.batch
        assert batch is not None
        with self.attempting:
            if self._unwritten is not None:
                return self._settle(self._unwritten)
            error = self._offer(batch)
            if error is not None:
                self._note_failure(error)
            frozen = self.frozen or not self._books.puts_back
            return self._act(next_step(error, frozen=frozen, options=self._options), batch, error)

    def _offer(self, batch: Batch) -> BaseException | None:
        started = self._last_attempt = self._clock.monotonic()
        self._books.attempts += 1
        try:
            self._open_before_attempt()
            self.sink.apply(batch)
        except BaseException as error:  # noqa: BLE001  # also a handler's sys.exit(): it must not end the flusher
            return error
        self._books.last_flush_seconds = self._clock.monotonic() - started
        return None

    def _open_before_attempt(self) -> None:
        try:
            self.open()
        except Exception as error:
            raise NotApplied(f"the sink can't be opened: {error}") from error

    def _act(self, fate: Fate, batch: Batch, error: BaseException | None) -> Settlement | None:
        if fate is Fate.STORED:
            return self._stored(batch)
        if fate is Fate.PARTLY_STORED:
            assert isinstance(error, PartlyApplied)
            return self._partly_stored(batch, error)
        if fate is Fate.BURY:
            assert isinstance(error, Rejected)
            return self._bury(batch, error)
        if fate is Fate.REPEAT:
            self.frozen = True
            self._pause()
            return None
        if fate is Fate.DROP:
            return self._settle(Settlement(batch, dropped=tuple(batch.counts), born=self.born))
        return self._put_back(batch)

    def _settle(self, settlement: Settlement) -> Settlement:
        self._unwritten = settlement
        rest = self._books.settle(settlement)
        self._unwritten = None
        for key, reason in settlement.dead.items():
            self._key_failures.pop(key, None)
            log.error("dead letter: %d for key %.200r: %s", settlement.batch.counts[key], key, reason)
        if lost := settlement.total(settlement.dropped):
            keys = len(settlement.dropped)
            log.error("dropped %d counts of %d keys (restart='temporary'): %s", lost, keys, self.last_error)
        self.batch, self.born, self.frozen, self.resume_at = None, math.inf, False, -math.inf
        if rest is not None:
            self.load(rest, settlement.born)
        return settlement

    def _stored(self, batch: Batch) -> Settlement:
        if self._failures:
            log.info("delivery works again after %d failures", self._failures)
        settlement = self._settle(Settlement(batch, born=self.born))
        self._succeeded(batch.counts)
        if not self._key_failures:
            self.last_error = None
        return settlement

    def _partly_stored(self, batch: Batch, error: PartlyApplied) -> Settlement:
        failed = {key: cause for key, cause in error.failed.items() if key in batch.counts}
        dead = {key: str(cause) for key, cause in failed.items() if isinstance(cause, Rejected)}
        others = [key for key in failed if key not in dead]
        if self._options.restart == "temporary":
            settlement = Settlement(batch, dead, dropped=others, born=self.born)
        else:
            settlement = Settlement(batch, dead, returned=self._own_pace(others), born=self.born)
        self._settle(settlement)
        if len(failed) < len(batch):
            self._succeeded(key for key in batch.counts if key not in failed)
        return settlement

    def _own_pace(self, keys: Iterable[Hashable]) -> dict[Hashable, float]:
        """Each failing key has its own pace: it must hold up no other key, and no other key must hurry it."""
        pauses: dict[int, float] = {}  # one for all keys that have failed as often
        delays = {}
        for key in keys:
            failures = self._key_failures[key] = self._key_failures.get(key, 0) + 1
            delays[key] = pauses.setdefault(failures, pause_after(failures, self._options))
        return delays

    def _bury(self, batch: Batch, error: Rejected) -> Settlement | None:
        reasons = {key: reason for key, reason in error.reasons.items() if key in batch.counts}
        if not reasons:
            log.error("%r rejected keys that are not in the batch %s: %s", self.sink, batch.id, error)
            self._pause()
            return None
        rest = [key for key in batch.counts if key not in reasons]
        return self._settle(Settlement(batch, reasons, rest=rest, born=self.born))

    def _put_back(self, batch: Batch) -> Settlement:
        settlement = self._settle(Settlement(batch, returned=dict.fromkeys(batch.counts, 0.0), born=self.born))
        self._pause()
        return settlement

    def _pause(self) -> None:
        self._failures += 1
        self.resume_at = self._clock.monotonic() + pause_after(self._failures, self._options)
        if self._failures == self._options.max_attempts:
            log.error(
                "%d deliveries in a row have failed; counts are kept and tried again: %s",
                self._failures,
                self.last_error,
            )

    def _succeeded(self, keys: Iterable[Hashable]) -> None:
        self._failures = 0
        self._books.batches += 1
        if self._key_failures:
            for key in keys:
                self._key_failures.pop(key, None)

    def _note_failure(self, error: BaseException) -> None:
        self._books.failures += 1
        self.last_error = f"{type(error).__name__}: {error}"
        log.warning("delivery of batch %s failed: %s", self.batch.id if self.batch else "?", self.last_error)
