"""The kill campaign: processes that count into a journal are killed by SIGKILL at random moments and at each named step.

`python -m tests.journal.kills --runs 1000 --seed 7`. Each run has its own journal and its own store (SQLite, through the SQL
sink). Up to three generations of victims, one or two processes at a time, count with several threads; each thread writes
down what it is about to count, and what it had counted when its latest `sync()` returned, into shared memory, which
outlives it. A step is a statement of the journal or of the sink, before or after: the first process lists them, the others
die there. Then a last process delivers what was left, and the store is compared, key by key:

    synced <= stored <= counted
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import mmap
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from statbuffer import SQLSink, StatBuffer
from statbuffer._journal import _file

KEYS = 12
THREADS = 3
VICTIMS = 6  # at most, in one run


class Bounds:
    """For each victim, thread and key: what it was about to count, and what it knew to be synced. Shared memory."""

    def __init__(self) -> None:
        self._numbers = memoryview(mmap.mmap(-1, VICTIMS * THREADS * KEYS * 2 * 8)).cast("q")

    def _at(self, victim: int, thread: int, key: int, which: int) -> int:
        return ((victim * THREADS + thread) * KEYS + key) * 2 + which

    def about_to_count(self, victim: int, thread: int, key: int, count: int) -> None:
        self._numbers[self._at(victim, thread, key, 0)] += count

    def synced(self, victim: int, thread: int, sums: list[int]) -> None:
        for key, total in enumerate(sums):
            self._numbers[self._at(victim, thread, key, 1)] = total

    def of(self, key: int) -> tuple[int, int]:
        places = [(victim, thread) for victim in range(VICTIMS) for thread in range(THREADS)]
        counted, synced = (sum(self._numbers[self._at(*place, key, which)] for place in places) for which in (0, 1))
        return synced, counted


class Steps:
    """Dies at the nth time that a step is reached; without a step, remembers all that it sees."""

    def __init__(self, step: str | None = None, nth: int = 1) -> None:
        self._step = step
        self._left = nth
        self.seen: dict[str, int] = {}

    def reach(self, step: str) -> None:
        if step == self._step:
            self._left -= 1
            if self._left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
        self.seen[step] = self.seen.get(step, 0) + 1

    def watch(self, sink: SQLSink) -> None:
        """See every statement of the journal and of the sink, before and after."""
        steps = self

        class Watched(sqlite3.Connection):
            def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
                name = " ".join(sql.split()[:4])
                steps.reach(f"before journal {name}")
                cursor = super().execute(sql, *values)
                steps.reach(f"after journal {name}")
                return cursor

        def connect(path: Any) -> sqlite3.Connection:
            connection = sqlite3.connect(
                path, timeout=_file.BUSY_SECONDS, isolation_level=None, check_same_thread=False, factory=Watched
            )
            connection.create_function("row_crc", -1, _file.row_crc, deterministic=True)
            return connection

        _file.connect = connect  # type: ignore[assignment]
        engine = sink.engine

        def name_of(sql: str) -> str:
            return " ".join(sql.split()[:3])

        sa.event.listen(engine, "before_cursor_execute", lambda *args: steps.reach(f"before sink {name_of(args[2])}"))
        sa.event.listen(engine, "after_cursor_execute", lambda *args: steps.reach(f"after sink {name_of(args[2])}"))
        sa.event.listen(engine, "begin", lambda _: steps.reach("sink BEGIN"))
        sa.event.listen(engine, "commit", lambda _: steps.reach("before sink COMMIT"))
        sa.event.listen(engine, "checkin", lambda *_: steps.reach("after sink COMMIT"))


def buffer(folder: Path, rng: random.Random, steps: Steps | None = None) -> StatBuffer:
    sink = SQLSink(f"sqlite:///{folder / 'store.db'}")
    if steps is not None:
        steps.watch(sink)
    return StatBuffer(
        sink,
        journal=folder / "journal",
        fsync=False,
        sync_interval=rng.choice([0.0, 0.005, 0.02]),
        interval=rng.choice([0.0, 0.01, 0.05]),
        batch_keys=rng.choice([3, 10_000]),
        backoff=0.01,
        timeout=rng.choice([0.05, 10.0]),
        restart="permanent",
    )


def victim(folder: Path, bounds: Bounds, number: int, seed: int, steps: Steps, seconds: float) -> None:
    rng = random.Random(seed)
    views = buffer(folder, rng, steps).start()
    end = time.monotonic() + seconds

    def work(thread: int, rng: random.Random) -> None:
        sums = [0] * KEYS
        while time.monotonic() < end:
            for _ in range(rng.randrange(1, 40)):
                key, count = rng.randrange(KEYS), rng.choice([1, 1, 2, 1000])
                bounds.about_to_count(number, thread, key, count)
                views.increment(f"key-{key}", count)
                sums[key] += count
            if rng.random() < 0.4:
                views.sync()
                bounds.synced(number, thread, sums)
            elif rng.random() < 0.1:
                views.flush()
            time.sleep(rng.random() * 0.01)

    threads = [threading.Thread(target=work, args=(thread, random.Random(rng.random()))) for thread in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if rng.random() < 0.5:
        views.stop()


def recover(folder: Path, seed: int) -> None:
    views = buffer(folder, random.Random(seed)).start()
    report = views.stop(timeout=30)
    assert report.complete, report
    assert views._journal is not None
    assert views._journal.is_empty(), "something is left in the journal"


def in_child(work: Any, *args: Any) -> int:
    """Run `work` in a forked process; returns its pid. This process has no threads, so forking is safe."""
    pid = os.fork()
    if pid == 0:
        code = 1
        threading.excepthook = lambda args: (sys.__excepthook__(*args[:3]), os._exit(3))  # type: ignore[arg-type,func-returns-value]
        try:
            logging.disable(logging.ERROR)
            work(*args)
            code = 0
        except BaseException:
            logging.disable(logging.NOTSET)
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def wait(pid: int, seconds: float) -> int | None:
    """Return the exit code (negative: the signal), or None if it still runs."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.002)


@dataclass
class Tally:
    runs: int = 0
    kills: int = 0
    at_step: int = 0
    accepted_least: int = 0
    stored: int = 0
    accepted_most: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def learn_steps(folder: Path, seed: int) -> list[str]:
    """Let one process live and list the steps it came by."""
    read, write = os.pipe()

    def live() -> None:
        steps = Steps()
        victim(folder, Bounds(), 0, seed, steps, 0.8)
        os.write(write, "\n".join(steps.seen).encode())

    pid = in_child(live)
    assert wait(pid, 60) == 0, f"seed {seed}: the process that lists the steps failed"
    os.close(write)
    with os.fdopen(read) as pipe:
        return sorted(pipe.read().splitlines())


def run(folder: Path, seed: int, steps: list[str], tally: Tally) -> None:
    rng = random.Random(seed)
    bounds = Bounds()
    number = 0
    told = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        alive: list[int] = []
        for _ in range(rng.choice([1, 1, 2])):
            step = rng.choice(steps) if rng.random() < 0.75 else None
            nth = rng.choice([1, 1, 2, 5])
            told.append(f"{step} #{nth}")
            seconds = rng.uniform(0.05, 0.3)
            watch = Steps(step or "none", nth)
            alive.append(in_child(victim, folder, bounds, number, rng.random(), watch, seconds))
            number += 1
            if step is not None:
                tally.steps[step] = tally.steps.get(step, 0) + 1
        for pid in alive:
            code = wait(pid, rng.uniform(0.0, 0.6))
            if code is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                tally.kills += 1
            elif code == -signal.SIGKILL:
                tally.kills += 1
                tally.at_step += 1
            elif code != 0:
                tally.wrong.append(f"seed {seed}: a victim ended with {code} ({told})")
    code = wait(in_child(recover, folder, rng.random()), 60)
    if code != 0:
        tally.wrong.append(f"seed {seed}: recovery ended with {code} ({told})")
        return
    compare(folder, seed, bounds, tally, told)


def compare(folder: Path, seed: int, bounds: Bounds, tally: Tally, told: list[str]) -> None:
    with contextlib.closing(sqlite3.connect(folder / "store.db")) as connection:
        stored = dict(connection.execute("SELECT key, count FROM counters").fetchall())
    for key in range(KEYS):
        least, most = bounds.of(key)
        found = stored.pop(f"key-{key}", 0)
        if not least <= found <= most:
            what = "lost" if found < least else "counted twice"
            tally.wrong.append(
                f"seed {seed}: key {key} {what}: synced {least}, stored {found}, counted {most} ({told})"
            )
        tally.accepted_least += least
        tally.stored += found
        tally.accepted_most += most
    if stored:
        tally.wrong.append(f"seed {seed}: keys that nobody counted: {stored}")
    if list((folder / "journal").glob("damaged-*")):
        tally.wrong.append(f"seed {seed}: a kill was taken for damage ({told})")


def campaign(runs: int, seed: int) -> Tally:
    tally = Tally()
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        (root / "steps").mkdir()
        steps = learn_steps(root / "steps", seed)
        tally.steps = dict.fromkeys(steps, 0)
        for number in range(runs):
            folder = root / str(number)
            folder.mkdir()
            run(folder, seed * 1_000_003 + number, steps, tally)
            tally.runs += 1
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()
    started = time.monotonic()
    tally = campaign(options.runs, options.seed)
    tried = sum(1 for count in tally.steps.values() if count)
    print(
        f"kills, seed {options.seed}: {tally.runs} runs, {tally.kills} processes killed ({tally.at_step} at a step, "
        f"{tried} of {len(tally.steps)} steps tried), {time.monotonic() - started:.0f} s; "
        f"synced {tally.accepted_least} <= stored {tally.stored} <= counted {tally.accepted_most}"
    )
    for wrong in tally.wrong:
        print(wrong)
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
