"""What the command line shows: progress on a terminal, the largest keys, and the summary.

Results go to standard output, all else to standard error. Keys come from anybody's log: whatever could steer a terminal
is shown escaped, and nothing of it is read as markup.
"""

from __future__ import annotations

import os
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from rich.console import RenderableType

    from statbuffer import Stats
    from statbuffer._cli.counting import Outcome, Run

_SPEED_SECONDS = 3.0


class ResultConsole(Console):
    """A console whose reader may leave: what was counted is stored all the same, and the exit code speaks of that."""

    def on_broken_pipe(self) -> None:
        """Go on without a reader."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


def output() -> ResultConsole:
    """Return the console of standard output."""
    return ResultConsole(highlight=False, soft_wrap=True, emoji=False)


def errors() -> ResultConsole:
    """Return the console of standard error."""
    return ResultConsole(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def say(console: Console, text: str, style: str = "") -> None:
    """Print one line of plain text."""
    console.print(Text(text, style=style if console.is_terminal else ""))


def write(console: ResultConsole, text: str) -> None:
    """Write text for another program to read, as it is: rich would expand the tabs."""
    try:
        console.file.write(text)
        console.file.flush()
    except BrokenPipeError:
        console.on_broken_pipe()


def printable(value: object) -> str:
    """Return text in which nothing steers a terminal, breaks a line or can't be encoded."""
    if isinstance(value, tuple):
        return "  ".join(printable(part) for part in value)
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def show_top(console: ResultConsole, rows: list[tuple[Hashable, int]], columns: Iterable[str], title: str) -> None:
    """Print the largest keys: a table on a terminal, else one line `count<TAB>key...` each."""
    if not console.is_terminal:
        lines = []
        for key, count in rows:
            parts = key if isinstance(key, tuple) else (key,)
            lines.append("\t".join([str(count), *map(printable, parts)]) + "\n")
        write(console, "".join(lines))
        return
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("count", justify="right", style="bold cyan", no_wrap=True)
    for column in columns:
        table.add_column(Text(column), overflow="ellipsis", no_wrap=True)
    table.add_column("")
    largest = max((count for _, count in rows), default=0)
    for key, count in rows:
        parts = key if isinstance(key, tuple) else (key,)
        cells = [Text(printable(part)) for part in parts]
        table.add_row(
            f"{count:,}",
            *cells,
            ProgressBar(total=max(largest, 1), completed=max(count, 0), width=20, finished_style="bar.complete"),
        )
    console.print(table)


def balance(stats: Stats) -> str:
    """Return the books as an equation."""
    places = {
        "stored": stats.stored,
        "pending": stats.pending,
        "in flight": stats.in_flight,
        "dead": stats.dead,
        "dropped": stats.dropped,
    }
    terms = " + ".join(f"{count:,} {name}" for name, count in places.items() if count or name == "stored")
    return f"{stats.accepted:,} accepted = {terms}" + ("" if stats.balanced else "  DOES NOT BALANCE: please report it")


def summary(outcome: Outcome, keys: int | None) -> str:
    """Return the line that ends a count. `keys`: rows of the table now, None if it can't be read."""
    tally, stats = outcome.tally, outcome.stats
    parts = [
        f"{tally.lines:,} lines",
        f"{tally.bad:,} bad",
        f"{tally.counted:,} increments",
        f"{keys:,} keys in the table" if keys is not None else "",
        f"{stats.batches:,} SQL batch{'' if stats.batches == 1 else 'es'}",
        f"{outcome.seconds:.2f} s",
        f"{tally.lines / max(outcome.seconds, 1e-9):,.0f} lines/s",
        balance(stats),
    ]
    return ", ".join(part for part in parts if part)


def show_problems(console: Console, outcome: Outcome) -> None:
    """Say everything that did not go well: bad lines, unread input, counts that are not stored."""
    tally, report = outcome.tally, outcome.report
    if tally.bad:
        more = f", {len(tally.examples)} of them" if tally.bad > len(tally.examples) else ""
        say(console, f"{tally.bad:,} bad lines were not counted{more}:", "yellow")
        for example in tally.examples:
            say(console, f"  {printable(example)}", "yellow")
    for failure in tally.failed:
        say(console, f"not read: {printable(failure)}", "bold red")
    if outcome.stopped_by is not None:
        say(console, f"stopped by a signal after line {tally.lines:,}, in {printable(tally.name)}", "yellow")
    if outcome.at_once:
        say(console, "a second signal came: the lines that were read last may not be counted", "bold red")
    if tally.uncounted:
        say(
            console, f"{tally.uncounted:,} lines found no room: the buffer is full, nothing could be stored", "bold red"
        )
    if not report.complete:
        say(console, f"NOT STORED: {report.left:,}: {printable(report)}", "bold red")
        for letter in report.dead[:5]:
            say(
                console, f"  dead letter: {letter.count:,} for {printable(letter.key):.100}: {printable(letter.reason)}"
            )


class Speed:
    """Lines per second over the last few seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def __call__(self, count: int) -> float:
        now = time.monotonic()
        self._seen.append((now, count))
        while len(self._seen) > 2 and self._seen[0][0] < now - _SPEED_SECONDS:  # noqa: PLR2004  # a speed needs two
            self._seen.popleft()
        (start, before) = self._seen[0]
        return (count - before) / (now - start) if now > start else 0.0


def live(console: Console, render: Callable[[], RenderableType]) -> Live | None:
    """Return a display that shows `render()` again and again, None where nobody sees it."""
    if not console.is_terminal or console.is_dumb_terminal:
        return None
    return Live(get_renderable=render, console=console, refresh_per_second=8, transient=True)


class CountProgress:
    """The live picture of a `Run`."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._speed = Speed()

    def render(self) -> RenderableType:
        """Draw the present moment."""
        tally, stats = self._run.tally, self._run.buffer.stats()
        size = f"{tally.read_bytes / 1e6:,.1f} MB"
        head: list[RenderableType] = [Text(printable(tally.name), overflow="ellipsis", no_wrap=True)]
        if tally.total_bytes:
            size += f" of {tally.total_bytes / 1e6:,.1f} MB"
            head.append(ProgressBar(total=tally.total_bytes, completed=tally.read_bytes, width=30))
        first = Table.grid(padding=(0, 2))
        first.add_row(*head, Text(size))
        figures: dict[str, Any] = {
            "lines": f"{tally.lines:,}",
            "lines/s": f"{self._speed(tally.lines):,.0f}",
            "bad": f"{tally.bad:,}",
            "keys pending": f"{stats.keys:,}",
            "pending": f"{stats.pending + stats.in_flight:,}",
            "stored": f"{stats.stored:,}",
            "batches": f"{stats.batches:,}",
        }
        return Group(first, figures_grid(figures), *failing(stats))


def group(*parts: RenderableType) -> RenderableType:
    """Stack parts."""
    return Group(*parts)


def bar(done: float, total: float) -> RenderableType:
    """Return a bar on a line of its own."""
    line = Table.grid()
    line.add_row(ProgressBar(total=total, completed=done, width=60, finished_style="bar.complete"))
    return line


def figures_grid(figures: dict[str, str]) -> Table:
    """Return names above values, in one line each."""
    grid = Table.grid(padding=(0, 3))
    for _ in figures:
        grid.add_column(justify="right", no_wrap=True)
    grid.add_row(*(Text(name, style="dim") for name in figures))
    grid.add_row(*(Text(value, style="bold") for value in figures.values()))
    return grid


def failing(stats: Stats) -> list[RenderableType]:
    """Return a line on the store's troubles, if it has any."""
    return trouble(stats.last_error, failing=stats.failing)


def trouble(last_error: str | None, *, failing: bool) -> list[RenderableType]:
    """Return a line on what failed last, if anything has."""
    if last_error is None:
        return []
    state = "failing" if failing else "trying again"
    return [Text(f"store {state}, counts are kept: {printable(last_error)}", style="bold red", no_wrap=True)]
