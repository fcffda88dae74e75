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
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from statbuffer._batch import Batch, DeadLetter, new_writer_id
from statbuffer._errors import NotApplied, PartlyApplied, Rejected

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

    from statbuffer._clock import Clock
    from statbuffer._options import Options
    from statbuffer._stats import Ledger
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


@dataclass(frozen=True, slots=True)
class Settled:
    """What one attempt changed for those who wait: which keys went back to the table, and what will never be stored."""

    returned: frozenset[Hashable] = frozenset()
    dead: Mapping[Hashable, int] = field(default_factory=dict)
    dropped: Mapping[Hashable, int] = field(default_factory=dict)


class Delivery:
    """At most one batch in flight, and the memory of what failed."""

    def __init__(self, sink: Sink, ledger: Ledger, options: Options, clock: Clock) -> None:
        self._sink = sink
        self._ledger = ledger
        self._options = options
        self._clock = clock
        self._writer = new_writer_id()
        self._seq = 0
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
        self.dead: dict[Hashable, DeadLetter] = {}

    @property
    def failing(self) -> bool:
        """Whether `max_attempts` or more attempts in a row have failed, for the whole sink or for some key."""
        worst_key = max(self._key_failures.values(), default=0)
        return max(self._failures, worst_key) >= self._options.max_attempts

    def open(self) -> None:
        """Make the sink ready, where it wants that. Raises what the sink raises; called again until it succeeds."""
        opener = getattr(self._sink, "open", None)
        if opener is not None and not self._opened:
            opener()
        self._opened = True

    def load(self, counts: dict[Hashable, int], born: float) -> None:
        """Make the next batch of counts that were taken; the one before must be settled."""
        self._seq += 1
        self.batch, self.born, self.frozen = Batch(self._writer, self._seq, counts), born, False

    def hurry(self, *, at_once: bool) -> None:
        """Somebody waits: forget how long the pauses have become, but stay `backoff` away from the latest attempt.

        Unless `at_once`: the buffer stops, and there may be no other chance.
        """
        self.resume_at = min(self.resume_at, -math.inf if at_once else self._last_attempt + self._options.backoff)

    def forget_failures(self) -> None:
        """Nothing is pending, so no key can be failing: some came to zero or were discarded before they succeeded."""
        self._key_failures.clear()

    def attempt(self) -> Settled | None:
        """Offer the batch once. Return what was settled, or None if the batch stays in flight."""
        batch = self.batch
        assert batch is not None
        with self.attempting:
            error = self._offer(batch)
            if error is not None:
                self._note_failure(error)
            return self._act(next_step(error, frozen=self.frozen, options=self._options), batch, error)

    def _offer(self, batch: Batch) -> BaseException | None:
        started = self._last_attempt = self._clock.monotonic()
        self._ledger.attempts += 1
        try:
            self._open_before_attempt()
            self._sink.apply(batch)
        except BaseException as error:  # noqa: BLE001  # also a handler's sys.exit(): it must not end the flusher
            return error
        self._ledger.last_flush_seconds = self._clock.monotonic() - started
        return None

    def _open_before_attempt(self) -> None:
        try:
            self.open()
        except Exception as error:
            raise NotApplied(f"the sink can't be opened: {error}") from error

    def _act(self, fate: Fate, batch: Batch, error: BaseException | None) -> Settled | None:
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
            return self._drop(batch)
        return self._put_back(batch)

    def _stored(self, batch: Batch) -> Settled:
        if self._failures:
            log.info("delivery works again after %d failures", self._failures)
        self._succeeded(batch.counts)
        if not self._key_failures:
            self.last_error = None
        self._ledger.settle(stored=batch.total)
        self._clear()
        return Settled()

    def _partly_stored(self, batch: Batch, error: PartlyApplied) -> Settled:
        failed = {key: cause for key, cause in error.failed.items() if key in batch.counts}
        if len(failed) < len(batch):
            self._succeeded(key for key in batch.counts if key not in failed)
        dead, dropped, returned = {}, {}, {}
        for key, cause in failed.items():
            if isinstance(cause, Rejected):
                dead[key] = str(cause)
            elif self._options.restart == "temporary":
                dropped[key] = batch.counts[key]
            else:
                returned[key] = batch.counts[key]
        buried = self._make_dead(batch, dead)
        self._put_back_keys(returned)
        lost = sum(dropped.values())
        stored = batch.total - sum(buried.values()) - sum(returned.values()) - lost
        self._ledger.settle(stored=stored, dropped=lost)
        if dropped:
            log.error("dropped %d counts of %d keys (restart='temporary'): %s", lost, len(dropped), error)
        self._clear()
        return Settled(frozenset(returned), buried, dropped)

    def _put_back_keys(self, counts: Mapping[Hashable, int]) -> None:
        """Each failing key has its own pace: it must hold up no other key, and no other key must hurry it."""
        by_failures: dict[int, dict[Hashable, int]] = {}
        for key, count in counts.items():
            failures = self._key_failures[key] = self._key_failures.get(key, 0) + 1
            by_failures.setdefault(failures, {})[key] = count
        for failures, group in by_failures.items():
            self._ledger.put_back(group, delay=pause_after(failures, self._options), born=self.born)

    def _bury(self, batch: Batch, error: Rejected) -> Settled | None:
        reasons = {key: reason for key, reason in error.reasons.items() if key in batch.counts}
        if not reasons:
            log.error("%r rejected keys that are not in the batch %s: %s", self._sink, batch.id, error)
            self._pause()
            return None
        buried = self._make_dead(batch, reasons)
        rest = {key: count for key, count in batch.counts.items() if key not in buried}
        born = self.born
        self._clear()
        if rest:
            self.load(rest, born)
        return Settled(dead=buried)

    def _make_dead(self, batch: Batch, reasons: Mapping[Hashable, str]) -> dict[Hashable, int]:
        buried = {key: batch.counts[key] for key in reasons}
        with self._ledger.lock:
            for key, count in buried.items():
                before = self.dead.get(key)
                self.dead[key] = DeadLetter(key, count + (before.count if before else 0), reasons[key], batch.id)
            self._ledger.settle(dead=sum(buried.values()))
        for key, count in buried.items():
            self._key_failures.pop(key, None)
            log.error("dead letter: %d for key %.200r: %s", count, key, reasons[key])
        return buried

    def _drop(self, batch: Batch) -> Settled:
        log.error("dropped %d counts of %d keys (restart='temporary'): %s", batch.total, len(batch), self.last_error)
        self._ledger.settle(dropped=batch.total)
        self._clear()
        return Settled(dropped=batch.counts)

    def _put_back(self, batch: Batch) -> Settled:
        self._ledger.put_back(batch.counts, delay=0.0, born=self.born)
        self._clear()
        self._pause()
        return Settled(returned=frozenset(batch.counts))

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
        self._ledger.batches += 1
        if self._key_failures:
            for key in keys:
                self._key_failures.pop(key, None)

    def _clear(self) -> None:
        self.batch, self.born, self.frozen, self.resume_at = None, math.inf, False, -math.inf

    def _note_failure(self, error: BaseException) -> None:
        self._ledger.failures += 1
        self.last_error = f"{type(error).__name__}: {error}"
        log.warning("delivery of batch %s failed: %s", self.batch.id if self.batch else "?", self.last_error)
