"""The verbs about journals: deliver one as a process of its own, and look into it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from statbuffer import NotApplied, Options, SinkError
from statbuffer._cli import display
from statbuffer._cli.exits import Exit
from statbuffer._cli.signals import Stop, StopAtOnce
from statbuffer._cli.stores import EXIT_CODES, fail, opened, store_errors
from statbuffer._clock import SYSTEM_CLOCK
from statbuffer._journal import Journal
from statbuffer._journal._check import problems
from statbuffer._journal._summary import Summary, summarize
from statbuffer._journaled import target_of
from statbuffer._relay import LOOK, Relay

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from statbuffer.sinks import Sink

journal_app = typer.Typer(no_args_is_help=True, help="Look into a journal.", epilog=EXIT_CODES)

_Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The journal's directory.")]


class Delivery:
    """One journal that is delivered until somebody asks to stop, or once."""

    def __init__(self, path: Path, sink: Sink, options: Options) -> None:
        self.journal = Journal(path, target=target_of(sink), fsync=True, bytes_max=2**63)
        self.relay = Relay(self.journal, sink, options, SYSTEM_CLOCK, name="statbuffer", stays=True)

    def run(self, stop: Stop, *, once: bool, shutdown: float) -> bool:
        """Deliver; return whether all is stored that was there when it was to end."""
        self.journal.open()
        with contextlib.suppress(NotApplied):  # the store is down just now: that is what the journal is for
            self.relay.delivery.open()
        upto = self.journal.ask_flush() if once else None
        give_up = time.monotonic() + shutdown
        self.relay.resume()
        try:
            while not stop.asked:
                if upto is not None and not self._waits(upto):
                    break
                if once and time.monotonic() > give_up:
                    break
                stop.pause(LOOK)
        except StopAtOnce:
            shutdown = 0.0
        self.relay.halt(close=False)
        self.relay.ended.wait(shutdown)
        return not self._waits(upto if upto is not None else 2**63 - 1)

    def _waits(self, upto: int) -> bool:
        try:
            return self.journal.has_moves(None, upto)
        except NotApplied:
            return True

    def render(self) -> RenderableType:
        """Draw the present moment."""
        summary = summarize(self.journal) if not self.relay.delivers else None
        seals, delivery = self.relay.seals, self.relay.delivery
        figures = {
            "state": "delivering" if self.relay.delivers else f"standing by ({summary and summary.delivered_by})",
            "stored": f"{seals.stored:,}",
            "batches": f"{seals.batches:,}",
            "failures": f"{seals.failures:,}",
            "journal": f"{self.journal.directory.bytes_on_disk() / 1e6:,.1f} MB",
        }
        trouble = self.relay.error or delivery.last_error
        return display.group(display.figures_grid(figures), *display.trouble(trouble, failing=delivery.failing))


def relay(
    path: _Directory,
    *,
    into: Annotated[
        str, typer.Option(metavar="URL", help="Where to: postgresql://user@host/db, sqlite:///hits.db ...")
    ],
    table: Annotated[str, typer.Option(metavar="NAME", help="Made if it is missing.")] = "counters",
    key: Annotated[list[str] | None, typer.Option(help="The key column; several for tuple keys.")] = None,
    count: Annotated[str, typer.Option("--count", metavar="NAME", help="The count column.")] = "count",
    update_only: Annotated[bool, typer.Option("--update-only", help="Touch existing rows only.")] = False,
    interval: Annotated[
        float, typer.Option(min=0.0, help="Seconds that counts are merged before they are stored.")
    ] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Deliver what is there now, then end.")] = False,
    shutdown: Annotated[
        float, typer.Option(min=0.0, help="Seconds to wait for a store that fails: at the end, or with --once.")
    ] = 30.0,
) -> None:
    """Deliver a journal, in place of the processes that write to it: `relay var/counts --into postgresql://app@db/app`.

    Ends well at SIGTERM and Ctrl-C: what is not stored stays in the journal.
    """
    columns = tuple(key or ["key"])
    keys = columns if len(columns) > 1 else columns[0]
    with opened(into, table=table, key=keys, count=count, mode="update" if update_only else "upsert") as sink:
        delivery = Delivery(path, sink, Options(interval=interval))
        with Stop() as stop, display.live(display.errors(), delivery.render) or contextlib.nullcontext():
            complete = delivery.run(stop, once=once, shutdown=shutdown)
        seals, error = delivery.relay.seals, delivery.relay.delivery.last_error or delivery.relay.error
        delivery.journal.close()
    text = f"{seals.stored:,} counts stored in {seals.batches:,} batch{'' if seals.batches == 1 else 'es'}"
    display.say(display.output(), text + ("" if complete else "; the rest stays in the journal"))
    if not complete and error:
        display.say(display.errors(), f"the store last said: {display.printable(error)}", "bold red")
    raise typer.Exit(Exit.UNDELIVERED if once and not complete else Exit.OK)


@journal_app.command(epilog=EXIT_CODES)
def status(path: _Directory, *, as_json: Annotated[bool, typer.Option("--json", help="One object.")] = False) -> None:
    """Show what is in it, by whom, how old, and who delivers it."""
    with _existing(path) as journal:
        summary = summarize(journal)
    if as_json:
        display.write(display.output(), json.dumps(dataclasses.asdict(summary), indent=1) + "\n")
        return
    for line in _lines(summary):
        display.say(display.output(), display.printable(line))


def _lines(summary: Summary) -> Iterator[str]:
    age = "" if summary.oldest_seconds is None else f", the oldest {_age(summary.oldest_seconds)} old"
    yield f"{summary.path}: for {summary.target}; {summary.bytes_on_disk / 1e6:,.1f} MB, format {summary.format}"
    yield f"waiting: {summary.waiting:,} to be sealed, {summary.sealed:,} in {summary.sealed_batches} batches{age}"
    yield f"delivered by: {summary.delivered_by or 'nobody just now'}" + (", FAILING" if summary.failing else "")
    if summary.last_error:
        yield f"the store last said: {summary.last_error}"
    if summary.dead_letters:
        yield f"dead letters: {summary.dead_letters}, {summary.dead:,} counts; see: statbuffer journal dead {summary.path}"
    for name in summary.set_aside:
        yield f"set aside: {name}"
    for writer in summary.writers:
        books = f"{writer.moved:,} moved = {writer.journaled:,} here + {writer.stored:,} stored"
        books += f" + {writer.dead:,} dead" * bool(writer.dead) + f" + {writer.dropped:,} dropped" * bool(
            writer.dropped
        )
        yield f"pid {writer.pid} on {writer.host}, {_age(writer.seconds_ago)} ago: {books}"


def _age(seconds: float) -> str:
    for unit, size in (("d", 86_400.0), ("h", 3_600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s"


@journal_app.command(epilog=EXIT_CODES)
def check(path: _Directory) -> None:
    """Read all of it, and say whether it is what was written."""
    with _existing(path) as journal:
        with journal.reading() as connection:
            found = problems(connection)
        aside = journal.directory.to_salvage()
    for problem in found:
        display.say(display.errors(), display.printable(problem), "bold red")
    for each in aside:
        display.say(display.errors(), f"not read yet: {each}", "yellow")
    if found:
        fail("the journal is damaged: the next process that delivers sets it aside and reads from it what can be read")
    display.say(display.output(), "the journal is sound")


@journal_app.command(epilog=EXIT_CODES)
def dead(
    path: _Directory, *, as_json: Annotated[bool, typer.Option("--json", help="An array of objects.")] = False
) -> None:
    """List the dead letters: counts that the store rejected for good."""
    with _existing(path) as journal:
        letters = journal.dead_letters()
    if as_json:
        found = [dataclasses.asdict(letter) | {"key": letter.key} for letter in letters]
        display.write(display.output(), json.dumps(found, default=str, indent=1) + "\n")
        return
    lines = (
        f"{letter.count}\t{display.printable(letter.key)}\t{display.printable(letter.reason)}\n" for letter in letters
    )
    display.write(display.output(), "".join(lines))


@journal_app.command(epilog=EXIT_CODES)
def retry(path: _Directory) -> None:
    """Have the dead letters delivered again, once the reason is mended. Whoever delivers the journal does it."""
    with _existing(path) as journal:
        total = journal.revive()
    display.say(display.output(), f"{total:,} counts go back on their way")


@contextlib.contextmanager
def _existing(path: Path) -> Iterator[Journal]:
    with store_errors():
        journal = Journal(path, target="", fsync=True, bytes_max=2**63)
        if not journal.directory.file.exists():
            raise SinkError(f"{path} holds no journal")
        try:
            yield journal
        finally:
            journal.close()
