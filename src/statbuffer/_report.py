"""What `stop()` leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from statbuffer._batch import Batch, DeadLetter


@dataclass(frozen=True, slots=True)
class StopReport:
    """What `stop()` leaves behind: the counts that are in no store, each listed."""

    pending: Mapping[Hashable, int]
    """Known not to be stored."""
    in_flight: Batch | None
    """Offered to the store, which has not answered: stored or not."""
    dead: tuple[DeadLetter, ...]
    last_error: str | None
    journaled: int | None = None
    """The sum that waits in the journal, where the next process that opens it finds it; None without a journal."""

    @property
    def left(self) -> int:
        """The sum of what is in no store as far as is known, the journal and dead letters included."""
        in_flight = self.in_flight.total if self.in_flight else 0
        return (
            sum(self.pending.values()) + in_flight + (self.journaled or 0) + sum(letter.count for letter in self.dead)
        )

    @property
    def complete(self) -> bool:
        """Whether nothing is lost with this process: every accepted count is stored, or in the journal.

        (Or was dropped, by `restart="temporary"` or `reset()`.)
        """
        return not (self.pending or self.in_flight or (self.dead and self.journaled is None))

    def __str__(self) -> str:
        if not self.left:
            return "nothing left"
        parts = [f"{sum(self.pending.values())} pending in {len(self.pending)} keys"]
        if self.journaled:
            parts.append(f"{self.journaled} in the journal")
        if self.in_flight:
            parts.append(f"{self.in_flight.total} in flight, stored or not (batch {self.in_flight.id})")
        if self.dead:
            parts.append(f"{sum(letter.count for letter in self.dead)} in {len(self.dead)} dead letters")
        return "; ".join(parts) + (f"; the store last said: {self.last_error}" if self.last_error else "")
