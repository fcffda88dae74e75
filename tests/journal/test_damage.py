"""Journals that are not what was written: each byte flipped, cut off anywhere, foreign, too new.

Whatever was done to the file: counting goes on, no key gets more than was counted, what is missing is told, and the file is
kept.
"""

from __future__ import annotations

import logging
import random
import shutil
import sqlite3
from typing import TYPE_CHECKING

import pytest

from statbuffer import SinkError, StatBuffer
from statbuffer._journal import _file
from statbuffer.testing import FakeClock, Fault, FaultySink, MemorySink

if TYPE_CHECKING:
    from collections import Counter
    from pathlib import Path

FILE, WAL = "journal.sqlite3", "journal.sqlite3-wal"


class Specimen:
    """A journal as a killed process left it: moves that wait, sealed batches of which one is in doubt, a dead letter."""

    def __init__(self, folder: Path, *, in_doubt: Fault, with_wal: bool) -> None:
        clock, sink = FakeClock(), MemorySink()
        faulty = FaultySink(
            sink, [Fault.NONE, Fault.NONE, in_doubt] + [Fault.LOSE_REQUEST] * 999, reject={"dead": "no"}
        )
        views = StatBuffer(
            faulty, clock=clock, journal=folder / "made", interval=5.0, batch_keys=4, fsync=False
        ).start()
        self.accepted: Counter[object] = sink.counts.__class__()
        for step in range(3):
            counts = {f"key-{step}-{number}": 100 * step + number + 1 for number in range(6)} | {"hot": 1000 + step}
            if step == 0:
                counts["dead"] = 77
            views.update(counts)
            self.accepted.update(counts)
            clock.advance(0.2 if step == 2 else 6.0)
        views.increment("late", 5)
        self.accepted["late"] = 5
        clock.advance(0.2)
        self.path = folder / "specimen"
        if with_wal:
            shutil.copytree(folder / "made", self.path)
            views.stop(0)
        else:
            views.stop(1.0)
            assert views._journaled is not None
            assert views._journaled.relay.ended.wait(10)
            shutil.copytree(folder / "made", self.path)
        self.stored, self.watermarks = sink.counts.copy(), dict(sink._watermarks)
        assert (self.path / "live" / WAL).exists() == with_wal
        assert self.stored
        assert sum(self.stored.values()) < sum(self.accepted.values()) - 77

    def revive(self, folder: Path, damage) -> tuple[MemorySink, StatBuffer | None]:
        """Damage a copy, start a buffer on it and let it do what it can."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.path, folder)
        damage(folder / "live")
        sink, clock = MemorySink(), FakeClock()
        sink.counts.update(self.stored)
        sink._watermarks.update(self.watermarks)
        views = StatBuffer(sink, clock=clock, journal=folder, interval=1.0, fsync=False, timeout=1.0)
        try:
            views.start()
        except SinkError as error:
            assert "later version" in str(error)  # a flipped version number: said clearly, nothing touched
            return sink, None
        views.increment("new", 3)
        clock.advance(8.0)
        return sink, views

    def check(self, folder: Path, damage, caplog: pytest.LogCaptureFixture, told: str) -> int:
        """Return how much is missing."""
        caplog.clear()
        sink, views = self.revive(folder, damage)
        if views is None:
            return 0
        assert sink.counts.pop("new", 0) == 3, f"{told}: counting does not go on: {views.stats()}"
        stats, letters = views.stats(), {letter.key: letter.count for letter in views.dead_letters()}
        assert stats.balanced, f"{told}: {stats}"
        views.stop(1.0)
        missing = 0
        for key, count in self.accepted.items():
            found = sink.counts.pop(key, 0) + letters.get(key, 0)
            assert found <= count, f"{told}: {key} was counted {count} times and comes out {found} times"
            missing += count - found
        assert not sink.counts, f"{told}: nobody counted {sink.counts}"
        if missing:
            errors = [record.message for record in caplog.records if record.levelno >= logging.ERROR]
            assert errors, f"{told}: {missing} are missing and nobody says so"
            assert list(folder.glob("damaged-*")) + list(folder.glob("kept-*")), f"{told}: the file was not kept"
        return missing


@pytest.fixture(scope="module", params=[Fault.LOSE_ANSWER, Fault.LOSE_REQUEST], ids=["stored", "not-stored"])
def in_doubt(request):
    return request.param


@pytest.fixture(scope="module")
def clean(tmp_path_factory, in_doubt):
    """A file whose process ended well."""
    return Specimen(tmp_path_factory.mktemp("clean"), in_doubt=in_doubt, with_wal=False)


@pytest.fixture(scope="module")
def killed(tmp_path_factory, in_doubt):
    """A file with a write-ahead log, as after SIGKILL."""
    return Specimen(tmp_path_factory.mktemp("killed"), in_doubt=in_doubt, with_wal=True)


def flip(name: str, at: int, mask: int = 0xFF):
    def damage(live: Path) -> None:
        with (live / name).open("r+b") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ mask]))

    return damage


def cut(name: str, size: int):
    def damage(live: Path) -> None:
        with (live / name).open("r+b") as file:
            file.truncate(size)

    return damage


def page_of(directory: Path, table: str) -> int:
    """Return where the table's first page begins."""
    connection = sqlite3.connect(f"file:{directory / 'live' / FILE}?mode=ro", uri=True)
    (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    connection.close()
    return (int(page) - 1) * 4096


def offsets(path: Path, wanted: int, rng: random.Random) -> list[int]:
    """Some of the bytes that are not zero, and a few that are."""
    data = path.read_bytes()
    used = [at for at, byte in enumerate(data) if byte]
    empty = [at for at, byte in enumerate(data) if not byte]
    return sorted(rng.sample(used, min(wanted, len(used))) + rng.sample(empty, min(wanted // 5, len(empty))))


def test_an_undamaged_file_comes_out_whole(clean, killed, tmp_path, caplog):
    for specimen in (clean, killed):
        assert specimen.check(tmp_path / "j", lambda live: None, caplog, "nothing done") == 0
        assert not list((tmp_path / "j").glob("damaged-*"))


@pytest.mark.parametrize("name", [FILE, WAL])
def test_a_flipped_byte_is_found_and_told(clean, killed, tmp_path, caplog, name):
    specimen = clean if name == FILE else killed
    for at in [*range(0, 100, 7), *offsets(specimen.path / "live" / name, 20, random.Random(4))]:
        specimen.check(tmp_path / "j", flip(name, at), caplog, f"byte {at} of {name} flipped")


@pytest.mark.torture
@pytest.mark.parametrize("name", [FILE, WAL])
def test_every_byte_flipped(clean, killed, tmp_path, caplog, name, capsys):
    specimen = clean if name == FILE else killed
    size = (specimen.path / "live" / name).stat().st_size
    rng = random.Random(5)
    whole = 0
    tried = offsets(specimen.path / "live" / name, size, rng)
    for at in tried:
        mask = rng.choice([0xFF, 1 << rng.randrange(8)])
        whole += specimen.check(tmp_path / "j", flip(name, at, mask), caplog, f"byte {at} of {name} ^ {mask}") == 0
    with capsys.disabled():
        print(f"\nflips, {name}: {len(tried)} of {size} bytes flipped one at a time; {whole} times nothing was lost")


@pytest.mark.parametrize("name", [FILE, WAL])
def test_a_file_that_is_cut_off_is_found_and_told(clean, killed, tmp_path, caplog, name):
    specimen = clean if name == FILE else killed
    size = (specimen.path / "live" / name).stat().st_size
    for length in [*range(0, size, 4096), 1, 100, size - 1]:
        if name == WAL and length < size:  # a log that ends early looks like one that was not written further
            _, views = specimen.revive(tmp_path / "j", cut(name, length))
            assert views is not None
            assert views.stats().balanced
            views.stop(1.0)
        else:
            specimen.check(tmp_path / "j", cut(name, length), caplog, f"{name} cut to {length}")


def test_damage_to_half_of_the_pages_leaves_what_the_other_half_holds(clean, tmp_path, caplog):
    size = (clean.path / "live" / FILE).stat().st_size
    for seed in range(12):
        rng = random.Random(seed)
        pages = [page for page in range(1, size // 4096) if rng.random() < 0.5]

        def damage(live: Path, pages: list[int] = pages, rng: random.Random = rng) -> None:
            with (live / FILE).open("r+b") as file:
                for page in pages:
                    file.seek(page * 4096)
                    file.write(rng.randbytes(4096))

        clean.check(tmp_path / "j", damage, caplog, f"seed {seed}, pages {pages}")


@pytest.mark.parametrize("content", [b"", b"hello\n" * 1000, bytes(8192)])
def test_a_foreign_file_is_set_aside(tmp_path, caplog, content, directory):
    (directory / "live").mkdir(parents=True)
    (directory / "live" / FILE).write_bytes(content)
    sink, clock = MemorySink(), FakeClock()
    views = StatBuffer(sink, clock=clock, journal=directory, interval=1.0, fsync=False).start()
    views.increment("a")
    clock.advance(30.0)
    assert sink.counts == {"a": 1}
    assert "is damaged; it is set aside" in caplog.text
    (aside,) = directory.glob("damaged-*")
    assert (aside / FILE).read_bytes() == content


def test_a_damaged_file_is_salvaged_once_though_the_process_dies_in_between(clean, tmp_path, monkeypatch):
    from statbuffer._journal import _takeover

    folder = tmp_path / "j"
    shutil.copytree(clean.path, folder)
    flip(FILE, page_of(folder, "moves"))(folder / "live")
    original = _takeover.salvage

    def die(*_args):
        raise OSError("no space left on device")

    monkeypatch.setattr(_takeover, "salvage", die)
    sink, clock = MemorySink(), FakeClock()
    sink.counts.update(clean.stored)
    sink._watermarks.update(clean.watermarks)
    views = StatBuffer(sink, clock=clock, journal=folder, interval=1.0, fsync=False).start()
    views.increment("a")
    clock.advance(5.0)
    assert views.stats().failing
    assert "no space left" in (views.stats().last_error or "")
    views.stop(1.0)
    monkeypatch.setattr(_takeover, "salvage", original)
    for _ in range(2):
        views = StatBuffer(sink, clock=clock, journal=folder, interval=1.0, fsync=False).start()
        clock.advance(30.0)
        views.stop()
    assert sink.counts["a"] == 1
    assert all(sink.counts[key] <= count for key, count in clean.accepted.items())
    assert sum(sink.counts.values()) > sum(clean.stored.values())


def test_damage_while_it_runs_is_mended_while_it_runs(journaled, clock, sink, directory, caplog):
    faulty = FaultySink(sink, [Fault.REFUSE] * 8)
    first, second = journaled(faulty), journaled(faulty)
    for step in range(5):
        first.increment("a", 1)
        second.increment("b", 1)
        clock.advance(0.2)
    for buffer in (first, second):
        buffer._journal.before_fork()  # closes the connections, so that nothing is in SQLite's memory
        buffer._journal.after_fork_in_parent()
    with (directory / "live" / FILE).open("r+b") as file:
        file.seek(page_of(directory, "moves"))
        file.write(b"\x55" * 4096)
    for step in range(20):
        first.increment("a", 1)
        second.increment("b", 1)
        clock.advance(0.2)
    clock.advance(600.0)
    for buffer in (first, second):
        stats = buffer.stats()
        assert stats.balanced
        assert stats.pending == stats.journaled == 0
    assert 20 <= sink.counts["a"] <= 25
    assert 20 <= sink.counts["b"] <= 25
    assert "set aside" in caplog.text


def test_a_newer_format_is_refused_and_left_alone(journaled, clock, sink, directory):
    journaled(sink).stop()
    connection = sqlite3.connect(directory / "live" / FILE)
    connection.execute("PRAGMA user_version = 9")
    connection.close()
    before = (directory / "live" / FILE).read_bytes()
    views = StatBuffer(sink, clock=clock, journal=directory)
    with pytest.raises(SinkError, match="has format 9, this statbuffer knows 1: it was written by a later version"):
        views.start()
    assert (directory / "live" / FILE).read_bytes() == before


def test_an_older_format_is_migrated(journaled, clock, sink, directory, monkeypatch):
    views = journaled(FaultySink(sink, [Fault.REFUSE] * 99))
    views.increment("a", 7)
    views.stop(1.0)
    monkeypatch.setattr(_file, "VERSION", 2)
    new = _file.SCHEMA | {"salvaged": "CREATE TABLE salvaged(name TEXT PRIMARY KEY, at REAL) WITHOUT ROWID"}
    monkeypatch.setattr(_file, "SCHEMA", new)
    monkeypatch.setattr(_file, "MIGRATIONS", {1: ("DROP TABLE salvaged", new["salvaged"])})
    journaled(sink)
    clock.advance(6.0)
    assert sink.counts == {"a": 7}
    connection = sqlite3.connect(directory / "live" / FILE)
    assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    connection.close()
