"""The table against `collections.Counter`, in any order of calls."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from statbuffer import Stopped
from statbuffer._table import _native, _reference

KEYS = st.sampled_from(["a", "b", "c", ("t", 1), 0, b"x", None])
COUNTS = st.integers(-5, 5) | st.integers(-(2**40), 2**40)


class TableMachine(RuleBasedStateMachine):
    table_class: Any

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.table = self.table_class(interval=5.0, jitter=3.0, tick=0.5, max_keys=100, clock=lambda: self.now)
        self.pending: Counter[Any] = Counter()
        self.first: dict[Any, float] = {}  # when a pending key may be due at the earliest
        self.flying: list[tuple[dict[Any, int], float]] = []
        self.accepted = 0

    def add(self, key: Any, count: int, due: float) -> None:
        if key not in self.first and count:
            self.first[key] = due
        self.pending[key] += count

    @rule(key=KEYS, count=COUNTS)
    def increment(self, key, count):
        if self.table.closed:
            with pytest.raises(Stopped):
                self.table.increment(key, count)
            return
        self.table.increment(key, count)
        self.accepted += count
        self.add(key, count, self.now + 5.0)

    @rule(keys=st.lists(KEYS, max_size=6), as_mapping=st.booleans())
    def update(self, keys, as_mapping):
        if self.table.closed:
            return
        self.table.update(dict(Counter(keys)) if as_mapping else keys)
        self.accepted += len(keys)
        for key in keys:
            self.add(key, 1, self.now + 5.0)

    @rule(seconds=st.floats(0, 6))
    def time_runs(self, seconds):
        self.now += seconds

    def took(self, counts: dict[Any, int], born: float, limit: int, *, whatever_the_time: bool = False) -> None:
        assert len(counts) <= limit
        for key, count in counts.items():
            assert count == self.pending.pop(key) != 0
            assert whatever_the_time or self.first[key] <= self.now
            del self.first[key]
        for key in [key for key, count in self.pending.items() if count == 0]:
            del self.pending[key]
            if self.table.make_key_due(key):  # a zero that is not due yet stays; one that was taken starts anew
                self.first[key] = -1.0
                self.pending[key] = 0
            else:
                self.first.pop(key, None)
        if counts:
            assert born <= self.now
            self.flying.append((counts, born))

    @rule(limit=st.integers(1, 5))
    def take_due(self, limit):
        counts, born = self.table.take_due(self.now, limit)
        self.took(counts, born, limit)

    @rule(limit=st.integers(1, 5))
    def take_all(self, limit):
        counts, born = self.table.take_all(limit)
        for key in self.first:
            self.first[key] = -1.0
        self.took(counts, born, limit, whatever_the_time=True)

    @rule(key=KEYS)
    def flush_a_key(self, key):
        if self.table.make_key_due(key):
            self.first[key] = -1.0

    @rule(delay=st.floats(0, 9))
    def put_back(self, delay):
        if not self.flying:
            return
        counts, born = self.flying.pop()
        self.table.put_back(counts, delay=delay, born=born)
        for key, count in counts.items():
            self.pending[key] += count
            self.first[key] = self.now + delay

    @rule()
    def store(self):
        if self.flying:
            self.accepted -= sum(self.flying.pop()[0].values())

    @rule()
    def close(self):
        self.table.close()

    @rule()
    def open(self):
        self.table.open()

    @rule()
    def release(self):
        self.table.release()

    @invariant()
    def books_balance(self):
        in_flight = sum(sum(counts.values()) for counts, _ in self.flying)
        accepted, pending = self.table.totals()
        assert pending + in_flight == self.accepted
        assert accepted >= 0 or accepted < 0
        assert dict(self.table.items()) == {key: count for key, count in self.pending.items() if count}
        for key, count in self.pending.items():
            assert self.table.count(key) == count

    def teardown(self):
        """After its interval, jitter and a tick, every key is due."""
        self.now += 100.0
        left = self.table.take_due(self.now, 1_000)[0]
        assert left == {key: count for key, count in self.pending.items() if count}
        assert (len(self.table), self.table.next_due()) == (0, None)


def machine(table_class: Any) -> Any:
    made: Any = type(f"{table_class.__module__}Machine", (TableMachine,), {"table_class": table_class})
    made.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
    return made.TestCase


TestNative = machine(_native.CounterTable)
TestReference = machine(_reference.CounterTable)
