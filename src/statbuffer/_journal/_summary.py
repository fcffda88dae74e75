"""What is in a journal, by whom, how old: for people who look at it from outside."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from statbuffer._journal._file import VERSION
from statbuffer._journal._rows import add_up

if TYPE_CHECKING:
    from statbuffer._journal import Journal


@dataclass(frozen=True, slots=True)
class WriterSummary:
    """One buffer that has moved counts to the journal. Sums of counts; `seconds_ago` is its latest move."""

    writer: str
    pid: int | None
    host: str | None
    seconds_ago: float
    moved: int
    journaled: int
    stored: int
    dead: int
    dropped: int


@dataclass(frozen=True, slots=True)
class Summary:
    """One moment of a journal. Sums of counts, but where it says otherwise."""

    path: str
    format: int
    target: str
    journal: str
    bytes_on_disk: int
    waiting: int
    """Not sealed yet."""
    sealed: int
    """In batches that are on their way, or wait for the store."""
    sealed_batches: int
    """Number of those batches."""
    offered: str | None
    """Id of the batch that is, or was, being offered."""
    oldest_seconds: float | None
    """Age of the oldest count that is not settled."""
    dead: int
    dead_letters: int
    """Number of dead letters."""
    delivered_by: str | None
    """The process that holds the relay's lock, as far as it has said; None if nobody does."""
    failing: bool
    last_error: str | None
    set_aside: tuple[str, ...]
    """Names of damaged files, and of copies of those that were cut short."""
    writers: tuple[WriterSummary, ...]


def summarize(journal: Journal) -> Summary:
    """Look at a journal without changing anything. Raises `NotApplied`, `Damaged`, `SinkError`."""
    directory = journal.directory
    pulse = journal.pulse()
    with journal.reading() as connection:
        target, name = connection.execute("SELECT target, journal FROM meta").fetchone()
        (waiting,) = connection.execute("SELECT group_concat(total, ' ') FROM moves WHERE seal = 0").fetchone()
        (sealed,) = connection.execute(
            "SELECT group_concat(value, ' ') FROM sealed, json_each(sealed.counts) each"
        ).fetchone()
        batches, offered = connection.execute(
            "SELECT count(*), (SELECT writer || ':' || seq FROM offer) FROM sealed"
        ).fetchone()
        (oldest,) = connection.execute("SELECT min(at) FROM moves").fetchone()
        letters, dead = connection.execute("SELECT count(DISTINCT key), group_concat(count, ' ') FROM dead").fetchone()
        names = [row[0] for row in connection.execute("SELECT writer FROM writers ORDER BY at DESC")]
        origins = {row[0]: row[1:] for row in connection.execute("SELECT writer, pid, host, at FROM writers")}
    return Summary(
        path=str(directory),
        format=VERSION,
        target=target,
        journal=name,
        bytes_on_disk=directory.bytes_on_disk(),
        waiting=add_up(waiting),
        sealed=add_up(sealed),
        sealed_batches=batches,
        offered=offered,
        oldest_seconds=None if oldest is None else max(0.0, time.time() - oldest),
        dead=add_up(dead),
        dead_letters=letters,
        delivered_by=f"pid {pulse.get('pid') or '?'} on {pulse.get('host') or '?'}" if _is_delivered(journal) else None,
        failing=bool(pulse.get("failing")),
        last_error=pulse.get("last_error"),
        set_aside=tuple(sorted(path.name for kind in ("damaged-*", "kept-*") for path in directory.path.glob(kind))),
        writers=tuple(_writer(journal, name, *origins[name]) for name in names),
    )


def _is_delivered(journal: Journal) -> bool:
    """Try the relay's lock for a moment; whoever wants it just then tries again."""
    lock = journal.directory.relay_lock
    free = lock.take()
    lock.release()
    return not free


def _writer(journal: Journal, name: str, pid: int | None, host: str | None, at: float) -> WriterSummary:
    account = journal.account(name)
    moved = journaled = stored = dead = dropped = 0
    if account is not None:
        moved, journaled, stored = account.moved, account.journaled, account.stored
        dead, dropped = account.dead, account.dropped
    return WriterSummary(name, pid, host, max(0.0, time.time() - at), moved, journaled, stored, dead, dropped)
