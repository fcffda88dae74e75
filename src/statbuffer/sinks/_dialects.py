"""What differs between databases, one class each: how rows travel, how they are added, and what a failure means.

A batch reaches the database as one statement with one or two parameters, whatever its size: the driver holds the GIL
once, and the server parses once. Rows come sorted, so that two writers lock common rows in the same order.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.dialects import mysql, postgresql, sqlite

from statbuffer.sinks._engines import unknown_database

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from sqlalchemy import Column, Connection, Dialect, Table
    from sqlalchemy.engine import Engine
    from sqlalchemy.sql.base import Executable

    Rows = list[tuple[Any, ...]]


class SQLDialect:
    """The common part: every statement in SQLAlchemy Core, the rows as one subquery `batch(k0, k1, ..., n)`."""

    name = ""
    longest_key_bytes: int | None = None
    """Text longer than this can never be stored in a key."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect

    # The table

    def text_column(self, name: str, key_columns: int) -> Column[Any]:  # noqa: ARG002  # MySQL's indexes are short
        """Return a key column for text that keeps any two different keys different."""
        return sa.Column(name, sa.Text(), primary_key=True, nullable=False)

    def table_options(self) -> dict[str, Any]:
        """Return keyword arguments for a table that we create."""
        return {}

    def problem(self, _connection: Connection, _table: Table, _keys: Sequence[Column[Any]], /) -> str | None:
        """Say what makes an existing table unfit, or None."""
        return None

    # The statements

    def parameters(self, rows: Rows) -> dict[str, Any]:
        """Return the parameters of `rows_source`."""
        return {"rows": json.dumps(rows, ensure_ascii=False, default=str)}

    def rows_source(self, keys: Sequence[Column[Any]]) -> sa.Subquery:
        """Return the subquery that has the rows."""
        raise NotImplementedError

    def upsert(
        self, table: Table, keys: Sequence[Column[Any]], count: Column[Any], fixed: dict[str, Any]
    ) -> Executable:
        """Return the statement that adds all rows, and makes those that are missing."""
        raise NotImplementedError

    def update(self, table: Table, keys: Sequence[Column[Any]], count: Column[Any]) -> Executable:
        """Return the statement that adds the rows whose keys are there."""
        rows = self.rows_source(keys)
        return sa.update(table).values({count: count + rows.c.n}).where(self.joined(keys, rows))

    def joined(self, keys: Sequence[Column[Any]], rows: sa.Subquery) -> sa.ColumnElement[bool]:
        return sa.and_(*(column == rows.c[f"k{number}"] for number, column in enumerate(keys)))

    def insert_if_absent(self, table: Table, values: dict[str, Any]) -> Executable:
        """Return an insert that does nothing where the primary key is there."""
        raise NotImplementedError

    def changed(self, rowcount: int, rows: Rows) -> bool:
        """Whether an upsert of `rows` that reports `rowcount` has added every one of them."""
        return rowcount == len(rows)

    def utc_now(self) -> sa.ColumnElement[datetime]:
        """Return the database's own clock, whatever the session's time zone."""
        return sa.func.current_timestamp(type_=sa.DateTime)

    # What a failure means

    def is_data_error(self, error: exc.DBAPIError) -> bool:
        """Whether the data is at fault, so that the same rows fail again and fewer of them may not."""
        return isinstance(error, (exc.IntegrityError, exc.DataError))

    def is_unreachable(self, error: exc.DBAPIError) -> bool:
        """Whether a failed connect may succeed later: down, starting, full; as against wrong password or database."""
        raise NotImplementedError

    def is_surely_undone(self, _error: Exception, /) -> bool:
        """Whether an error at COMMIT says for sure that nothing was committed."""
        return False


class SQLite(SQLDialect):
    """Source: https://www.sqlite.org/rescode.html, https://www.sqlite.org/lang_upsert.html, https://www.sqlite.org/json1.html.

    An integer sum past 64 bits silently becomes a REAL; the statements leave such rows out and their number tells.
    """

    name = "sqlite"

    def table_options(self) -> dict[str, Any]:
        return {"sqlite_with_rowid": False}  # the key is the table: half the pages to write

    def problem(self, connection: Connection, table: Table, keys: Sequence[Column[Any]], /) -> str | None:
        found = connection.execute(
            sa.text(
                "SELECT columns.name, columns.coll FROM pragma_index_list(:table) AS indexes, "
                "pragma_index_xinfo(indexes.name) AS columns WHERE columns.key AND columns.coll <> 'BINARY' COLLATE NOCASE"
            ),
            {"table": table.name},
        )
        lossy = {row.name: row.coll for row in found}
        for column in keys:
            if column.name in lossy:
                return f"column {column.name!r} has the collation {lossy[column.name]}, which merges different keys; use BINARY"
        return None

    def rows_source(self, keys: Sequence[Column[Any]]) -> sa.Subquery:
        rows = sa.func.json_each(sa.bindparam("rows", type_=sa.Text)).table_valued("value")
        columns = [
            sa.func.json_extract(rows.c.value, f"$[{number}]", type_=column.type).label(f"k{number}")
            for number, column in enumerate(keys)
        ]
        n = sa.func.json_extract(rows.c.value, f"$[{len(keys)}]", type_=sa.BigInteger).label("n")
        return sa.select(*columns, n).select_from(rows).subquery("batch")

    def upsert(
        self, table: Table, keys: Sequence[Column[Any]], count: Column[Any], fixed: dict[str, Any]
    ) -> Executable:
        rows = self.rows_source(keys)
        names = [*(column.name for column in keys), count.name, *fixed]
        source = sa.select(*rows.c, *fixed.values()).where(sa.text("true"))
        insert = sqlite.insert(table).from_select(names, source)
        total = count + insert.excluded[count.name]
        return insert.on_conflict_do_update(
            index_elements=[*keys, *(table.c[name] for name in fixed)],
            set_={count: total},
            where=sa.func.typeof(total) == "integer",
        )

    def update(self, table: Table, keys: Sequence[Column[Any]], count: Column[Any]) -> Executable:
        rows = self.rows_source(keys)
        total = count + rows.c.n
        return (
            sa.update(table).values({count: total}).where(self.joined(keys, rows), sa.func.typeof(total) == "integer")
        )

    def insert_if_absent(self, table: Table, values: dict[str, Any]) -> Executable:
        return sqlite.insert(table).values(values).on_conflict_do_nothing()

    def is_data_error(self, error: exc.DBAPIError) -> bool:
        return super().is_data_error(error) or "too big" in str(error.orig)

    def is_unreachable(self, error: exc.DBAPIError) -> bool:
        return "locked" in str(error.orig)

    def is_surely_undone(self, error: Exception, /) -> bool:
        return "locked" in str(error)  # SQLITE_BUSY: the transaction is still open, and is rolled back next


class PostgreSQL(SQLDialect):
    """Source: https://www.postgresql.org/docs/current/errcodes-appendix.html.

    Class 22 (data exception) and 23 (constraint) are the data's fault, and 54000 (an index row too large). All else
    before COMMIT (40001, 40P01, 55P03, 57P01-3, 53xxx, 08xxx, 25006 ...) stored nothing: the transaction is gone.
    """

    name = "postgresql"

    def problem(self, connection: Connection, table: Table, keys: Sequence[Column[Any]], /) -> str | None:
        found = connection.execute(
            sa.text(
                "SELECT a.attname, c.collname FROM pg_attribute a JOIN pg_collation c ON c.oid = a.attcollation "
                "WHERE a.attrelid = to_regclass(:table) AND NOT c.collisdeterministic"
            ),
            {"table": self.dialect.identifier_preparer.format_table(table)},
        )
        lossy = {row.attname: row.collname for row in found}
        for column in keys:
            if column.name in lossy:
                return f"column {column.name!r} has the nondeterministic collation {lossy[column.name]}, which merges different keys"
        return None

    def utc_now(self) -> sa.ColumnElement[datetime]:
        return sa.func.timezone("UTC", sa.func.now(), type_=sa.DateTime)

    def parameters(self, rows: Rows) -> dict[str, Any]:
        names = [*(f"k{number}" for number in range(len(rows[0]) - 1)), "n"]
        return {name: [row[place] for row in rows] for place, name in enumerate(names)}

    def rows_source(self, keys: Sequence[Column[Any]]) -> sa.Subquery:
        names = [*(f"k{number}" for number in range(len(keys))), "n"]
        kinds = [*(column.type for column in keys), sa.BigInteger()]
        arrays = [sa.bindparam(name, type_=postgresql.ARRAY(kind)) for name, kind in zip(names, kinds, strict=True)]
        columns = [sa.column(name, kind) for name, kind in zip(names, kinds, strict=True)]
        rows = sa.func.unnest(*arrays).table_valued(*columns).render_derived(name="rows")
        return sa.select(*(rows.c[name] for name in names)).subquery("batch")

    def upsert(
        self, table: Table, keys: Sequence[Column[Any]], count: Column[Any], fixed: dict[str, Any]
    ) -> Executable:
        rows = self.rows_source(keys)
        names = [*(column.name for column in keys), count.name, *fixed]
        source = sa.select(*rows.c, *fixed.values())
        insert = postgresql.insert(table).from_select(names, source)
        return insert.on_conflict_do_update(
            index_elements=[*keys, *(table.c[name] for name in fixed)],
            set_={count: count + insert.excluded[count.name]},
        )

    def update(self, table: Table, keys: Sequence[Column[Any]], count: Column[Any]) -> Executable:
        """A join may visit rows in any order: they are locked in the batch's order first."""
        rows = self.rows_source(keys)
        locked = (
            sa.select(*(column.label(f"k{number}") for number, column in enumerate(keys)), rows.c.n)
            .where(self.joined(keys, rows))
            .order_by(*keys)
            .with_for_update(of=table)
            .cte("locked")
        )
        joined = sa.and_(*(column == locked.c[f"k{number}"] for number, column in enumerate(keys)))
        return sa.update(table).values({count: count + locked.c.n}).where(joined)

    def insert_if_absent(self, table: Table, values: dict[str, Any]) -> Executable:
        return postgresql.insert(table).values(values).on_conflict_do_nothing()

    def is_data_error(self, error: exc.DBAPIError) -> bool:
        state = getattr(error.orig, "sqlstate", None) or ""
        return state.startswith(("22", "23")) or state == "54000" or (not state and isinstance(error, exc.DataError))

    def is_unreachable(self, error: exc.DBAPIError) -> bool:
        """Psycopg gives no SQLSTATE for a failed connect, only libpq's and the server's words."""
        words = str(error.orig).lower()
        return any(word in words for word in _PG_UNREACHABLE)


_PG_UNREACHABLE = (
    "refused", "timeout", "timed out", "starting up", "shutting down", "in recovery", "too many", "remaining connection slots",
    "closed the connection", "closed unexpectedly", "connection reset", "network is unreachable", "no route to host",
)  # fmt: skip


class MySQL(SQLDialect):
    """MySQL 8 and MariaDB 10.6+. Source: https://mariadb.com/kb/en/mariadb-error-code-reference/ and MySQL's.

    `_bin` collations but the newest pad with spaces, so that 'a' and 'a ' are one key: created tables use a NO PAD one.
    """

    name = "mysql"
    longest_key_bytes = 3072
    _DATA_ERRORS = frozenset(
        {1048, 1062, 1264, 1265, 1292, 1366, 1406, 1411, 1451, 1452, 1690, 3140, 3819, 4025, 1263, 1364}
    )
    _TOO_LARGE = frozenset({1153})  # max_allowed_packet: half of the rows may fit
    _UNREACHABLE = frozenset({1040, 1053, 1077, 1079, 1203, 1226, 2002, 2006, 2013, 2055})

    @property
    def _is_mariadb(self) -> bool:
        return bool(getattr(self.dialect, "is_mariadb", False))

    @property
    def _collation(self) -> str:
        return "utf8mb4_nopad_bin" if self._is_mariadb else "utf8mb4_0900_bin"

    def text_column(self, name: str, key_columns: int) -> Column[Any]:
        length = (self.longest_key_bytes - 8) // 4 // key_columns
        kind = mysql.VARCHAR(length, charset="utf8mb4", collation=self._collation)
        return sa.Column(name, kind, primary_key=True, nullable=False)

    def table_options(self) -> dict[str, Any]:
        return {"mysql_engine": "InnoDB", "mariadb_engine": "InnoDB"}

    def problem(self, connection: Connection, table: Table, keys: Sequence[Column[Any]], /) -> str | None:
        mode = connection.exec_driver_sql("SELECT @@SESSION.sql_mode").scalar_one()
        if "STRICT_" not in mode:
            return f"sql_mode {mode!r} cuts what does not fit instead of refusing it; add STRICT_ALL_TABLES"
        tables = sa.table(
            "tables", *map(sa.column, ("table_schema", "table_name", "engine")), schema="information_schema"
        )
        here = (tables.c.table_name == table.name, tables.c.table_schema == (table.schema or sa.func.database()))
        engine = connection.execute(sa.select(tables.c.engine).where(*here)).scalar()
        if engine != "InnoDB":
            return f"the table's engine is {engine}, which has no transactions; use InnoDB"
        names = ("table_schema", "table_name", "column_name", "collation_name")
        columns = sa.table("columns", *map(sa.column, names), schema="information_schema")
        here = (columns.c.table_name == table.name, columns.c.table_schema == (table.schema or sa.func.database()))
        found = connection.execute(sa.select(columns.c.column_name, columns.c.collation_name).where(*here))
        collations = {row[0]: row[1] for row in found}
        for column in keys:
            if not isinstance(column.type, sa.String):
                continue  # a UUID may be kept as text, always in one case
            collation = collations.get(column.name)
            if collation not in {None, "binary", "utf8mb4_nopad_bin", "utf8mb4_0900_bin"}:
                return f"column {column.name!r} has the collation {collation}, which merges different keys; use {self._collation}"
        return None

    def rows_source(self, keys: Sequence[Column[Any]]) -> sa.Subquery:
        columns = ", ".join(
            [*(f"k{number} {self._json_type(column)} PATH '$[{number}]'" for number, column in enumerate(keys))]
        )
        text = sa.text(
            f"SELECT * FROM JSON_TABLE(:rows, '$[*]' COLUMNS ({columns}, n BIGINT PATH '$[{len(keys)}]')) AS source"  # noqa: S608  # types and numbers only
        )
        names = [
            *(sa.column(f"k{number}", column.type) for number, column in enumerate(keys)),
            sa.column("n", sa.BigInteger),
        ]
        return text.columns(*names).subquery("batch")

    def _json_type(self, column: Column[Any]) -> str:
        if isinstance(column.type, sa.String):
            return f"LONGTEXT CHARACTER SET utf8mb4 COLLATE {self._collation}"
        if isinstance(column.type, sa.Integer):
            return "BIGINT"
        return "VARCHAR(64) CHARACTER SET utf8mb4"

    def upsert(
        self, table: Table, keys: Sequence[Column[Any]], count: Column[Any], fixed: dict[str, Any]
    ) -> Executable:
        rows = self.rows_source(keys)
        names = [*(column.name for column in keys), count.name, *fixed]
        insert = mysql.insert(table).from_select(names, sa.select(*rows.c, *fixed.values()))
        return insert.on_duplicate_key_update({count.name: count + rows.c.n})

    def insert_if_absent(self, table: Table, values: dict[str, Any]) -> Executable:
        return sa.insert(table).prefix_with("IGNORE").values(values)

    def utc_now(self) -> sa.ColumnElement[datetime]:
        return sa.func.utc_timestamp(type_=sa.DateTime)

    def changed(self, rowcount: int, rows: Rows) -> bool:
        return rowcount >= len(rows)  # 1 for an insert, 2 for an update

    def is_data_error(self, error: exc.DBAPIError) -> bool:
        code = error.orig.args[0] if error.orig is not None and error.orig.args else None
        return code in self._DATA_ERRORS or code in self._TOO_LARGE

    def is_unreachable(self, error: exc.DBAPIError) -> bool:
        code = error.orig.args[0] if error.orig is not None and error.orig.args else None
        unknown_host = "Name or service not known" in str(error.orig) or "nodename nor servname" in str(error.orig)
        return code in self._UNREACHABLE or (code == 2003 and not unknown_host)  # noqa: PLR2004  # can't connect


def dialect_for(engine: Engine) -> SQLDialect:
    """Return what we know of the engine's database; `SinkError` if that is nothing."""
    known: dict[str, type[SQLDialect]] = {"sqlite": SQLite, "postgresql": PostgreSQL, "mysql": MySQL, "mariadb": MySQL}
    if engine.dialect.name not in known:
        raise unknown_database(engine.dialect.name)
    return known[engine.dialect.name](engine.dialect)
