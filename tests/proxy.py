"""A TCP proxy in front of a real server that cuts connections, by seed: the network of a bad day."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Final

CUTS: Final = ("before", "middle", "after", "answer-lost", "answer-middle", "reset", "stall")
"""Where a request is cut: not forwarded; half of it; all of it, at once; its answer, whole or by half; RST instead of
FIN; and a half-open silence, after which the connection is gone."""


class CuttingProxy:
    """Forwards to `target`; cuts a share `rate` of all messages, and `commit_rate` of those that say COMMIT.

    A message is what one side sends in one piece, which for requests of SQL drivers is one message of the protocol or a
    few of them. `cuts` counts what was done, by kind and by whether it was at a COMMIT. Thread-safe; `calm()` ends it all.
    """

    def __init__(
        self,
        target: tuple[str, int],
        seed: int,
        *,
        rate: float = 0.02,
        commit_rate: float = 0.2,
        refuse_rate: float = 0.05,
    ) -> None:
        self._target = target
        self._random = random.Random(seed)
        self._rates = (rate, commit_rate, refuse_rate)
        self._calm = False
        self._lock = threading.Lock()
        self.cuts: Counter[tuple[str, bool]] = Counter()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host, self.port = self._listener.getsockname()[:2]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def total(self) -> int:
        """All cuts so far."""
        with self._lock:
            return sum(self.cuts.values())

    @property
    def at_commit(self) -> int:
        """The cuts at a COMMIT or its answer."""
        with self._lock:
            return sum(number for (_, commit), number in self.cuts.items() if commit)

    def calm(self) -> None:
        """Forward everything from now on."""
        self._calm = True

    def close(self) -> None:
        self._listener.close()

    def _draw(self, rate: float) -> bool:
        with self._lock:
            return not self._calm and self._random.random() < rate

    def _choose(self, commit: bool) -> str:
        with self._lock:
            kind = self._random.choice(CUTS)
            self.cuts[kind, commit] += 1
            return kind

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._draw(self._rates[2]):
                with self._lock:
                    self.cuts["refused", False] += 1
                _reset(client)
                continue
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._target, timeout=10)
        except OSError:
            _reset(client)
            return
        server.settimeout(None)
        link = _Link(client, server)
        threading.Thread(target=self._answers, args=(link,), daemon=True).start()
        try:
            while data := client.recv(65_536):
                commit = b"COMMIT" in data
                if self._draw(self._rates[1] if commit else self._rates[0]):
                    self._cut(link, data, self._choose(commit))
                    return
                if self._draw(0.01):
                    time.sleep(0.003)
                server.sendall(data)
        except OSError:
            pass
        finally:
            link.close()

    def _cut(self, link: _Link, data: bytes, kind: str) -> None:
        if kind in {"answer-lost", "answer-middle"}:
            link.fate = kind
            link.server.sendall(data)
            link.cut.wait(5)
        elif kind == "middle":
            link.server.sendall(data[: len(data) // 2])
        elif kind in {"after", "reset"}:
            link.server.sendall(data)
        elif kind == "stall":
            link.fate = kind
            link.server.sendall(data)
            time.sleep(0.05)
        link.close(reset=kind == "reset")

    def _answers(self, link: _Link) -> None:
        try:
            while data := link.server.recv(65_536):
                if link.fate == "answer-middle":
                    link.client.sendall(data[: len(data) // 2])
                if link.fate is not None:
                    link.cut.set()
                    return
                link.client.sendall(data)
        except OSError:
            pass
        finally:
            if link.fate is None:
                link.close()


class _Link:
    """One client and its server."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.fate: str | None = None
        self.cut = threading.Event()

    def close(self, *, reset: bool = False) -> None:
        for end in (self.client, self.server):
            if reset:
                _reset(end)
            else:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()


def _reset(end: socket.socket) -> None:
    """Close with RST: what was not delivered yet is gone. A thread that still receives would keep the socket open."""
    with suppress(OSError):
        end.shutdown(socket.SHUT_RD)
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()
