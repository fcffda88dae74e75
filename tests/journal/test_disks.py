"""Directories that can't be used, and disks that fail: a clear error at start, or counts that wait in memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from statbuffer import SinkError, StatBuffer
from statbuffer._journal import _directory
from statbuffer.testing import FakeClock, Fault, FaultySink, MemorySink

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="mounting and other users need root")


def test_a_file_in_the_way_is_refused(tmp_path, sink):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SinkError, match="expected a directory, found a file on the way"):
            StatBuffer(sink, journal=path).start()


def start_as_nobody(directory: Path) -> str:
    """Start a buffer in a child without rights; return what it raised. Forked, since the child may not import anything."""
    import pwd  # noqa: F401

    import statbuffer._journaled  # noqa: F401

    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setgid(65534)
        os.setuid(65534)
        try:
            StatBuffer(MemorySink(), journal=directory).start()
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as pipe:
        return pipe.read()


@root_only
@pytest.mark.parametrize("what", ["directory", "parent", "file"])
def test_somebody_elses_directory_is_refused_with_its_owner(what):
    folder = Path("/tmp") / f"statbuffer-test-{os.getpid()}-{what}"  # pytest's own are closed to others
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    try:
        directory = folder / "journal"
        if what == "parent":
            folder.chmod(0o755)
        else:
            StatBuffer(MemorySink(), journal=directory).start().stop()
            directory.chmod(0o755 if what == "directory" else 0o777)
        raised = start_as_nobody(directory)
        assert raised.startswith("SinkError: journal"), raised
        assert "belongs to root with mode" in raised
        assert "runs as nobody" in raised
        assert "give it a directory of its own, or mend the permissions" in raised
    finally:
        shutil.rmtree(folder)


def test_a_file_system_that_hosts_share_is_refused(tmp_path, sink, monkeypatch):
    monkeypatch.setattr(_directory, "_file_system", lambda _path: "nfs4")
    with pytest.raises(SinkError, match="it lies on nfs4, which hosts share; a journal needs a disk of its own host"):
        StatBuffer(sink, journal=tmp_path / "j").start()


def test_a_system_without_flock_is_told(tmp_path, sink, monkeypatch):
    monkeypatch.setattr(_directory, "fcntl", None)
    with pytest.raises(SinkError, match="this system has no flock"):
        StatBuffer(sink, journal=tmp_path / "j").start()


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A file system of its own that can be full."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@root_only
def test_a_full_disk_leaves_counts_in_memory_and_they_go_on_when_there_is_room(tmp_path, sink):
    clock = FakeClock()
    with small_disk(tmp_path / "disk", "3m") as disk:
        ballast = disk / "ballast"
        faulty = FaultySink(sink, [Fault.REFUSE] * 6)
        views = StatBuffer(faulty, clock=clock, journal=disk / "j", fsync=False, interval=1.0).start()
        views.increment("before", 1)
        clock.advance(0.2)
        ballast.write_bytes(b"")
        with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        for step in range(30):
            views.update({f"key-{number}-{'x' * 50}": 1 for number in range(step * 100, step * 100 + 100)})
            clock.advance(0.5)
        stats = views.stats()
        assert stats.balanced
        assert stats.failing
        assert "disk is full" in (stats.last_error or "") or "No space left" in (stats.last_error or ""), (
            stats.last_error
        )
        assert stats.pending + stats.in_flight + stats.journaled + stats.stored == 3001
        ballast.unlink()
        clock.advance(300.0)
        assert views.stats().stored == 3001
        assert sum(sink.counts.values()) == 3001
        assert not views.stats().failing
        views.stop()


@root_only
def test_a_disk_that_is_full_at_start_is_waited_for(tmp_path, sink):
    clock = FakeClock()
    with small_disk(tmp_path / "disk", "1m") as disk:
        ballast = disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        views = StatBuffer(sink, clock=clock, journal=disk / "j", fsync=False, interval=1.0).start()
        views.increment("a", 3)
        clock.advance(20.0)
        assert views.stats().failing
        assert not list((disk).glob("j/new-*"))
        ballast.unlink()
        clock.advance(120.0)
        assert sink.counts == {"a": 3}
        views.stop()


@root_only
def test_a_disk_that_turns_read_only_is_waited_for(tmp_path, sink):
    clock = FakeClock()
    with small_disk(tmp_path / "disk", "8m") as disk:
        views = StatBuffer(sink, clock=clock, journal=disk / "j", fsync=False, interval=1.0).start()
        views.increment("a", 3)
        clock.advance(5.0)
        for file in views._journal._files:  # type: ignore[union-attr]
            file.close()  # a file that is open for writing keeps the file system writable
        views._journal.directory.forget()  # type: ignore[union-attr]
        done = subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        views.increment("a", 4)
        clock.advance(20.0)
        stats = views.stats()
        assert (stats.stored + stats.journaled, stats.pending + stats.in_flight) == (3, 4)
        assert stats.failing
        assert str(disk) in (stats.last_error or "")
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        clock.advance(120.0)
        assert sink.counts == {"a": 7}
        views.stop()


def test_a_directory_that_is_deleted_under_it_is_made_anew(journaled, clock, sink, directory):
    views = journaled(sink)
    views.increment("a", 1)
    clock.advance(6.0)
    shutil.rmtree(directory)
    views.increment("a", 10)
    clock.advance(60.0)
    assert sink.counts == {"a": 11}


def test_a_relative_path_stays_where_it_was_meant(tmp_path, sink, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    clock = FakeClock()
    views = StatBuffer(sink, clock=clock, journal=Path("var") / "j", fsync=False)
    monkeypatch.chdir(tmp_path / "elsewhere")
    views.start()
    views.increment("a")
    views.flush()
    assert (tmp_path / "var" / "j" / "live").exists()
    views.stop()


def test_no_thread_to_be_had_leaves_counts_in_the_journal(journaled, clock, sink, monkeypatch):
    views = journaled(sink, timeout=0.0)
    clock.advance(1.0)
    spawn = clock.spawn

    def none(target, name):
        if name.endswith("-relay"):
            raise RuntimeError("can't start new thread")
        spawn(target, name)

    monkeypatch.setattr(clock, "spawn", none)
    views.increment("a")
    clock.advance(30.0)
    assert views.stats().journaled == 1
    monkeypatch.setattr(clock, "spawn", spawn)
    views.increment("b")
    clock.advance(30.0)
    assert sink.counts == {"a": 1, "b": 1}


def test_an_error_of_its_own_does_not_end_the_relay(journaled, clock, sink, monkeypatch):
    views = journaled(sink)
    seals = views._journaled.relay.seals
    take, left = seals.take, [3]

    def failing(now):
        if left[0]:
            left[0] -= 1
            raise ZeroDivisionError
        return take(now)

    views.increment("a")
    clock.advance(0.2)
    monkeypatch.setattr(seals, "take", failing)
    clock.advance(1.5)
    assert "ZeroDivisionError" in (views.stats().last_error or "")
    clock.advance(30.0)
    assert sink.counts == {"a": 1}
    assert views.stats().last_error is None


def test_a_settlement_that_can_not_be_written_is_written_later_and_not_delivered_again(directory, clock, monkeypatch):
    calls = []
    views = StatBuffer(
        lambda key, count: calls.append((key, count)), clock=clock, journal=directory, fsync=False, workers=1
    )
    views.start()
    seals = views._journaled.relay.seals  # type: ignore[union-attr]
    settle, left = seals.settle, [3]

    def failing(settlement):
        if left[0]:
            left[0] -= 1
            raise OSError("disk trouble")
        return settle(settlement)

    monkeypatch.setattr(seals, "settle", failing)
    views.increment("a", 2)
    clock.advance(30.0)
    assert calls == [("a", 2)]
    assert views.stats().stored == 2


def test_modes_of_what_it_makes_follow_the_umask(journaled, sink, directory):
    journaled(sink)
    umask = os.umask(0)
    os.umask(umask)
    mode = stat.S_IMODE((directory / "live" / "journal.sqlite3").stat().st_mode)
    assert mode == 0o644 & ~umask
    assert threading.active_count() < 20
