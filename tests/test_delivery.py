from __future__ import annotations

import sys
import threading
import time

import pytest

from statbuffer import FlushFailed, FlushTimeout, NotApplied, PartlyApplied, Rejected, StatBuffer, Stopped
from statbuffer._delivery import BACKOFF_CAP, Fate, next_step, pause_after
from statbuffer._options import Options
from statbuffer.testing import Fault, FaultySink, MemorySink

TRANSIENT, TEMPORARY, PERMANENT = (Options(restart=restart) for restart in ("transient", "temporary", "permanent"))


@pytest.mark.parametrize(
    ("error", "frozen", "options", "fate"),
    [
        (None, False, TRANSIENT, Fate.STORED),
        (None, True, TRANSIENT, Fate.STORED),
        (NotApplied("down"), False, TRANSIENT, Fate.PUT_BACK),
        (NotApplied("down"), True, TRANSIENT, Fate.REPEAT),  # says nothing about the earlier, unanswered try
        (NotApplied("down"), False, PERMANENT, Fate.PUT_BACK),
        (NotApplied("down"), False, TEMPORARY, Fate.DROP),
        (OSError("cut"), False, TRANSIENT, Fate.REPEAT),
        (OSError("cut"), False, PERMANENT, Fate.REPEAT),
        (OSError("cut"), False, TEMPORARY, Fate.DROP),
        (SystemExit(), False, TRANSIENT, Fate.REPEAT),
        (Rejected("k", "too long"), False, TRANSIENT, Fate.BURY),
        (Rejected("k", "too long"), True, TEMPORARY, Fate.BURY),
        (PartlyApplied({"k": OSError()}), False, TEMPORARY, Fate.PARTLY_STORED),
    ],
)
def test_the_next_step(error, frozen, options, fate):
    assert next_step(error, frozen=frozen, options=options) is fate


def test_pauses_double_up_to_the_cap_and_permanent_ones_stay():
    for failures, longest in [(1, 1.0), (2, 2.0), (3, 4.0), (6, 32.0), (7, BACKOFF_CAP), (5_000, BACKOFF_CAP)]:
        assert 0.8 * longest <= pause_after(failures, TRANSIENT) <= longest
        assert 0.8 <= pause_after(failures, PERMANENT) <= 1.0
    assert pause_after(3, Options(backoff=90.0)) >= 0.8 * 90.0


def test_what_is_known_not_to_be_stored_goes_back_and_merges(make_buffer, clock):
    sink = FaultySink(MemorySink(), [Fault.REFUSE])
    views = make_buffer(sink, interval=1.0, backoff=5.0)
    views.increment("a", 2)
    clock.advance(1.1)
    assert views.count("a") == 2
    assert views.stats().in_flight == 0
    views.increment("a", 3)
    clock.advance(5.1)
    assert sink.inner.counts == {"a": 5}
    assert [batch.seq for batch in sink.offered] == [1, 2]


def test_an_unknown_outcome_is_offered_again_unchanged_until_answered(make_buffer, clock):
    sink = FaultySink(MemorySink(), [Fault.LOSE_ANSWER, Fault.REFUSE, Fault.LOSE_REQUEST])
    views = make_buffer(sink, interval=1.0, backoff=1.0)
    views.increment("a", 2)
    clock.advance(1.1)
    views.increment("a", 3)
    assert (views.count("a"), views.stats().in_flight) == (3, 2)
    clock.advance(60.0)
    assert sink.inner.counts == {"a": 5}
    assert [(batch.seq, dict(batch.counts)) for batch in sink.offered] == [(1, {"a": 2})] * 4 + [(2, {"a": 3})]


@pytest.mark.parametrize("seed", range(1_000))
def test_no_count_is_lost_or_doubled_by_a_sink_that_fails_at_random(seed, clock):
    sink = FaultySink(MemorySink(), seed=seed, rate=0.6)
    with StatBuffer(sink, clock=clock, interval=1.0, backoff=0.5, batch_keys=3, shutdown=None) as views:
        for number in range(60):
            views.increment(f"key-{number % 7}", number % 5 - 1)
            if number % 6 == 0:
                clock.advance(0.4)
                assert views.stats().balanced
        accepted = views.stats().accepted
    assert sum(sink.inner.counts.values()) == accepted == sum(number % 5 - 1 for number in range(60))
    assert views.stats().stored == accepted
    for key, count in sink.inner.counts.items():
        assert count == sum(number % 5 - 1 for number in range(60) if f"key-{number % 7}" == key)


def test_a_rejected_key_becomes_a_dead_letter_and_the_rest_goes_on_at_once(make_buffer, clock):
    sink = FaultySink(MemorySink(), reject={"bad": "too long"})
    views = make_buffer(sink, interval=1.0)
    views.update({"a": 1, "bad": 7, "b": 2})
    clock.advance(1.1)
    assert sink.inner.counts == {"a": 1, "b": 2}
    [letter] = views.dead_letters()
    assert (letter.key, letter.count, letter.reason) == ("bad", 7, "too long")
    views.increment("bad", 3)
    clock.advance(1.1)
    [letter] = views.dead_letters()
    assert letter.count == 10
    assert views.stats().dead == 10


def test_dead_letters_can_be_tried_again(make_buffer, clock):
    sink = FaultySink(MemorySink(), reject={"bad": "too long"})
    views = make_buffer(sink, interval=1.0)
    views.increment("bad", 7)
    clock.advance(1.1)
    sink.reject.clear()
    assert views.retry_dead_letters() == 7
    assert views.dead_letters() == ()
    views.flush()
    assert sink.inner.counts == {"bad": 7}
    assert views.stats().dead == 0


def test_a_sink_that_rejects_keys_of_no_batch_is_held_and_not_looped_on(make_buffer, clock):
    sink = FaultySink(MemorySink(), [Rejected("nobody", "?")] * 3)
    views = make_buffer(sink, interval=1.0)
    views.increment("a")
    clock.advance(1.1)
    assert len(sink.offered) == 1
    clock.advance(60.0)
    assert sink.inner.counts == {"a": 1}


def test_failing_says_so_after_max_attempts_and_drops_nothing(make_buffer, clock):
    sink = FaultySink(MemorySink(), [Fault.REFUSE] * 5)
    views = make_buffer(sink, interval=1.0, backoff=1.0, max_attempts=3)
    views.increment("a")
    clock.advance(2.1)
    assert not views.stats().failing
    assert "NotApplied" in views.stats().last_error
    clock.advance(3.0)
    assert views.stats().failing
    assert views.stats().failures == 3
    assert "failing" in repr(views)
    clock.advance(120.0)
    assert not views.stats().failing
    assert views.stats().last_error is None
    assert sink.inner.counts == {"a": 1}


def test_temporary_makes_one_attempt_and_drops(make_buffer, clock):
    sink = FaultySink(MemorySink(), [Fault.REFUSE, Fault.LOSE_REQUEST])
    views = make_buffer(sink, interval=1.0, restart="temporary")
    views.increment("a", 5)
    clock.advance(1.1)
    views.increment("b", 6)
    clock.advance(1.1)
    assert views.stats().dropped == 11
    views.increment("c", 7)
    clock.advance(1.1)
    assert sink.inner.counts == {"c": 7}


def test_the_books_hold_during_a_slow_delivery(make_buffer, clock):
    sink = FaultySink(MemorySink(), slow=3.0, clock=clock)
    views = make_buffer(sink, interval=1.0)
    views.increment("a", 4)
    clock.advance(2.0)
    views.increment("b", 1)
    stats = views.stats()
    assert (stats.in_flight, stats.pending, stats.stored) == (4, 1, 0)
    assert stats.oldest_pending_seconds == pytest.approx(2.0)
    clock.advance(20.0)
    assert views.stats().stored == 5
    assert views.stats().last_flush_seconds == pytest.approx(3.0)
    assert views.stats().oldest_pending_seconds == 0.0


def test_each_key_of_a_callback_is_settled_on_its_own(make_buffer, clock):
    stored, calls = {}, []

    def handle(key, count):
        calls.append((key, clock.monotonic()))
        if key == "bad":
            raise OSError("always")
        stored[key] = stored.get(key, 0) + count

    views = make_buffer(handle, interval=1.0, backoff=10.0)
    views.update([f"good-{number}" for number in range(999)])
    views.increment("bad", 4)
    clock.advance(1.1)
    assert len(stored) == 999
    assert set(stored.values()) == {1}
    assert views.count("bad") == 4
    views.increment("bad", 2)  # must not shorten the pause of its key
    views.increment("good-0")
    clock.advance(1.1)
    assert stored["good-0"] == 2
    assert sum(key == "bad" for key, _ in calls) == 1
    clock.advance(8.9)
    assert sum(key == "bad" for key, _ in calls) == 2
    assert views.stats().pending == 6
    clock.advance(200.0)
    assert views.stats().failing
    assert views.dead_letters() == ()


def test_a_callback_that_returns_false_has_failed(make_buffer, clock):
    answers = iter([False, None])
    views = make_buffer(lambda _key, _count: next(answers), interval=1.0, backoff=1.0)
    views.increment("a")
    clock.advance(1.1)
    assert views.stats().stored == 0
    assert "returned False" in views.stats().last_error
    clock.advance(1.1)
    assert views.stats().stored == 1


def test_a_callback_can_reject_a_key(make_buffer, clock):
    def handle(key, count):
        raise Rejected(key, "no such page")

    views = make_buffer(handle, interval=1.0)
    views.increment("a", 3)
    clock.advance(1.1)
    assert [letter.count for letter in views.dead_letters()] == [3]


def test_temporary_callbacks_drop_only_the_keys_that_fail(make_buffer, clock):
    views = make_buffer(lambda key, _count: key != "bad", interval=1.0, restart="temporary")
    views.update({"bad": 2, "good": 3})
    clock.advance(1.1)
    assert (views.stats().dropped, views.stats().stored) == (2, 3)


def test_a_callback_that_exits_does_not_end_the_flusher(make_buffer, clock):
    calls = []

    def handle(key, count):
        calls.append(key)
        if len(calls) == 1:
            sys.exit(1)

    views = make_buffer(handle, interval=1.0, backoff=1.0)
    views.increment("a")
    clock.advance(10.0)
    assert calls == ["a", "a"]
    assert views.stats().stored == 1


def test_a_batch_handler_is_offered_the_same_batch_until_it_returns(clock):
    seen = []

    class Views(StatBuffer, interval=1.0, backoff=1.0):
        def handle_batch(self, batch):
            seen.append((batch.id, dict(batch.counts)))
            return len(seen) > 2

    with Views(clock=clock) as views:
        views.increment("a", 2)
        clock.advance(1.1)
        views.increment("a", 3)
        clock.advance(10.0)
    assert [counts for _, counts in seen] == [{"a": 2}] * 3 + [{"a": 3}]
    assert len({batch_id for batch_id, _ in seen}) == 2


def test_the_store_is_down_for_eight_seconds_and_nothing_is_lost(clock):
    """The Elixir library stores 0 of these 10,000."""
    stored: dict[str, int] = {}

    class Views(StatBuffer, interval=1.0, backoff=1.0):
        def handle_flush(self, key, count):
            if clock.monotonic() < up_at:
                raise ConnectionError("down")
            stored[key] = stored.get(key, 0) + count

    up_at = clock.monotonic() + 8.0
    with Views(clock=clock, workers=4) as views:
        for _ in range(10):
            views.update(f"key-{number}" for number in range(1_000))
            clock.advance(0.2)
        clock.advance(30.0)
        assert sum(stored.values()) == 10_000
        assert set(stored.values()) == {10}


def test_flush_returns_when_stored(views, sink, clock):
    views.update({"a": 1, "b": 2})
    views.flush("a")
    assert sink.counts == {"a": 1}
    views.flush()
    assert sink.counts == {"a": 1, "b": 2}
    views.flush()
    views.flush("nobody")


def test_flush_waits_through_failures(make_buffer, clock):
    sink = FaultySink(MemorySink(), [Fault.REFUSE, Fault.LOSE_ANSWER, Fault.REFUSE])
    views = make_buffer(sink, interval=100.0)
    views.increment("a", 5)
    views.flush("a")
    assert sink.inner.counts == {"a": 5}


def test_flush_of_a_key_waits_for_its_batch_of_unknown_outcome_too(make_buffer, clock):
    sink = FaultySink(MemorySink(), [Fault.LOSE_REQUEST])
    views = make_buffer(sink, interval=1.0)
    views.update({"a": 5, "b": 1})
    clock.advance(1.05)
    views.increment("a", 2)
    views.flush("a")
    assert sink.inner.counts == {"a": 7, "b": 1}


def test_flush_of_a_key_that_came_to_zero_returns(views, sink):
    views.increment("a", 5)
    views.increment("a", -5)
    views.flush("a")
    views.flush()
    assert sink.counts == {}


def test_flush_waits_for_a_callback_key_that_fails_at_first(make_buffer, clock):
    answers = iter([False, False, True])
    views = make_buffer(lambda _key, _count: next(answers), interval=50.0)
    views.increment("a")
    views.flush("a")
    assert views.stats().stored == 1


def test_flush_says_when_time_runs_out_and_loses_nothing(make_buffer, clock):
    sink = FaultySink(MemorySink(), [Fault.REFUSE] * 4)
    views = make_buffer(sink, interval=1.0)
    views.increment("a", 5)
    with pytest.raises(
        FlushTimeout, match=r"not stored within 2 s; 5 still on the way, nothing lost; .*NotApplied"
    ) as caught:
        views.flush(timeout=2.0)
    assert (caught.value.left, caught.value.timeout) == (5, 2.0)
    clock.advance(60.0)
    assert sink.inner.counts == {"a": 5}


def test_flush_says_when_counts_became_dead_letters(make_buffer):
    views = make_buffer(FaultySink(MemorySink(), reject={"bad": "no"}))
    views.update({"bad": 3, "good": 4})
    views.async_flush("good")
    views.flush("good")
    views.increment("bad", 3)
    with pytest.raises(FlushFailed, match=r"6 went to dead_letters\(\)|3 went to dead_letters\(\)"):
        views.flush()


def test_flush_says_when_counts_were_dropped(make_buffer):
    views = make_buffer(FaultySink(MemorySink(), [Fault.REFUSE]), restart="temporary")
    views.increment("a", 3)
    with pytest.raises(FlushFailed, match="3 dropped"):
        views.flush("a")


def test_flush_says_when_the_buffer_is_stopped_first():
    """In real time: one thread waits, another stops."""
    sink = FaultySink(MemorySink(), [Fault.REFUSE] * 1_000)
    views = StatBuffer(sink, backoff=0.01).start()
    views.increment("a", 3)
    errors = []

    def flush() -> None:
        try:
            views.flush()
        except Stopped as error:
            errors.append(str(error))

    thread = threading.Thread(target=flush)
    thread.start()
    while not sink.offered:
        time.sleep(0.001)
    assert views.stop(timeout=0.05).pending == {"a": 3}
    thread.join(10)
    assert "stopped before all was stored" in errors[0]


def test_many_callers_of_flush_during_an_outage_do_not_hammer_the_store(make_buffer, clock):
    sink = FaultySink(MemorySink(), [Fault.REFUSE] * 1_000)
    views = make_buffer(sink, interval=0.1, backoff=1.0)
    views.increment("a")
    for _ in range(100):
        views.async_flush()
        clock.advance(0.1)
    assert len(sink.offered) <= 14


def test_flush_is_refused_where_it_would_wait_for_itself(clock):
    errors = []

    class Views(StatBuffer, interval=1.0):
        def handle_batch(self, batch):
            for method in (self.flush, self.stop):
                try:
                    method()
                except RuntimeError as error:
                    errors.append(str(error))

    with Views(clock=clock) as views:
        views.increment("a")
        clock.advance(1.1)
    assert len(errors) == 2
    assert "async_flush" in errors[0]
