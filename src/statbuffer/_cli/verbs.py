"""The verbs of the command line, one function each."""

from __future__ import annotations

import contextlib
import json
import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import sqlalchemy as sa
import typer
from sqlalchemy import exc

import statbuffer
from statbuffer import SinkError, StatBufferError
from statbuffer._cli import display
from statbuffer._cli.counting import Outcome, Run
from statbuffer._cli.exits import choose
from statbuffer._cli.journal_verbs import journal_app, relay
from statbuffer._cli.keys import (
    COMBINED_KEYS,
    BadPicker,
    Picker,
    combined_picker,
    field_picker,
    json_picker,
    regex_picker,
)
from statbuffer._cli.signals import Stop
from statbuffer._cli.stores import EXIT_CODES, opened, store_errors
from statbuffer.sinks.sql import SQLSink

if TYPE_CHECKING:
    from collections.abc import Hashable

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Count lines into a SQL table, exactly; look at what was counted.",
    epilog=EXIT_CODES,
)


app.command(epilog=EXIT_CODES)(relay)
app.add_typer(journal_app, name="journal")


class Format(str, Enum):
    """Formats of log lines that need no pattern."""

    combined = "combined"


def _version(value: bool) -> None:  # noqa: FBT001  # typer's callback
    if value:
        display.say(display.output(), f"statbuffer {statbuffer.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


@app.command(epilog=EXIT_CODES)
def count(
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE", help="Plain or gzip; `-` or none: standard input, as it comes."),
    ] = None,
    *,
    into: Annotated[
        str, typer.Option(metavar="URL", help="Where to: sqlite:///hits.db, postgresql://user@host/db ...")
    ],
    table: Annotated[str, typer.Option(metavar="NAME", help="Made if it is missing.")] = "counters",
    field: Annotated[
        int | None, typer.Option(metavar="N", help="Key: the Nth field between blanks, as in awk.")
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option(metavar="R", help="Key: group 1, or all named groups, whose names are the key columns."),
    ] = None,
    json_path: Annotated[
        str | None, typer.Option("--json", metavar="A.B", help="Key: a dotted path into the object of each line.")
    ] = None,
    format_: Annotated[Format | None, typer.Option("--format", help="With --key: Apache's and nginx's log.")] = None,
    key: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(COMBINED_KEYS)}; several make a tuple.")
    ] = None,
    amount: Annotated[
        str | None,
        typer.Option(help="What to add instead of 1: a field, group, path, or bytes with --format combined."),
    ] = None,
    interval: Annotated[float, typer.Option(min=0.0, help="Seconds from a key's first line until it is stored.")] = 1.0,
    update_only: Annotated[
        bool, typer.Option("--update-only", help="Touch existing rows only; other keys are reported.")
    ] = False,
    shutdown: Annotated[float, typer.Option(min=0.0, help="Seconds to wait at the end for a store that fails.")] = 10.0,
    max_keys: Annotated[int, typer.Option(min=1, help="Keys pending at most; then reading waits for the store.")] = (
        1_000_000
    ),
    top: Annotated[int, typer.Option(min=0, metavar="N", help="Show so many of the largest keys at the end.")] = 10,
) -> None:
    """Count lines by a key, into a table: `count access.log --format combined --key path --into sqlite:///hits.db`."""
    picker = _picker(field=field, regex=regex, json_path=json_path, format_=format_, key=key, amount=amount)
    with opened(into, table=table, key=picker.columns, mode="update" if update_only else "upsert") as sink:
        with Stop() as stop:
            run = Run(sink, picker, stop, interval=interval, shutdown=shutdown, max_keys=max_keys)
            with display.live(display.errors(), display.CountProgress(run).render) or contextlib.nullcontext():
                outcome = run.count(files or ["-"])
        _show_outcome(outcome, sink, picker, title=table, top=top)
    raise typer.Exit(
        choose(
            undelivered=outcome.undelivered,
            input_failed=bool(outcome.tally.failed),
            stopped_by=outcome.stopped_by,
        )
    )


@app.command("top", epilog=EXIT_CODES)
def show_top(
    url: Annotated[str, typer.Argument(metavar="URL")],
    *,
    table: Annotated[str, typer.Option(metavar="NAME")] = "counters",
    n: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="An array of objects, one member a column.")] = False,
    key: Annotated[list[str] | None, typer.Option(help="A key column; the primary key if not given.")] = None,
    count_column: Annotated[str | None, typer.Option("--count", help="The count column; found if not given.")] = None,
) -> None:
    """Show the largest keys of a table."""
    with store_errors():
        keys, counts = _columns(url, table, tuple(key or ()), count_column)
    with opened(url, table=table, key=keys, count=counts, mode="update", create=False) as sink:
        rows = sink.top(n)
    if as_json:
        found = [dict(zip((*keys, counts), (*values, total), strict=True)) for values, total in rows]
        display.write(display.output(), json.dumps(found, default=str, indent=1) + "\n")
    else:
        display.show_top(display.output(), rows, keys, table)


@app.command(epilog=EXIT_CODES)
def prune(
    url: Annotated[str, typer.Argument(metavar="URL")],
    *,
    older_than: Annotated[str, typer.Option(metavar="AGE", help="Such as 30d, 12h, 90m or 3600 (seconds).")],
) -> None:
    """Delete the watermarks of writers that are long gone. AGE must be longer than any batch waits: a day at least."""
    seconds = _seconds(older_than)
    with store_errors():
        _require_database(url)
    with opened(url, create=False) as sink:
        deleted = sink.prune(seconds)
    display.say(display.output(), f"{deleted:,} watermarks of writers silent for {older_than} deleted")


@app.command(epilog=EXIT_CODES)
def demo(
    *,
    log: Annotated[Path | None, typer.Option(metavar="FILE", help="Count this log instead of made-up traffic.")] = None,
    into: Annotated[str, typer.Option(metavar="URL", help="Where to; the table `page_views` is made anew.")] = (
        "sqlite:///demo.db"
    ),
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to make traffic.")] = 6.0,
) -> None:
    """Count a shop's page views from four threads into SQLite, and check the books against the database."""
    from statbuffer._cli.demo import run_demo

    if log is not None and not log.exists():
        raise typer.BadParameter(f"{log} does not exist", param_hint="--log")
    with store_errors():
        raise typer.Exit(run_demo(into, log, seconds))


@app.command(epilog=EXIT_CODES)
def bench() -> None:
    """Measure what an increment costs on this machine, in a few seconds."""
    from statbuffer._cli.bench import show_sections
    from statbuffer._cli.bench_sections import SECTIONS

    show_sections(SECTIONS, scale=0.2)


def _picker(
    *,
    field: int | None,
    regex: str | None,
    json_path: str | None,
    format_: Format | None,
    key: list[str] | None,
    amount: str | None,
) -> Picker:
    given = {"--field": field, "--regex": regex, "--json": json_path, "--format": format_}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        what = f"{' and '.join(chosen)} given" if chosen else "none given"
        raise typer.BadParameter(f"{what}: a key is picked by exactly one of {', '.join(given)}")
    if bool(key) != (format_ is not None):
        raise typer.BadParameter("--format combined and --key go together, such as --key path")
    try:
        if field is not None:
            return field_picker(field, amount)
        if regex is not None:
            return regex_picker(regex, amount)
        if json_path is not None:
            return json_picker(json_path, amount)
        return combined_picker(key or [], amount)
    except BadPicker as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from None


def _show_outcome(outcome: Outcome, sink: SQLSink, picker: Picker, *, title: str, top: int) -> None:
    out, err = display.output(), display.errors()
    keys: int | None = None
    try:
        rows: list[tuple[Hashable, int]] = sink.top(top) if top else []
        keys, _ = sink.summary()
    except (StatBufferError, exc.SQLAlchemyError) as error:
        display.say(err, f"the table can't be read: {display.printable(error):.300}", "bold red")
    else:
        columns = (picker.columns,) if isinstance(picker.columns, str) else picker.columns
        display.show_top(out, rows, columns, title)
    display.say(out, display.summary(outcome, keys))
    display.show_problems(err, outcome)


def _columns(url: str, table: str, keys: tuple[str, ...], count: str | None) -> tuple[tuple[str, ...], str]:
    """Return the key columns and the count column of a table: its primary key, and the one integer beside it."""
    _require_database(url)
    if keys and count:
        return keys, count
    sink = SQLSink(url)  # for its choice of driver; not opened
    schema, _, name = table.rpartition(".")
    try:
        found = sa.Table(name, sa.MetaData(), schema=schema or None, autoload_with=sink.engine)
    except exc.NoSuchTableError:
        raise SinkError(f"table {table!r} does not exist") from None
    finally:
        sink.close()
    keys = keys or tuple(column.name for column in found.primary_key if column.name != "slot")
    counts = [column.name for column in found.c if column.name not in keys and isinstance(column.type, sa.Integer)]
    if count is None and "count" in counts:
        count = "count"
    elif count is None and len(counts) == 1:
        count = counts[0]
    if not keys or count is None:
        raise SinkError(f"table {table!r} has {', '.join(found.c.keys())}: say which with --key and --count")
    return keys, count


def _require_database(url: str) -> None:
    """SQLite would make an empty file for whatever is read."""
    try:
        parsed = sa.make_url(url)
    except exc.ArgumentError:
        return  # the sink says it better
    path = parsed.database if parsed.get_backend_name() == "sqlite" and "uri" not in parsed.query else None
    if path and path != ":memory:" and not Path(path).exists():
        raise SinkError(f"{path} does not exist")


_UNITS = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhdw]?)", text)
    if match is None:
        raise typer.BadParameter(f"{text!r}: expected an age such as 30d, 12h, 90m or 3600", param_hint="--older-than")
    return float(match[1]) * _UNITS[match[2]]
