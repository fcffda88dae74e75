"""The demo: a shop's page views at full speed into SQLite, and the books checked against the database."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from statbuffer import StatBuffer
from statbuffer._cli import display
from statbuffer._cli.counting import Run
from statbuffer._cli.exits import Exit
from statbuffer._cli.keys import combined_picker
from statbuffer._cli.signals import Stop
from statbuffer.sinks.sql import SQLSink

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType

    from statbuffer import Stats, StopReport

TABLE: Final = "page_views"
THREADS: Final = 4
INTERVAL: Final = 0.5
PAGES: Final = 20_000
_SEED: Final = 20_150_517
_ZIPF: Final = 1.07
_BLOCK: Final = 5_000
_TOP: Final = 10


@dataclass
class Statements:
    """What really reached the database, as SQLAlchemy's own events tell."""

    executed: int = 0
    commits: int = 0

    def listen(self, engine: sa.Engine) -> None:
        """Count from now on."""
        sa.event.listen(engine, "before_cursor_execute", self._on_execute)
        sa.event.listen(engine, "commit", self._on_commit)

    def _on_execute(self, *_: Any) -> None:
        self.executed += 1

    def _on_commit(self, *_: Any) -> None:
        self.commits += 1


def make_pages(number: int = PAGES) -> list[str]:
    """Return the paths of a shop with a blog, the most wanted first."""
    rng = random.Random(_SEED)  # noqa: S311  # the same shop each time
    front = ["/", "/cart", "/search", "/login", "/sale", "/blog", "/api/stock", "/checkout", "/account/orders"]
    adjectives = [
        "red",
        "blue",
        "small",
        "large",
        "wool",
        "oak",
        "steel",
        "quiet",
        "soft",
        "bright",
        "vintage",
        "folding",
    ]
    things = [
        "lamp",
        "chair",
        "mug",
        "scarf",
        "desk",
        "kettle",
        "tent",
        "backpack",
        "notebook",
        "clock",
        "blanket",
        "bicycle",
        "bottle",
        "jacket",
    ]
    topics = ["how-to-choose-a", "behind-the", "caring-for-your", "ten-ideas-with-a", "the-story-of-our"]
    made: list[str] = []
    for number_of_page in range(len(front), number):
        adjective, thing = rng.choice(adjectives), rng.choice(things)
        kind = rng.random()
        if kind < 0.7:  # noqa: PLR2004  # most pages of a shop are products
            made.append(f"/products/{adjective}-{thing}-{number_of_page}")
        elif kind < 0.85:  # noqa: PLR2004
            made.append(f"/category/{thing}?page={number_of_page}")
        else:
            made.append(f"/blog/{rng.randint(2012, 2026)}/{rng.choice(topics)}-{adjective}-{thing}-{number_of_page}")
    return front + made


@dataclass
class Traffic:
    """Threads that count page views as fast as they can, each with a seed of its own."""

    buffer: StatBuffer
    pages: list[str]
    increments: int = 0
    cpu_seconds: float = 0.0
    """CPU time of the loops around `increment`; drawing the pages is not in it."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, until: float, stop: Stop) -> None:
        """Make traffic until a moment of `time.monotonic()`, or a signal."""
        weights = list(itertools.accumulate(1 / rank**_ZIPF for rank in range(1, len(self.pages) + 1)))
        threads = [
            threading.Thread(target=self._visit, args=(_SEED + number, weights, until, stop), name=f"visitors-{number}")
            for number in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _visit(self, seed: int, weights: list[float], until: float, stop: Stop) -> None:
        rng = random.Random(seed)  # noqa: S311  # the same visitors each time
        increment = self.buffer.increment
        while time.monotonic() < until and not stop.asked:
            block = rng.choices(self.pages, cum_weights=weights, k=_BLOCK)
            started = time.thread_time()
            for page in block:
                increment(page)
            spent = time.thread_time() - started
            with self._lock:
                self.increments += len(block)
                self.cpu_seconds += spent

    @property
    def nanoseconds(self) -> float:
        """CPU time of one increment, the loop around it included."""
        return self.cpu_seconds / max(self.increments, 1) * 1e9


@dataclass(frozen=True)
class Result:
    """What the demo found."""

    increments: int
    seconds: float
    nanoseconds: float | None
    stats: Stats
    report: StopReport


def run_demo(url: str, log: Path | None, seconds: float) -> Exit:
    """Run the demo; the exit code says whether the books and the database agree."""
    with contextlib.closing(SQLSink(url, table=TABLE)) as sink:
        return _run(sink, log, seconds)


def _run(sink: SQLSink, log: Path | None, seconds: float) -> Exit:
    out = display.output()
    statements = Statements()
    with sink.engine.begin() as connection:
        sa.Table(TABLE, sa.MetaData()).drop(connection, checkfirst=True)
    statements.listen(sink.engine)
    with Stop() as stop:
        result = _count_log(sink, log, stop) if log else _count_traffic(sink, seconds, stop, statements, out)
    reached = Statements(statements.executed, statements.commits)  # what is read from here on does not count
    keys, total = sink.summary()
    display.show_top(out, sink.top(_TOP), ["page"], f"the largest of {keys:,} pages, read from {sink.url.database}")
    _show_result(out, result, reached, keys, total)
    return Exit.OK if result.report.complete and total == result.stats.accepted else Exit.UNDELIVERED


def _count_log(sink: SQLSink, log: Path, stop: Stop) -> Result:
    run = Run(sink, combined_picker(["path"], None), stop, interval=INTERVAL, shutdown=10.0, max_keys=1_000_000)
    with display.live(display.errors(), display.CountProgress(run).render) or contextlib.nullcontext():
        outcome = run.count([str(log)])
    display.show_problems(display.errors(), outcome)
    return Result(outcome.tally.counted, outcome.seconds, None, outcome.stats, outcome.report)


def _count_traffic(
    sink: SQLSink, seconds: float, stop: Stop, statements: Statements, out: display.ResultConsole
) -> Result:
    buffer = StatBuffer(sink, interval=INTERVAL, jitter=INTERVAL / 2)
    traffic = Traffic(buffer, make_pages())
    display.say(
        out,
        f"{THREADS} threads count visits to {PAGES:,} pages of a made-up shop for {seconds:g} s, "
        f"each page stored about {INTERVAL:g} s after its first visit",
    )
    started = time.monotonic()
    picture = _Picture(traffic, statements, started, seconds)
    with display.live(display.errors(), picture.render) or contextlib.nullcontext():
        buffer.start()
        traffic.run(started + seconds, stop)
        report = buffer.stop()
    return Result(traffic.increments, time.monotonic() - started, traffic.nanoseconds, buffer.stats(), report)


class _Picture:
    def __init__(self, traffic: Traffic, statements: Statements, started: float, seconds: float) -> None:
        self._traffic = traffic
        self._statements = statements
        self._started = started
        self._seconds = seconds
        self._speed = display.Speed()

    def render(self) -> RenderableType:
        """Draw the present moment."""
        stats = self._traffic.buffer.stats()
        figures = {
            "increments": f"{self._traffic.increments:,}",
            "per second": f"{self._speed(self._traffic.increments):,.0f}",
            "pages pending": f"{stats.keys:,}",
            "stored": f"{stats.stored:,}",
            "batches": f"{stats.batches:,}",
            "SQL statements": f"{self._statements.executed:,}",
        }
        elapsed = time.monotonic() - self._started
        return display.group(
            display.bar(elapsed, self._seconds), display.figures_grid(figures), *display.failing(stats)
        )


def _show_result(out: display.ResultConsole, result: Result, statements: Statements, keys: int, total: int) -> None:
    stats = result.stats
    rate = result.increments / max(result.seconds, 1e-9)
    share = result.increments / max(statements.executed, 1)
    figures = {
        "increments": f"{result.increments:,} in {result.seconds:.1f} s, {rate:,.0f}/s",
        "SQL": f"{statements.executed:,} statements in {statements.commits:,} transactions reached the database: "
        f"one for {share:,.0f} increments",
        "cost": f"{result.nanoseconds:.0f} ns of CPU for an increment, the loop around it included ({stats.table_kind} table)"
        if result.nanoseconds is not None
        else "",
        "balance": display.balance(stats),
        "checked": f"the database sums {total:,} over {keys:,} rows: "
        + ("equal" if total == stats.accepted else f"NOT EQUAL, {stats.accepted - total:,} missing"),
    }
    for name, text in figures.items():
        if text:
            display.say(out, f"{name:<11}{text}")
    if not result.report.complete:
        display.say(out, f"NOT STORED: {result.report}", "bold red")
