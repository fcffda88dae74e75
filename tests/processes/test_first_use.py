"""gunicorn with an application that is loaded in the master and starts its buffer at the first request of each worker."""

from __future__ import annotations

import http.client
import os
import re
import signal
import threading
import time
from collections import Counter, defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.processes.ground import children_of, eventually

if TYPE_CHECKING:
    import subprocess

    from tests.processes.ground import Ground

pytestmark = pytest.mark.timeout(60)

APP = """
views = make(interval=0.3)
def app(environ, start_response):
    views.start()                       # the first request's; the others find it running
    path = environ["PATH_INFO"]
    views.increment(path)
    if path == "/sync":
        views.sync(timeout=10)
    body = str(os.getpid()).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""
SYNC_INTERVAL = 0.1
NOISE = 1.0
"""Seconds that a move may take longer on a machine that is busy."""


class Answers:
    """Threads that ask for pages until told to stop; who answered, and when."""

    def __init__(self, port: int, paths: list[str]) -> None:
        self.sent: Counter[str] = Counter()
        self.answered: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self._port = port
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(path,)) for path in paths]
        for thread in self._threads:
            thread.start()

    def _ask(self, path: str) -> None:
        while not self._done.is_set():
            with self._lock:
                self.sent[path] += 1
            with suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
                connection.request("GET", path)
                response = connection.getresponse()
                pid = int(response.read() or 0) if response.status == 200 else 0
                connection.close()
                if pid:
                    with self._lock:
                        self.answered[path].append((pid, time.monotonic()))
            time.sleep(0.002)

    def end(self) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(30)


def start(ground: Ground, *options: str) -> tuple[subprocess.Popen[bytes], int]:
    pytest.importorskip("gunicorn")
    ground.write("first_use.py", APP)
    process = ground.start("-m", "gunicorn", "-w", "4", "-b", "127.0.0.1:0", "--preload", *options, "first_use:app")
    found = eventually(lambda: re.search(r"Listening at: http://127\.0\.0\.1:(\d+)", ground.log()), 30, "it listens")
    return process, int(found[1])


@pytest.mark.torture  # as test_servers.py, but started late
@pytest.mark.parametrize("options", [(), ("-k", "gthread", "--threads", "3")], ids=["sync", "gthread"])
def test_a_buffer_that_workers_start_at_their_first_request_loses_nothing(ground, options):
    process, port = start(ground, "--max-requests", "100", "--max-requests-jitter", "30", *options)
    load = Answers(port, ["/count"] * 4)
    eventually(lambda: len(load.answered["/count"]) > 800, 30, "requests are answered")
    load.end()
    process.send_signal(signal.SIGTERM)
    process.wait(40)
    ground.adopt()
    answered, sent = len(load.answered["/count"]), load.sent["/count"]
    assert len({pid for pid, _ in load.answered["/count"]}) > 4, "no worker was recycled"
    assert answered <= ground.stored()["/count"] <= sent, ground.log()[-3000:]


def test_sigterm_under_load_loses_nothing_that_was_answered(ground):
    process, port = start(ground)
    load = Answers(port, ["/count"] * 4)
    eventually(lambda: len(load.answered["/count"]) > 300, 30, "requests are answered")
    process.send_signal(signal.SIGTERM)
    process.wait(40)
    load.end()
    ground.adopt()
    assert len(load.answered["/count"]) <= ground.stored()["/count"] <= load.sent["/count"], ground.log()[-3000:]


@pytest.mark.torture
def test_killed_workers_lose_no_more_than_they_answered_within_the_last_sync_interval(journaled):
    process, port = start(journaled)
    load = Answers(port, ["/count", "/count", "/sync", "/sync"])
    eventually(lambda: len(load.answered["/count"]) > 100, 30, "requests are answered")
    killed: dict[int, float] = {}
    for _ in range(6):
        workers = [pid for pid in children_of(process.pid) if pid not in killed]
        for pid in workers[:1]:
            killed[pid] = time.monotonic()
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)
    load.end()
    process.send_signal(signal.SIGTERM)
    process.wait(40)
    journaled.adopt()
    stored = journaled.stored()
    at_stake = sum(pid in killed and at > killed[pid] - SYNC_INTERVAL - NOISE for pid, at in load.answered["/count"])
    assert len(killed) >= 4
    assert len(load.answered["/sync"]) <= stored["/sync"] <= load.sent["/sync"]
    assert len(load.answered["/count"]) - at_stake <= stored["/count"] <= load.sent["/count"]
