from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from statbuffer import StatBuffer

if TYPE_CHECKING:
    from pathlib import Path

    from statbuffer.testing import FakeClock


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the journal of a test lies; not made yet."""
    return tmp_path / "journal"


@pytest.fixture
def journaled(clock: FakeClock, directory: Path) -> Any:
    """Make and start a buffer with a journal on the fake clock; stopped by the audit."""

    def make(sink: Any, **options: Any) -> StatBuffer:
        defaults = {"journal": directory, "interval": 5.0, "fsync": False}
        buffer = StatBuffer(sink, clock=clock, **(defaults | options)).start()
        clock.advance(0.0)  # the first one that is made is the one that delivers
        return buffer

    return make
