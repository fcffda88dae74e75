"""What a table meets when everything around it fails: hooks, finalizers, reprs, memory."""

from __future__ import annotations

import gc
import sys

import pytest


class Moody:
    """A key that can be told to raise."""

    broken = False

    def __hash__(self) -> int:
        if self.broken:
            raise ValueError("moody")
        return 1

    def __eq__(self, other: object) -> bool:
        return self is other


def deliver_all(table, now) -> int:
    now.now += 1e6
    total = 0
    while True:
        counts, _ = table.take_due(now.now, 1_000)
        if not counts:
            return total
        total += sum(counts.values())


@pytest.fixture
def default_hook(monkeypatch, capsys):
    """The interpreter's own hook, which takes nothing but its own type. pytest and our other tests replace it."""
    monkeypatch.setattr("sys.unraisablehook", sys.__unraisablehook__)
    return capsys


def test_a_key_that_raises_is_reported_by_the_default_hook_and_delivered_later(make, now, default_hook):
    table, key = make(), Moody()
    table.increment(key, 3)
    table.increment("other")
    key.broken = True
    assert table.take_due(110.0, 10)[0] == {"other": 1}
    assert "ValueError: moody" in default_hook.readouterr().err
    key.broken = False
    assert deliver_all(table, now) == 3


def test_a_wake_that_raises_is_reported_by_the_default_hook_and_the_increment_is_not(make, default_hook):
    def wake():
        raise OSError("no thread")

    table = make(wake=wake)
    table.increment("a")
    assert table.totals() == (1, 1)
    assert "OSError: no thread" in default_hook.readouterr().err


def test_a_hook_that_raises_itself_changes_nothing(make, now, monkeypatch, capsys):
    def hook(_report):
        raise RuntimeError("the hook is broken too")

    monkeypatch.setattr("sys.unraisablehook", hook)
    table, key = make(), Moody()
    table.increment(key, 3)
    key.broken = True
    assert table.take_due(110.0, 10)[0] == {}
    key.broken = False
    assert deliver_all(table, now) == 3
    capsys.readouterr()


def test_a_repr_that_raises_does_not_hide_that_the_table_is_full(make):
    from statbuffer import BufferFull

    class Nasty:
        def __repr__(self) -> str:
            raise OSError

    key, table = Nasty(), make(max_keys=1)
    table.increment("a")
    with pytest.raises(BufferFull, match="Nasty whose repr raises") as caught:
        table.increment(key)
    assert caught.value.key is key


def test_rounding_never_makes_a_key_due_early(make, now):
    for step in range(1, 20_000):
        now.now = step * 0.0137
        table = make(interval=0.1, tick=0.1)
        table.increment("a")
        assert now.now + 0.1 <= table.next_due() <= now.now + 0.2 + 1e-9


def test_the_first_key_of_an_empty_table_wakes_whatever_was_there_before(make, now):
    rings: list[int] = []
    table = make(wake=lambda: rings.append(1) or True)
    table.increment("a")
    table.make_key_due("a")
    assert table.take_due(now.now, 10)[0] == {"a": 1}
    assert (table.next_due(), table.oldest()) == (None, float("inf"))
    before = len(rings)
    now.now = 105.0
    table.increment("b")
    assert len(rings) == before + 1
    assert table.next_due() <= 116.0


class Life:
    """A table and the sums of what it accepted and what was delivered; its finalizers use the table."""

    def __init__(self, table) -> None:
        self.table = table
        self.accepted = self.delivered = 0

    def deliver(self, counts) -> None:
        n = sum(counts.values())
        self.delivered += n  # in a step of its own: a finalizer adds too

    def increment(self, key) -> None:
        self.table.increment(key)
        self.accepted += 1

    def make_garbage(self) -> None:
        life = self

        class Busy:
            def __init__(self) -> None:
                self.me = self

            def __del__(self) -> None:
                counts, born = life.table.take_all(100)
                if life.accepted % 3:
                    life.deliver(counts)
                else:
                    life.table.put_back(counts, delay=0.0, born=born)
                life.increment("finalized")

        Busy()


@pytest.mark.parametrize("threshold", [1, 2, 3, 5, 8, 13, 21])
def test_finalizers_may_take_and_put_back_while_the_table_allocates(make, now, threshold):
    life = Life(make(interval=0.0))
    if life.table.kind == "reference":
        pytest.skip("bytecode can be interrupted anywhere: with the reference table, finalizers use async_increment")
    old = gc.get_threshold()
    gc.set_threshold(threshold)
    try:
        for number in range(600):
            now.now += 1.0
            life.make_garbage()
            life.increment((threshold, number))
            if number % 20 == 0:
                life.deliver(life.table.take_due(now.now, 7)[0])
    finally:
        gc.set_threshold(*old)
        gc.collect()
    rest = deliver_all(life.table, now)
    assert life.delivered + rest == life.accepted
    assert len(life.table) == 0


def test_a_table_that_dies_with_its_finalizers_is_collected(make):
    class Owner:
        def __init__(self) -> None:
            self.table = make(wake=self.wake)

        def wake(self) -> bool:
            return True

        def __del__(self) -> None:
            self.table.increment("last words")
            seen.append(self.table.totals())

    seen: list[tuple[int, int]] = []
    owner = Owner()
    owner.table.update("abc")
    del owner
    gc.collect()
    assert seen == [(4, 4)]
