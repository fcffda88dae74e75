"""Measuring: peers take turns, so that a noisy machine is noisy for all of them, and the best turn of each counts."""

from __future__ import annotations

import gc
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    Function = Callable[[str], object]
    Turn = Callable[[], float]
    Section = Callable[[float], Iterable["Line"]]

_PIPE_WIDTH = 150


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure beside one peer of the same run."""

    what: str
    figure: str
    peer: str
    peer_figure: str
    ratio: float
    goal: str = ""
    reached: bool | None = None
    """None: shown for comparison, without a goal."""


def cost(
    what: str, figure: float, peer: str, peer_figure: float, *, goal: float | None = None, unit: str = "ns"
) -> Line:
    """Return a line on what should cost at most `goal` times its peer."""
    ratio = figure / peer_figure
    return Line(
        what=what,
        figure=f"{figure:,.1f} {unit}",
        peer=peer,
        peer_figure=f"{peer_figure:,.1f} {unit}",
        ratio=ratio,
        goal="" if goal is None else f"at most {goal:g}x",
        reached=None if goal is None else ratio <= goal,
    )


def speed(what: str, seconds: float, peer: str, peer_seconds: float, *, goal: float | None = None) -> Line:
    """Return a line on what should be at least `goal` times as fast as its peer."""
    ratio = peer_seconds / seconds
    return Line(
        what=what,
        figure=f"{seconds * 1e3:,.0f} ms",
        peer=peer,
        peer_figure=f"{peer_seconds * 1e3:,.0f} ms",
        ratio=ratio,
        goal="" if goal is None else f"at least {goal:g}x the speed",
        reached=None if goal is None else ratio >= goal,
    )


def best_of(rounds: int, turns: Mapping[str, Turn]) -> dict[str, float]:
    """Let each take its turn, round after round, and return the lowest figure of each."""
    best = dict.fromkeys(turns, float("inf"))
    for _ in range(rounds):
        for name, turn in turns.items():
            with no_garbage_collection():
                best[name] = min(best[name], turn())
    return best


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Measure without the collector: what it costs depends on all that this process has imported."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def time_calls(function: Function, keys: list[str]) -> float:
    """Return nanoseconds for one call, the loop included: CPU time of this thread, so that other processes don't count."""
    started = time.thread_time_ns()
    for key in keys:
        function(key)
    return (time.thread_time_ns() - started) / len(keys)


def show_sections(sections: Mapping[str, Section], scale: float) -> bool:
    """Measure and print all sections as one table; return whether every goal was reached."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in (("", "left"), ("figure", "right"), ("beside", "left"), ("its figure", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]  # a literal, by a tuple
    for name, justify in (("ratio", "right"), ("goal", "left"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]  # as above
    lines: list[Line] = []
    for name, section in sections.items():
        with console.status(f"measuring {name}"):
            found = list(section(scale))
        table.add_section()
        for line in found:
            table.add_row(
                line.what, line.figure, Text(line.peer), line.peer_figure, f"{line.ratio:,.2f}x", line.goal, _mark(line)
            )
        lines += found
    console.print(table)
    missed = sum(line.reached is False for line in lines)
    goals = sum(line.reached is not None for line in lines)
    console.print(f"{goals - missed} of {goals} goals reached; peers took turns in this one run, the best turn counts")
    return not missed


def _mark(line: Line) -> str:
    if line.reached is None:
        return ""
    return "[green]reached[/]" if line.reached else "[bold red]missed[/]"
