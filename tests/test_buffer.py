from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

import statbuffer
from statbuffer import (
    Batch,
    BufferFull,
    NotApplied,
    NotStarted,
    OptionError,
    Options,
    SinkError,
    StatBuffer,
    Stopped,
    Undelivered,
)
from statbuffer._stats import Ledger
from statbuffer.sinks.callback import BatchCallbackSink, CallbackSink
from statbuffer.testing import Fault, FaultySink, MemorySink


def test_the_public_names_are_these():
    assert sorted(statbuffer.__all__) == statbuffer.__all__ or set(statbuffer.__all__) == {
        "Batch", "BufferFull", "DeadLetter", "DeliveryError", "FlushFailed", "FlushTimeout", "MissingDriver", "NotApplied",
        "NotStarted", "OptionError", "Options", "PartlyApplied", "Rejected", "SQLSink", "Sink", "SinkError", "StatBuffer",
        "StatBufferError", "Stats", "StopReport", "Stopped", "Undelivered",
    }  # fmt: skip
    for name in statbuffer.__all__:
        assert getattr(statbuffer, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        statbuffer.Nope  # noqa: B018


def test_import_stays_light():
    code = "import sys; had = set(sys.modules); import statbuffer; print([m for m in ('sqlalchemy', 'typer', 'rich', 'multiprocessing', 'asyncio') if m in set(sys.modules) - had])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


# What a buffer can be made of


def test_a_subclass_with_handle_flush(clock):
    stored = {}

    class PageViews(StatBuffer, interval=2.0, backoff=3.0):
        def handle_flush(self, key, count):
            stored[key] = count

    assert (PageViews.class_options.interval, StatBuffer.class_options.interval) == (2.0, 5.0)
    with PageViews(clock=clock, backoff=0.5) as views:
        assert (views.options.interval, views.options.backoff) == (2.0, 0.5)
        views.increment("/home", 3)
        clock.advance(2.1)
        assert stored == {"/home": 3}


def test_options_of_a_subclass_of_a_subclass_add_up():
    class A(StatBuffer, interval=2.0, jitter=1.0):
        pass

    class B(A, jitter=3.0):
        pass

    assert (B.class_options.interval, B.class_options.jitter) == (2.0, 3.0)


def test_nowhere_to_deliver_to_is_refused_at_once():
    class Empty(StatBuffer):
        pass

    with pytest.raises(
        TypeError, match=r"Empty has nowhere to deliver to: pass a sink .* or define handle_flush\(self, key, count\)"
    ):
        Empty()


def test_two_places_to_deliver_to_are_refused():
    class Both(StatBuffer):
        def handle_flush(self, key, count): ...

        def handle_batch(self, batch): ...

    with pytest.raises(TypeError, match="handle_flush and handle_batch: counts go to one place only"):
        Both()

    class One(StatBuffer):
        def handle_flush(self, key, count): ...

    with pytest.raises(TypeError, match="a sink and handle_flush"):
        One(MemorySink())


@pytest.mark.parametrize(
    ("sink", "error", "message"),
    [
        (42, TypeError, "42 is no sink: expected a URL"),
        (MemorySink, TypeError, "MemorySink is a class: pass an instance"),
        ("gopher://x", SinkError, "'gopher' is no scheme of a known sink: expected one of sqlite://"),
        ("views.db", SinkError, "no scheme of a known sink"),
    ],
)
def test_what_is_no_sink_is_refused(sink, error, message):
    with pytest.raises(error, match=message):
        StatBuffer(sink)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": -1}, r"interval=-1: expected seconds: a number from 0 to a thousand million"),
        ({"interval": float("nan")}, "interval=nan"),
        ({"interval": True}, "interval=True"),
        ({"backoff": "1"}, "backoff='1'"),
        ({"timeout": None}, "timeout=None"),
        ({"shutdown": -1}, r"shutdown=-1: .* or None for no limit"),
        ({"max_keys": 0}, "max_keys=0: expected a whole number of at least 1"),
        ({"batch_keys": 2.5}, r"batch_keys=2.5"),
        ({"restart": "never"}, r"restart='never': expected 'transient' or 'temporary' or 'permanent'"),
        ({"on_full": "drop"}, "expected 'raise' or 'block' or 'fold'"),
        ({"overflow_key": []}, "a hashable key"),
        ({"intervall": 3}, r"intervall=3: expected a known option; did you mean interval\?"),
        ({"zzz": 3}, "one of interval, jitter"),
    ],
)
def test_wrong_options_are_refused_with_what_was_expected(options, message):
    with pytest.raises(OptionError, match=message):
        StatBuffer(MemorySink(), **options)
    with pytest.raises(OptionError, match=message):
        type("Views", (StatBuffer,), {}, **options)


def test_options_take_timedelta_and_none_where_it_means_no_limit():
    options = Options(interval=timedelta(minutes=1), shutdown=None, full_timeout=timedelta(seconds=2))  # type: ignore[arg-type]
    assert (options.interval, options.shutdown, options.full_timeout) == (60.0, None, 2.0)


@pytest.mark.parametrize(("interval", "tick"), [(0.0, 0.001), (0.01, 0.001), (1.0, 0.02), (5.0, 0.1), (3600.0, 0.1)])
def test_a_tick_is_a_fiftieth_of_the_interval_within_bounds(interval, tick):
    assert Options(interval=interval).tick == pytest.approx(tick)


# Life


def test_nothing_is_accepted_before_start_and_after_stop(clock, sink):
    views = StatBuffer(sink, clock=clock)
    for method in (views.increment, views.async_increment, views.flush, views.async_flush):
        with pytest.raises(NotStarted, match=r"is not started: call start\(\)"):
            method("a")
    with pytest.raises(NotStarted):
        views.update(["a"])
    views.start()
    kept, kept_update = views.increment, views.update
    kept("a")
    views.stop()
    for method in (views.increment, views.async_increment, views.flush, kept):
        with pytest.raises(Stopped):
            method("a")
    with pytest.raises(Stopped):
        kept_update(["a"])
    assert sink.counts == {"a": 1}


def test_start_and_stop_twice_are_harmless_and_start_again_goes_on(clock, sink):
    views = StatBuffer(sink, clock=clock)
    assert views.stop().complete
    assert views.start() is views.start()
    views.increment("a")
    assert views.stop().complete
    assert views.stop().complete
    views.start()
    views.increment("a")
    assert views.stop().complete
    assert sink.counts == {"a": 2}


def test_the_hot_path_is_the_table_itself(views):
    assert views.increment == views._table.increment


def test_an_overridden_increment_stays_in_the_way(clock, sink):
    class Lower(StatBuffer):
        def increment(self, key, count=1):
            super().increment(key.lower(), count)

    with Lower(sink, clock=clock) as views:
        views.increment("A")
    assert sink.counts == {"a": 1}


def test_stop_while_the_store_is_down_returns_by_its_deadline_and_lists_what_is_left(clock):
    sink = FaultySink(MemorySink(), [Fault.REFUSE] * 1_000)
    views = StatBuffer(sink, clock=clock, interval=1.0).start()
    views.update({"a": 2, "b": 3})
    clock.advance(20.0)
    before = clock.monotonic()
    report = views.stop(timeout=4.0)
    assert clock.monotonic() - before <= 4.0
    assert report.pending == {"a": 2, "b": 3}
    assert (report.left, report.complete, report.in_flight) == (5, False, None)
    assert "5 pending in 2 keys; the store last said: NotApplied" in str(report)
    sink._script = iter(())
    views.start()  # what is left is still there
    assert views.stop().complete
    assert sink.inner.counts == {"a": 2, "b": 3}


def test_stop_says_what_is_in_flight_with_an_unknown_outcome_and_what_is_dead(clock):
    sink = FaultySink(MemorySink(), reject={"bad": "no"})
    views = StatBuffer(sink, clock=clock, interval=1.0).start()
    views.increment("bad", 2)
    clock.advance(1.1)
    sink._script = iter([Fault.LOSE_ANSWER] * 1_000)
    views.increment("a", 3)
    report = views.stop(timeout=2.0)
    assert report.in_flight is not None
    assert (report.in_flight.counts, report.left) == ({"a": 3}, 5)
    assert "3 in flight, stored or not" in str(report)
    assert "2 in 1 dead letters" in str(report)


def test_stop_returns_by_its_deadline_while_the_store_hangs():
    """In real time: the sink blocks in a call that nothing can interrupt."""
    release = threading.Event()
    entered = threading.Event()

    def hang(batch: Batch) -> None:
        entered.set()
        release.wait(30)

    class Hanging(MemorySink):
        def apply(self, batch: Batch) -> None:
            hang(batch)
            super().apply(batch)

    sink = Hanging()
    views = StatBuffer(sink, interval=0.0).start()
    views.increment("a", 3)
    assert entered.wait(10)
    report = views.stop(timeout=0.1)
    assert report.in_flight is not None
    assert report.in_flight.total == 3
    release.set()
    assert views._flusher.ended.wait(10)
    assert views.stats().stored == 3


def test_stop_at_once_delivers_nothing(clock, sink):
    views = StatBuffer(sink, clock=clock, shutdown=0).start()
    views.increment("a", 2)
    report = views.stop()
    assert (report.left, sink.counts) == (2, {})
    views.start().stop(None)


def test_a_with_block_that_leaves_counts_behind_raises(clock, caplog):
    def leave(error: bool) -> None:
        with StatBuffer(FaultySink(MemorySink(), [Fault.REFUSE] * 99), clock=clock, shutdown=1.0) as views:
            views.increment("a", 4)
            if error:
                raise KeyError("mine")

    with pytest.raises(Undelivered, match="4 pending in 1 keys") as caught:
        leave(error=False)
    assert caught.value.report.pending == {"a": 4}
    with pytest.raises(KeyError, match="mine"):
        leave(error=True)
    assert "4 pending in 1 keys" in caplog.text


def test_a_store_that_cannot_be_reached_at_start_is_no_error_and_is_opened_later(clock):
    class Late(MemorySink):
        opened = 0
        closed = 0

        def open(self) -> None:
            self.opened += 1
            if self.opened < 3:
                raise NotApplied("connection refused")

        def close(self) -> None:
            self.closed += 1

    sink = Late()
    with StatBuffer(sink, clock=clock, interval=1.0) as views:
        views.increment("a")
        clock.advance(1.1)
        assert "can't be opened: connection refused" in views.stats().last_error
        clock.advance(10.0)
        assert sink.counts == {"a": 1}
    assert (sink.opened, sink.closed) == (3, 1)


def test_a_wrong_configuration_fails_the_start_and_accepts_nothing(clock):
    class Wrong(MemorySink):
        def open(self) -> None:
            raise SinkError("no such table")

    views = StatBuffer(Wrong(), clock=clock)
    with pytest.raises(SinkError, match="no such table"):
        views.start()
    with pytest.raises(NotStarted):
        views.increment("a")


def test_a_buffer_nobody_holds_is_collected_with_its_thread(sink):
    views = StatBuffer(sink, interval=0.0, timeout=0.0).start()
    views.increment("a")
    views.flush(timeout=10)
    assert views._flusher.ended.wait(10)
    ref = weakref.ref(views)
    del views
    gc.collect()
    assert ref() is None


def test_repr_tells_the_state(clock, sink):
    views = StatBuffer(sink, clock=clock)
    assert repr(views) == "<StatBuffer new: 0 keys pending, to <MemorySink: 0 keys>>"
    with views:
        views.increment("a")
        assert "running: 1 keys pending" in repr(views)
    assert "stopped" in repr(views)


# Counting


def test_counts_pending_and_total(views, sink, clock):
    views.increment("a")
    views.increment("a", 4)
    views.increment("a", count=-2)
    views.update(["a", "b", "b"])
    views.update({"c": 10})
    assert [views.count(key) for key in "abcd"] == [4, 2, 10, 0]
    views.flush()
    views.increment("a")
    assert [views.count(key) for key in "abcd"] == [1, 0, 0, 0]
    assert [views.total(key) for key in "abcd"] == [5, 2, 10, 0]
    assert views.totals("abcd") == {"a": 5, "b": 2, "c": 10, "d": 0}


@pytest.mark.parametrize(("fault", "stored"), [(Fault.LOSE_ANSWER, True), (Fault.LOSE_REQUEST, False)])
def test_total_counts_a_batch_of_unknown_outcome_once(make_buffer, clock, fault, stored):
    sink = FaultySink(MemorySink(), [fault] * 3)
    views = make_buffer(sink, interval=1.0)
    views.increment("a", 5)
    clock.advance(1.1)
    views.increment("a", 1)
    assert (views.stats().in_flight, bool(sink.inner.counts)) == (5, stored)
    assert views.total("a") == 6
    clock.advance(60.0)
    assert views.total("a") == 6


def test_total_of_a_callback_is_refused(make_buffer):
    views = make_buffer(lambda _key, _count: None)
    with pytest.raises(TypeError, match=r"can't read: it has no totals\(keys\)"):
        views.total("a")


def test_total_is_right_at_every_moment_under_load(sink):
    """In real time: a reader never sees a batch twice or misses it."""
    with StatBuffer(sink, interval=0.0) as views:
        stop = threading.Event()
        counted = 0
        seen = []

        def read() -> None:
            while not stop.is_set():
                low = counted
                total = views.total("a")
                seen.append((low, total, counted + 1))

        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(20_000):
            views.increment("a")
            counted += 1
        stop.set()
        reader.join()
    assert all(low <= total <= high for low, total, high in seen)
    assert len(seen) > 10


def test_async_increment_is_counted_by_the_flusher(views, sink, clock):
    views.async_increment("a", 3)
    views.async_increment("a")
    clock.advance(0.0)
    assert views.count("a") == 4
    clock.advance(5.1)
    assert sink.counts == {"a": 4}


def test_async_increment_refuses_what_is_known_to_be_wrong_and_logs_the_rest(make_buffer, clock, caplog):
    class Picky(MemorySink):
        def check_key(self, key):
            if key == "bad":
                raise TypeError("bad key")

    views = make_buffer(Picky(), max_keys=2)
    with pytest.raises(TypeError, match="unhashable"):
        views.async_increment([])
    for count in (True, 1.5, "1"):
        with pytest.raises(TypeError, match="expected an int"):
            views.async_increment("a", count)
    views.async_increment("bad", 7)
    clock.advance(0.0)
    assert "async_increment('bad', 7) was not accepted" in caplog.text
    with pytest.raises(TypeError, match="bad key"):
        views.increment("bad")
    assert views.stats().accepted == 0


def test_async_increments_are_bounded(clock):
    views = StatBuffer(FaultySink(MemorySink(), [Fault.REFUSE] * 99), clock=clock, max_keys=3).start()
    views.update("abc")
    clock.advance(0.0)
    for _ in range(3):
        views.async_increment("d")
        clock.advance(0.0)
    with pytest.raises(BufferFull):
        views.async_increment("d")
    clock.advance(300.0)
    for _ in range(3):
        clock.advance(300.0)
    views.sink._script = iter(())
    assert views.stop(None).complete
    assert views.stats().accepted == 6


def test_async_increment_inside_a_signal_handler_and_a_finalizer(sink):
    with StatBuffer(sink, interval=0.01, timeout=0.0) as views:

        class Cycle:
            def __init__(self) -> None:
                self.me = self

            def __del__(self) -> None:
                views.async_increment("finalized")

        old = signal.signal(signal.SIGALRM, lambda *_: views.async_increment("signalled"))
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        try:
            for number in range(30_000):
                views.increment(number % 50)
                Cycle()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
        gc.collect()
        views.flush(timeout=30)
    assert sink.counts["finalized"] == 30_000
    assert sink.counts["signalled"] > 0
    assert sum(count for key, count in sink.counts.items() if isinstance(key, int)) == 30_000


def test_reset_discards_what_is_pending_and_says_how_much(views, sink, clock):
    views.update({"a": 4, "b": 5})
    assert views.reset() == 9
    assert views.stats().dropped == 9
    clock.advance(10.0)
    assert sink.counts == {}


def test_check_key_is_asked_once_for_each_new_key(make_buffer, clock):
    asked = []

    class Picky(MemorySink):
        def check_key(self, key):
            asked.append(key)
            if not isinstance(key, str):
                raise TypeError(f"key {key!r}: expected text")

    views = make_buffer(Picky())
    for _ in range(3):
        views.increment("a")
    with pytest.raises(TypeError, match="key 5: expected text"):
        views.increment(5)
    assert asked == ["a", 5]
    assert views.stats().accepted == 3


# Bounds


def test_a_full_buffer_refuses_new_keys_and_takes_known_ones(make_buffer, clock):
    sink = FaultySink(MemorySink(), [Fault.REFUSE] * 3)
    views = make_buffer(sink, max_keys=2, interval=60.0)
    views.update(["a", "b"])
    with pytest.raises(
        BufferFull, match=r"2 keys are pending \(max_keys\): the increment of new key 'c' was not accepted"
    ) as caught:
        views.increment("c")
    assert (caught.value.key, caught.value.max_keys) == ("c", 2)
    views.increment("a")
    clock.advance(30.0)  # a full buffer does not wait for the interval
    assert sink.inner.counts == {"a": 2, "b": 1}
    views.increment("c")


def test_a_full_buffer_can_fold(make_buffer, clock, sink):
    views = make_buffer(FaultySink(sink, [Fault.REFUSE] * 2), max_keys=2, on_full="fold", overflow_key="other")
    for key in "abcdea":
        views.increment(key)
        clock.advance(0.0)  # a full buffer flushes ahead: let the refused batch come back first
    clock.advance(60.0)
    assert sink.counts == {"a": 2, "b": 1, "other": 3}


def test_a_full_buffer_can_block_until_there_is_room(sink):
    with StatBuffer(sink, max_keys=10, interval=60.0, on_full="block") as views:
        threads = [
            threading.Thread(target=views.update, args=(range(start, start + 500),)) for start in (0, 500, 1_000)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(sink.counts) == 1_500


def test_blocking_ends_after_full_timeout(make_buffer, clock):
    sink = FaultySink(MemorySink(), [Fault.REFUSE] * 1_000)
    views = make_buffer(sink, max_keys=1, on_full="block", full_timeout=3.0, interval=1.0, backoff=50.0)
    views.increment("a")
    clock.advance(1.1)
    before = clock.monotonic()
    with pytest.raises(BufferFull):
        views.increment("b")
    assert clock.monotonic() - before == pytest.approx(3.0, abs=0.2)


def test_a_handler_that_counts_is_never_blocked_by_itself(clock):
    errors = []

    class Views(StatBuffer, interval=1.0, max_keys=1, on_full="block"):
        def handle_batch(self, batch):
            if "a" not in batch.counts:
                return
            self.increment("x")
            try:
                self.increment("y")
            except BufferFull as error:
                errors.append(error)

    views = Views(clock=clock).start()
    views.increment("a")
    clock.advance(1.1)
    assert len(errors) == 1
    views.reset()


# When the machine itself fails


def test_counts_wait_while_no_thread_can_be_started(clock, sink, monkeypatch, caplog):
    views = StatBuffer(sink, clock=clock, interval=1.0).start()
    spawn, fails = clock.spawn, [True, True]

    def no_threads(target, name):
        if fails:
            fails.pop()
            raise RuntimeError("can't start new thread")
        spawn(target, name)

    monkeypatch.setattr(clock, "spawn", no_threads)
    views.increment("a")
    views.increment("b")
    assert views.stats().pending == 2
    assert "can't be started; counts wait in memory" in caplog.text
    views.increment("c")  # the next new key asks again
    clock.advance(1.1)
    assert sum(sink.counts.values()) == 3


def test_an_error_of_the_flusher_itself_does_not_end_it(clock, sink, monkeypatch, caplog):
    views = StatBuffer(sink, clock=clock, interval=1.0, backoff=1.0).start()
    attempt = views._delivery.attempt
    failures = [OSError("a bug")]

    def buggy():
        if failures:
            raise failures.pop()
        return attempt()

    monkeypatch.setattr(views._delivery, "attempt", buggy)
    views.increment("a")
    clock.advance(5.0)
    assert sink.counts == {"a": 1}
    assert "met an error of its own and goes on" in caplog.text


def test_a_callback_sink_does_the_work_itself_when_no_pool_can_be_had(monkeypatch):
    calls = []
    sink = CallbackSink(lambda key, count: calls.append((key, count)), workers=4)

    def refuse(*_args, **_kwargs):
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    sink.apply(Batch("w", 1, {"a": 1, "b": 2}))
    assert sorted(calls) == [("a", 1), ("b", 2)]
    assert "CallbackSink" in repr(sink)
    assert "BatchCallbackSink" in repr(BatchCallbackSink(print))


def test_a_key_that_is_seen_again_between_two_steps_of_a_take_waits_for_the_next():
    class Steps:
        """A table that hands out "a" twice in one take, as when somebody counts in between."""

        def __init__(self) -> None:
            self.steps = [({"a": 1}, 1.0), ({"a": 5, "b": 2}, 2.0), ({}, float("inf"))]
            self.returned: list[object] = []

        def take_due(self, _now, _limit):
            return self.steps.pop(0)

        def put_back(self, counts, **options):
            self.returned.append((counts, options))

    table = Steps()
    ledger = Ledger(table)
    batch, born = ledger.take(0.0, 100)
    assert batch is not None
    assert (batch.counts, born) == ({"a": 1, "b": 2}, 1.0)
    assert table.returned == [({"a": 5}, {"delay": 0.0, "born": 2.0})]
    assert ledger.in_flight == 3
