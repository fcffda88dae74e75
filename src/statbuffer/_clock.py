"""Time and threads, as the buffer sees them: one seam, so that tests can run on a clock of their own."""

from __future__ import annotations

import _thread
import contextlib
import queue
import threading
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class Alarm(Protocol):
    """What one flusher thread sleeps on. It remembers a ring that came while nobody waited."""

    def ring(self) -> None:
        """Wake the waiter, now or at its next wait. Any thread, signal handlers and finalizers too: takes no lock."""

    def wait(self, timeout: float | None) -> None:
        """Return at the next ring, or after `timeout` seconds (None: only at a ring)."""


class Clock(Protocol):
    """Where a buffer gets its time and its threads from. `SystemClock` in life, `testing.FakeClock` in tests."""

    def monotonic(self) -> float:
        """Return seconds from some fixed moment; never goes back."""

    def alarm(self) -> Alarm:
        """Return a new alarm."""

    def wait(self, event: threading.Event, timeout: float | None) -> bool:
        """Wait until `event` is set, `timeout` seconds at most; return whether it is."""

    def spawn(self, target: Callable[[], None], name: str) -> None:
        """Run `target` in a new daemon thread."""

    def defer(self, target: Callable[[], object]) -> None:
        """Run `target` soon in another thread. Unlike `spawn`, safe in a signal handler: takes no Python-level lock."""


class SystemAlarm:
    """An alarm on `queue.SimpleQueue`, whose `put` is documented to be reentrant: safe in signal handlers and `__del__`."""

    def __init__(self) -> None:
        self._rings: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._rung = False

    def ring(self) -> None:
        if not self._rung:  # keeps the queue short; the waiter clears it before it looks for work, so no ring is lost
            self._rung = True
            self._rings.put(None)

    def wait(self, timeout: float | None) -> None:
        if timeout is not None:
            timeout = min(timeout, threading.TIMEOUT_MAX)
        with contextlib.suppress(queue.Empty):
            self._rings.get(timeout=timeout)
        self._rung = False


class SystemClock:
    """The machine's monotonic clock and ordinary threads."""

    monotonic = staticmethod(time.monotonic)

    def alarm(self) -> Alarm:
        return SystemAlarm()

    def wait(self, event: threading.Event, timeout: float | None) -> bool:
        return event.wait(timeout)

    def spawn(self, target: Callable[[], None], name: str) -> None:
        threading.Thread(target=target, name=name, daemon=True).start()

    def defer(self, target: Callable[[], object]) -> None:
        _thread.start_new_thread(target, ())


SYSTEM_CLOCK = SystemClock()
