"""Batches into a SQL table, exactly once.

Every batch is one transaction: the writer's row in `statbuffer_writers` is moved on to the batch's `seq`, which also
locks it, and says whether the batch was stored before; then one statement adds all counts; then COMMIT. Whatever fails
before COMMIT is sent has stored nothing, since nobody else can commit that transaction: `NotApplied`. A failure at COMMIT
leaves the outcome unknown, and the same batch is offered again: the watermark knows.

Where the data itself is at fault, the same transaction is made again with savepoints and the batch is halved until the
offending keys are found (about 2 log2(n) statements a key); all is rolled back and they are `Rejected` together.
"""

from __future__ import annotations

import hashlib
import threading
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Literal

import sqlalchemy as sa
from sqlalchemy import exc

from statbuffer._errors import NotApplied, Rejected, SinkError
from statbuffer.sinks._dialects import dialect_for
from statbuffer.sinks._engines import engine_of, is_file
from statbuffer.sinks._forks import ForkGate
from statbuffer.sinks._schema import Schema

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping

    from sqlalchemy import Connection, Table
    from sqlalchemy.engine import URL, Engine
    from sqlalchemy.sql.base import Executable

    from statbuffer._batch import Batch

    Row = tuple[Any, ...]

_READ_CHUNK: Final = 10_000


_UNSENDABLE: Final = (exc.StatementError, ValueError, TypeError)
"""What SQLAlchemy and the drivers raise before they send anything, for a value that they can't put into a message."""


class _DataProblem(Exception):
    """Some row was left out by the statement itself."""


class SQLSink:
    """Adds counts to rows of a table on SQLite, PostgreSQL, MySQL or MariaDB. Exact.

    `url_or_engine`: a URL (`sqlite:///views.db`, `postgresql://...` by psycopg, `mysql://...` by PyMySQL) or a SQLAlchemy
    `Engine`, whose pool, TLS and isolation stay yours. `table`: a name, or a SQLAlchemy `Table` for typed keys. `key`: the
    key's column, or a tuple of columns for tuple keys. `mode`: "upsert", or "update" for a table whose rows are somebody
    else's to make; `on_missing` says what becomes of a key that has none: "dead" (a dead letter), "ignore" (counted as
    stored and gone), "insert" (the same as upsert). `create`: make missing tables. `slots`: spread each key over that many
    rows, told apart by a column `slot`, where many hosts write the same few keys.
    """

    exact = True

    def __init__(
        self,
        url_or_engine: str | URL | Engine,
        *,
        table: str | Table = "counters",
        key: str | tuple[str, ...] = "key",
        count: str = "count",
        mode: Literal["upsert", "update"] = "upsert",
        create: bool = True,
        on_missing: Literal["dead", "ignore", "insert"] = "dead",
        slots: int = 1,
    ) -> None:
        _require("mode", mode, ("upsert", "update"))
        _require("on_missing", on_missing, ("dead", "ignore", "insert"))
        if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
            raise SinkError(f"slots={slots!r}: expected a whole number of at least 1")
        if slots > 1 and mode == "update":
            raise SinkError("slots need rows of their own: use mode='upsert'")
        self._engine, self._own = engine_of(url_or_engine)
        self._key_names = (key,) if isinstance(key, str) else tuple(key)
        self._composite = not isinstance(key, str)
        self._upserts = mode == "upsert" or on_missing == "insert"
        self._on_missing = on_missing
        self._create = create
        self._slots = slots
        self._dialect = dialect_for(self._engine)
        self._gate = ForkGate() if is_file(self._engine) else None
        self._opening = threading.Lock()
        self._looked = self._is_open = self._unchecked = False
        self._schema = Schema(
            self._dialect, table, keys=self._key_names, count=count, slots=slots, unique=self._upserts
        )
        self.target = f"table {self._schema.name} ({', '.join(self._key_names)}: {count})"

    @property
    def url(self) -> URL:
        """The database's URL, with its password."""
        return self._engine.url

    @property
    def engine(self) -> Engine:
        """The SQLAlchemy engine."""
        return self._engine

    def __repr__(self) -> str:
        return f"<SQLSink {self._engine.url.render_as_string(hide_password=True)} table {self._schema.name!r}>"

    # Life

    def open(self) -> None:
        """Connect, make or look at the tables. Raises `SinkError` if that can't work, `NotApplied` if it can't just now."""
        with self._opening:
            if not self._is_open:
                with self._connect_or_say_why() as connection:
                    if self._create:
                        self._schema.create(connection)
                    self._look(connection)
                    self._schema.check_writers(connection)
                self._is_open = True

    def _open_to_read(self) -> None:
        """Look at the table, and change nothing in the database."""
        with self._opening:
            if not self._looked:
                with self._connect_or_say_why() as connection:
                    self._look(connection)

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        with self._gate.inside() if self._gate else nullcontext(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _connect_or_say_why(self) -> Iterator[Connection]:
        try:
            with self._connected() as connection:
                yield connection
        except exc.DBAPIError as error:
            if self._dialect.is_unreachable(error):
                raise NotApplied(f"{self!r}: {_words(error)}") from error
            raise SinkError(f"{self!r} can't be used: {_words(error)}") from error

    def _look(self, connection: Connection) -> None:
        self._schema.look(connection)
        self._table, self._keys, self._count = self._schema.table, self._schema.keys, self._schema.count
        self._writers = self._schema.writers
        self._plain = not self._composite and self._schema.columns[0].encode is None
        self._statements()
        self._looked = True

    def _statements(self) -> None:
        """Build the statements once; SQLAlchemy compiles each once and caches it."""
        writers = self._writers
        self._advance = (
            sa.update(writers)
            .where(writers.c.writer == sa.bindparam("w"), writers.c.seq < sa.bindparam("s"))
            .values(seq=sa.bindparam("s"), updated=self._dialect.utc_now())
        )
        if self._upserts:
            fixed = {"slot": sa.bindparam("slot", type_=sa.Integer)} if self._slots > 1 else {}
            self._add = self._dialect.upsert(self._table, self._keys, self._count, fixed)
        else:
            self._add = self._dialect.update(self._table, self._keys, self._count)

    def close(self) -> None:
        """Close the connections, unless the engine is the user's."""
        if self._own:
            self._engine.dispose()

    def before_fork(self) -> None:
        """With a SQLite file: wait until nobody is in it, and close the connections."""
        if self._gate is not None:
            self._gate.shut()
            self._engine.dispose()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        if self._gate is not None:
            self._gate.open()

    def after_fork(self) -> None:
        """Leave the parent's connections alone. See SQLAlchemy's "Using Connection Pools with Multiprocessing"."""
        self._opening = threading.Lock()
        self._gate = ForkGate() if self._gate is not None else None
        self._engine.dispose(close=False)

    # Keys

    def check_key(self, key: Any) -> None:
        """Raise `TypeError` for a key that the key columns can't hold as it is."""
        columns = self._schema.columns
        if not columns:  # not seen yet, the database can't be reached: `apply` will have to look
            self._unchecked = True
        elif not self._composite:
            columns[0].check(key)
        elif not isinstance(key, tuple) or len(key) != len(columns):
            raise TypeError(f"key {key!r:.100}: expected a tuple of {len(columns)} ({', '.join(self._key_names)})")
        else:
            for column, value in zip(columns, key, strict=True):
                column.check(value)

    def _rows(self, counts: Mapping[Any, int]) -> list[Row]:
        """Return a row for each key, its count last, in an order that all writers share."""
        if self._plain:  # by far the most common, and sorting bare strings is the fastest
            return [(key, counts[key]) for key in sorted(counts)]
        rows: list[Row] = [(*key, count) for key, count in counts.items()] if self._composite else list(counts.items())
        for number, column in enumerate(self._schema.columns):
            if column.encode is not None:
                rows = [(*row[:number], column.encode(row[number]), *row[number + 1 :]) for row in rows]
        rows.sort()
        return rows

    def _key_in(self, row: Row) -> Hashable:
        """Return the key that a row of ours stands for."""
        return self._key_of(column.restore(value) for column, value in zip(self._schema.columns, row, strict=False))

    # Writing: the flusher's thread

    def apply(self, batch: Batch) -> None:
        """Store the batch; see the top of this file for what each exception means."""
        self.open()
        if self._unchecked:
            unfit = self._unfit_keys(batch)
            if unfit and not self.applied(batch):
                raise Rejected.many(unfit)
        rows = self._rows(batch.counts)
        try:
            rejected = self._transact(batch, rows)
        except _DataProblem:
            rejected = self._transact(batch, rows, halving=True)
        if rejected:
            raise Rejected.many(rejected)

    def _unfit_keys(self, batch: Batch) -> dict[Hashable, str]:
        """Return the keys that came in before the table could be looked at, and should not have."""
        unfit: dict[Hashable, str] = {}
        for key in batch.counts:
            try:
                self.check_key(key)
            except TypeError as error:
                unfit[key] = str(error)
        return unfit

    def _transact(self, batch: Batch, rows: list[Row], *, halving: bool = False) -> dict[Hashable, str]:
        """Run the one transaction; return the keys that were rejected, and then nothing is stored."""
        committing = False
        try:
            with self._connected() as connection:
                if not self._is_new(connection, batch):
                    return {}
                rejected = (
                    self._add_by_halves(connection, batch, rows) if halving else self._add_all(connection, batch, rows)
                )
                if not rejected:
                    committing = True
                    connection.commit()
                return rejected
        except exc.DBAPIError as error:
            if committing and not self._dialect.is_surely_undone(error):
                raise
            if not committing and not halving and self._dialect.is_data_error(error):
                raise _DataProblem from error
            raise NotApplied(_words(error)) from error
        except exc.TimeoutError as error:  # no connection left in the pool
            raise NotApplied(_words(error)) from error
        except _UNSENDABLE as error:
            if committing or halving:
                raise
            raise _DataProblem from error

    def _is_new(self, connection: Connection, batch: Batch) -> bool:
        """Move the watermark; whether it moved. Locks the writer's row, so an earlier, unanswered try is over after this."""
        if _affected(connection, self._advance, {"w": batch.writer, "s": batch.seq}):
            return True
        row = {"writer": batch.writer, "seq": batch.seq, "updated": self._dialect.utc_now()}
        first = self._dialect.insert_if_absent(self._writers, row)
        return bool(_affected(connection, first, {}))

    def _add_all(self, connection: Connection, batch: Batch, rows: list[Row]) -> dict[Hashable, str]:
        parameters = self._dialect.parameters(rows)
        if self._slots > 1:
            parameters["slot"] = int(hashlib.sha256(batch.writer.encode()).hexdigest(), 16) % self._slots
        rowcount = _affected(connection, self._add, parameters)
        if self._dialect.changed(rowcount, rows):
            return {}
        if self._upserts:
            raise _DataProblem
        return self._missing(connection, rows, rowcount)

    def _missing(self, connection: Connection, rows: list[Row], rowcount: int) -> dict[Hashable, str]:
        """Which keys have no row, in update mode. The rest have been added to by now."""
        source = self._dialect.rows_source(self._keys)
        there = self._dialect.joined(self._keys, source)
        statement = sa.select(*(source.c[f"k{number}"] for number in range(len(self._keys)))).where(
            ~sa.exists().where(there).correlate(source)
        )
        found = {tuple(row) for row in connection.execute(statement, self._dialect.parameters(rows))}
        decoded = {self._key_of(row) for row in found}
        missing = [key for key in map(self._key_in, rows) if key in decoded]
        if rowcount + len(missing) < len(rows):
            raise _DataProblem
        if self._on_missing == "ignore":
            return {}
        return dict.fromkeys(missing, f"no row in table {self._table.fullname!r} (mode='update', on_missing='dead')")

    def _key_of(self, values: Iterable[Any]) -> Hashable:
        key = tuple(values)
        return key if self._composite else key[0]

    def _add_by_halves(self, connection: Connection, batch: Batch, rows: list[Row]) -> dict[Hashable, str]:
        try:
            with connection.begin_nested():
                return self._add_all(connection, batch, rows)
        except _DataProblem:
            reason = "the sum would pass 64 bits"
        except exc.DBAPIError as error:
            if error.connection_invalidated or not self._dialect.is_data_error(error):
                raise
            reason = _words(error)
        except _UNSENDABLE as error:
            reason = _words(error)
        if len(rows) == 1:
            return {self._key_in(rows[0]): reason}
        half = len(rows) // 2
        return self._add_by_halves(connection, batch, rows[:half]) | self._add_by_halves(connection, batch, rows[half:])

    # Reading: any thread

    def applied(self, batch: Batch) -> bool:
        """Whether the batch is stored, by its writer's watermark."""
        self._open_to_read()
        writers = self._writers
        with self._connected() as connection:
            seq = connection.execute(sa.select(writers.c.seq).where(writers.c.writer == batch.writer)).scalar()
        return seq is not None and batch.seq <= seq

    def totals(self, keys: Iterable[Hashable] | None = None) -> dict[Any, int]:
        """Return the stored counts of `keys` (None: of all); keys without a row are left out. One statement for 10,000."""
        self._open_to_read()
        total = sa.func.sum(self._count) if self._slots > 1 else self._count
        statement = sa.select(*self._keys, total)
        if self._slots > 1:
            statement = statement.group_by(*self._keys)
        with self._connected() as connection:
            if keys is None:
                return {self._key_of(row[:-1]): int(row[-1]) for row in connection.execute(statement)}
            source = self._dialect.rows_source(self._keys)
            statement = statement.join_from(self._table, source, self._dialect.joined(self._keys, source))
            found: dict[Any, int] = {}
            for chunk in _chunks(self._holdable(keys)):
                rows = self._rows(dict.fromkeys(chunk, 0))
                read = connection.execute(statement, self._dialect.parameters(rows))
                found |= {self._key_of(row[:-1]): int(row[-1]) for row in read}
            return found

    def _holdable(self, keys: Iterable[Hashable]) -> Iterator[Hashable]:
        """Leave out what the table can't hold: it has no row."""
        for key in keys:
            try:
                self.check_key(key)
            except TypeError:
                continue
            yield key

    def top(self, limit: int) -> list[tuple[Any, int]]:
        """Return the `limit` largest counts, largest first."""
        self._open_to_read()
        total = sa.func.sum(self._count)
        statement = sa.select(*self._keys, total).group_by(*self._keys).order_by(total.desc(), *self._keys).limit(limit)
        with self._connected() as connection:
            return [(self._key_of(row[:-1]), int(row[-1])) for row in connection.execute(statement)]

    def summary(self) -> tuple[int, int]:
        """Return the number of keys and the sum of their counts."""
        self._open_to_read()
        keys = sa.select(*self._keys, sa.func.sum(self._count).label("total")).group_by(*self._keys).subquery()
        with self._connected() as connection:
            row = connection.execute(
                sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(keys.c.total), 0)).select_from(keys)
            ).one()
        return int(row[0]), int(row[1])

    def prune(self, older_than: float) -> int:
        """Delete the watermarks of writers that stored nothing for `older_than` seconds; return how many.

        A writer that lives on is safe: its next batch makes its row anew, and is no repeat. What must not happen is a
        batch of unknown outcome that is stored, loses its watermark, and is offered again: so `older_than` must be
        longer than any process keeps a batch in flight (longest outage, or age of a journal). A day is a good minimum.
        The age is measured by the database's own clock.
        """
        writers = self._schema.writers
        with self._connect_or_say_why() as connection:
            self._schema.check_writers(connection)
            now = connection.execute(sa.select(self._dialect.utc_now())).scalar_one()
            old = writers.c.updated < now - timedelta(seconds=older_than)
            deleted = int(connection.execute(sa.delete(writers).where(old)).rowcount)
            connection.commit()
        return deleted


def _require(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SinkError(f"{name}={value!r}: expected {' or '.join(map(repr, choices))}")


def _affected(connection: Connection, statement: Executable, parameters: dict[str, Any]) -> int:
    """Execute, and return the number of rows that were inserted or updated; SQLAlchemy forgets it for inserts."""
    result = connection.execute(statement, parameters, execution_options={"preserve_rowcount": True})
    return int(result.rowcount)


def _chunks(keys: Iterable[Hashable]) -> Iterator[list[Hashable]]:
    chunk: list[Hashable] = []
    for key in keys:
        chunk.append(key)
        if len(chunk) == _READ_CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _words(error: Exception) -> str:
    """Return the database's own words, short and without the statement and its parameters."""
    cause = getattr(error, "orig", None) or error
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:500]
