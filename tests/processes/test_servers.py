"""Web servers and task queues: what was answered, or done, is what is stored after they have ended."""

from __future__ import annotations

import http.client
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.processes.ground import children_of, eventually

if TYPE_CHECKING:
    from tests.processes.ground import Ground

WSGI = """
views = make(interval=0.3, shutdown=20.0).start()
def app(environ, start_response):
    path = environ["PATH_INFO"]
    views.increment(path)
    if path == "/sync":
        views.sync(timeout=10)
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
"""

ASGI = """
from contextlib import asynccontextmanager
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
views = make(interval=60.0)
@asynccontextmanager
async def lifespan(app):
    with views:
        yield
async def count(request):
    views.increment(request.url.path)
    return PlainTextResponse("ok")
app = Starlette(routes=[Route("/count", count)], lifespan=lifespan)
"""

TASKS = """
from celery import Celery
app = Celery("tasks", broker="filesystem://")
app.conf.update(
    broker_transport_options={"data_folder_in": FOLDER + "/queue", "data_folder_out": FOLDER + "/queue"},
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
)
views = make().start()
@app.task
def work():
    count(views, "task", 1)
"""


class Load:
    """Threads that ask a server for two pages, and count what was sent and what was answered."""

    def __init__(self, port: int, requests: int, threads: int = 4) -> None:
        self.sent: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self._port = port
        self._lock = threading.Lock()
        self._left = requests
        self.threads = [threading.Thread(target=self._ask, args=(seed,)) for seed in range(threads)]
        for thread in self.threads:
            thread.start()

    def join(self) -> None:
        for thread in self.threads:
            thread.join(55)

    def _ask(self, seed: int) -> None:
        rng = random.Random(seed)
        while True:
            with self._lock:
                if self._left <= 0:
                    return
                self._left -= 1
                path = rng.choice(["/count", "/count", "/sync"])
                self.sent[path] += 1
            with suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
                connection.request("GET", path)
                ok = connection.getresponse().status == 200
                connection.close()
                with self._lock:
                    self.answered[path] += ok


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def listening(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def start_gunicorn(ground: Ground, *options: str):
    pytest.importorskip("gunicorn")
    ground.write("wsgi.py", WSGI if ground.journal else WSGI.replace("views.sync(", "views.flush("))
    port = free_port()
    process = ground.start("-m", "gunicorn", "-w", "4", "-b", f"127.0.0.1:{port}", *options, "wsgi:app")
    eventually(lambda: listening(port), 30, "gunicorn listens")
    return process, port


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), marks=pytest.mark.torture, id="sync"),
        pytest.param(("--preload",), id="preload"),
        pytest.param(("--preload", "-k", "gthread", "--threads", "3"), marks=pytest.mark.torture, id="threads"),
    ],
)
def test_gunicorn_that_recycles_its_workers_loses_nothing(ground, options):
    process, port = start_gunicorn(ground, "--max-requests", "150", "--max-requests-jitter", "50", *options)
    load = Load(port, 1200)
    load.join()
    process.send_signal(signal.SIGTERM)
    process.wait(40)
    ground.adopt()
    # a worker that is recycled may have counted a request and closed the connection: sent is the upper bound
    stored = ground.stored()
    for path, answered in load.answered.items():
        assert answered <= stored[path] <= load.sent[path], f"{path}\n{ground.log()[-3000:]}"
    assert sum(load.answered.values()) > 1000


def test_gunicorn_whose_workers_are_killed_keeps_what_sync_returned_for(journaled):
    process, port = start_gunicorn(journaled, "--preload", "--max-requests", "500")
    load = Load(port, 4000)
    kills = 0
    end = time.monotonic() + 4.0
    while time.monotonic() < end and any(thread.is_alive() for thread in load.threads):
        workers = children_of(process.pid)
        if workers:
            with suppress(ProcessLookupError):
                os.kill(random.choice(workers), signal.SIGKILL)
                kills += 1
        time.sleep(0.5)
    load.join()
    process.send_signal(signal.SIGTERM)
    process.wait(40)
    journaled.adopt()
    stored = journaled.stored()
    lost = load.answered["/count"] - stored["/count"]
    print(f"{kills} workers killed; answered {dict(load.answered)}, stored {dict(stored)}, sent {dict(load.sent)}")
    assert load.answered["/sync"] <= stored["/sync"] <= load.sent["/sync"]
    assert stored["/count"] <= load.sent["/count"]
    assert lost <= kills * 0.5 * sum(load.answered.values()) / 4.0, (
        "more than half a second of a worker's counts at a kill"
    )


def test_uvicorn_with_two_workers_loses_nothing(ground):
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    ground.write("asgi.py", ASGI)
    port = free_port()
    process = ground.start("-m", "uvicorn", "--workers", "2", "--port", str(port), "--log-level", "warning", "asgi:app")
    eventually(lambda: listening(port), 30, "uvicorn listens")
    answered = 0
    for _ in range(300):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/count")
        answered += connection.getresponse().status == 200
        connection.close()
    process.send_signal(signal.SIGTERM)
    process.wait(40)
    ground.adopt()
    assert ground.stored() == {"/count": answered}, ground.log()[-3000:]
    assert answered == 300


def test_celerys_prefork_workers_lose_nothing(ground):
    pytest.importorskip("celery")
    (ground.path / "queue").mkdir()
    ground.write("tasks.py", TASKS)
    ground.run("""
    import tasks
    for _ in range(20): tasks.work.delay()
    tasks.views.stop(0)
    """)
    arguments = ("-A", "tasks", "worker", "-P", "prefork", "-c", "2", "--max-tasks-per-child", "8", "-l", "WARNING")
    process = ground.start("-m", "celery", *arguments)
    eventually(lambda: ground.accepted()["task"] >= 20, 50, "celery works")
    process.send_signal(signal.SIGTERM)
    process.wait(40)
    ground.assert_exact()
