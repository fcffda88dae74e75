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

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from statbuffer._table import CounterTable


TAKE_KEYS: Final = 2_500
"""Keys that the table hands out at once: about a millisecond, in which no other Python code runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """One instant of a buffer. The first seven are sums of counts, and the first is always the sum of the other six."""

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
    """Where the counts are that have left the table."""

    def __init__(self, table: CounterTable) -> None:
        self._table = table
        self.lock = threading.RLock()
        self.in_flight = self.stored = self.dead = self.dropped = 0
        self.batches = self.attempts = self.failures = 0
        self.last_flush_seconds: float | None = None

    def take(self, now: float, limit: int) -> tuple[dict[Hashable, int], float]:
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
        return counts, born

    def put_back(self, counts: Mapping[Hashable, int], *, delay: float, born: float) -> None:
        """Move counts from flight to the table, due in `delay` seconds."""
        with self.lock:
            self._table.put_back(counts, delay=delay, born=born)
            self.in_flight -= sum(counts.values())

    def settle(self, *, stored: int = 0, dead: int = 0, dropped: int = 0) -> None:
        """Move sums from flight to where they stay."""
        with self.lock:
            self.in_flight -= stored + dead + dropped
            self.stored += stored
            self.dead += dead
            self.dropped += dropped

    def revive(self, counts: Mapping[Hashable, int], born: float) -> None:
        """Move dead letters to the table, due at once."""
        with self.lock:
            self._table.put_back(counts, delay=0.0, born=born)
            self.dead -= sum(counts.values())

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
