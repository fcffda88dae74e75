"""Ctrl-C and SIGTERM: the first asks for an orderly end, the second ends at once.

A handler that raised while lines are counted would leave it open which of them were, so the first signal only leaves a
note, and wakes a `select` that waits for input. The second raises, wherever the main thread is.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType, TracebackType

    from typing_extensions import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopAtOnce(BaseException):
    """A second signal came. Not an `Exception`, so that nothing on the way takes it for an error of its own."""


class Stop:
    """Whether to stop, and since when; as a context manager it listens to signals. Main thread."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.since: float | None = None
        """Monotonic time of the first signal."""
        self._wake_read = self._wake_write = -1
        self._before: list[tuple[int, Any]] = []

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def ask(self, number: int, _frame: FrameType | None = None) -> None:
        """Note that a signal has come."""
        if self.signal is not None:
            for each, _ in self._before:
                signal.signal(each, signal.SIG_DFL)  # a third one ends the process as if we were not here
            raise StopAtOnce
        self.signal, self.since = number, time.monotonic()
        if self._wake_write >= 0:
            os.write(self._wake_write, b"!")

    def pause(self, seconds: float) -> None:
        """Return after so many seconds, or at a signal."""
        select.select([self._wake_read], [], [], seconds)

    def wait_for_input(self, fd: int) -> bool:
        """Return True when `fd` can be read without waiting, False if a signal came first."""
        ready, _, _ = select.select([fd, self._wake_read], [], [])
        return self._wake_read not in ready

    def __enter__(self) -> Self:
        self._wake_read, self._wake_write = os.pipe()
        if threading.current_thread() is threading.main_thread():
            self._before = [(number, signal.signal(number, self.ask)) for number in _SIGNALS]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._wake_read = self._wake_write = -1
