"""The command as users run it: in its own process, with pipes, signals and terminals."""

from __future__ import annotations

import os
import pty
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from typing import IO, TYPE_CHECKING, Any

import pytest

from statbuffer._cli.exits import Exit

from .conftest import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .conftest import Store

    Spawn = Callable[..., subprocess.Popen[bytes]]


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out.decode(), (err or b"").decode()


def send(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(data)
    process.stdin.flush()


def test_the_real_log_from_standard_input(spawn: Spawn, store: Store, real_log: Path) -> None:
    with real_log.open("rb") as log:
        process = spawn("count", "--format", "combined", "--key", "path", "--into", store.url, stdin=log)
        assert finish(process)[0] == 0
    assert (len(store.rows()), store.total()) == (1_498, 10_000)


def test_eight_processes_at_once(spawn: Spawn, store: Store, real_log: Path) -> None:
    options = ("--format", "combined", "--key", "path", "--into", store.url, "--shutdown", 60, "--top", 0)
    processes = [spawn("count", real_log, *options) for _ in range(8)]
    ended = [finish(process) for process in processes]
    assert [code for code, _, _ in ended] == [0] * 8, ended
    assert (len(store.rows()), store.total()) == (1_498, 80_000)


def test_a_trickle_is_stored_before_it_ends(spawn: Spawn, store: Store) -> None:
    process = spawn("count", "--field", 1, "--into", store.url, "--interval", 0.05)
    send(process, b"a\nb\nhalf a li")
    wait_until(lambda: store.rows() == {"a": 1, "b": 1})
    send(process, b"ne\n")
    wait_until(lambda: store.rows() == {"a": 1, "b": 1, "half": 1})
    code, out, err = finish(process)
    assert code == 0
    assert "3 lines, 0 bad, 3 increments" in out
    assert err == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, Exit.SIGINT), (signal.SIGTERM, Exit.SIGTERM)])
def test_a_signal_in_mid_stream_delivers_what_was_read(
    spawn: Spawn, store: Store, number: signal.Signals, code: Exit
) -> None:
    process = spawn("count", "--field", 1, "--into", store.url, "--interval", 0.05)
    assert process.stdin is not None
    writer = threading.Thread(target=_pump, args=(process.stdin,))
    writer.start()
    wait_until(lambda: store.total() > 10_000)
    process.send_signal(number)
    assert process.stdout is not None
    assert process.stderr is not None
    out, err = process.stdout.read().decode(), process.stderr.read().decode()
    assert process.wait(30) == code
    writer.join(30)
    assert f"{store.total():,} lines, 0 bad, {store.total():,} increments" in out
    assert "stopped by a signal after line" in err


def _pump(pipe: IO[bytes]) -> None:
    try:
        for number in range(10_000_000):
            pipe.write(b"key%d x\n" % (number % 1000))
    except BrokenPipeError:
        pass


def test_a_signal_is_heard_while_nothing_comes(spawn: Spawn, store: Store) -> None:
    process = spawn("count", "--field", 1, "--into", store.url, "--interval", 60)
    send(process, b"a\na\n")
    wait_until(lambda: "counters" in _tables(store))
    process.send_signal(signal.SIGTERM)
    code, out, _ = finish(process)
    assert code == Exit.SIGTERM
    assert f"{store.total()} lines" in out


def _tables(store: Store) -> list[str]:
    if not store.path.exists():
        return []
    with closing(sqlite3.connect(store.path)) as connection:
        return [name for (name,) in connection.execute("SELECT name FROM sqlite_master")]


@pytest.fixture
def locked(store: Store) -> Any:
    """A store that can be read, but not written to."""

    def lock() -> sqlite3.Connection:
        connection = sqlite3.connect(store.path, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        locks.append(connection)
        return connection

    locks: list[sqlite3.Connection] = []
    yield lock
    for connection in locks:
        connection.close()


def test_a_store_that_is_down_at_the_end_is_said(spawn: Spawn, store: Store, locked: Any) -> None:
    process = spawn("count", "--field", 1, "--into", store.url, "--interval", 0.02, "--shutdown", 0.3)
    send(process, b"a\n")
    wait_until(lambda: store.total() == 1)
    locked()
    send(process, b"a\nb\nc\n")
    code, out, err = finish(process)
    assert code == Exit.UNDELIVERED
    assert "NOT STORED: 3: " in err
    assert "4 lines, 0 bad, 4 increments" in out
    assert "Traceback" not in err
    assert store.total() == 1


def test_a_second_signal_ends_at_once_and_says_what_is_left(spawn: Spawn, store: Store, locked: Any) -> None:
    process = spawn("count", "--field", 1, "--into", store.url, "--interval", 0.02, "--shutdown", 600)
    send(process, b"a\n")
    wait_until(lambda: store.total() == 1)
    locked()
    send(process, b"a\nb\nc\n")
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == Exit.UNDELIVERED
    assert "a second signal came" in err
    assert "Traceback" not in err


def test_a_terminal_sees_progress_and_a_table(spawn: Spawn, store: Store) -> None:
    ours, theirs = pty.openpty()
    process = spawn("count", "--field", 1, "--into", store.url, "--interval", 0.05, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = bytearray()
    reader = threading.Thread(target=_read_all, args=(ours, seen))
    reader.start()
    send(process, b"/home x\n/home y\n\x1b[31m/evil z\n")
    wait_until(lambda: b"lines/s" in seen and b"stored" in seen)
    wait_until(lambda: store.total() == 3)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(30) == 0
    reader.join(30)
    os.close(ours)
    text = seen.decode()
    assert "\x1b[?25l" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h"), "the cursor is shown again"
    assert "\u2501" in text
    assert "/home" in text
    assert "\x1b[31m/evil" not in text


def _read_all(fd: int, into: bytearray) -> None:
    while True:
        try:
            data = os.read(fd, 4096)
        except OSError:  # the other side is closed
            return
        if not data:
            return
        into += data


def test_a_closed_output_is_no_traceback(spawn: Spawn, store: Store) -> None:
    process = spawn("count", "--field", 1, "--into", store.url)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(b"a\nb\n", timeout=60)
    assert err == b""
    assert process.returncode == 0
    assert store.total() == 2


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_extra_is_one_line(missing: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; from statbuffer.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == Exit.USAGE
    assert done.stderr == f"{missing} is not installed; run: pip install 'statbuffer[cli]'\n"


def test_a_closed_input_is_said(store: Store) -> None:
    command = f'exec "{sys.executable}" -m statbuffer.cli count --field 1 --into {store.url} <&-'
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == Exit.INPUT
    assert "not read: standard input: is closed" in done.stderr
