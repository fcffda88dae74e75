"""What travels: a batch of counts on its way to a store, what became of it, and the letters that came back for good."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterable, Mapping


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
    """A count that the store rejected for good, kept until `retry_dead_letters()`.

    It waits in the journal; where there is none, in memory until the process ends. `count` is all that was rejected for `key` so far; `reason` and `batch` are those of the latest rejection.
    """

    key: Hashable
    count: int
    reason: str
    batch: str


@dataclass(frozen=True, slots=True)
class Settlement:
    """What became of each count of a batch. What is named nowhere is stored."""

    batch: Batch
    dead: Mapping[Hashable, str] = field(default_factory=dict)
    """Why each of these keys will never be stored."""
    dropped: Collection[Hashable] = ()
    returned: Mapping[Hashable, float] = field(default_factory=dict)
    """Known not to be stored: to be tried again in so many seconds, in another batch."""
    rest: Collection[Hashable] = ()
    """Known not to be stored: to be tried again at once, as a batch of their own."""
    born: float = math.inf
    """Clock time of the oldest count in the batch."""

    def total(self, keys: Iterable[Hashable]) -> int:
        """Return the sum of the batch's counts of `keys`."""
        return sum(self.batch.counts[key] for key in keys)

    @property
    def stored(self) -> int:
        """The sum of what is stored."""
        return self.batch.total - sum(map(self.total, (self.dead, self.dropped, self.returned, self.rest)))
