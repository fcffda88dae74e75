from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from statbuffer import StatBuffer
from statbuffer.testing import FakeClock, MemorySink
from tests.servers import MariaDBServer, PostgreSQLServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers import Server


@pytest.fixture(autouse=True)
def audit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test of a buffer ends with the balance, and leaves no thread behind."""
    buffers: list[weakref.ref[StatBuffer]] = []
    start = StatBuffer.start

    def recorded_start(self: StatBuffer) -> StatBuffer:
        buffers.append(weakref.ref(self))
        return start(self)

    monkeypatch.setattr(StatBuffer, "start", recorded_start)
    yield
    for ref in buffers:
        buffer = ref()
        if buffer is None:
            continue
        stats = buffer.stats()
        assert stats.balanced, stats
        buffer.stop(0)
        assert buffer.stats().balanced, buffer.stats()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("statbuffer-worker")]
    assert not left


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def sink() -> MemorySink:
    return MemorySink()


@pytest.fixture
def views(sink: MemorySink, clock: FakeClock) -> Iterator[StatBuffer]:
    """A started buffer on a fake clock, with an interval of 5 s."""
    with StatBuffer(sink, clock=clock, interval=5.0) as buffer:
        yield buffer


@pytest.fixture
def make_buffer(clock: FakeClock) -> Any:
    """Make and start a buffer on the fake clock; stopped by the audit."""

    def make(sink: Any, **options: Any) -> StatBuffer:
        return StatBuffer(sink, clock=clock, **options).start()

    return make


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Server]:
    """A running PostgreSQL."""
    server = PostgreSQLServer()
    yield server
    server.remove()


@pytest.fixture(scope="session")
def mariadb() -> Iterator[Server]:
    """A running MariaDB, where its packages are installed."""
    if reason := MariaDBServer.missing():
        pytest.skip(reason)
    server = MariaDBServer()
    yield server
    server.remove()
