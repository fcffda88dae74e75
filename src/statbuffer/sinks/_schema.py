"""The tables of a SQL sink: made where they are missing, looked at before anything is accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.schema import CreateTable

from statbuffer._errors import SinkError
from statbuffer.sinks._columns import KeyColumn

if TYPE_CHECKING:
    from sqlalchemy import Column, Connection, Table

    from statbuffer.sinks._dialects import SQLDialect

WRITERS: Final = "statbuffer_writers"
_CREATE_TRIES: Final = 5


class Schema:
    """What the user named, and what the database has under these names once `look` was called.

    `writers` has one row a writer, the watermark; it lies in the same schema as the table of counts, so that one
    transaction can hold both.
    """

    table: Table
    keys: list[Column[Any]]
    count: Column[Any]

    def __init__(
        self, dialect: SQLDialect, wanted: str | Table, *, keys: tuple[str, ...], count: str, slots: int, unique: bool
    ) -> None:
        self._dialect = dialect
        self._wanted = wanted
        self._key_names = keys
        self._count_name = count
        self._slots = slots
        self._unique = unique
        self.columns: list[KeyColumn] = []
        self.name: str = wanted if isinstance(wanted, str) else wanted.fullname
        self.writers = self._writers_table()

    def _named(self) -> tuple[str | None, str]:
        """Return schema and name of the table."""
        schema, _, name = self.name.rpartition(".")
        return schema or None, name

    def _writers_table(self) -> Table:
        return sa.Table(
            WRITERS,
            sa.MetaData(),
            sa.Column("writer", sa.String(64), primary_key=True),
            sa.Column("seq", sa.BigInteger, nullable=False),
            sa.Column("updated", sa.DateTime, nullable=False),
            schema=self._named()[0] if isinstance(self._wanted, str) else self._wanted.schema,
            **self._dialect.table_options(),
        )

    def create(self, connection: Connection) -> None:
        """Make the tables that are missing. Several processes may do this at once: IF NOT EXISTS, and PostgreSQL's catalog still wants a second try."""
        for table in (self._new_table(), self.writers):
            for _ in range(_CREATE_TRIES):
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
        if not isinstance(self._wanted, str):
            return self._wanted
        schema, name = self._named()
        keys = [self._dialect.text_column(column, len(self._key_names)) for column in self._key_names]
        slot = [sa.Column("slot", sa.Integer, primary_key=True, autoincrement=False)] * (self._slots > 1)
        count = sa.Column(self._count_name, sa.BigInteger, nullable=False)
        return sa.Table(name, sa.MetaData(), *keys, *slot, count, schema=schema, **self._dialect.table_options())

    def _find_table(self, connection: Connection) -> Table:
        if not isinstance(self._wanted, str):
            if not self._exists(connection, self._wanted):
                raise SinkError(f"table {self._wanted.fullname!r} does not exist; make it, or pass create=True")
            return self._wanted
        schema, name = self._named()
        try:
            return sa.Table(name, sa.MetaData(), schema=schema, autoload_with=connection)
        except exc.NoSuchTableError:
            raise SinkError(f"table {self._wanted!r} does not exist; make it, or pass create=True") from None

    def look(self, connection: Connection) -> None:
        """Find the table and its columns; raises `SinkError` for what would not keep counts as they are."""
        self.table = table = self._find_table(connection)
        there = sorted(table.c.keys())
        wanted = [*self._key_names, self._count_name, *(["slot"] if self._slots > 1 else [])]
        for name in wanted:
            if name not in table.c:
                raise SinkError(f"table {table.fullname!r} has no column {name!r}; it has {', '.join(there)}")
        self.keys = [table.c[name] for name in self._key_names]
        self.count = table.c[self._count_name]
        if not isinstance(self.count.type, sa.Integer):
            raise SinkError(
                f"count column {self._count_name!r} is of type {self.count.type!r}; it must be an integer, best BIGINT"
            )
        unique = set(self._key_names) | ({"slot"} if self._slots > 1 else set())
        if self._unique and unique not in _unique_sets(connection, table):
            columns = ", ".join(sorted(unique))
            raise SinkError(
                f"table {table.fullname!r} needs a primary key or unique constraint on ({columns}) for mode='upsert'"
            )
        problem = self._dialect.problem(connection, table, self.keys)
        if problem:
            raise SinkError(f"table {table.fullname!r}: {problem}")
        longest = self._dialect.longest_key_bytes
        self.columns = [KeyColumn(column, self._dialect.dialect, longest_bytes=longest) for column in self.keys]

    def check_writers(self, connection: Connection) -> None:
        """Raise `SinkError` if the watermarks have no table."""
        if not self._exists(connection, self.writers):
            raise SinkError(
                f"table {WRITERS!r}, which keeps batches from being stored twice, does not exist; pass create=True once, or run: "
                + str(CreateTable(self.writers).compile(connection)).strip()
            )


def _unique_sets(connection: Connection, table: Table) -> list[set[str]]:
    inspector = sa.inspect(connection)
    sets = [{column.name for column in table.primary_key.columns}]
    sets += [set(found["column_names"]) for found in inspector.get_unique_constraints(table.name, schema=table.schema)]
    for index in inspector.get_indexes(table.name, schema=table.schema):
        if index["unique"]:
            sets.append({name for name in index["column_names"] if name is not None})
    return sets
