from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from tests.powercut.recorder import (
    Create,
    Mark,
    Mkdir,
    Operation,
    Rename,
    Sync,
    SyncDirectory,
    Truncate,
    Unlink,
    Write,
    build,
    crash_image,
    environment,
    image,
    load,
    marks,
    missing,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    Recorded = Callable[..., list[Operation]]

reason = missing()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

START = """
import os, sys, threading
root = os.environ["RECORDER_ROOT"]
os.chdir(root)
marks = os.open(root + ".marks", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
"""

FILES = """
d = os.open(".", os.O_RDONLY)
a = os.open("a", os.O_RDWR | os.O_CREAT, 0o600)
os.write(a, b"one")
os.write(a, b"two")
os.pwrite(a, b"three", 10)
os.fsync(a)
os.write(marks, b"a is safe")
os.mkdir("folder")
os.rename("a", "folder/b")
os.write(a, b"four")
os.fdatasync(a)
os.fsync(d)
os.ftruncate(a, 2)
os.close(a)
os.close(os.open(root + "/folder/b", os.O_WRONLY | os.O_TRUNC))
os.unlink("folder/b")
os.rmdir("folder")
open(root + "-beside", "w").close()
os.close(os.open("x-shm", os.O_WRONLY | os.O_CREAT))
"""

MANY = """
def work(name):
    folder = f"{name}-folder"
    os.mkdir(folder)
    shared = os.open("shared", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    own = os.open(f"{folder}/own", os.O_RDWR | os.O_CREAT | os.O_SYNC, 0o600)
    again = os.dup(own)
    for i in range(50):
        os.write(shared, f"{name} {i} ".encode() * (i % 7 + 1))
        os.writev(again, [b"x" * i, b"", str(i).encode()])
        os.pwritev(own, [b"p", b"q"], 3 * i)
    os.posix_fallocate(own, 0, 5000 + 1000 * len(name))
    os.rename(folder, f"{name}-renamed")
    os.write(own, b"after the rename")
    with open(f"{name}-renamed/text", "w") as file:
        file.write("text " * 5000)
    os.truncate(f"{name}-renamed/text", 700)
    os.replace(f"{name}-renamed/text", "text")
    os.close(os.open(f"{name}-renamed/gone", os.O_WRONLY | os.O_CREAT))
    os.remove(f"{name}-renamed/gone")

threads = [threading.Thread(target=work, args=["t" * n]) for n in (1, 2, 3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
child = os.fork()
work("child" if child == 0 else "parent")
if child == 0: os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""

ROWS = """
import sqlite3
db = sqlite3.connect("rows.db", isolation_level=None)
assert db.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
db.execute("PRAGMA synchronous=" + sys.argv[1])
db.execute("PRAGMA wal_autocheckpoint=12")
db.execute("CREATE TABLE row (id INTEGER PRIMARY KEY, filling BLOB)")
for i in range(30):
    db.execute("BEGIN")
    db.execute("INSERT INTO row VALUES (?, ?)", (i, bytes([i]) * 3000))
    db.execute("COMMIT")
    os.write(marks, str(i).encode())
db.close()
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("recorder"))


@pytest.fixture
def recorded(library: Path, tmp_path: Path) -> Recorded:
    """Runs code in a child, in an empty folder, and returns what it did there."""

    def run(code: str, *args: str) -> list[Operation]:
        (tmp_path / "root").mkdir()
        subprocess.run(
            [sys.executable, "-ISc", START + code, *args],
            env=environment(library, tmp_path / "root", tmp_path / "log"),
            check=True,
        )
        return load(tmp_path / "log")

    return run


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if not path.name.endswith("-shm")
    }


def after_cut(operations: Sequence[Operation], at: int, seed: int, folder: Path) -> dict[str, bytes | None]:
    crash_image(operations, at, random.Random(seed), folder / f"cut {seed}")
    return tree(folder / f"cut {seed}")


def test_what_a_child_does_to_its_files_is_recorded_in_order(recorded: Recorded):
    operations = recorded(FILES)
    assert operations == [
        Create("a"),
        Write("a", 0, b"one"),
        Write("a", 3, b"two"),
        Write("a", 10, b"three"),
        Sync("a"),
        Mark(b"a is safe"),
        Mkdir("folder"),
        Rename("a", "folder/b"),
        Write("folder/b", 6, b"four"),
        Sync("folder/b"),
        SyncDirectory("."),
        Truncate("folder/b", 2),
        Truncate("folder/b", 0),
        Unlink("folder/b"),
        Unlink("folder"),
    ]
    assert marks(operations, 5) == []
    assert marks(operations, 6) == [b"a is safe"]


def test_the_record_of_threads_and_forks_adds_up_to_the_disk(recorded: Recorded, tmp_path: Path):
    image(recorded(MANY), tmp_path / "image")
    disk = tree(tmp_path / "root")
    assert {"shared", "text", "t-renamed/own", "child-renamed/own"} < set(disk)
    assert tree(tmp_path / "image") == disk


def test_synced_bytes_survive_every_cut_and_later_ones_only_some(tmp_path: Path):
    operations: list[Operation] = [
        Mkdir("d"),
        Create("d/a"),
        Write("d/a", 0, b"x" * 5000),
        Write("d/a", 6000, b"y"),
        Rename("d", "e"),
        Sync("e/a"),
        Rename("e/a", "b"),
        Write("b", 0, b"z" * 2000),
        Sync("b"),
        Write("b", 1000, b"late"),
    ]
    first, second = b"x" * 5000 + bytes(1000) + b"y", b"z" * 2000 + b"x" * 3000 + bytes(1000) + b"y"
    found = set()
    for seed in range(50):
        assert after_cut(operations, 7, seed, tmp_path / "7") == {"b": first, "e": None}, f"seed {seed}"
        left = after_cut(operations, 10, seed, tmp_path / "10")["b"]
        assert left in {second, second[:1000] + b"late" + second[1004:]}, f"seed {seed}"
        found.add(left)
    assert len(found) == 2


def test_a_file_that_was_not_synced_may_have_its_new_name_and_nothing_in_it(tmp_path: Path):
    operations: list[Operation] = [
        Create("a"),
        Write("a", 0, b"old"),
        Sync("a"),
        Create("new"),
        Write("new", 0, b"new"),
        Rename("new", "a"),
    ]
    found = [after_cut(operations, 6, seed, tmp_path) for seed in range(50)]
    assert {"a": b""} in found
    assert {"a": b"new"} in found
    assert all(left in ({"a": b""}, {"a": b"new"}) for left in found)


def test_a_write_is_torn_between_sectors(tmp_path: Path):
    operations: list[Operation] = [Create("a"), Write("a", 0, bytes(2048)), Sync("a"), Write("a", 100, b"x" * 1200)]
    found = {after_cut(operations, 4, seed, tmp_path)["a"] for seed in range(400)}
    before, after = bytes(2048), bytes(100) + b"x" * 1200 + bytes(748)
    torn = {side for at in (512, 1024) for side in (before[:at] + after[at:], after[:at] + before[at:])}
    assert found == {before, after} | torn


def test_the_same_seed_gives_the_same_cut(tmp_path: Path):
    operations: list[Operation] = []
    for name in "abcdefgh":
        operations += [Create(name), *(Write(name, 700 * i, name.encode() * 900) for i in range(20))]
    for seed in range(5):
        left = [after_cut(operations, len(operations), seed, tmp_path / str(turn)) for turn in (1, 2)]
        assert left[0] == left[1], f"seed {seed}"


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("mmap", "import mmap; f = open('a', 'w+b'); f.truncate(9); mmap.mmap(f.fileno(), 9)[0] = 1"),
        ("sendfile", "os.sendfile(os.open('a', os.O_WRONLY | os.O_CREAT), os.open(sys.executable, os.O_RDONLY), 0, 9)"),
        ("link", "open('a', 'w').close(); os.link('a', 'b')"),
        ("rename", "open('../root-beside', 'w').close(); os.rename('../root-beside', 'a')"),
    ],
)
def test_what_the_model_does_not_know_is_refused(recorded: Recorded, call: str, code: str):
    with pytest.raises(ValueError, match=f"the model doesn't know {call}"):
        recorded(code)


def test_a_preloaded_library_and_the_rest_of_the_environment_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LD_PRELOAD", "/other.so")
    env = environment(tmp_path / "it.so", tmp_path / "root", tmp_path / "log")
    assert env["LD_PRELOAD"].split() == [str((tmp_path / "it.so").resolve()), "/other.so"]
    assert env["PATH"] == os.environ["PATH"]
    with pytest.raises(ValueError, match="the log lies in the root"):
        environment(tmp_path / "it.so", tmp_path, tmp_path / "log")


def rows_after_cut(operations: Sequence[Operation], at: int, seed: int, folder: Path) -> int:
    """How many rows the recovered database holds, 0 while it has no table. It must be whole, and they the first."""
    crash_image(operations, at, random.Random(seed), folder)
    with closing(sqlite3.connect(folder / "rows.db")) as db:
        db.execute("PRAGMA synchronous=OFF")
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)], f"seed {seed}, cut {at}"
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'row'").fetchall():
            return 0
        rows = db.execute("SELECT * FROM row ORDER BY id").fetchall()
        assert rows == [(i, bytes([i]) * 3000) for i in range(len(rows))], f"seed {seed}, cut {at}"
        return len(rows)


def cuts(operations: Sequence[Operation]) -> list[tuple[int, int]]:
    return [(seed, random.Random(f"cut {seed}").randint(0, len(operations))) for seed in range(60)]


def test_a_database_synced_at_each_commit_holds_every_marked_row_after_any_cut(recorded: Recorded, tmp_path: Path):
    operations = recorded(ROWS, "FULL")
    assert marks(operations, len(operations)) == [str(i).encode() for i in range(30)]
    image(operations, tmp_path / "image")
    assert tree(tmp_path / "image") == tree(tmp_path / "root")
    for seed, at in cuts(operations):
        marked = len(marks(operations, at))
        rows = rows_after_cut(operations, at, seed, tmp_path / f"cut {seed}")
        assert marked <= rows <= marked + 1, f"seed {seed}, cut {at} of {len(operations)}"


def test_a_database_synced_at_checkpoints_stays_whole_and_loses_marked_rows_in_some_cuts(
    recorded: Recorded, tmp_path: Path
):
    operations = recorded(ROWS, "NORMAL")
    lost = 0
    for seed, at in cuts(operations):
        marked = len(marks(operations, at))
        rows = rows_after_cut(operations, at, seed, tmp_path / f"cut {seed}")
        assert rows <= marked + 1, f"seed {seed}, cut {at} of {len(operations)}"
        lost += rows < marked
    assert lost


def test_a_database_never_synced_loses_marked_rows_or_itself_in_some_cuts(recorded: Recorded, tmp_path: Path):
    operations = recorded(ROWS, "OFF")
    lost = broken = 0
    for seed, at in cuts(operations):
        try:
            lost += rows_after_cut(operations, at, seed, tmp_path / f"cut {seed}") < len(marks(operations, at))
        except (sqlite3.DatabaseError, AssertionError):
            broken += 1
    assert lost
    assert broken
