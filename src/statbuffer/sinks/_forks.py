"""Nobody in a SQLite file while the process forks.

SQLite's locks belong to a process, and its memory of them goes wrong in a child: it takes the parent's for its own, for ever.
So all connections are closed before a fork, once the transactions that are under way have ended.
https://www.sqlite.org/howtocorrupt.html#_carrying_an_open_database_connection_across_a_fork_
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class ForkGate:
    """Lets any number of threads in, and one keep all others out. A thread may come in again, and fork while it is in."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._inside: dict[int, int] = {}
        self._shut_by: int | None = None

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Be in; waits while another thread keeps the gate shut."""
        me = threading.get_ident()
        with self._turn:
            self._turn.wait_for(lambda: self._shut_by in {None, me})
            self._inside[me] = self._inside.get(me, 0) + 1
        try:
            yield
        finally:
            with self._turn:
                self._inside[me] -= 1
                if not self._inside[me]:
                    del self._inside[me]
                self._turn.notify_all()

    def shut(self) -> None:
        """Keep others out from now on; returns when the last of them has left."""
        me = threading.get_ident()
        with self._turn:
            self._turn.wait_for(lambda: self._shut_by in {None, me})
            self._shut_by = me
            self._turn.wait_for(lambda: not self._inside.keys() - {me})

    def open(self) -> None:
        """Let others in again."""
        with self._turn:
            self._shut_by = None
            self._turn.notify_all()
