"""Counts between memory and the store: where they are at each moment, and that they come out as they went in."""

from __future__ import annotations

import json
import sqlite3
import threading
import uuid
from datetime import date
from typing import Any

import pytest

from statbuffer import (
    FlushFailed,
    FlushTimeout,
    NotApplied,
    OptionError,
    Rejected,
    SinkError,
    StatBuffer,
    Stopped,
)
from statbuffer.testing import FakeClock, Fault, FaultySink, MemorySink


def file_of(directory) -> sqlite3.Connection:
    return sqlite3.connect(directory / "live" / "journal.sqlite3")


def rows(directory, sql: str, *values: object) -> list[Any]:
    connection = file_of(directory)
    try:
        return connection.execute(sql, values).fetchall()
    finally:
        connection.close()


# The way of a count


def test_counts_go_from_the_table_to_the_journal_to_the_store(journaled, clock, sink):
    views = journaled(sink)
    views.increment("a", 3)
    assert views.stats().pending == 3
    clock.advance(0.2)
    stats = views.stats()
    assert (stats.pending, stats.journaled, stats.stored) == (0, 3, 0)
    assert sink.counts == {}
    clock.advance(5.1)
    stats = views.stats()
    assert (stats.journaled, stats.stored, stats.batches) == (0, 3, 1)
    assert sink.counts == {"a": 3}


def test_many_moves_are_one_write(journaled, clock, sink):
    views = journaled(sink)
    for _ in range(20):
        views.increment("hot", 2)
        clock.advance(0.2)
    clock.advance(2.0)
    assert [dict(batch.counts) for batch in sink.batches] == [{"hot": 40}]


def test_several_buffers_of_a_host_make_one_write(journaled, clock, sink):
    first, second = journaled(sink), journaled(sink)
    first.increment("a", 1)
    second.increment("a", 10)
    second.increment("b", 100)
    clock.advance(6.0)
    assert [dict(batch.counts) for batch in sink.batches] == [{"a": 11, "b": 100}]
    assert (first.stats().stored, second.stats().stored) == (1, 110)


def test_all_kinds_of_keys_come_out_as_they_went_in(journaled, clock, sink):
    views = journaled(sink)
    keys = ["é\x00\ud800", b"\xff", 7, True, None, 0.5, ("t", (1, "x")), uuid.UUID(int=3), date(2026, 11, 23), 'q"\\u']
    for number, key in enumerate(keys, 1):
        views.increment(key, number)
    views.flush()
    assert sink.counts == {key: number for number, key in enumerate(keys, 1)}
    assert sorted(map(repr, sink.counts)) == sorted(map(repr, keys))


def test_a_key_that_is_no_text_is_refused_where_it_is_counted(journaled, sink):
    views = journaled(sink)
    with pytest.raises(TypeError, match="can't be kept as text: expected str, bytes"):
        views.increment(frozenset({1}))
    assert views.stats().accepted == 0


def test_the_sinks_own_check_of_keys_is_asked_too(journaled):
    class Picky(MemorySink):
        def check_key(self, key):
            if key == "bad":
                raise TypeError("the sink can't hold it")

    views = journaled(Picky())
    with pytest.raises(TypeError, match="the sink can't hold it"):
        views.increment("bad")
    views.increment("good")


def test_equal_keys_of_different_types_are_one_key_of_a_batch(journaled, clock, sink):
    first, second = journaled(sink), journaled(sink)
    first.increment(1, 1)
    second.increment(True, 10)
    clock.advance(6.0)
    assert sink.counts == {1: 11}
    assert (first.stats().stored, second.stats().stored) == (1, 10)


def test_a_key_that_comes_to_zero_on_the_way_is_not_delivered(journaled, clock, sink):
    views = journaled(sink)
    views.increment("a", 5)
    clock.advance(0.2)
    views.increment("a", -5)
    views.increment("b", 1)
    clock.advance(6.0)
    assert sink.counts == {"b": 1}
    assert views.stats().stored == 1
    views.increment("c", 7)
    clock.advance(0.2)
    views.increment("c", -7)
    clock.advance(6.0)
    assert views.stats().journaled == 0
    assert len(sink.batches) == 1


def test_large_seals_travel_in_batches(journaled, clock, sink):
    views = journaled(sink, batch_keys=10)
    views.update(range(95))
    clock.advance(6.0)
    assert [len(batch) for batch in sink.batches] == [10] * 9 + [5]
    assert [batch.seq for batch in sink.batches] == list(range(1, 11))
    assert views.stats().stored == 95


def test_sums_past_64_bits_are_sealed_move_by_move(journaled, clock, sink):
    first, second = journaled(sink), journaled(sink)
    first.increment("a", 2**62)
    second.increment("a", 2**62)
    clock.advance(0.2)
    first.increment("a", 2**62)
    clock.advance(12.0)
    assert sink.counts == {"a": 3 * 2**62}
    assert first.stats().stored == 2**63


def test_jitter_spreads_the_seals(journaled, clock, sink):
    views = journaled(sink, interval=1.0, jitter=4.0)
    gaps = []
    for _ in range(30):
        before, started = len(sink.batches), clock.monotonic()
        views.increment("a")
        while len(sink.batches) == before:
            clock.advance(0.05)
        gaps.append(clock.monotonic() - started)
    assert min(gaps) >= 1.0
    assert max(gaps) <= 5.4
    assert max(gaps) - min(gaps) > 1.0


# Waiting


def test_sync_returns_when_all_is_in_the_journal(journaled, sink, directory):
    views = journaled(sink)
    views.update({"a": 1, "b": 2})
    views.sync()
    assert views.stats().journaled == 3
    assert rows(directory, "SELECT sum(total) FROM moves") == [(3,)]
    assert sink.counts == {}


def test_sync_without_a_journal_says_what_to_do(views):
    with pytest.raises(RuntimeError, match="has no journal to sync to: pass journal=DIR, or use flush"):
        views.sync()


def test_flush_returns_when_all_is_stored(journaled, clock, sink):
    views = journaled(sink)
    views.update({"a": 1, "b": 2})
    clock.advance(0.2)
    views.increment("a", 10)
    views.flush()
    assert sink.counts == {"a": 11, "b": 2}
    assert views.stats().stored == 13


def test_flush_of_one_key_waits_for_that_key(journaled, sink):
    faulty = FaultySink(sink, reject={"bad": "never"})
    views = journaled(faulty)
    views.update({"good": 1, "bad": 2})
    views.flush("good")
    assert sink.counts == {"good": 1}
    with pytest.raises(FlushFailed, match="2 went to dead_letters"):
        views.flush("bad")
    views.flush(object())  # a key that can't be in any journal


def test_flush_times_out_while_the_store_is_down_and_loses_nothing(journaled, clock, sink):
    views = journaled(FaultySink(sink, [Fault.REFUSE] * 5))
    views.increment("a", 7)
    with pytest.raises(
        FlushTimeout, match="not stored within 2 s; 7 still on the way, nothing lost; the store last said"
    ):
        views.flush(timeout=2.0)
    clock.advance(300.0)
    assert sink.counts == {"a": 7}


def test_async_flush_delivers_soon(journaled, clock, sink):
    views = journaled(sink)
    views.increment("a")
    clock.advance(0.2)
    views.increment("b")
    views.async_flush()
    clock.advance(0.1)
    assert sink.counts == {"a": 1, "b": 1}
    batches = len(sink.batches)
    views.async_flush()
    clock.advance(0.1)
    assert len(sink.batches) == batches


def test_a_flush_in_another_buffer_is_heard(journaled, clock, sink):
    holder, other = journaled(sink), journaled(sink)
    holder.increment("a")
    clock.advance(0.2)
    assert holder._journaled.relay.delivers
    other.increment("b")
    other.flush()
    assert sink.counts == {"a": 1, "b": 1}
    assert not other._journaled.relay.delivers


def test_stop_while_somebody_flushes_tells_them(journaled, clock, sink):
    views = journaled(FaultySink(sink, [Fault.REFUSE] * 1000), backoff=1000.0)
    views.increment("a")
    raised = []

    def flush():
        try:
            views.flush()
        except Stopped as error:
            raised.append(str(error))

    thread = threading.Thread(target=flush)
    thread.start()
    while not views.stats().failures:
        pass
    report = views.stop(0)
    thread.join(10)
    assert raised
    assert "the rest is in the journal" in raised[0] or "stopped before" in raised[0]
    assert report.left >= 1


# Reading


def test_total_counts_each_place_once(journaled, clock, sink):
    first, second = journaled(sink), journaled(sink)
    first.increment("a", 1)
    clock.advance(6.0)  # stored
    second.increment("a", 10)
    clock.advance(0.2)  # journaled
    first.increment("a", 100)  # pending
    assert first.total("a") == 111
    assert second.total("a") == 11
    assert first.count("a") == 100
    assert first.totals(["a", "b"]) == {"a": 111, "b": 0}


@pytest.mark.parametrize("fault", [Fault.LOSE_ANSWER, Fault.LOSE_REQUEST])
def test_total_is_right_while_a_batch_is_in_doubt(journaled, clock, sink, fault):
    views = journaled(FaultySink(sink, [fault] + [Fault.REFUSE] * 100))
    views.increment("a", 5)
    clock.advance(8.0)
    views.increment("a", 1)
    assert views.total("a") == 6
    assert views.stats().journaled == 5


def test_the_books_balance_at_every_moment_of_a_stormy_life(journaled, clock, sink):
    views = journaled(FaultySink(sink, seed=3, rate=0.6), interval=0.5)
    for number in range(200):
        views.increment(number % 7, 1)
        clock.advance(0.05)
        assert views.stats().balanced
    clock.advance(600.0)
    assert sum(sink.counts.values()) == 200 == views.stats().stored


def test_the_oldest_count_has_its_age_in_the_journal_too(journaled, clock, sink):
    views = journaled(FaultySink(sink, [Fault.REFUSE] * 1000))
    views.increment("a")
    clock.advance(60.0)
    assert 59.0 < views.stats().oldest_pending_seconds < 61.0


def test_stats_tell_of_a_store_that_fails_in_the_process_that_delivers(journaled, clock, sink):
    holder = journaled(FaultySink(sink, [Fault.REFUSE] * 1000))
    other = journaled(sink)
    holder.increment("a")
    clock.advance(60.0)
    assert holder._journaled.relay.delivers
    for buffer in (holder, other):
        assert buffer.stats().failing
        assert "FaultySink refuses" in (buffer.stats().last_error or "")


# What fails


@pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.LOSE_REQUEST, Fault.LOSE_ANSWER])
def test_a_sealed_batch_is_offered_unchanged_until_it_is_answered(journaled, clock, sink, fault):
    faulty = FaultySink(sink, [fault] * 6)
    views = journaled(faulty)
    views.increment("a", 1)
    clock.advance(6.0)
    views.increment("a", 10)
    views.increment("b", 100)
    clock.advance(600.0)
    assert sink.counts == {"a": 11, "b": 100}
    assert [dict(batch.counts) for batch in sink.batches] == [{"a": 1}, {"a": 10, "b": 100}]
    first = [(batch.id, dict(batch.counts)) for batch in faulty.offered[:7]]
    assert first == [first[0]] * 7


@pytest.mark.parametrize("seed", range(6))
def test_exact_whatever_fails(directory, seed):
    clock, sink = FakeClock(), MemorySink()
    buffers = [
        StatBuffer(
            FaultySink(sink, seed=seed * 10 + number, rate=0.5, reject={"dead": "never"}),
            clock=clock,
            journal=directory,
            fsync=False,
            interval=1.0,
            batch_keys=3,
            timeout=4.0,
        ).start()
        for number in range(3)
    ]
    accepted = 0
    for step in range(60):
        for number, buffer in enumerate(buffers):
            buffer.increment(f"k{(step * 7 + number) % 11}", step + 1)
            accepted += step + 1
        if step % 20 == 5:
            buffers[0].increment("dead", 1000)
        clock.advance(0.3)
    clock.advance(900.0)
    assert sum(sink.counts.values()) == accepted, f"seed {seed}"
    assert [(letter.key, letter.count) for letter in buffers[1].dead_letters()] == [("dead", 3000)]
    assert buffers[0].stats().dead == 3000
    for buffer in buffers:
        assert buffer.stats().balanced
        assert buffer.stop(0).complete


def test_a_dead_letter_has_its_owners_and_can_be_retried(journaled, clock, sink):
    faulty = FaultySink(sink, reject={"bad": "no row for it"})
    first, second = journaled(faulty), journaled(faulty)
    first.update({"bad": 1, "good": 2})
    second.update({"bad": 10, "fine": 20})
    clock.advance(6.0)
    assert sink.counts == {"good": 2, "fine": 20}
    (letter,) = second.dead_letters()
    assert (letter.key, letter.count, letter.reason) == ("bad", 11, "no row for it")
    assert (first.stats().dead, second.stats().dead) == (1, 10)
    assert (first.stats().stored, second.stats().stored) == (2, 20)
    faulty.reject.clear()
    assert first.retry_dead_letters() == 11
    clock.advance(6.0)
    assert sink.counts["bad"] == 11
    assert (first.stats().dead, second.stats().dead) == (0, 0)
    assert (first.stats().stored, second.stats().stored) == (3, 30)


def test_dead_letters_past_64_bits_are_kept_apart(journaled, clock, sink):
    faulty = FaultySink(sink, reject={"bad": "never"})
    views = journaled(faulty)
    for _ in range(3):
        views.increment("bad", 2**62)
        clock.advance(6.0)
    assert [letter.count for letter in views.dead_letters()] == [3 * 2**62]
    assert views.stats().dead == 3 * 2**62
    faulty.reject.clear()
    views.retry_dead_letters()
    clock.advance(30.0)
    assert sink.counts == {"bad": 3 * 2**62}


def test_a_callback_settles_each_key_on_its_own(directory, clock):
    stored: dict[str, int] = {}
    broken = {"b"}

    def handle(key, count):
        if key in broken:
            raise ConnectionError("down")
        stored[key] = stored.get(key, 0) + count

    views = StatBuffer(handle, clock=clock, journal=directory, interval=5.0, workers=1, fsync=False).start()
    views.update({"a": 1, "b": 2, "c": 3})
    clock.advance(6.0)
    assert stored == {"a": 1, "c": 3}
    stats = views.stats()
    assert (stats.stored, stats.journaled) == (4, 2)
    views.increment("a", 10)
    clock.advance(30.0)
    assert stored == {"a": 11, "c": 3}
    with pytest.raises(FlushTimeout):
        views.flush("b", timeout=3.0)
    broken.clear()
    clock.advance(120.0)
    assert stored == {"a": 11, "b": 2, "c": 3}
    assert views.stats().stored == 16


def test_temporary_drops_and_the_books_of_each_buffer_say_so(journaled, clock, sink):
    faulty = FaultySink(sink, [Fault.REFUSE])
    first, second = journaled(faulty, restart="temporary"), journaled(faulty, restart="temporary")
    first.increment("a", 1)
    second.increment("a", 10)
    clock.advance(6.0)
    assert (first.stats().dropped, second.stats().dropped) == (1, 10)
    assert sink.counts == {}
    first.increment("a", 5)
    with_loss = pytest.raises(FlushFailed, match="5 dropped")
    faulty._script = iter([Fault.REFUSE])
    with with_loss:
        first.flush()


def test_a_key_whose_text_means_nothing_any_more_is_a_dead_letter(journaled, clock, sink, directory):
    views = journaled(FaultySink(sink, [Fault.REFUSE] * 3))
    views.update({"a": 1, "b": 2})
    clock.advance(0.2)
    views.stop(0)
    connection = file_of(directory)
    from statbuffer._journal._file import row_crc

    connection.create_function("row_crc", -1, row_crc)
    (text,) = connection.execute("SELECT counts FROM contents").fetchone()
    text = text.replace('"sb"', '"Egone:Class:NAME"')
    connection.execute("UPDATE contents SET counts = ?", (text,))
    connection.execute("UPDATE moves SET counts_crc = ?", (row_crc(text),))
    connection.execute(
        "UPDATE moves SET crc = row_crc(id, writer, seq, origin, moved, not_before, at, total, seal, counts_crc)"
    )
    connection.commit()
    connection.close()
    other = journaled(sink)
    clock.advance(10.0)
    assert sink.counts == {"a": 1}
    (letter,) = other.dead_letters()
    assert (letter.key, letter.count) == ("Egone:Class:NAME", 2)
    assert "stands for no key" in letter.reason


# While the store is down


def test_moves_fold_so_that_the_file_grows_with_the_keys_and_not_with_the_time(journaled, clock, sink, directory):
    faulty = FaultySink(sink, [Fault.REFUSE] * 10_000)
    first, second = journaled(faulty), journaled(faulty)
    for step in range(400):
        first.increment(f"k{step % 50}")
        second.increment("x")
        clock.advance(0.25)
    assert rows(directory, "SELECT count(*) FROM moves WHERE seal = 0")[0][0] < 300
    views = first.stats()
    assert views.journaled == 400
    faulty._script = iter(())
    clock.advance(120.0)
    assert sum(sink.counts.values()) == 800
    assert (first.stats().stored, second.stats().stored) == (400, 400)
    assert rows(directory, "SELECT count(*) FROM contents") == [(0,)]


def test_a_full_journal_leaves_counts_in_memory(journaled, clock, sink):
    faulty = FaultySink(sink, [Fault.REFUSE] * 10_000)
    views = journaled(faulty, journal_bytes_max=2**20)
    views.update([f"key {number:0100}" for number in range(12_000)])
    clock.advance(1.0)
    views.update([f"key {number:0100}" for number in range(12_000)])
    clock.advance(30.0)
    stats = views.stats()
    assert stats.journaled < 24_000
    assert stats.pending + stats.in_flight + stats.journaled == 24_000
    assert stats.failing
    assert "journal_bytes_max" in (stats.last_error or "")
    faulty._script = iter(())
    clock.advance(300.0)
    assert sum(sink.counts.values()) == 24_000


# Life


def test_stop_delivers_and_the_next_start_goes_on(journaled, clock, sink):
    views = journaled(sink)
    views.increment("a", 1)
    report = views.stop()
    assert report.complete
    assert report.journaled == 0
    assert sink.counts == {"a": 1}
    views.start()
    views.increment("a", 2)
    assert views.stop().complete
    assert sink.counts == {"a": 3}


def test_what_the_store_does_not_take_in_time_waits_in_the_journal(journaled, clock, sink):
    views = journaled(FaultySink(sink, [Fault.REFUSE] * 1000), shutdown=3.0)
    views.increment("a", 4)
    started = clock.monotonic()
    report = views.stop()
    assert clock.monotonic() - started <= 3.1
    assert (report.journaled, report.left, report.pending, report.in_flight) == (4, 4, {}, None)
    assert report.complete
    assert "4 in the journal" in str(report)
    successor = journaled(sink)
    clock.advance(6.0)
    assert sink.counts == {"a": 4}
    assert successor.stats().stored == 0


def test_a_with_block_does_not_raise_for_what_is_in_the_journal(directory, clock, sink):
    broken = FaultySink(sink, [Fault.REFUSE] * 100)
    with StatBuffer(broken, clock=clock, journal=directory, shutdown=1.0, fsync=False) as views:
        views.increment("a")


def test_stop_leaves_delivery_to_the_process_that_does_it(journaled, clock, sink):
    holder, other = journaled(sink), journaled(sink)
    holder.increment("a")
    clock.advance(0.2)
    other.increment("b", 5)
    report = other.stop()
    assert report.journaled == 5
    assert sink.counts == {}
    clock.advance(6.0)
    assert sink.counts == {"a": 1, "b": 5}


def test_the_one_that_delivers_hands_over_when_it_stops(journaled, clock, sink):
    holder, other = journaled(sink), journaled(sink)
    holder.increment("a")
    clock.advance(0.2)
    other.increment("b")
    clock.advance(0.2)
    holder.stop(0)
    clock.advance(6.0)
    assert sink.counts == {"a": 1, "b": 1}
    assert other._journaled.relay.delivers


def test_an_idle_buffer_lets_go_of_the_lock_and_wakes_nothing(journaled, clock, sink):
    views = journaled(sink, timeout=10.0)
    views.increment("a")
    clock.advance(30.0)
    assert not views._journaled.relay.delivers
    assert views._journaled.relay.ended.is_set()
    assert views._flusher.ended.is_set()
    views.increment("b")
    clock.advance(6.0)
    assert sink.counts == {"a": 1, "b": 1}


def test_counts_that_a_restarted_machine_finds_are_due(journaled, sink, directory, clock):
    late = FakeClock(now=1_000_000.0)
    before = StatBuffer(FaultySink(sink, [Fault.REFUSE] * 99), clock=late, journal=directory, fsync=False).start()
    before.increment("a")
    late.advance(0.2)
    before.stop(0)
    journaled(sink)
    clock.advance(0.2)
    assert sink.counts == {"a": 1}


def test_a_journal_serves_one_target(journaled, clock, sink, directory):
    views = journaled(FaultySink(sink, [Fault.REFUSE] * 100))
    other = MemorySink()
    other.target = "other"
    with pytest.raises(SinkError, match="is for memory, this buffer delivers to other, and a process has it open"):
        journaled(other)
    views.increment("a")
    views.stop(1.0)
    with pytest.raises(SinkError, match="it still holds counts for that: give each buffer a directory of its own"):
        journaled(other)
    journaled(sink).stop()
    journaled(other).increment("b")
    clock.advance(6.0)
    assert (sink.counts, other.counts) == ({"a": 1}, {"b": 1})


def test_a_copied_journal_goes_on_under_an_id_of_its_own(journaled, clock, sink, directory, tmp_path):
    import shutil

    views = journaled(sink)
    views.increment("a")
    clock.advance(6.0)
    views.increment("b")
    clock.advance(0.2)
    views.stop(0)
    shutil.copytree(directory, tmp_path / "copy")
    journaled(sink).stop()
    copy = journaled(sink, journal=tmp_path / "copy")
    copy.increment("c", 5)
    clock.advance(12.0)
    assert sink.counts["c"] == 5
    assert len({batch.writer for batch in sink.batches}) == 2


def test_a_journal_restored_in_place_is_found_out_by_the_store(journaled, clock, sink, directory, caplog):
    views = journaled(sink)
    views.increment("a")
    clock.advance(6.0)
    views.stop()
    path = directory / "live" / "journal.sqlite3"
    old = path.read_bytes()
    views = journaled(sink)
    for _ in range(3):
        views.increment("a")
        clock.advance(6.0)
    views.stop()
    with path.open("r+b") as file:  # the same inode, as a snapshot's rollback would leave it
        file.write(old)
        file.truncate()
    views = journaled(sink)
    views.increment("b", 9)
    clock.advance(60.0)
    assert sink.counts == {"a": 4, "b": 9}
    assert "is an old copy: the store has batch" in caplog.text
    assert views.stats().stored == 9


def test_books_of_buffers_that_are_long_gone_are_forgotten(journaled, clock, sink, directory):
    views = journaled(sink)
    views.increment("a")
    clock.advance(6.0)
    views.stop()
    connection = file_of(directory)
    connection.execute("UPDATE writers SET at = at - 100000")
    from statbuffer._journal._file import row_crc

    connection.create_function("row_crc", -1, row_crc)
    connection.execute("UPDATE writers SET crc = row_crc(writer, first, seq, moved, stored, dropped, pid, host, at)")
    connection.commit()
    connection.close()
    views.start()
    clock.advance(1.0)
    assert rows(directory, "SELECT count(*) FROM writers") == [(0,)]
    stats = views.stats()
    assert (stats.stored, stats.balanced) == (1, True)
    views.increment("a", 2)
    clock.advance(6.0)
    assert views.stats().stored == 3


def test_reset_discards_what_is_pending_only(journaled, clock, sink):
    views = journaled(sink)
    views.increment("a", 1)
    clock.advance(0.2)
    views.increment("b", 2)
    assert views.reset() == 2
    clock.advance(6.0)
    assert sink.counts == {"a": 1}
    assert (views.stats().dropped, views.stats().stored) == (2, 1)


def test_flush_in_the_relays_own_thread_is_refused(directory, clock):
    refused: list[str] = []

    def handle(_key, _count):
        try:
            views.flush()
        except RuntimeError as error:
            refused.append(str(error))

    views = StatBuffer(handle, clock=clock, journal=directory, workers=1, fsync=False).start()
    views.increment("a")
    clock.advance(6.0)
    assert "would wait for itself" in refused[0]


@pytest.mark.parametrize(
    ("option", "value"),
    [("journal", ""), ("journal", 7), ("fsync", "yes"), ("sync_interval", -1), ("journal_bytes_max", 1000)],
)
def test_wrong_options_are_refused(option, value):
    with pytest.raises(OptionError, match=f"{option}="):
        StatBuffer(MemorySink(), **{option: value})


def test_a_store_that_is_not_configured_right_fails_at_start(journaled):
    class Wrong(MemorySink):
        def open(self):
            raise SinkError("no such table")

    with pytest.raises(SinkError, match="no such table"):
        journaled(Wrong())


def test_a_store_that_is_down_at_start_is_waited_for(journaled, clock):
    class Late(MemorySink):
        tries = 0

        def open(self):
            self.tries += 1
            if self.tries < 4:
                raise NotApplied("not there yet")

    sink = Late()
    views = journaled(sink)
    views.increment("a")
    clock.advance(60.0)
    assert sink.counts == {"a": 1}


def test_rejected_keys_that_are_not_in_the_batch_are_no_reason_to_lose_any(journaled, clock, sink):
    views = journaled(FaultySink(sink, [Rejected("other", "?")]))
    views.increment("a")
    clock.advance(30.0)
    assert sink.counts == {"a": 1}


def test_the_file_says_what_it_is(journaled, clock, sink, directory):
    views = journaled(sink)
    views.increment(("t", 1), 3)
    clock.advance(0.2)
    assert rows(directory, "PRAGMA user_version") == [(1,)]
    ((text,),) = rows(directory, "SELECT counts FROM contents")
    assert json.loads(text) == {"(2:st2:i1": 3}


def test_a_fork_that_python_did_not_see_is_told_and_counts_wait_in_memory(journaled, clock, sink):
    """As in uWSGI, which forks in C: the child's hook runs, the one before the fork did not."""
    views = journaled(sink)
    views.increment("a")
    clock.advance(0.2)
    views._journal.after_fork()
    views.increment("b", 2)
    clock.advance(30.0)
    stats = views.stats()
    assert stats.failing
    assert "forked by something other than Python; start() the buffer after the fork" in (stats.last_error or "")
    assert stats.pending + stats.in_flight == 2
    from statbuffer._journal._file import _leaked

    while _leaked:
        _leaked.pop().close()
