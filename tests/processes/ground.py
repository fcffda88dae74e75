"""One folder with a store, perhaps a journal, and the processes that count into them."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import statbuffer

if TYPE_CHECKING:
    from collections.abc import Callable

HEAD = """\
import os, signal, sys, threading, time
from inside import *
"""


class Ground:
    """Starts processes, ends them all at the end, and compares the sums."""

    def __init__(self, path: Path, *, journal: bool) -> None:
        self.path = path
        self.journal = path / "journal" if journal else None
        self._started: list[subprocess.Popen[bytes]] = []
        self._files = 0

    # Processes

    def environment(self) -> dict[str, str]:
        here = [Path(__file__).parent, Path(statbuffer.__file__).parent.parent, self.path]
        paths = [str(path) for path in here] + [os.environ.get("PYTHONPATH", "")]
        mine = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "GROUND": str(self.path), "PYTHONUNBUFFERED": "1"}
        return os.environ | mine | {"GROUND_JOURNAL": str(self.journal or "")}

    def write(self, name: str, code: str, *, first: str = "") -> Path:
        file = self.path / name
        file.write_text(first + "\n" + HEAD + textwrap.dedent(code))
        return file

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start Python with these arguments, in a process group of its own; its outputs go to `log()`."""
        self._files += 1
        with (self.path / f"log-{self._files}").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env=self.environment(),
                cwd=self.path,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def start_script(self, code: str, *, first: str = "") -> subprocess.Popen[bytes]:
        """Start a script; `first` comes before statbuffer is imported."""
        return self.start(str(self.write(f"script_{self._files + 1}.py", code, first=first)))

    def run(self, code: str, *, first: str = "", check: int = 0, traceback: bool = False) -> None:
        """Run a script to its end; the code that it must end with, and whether it may complain on its way."""
        self.finish(self.start_script(code, first=first), check=check, traceback=traceback)

    def finish(self, process: subprocess.Popen[bytes], *, check: int = 0, traceback: bool = False) -> None:
        found = process.wait(timeout=58)
        assert found == check, f"ended with {found}\n{self.log()}"
        assert traceback or "Traceback" not in self.log(), self.log()

    def log(self) -> str:
        return "\n".join(file.read_text(errors="replace") for file in sorted(self.path.glob("log-*")))

    def close(self) -> None:
        """Kill what still runs."""
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):  # the group outlives its leader while it has members
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=10)

    # Sums

    def accepted(self) -> Counter[str]:
        """What the processes said they had counted."""
        return self._sums("accepted")

    def _sums(self, name: str) -> Counter[str]:
        file, sums = self.path / name, Counter[str]()
        for line in file.read_text().splitlines() if file.exists() else []:
            key, number = line.rsplit(" ", 1)
            sums[key] += int(number)
        return sums

    def stored(self) -> Counter[str]:
        """What is in the stores: the SQLite file and the plain one."""
        sums = self._sums("lines")
        file = self.path / "store.db"
        if file.exists():
            with contextlib.closing(sqlite3.connect(file, timeout=10)) as connection:
                if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'counters'").fetchone():
                    sums.update(dict(connection.execute("SELECT key, count FROM counters").fetchall()))
        return sums

    def waiting(self) -> int:
        """The sum of what is in the journal and not stored."""
        file = (self.journal or self.path) / "live" / "journal.sqlite3"
        if not file.exists():
            return 0
        with contextlib.closing(sqlite3.connect(file, timeout=10)) as connection:
            return sum(int(total) for (total,) in connection.execute("SELECT total FROM moves"))

    def adopt(self, buffer: str = "make()") -> None:
        """What the next process that opens the journal does: deliver what others have left in it."""
        if self.journal is not None:
            before = self.waiting()
            self.run(f"views = {buffer}.start(); views.stop(30)", traceback=True)
            assert self.waiting() == 0, f"{before} waited, {self.waiting()} still do\n{self.log()}"

    def assert_exact(self) -> None:
        """All have ended: what was accepted is what is stored, key by key."""
        self.adopt("Lines()" if (self.path / "lines").exists() else "make()")
        accepted, stored = self.accepted(), self.stored()
        assert accepted, "nothing was counted"
        assert stored == accepted, f"lost {accepted - stored}, too many {stored - accepted}\n{self.log()[-5000:]}"


def eventually(condition: Callable[[], Any], seconds: float, what: str = "") -> Any:
    """Poll until something is so, and return it."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    """The living children of a process; empty where the system does not tell."""
    try:
        names = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(name) for name in names if _lives(int(name))]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
