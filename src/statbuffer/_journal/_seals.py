"""The delivering side of the journal, for whoever holds the relay's lock: from moves to batches, and what became of them.

All steps are transactions, so a crash leaves moves that wait, or sealed batches of which the first is on offer under an id that
is on the disk already. Nothing but this changes a move after it was written.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import socket
import sqlite3
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from statbuffer._batch import Batch
from statbuffer._journal._file import MOVE_CRC, Damaged, row_crc, values_with_crc
from statbuffer._journal._rows import (
    add_dead,
    add_up,
    dump_counts,
    dump_texts,
    insert_move,
    insert_sealed,
    offer_next,
    read_writer,
    write_writer,
)
from statbuffer._keys import UnknownText, decode

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Mapping

    from statbuffer._batch import Settlement
    from statbuffer._journal import Journal
    from statbuffer._options import Options

log = logging.getLogger("statbuffer")

_FOLD_AT: Final = 64
"""Moves of one buffer that wait behind a failing store before they are folded into one."""

_MERGED: Final = (
    "SELECT json_group_object(key, n) FROM (SELECT key, n, (row_number() OVER () - 1) / :size AS part FROM ("
    "SELECT each.key AS key, sum(each.value) AS n FROM contents, json_each(contents.counts) each "
    "WHERE move IN (SELECT value FROM json_each(:moves)) GROUP BY each.key HAVING n <> 0)) GROUP BY part"
)


class Seals:
    """The books of the relay's delivery. One thread, which holds the relay's lock."""

    puts_back = False
    """What is sealed is offered unchanged until it is settled: new moves merge with each other meanwhile."""

    def __init__(
        self,
        journal: Journal,
        options: Options,
        monotonic: Callable[[], float],
    ) -> None:
        self._journal = journal
        self._options = options
        self._monotonic = monotonic
        self._file = journal.relay_file
        self._jitter = 0.0
        self._next_fold = -math.inf
        self._keys: dict[str, Hashable] = {}  # of the batch on offer, by text
        self.batches = self.attempts = self.failures = 0
        self.stored = 0
        self.last_flush_seconds: float | None = None
        self.fresh = False
        """Whether the batch on offer was sealed here and not offered yet."""

    # From moves to a batch

    def due_in(self, now: float) -> float | None:
        """Return the seconds until there is something to take; None if nothing waits."""
        with self._file.snapshot() as connection:
            if connection.execute("SELECT 1 FROM offer").fetchone():
                return 0.0
            ready, flush = connection.execute(
                "SELECT min(CASE WHEN moved > :now + 1 OR not_before > :now + :far THEN 0 "  # the machine was restarted
                "ELSE max(moved + :interval, not_before) END), "
                "min(id) <= (SELECT flush_to FROM pulse) FROM moves WHERE seal = 0",
                {"now": now, "far": self._far, "interval": self._options.interval + self._jitter},
            ).fetchone()
        if ready is None:
            return None
        return 0.0 if flush else max(0.0, float(ready) - now)

    @property
    def _far(self) -> float:
        return 120.0 + 2 * self._options.backoff

    def take(self, now: float) -> tuple[Batch | None, float]:
        """Return the batch on offer, sealing what is ready if there is none, and when its oldest count was moved."""
        inherited = self._offered()
        self.fresh = inherited is None
        if inherited is not None:
            return inherited
        if self.due_in(now) == 0.0:
            self._seal(now)
            self._jitter = random.random() * self._options.jitter  # noqa: S311  # spreads writes, guards no secret
        return self._offered() or (None, math.inf)

    def _offered(self) -> tuple[Batch, float] | None:
        while True:
            with self._file.snapshot() as connection:
                row = connection.execute(
                    "SELECT offer.writer, offer.seq, counts, counts_crc, born FROM offer JOIN sealed ON sealed.id = sealed"
                ).fetchone()
            if row is None:
                return None
            writer, seq, text, crc, born = row
            if row_crc(text) != crc:
                raise Damaged("a sealed batch has another checksum than it was written with")
            counts = json.loads(text)
            self._keys, unknown = {}, {}
            for each in counts:
                try:
                    self._keys[each] = decode(each)
                except UnknownText as error:
                    unknown[each] = str(error)
            if not unknown:
                break
            log.error("%r: %d dead letters: %s", self._journal, len(unknown), next(iter(unknown.values())))
            self._settle(dead=unknown, rest=self._keys)
        merged: dict[Hashable, int] = defaultdict(int)
        for each, count in counts.items():
            merged[self._keys[each]] += count  # 1, 1.0 and True are three texts and one key
        return Batch(writer, seq, dict(merged)), born

    def _seal(self, now: float) -> None:
        with self._file.snapshot() as connection:
            moves, born = connection.execute(
                "SELECT json_group_array(id), min(moved) FROM moves WHERE seal = 0 "
                "AND (not_before <= :now OR not_before > :now + :far OR id <= (SELECT flush_to FROM pulse))",
                {"now": now, "far": self._far},
            ).fetchone()
            try:
                parts = self._merge(connection, moves)
            except sqlite3.OperationalError as error:
                if str(error) != "integer overflow":
                    raise
                moves = json.dumps(json.loads(moves)[:1])  # of one move no two counts are of one key
                parts = self._merge(connection, moves)
        with self._file.transaction() as connection:
            (seal,) = connection.execute("SELECT max(value) FROM json_each(?)", (moves,)).fetchone()
            connection.execute(
                f"UPDATE moves SET seal = ?1, crc = {MOVE_CRC.format(seal='?1')} "
                "WHERE id IN (SELECT value FROM json_each(?2))",
                (seal, moves),
            )
            for text in parts:
                insert_sealed(connection, seal, born, text)
            if parts:
                offer_next(connection)
            else:
                self._finish(connection, seal)

    def _merge(self, connection: sqlite3.Connection, moves: str) -> list[str]:
        wrong = connection.execute(
            f"SELECT 1 FROM moves LEFT JOIN contents ON move = id WHERE id IN (SELECT value FROM json_each(?)) "
            f"AND (crc IS NOT {MOVE_CRC.format(seal='seal')} OR counts_crc IS NOT row_crc(counts)) LIMIT 1",
            (moves,),
        ).fetchone()
        if wrong:
            raise Damaged("a move has another checksum than it was written with")
        return [text for (text,) in connection.execute(_MERGED, {"moves": moves, "size": self._options.batch_keys})]

    # What became of it

    def settle(self, settlement: Settlement) -> Batch | None:
        """Write down what became of the batch on offer, in one transaction. Raises `NotApplied`, `Unanswered`, `Damaged`."""
        texts = self._keys.items()
        rest = set(settlement.rest)
        self._settle(
            dead={text: settlement.dead[key] for text, key in texts if key in settlement.dead},
            dropped=[text for text, key in texts if key in settlement.dropped] if settlement.dropped else (),
            returned={text: settlement.returned[key] for text, key in texts if key in settlement.returned},
            rest=[text for text, key in texts if key in rest] if rest else (),
            batch=settlement.batch,
        )
        self.stored += settlement.stored
        if not rest:
            return None
        offered = self._offered()
        return None if offered is None else offered[0]

    def _settle(
        self,
        *,
        dead: Mapping[str, str],
        dropped: Collection[str] = (),
        returned: Mapping[str, float] | None = None,
        rest: Collection[str] = (),
        batch: Batch | None = None,
    ) -> None:
        with self._file.transaction() as connection:
            row = connection.execute("SELECT sealed, writer, seq FROM offer").fetchone()
            if row is None or (batch is not None and row[1:] != (batch.writer, batch.seq)):
                return  # it is settled: this is a repeat of what was not answered
            sealed, writer, seq = row
            (seal,) = connection.execute("SELECT seal FROM sealed WHERE id = ?", (sealed,)).fetchone()
            if dead:
                self._bury(connection, seal, dead, f"{writer}:{seq}")
            if dropped:
                self._drop(connection, seal, dropped)
            if returned:
                self._return(connection, seal, returned)
            connection.execute("DELETE FROM offer")
            if rest:
                self._keep(connection, sealed, set(rest))
            else:
                connection.execute("DELETE FROM sealed WHERE id = ?", (sealed,))
                if not connection.execute("SELECT 1 FROM sealed WHERE seal = ?", (seal,)).fetchone():
                    self._finish(connection, seal)
            offer_next(connection)
            connection.execute("UPDATE pulse SET settled = settled + 1")

    def _keep(self, connection: sqlite3.Connection, sealed: int, rest: set[str]) -> None:
        born, text = connection.execute("SELECT born, counts FROM sealed WHERE id = ?", (sealed,)).fetchone()
        text = dump_counts({key: count for key, count in json.loads(text).items() if key in rest})
        (seal,) = connection.execute("SELECT seal FROM sealed WHERE id = ?", (sealed,)).fetchone()
        values = values_with_crc(sealed, seal, born, row_crc(text))
        connection.execute("INSERT OR REPLACE INTO sealed VALUES (?, ?, ?, ?, ?, ?)", (*values, text))

    def _bury(self, connection: sqlite3.Connection, seal: int, reasons: Mapping[str, str], batch: str) -> None:
        for writer, _, _, counts in self._extract(connection, seal, reasons):
            for key, count in counts.items():
                add_dead(connection, key=key, writer=writer, count=count, reason=reasons[key], batch=batch)

    def _drop(self, connection: sqlite3.Connection, seal: int, texts: Collection[str]) -> None:
        for writer, _, _, counts in self._extract(connection, seal, texts):
            self._book(connection, writer, "dropped", sum(counts.values()))

    def _return(self, connection: sqlite3.Connection, seal: int, delays: Mapping[str, float]) -> None:
        now = self._monotonic()
        for writer, origin, moved, counts in self._extract(connection, seal, delays):
            by_delay: dict[float, dict[str, int]] = defaultdict(dict)
            for key, count in counts.items():
                by_delay[delays[key]][key] = count
            for delay, group in by_delay.items():
                text, total = dump_counts(group), sum(group.values())
                insert_move(
                    connection, text, total, writer=writer, seq=0, moved=moved, origin=origin, not_before=now + delay
                )

    def _extract(
        self, connection: sqlite3.Connection, seal: int, texts: Collection[str]
    ) -> list[tuple[str, int, float, dict[str, int]]]:
        """Take these keys out of the moves of a seal; return (writer, origin, moved, counts) of each buffer's."""
        found: dict[str, tuple[int, float, dict[str, int]]] = {}
        (moves,) = connection.execute(
            "SELECT json_group_array(id) FROM moves WHERE seal = ?1 AND EXISTS (SELECT 1 FROM contents, json_each(counts) each "
            "WHERE move = moves.id AND each.key IN (SELECT value FROM json_each(?2)))",
            (seal, dump_texts(texts)),
        ).fetchone()
        for move in json.loads(moves):
            writer, origin, moved, text = connection.execute(
                "SELECT writer, origin, moved, counts FROM moves JOIN contents ON move = id WHERE id = ?", (move,)
            ).fetchone()
            counts = json.loads(text)
            taken = {key: counts.pop(key) for key in texts if key in counts}
            self._rewrite(connection, move, counts)
            first, since, before = found.get(writer, (origin, moved, {}))
            for key, count in taken.items():
                before[key] = before.get(key, 0) + count
            found[writer] = (min(first, origin), min(since, moved), before)
        return [(writer, *rest) for writer, rest in found.items()]

    @staticmethod
    def _rewrite(connection: sqlite3.Connection, move: int, counts: Mapping[str, int]) -> None:
        text = dump_counts(counts)
        connection.execute("UPDATE contents SET counts = ? WHERE move = ?", (text, move))
        connection.execute(
            "UPDATE moves SET total = ?, counts_crc = ? WHERE id = ?", (str(sum(counts.values())), row_crc(text), move)
        )
        connection.execute(f"UPDATE moves SET crc = {MOVE_CRC.format(seal='seal')} WHERE id = ?", (move,))

    def _finish(self, connection: sqlite3.Connection, seal: int) -> None:
        """All batches of a seal are settled: what is left in its moves is stored."""
        rows = connection.execute(
            "SELECT writer, group_concat(total, ' ') FROM moves WHERE seal = ? GROUP BY writer", (seal,)
        ).fetchall()
        for writer, totals in rows:
            self._book(connection, writer, "stored", add_up(totals))
        connection.execute("DELETE FROM contents WHERE move IN (SELECT id FROM moves WHERE seal = ?)", (seal,))
        connection.execute("DELETE FROM moves WHERE seal = ?", (seal,))

    @staticmethod
    def _book(connection: sqlite3.Connection, writer: str, place: str, total: int) -> None:
        row = read_writer(connection, writer)
        if row is not None:
            write_writer(connection, row | {place: str(int(row[place]) + total)})

    # While the store is down, and while nothing happens

    def fold(self, now: float) -> None:
        """Merge the moves of each buffer that has many waiting into one, once a second at most.

        A sum past 64 bits leaves them as they are.
        """
        if now < self._next_fold:
            return
        self._next_fold = now + 1.0
        with self._file.snapshot() as connection:
            waiting = connection.execute(
                "SELECT writer, json_group_array(id) FROM moves JOIN contents ON move = id WHERE seal = 0 AND not_before = 0 "
                "GROUP BY writer HAVING count(*) >= :at AND (sum(length(counts)) > 2 * max(length(counts)) OR count(*) > 8 * :at)",
                {"at": _FOLD_AT},
            ).fetchall()
        for writer, moves in waiting:
            with self._file.snapshot() as connection:
                try:
                    parts = self._merge(connection, moves)
                except sqlite3.OperationalError as error:
                    if str(error) != "integer overflow":
                        raise
                    continue
            with self._file.transaction() as connection:
                self._replace(connection, writer, moves, parts)

    @staticmethod
    def _replace(connection: sqlite3.Connection, writer: str, moves: str, parts: list[str]) -> None:
        chosen = "(SELECT value FROM json_each(?))"
        seq, origin, moved = connection.execute(
            f"SELECT max(seq), min(origin), min(moved) FROM moves WHERE id IN {chosen}", (moves,)
        ).fetchone()
        connection.execute(f"DELETE FROM moves WHERE id IN {chosen}", (moves,))
        connection.execute(f"DELETE FROM contents WHERE move IN {chosen}", (moves,))
        for text in parts:
            total = sum(json.loads(text).values())
            insert_move(connection, text, total, writer=writer, seq=seq, moved=moved, origin=origin)

    def give_back_space(self) -> None:
        """Shrink the file."""
        with self._file.snapshot() as connection:
            connection.execute("PRAGMA incremental_vacuum").fetchall()

    def note_pulse(self, *, failing: bool, last_error: str | None) -> None:
        """Leave word of how delivery is, for other processes' `stats()` and for `statbuffer journal status`."""
        with self._file.transaction() as connection:
            connection.execute(
                "UPDATE pulse SET failing = ?, last_error = ?, pid = ?, host = ?, at = ?",
                (failing, last_error, os.getpid(), socket.gethostname(), time.time()),
            )
