"""The SQL sink on real SQLite, PostgreSQL and MariaDB: one suite, three databases."""

from __future__ import annotations

import datetime as dt
import itertools
import math
import multiprocessing
import os
import threading
import uuid
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event

from statbuffer import Batch, MissingDriver, NotApplied, Rejected, SinkError, SQLSink, StatBuffer
from statbuffer.sinks import from_url
from statbuffer.testing import Fault, FaultySink, check_sink

ALL = ["sqlite", "postgresql", "mariadb"]
numbers = itertools.count(1)


class Database:
    """One of the three, and a fresh table name at each asking."""

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.url = url
        self.opened: list[SQLSink] = []

    def table(self) -> str:
        return f"counters_{next(numbers)}"

    def sink(self, table: Any = None, **options: Any) -> SQLSink:
        sink = SQLSink(options.pop("url", self.url), table=self.table() if table is None else table, **options)
        self.opened.append(sink)
        return sink

    def execute(self, *statements: str) -> list[Any]:
        engine = sa.create_engine(self.url)
        try:
            with engine.begin() as connection:
                for statement in statements:
                    result = connection.exec_driver_sql(statement)
                return list(result.fetchall()) if result.returns_rows else []
        finally:
            engine.dispose()


@pytest.fixture(params=ALL)
def db(request, tmp_path):
    if request.param == "sqlite":
        database = Database("sqlite", f"sqlite:///{tmp_path}/test.db")
    else:
        database = Database(request.param, request.getfixturevalue(request.param).url())
    yield database
    for sink in database.opened:
        sink.close()


def batch(seq: int, counts: dict[Any, int], writer: str = "w") -> Batch:
    return Batch(f"{writer}-{next(numbers)}" if writer == "fresh" else writer, seq, counts)


def statements(sink: SQLSink) -> list[str]:
    """Every statement that the sink sends from now on, COMMIT too."""
    seen: list[str] = []
    event.listen(sink.engine, "before_cursor_execute", lambda *args: seen.append(args[2]))
    event.listen(sink.engine, "commit", lambda _connection: seen.append("COMMIT"))
    return seen


# The contract


def test_it_meets_the_contract_of_an_exact_sink(db):
    assert len(check_sink(db.sink)) == 6


def test_it_meets_the_contract_with_composite_keys_and_slots(db):
    assert len(check_sink(lambda: db.sink(key=("tenant", "page")), key=lambda n: (f"t{n % 7}", f"p{n}"))) == 6
    assert len(check_sink(lambda: db.sink(slots=4))) == 6


def test_a_batch_is_one_statement_in_one_transaction(db):
    sink = db.sink()
    sink.open()
    sink.apply(batch(1, {"a": 1}))
    seen = statements(sink)
    sink.apply(batch(2, {f"key-{number}": 1 for number in range(2_500)}))
    assert len(seen) == 3, seen
    assert "statbuffer_writers" in seen[0]
    assert seen[2] == "COMMIT"
    del seen[:]
    sink.apply(batch(2, {"never": 1}))  # a repeat costs the watermark's look-up, and stores nothing
    assert "COMMIT" not in seen
    assert sink.totals(["never"]) == {}


def test_a_thousand_seeds_of_faults_through_a_buffer_are_exact(db, clock):
    seeds = range(1_000) if db.name == "sqlite" else range(60)
    sink = db.sink()
    if db.name == "sqlite":  # no power is cut here: don't wait for the disk 4,000 times
        event.listen(sink.engine, "connect", lambda connection, _record: connection.execute("PRAGMA synchronous = OFF"))
    sink.open()
    expected = 0
    for seed in seeds:
        with StatBuffer(FaultySink(sink, seed=seed), clock=clock, interval=1.0, backoff=0.1, shutdown=None) as views:
            for number in range(4):
                views.increment(f"key-{number % 3}", number + 1)
                clock.advance(0.7)
        expected += 10
        assert views.stats().stored == 10, f"seed {seed}"
        sink.open()
    assert sum(sink.totals().values()) == expected


def test_total_counts_a_batch_of_unknown_outcome_once(db, clock):
    for fault in (Fault.LOSE_ANSWER, Fault.LOSE_REQUEST):
        views = StatBuffer(FaultySink(db.sink(), [fault]), clock=clock, interval=1.0, backoff=9.0).start()
        views.increment("a", 5)
        clock.advance(1.1)
        views.increment("a", 2)
        assert views.stats().in_flight == 5
        assert views.total("a") == 7
        assert views.stop(None).complete


# Names and keys


HOSTILE_NAMES = [
    'quo"te',
    "semi; DROP TABLE x",
    "back`tick",
    "per%cent",
    "co:lon",
    "Ünï cødé",
    "select",
    "it's",
    "%(x)s",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_are_quoted(db, name):
    table = f"{name} {next(numbers)}"
    sink = db.sink(table, key=(f"{name} k", "b"), count=f"{name} n")
    if db.name == "mariadb" and "`" in name:  # SQLAlchemy can't reflect such columns there
        with pytest.raises(SinkError, match="has no column"):
            sink.open()
        return
    sink.apply(batch(1, {("x", "y"): 3}, "fresh"))
    sink.apply(batch(2, {("x", "y"): 4}, "fresh"))
    assert sink.totals([("x", "y")]) == {("x", "y"): 7}
    assert sa.inspect(sink.engine).has_table(table)


FAMILIES = [
    ["a", "A", "á", "ä", "a ", "a  ", " a", "\uff41", "\u00aa"],
    ["é", "e\u0301", "É", "E\u0301"],
    ["ß", "ss", "SS", "ẞ"],
    ["\u0131", "i", "I", "\u0130"],
    ["1", "01", "1.0", "1e0", "true", "null", "", " ", "\t", "\n"],
    ["'", '"', "\\", "\\\\", "\\'", "'; DROP TABLE counters; --", "%s", ":a", "{}", "$1", "?"],
    ["😀", "👩‍👩‍👧", "\U0010ffff", "\ufffd", "\u200b", "\u2028", "\x7f", "\x01"],
]


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_look_alike_stay_different(db, family):
    sink = db.sink()
    sink.open()
    for key in family:
        sink.check_key(key)
    sink.apply(batch(1, {key: 10**number for number, key in enumerate(family)}, "fresh"))
    assert sink.totals(family) == {key: 10**number for number, key in enumerate(family)}
    assert dict(sink.top(100)) == {key: 10**number for number, key in enumerate(family)}


def test_any_text_is_stored_faithfully_or_refused(db):
    sink = db.sink()
    sink.open()
    expected: dict[str, int] = {}
    writer = f"w-{next(numbers)}"
    seq = itertools.count(1)

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.dictionaries(
            st.text(alphabet=st.characters(), max_size=30), st.integers(-(2**40), 2**40), min_size=1, max_size=8
        )
    )
    def check(counts):
        holdable = {}
        for key, count in counts.items():
            try:
                sink.check_key(key)
            except TypeError:
                assert "\0" in key or any("\ud800" <= char <= "\udfff" for char in key)
            else:
                holdable[key] = count
        if not holdable:
            return
        sink.apply(Batch(writer, next(seq), holdable))
        for key, count in holdable.items():
            expected[key] = expected.get(key, 0) + count
        assert sink.totals(holdable) == {key: expected[key] for key in holdable}

    check()
    assert sink.totals() == expected


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (1, r"key 1 \(int\): column 'key' holds text: pass a str"),
        (True, "column 'key' holds text"),
        (None, "column 'key' holds text"),
        (b"a", "column 'key' holds text"),
        (("a",), "column 'key' holds text"),
        ("a\0b", "without NUL"),
        ("\ud800", "no lone surrogates"),
        (10**400, "column 'key' holds text"),
    ],
)
def test_keys_that_a_text_column_would_alter_are_refused_at_the_caller(db, clock, key, message):
    with StatBuffer(db.sink(), clock=clock) as views:
        with pytest.raises(TypeError, match=message):
            views.increment(key)
        assert views.stats().accepted == 0


def test_a_huge_key_is_stored_or_refused(db):
    sink = db.sink()
    sink.open()
    huge = "x" * 10_000_000
    try:
        sink.check_key(huge)
        sink.apply(batch(1, {huge: 1, "small": 2}, "fresh"))
    except TypeError as error:
        assert len(str(error)) < 500
        assert db.name == "mariadb"
        return
    except Rejected as error:
        assert list(error.reasons) == [huge]
        assert len(str(error)) < 1_000
        assert sink.totals(["small"]) == {}
        return
    assert sink.totals([huge]) == {huge: 1}


def test_typed_composite_keys_come_back_as_they_went_in(db):
    metadata = sa.MetaData()
    table = sa.Table(
        db.table(),
        metadata,
        sa.Column("tenant", sa.Uuid, primary_key=True),
        sa.Column("day", sa.Date, primary_key=True),
        sa.Column("hour", sa.DateTime, primary_key=True),
        sa.Column("code", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("name", sa.String(50), primary_key=True) if db.name != "mariadb" else
        sa.Column("name", sa.String(50, collation="utf8mb4_nopad_bin"), primary_key=True),
        sa.Column("n", sa.BigInteger, nullable=False),
    )  # fmt: skip
    sink = db.sink(table, key=("tenant", "day", "hour", "code", "name"), count="n")
    sink.open()
    keys = [
        (
            uuid.UUID(int=number),
            dt.date(2026, 1, 1 + number),
            dt.datetime(2026, 1, 1, number),
            2**62 + number,
            f"n{number}",
        )
        for number in range(5)
    ]
    for key in keys:
        sink.check_key(key)
    sink.apply(batch(1, dict.fromkeys(keys, 3), "fresh"))
    sink.apply(batch(1, dict.fromkeys(keys[:2], 4), "fresh"))
    found = sink.totals(keys)
    assert found == {key: 7 if key in keys[:2] else 3 for key in keys}
    assert [[type(part) for part in key] for key in found] == [[uuid.UUID, dt.date, dt.datetime, int, str]] * 5
    first = keys[0]
    for wrong in (first[:4], ("x", *first[1:]), (first[0], first[2], *first[2:]), (*first[:2], first[1], *first[3:]),
                  (*first[:3], True, "n"), (*first[:3], 2**63, "n"), (*first[:3], 1.0, "n"),
                  (*first[:2], first[2].replace(tzinfo=dt.timezone.utc), 1, "n"), (*first[:4], "x" * 51)):  # fmt: skip
        with pytest.raises(TypeError, match=r"column|tuple of 5"):
            sink.check_key(wrong)


def test_a_key_column_of_another_type_is_refused(db):
    table = sa.Table(
        db.table(), sa.MetaData(), sa.Column("key", sa.Float, primary_key=True), sa.Column("count", sa.BigInteger)
    )
    with pytest.raises(
        SinkError, match=r"key column 'key' is of type .*; a key column can be text, integer, uuid, date or timestamp"
    ):
        db.sink(table).open()


# Data that the store can't take


def test_three_bad_keys_of_ten_thousand_are_found_in_few_statements(db, clock):
    name = db.table()
    quote = "`" if db.name == "mariadb" else '"'
    kind = "VARCHAR(40)" + " CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin" * (db.name == "mariadb")
    db.execute(
        f"CREATE TABLE {name} ({quote}key{quote} {kind} PRIMARY KEY, {quote}count{quote} BIGINT NOT NULL, "
        f"CHECK ({quote}count{quote} >= 0), CHECK (LENGTH({quote}key{quote}) <= 30))",
    )
    sink = db.sink(name)
    views = StatBuffer(sink, clock=clock, interval=1.0, batch_keys=10_000).start()
    views.increment("key-77", 2**63 - 1)
    clock.advance(1.1)
    seen = statements(sink)
    views.update({f"key-{number}": 1 for number in range(10_000) if number not in {5_000, 9_000}})
    views.update({"o" * 35: 1, "negative": -1})
    clock.advance(1.1)
    letters = {letter.key: letter.reason for letter in views.dead_letters()}
    assert set(letters) == {"key-77", "o" * 35, "negative"}
    assert all(letters.values())
    assert db.execute(f"SELECT COUNT(*) FROM {name}") == [(9_998,)]
    adds = [statement for statement in seen if name in statement]
    assert len(adds) <= 2 + 3 * 2 * math.ceil(math.log2(10_000)), len(adds)
    assert views.stats().dead == 1
    db.execute(f"UPDATE {name} SET {quote}count{quote} = 5 WHERE {quote}key{quote} = 'key-77'")
    if db.name == "postgresql":
        db.execute(f"ALTER TABLE {name} DROP CONSTRAINT {name}_key_check")
        assert views.retry_dead_letters() == 1
        clock.advance(0.1)
        assert sink.totals(["key-77", "o" * 35]) == {"key-77": 6, "o" * 35: 1}
        assert [letter.key for letter in views.dead_letters()] == ["negative"]


def test_update_mode_touches_existing_rows_only(db, clock):
    name = db.table()
    db.sink(name).apply(batch(1, {"a": 1, "b": 2}, "fresh"))
    dead = db.sink(name, mode="update")
    views = StatBuffer(dead, clock=clock, interval=1.0).start()
    views.update({"a": 10, "b": 20, "nobody": 5})
    clock.advance(1.1)
    assert dead.totals() == {"a": 11, "b": 22}
    [letter] = views.dead_letters()
    assert (letter.key, letter.count) == ("nobody", 5)
    assert "no row in table" in letter.reason
    ignoring = db.sink(name, mode="update", on_missing="ignore")
    ignoring.apply(batch(1, {"a": 100, "nobody": 5}, "fresh"))
    assert ignoring.totals() == {"a": 111, "b": 22}
    inserting = db.sink(name, mode="update", on_missing="insert")
    inserting.apply(batch(1, {"a": 1, "nobody": 5}, "fresh"))
    assert inserting.totals() == {"a": 112, "b": 22, "nobody": 5}


def test_an_update_past_64_bits_is_rejected(db):
    name = db.table()
    db.sink(name).apply(batch(1, {"a": 2**63 - 1, "b": 1}, "fresh"))
    sink = db.sink(name, mode="update")
    with pytest.raises(Rejected) as caught:
        sink.apply(batch(1, {"a": 1, "b": 1}, "fresh"))
    assert list(caught.value.reasons) == ["a"]
    assert sink.totals() == {"a": 2**63 - 1, "b": 1}


def test_slots_spread_a_key_over_rows_and_totals_add_them(db):
    sink = db.sink(slots=8)
    for number in range(40):
        sink.apply(batch(1, {"hot": 1, f"key-{number}": 1}, f"slotted-{next(numbers)}"))
    [[rows]] = db.execute(
        f"SELECT COUNT(*) FROM {sink._table.name} WHERE {sink.engine.dialect.identifier_preparer.quote('key')} = 'hot'"
    )
    assert 4 <= rows <= 8
    assert sink.totals(["hot", "key-3"]) == {"hot": 40, "key-3": 1}
    assert sink.top(1) == [("hot", 40)]
    assert sink.summary() == (41, 80)


# What a failure means


def test_a_lock_that_is_held_stores_nothing_and_says_so(db):
    name = db.table()
    sink = db.sink(name, url=db.url + ("?timeout=0.1" if db.name == "sqlite" else ""))
    sink.apply(batch(1, {"a": 1}, "fresh"))
    engine = sa.create_engine(db.url)
    with engine.connect() as holder:
        if db.name == "sqlite":
            holder.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            quote = holder.dialect.identifier_preparer.quote
            holder.exec_driver_sql(f"UPDATE {name} SET {quote('count')} = {quote('count')} WHERE {quote('key')} = 'a'")
            timeout = "lock_timeout = '100ms'" if db.name == "postgresql" else "innodb_lock_wait_timeout = 1"
            event.listen(sink.engine, "begin", lambda connection: connection.exec_driver_sql(f"SET SESSION {timeout}"))
        with pytest.raises(NotApplied, match=r"(?i)lock"):
            sink.apply(batch(1, {"a": 1}, "fresh"))
        holder.rollback()
    engine.dispose()
    sink.apply(batch(1, {"a": 1}, "fresh"))
    assert sink.totals() == {"a": 2}


@pytest.mark.parametrize("db", ["postgresql", "mariadb"], indirect=True)
def test_a_deadlock_stores_nothing_and_says_so(db):
    name = db.table()
    sink = db.sink(name)
    sink.apply(batch(1, {"a": 1, "z": 1}, "fresh"))
    engine = sa.create_engine(db.url)
    outcomes = []

    def apply() -> None:
        try:
            sink.apply(batch(1, {"a": 1, "z": 1}, "fresh"))
            outcomes.append("stored")
        except NotApplied as error:
            outcomes.append(str(error))

    with engine.connect() as other:
        quote = other.dialect.identifier_preparer.quote
        touch = f"UPDATE {name} SET {quote('count')} = {quote('count')} + 0 WHERE {quote('key')} = "
        other.exec_driver_sql(touch + "'z'")
        for filler in range(50):  # more work: MariaDB rolls the smaller transaction back
            other.exec_driver_sql(f"INSERT INTO {name} VALUES ('filler-{filler}', 0)")
        thread = threading.Thread(target=apply)
        thread.start()
        try:
            while not waiting_for_lock(db):
                pass
            other.exec_driver_sql(touch + "'a'")
        except sa.exc.OperationalError as error:
            outcomes.append(f"other: {error.orig}")
        other.rollback()
        thread.join(20)
    engine.dispose()
    assert any("deadlock" in outcome.lower() for outcome in outcomes), outcomes
    stored = 2 if "stored" in outcomes else 1
    assert sink.totals(["a", "z"]) == {"a": stored, "z": stored}


def waiting_for_lock(db: Database) -> bool:
    if db.name == "postgresql":
        return bool(db.execute("SELECT 1 FROM pg_locks WHERE NOT granted"))
    return bool(db.execute("SELECT 1 FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"))


@pytest.mark.parametrize("db", ["postgresql", "mariadb"], indirect=True)
def test_a_connection_that_the_server_ends_stores_nothing_and_the_next_works(db):
    sink = db.sink()
    sink.apply(batch(1, {"a": 1}, "fresh"))
    if db.name == "postgresql":
        db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
    else:
        for (number,) in db.execute(
            "SELECT id FROM information_schema.processlist WHERE id <> CONNECTION_ID() AND user = 'root'"
        ):
            db.execute(f"KILL {number}")
    with pytest.raises(NotApplied):
        sink.apply(batch(1, {"a": 1}, "fresh"))
    sink.apply(batch(1, {"a": 1}, "fresh"))
    assert sink.totals() == {"a": 2}


@pytest.mark.parametrize("db", ["postgresql"], indirect=True)
def test_a_read_only_store_stores_nothing_and_says_so(db):
    sink = db.sink()
    sink.open()
    event.listen(sink.engine, "begin", lambda connection: connection.exec_driver_sql("SET TRANSACTION READ ONLY"))
    with pytest.raises(NotApplied, match="read-only"):
        sink.apply(batch(1, {"a": 1}, "fresh"))


# Opening


def test_eight_processes_can_open_a_new_database_at_once(db):
    name = db.table()
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=open_and_count, args=(db.url, name)) for _ in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 8
    assert db.sink(name).totals() == {"a": 80}


def open_and_count(url: str, table: str) -> None:
    with StatBuffer(SQLSink(url, table=table), interval=0.01, shutdown=30.0) as views:
        for _ in range(10):
            views.increment("a")


def test_a_missing_table_or_column_is_named_at_start(db, clock):
    with pytest.raises(SinkError, match=r"table 'nowhere' does not exist; make it, or pass create=True"):
        StatBuffer(db.sink("nowhere", create=False), clock=clock).start()
    name = db.table()
    db.sink(name).open()
    with pytest.raises(SinkError, match=rf"table '{name}' has no column 'views'; it has count, key"):
        db.sink(name, count="views").open()
    with pytest.raises(SinkError, match=r"count column 'key' is of type"):
        db.sink(name, count="key", key="count").open()


def test_a_table_without_a_unique_key_is_refused_for_upserts(db):
    name = db.table()
    collation = " CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin" if db.name == "mariadb" else ""
    kind = "VARCHAR(50)" + collation
    db.execute(f"CREATE TABLE {name} (page {kind} NOT NULL, n BIGINT NOT NULL)")
    with pytest.raises(SinkError, match=r"needs a primary key or unique constraint on \(page\) for mode='upsert'"):
        db.sink(name, key="page", count="n").open()
    db.sink(name, key="page", count="n", mode="update").open()
    db.execute(f"CREATE UNIQUE INDEX {name}_u ON {name} (page)")
    db.sink(name, key="page", count="n").open()


@pytest.mark.parametrize(
    ("db", "ddl", "collation"),
    [
        ("sqlite", "k TEXT COLLATE NOCASE PRIMARY KEY", "NOCASE"),
        ("sqlite", "k TEXT COLLATE RTRIM PRIMARY KEY", "RTRIM"),
        ("mariadb", "k VARCHAR(50) COLLATE utf8mb4_general_ci PRIMARY KEY", "utf8mb4_general_ci"),
        ("mariadb", "k VARCHAR(50) COLLATE utf8mb4_bin PRIMARY KEY", "utf8mb4_bin"),
    ],
    indirect=["db"],
)
def test_a_lossy_collation_is_named_at_start(db, ddl, collation):
    name = db.table()
    db.execute(f"CREATE TABLE {name} ({ddl}, n BIGINT NOT NULL)")
    with pytest.raises(SinkError, match=rf"column 'k' has the collation {collation}, which merges different keys"):
        db.sink(name, key="k", count="n").open()


@pytest.mark.parametrize("db", ["mariadb"], indirect=True)
def test_a_table_without_transactions_and_a_lax_sql_mode_are_refused(db):
    name = db.table()
    db.execute(
        f"CREATE TABLE {name} (k VARCHAR(50) COLLATE utf8mb4_nopad_bin PRIMARY KEY, n BIGINT NOT NULL) ENGINE=MyISAM"
    )
    with pytest.raises(SinkError, match="engine is MyISAM, which has no transactions"):
        db.sink(name, key="k", count="n").open()
    engine = sa.create_engine(db.url, connect_args={"sql_mode": ""})
    with pytest.raises(SinkError, match="cuts what does not fit"):
        db.sink(url=engine).open()
    engine.dispose()


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("nonsense", SinkError, "not a database URL, expected one like"),
        ("oracle://u:secret@h/d", SinkError, "oracle|not installed"),
        ("sqlite:////nowhere/at/all/x.db", SinkError, "unable to open database file"),
        ("postgresql+asyncpg2://u:secret@h/d", SinkError, "not supported"),
        (
            "mysql+mysqldb://u:secret@h/d",
            MissingDriver,
            r"MySQLdb is not installed; run: pip install 'statbuffer\[mysql\]'",
        ),
        (
            "postgresql+psycopg2://u:secret@h/d",
            MissingDriver,
            r"psycopg2 is not installed; run: pip install 'statbuffer\[postgres\]'",
        ),
    ],
)
def test_a_wrong_url_says_what_to_do_and_keeps_the_password(url, error, message):
    with pytest.raises(error, match=message) as caught:
        SQLSink(url).open()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("db", ["postgresql", "mariadb"], indirect=True)
def test_wrong_credentials_fail_and_an_unreachable_server_does_not(db, clock):
    url = sa.make_url(db.url)
    for wrong in (url.set(database="no_such_database"), url.set(username="no_such_user", password="secret")):
        with pytest.raises(SinkError, match="can't be used") as caught:
            StatBuffer(SQLSink(wrong), clock=clock).start()
        assert "secret" not in str(caught.value)
    from tests.servers import free_port

    views = StatBuffer(SQLSink(url.set(port=free_port())), clock=clock, interval=1.0).start()
    views.increment("a")
    views.increment(5)  # nobody could look at the table yet
    clock.advance(1.1)
    assert "refused" in views.stats().last_error.lower() or "connect" in views.stats().last_error.lower()
    assert views.stop(0).pending == {"a": 1, 5: 1}
    views.sink.close()


def test_keys_that_came_before_the_table_was_known_become_dead_letters(tmp_path, clock):
    """A SQLite file that is locked while the buffer starts."""
    url = f"sqlite:///{tmp_path}/locked.db?timeout=0.05"
    engine = sa.create_engine(url)
    with engine.connect() as holder:
        holder.exec_driver_sql("BEGIN EXCLUSIVE")
        views = StatBuffer(url, clock=clock, interval=1.0).start()
        views.increment(5, 7)
        views.increment("a", 3)
        holder.rollback()
    engine.dispose()
    clock.advance(5.0)
    assert views.total("a") == 3
    assert [(letter.key, letter.count) for letter in views.dead_letters()] == [(5, 7)]
    views.stop()


def test_options_are_checked():
    for options in (
        {"mode": "replace"},
        {"on_missing": "?"},
        {"slots": 0},
        {"slots": True},
        {"slots": 2, "mode": "update"},
    ):
        with pytest.raises(SinkError):
            SQLSink("sqlite://", **options)


def test_an_engine_of_the_user_stays_open_and_memory_databases_work():
    engine = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool, connect_args={"check_same_thread": False})
    with StatBuffer(SQLSink(engine), interval=0.01) as views:
        views.increment("a", 5)
        views.flush(timeout=10)
        assert views.total("a") == 5
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count FROM counters").scalar() == 5
    engine.dispose()
    assert isinstance(from_url("sqlite://"), SQLSink)


def test_a_database_in_memory_is_one_for_all_threads():
    with StatBuffer("sqlite://", interval=0.01) as views:
        views.increment("a", 5)
        views.flush(timeout=10)
        assert views.total("a") == 5


def test_a_value_that_the_driver_cannot_send_is_found_and_rejected(db):
    """Such as a subclass of str whose contents a driver or its encoder trips over."""
    sink = db.sink()
    sink.open()

    class Unsendable(str):
        __slots__ = ()

    parameters = sink._dialect.parameters

    def trip(rows):
        if any(isinstance(row[0], Unsendable) for row in rows):
            raise ValueError("can't adapt this")
        return parameters(rows)

    sink._dialect.parameters = trip
    with pytest.raises(Rejected, match="can't adapt this") as caught:
        sink.apply(batch(1, {f"key-{number}": 1 for number in range(50)} | {Unsendable("bad"): 1}, "fresh"))
    assert list(caught.value.reasons) == ["bad"]
    assert sink.totals() == {}


# Watermarks


def test_prune_forgets_idle_writers_by_the_clock_of_the_database(db):
    sink = db.sink()
    writers = [f"idle-{next(numbers)}", f"busy-{next(numbers)}"]
    for writer in writers:
        sink.apply(Batch(writer, 7, {"a": 1}))
    age = {
        "sqlite": "datetime(updated, '-40 days')", "postgresql": "updated - INTERVAL '40 days'", "mariadb": "updated - INTERVAL 40 DAY",
    }[db.name]  # fmt: skip
    db.execute(f"UPDATE statbuffer_writers SET updated = {age} WHERE writer = '{writers[0]}'")
    assert sink.prune(30 * 86_400) == 1
    assert sink.applied(Batch(writers[1], 7, {}))
    assert not sink.applied(Batch(writers[0], 7, {}))
    sink.apply(Batch(writers[0], 8, {"a": 10}))  # it lives: its next batch is no repeat
    sink.apply(Batch(writers[0], 8, {"a": 10}))
    assert sink.totals() == {"a": 12}


def test_a_fork_leaves_the_connections_of_the_parent_alone(db):
    sink = db.sink()
    sink.apply(batch(1, {"a": 1}, "fresh"))
    child = os.fork()
    if child == 0:
        try:
            sink.after_fork()
            sink.apply(batch(1, {"a": 1}, "child"))
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    sink.apply(batch(1, {"a": 1}, "fresh"))
    assert sink.totals() == {"a": 3}
