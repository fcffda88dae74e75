"""What travels: a batch of counts on its way to a store, and the letters that came back for good."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping


def new_writer_id() -> str:
    """Return a fresh random writer id: 32 hexadecimal digits, never used before by anybody."""
    return uuid4().hex


@dataclass(frozen=True, slots=True)
class Batch:
    """Counts that were taken together and are stored together, or not at all.

    `(writer, seq)` names the batch for ever: whenever the same pair is offered again, it holds the same counts, so a
    store that remembers the highest `seq` of each writer can recognise a repeat. A writer's batches come in order of
    `seq`, one at a time; numbers may be skipped, never used again.
    """

    writer: str
    seq: int
    counts: Mapping[Any, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", MappingProxyType(self.counts))

    @property
    def id(self) -> str:
        """The batch id as one string, `writer:seq`: the idempotency key for stores that take one."""
        return f"{self.writer}:{self.seq}"

    @property
    def total(self) -> int:
        """The sum of all counts in the batch."""
        return sum(self.counts.values())

    def __len__(self) -> int:
        return len(self.counts)

    def __hash__(self) -> int:
        return hash((self.writer, self.seq))

    def __repr__(self) -> str:
        return f"<Batch {self.id}: {len(self)} keys, sum {self.total}>"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A count that the store rejected for good. It waits in memory until `retry_dead_letters()` or the process's end.

    `count` is all that was rejected for `key` so far; `reason` and `batch` are those of the latest rejection.
    """

    key: Hashable
    count: int
    reason: str
    batch: str
