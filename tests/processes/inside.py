"""What the child processes of these tests import: a buffer as the test wants it, and where to say what was accepted.

A script says that counts were accepted after they were, in one appended line: what a process says that is killed in between is
what it was promised.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from typing import TYPE_CHECKING, Any

from statbuffer import StatBuffer

if TYPE_CHECKING:
    from collections.abc import Callable

    from statbuffer import Batch

PATIENCE = 30
"""Seconds after which a process that still runs shows where all its threads are, and ends."""

FOLDER = os.environ["GROUND"]
JOURNAL = os.environ.get("GROUND_JOURNAL") or None


def options(**more: Any) -> dict[str, Any]:
    """Nothing is delivered by itself unless a script says otherwise, and no end is hurried."""
    usual: dict[str, Any] = {"interval": 60.0, "shutdown": 30.0, "backoff": 0.05, "restart": "permanent"}
    return usual | {"journal": JOURNAL} | more


def make(**more: Any) -> StatBuffer:
    """A buffer to the SQLite file of this test; not started."""
    return StatBuffer(f"sqlite:///{FOLDER}/store.db", **options(**more))


class Lines(StatBuffer):
    """A buffer to a plain file, one appended write a batch: at least once, and exactly once where nothing is killed."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**options(**more))

    def handle_batch(self, batch: Batch) -> None:
        append("lines", "".join(f"{key} {count}\n" for key, count in batch.counts.items()))


def report(key: str, count: int) -> None:
    """Say that so many counts were accepted, once and for all."""
    append("accepted", f"{key} {count}\n")


def count(views: StatBuffer, key: str, times: int) -> None:
    """Increment one by one, and report."""
    for _ in range(times):
        views.increment(key)
    report(key, times)


def settle(views: StatBuffer) -> None:
    """What has to be called before `os._exit`."""
    if JOURNAL:
        views.sync(timeout=15)
    else:
        views.flush(timeout=15)


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Poll until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.01)


def touch(name: str) -> None:
    """Tell the test that something has happened."""
    append(name, "x")


def seen(name: str) -> bool:
    """Whether the test, or another process, has said that something has happened."""
    return os.path.exists(f"{FOLDER}/{name}")  # noqa: PTH110  # in a signal handler too


def append(name: str, text: str) -> None:
    """One O_APPEND write, which other processes see whole."""
    fd = os.open(f"{FOLDER}/{name}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _watch() -> None:
    """`faulthandler.dump_traceback_later` has a thread, and waits for it: not for processes that fork."""
    signal.alarm(PATIENCE)


signal.signal(signal.SIGALRM, signal.SIG_DFL)
faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)
_watch()
os.register_at_fork(after_in_child=_watch)
