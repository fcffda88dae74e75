from __future__ import annotations

import runpy
from typing import TYPE_CHECKING

import pytest

from statbuffer._cli import bench, bench_sections, demo, display
from statbuffer._cli.exits import Exit
from statbuffer._cli.signals import Stop
from statbuffer.testing import MemorySink

from .conftest import log_line

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .conftest import Ran, Store

    Run = Callable[..., Ran]


def test_the_demo_balances_with_its_database(run: Run, store: Store) -> None:
    for _ in range(2):  # the second run starts from a fresh table
        ran = run("demo", "--into", store.url, "--seconds", 0.3)
        assert ran.code == 0
        assert ran.err == ""
        assert f"the database sums {store.total('page_views'):,} over" in ran.out
        assert f"{store.total('page_views'):,} accepted = {store.total('page_views'):,} stored" in ran.out
        assert "statements in" in ran.out
        assert "ns of CPU for an increment" in ran.out


def test_the_demo_counts_a_log(run: Run, store: Store, tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("\n".join([log_line("/a"), log_line("/a"), log_line("/b"), "nonsense"]))
    ran = run("demo", "--into", store.url, "--log", log)
    assert ran.code == 0
    assert store.rows("page_views") == {"/a": 2, "/b": 1}
    assert "1 bad line" in ran.err
    assert "equal" in ran.out


def test_the_demo_wants_a_log_that_is_there(run: Run, store: Store, tmp_path: Path) -> None:
    assert run("demo", "--into", store.url, "--log", tmp_path / "missing").code == Exit.USAGE


def test_the_shop_is_the_same_each_time() -> None:
    pages = demo.make_pages(1_000)
    assert pages == demo.make_pages(1_000)
    assert len(set(pages)) == 1_000
    assert all(page.startswith("/") for page in pages)


def test_traffic_stops_at_a_signal() -> None:
    from statbuffer import StatBuffer

    with StatBuffer(MemorySink(), interval=60.0) as buffer, Stop() as stop:
        traffic = demo.Traffic(buffer, demo.make_pages(100))
        stop.ask(15)
        traffic.run(float("inf"), stop)
        assert buffer.stats().accepted == traffic.increments


def test_the_pictures_can_be_drawn(store: Store) -> None:
    from rich.console import Console

    from statbuffer import StatBuffer

    console = Console(width=120, force_terminal=True)
    with StatBuffer(MemorySink()) as buffer:
        traffic = demo.Traffic(buffer, ["/"])
        picture = demo._Picture(traffic, demo.Statements(), 0.0, 1.0)
        with console.capture() as captured:
            console.print(picture.render())
    assert "SQL statements" in captured.get()


def test_a_short_bench_prints_one_table(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_sections, "ROUNDS", 1)
    small = {name: _scaled(section) for name, section in bench_sections.SECTIONS.items()}
    monkeypatch.setattr(bench_sections, "SECTIONS", small)
    ran = run("bench")
    assert ran.code == 0
    for what in ("increment, one key", "fresh strings", "new keys", "Counter.update", "a pending key", "SQLite, "):
        assert what in ran.out
    assert "goals reached" in ran.out


def _scaled(section: bench.Section) -> bench.Section:
    return lambda _scale: section(0.01)


def test_peers_take_turns_and_the_best_turn_counts() -> None:
    order: list[str] = []
    figures = {"a": iter([3.0, 1.0]), "b": iter([2.0, 4.0])}

    def turn(name: str) -> float:
        order.append(name)
        return next(figures[name])

    assert bench.best_of(2, {"a": lambda: turn("a"), "b": lambda: turn("b")}) == {"a": 1.0, "b": 2.0}
    assert order == ["a", "b", "a", "b"]


def test_goals_are_reached_or_missed() -> None:
    assert bench.cost("x", 2.0, "y", 1.0, goal=2.5).reached is True
    assert bench.cost("x", 3.0, "y", 1.0, goal=2.5).reached is False
    assert bench.speed("x", 2.0, "y", 1.0, goal=0.8).reached is False
    assert bench.speed("x", 1.0, "y", 1.0).reached is None


def test_what_is_shown_steers_no_terminal() -> None:
    assert display.printable("caf\u00e9 [bold]") == "caf\u00e9 [bold]"
    assert display.printable("a\x1b[2J\n\udcff\u202e") == "a\\x1b[2J\\n\\udcff\\u202e"
    assert display.printable(("a", 7)) == "a  7"


def test_make_bench_runs_one_section(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("prometheus_client", reason="the bench dependencies are not installed")
    pytest.importorskip("datadog", reason="the bench dependencies are not installed")
    monkeypatch.setattr("sys.argv", ["bench", "nonsense"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("bench", run_name="__main__")
    assert ended.value.code == 2
    assert "no such section" in capsys.readouterr().err
