"""Many threads, and keys whose own code does its worst: every count stays in exactly one place."""

from __future__ import annotations

import gc
import random
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

THREADS, EACH = 8, 200_000


def test_eight_threads_count_while_a_flusher_takes_all_the_while(make):
    table = make(interval=0.0, tick=0.001, clock=time.monotonic)
    taken: Counter[object] = Counter()
    done = threading.Event()

    def work(number: int) -> None:
        increment = table.increment
        private = [f"private-{number}-{step}" for step in range(50)]
        for step in range(EACH // 2):
            increment("shared")
            increment(private[step % 50])

    def flush() -> None:
        while not done.is_set() or len(table):
            counts, born = table.take_due(time.monotonic(), 100)
            if len(counts) > 1 and random.random() < 0.3:  # as after a failed delivery
                table.put_back(counts, delay=0.001, born=born)
            else:
                taken.update(counts)
            time.sleep(0)

    flusher = threading.Thread(target=flush)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in [flusher, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    flusher.join()
    assert taken["shared"] == THREADS * EACH // 2
    assert sum(taken.values()) == THREADS * EACH
    assert all(taken[f"private-{number}-{step}"] == EACH // 100 for number in range(THREADS) for step in range(50))
    assert table.totals() == (THREADS * EACH, 0)


class Hostile:
    """All collide; comparing and hashing them may raise, let other threads run, or use the table they are in."""

    def __init__(self, name: int, rng: random.Random, table: object) -> None:
        self.name = name
        self.rng = rng
        self.table = table
        self.armed = True
        self.depth = 0

    def __hash__(self) -> int:
        self.misbehave(0.02)
        return 7

    def __eq__(self, other: object) -> bool:
        self.misbehave(0.05)
        return isinstance(other, Hostile) and self.name == other.name

    def misbehave(self, rate: float) -> None:
        if not self.armed or self.depth or self.rng.random() > rate:
            return
        self.depth += 1
        try:
            deed = self.rng.randrange(8)
            if deed <= 1:
                raise ValueError("hostile")
            if deed == 2:
                time.sleep(0)
            elif deed == 3:
                self.table.increment("reentered", 1)  # type: ignore[attr-defined]
                self.note("reentered", 1)
            elif deed == 4:
                self.note_taken(*self.table.take_due(1e9, 3))  # type: ignore[attr-defined]
            elif deed == 5:
                self.table.make_due()  # type: ignore[attr-defined]
            elif deed == 6:
                self.table.release()  # type: ignore[attr-defined]
            else:
                self.table.put_back({"returned": 1}, delay=0.0, born=0.0)  # type: ignore[attr-defined]
                self.note("returned", 1)
        finally:
            self.depth -= 1

    note: Any
    note_taken: Any


@pytest.mark.parametrize("seed", range(60))
def test_hostile_keys_lose_and_double_nothing(make, now, unraisable, seed):
    rng = random.Random(seed)
    table = make(interval=1.0)
    keys = [Hostile(number, rng, table) for number in range(6)]
    added: list[int] = []
    taken: list[int] = []
    lock = threading.Lock()

    def note(_key, n):
        with lock:
            added.append(n)

    def note_taken(counts, _born=0.0):
        with lock:
            taken.append(sum(counts.values()))

    for key in keys:
        key.note, key.note_taken = note, note_taken

    def work(work_rng: random.Random) -> None:
        for _ in range(150):
            n = work_rng.randrange(1, 5)
            with suppress(ValueError):
                table.increment(work_rng.choice([*keys, "plain", "reentered"]), n)
                note(None, n)
            if work_rng.random() < 0.1:
                with suppress(ValueError):
                    table.make_key_due(work_rng.choice(keys))
            if work_rng.random() < 0.2:
                now.now += 1.0
                counts, born = table.take_due(now.now, 4)
                if work_rng.random() < 0.5:
                    table.put_back(counts, delay=1.0, born=born)
                else:
                    note_taken(counts)

    threads = [threading.Thread(target=work, args=(random.Random(seed * 10 + number),)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key in keys:
        key.armed = False
    pending = sum(count for _, count in table.items())
    assert pending + sum(taken) == sum(added), f"seed {seed}"
    for _ in range(20):
        now.now += 10.0
        note_taken(*table.take_due(now.now, 1_000))
    assert sum(taken) == sum(added), f"seed {seed}"
    assert len(table) == 0
    assert all(isinstance(error, (ValueError, OverflowError)) for error in unraisable)


def test_a_key_that_raises_while_it_is_taken_is_tried_again_later(make, now, unraisable):
    class Moody:
        broken = False

        def __hash__(self) -> int:
            if self.broken:
                raise ValueError("moody")
            return 1

    key = Moody()
    table = make()
    table.increment(key, 3)
    table.increment("other", 1)
    key.broken = True
    assert table.take_due(110.0, 10)[0] == {"other": 1}
    assert [str(error) for error in unraisable] == ["moody"]
    assert table.totals() == (4, 3)
    assert table.next_due() == 110.0  # now + interval, not at once: the flusher must not spin
    now.now = 110.0
    assert table.take_due(111.0, 10)[0] == {}
    assert table.next_due() == 120.0
    key.broken = False
    assert table.take_due(125.0, 10)[0] == {key: 3}


def test_finalizers_may_count_while_the_table_allocates(make):
    table = make(interval=0.0)
    if table.kind == "reference":
        pytest.skip("bytecode can be interrupted anywhere: with the reference table, finalizers use async_increment")

    class Counting:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            table.increment(f"finalized-{random.randrange(50)}")

    old = gc.get_threshold()
    gc.set_threshold(20)
    try:
        for number in range(20_000):
            Counting()
            table.increment((number, number))
    finally:
        gc.set_threshold(*old)
        gc.collect()
    assert table.totals()[0] == 40_000
    assert sum(count for _, count in table.items()) == 40_000


# Leaks


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_keys_are_released_once_they_are_taken(make, now):
    table = make()
    keys = [("key", number) for number in range(1_000)]
    base = [sys.getrefcount(key) for key in keys]
    for _ in range(3):
        table.update(keys)
        for key in keys[:100]:
            table.increment(key, 2)
            table.make_key_due(key)
        now.now += 100.0
        counts, born = table.take_due(now.now, 10_000)
        table.put_back(counts, delay=1.0, born=born)
        del counts
        now.now += 100.0
        table.take_due(now.now, 10_000)
        table.items(), table.oldest(), table.count(keys[0])
        del key
    assert [sys.getrefcount(key) for key in keys] == base


def test_errors_release_what_they_touched(make):
    table = make(max_keys=1, on_full=None)
    key, count = ("key", 1), 2**70
    table.increment("first", 2**63 - 1)
    base = sys.getrefcount(key), sys.getrefcount(count), sys.getrefcount(table)
    for _ in range(1_000):
        for call in (
            lambda: table.increment(key),
            lambda: table.increment("first"),
            lambda: table.increment(key, count),
        ):
            with pytest.raises((Exception,)):
                call()
    gc.collect()
    assert (sys.getrefcount(key), sys.getrefcount(count), sys.getrefcount(table)) == base


def test_ten_million_operations_leave_memory_as_it_was(make, now):
    table = make(interval=1.0)
    rounds = 30 if table.kind == "reference" else 500  # the reference is ten times slower
    keys = [f"key-{number}" for number in range(10_000)]

    def cycle() -> None:
        table.update(keys)
        table.update(keys)
        now.now += 10.0
        while table.take_due(now.now, 2_500)[0]:
            pass

    for _ in range(10):
        cycle()
    gc.collect()
    before = rss()
    for _ in range(rounds):
        cycle()
    gc.collect()
    assert rss() - before < 4_000_000
    assert len(table) == 0
