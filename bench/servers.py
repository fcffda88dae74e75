"""Flushes to real servers, started for the run, against what somebody who knows the server well would write by hand."""

from __future__ import annotations

import json
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
import pymysql

from statbuffer import Batch, SQLSink
from statbuffer._cli.bench_sections import compare_flush
from statbuffer._cli.bench_sqlite import timed
from tests.servers import MariaDBServer, PostgreSQLServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from statbuffer._cli.bench import Line
    from tests.servers import Server

_TURNS = 6
_SAMPLE = 300
_COLLATED = "CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin"


def _unnest(cursor: Any, counts: dict[str, int]) -> None:
    keys = sorted(counts)
    cursor.execute(
        "INSERT INTO hand SELECT * FROM unnest(%s::text[], %s::bigint[]) "
        "ON CONFLICT (key) DO UPDATE SET count = hand.count + excluded.count",
        (keys, [counts[key] for key in keys]),
    )


def _json_table(cursor: Any, counts: dict[str, int]) -> None:
    cursor.execute(
        f"INSERT INTO hand SELECT k, n FROM JSON_TABLE(%s, '$[*]' COLUMNS (k LONGTEXT {_COLLATED} PATH '$[0]', "
        "n BIGINT PATH '$[1]')) AS batch ON DUPLICATE KEY UPDATE count = hand.count + batch.n",
        (json.dumps(sorted(counts.items())),),
    )


def _values(cursor: Any, counts: dict[str, int]) -> None:
    pairs = sorted(counts.items())
    for start in range(0, len(pairs), 5_000):
        some = pairs[start : start + 5_000]
        cursor.execute(
            f"INSERT INTO hand VALUES {','.join(['(%s,%s)'] * len(some))} "
            "ON DUPLICATE KEY UPDATE count = count + VALUES(count)",
            [value for pair in some for value in pair],
        )


def postgresql(scale: float) -> Iterable[Line]:
    """PostgreSQL 18, as its package configures it but for fsync."""
    server = PostgreSQLServer()
    try:
        with psycopg.connect(host=server.host, port=server.port, user="postgres", dbname="test") as connection:
            create = "CREATE TABLE hand (key TEXT PRIMARY KEY, count BIGINT NOT NULL)"
            yield from _compare(
                server, "PostgreSQL", scale, connection=connection, create=create, hands={"unnest upsert": _unnest}
            )
    finally:
        server.remove()


def mariadb(scale: float) -> Iterable[Line]:
    """MariaDB, with packets large enough for a hundred thousand rows."""
    if reason := MariaDBServer.missing():
        raise SystemExit(reason)
    server = MariaDBServer()
    try:
        server.execute("SET GLOBAL max_allowed_packet = 67108864")
        with pymysql.connect(
            host=server.host, port=server.port, user="root", database="test", charset="utf8mb4"
        ) as connection:
            create = f"CREATE TABLE hand (`key` VARCHAR(700) {_COLLATED} PRIMARY KEY, count BIGINT NOT NULL)"
            hands = {"JSON_TABLE upsert": _json_table, "multi-row VALUES upsert": _values}
            yield from _compare(server, "MariaDB", scale, connection=connection, create=create, hands=hands)
    finally:
        server.remove()


def _compare(
    server: Server,
    name: str,
    scale: float,
    *,
    connection: Any,
    create: str,
    hands: Mapping[str, Callable[[Any, dict[str, int]], None]],
) -> Iterable[Line]:
    number = int(100_000 * scale)
    counts = {f"/products/{page}": page % 97 + 1 for page in range(number)}
    best: dict[str, list[float]] = {}
    for turn in range(_TURNS):
        for hand, store in hands.items():
            _note(best, hand, _by_hand(connection, create, store, counts))
        _note(best, "sink", _sink(server, f"counters_{turn}", counts))
    yield from compare_flush(name, number, best, _one_commit_each(connection, next(iter(hands.values())), counts))


def _note(best: dict[str, list[float]], name: str, seconds: list[float]) -> None:
    best[name] = [min(pair) for pair in zip(seconds, best.get(name, seconds), strict=True)]


def _by_hand(
    connection: Any, create: str, store: Callable[[Any, dict[str, int]], None], counts: dict[str, int]
) -> list[float]:
    def once(cursor: Any) -> None:
        store(cursor, counts)
        connection.commit()

    with connection.cursor() as cursor:
        cursor.execute("DROP TABLE IF EXISTS hand")
        cursor.execute(create)
        connection.commit()
        return [timed(partial(once, cursor)) for _ in range(2)]


def _sink(server: Server, table: str, counts: dict[str, int]) -> list[float]:
    sink = SQLSink(server.url(), table=table)
    sink.open()
    seconds = [timed(partial(sink.apply, Batch(f"bench-{table}", seq, {**counts}))) for seq in (1, 2)]
    assert sink.summary() == (len(counts), 2 * sum(counts.values()))
    sink.close()
    return seconds


def _one_commit_each(connection: Any, store: Callable[[Any, dict[str, int]], None], counts: dict[str, int]) -> float:
    with connection.cursor() as cursor:
        started = time.perf_counter()
        for key in list(counts)[:_SAMPLE]:
            store(cursor, {key: 1})
            connection.commit()
        return (time.perf_counter() - started) / _SAMPLE * len(counts)
