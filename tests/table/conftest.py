from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


class Now:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def now() -> Now:
    return Now()


@pytest.fixture(params=["_native", "_reference"])
def table_class(request: pytest.FixtureRequest) -> Any:
    """Both tables. A native one that is missing fails here: it must not be skipped by accident."""
    return importlib.import_module(f"statbuffer._table.{request.param}").CounterTable


@pytest.fixture
def make(table_class: Any, now: Now) -> Callable[..., Any]:
    """Make a table with an interval of 10 s and ticks of 1 s, unless told otherwise."""

    def make_table(**options: Any) -> Any:
        return table_class(**{"interval": 10.0, "tick": 1.0, "max_keys": 1_000_000, "clock": now} | options)

    return make_table


@pytest.fixture
def table(make: Callable[..., Any]) -> Any:
    return make()


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What C code could raise to nobody."""
    seen: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", lambda report: seen.append(report.exc_value))
    return seen
