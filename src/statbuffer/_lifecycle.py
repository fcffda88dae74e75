"""What happens to running buffers when their process forks or ends.

Exit: `atexit` runs after the interpreter has joined the application's non-daemon threads, so they can count until
their end, and before it refuses new threads. Children made by `multiprocessing` and by Celery leave by `os._exit` and run no
`atexit` functions, but the former run `multiprocessing.util.Finalize` callbacks and the latter send `worker_process_shutdown`.

Fork: the child has the parent's memory but none of its threads. The parent still owns the counts, so the child drops
them, and starts anew with a writer id of its own. The journal's connections are closed for the moment of the fork.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from statbuffer._buffer import StatBuffer
    from statbuffer._report import StopReport

log = logging.getLogger("statbuffer")

_running: weakref.WeakSet[StatBuffer] = weakref.WeakSet()
_finalized_pid: int | None = None
_known: weakref.WeakSet[StatBuffer] = weakref.WeakSet()
_fork = threading.local()
"""The buffers that the fork of this thread holds up; several threads may fork at once."""


def know(buffer: StatBuffer) -> None:
    """Have `buffer` renewed when the process forks, started or not: two processes must not share a writer id."""
    _known.add(buffer)


def enter(buffer: StatBuffer) -> None:
    """Have `buffer` stopped when the process exits."""
    _running.add(buffer)


def leave(buffer: StatBuffer) -> None:
    """Undo `enter`."""
    _running.discard(buffer)


def on_thread_start() -> None:
    """Arrange for the exits that run no `atexit` functions. Late: `multiprocessing` forgets what it inherited."""
    global _finalized_pid  # noqa: PLW0603  # once a process
    signals = sys.modules.get("celery.signals")
    if signals is not None:
        signals.worker_process_shutdown.connect(_on_celery_exit, weak=False, dispatch_uid="statbuffer")
    util = sys.modules.get("multiprocessing.util")
    process = sys.modules.get("multiprocessing.process")
    if util is None or process is None or process.parent_process() is None or _finalized_pid == os.getpid():
        return
    _finalized_pid = os.getpid()
    util.Finalize(None, _stop_all, exitpriority=0)


def _on_celery_exit(**_: object) -> None:
    _stop_all()


def _stop_all() -> None:
    for buffer in list(_running):
        report = _see_through(buffer)
        if not report.complete:
            log.error("%r: the process ends with counts that are not stored: %s", buffer, report)


def _see_through(buffer: StatBuffer) -> StopReport:
    """Stop a buffer though signal handlers raise `SystemExit` meanwhile: the process is ending already, by its deadline."""
    while True:
        try:
            return buffer.stop()
        except SystemExit:
            continue


def _all_known() -> list[StatBuffer]:
    """Return all buffers, in the order in which all threads that fork take their locks."""
    while True:
        try:
            return sorted(_known, key=id)
        except RuntimeError:  # another thread makes a buffer just now
            continue


def _before_fork() -> None:
    _fork.buffers = _all_known()
    for buffer in _fork.buffers:
        buffer._before_fork()  # noqa: SLF001  # no business of a user


def _after_fork_in_parent() -> None:
    for buffer in _fork.buffers:
        buffer._after_fork_in_parent()  # noqa: SLF001  # no business of a user
    _fork.buffers = []


def _renew_all() -> None:
    for buffer in list(_known):
        buffer._after_fork()  # noqa: SLF001  # no business of a user


atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_renew_all)
