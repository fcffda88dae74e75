from __future__ import annotations

import threading

import pytest

from statbuffer import StatBuffer
from statbuffer.testing import FakeClock, MemorySink


def test_a_key_is_delivered_an_interval_after_its_own_first_increment(views, sink, clock):
    views.increment("a")
    clock.advance(3.0)
    views.increment("b")
    views.increment("a")
    clock.advance(1.9)
    assert sink.counts == {}
    clock.advance(0.2)
    assert sink.counts == {"a": 2}
    clock.advance(2.8)
    assert sink.counts == {"a": 2}
    clock.advance(0.3)
    assert sink.counts == {"a": 2, "b": 1}


def test_no_key_is_early_and_none_is_later_than_a_tick(clock):
    delivered = []
    with StatBuffer(
        lambda key, count: delivered.append((key, clock.monotonic())), clock=clock, interval=1.0, workers=1
    ) as views:
        counted = {}
        for number in range(40):
            counted[number] = clock.monotonic()
            views.increment(number)
            clock.advance(0.013)
        clock.advance(2.0)
        assert len(delivered) == 40
        for key, moment in delivered:
            assert counted[key] + 1.0 <= moment <= counted[key] + 1.0 + views.options.tick + 1e-9


def test_keys_due_in_the_same_tick_travel_in_one_batch(views, sink, clock):
    for key in "abc":
        views.increment(key)
    clock.advance(5.2)
    assert [dict(batch.counts) for batch in sink.batches] == [{"a": 1, "b": 1, "c": 1}]


def test_a_batch_holds_batch_keys_keys_at_most(make_buffer, sink, clock):
    views = make_buffer(sink, batch_keys=10)
    views.update(range(25))
    clock.advance(5.2)
    assert sorted(len(batch) for batch in sink.batches) == [5, 10, 10]
    assert [batch.seq for batch in sink.batches] == [1, 2, 3]


def test_jitter_spreads_keys_over_its_width(make_buffer, sink, clock):
    views = make_buffer(sink, interval=1.0, jitter=10.0)
    views.update(range(2_000))
    clock.advance(1.0)
    assert not sink.counts
    seen = []
    for _ in range(10):
        clock.advance(1.0)
        seen.append(sum(sink.counts.values()))
    clock.advance(0.1)
    assert sum(sink.counts.values()) == 2_000
    steps = [after - before for before, after in zip([0, *seen], seen, strict=False)]
    assert all(120 < step < 280 for step in steps), steps


def test_options_draw_the_interval_with_its_jitter():
    options = StatBuffer(MemorySink(), interval=2.0, jitter=1.0).options
    drawn = [options.next_interval() for _ in range(200)]
    assert all(2.0 <= seconds < 3.0 for seconds in drawn)
    assert max(drawn) - min(drawn) > 0.5


def test_a_key_flushed_early_and_seen_again_waits_a_whole_interval(views, sink, clock):
    views.increment("a")
    clock.advance(3.0)
    views.flush("a")
    assert sink.counts == {"a": 1}
    views.increment("a")
    clock.advance(4.9)  # past the moment at which the first was due
    assert sink.counts == {"a": 1}
    clock.advance(0.3)
    assert sink.counts == {"a": 2}


def flusher_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "statbuffer-StatBuffer"]


def test_an_idle_buffer_ends_its_thread_and_the_next_key_starts_it_again(make_buffer, sink, clock):
    views = make_buffer(sink, interval=1.0, timeout=10.0)
    assert flusher_threads() == []
    views.increment("a")
    assert len(flusher_threads()) == 1
    clock.advance(5.0)
    assert sink.counts == {"a": 1}
    assert len(flusher_threads()) == 1
    clock.advance(7.0)
    views._flusher.ended.wait(5)
    clock.advance(0.0)
    views.increment("a")
    clock.advance(1.1)
    assert sink.counts == {"a": 2}


def test_an_idle_buffer_wakes_nothing(sink):
    class CountingClock(FakeClock):
        waits = 0

        def sleep_until(self, sleeper: object, moment: float) -> None:
            self.waits += 1
            super().sleep_until(sleeper, moment)

    clock = CountingClock()
    views = StatBuffer(sink, clock=clock, interval=1.0, timeout=100.0).start()
    views.increment("a")
    clock.advance(2.0)
    before = clock.waits
    clock.advance(99.0)
    assert clock.waits == before
    assert sink.counts == {"a": 1}


def test_memory_is_given_back_when_the_thread_ends(make_buffer, sink, clock):
    views = make_buffer(sink, interval=1.0, timeout=1.0, max_keys=100_000)
    views.update(range(50_000))
    clock.advance(1.1)
    assert len(sink.counts) == 50_000
    clock.advance(5.0)
    assert views._flusher.ended.wait(5)
    assert views.stats().keys == 0


def test_work_that_comes_while_the_thread_ends_is_not_forgotten(sink):
    """Real time, a timeout of nothing: the thread ends after each delivery, against the next key."""
    with StatBuffer(sink, interval=0.0, timeout=0.0) as views:
        for number in range(3_000):
            views.increment(number)
        views.flush(timeout=30)
        for number in range(300):
            views.increment("again")
            views.flush(timeout=30)
    assert sum(sink.counts.values()) == 3_300


@pytest.mark.parametrize("interval", [0.0, 0.001, 0.05])
def test_short_intervals_deliver_everything(interval):
    sink = MemorySink()
    with StatBuffer(sink, interval=interval) as views:
        for number in range(20_000):
            views.increment(number % 97)
    assert sum(sink.counts.values()) == 20_000
