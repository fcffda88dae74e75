from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REAL_LOG = Path(__file__).parents[3] / "shared" / "data" / "access.log.gz"

LINE = (
    '{host} - {user} [17/May/2015:10:05:03 +0000] "{method} {path} HTTP/1.1" {status} {size} '
    '"http://example.com/" "Mozilla/5.0 \\"quoted\\" agent"'
)


def log_line(path: str = "/", **parts: Any) -> str:
    """A line of the combined log format."""
    known = {"host": "10.0.0.1", "user": "-", "method": "GET", "status": 200, "size": 512}
    return LINE.format(path=path, **{**known, **parts})


@pytest.fixture
def real_log() -> Path:
    if not REAL_LOG.exists():
        pytest.skip(f"{REAL_LOG} is not here")
    return REAL_LOG


@dataclass
class Store:
    """A SQLite file, read behind the command's back."""

    path: Path

    @property
    def url(self) -> str:
        return f"sqlite:///{self.path}"

    def rows(self, table: str = "counters") -> dict[Any, int]:
        if not self.path.exists():
            return {}
        with closing(sqlite3.connect(self.path)) as connection:
            try:
                found = connection.execute(f'SELECT * FROM "{table}"').fetchall()
            except sqlite3.OperationalError:
                return {}
        return {row[0] if len(row) == 2 else row[:-1]: row[-1] for row in found}

    def total(self, table: str = "counters") -> int:
        return sum(self.rows(table).values())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store.db")


@dataclass
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command in this process."""

    def call(*arguments: object) -> Ran:
        from statbuffer._cli.verbs import app

        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            app([str(argument) for argument in arguments], prog_name="statbuffer")
        said = capfd.readouterr()
        return Ran(int(exit_.value.code or 0), said.out, said.err)

    return call


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start the command as users do."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "statbuffer.cli", *map(str, arguments)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm"}
        process = subprocess.Popen(command, env=environment, **{**pipes, **options})
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None and not pipe.closed:
                with suppress(BrokenPipeError):
                    pipe.close()


def wait_until(true: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
