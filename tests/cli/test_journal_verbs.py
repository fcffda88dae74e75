"""`statbuffer relay` and `statbuffer journal ...`, as commands."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest

from statbuffer import SQLSink, StatBuffer
from statbuffer.testing import FakeClock, Fault, FaultySink


def statbuffer(*arguments: object, code: int = 0) -> str:
    command = [sys.executable, "-m", "statbuffer.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def stored(path) -> dict[str, int]:
    with closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute("SELECT key, count FROM counters").fetchall())


@pytest.fixture
def left(tmp_path):
    """A journal in which counts and a dead letter are left, and the URL of the store that was down."""
    url = f"sqlite:///{tmp_path / 'store.db'}"
    faulty = FaultySink(SQLSink(url), [Fault.NONE, *[Fault.REFUSE] * 99], reject={"bad": "too\nlong"})
    clock = FakeClock()
    views = StatBuffer(faulty, clock=clock, journal=tmp_path / "journal", interval=1.0).start()
    views.increment("bad", 7)
    clock.advance(3.0)
    views.update({"/home": 3, "/über": 4})
    clock.advance(3.0)
    views.stop(1.0)
    assert views._journaled is not None
    assert views._journaled.relay.ended.wait(10)
    return tmp_path / "journal", url


def test_relay_once_delivers_what_is_there_and_ends(left, tmp_path):
    path, url = left
    said = statbuffer("relay", path, "--into", url, "--once")
    assert "7 counts stored in 1 batch" in said
    assert stored(tmp_path / "store.db") == {"/home": 3, "/über": 4}
    assert "0 counts stored" in statbuffer("relay", path, "--into", url, "--once")


def test_relay_once_says_when_the_store_can_not_take_it(left, tmp_path):
    path, _ = left
    with closing(sqlite3.connect(tmp_path / "store.db")) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        url = f"sqlite:///{tmp_path / 'store.db'}?timeout=0.1"
        said = statbuffer("relay", path, "--into", url, "--once", "--shutdown", "1", code=1)
    assert "the rest stays in the journal" in said
    assert "locked" in said


def test_relay_delivers_for_others_until_sigterm(tmp_path):
    url, path = f"sqlite:///{tmp_path / 'store.db'}", tmp_path / "journal"
    command = [sys.executable, "-m", "statbuffer.cli", "relay", str(path), "--into", url, "--interval", "0.2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 30
        while not (path / "live").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        with StatBuffer(url, journal=path, interval=0.2) as views:
            views.update({"a": 5, "b": 6})
            views.flush(timeout=20)
            assert views._journaled is not None
            assert not views._journaled.relay.delivers
            assert stored(tmp_path / "store.db") == {"a": 5, "b": 6}
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        assert "11 counts stored" in out
    finally:
        process.kill()
        process.wait()


def test_relay_refuses_a_journal_for_another_table(left):
    path, url = left
    said = statbuffer("relay", path, "--into", url, "--table", "others", "--once", code=4)
    assert "is for table counters (key: count), this buffer delivers to table others (key: count)" in said.replace(
        "\n", " "
    )


def test_status_says_what_is_in_it(left):
    path, _ = left
    said = statbuffer("journal", "status", path)
    assert "for table counters (key: count)" in said
    assert "waiting: 0 to be sealed, 7 in 1 batches" in said
    assert "delivered by: nobody just now" in said
    assert "FaultySink refuses" in said
    assert "dead letters: 1, 7 counts" in said
    assert f"pid {os.getpid()}" in said
    found = json.loads(statbuffer("journal", "status", path, "--json"))
    assert (found["sealed"], found["dead"], found["writers"][0]["moved"]) == (7, 7, 14)


def test_status_says_who_delivers(tmp_path):
    path = tmp_path / "journal"
    with StatBuffer(f"sqlite:///{tmp_path / 'store.db'}", journal=path, interval=60.0) as views:
        views.increment("a", 5)
        views.sync()
        deadline = time.monotonic() + 20
        while f"delivered by: pid {os.getpid()}" not in (said := statbuffer("journal", "status", path)):
            assert time.monotonic() < deadline, said
        assert "waiting: 5 to be sealed" in said


def test_check_finds_damage(left):
    path, url = left
    assert "the journal is sound" in statbuffer("journal", "check", path)
    file = path / "live" / "journal.sqlite3"
    content = file.read_bytes()
    at = content.index("/über".encode())
    file.write_bytes(content[:at] + b"X" + content[at + 1 :])
    said = statbuffer("journal", "check", path, code=4)
    assert "checksum" in said
    assert "the journal is damaged: the next process that delivers sets it aside" in said
    statbuffer("relay", path, "--into", url, "--once")
    assert "set aside: damaged-" in statbuffer("journal", "status", path)


def test_dead_letters_are_listed_and_retried(left, tmp_path):
    path, url = left
    assert statbuffer("journal", "dead", path) == "7\tbad\ttoo\\nlong\n"
    (letter,) = json.loads(statbuffer("journal", "dead", path, "--json"))
    assert (letter["key"], letter["count"], letter["reason"]) == ("bad", 7, "too\nlong")
    assert "7 counts go back" in statbuffer("journal", "retry", path)
    assert statbuffer("journal", "dead", path) == ""
    statbuffer("relay", path, "--into", url, "--once")
    assert stored(tmp_path / "store.db")["bad"] == 7


@pytest.mark.parametrize("verb", ["status", "check", "dead", "retry"])
def test_a_directory_without_a_journal_is_refused(tmp_path, verb):
    assert "holds no journal" in statbuffer("journal", verb, tmp_path, code=4)
    assert list(tmp_path.iterdir()) == []
