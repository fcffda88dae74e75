from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.processes.ground import Ground

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=["journal", "memory"])
def ground(request, tmp_path: Path) -> Iterator[Ground]:
    """A store with a journal, and one without."""
    ground = Ground(tmp_path, journal=request.param == "journal")
    yield ground
    ground.close()


@pytest.fixture
def journaled(tmp_path: Path) -> Iterator[Ground]:
    """A store with a journal, for what only that promises."""
    ground = Ground(tmp_path, journal=True)
    yield ground
    ground.close()
