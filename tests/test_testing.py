from __future__ import annotations

import threading

import pytest

from statbuffer import Batch, NotApplied, Rejected
from statbuffer.testing import FakeClock, Fault, FaultySink, MemorySink, check_sink


def test_the_memory_sink_meets_the_contract_of_an_exact_sink():
    assert len(check_sink(MemorySink)) == 6


def test_a_faulty_sink_without_faults_meets_it_too():
    assert len(check_sink(lambda: FaultySink(MemorySink()), key=lambda number: ("tenant", number))) == 6


class Doubling(MemorySink):
    def apply(self, batch: Batch) -> None:
        self.counts.update(batch.counts)


class Forgetful(MemorySink):
    """Says that it rejects a batch, and has stored half of it."""

    def apply(self, batch: Batch) -> None:
        if batch.seq == 2 and 2**62 in batch.counts.values():
            self.counts["key-2"] += 1
            self.counts["key-1"] += 1
            raise Rejected("key-1", "overflow")
        super().apply(batch)


class Stranger(MemorySink):
    def apply(self, batch: Batch) -> None:
        if batch.seq == 2 and 2**62 in batch.counts.values():
            raise Rejected("stranger", "overflow")
        super().apply(batch)


class Floating(MemorySink):
    def apply(self, batch: Batch) -> None:
        super().apply(Batch(batch.writer, batch.seq, {key: int(float(count)) for key, count in batch.counts.items()}))


class Replacing(MemorySink):
    def apply(self, batch: Batch) -> None:
        for key, count in batch.counts.items():
            self.counts[key] = count


class Racing(MemorySink):
    """Reads, lets others run, writes."""

    def apply(self, batch: Batch) -> None:
        before = dict(self.counts)
        barrier.wait() if batch.counts.keys() == {f"key-{number}" for number in range(50)} else None
        for key, count in batch.counts.items():
            self.counts[key] = before.get(key, 0) + count


barrier = threading.Barrier(8)


@pytest.mark.parametrize(
    ("sink", "clause"),
    [
        (Doubling, "An exact sink stores a batch id once"),
        (Forgetful, "A sink that rejects a batch stores nothing of it"),
        (Stranger, "names keys that are not in the batch"),
        (Floating, "Counts are exact up to 63 bits"),
        (Replacing, "A batch is added to what is stored"),
        (Racing, "Batches of many writers at once are all stored|An exact sink stores a batch id once"),
    ],
)
def test_a_sink_that_breaks_a_clause_is_told_which(sink, clause):
    with pytest.raises(AssertionError, match=clause):
        check_sink(sink)


def test_a_sink_that_is_not_exact_is_offered_no_repeats_and_needs_a_reader():
    class AtLeastOnce:
        exact = False

        def __init__(self) -> None:
            self.rows: dict[object, int] = {}
            self.opened = self.closed = 0

        def open(self) -> None:
            self.opened += 1

        def close(self) -> None:
            self.closed += 1

        def apply(self, batch: Batch) -> None:
            assert self.opened == 1
            for key, count in batch.counts.items():
                self.rows[key] = self.rows.get(key, 0) + count

    assert len(check_sink(AtLeastOnce, read=lambda sink, _keys: sink.rows)) == 5


def test_the_script_of_a_faulty_sink_comes_before_its_seed():
    sink = FaultySink(MemorySink(), [Fault.REFUSE, Fault.LOSE_ANSWER, OSError("mine"), Fault.NONE], seed=1, rate=1.0)
    batch = Batch("w", 1, {"a": 1})
    with pytest.raises(NotApplied):
        sink.apply(batch)
    assert not sink.applied(batch)
    with pytest.raises(ConnectionError):
        sink.apply(batch)
    assert sink.applied(batch)
    with pytest.raises(OSError, match="mine"):
        sink.apply(batch)
    sink.apply(batch)
    with pytest.raises((NotApplied, ConnectionError)):
        sink.apply(batch)
    assert sink.totals(["a", "b"]) == {"a": 1}
    assert len(sink.offered) == 5


def test_the_same_seed_draws_the_same_faults():
    def outcomes(seed: int) -> list[str]:
        sink = FaultySink(MemorySink(), seed=seed)
        seen = []
        for number in range(1, 50):
            try:
                sink.apply(Batch("w", number, {"a": 1}))
                seen.append("stored")
            except Exception as error:
                seen.append(str(error))
        return seen

    assert outcomes(7) == outcomes(7) != outcomes(8)
    assert len(set(outcomes(7))) == 4


def test_a_batch_is_frozen_and_says_what_it_is():
    batch = Batch("w", 3, {"a": 2, "b": -1})
    assert (batch.id, batch.total, len(batch)) == ("w:3", 1, 2)
    assert repr(batch) == "<Batch w:3: 2 keys, sum 1>"
    with pytest.raises(TypeError):
        batch.counts["a"] = 5  # type: ignore[index]
    with pytest.raises(AttributeError):
        batch.seq = 5  # type: ignore[misc]
    assert {batch: 1}[Batch("w", 3, {"a": 2, "b": -1})] == 1


def test_time_moves_only_when_it_is_advanced():
    clock = FakeClock(now=5.0)
    clock.advance(2.5)
    clock.sleep(1.0)
    assert clock.monotonic() == 8.5
    assert not clock.wait(threading.Event(), timeout=3.0)
    assert clock.monotonic() == 11.5


def test_a_wait_that_would_never_end_says_so():
    with pytest.raises(RuntimeError, match="would never end"):
        FakeClock().wait(threading.Event(), None)
