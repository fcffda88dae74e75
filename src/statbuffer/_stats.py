"""The books: every accepted count is in exactly one place, and `stats()` can prove it at any instant.

Concurrency: the table moves `accepted` and `pending` in one step of its own. All other moves (a take, a settlement, a
put-back) are made here, under the ledger's lock, which a reader of `stats()` holds as well: it never sees a count that
has left one place and not yet reached the next. The lock is held for one take at most (about a millisecond). Order of
locks: ledger, then table; never the other way round.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from statbuffer._batch import Batch, DeadLetter, new_writer_id

if TYPE_CHECKING:
    from collections.abc import Hashable

    from statbuffer._batch import Settlement
    from statbuffer._table import CounterTable


TAKE_KEYS: Final = 2_500
"""Keys that the table hands out at once: about a millisecond, in which no other Python code runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """One instant of a buffer. The first seven are sums of counts, and the first is always the sum of the other six.

    With a journal the sums are still those of this buffer alone: `journaled` is what it has moved there and is not settled,
    `stored` what the host's relay has stored of it, `dropped` also what was lost to a damaged file. `batches`, `attempts`,
    `failures` and `last_flush_seconds` tell of the deliveries to the store that this process has made.
    """

    accepted: int
    stored: int
    pending: int
    in_flight: int
    journaled: int
    dead: int
    dropped: int
    keys: int
    """Distinct keys pending in the table."""
    batches: int
    """Batches that were settled as stored, in whole or in part."""
    attempts: int
    """Calls of the sink's `apply`."""
    failures: int
    """Attempts that did not store the whole batch."""
    failing: bool
    """`max_attempts` or more failures in a row; counts are kept and tried again."""
    oldest_pending_seconds: float
    """Age of the oldest count that is accepted and not yet settled; 0 if there is none."""
    last_error: str | None
    """What the latest failure said; None after a success."""
    last_flush_seconds: float | None
    """How long the latest successful attempt took."""
    table_kind: str
    """"native", or "reference" where no C compiler was at hand."""

    @property
    def balanced(self) -> bool:
        """Whether each accepted count is in exactly one place. False would be a bug of statbuffer: please report it."""
        places = self.stored + self.pending + self.in_flight + self.journaled + self.dead + self.dropped
        return self.accepted == places


class Ledger:
    """Where the counts are that have left the table, and the ids of the batches they travel in."""

    puts_back = True
    """A batch that is known not to be stored goes back to the table, to merge with what has come in since."""

    def __init__(self, table: CounterTable) -> None:
        self._table = table
        self.writer = new_writer_id()
        self._seq = 0
        self.lock = threading.RLock()
        self.in_flight = self.stored = self.dead = self.dropped = 0
        self.batches = self.attempts = self.failures = 0
        self.last_flush_seconds: float | None = None
        self._letters: dict[Hashable, DeadLetter] = {}

    def take(self, now: float, limit: int) -> tuple[Batch | None, float]:
        """Move what is due from the table to flight, `limit` keys at most. Any thread; the caller owns the counts.

        In small steps: the table holds the GIL during each.
        """
        with self.lock:
            counts, born = self._table.take_due(now, min(limit, TAKE_KEYS))
            more = counts
            while more and len(counts) < limit:
                more, earlier = self._table.take_due(now, min(limit - len(counts), TAKE_KEYS))
                born = min(born, earlier)
                if twice := {key: more.pop(key) for key in counts.keys() & more.keys()}:
                    self._table.put_back(twice, delay=0.0, born=earlier)  # seen again since the step before
                counts |= more
            self.in_flight += sum(counts.values())
            return self._batch(counts), born

    def _batch(self, counts: dict[Hashable, int]) -> Batch | None:
        if not counts:
            return None
        self._seq += 1
        return Batch(self.writer, self._seq, counts)

    def settle(self, settlement: Settlement) -> Batch | None:
        """Move a batch from flight to where its counts belong; return the batch that is to be offered in its place."""
        counts = settlement.batch.counts
        by_delay: dict[float, dict[Hashable, int]] = {}
        for key, delay in settlement.returned.items():
            by_delay.setdefault(delay, {})[key] = counts[key]
        with self.lock:
            for delay, group in by_delay.items():
                self._table.put_back(group, delay=delay, born=settlement.born)
            for key, reason in settlement.dead.items():
                before = self._letters[key].count if key in self._letters else 0
                self._letters[key] = DeadLetter(key, counts[key] + before, reason, settlement.batch.id)
            self.in_flight -= settlement.batch.total - settlement.total(settlement.rest)
            self.stored += settlement.stored
            self.dead += settlement.total(settlement.dead)
            self.dropped += settlement.total(settlement.dropped)
            return self._batch({key: counts[key] for key in settlement.rest})

    def dead_letters(self) -> tuple[DeadLetter, ...]:
        """Return what will never be stored, one letter a key."""
        with self.lock:
            return tuple(self._letters.values())

    def revive(self, born: float) -> int:
        """Move the dead letters to the table, due at once; return their sum."""
        with self.lock:
            counts = {letter.key: letter.count for letter in self._letters.values()}
            self._letters.clear()
            self._table.put_back(counts, delay=0.0, born=born)
            total = sum(counts.values())
            self.dead -= total
            return total

    def discard(self, limit: int) -> int:
        """Drop all that is pending, `limit` keys at a time; return the sum."""
        total = 0
        while True:
            with self.lock:
                counts, _ = self._table.take_all(limit)
                if not counts:
                    return total
                dropped = sum(counts.values())
                self.dropped += dropped
            total += dropped
