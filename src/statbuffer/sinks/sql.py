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
from typing import TYPE_CHECKING, Any, Final, Literal

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.schema import CreateTable

from statbuffer._errors import MissingDriver, NotApplied, Rejected, SinkError
from statbuffer.sinks._columns import KeyColumn
from statbuffer.sinks._dialects import SQLDialect, dialect_for

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping

    from sqlalchemy import Column, Connection, Table
    from sqlalchemy.engine import URL, Engine
    from sqlalchemy.sql.base import Executable

    from statbuffer._batch import Batch

    Row = tuple[Any, ...]

WRITERS: Final = "statbuffer_writers"
_READ_CHUNK: Final = 10_000
_SILENCE: Final = 30
_DRIVERS: Final = {"postgresql": "psycopg", "mysql": "pymysql", "mariadb": "pymysql"}
_EXTRAS: Final = {"postgresql": "postgres", "mysql": "mysql", "mariadb": "mysql"}


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
        self._engine, self._own = _engine_of(url_or_engine)
        self._table_wanted = table
        self._key_names = (key,) if isinstance(key, str) else tuple(key)
        self._composite = not isinstance(key, str)
        self._count_name = count
        self._upserts = mode == "upsert" or on_missing == "insert"
        self._on_missing = on_missing
        self._create = create
        self._slots = slots
        self._dialect = dialect_for(self._engine) or _unknown(self._engine)
        self._opening = threading.Lock()
        self._is_open = False
        self._columns: list[KeyColumn] = []

    @property
    def url(self) -> URL:
        """The database's URL, with its password."""
        return self._engine.url

    @property
    def engine(self) -> Engine:
        """The SQLAlchemy engine."""
        return self._engine

    def __repr__(self) -> str:
        name = self._table_wanted if isinstance(self._table_wanted, str) else self._table_wanted.fullname
        return f"<SQLSink {self._engine.url.render_as_string(hide_password=True)} table {name!r}>"

    # Life

    def open(self) -> None:
        """Connect, make or look at the tables. Raises `SinkError` if that can't work, `NotApplied` if it can't just now."""
        with self._opening:
            if self._is_open:
                return
            try:
                with self._engine.connect() as connection:
                    self._prepare(connection)
            except exc.DBAPIError as error:
                if self._dialect.is_unreachable(error):
                    raise NotApplied(f"{self!r}: {_words(error)}") from error
                raise SinkError(f"{self!r} can't be used: {_words(error)}") from error
            self._is_open = True

    def _prepare(self, connection: Connection) -> None:
        self._writers = self._writers_table()
        if self._create:
            self._create_tables(connection)
        self._table = self._find_table(connection)
        self._find_columns(connection)
        self._statements()
        self._check_writers(connection)
        connection.rollback()

    def _writers_table(self) -> Table:
        schema = None if isinstance(self._table_wanted, str) else self._table_wanted.schema
        if isinstance(self._table_wanted, str) and "." in self._table_wanted:
            schema = self._table_wanted.rpartition(".")[0]
        return sa.Table(
            WRITERS,
            sa.MetaData(),
            sa.Column("writer", sa.String(64), primary_key=True),
            sa.Column("seq", sa.BigInteger, nullable=False),
            sa.Column("updated", sa.DateTime, nullable=False, server_default=sa.func.current_timestamp()),
            schema=schema,
            **self._dialect.table_options(),
        )

    def _create_tables(self, connection: Connection) -> None:
        """Several processes may do this at once: IF NOT EXISTS, and PostgreSQL's catalog still wants a second try."""
        for table in (self._new_table(), self._writers):
            for _ in range(5):
                try:
                    connection.execute(CreateTable(table, if_not_exists=True))
                    connection.commit()
                    break
                except exc.IntegrityError:
                    connection.rollback()
                except exc.DBAPIError as error:
                    connection.rollback()
                    if self._dialect.is_unreachable(error) or not self._exists(connection, table):
                        raise
                    break  # no right to create what is there already

    def _exists(self, connection: Connection, table: Table) -> bool:
        return sa.inspect(connection).has_table(table.name, schema=table.schema)

    def _new_table(self) -> Table:
        if not isinstance(self._table_wanted, str):
            return self._table_wanted
        schema, _, name = self._table_wanted.rpartition(".")
        keys = [self._dialect.text_column(column, len(self._key_names)) for column in self._key_names]
        slot = [sa.Column("slot", sa.Integer, primary_key=True, autoincrement=False)] * (self._slots > 1)
        count = sa.Column(self._count_name, sa.BigInteger, nullable=False)
        return sa.Table(
            name, sa.MetaData(), *keys, *slot, count, schema=schema or None, **self._dialect.table_options()
        )

    def _find_table(self, connection: Connection) -> Table:
        if not isinstance(self._table_wanted, str):
            if not self._exists(connection, self._table_wanted):
                raise SinkError(f"table {self._table_wanted.fullname!r} does not exist; make it, or pass create=True")
            return self._table_wanted
        schema, _, name = self._table_wanted.rpartition(".")
        try:
            return sa.Table(name, sa.MetaData(), schema=schema or None, autoload_with=connection)
        except exc.NoSuchTableError:
            raise SinkError(f"table {self._table_wanted!r} does not exist; make it, or pass create=True") from None

    def _find_columns(self, connection: Connection) -> None:
        table, there = self._table, sorted(self._table.c.keys())
        wanted = [*self._key_names, self._count_name, *(["slot"] if self._slots > 1 else [])]
        for name in wanted:
            if name not in table.c:
                raise SinkError(f"table {table.fullname!r} has no column {name!r}; it has {', '.join(there)}")
        self._keys: list[Column[Any]] = [table.c[name] for name in self._key_names]
        self._count: Column[Any] = table.c[self._count_name]
        if not isinstance(self._count.type, sa.Integer):
            raise SinkError(
                f"count column {self._count_name!r} is of type {self._count.type!r}; it must be an integer, best BIGINT"
            )
        unique = set(self._key_names) | ({"slot"} if self._slots > 1 else set())
        if self._upserts and unique not in _unique_sets(connection, table):
            columns = ", ".join(sorted(unique))
            raise SinkError(
                f"table {table.fullname!r} needs a primary key or unique constraint on ({columns}) for mode='upsert'"
            )
        problem = self._dialect.problem(connection, table, self._keys)
        if problem:
            raise SinkError(f"table {table.fullname!r}: {problem}")
        longest = self._dialect.longest_key_bytes
        self._columns = [KeyColumn(column, self._engine.dialect, longest_bytes=longest) for column in self._keys]

    def _check_writers(self, connection: Connection) -> None:
        if not self._exists(connection, self._writers):
            raise SinkError(
                f"table {WRITERS!r}, which keeps batches from being stored twice, does not exist; pass create=True once, or run: "
                + str(CreateTable(self._writers).compile(self._engine)).strip()
            )

    def _statements(self) -> None:
        """Build the statements once; SQLAlchemy compiles each once and caches it."""
        writers = self._writers
        self._advance = (
            sa.update(writers)
            .where(writers.c.writer == sa.bindparam("w"), writers.c.seq < sa.bindparam("s"))
            .values(seq=sa.bindparam("s"), updated=sa.func.current_timestamp())
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

    def after_fork(self) -> None:
        """Leave the parent's connections alone. See SQLAlchemy's "Using Connection Pools with Multiprocessing"."""
        self._opening = threading.Lock()
        self._engine.dispose(close=False)

    # Keys

    def check_key(self, key: Any) -> None:
        """Raise `TypeError` for a key that the key columns can't hold as it is."""
        if not self._composite:
            if self._columns:
                self._columns[0].check(key)
            return
        if not isinstance(key, tuple) or len(key) != len(self._key_names):
            raise TypeError(
                f"key {key!r:.100}: expected a tuple of {len(self._key_names)} ({', '.join(self._key_names)})"
            )
        for column, value in zip(self._columns, key, strict=False):
            column.check(value)

    def _rows(self, counts: Mapping[Hashable, int]) -> list[tuple[Hashable, Row]]:
        """Return pairs of key and row, in an order that all writers share."""
        encoders = [column.encode for column in self._columns]
        rows: list[tuple[Hashable, Row]] = []
        for key, count in counts.items():
            values: tuple[Any, ...] = key if self._composite else (key,)  # type: ignore[assignment]
            encoded = (
                value if encode is None else encode(value) for encode, value in zip(encoders, values, strict=True)
            )
            rows.append((key, (*encoded, count)))
        rows.sort(key=lambda pair: pair[1][:-1])
        return rows

    # Writing: the flusher's thread

    def apply(self, batch: Batch) -> None:
        """Store the batch; see the top of this file for what each exception means."""
        self.open()
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
        """Keys that came in before the table could be looked at."""
        unfit: dict[Hashable, str] = {}
        for key in batch.counts:
            try:
                self.check_key(key)
            except TypeError as error:
                unfit[key] = str(error)
        return unfit

    def _transact(
        self, batch: Batch, rows: list[tuple[Hashable, Row]], *, halving: bool = False
    ) -> dict[Hashable, str]:
        """Run the one transaction; return the keys that were rejected, and then nothing is stored."""
        committing = False
        try:
            with self._engine.connect() as connection:
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
        except exc.SQLAlchemyError as error:  # no connection left in the pool, and the like: before anything was sent
            if committing:
                raise
            raise NotApplied(_words(error)) from error

    def _is_new(self, connection: Connection, batch: Batch) -> bool:
        """Move the watermark; whether it moved. Locks the writer's row, so an earlier, unanswered try is over after this."""
        if _affected(connection, self._advance, {"w": batch.writer, "s": batch.seq}):
            return True
        first = self._dialect.insert_if_absent(self._writers, {"writer": batch.writer, "seq": batch.seq})
        return bool(_affected(connection, first, {}))

    def _add_all(self, connection: Connection, batch: Batch, rows: list[tuple[Hashable, Row]]) -> dict[Hashable, str]:
        parameters = self._dialect.parameters([row for _, row in rows])
        if self._slots > 1:
            parameters["slot"] = int(hashlib.sha256(batch.writer.encode()).hexdigest(), 16) % self._slots
        rowcount = _affected(connection, self._add, parameters)
        if self._dialect.changed(rowcount, [row for _, row in rows]):
            return {}
        if self._upserts:
            raise _DataProblem
        return self._missing(connection, rows, rowcount)

    def _missing(self, connection: Connection, rows: list[tuple[Hashable, Row]], rowcount: int) -> dict[Hashable, str]:
        """Which keys have no row, in update mode. The rest have been added to by now."""
        source = self._dialect.rows_source(self._keys)
        there = self._dialect.joined(self._keys, source)
        statement = sa.select(*(source.c[f"k{number}"] for number in range(len(self._keys)))).where(
            ~sa.exists().where(there).correlate(source)
        )
        found = {
            tuple(row) for row in connection.execute(statement, self._dialect.parameters([row for _, row in rows]))
        }
        decoded = {self._key_of(row) for row in found}
        missing = [key for key, _ in rows if key in decoded]
        if rowcount + len(missing) < len(rows):
            raise _DataProblem
        if self._on_missing == "ignore":
            return {}
        return dict.fromkeys(missing, f"no row in table {self._table.fullname!r} (mode='update', on_missing='dead')")

    def _key_of(self, values: Iterable[Any]) -> Hashable:
        key = tuple(values)
        return key if self._composite else key[0]

    def _add_by_halves(
        self, connection: Connection, batch: Batch, rows: list[tuple[Hashable, Row]]
    ) -> dict[Hashable, str]:
        try:
            with connection.begin_nested():
                return self._add_all(connection, batch, rows)
        except _DataProblem:
            reason = "the sum would pass 64 bits"
        except exc.DBAPIError as error:
            if error.connection_invalidated or not self._dialect.is_data_error(error):
                raise
            reason = _words(error)
        if len(rows) == 1:
            return {rows[0][0]: reason}
        half = len(rows) // 2
        return self._add_by_halves(connection, batch, rows[:half]) | self._add_by_halves(connection, batch, rows[half:])

    # Reading: any thread

    def applied(self, batch: Batch) -> bool:
        """Whether the batch is stored, by its writer's watermark."""
        self.open()
        writers = self._writers
        with self._engine.connect() as connection:
            seq = connection.execute(sa.select(writers.c.seq).where(writers.c.writer == batch.writer)).scalar()
        return seq is not None and batch.seq <= seq

    def totals(self, keys: Iterable[Hashable] | None = None) -> dict[Any, int]:
        """Return the stored counts of `keys` (None: of all); keys without a row are left out. One statement for 10,000."""
        self.open()
        total = sa.func.sum(self._count) if self._slots > 1 else self._count
        statement = sa.select(*self._keys, total)
        if self._slots > 1:
            statement = statement.group_by(*self._keys)
        with self._engine.connect() as connection:
            if keys is None:
                return {self._key_of(row[:-1]): int(row[-1]) for row in connection.execute(statement)}
            source = self._dialect.rows_source(self._keys)
            statement = statement.join_from(self._table, source, self._dialect.joined(self._keys, source))
            found: dict[Any, int] = {}
            for chunk in _chunks(self._holdable(keys)):
                rows = [row for _, row in self._rows(dict.fromkeys(chunk, 0))]
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
        self.open()
        total = sa.func.sum(self._count)
        statement = sa.select(*self._keys, total).group_by(*self._keys).order_by(total.desc(), *self._keys).limit(limit)
        with self._engine.connect() as connection:
            return [(self._key_of(row[:-1]), int(row[-1])) for row in connection.execute(statement)]

    def summary(self) -> tuple[int, int]:
        """Return the number of keys and the sum of their counts."""
        self.open()
        keys = sa.select(*self._keys, sa.func.sum(self._count).label("total")).group_by(*self._keys).subquery()
        with self._engine.connect() as connection:
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
        self.open()
        now = sa.func.current_timestamp(type_=sa.DateTime)
        writers = self._writers
        with self._engine.begin() as connection:
            current = connection.execute(sa.select(now)).scalar_one().replace(tzinfo=None)
            ages = connection.execute(sa.select(writers.c.writer, writers.c.updated, writers.c.seq)).all()
            old = [(row.writer, row.seq) for row in ages if (current - row.updated).total_seconds() > older_than]
            deleted = 0
            for writer, seq in old:  # by seq too: it may have come back to life since
                deleted += connection.execute(
                    sa.delete(writers).where(writers.c.writer == writer, writers.c.seq == seq)
                ).rowcount
        return deleted


def _require(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SinkError(f"{name}={value!r}: expected {' or '.join(map(repr, choices))}")


def _engine_of(url_or_engine: str | URL | Engine) -> tuple[Engine, bool]:
    """Return the engine, and whether it is ours to close."""
    if isinstance(url_or_engine, sa.Engine):
        return url_or_engine, False
    try:
        url = sa.make_url(url_or_engine)
    except exc.ArgumentError as error:
        raise SinkError(
            f"not a database URL, expected one like 'sqlite:///views.db' or 'postgresql://user@host/db': {error}"
        ) from None
    family = url.get_backend_name()
    if url.drivername == family and family in _DRIVERS:
        url = url.set(drivername=f"{family}+{_DRIVERS[family]}")
    try:
        engine = sa.create_engine(url, **_engine_options(url))
    except exc.NoSuchModuleError:
        raise _unknown_name(url.drivername) from None
    except ModuleNotFoundError as error:
        raise MissingDriver(error.name or url.drivername, _EXTRAS.get(family, "all")) from error
    except (exc.ArgumentError, TypeError, ValueError) as error:
        raise SinkError(f"{url.render_as_string(hide_password=True)} can't be used: {error}") from error
    if family == "postgresql":
        sa.event.listen(engine, "connect", _set_timeouts)
    return engine, True


def _engine_options(url: URL) -> dict[str, Any]:
    """How our own engines meet a network that fell silent; a user's engine, and what the URL says, stay as they are.

    A connection that dies without a word leaves a transaction in the server that holds the writer's row: the server ends
    it after `_SILENCE` seconds, and nobody waits longer for an answer or a lock.
    """
    family = url.get_backend_name()
    if family == "postgresql":
        arguments: dict[str, Any] = {
            "connect_timeout": 10,
            "keepalives_idle": _SILENCE,
            "keepalives_interval": 10,
            "keepalives_count": 3,
        }
        options: dict[str, Any] = {}
    elif family in {"mysql", "mariadb"}:
        arguments = {"connect_timeout": 10, "read_timeout": 2 * _SILENCE, "write_timeout": 2 * _SILENCE}
        arguments["init_command"] = f"SET SESSION wait_timeout = {2 * _SILENCE}, innodb_lock_wait_timeout = {_SILENCE}"
        options = {"pool_recycle": _SILENCE}  # younger than the server's wait_timeout
        options["isolation_level"] = "READ COMMITTED"  # gap locks make upserts of new keys deadlock
    else:
        return {}
    return options | {"connect_args": {name: value for name, value in arguments.items() if name not in url.query}}


def _set_timeouts(connection: Any, _record: object) -> None:
    """Tell a new PostgreSQL session; as a startup parameter, a pooler in between might refuse it."""
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = '{_SILENCE}s'")
        cursor.execute(f"SET idle_in_transaction_session_timeout = '{_SILENCE}s'")
    connection.commit()


def _unknown(engine: Engine) -> SQLDialect:
    raise _unknown_name(engine.dialect.name)


def _unknown_name(name: str) -> SinkError:
    return SinkError(f"database {name!r} is not supported: expected sqlite, postgresql, mysql or mariadb")


def _unique_sets(connection: Connection, table: Table) -> list[set[str]]:
    inspector = sa.inspect(connection)
    sets = [{column.name for column in table.primary_key.columns}]
    sets += [set(found["column_names"]) for found in inspector.get_unique_constraints(table.name, schema=table.schema)]
    for index in inspector.get_indexes(table.name, schema=table.schema):
        if index["unique"]:
            sets.append({name for name in index["column_names"] if name is not None})
    return sets


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
