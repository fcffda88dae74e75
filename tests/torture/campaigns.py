"""Fault campaigns against a real SQL server. Each counts, breaks things, and compares sums; `report` lines are printed.

`server` is one of `tests.servers`: it has `url(host, port)`, `host`, `port`, `kill()` (SIGKILL), `stop_immediately()`
and `start()`.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
import time
from collections import Counter
from typing import Any

from sqlalchemy import create_engine, event

from statbuffer import SQLSink, StatBuffer
from tests.proxy import CuttingProxy

KEYS = [f"key-{number}" for number in range(200)]


def seed_of(name: str) -> int:
    """The seed of a campaign: STATBUFFER_SEED, or a fresh one; printed, so that a failure can be run again."""
    seed = int(os.environ.get("STATBUFFER_SEED", random.randrange(10**6)))
    print(f"\n{name}: STATBUFFER_SEED={seed}")
    return seed


def stored(url: str, table: str) -> dict[Any, int]:
    """What the server holds, read past proxies and sinks."""
    sink = SQLSink(url, table=table)
    sink.open()
    try:
        return dict(sink.totals())
    finally:
        sink.close()


def buffer_for(url: str, table: str, **options: Any) -> StatBuffer:
    """A buffer that delivers all the time and tries again at once."""
    settings: dict[str, Any] = {"interval": 0.005, "backoff": 0.005, "restart": "permanent", "shutdown": None} | options
    return StatBuffer(SQLSink(url, table=table), **settings)


def cut_campaign(server: Any, table: str, *, cuts: int, at_commit: int, increments: int) -> None:
    """Cut connections at seeded points until there were enough of them, then compare."""
    seed = seed_of(f"cuts, {server.name}")
    proxy = CuttingProxy((server.host, server.port), seed, rate=0.05, commit_rate=0.35)
    rng = random.Random(seed)
    accepted: Counter[str] = Counter()
    # The proxy is in the way from the first message on; a table made through it would only slow the start down.
    stored(server.url(), table)
    views = buffer_for(server.url(proxy.host, proxy.port), table).start()
    while proxy.total < cuts or proxy.at_commit < at_commit or accepted.total() < increments:
        keys = rng.choices(KEYS, k=50)
        views.update(keys)
        accepted.update(keys)
        time.sleep(0.0005)
    proxy.calm()
    report = views.stop(120)
    stats = views.stats()
    proxy.close()
    found = stored(server.url(), table)
    print(
        f"cuts, {server.name}: {proxy.total} cuts ({proxy.at_commit} at COMMIT: "
        f"{ {kind: number for (kind, commit), number in sorted(proxy.cuts.items()) if commit} }), "
        f"{stats.attempts} attempts, {stats.failures} failed; accepted {accepted.total()}, stored {sum(found.values())}"
    )
    assert report.complete, report
    assert stats.balanced, stats
    assert found == dict(accepted)


def kill_campaign(server: Any, table: str, *, rounds: int) -> None:
    """Kill the server and start it again, under load, every other time by its own immediate stop."""
    rng = random.Random(seed_of(f"kills, {server.name}"))
    accepted: Counter[str] = Counter()
    done = threading.Event()
    views = buffer_for(server.url(), table).start()

    def load() -> None:
        load_rng = random.Random(1)
        while not done.is_set():
            keys = load_rng.choices(KEYS, k=20)
            views.update(keys)
            accepted.update(keys)
            time.sleep(0.0005)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for number in range(rounds):
            time.sleep(rng.uniform(0.2, 0.6))
            server.kill() if number % 2 else server.stop_immediately()
            time.sleep(rng.uniform(0.0, 0.2))
            server.start()
    finally:
        done.set()
        thread.join()
    report = views.stop(120)
    stats = views.stats()
    found = stored(server.url(), table)
    print(
        f"kills, {server.name}: {rounds} restarts, {stats.attempts} attempts, {stats.failures} failed; "
        f"accepted {accepted.total()}, stored {sum(found.values())}"
    )
    assert report.complete, report
    assert found == dict(accepted)


def _write(url: str, table: str, seconds: float, number: int, results: Any) -> None:
    """One writer: all keys, in an order of its own, over and over."""
    deadlocks = 0
    engine = create_engine(SQLSink(url, table=table).url)

    @event.listens_for(engine, "handle_error")
    def note(context: Any) -> None:
        nonlocal deadlocks
        deadlocks += "deadlock" in str(context.original_exception).lower()

    keys = random.Random(number).sample(range(1_000), 1_000)
    views = StatBuffer(
        SQLSink(engine, table=table), interval=0.05, backoff=0.01, restart="permanent", shutdown=None
    ).start()
    accepted = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        views.update(f"key-{key}" for key in keys)
        accepted += len(keys)
        time.sleep(0.02)
    report = views.stop(120)
    results.put((accepted, deadlocks, views.stats().batches, report.complete))
    engine.dispose()


def writers_campaign(server: Any, table: str, *, writers: int, seconds: float) -> None:
    """Many processes upsert the same rows; deadlocks are the store's business, never the application's."""
    stored(server.url(), table)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    children = [
        context.Process(target=_write, args=(server.url(), table, seconds, number, results))
        for number in range(writers)
    ]
    for child in children:
        child.start()
    outcomes = [results.get(timeout=seconds + 180) for _ in children]
    for child in children:
        child.join(60)
    accepted, deadlocks, batches = (sum(outcome[column] for outcome in outcomes) for column in range(3))
    found = stored(server.url(), table)
    print(
        f"writers, {server.name}: {writers} processes, {seconds:g} s, {batches} batches, {deadlocks} deadlocks; "
        f"accepted {accepted}, stored {sum(found.values())}"
    )
    assert all(outcome[3] for outcome in outcomes)
    assert sum(found.values()) == accepted
    assert len(set(found.values())) == 1
