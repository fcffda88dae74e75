"""A model of a power cut, for programs that write files.

A child process runs with a preloaded library (`recorder.c`) that logs, in their order, the calls by which it and its
own children change the files below one directory, the root. From that log the disk can be built again as a power cut
just before any operation may have left it, and what the program promised held against what is there.

The model, for a cut before operation number `at`:

- Names are ordered and durable: every Create, Unlink, Rename and Mkdir before the cut is there. That is ext4, which
  journals metadata in order, with its commit falling on the cut. SyncDirectory is recorded, and changes nothing here.
- What a file holds is durable up to its latest Sync before the cut, whatever name it had then. Of the writes and
  truncations that came later each is kept whole, dropped, or, a write, torn at a boundary of 512 bytes with one side
  of it kept; what is kept is applied in order. Sometimes all are dropped, sometimes all are kept. So a file that was
  created and never synced may be empty, also when it was renamed over one that was full.
- A hole reads as zeros, and so does what a dropped write would have filled below a later one.

The program marks the points that matter by appending to the file `<root>.marks`, unbuffered: each write to it is a
Mark in the same order, as in

    marks = os.open(os.environ["RECORDER_ROOT"] + ".marks", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(marks, b"the first row is committed")

Files that end in "-shm" are left out: SQLite maps them, and builds them anew.

Its limits:

- The root is empty when the recording starts: what was there before is not known.
- A lost directory entry is not modelled: forgetting to sync a directory goes unpunished.
- Sectors are written whole or not at all, what was synced stays, and a dropped write leaves no size behind it.
- Writes are seen where they pass libc's own functions by name. Those of stdio (fopen, fwrite), of io_uring and of
  bare system calls are not; `image` of all operations compared with the root shows whether anything was missed.
- Writable shared maps, sendfile, copy_file_range, hard and symbolic links, holes punched, and renames that exchange or
  cross the border of the root are seen, not modelled: `load` refuses such a log.
- The order is exact within a process. Of processes that write at once to the same file it may be wrong.
- A child that is killed may have done one operation that is not in the log.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

SECTOR = 512
_HEAD = struct.Struct("=cQII")


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes written to a file. A path is relative to the root, here and below."""

    path: str
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Truncate:
    """A file set to a size, smaller or larger."""

    path: str
    size: int


@dataclass(frozen=True, slots=True)
class Create:
    """A file that was not there before."""

    path: str


@dataclass(frozen=True, slots=True)
class Unlink:
    """A file or an empty directory removed."""

    path: str


@dataclass(frozen=True, slots=True)
class Rename:
    """A file or a directory with all it holds renamed, over what had the new name."""

    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Mkdir:
    """A directory made."""

    path: str


@dataclass(frozen=True, slots=True)
class Sync:
    """An fsync or fdatasync of a file that returned, or a write to one opened with O_SYNC or O_DSYNC."""

    path: str


@dataclass(frozen=True, slots=True)
class SyncDirectory:
    """An fsync of a directory that returned; "." is the root."""

    path: str


@dataclass(frozen=True, slots=True)
class Mark:
    """What the program wrote to `<root>.marks`."""

    data: bytes


Operation: TypeAlias = Write | Truncate | Create | Unlink | Rename | Mkdir | Sync | SyncDirectory | Mark


def missing() -> str | None:
    """Why nothing can be recorded here, or None when it can."""
    if sys.platform != "linux" or not Path("/proc/self/fd").is_dir():
        return "power cuts are recorded on Linux only, with /proc"
    if sys.maxsize < 2**32:
        return "power cuts are recorded by 64-bit programs only"
    if shutil.which("cc") is None:
        return "power cuts need a C compiler, cc"
    return None


def build(folder: Path) -> Path:
    """Compile the library into the folder."""
    library = folder / "recorder.so"
    source = Path(__file__).with_name("recorder.c")
    command = ["cc", "-shared", "-fPIC", "-O1", "-pthread", "-o", str(library), str(source), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr}")
    return library


def environment(library: Path, root: Path, log: Path) -> dict[str, str]:
    """The environment of a child whose changes below `root` are recorded in `log`: this one's, and what is needed."""
    library, root, log = library.resolve(), root.resolve(), log.resolve()
    if log.is_relative_to(root):
        raise ValueError(f"the log lies in the root, and would record itself: {log}")
    if set(str(library)) & set(" :"):
        raise ValueError(f"LD_PRELOAD can't hold a path with a space or a colon: {library}")
    preload = " ".join(filter(None, [str(library), os.environ.get("LD_PRELOAD")]))
    return {**os.environ, "LD_PRELOAD": preload, "RECORDER_ROOT": str(root), "RECORDER_LOG": str(log)}


def load(log: Path) -> list[Operation]:
    """The operations in a log, in their order. A last record cut short is one that its program was killed in."""
    content = log.read_bytes() if log.exists() else b""
    operations: list[Operation] = []
    at = 0
    while at + _HEAD.size <= len(content):
        kind, number, a_size, b_size = _HEAD.unpack_from(content, at)
        start = at + _HEAD.size
        at = start + a_size + b_size
        if at > len(content):
            break
        operations.append(_operation(kind, number, content[start : start + a_size], content[start + a_size : at]))
    return operations


def _operation(kind: bytes, number: int, a: bytes, b: bytes) -> Operation:
    path = os.fsdecode(a)
    plain: dict[bytes, type[Create | Unlink | Mkdir | Sync | SyncDirectory]]
    plain = {b"C": Create, b"U": Unlink, b"M": Mkdir, b"S": Sync, b"D": SyncDirectory}
    if kind in plain:
        return plain[kind](path)
    if kind == b"W":
        return Write(path, number, b)
    if kind == b"T":
        return Truncate(path, number)
    if kind == b"R":
        return Rename(path, os.fsdecode(b))
    if kind == b"K":
        return Mark(b)
    if kind == b"X":
        raise ValueError(f"{path}: the model doesn't know {b.decode()}, which the program did to it")
    raise ValueError(f"not a log of the recorder: a record of kind {kind!r}")


def marks(operations: Sequence[Operation], at: int) -> list[bytes]:
    """What was marked before operation number `at`."""
    return [operation.data for operation in operations[:at] if isinstance(operation, Mark)]


def crash_image(operations: Sequence[Operation], at: int, rng: random.Random, target: Path) -> None:
    """Build in `target`, a new or empty folder, the disk as a power cut just before operation `at` may leave it."""
    disk = _Disk.after(operations[:at])
    for _, file in sorted(disk.files.items()):
        file.cut(rng)
    disk.save(target)


def image(operations: Sequence[Operation], target: Path) -> None:
    """Build in `target`, a new or empty folder, the disk with nothing lost: what the root itself looks like."""
    disk = _Disk.after(operations)
    for file in disk.files.values():
        file.sync()
    disk.save(target)


@dataclass(slots=True)
class _File:
    """One file, whatever its name: what it surely holds, and what was done to it since."""

    content: bytearray = field(default_factory=bytearray)
    pending: list[Write | Truncate] = field(default_factory=list)

    def sync(self) -> None:
        for change in self.pending:
            self._apply(change)
        self.pending.clear()

    def cut(self, rng: random.Random) -> None:
        fate = rng.random()
        if fate < 0.25:
            self.pending.clear()
        elif fate >= 0.5:
            self.pending = [kept for change in self.pending if (kept := _cut(change, rng)) is not None]
        self.sync()

    def _apply(self, change: Write | Truncate) -> None:
        if isinstance(change, Truncate):
            del self.content[change.size :]
            self._fill(change.size)
        else:
            self._fill(change.offset)
            self.content[change.offset : change.offset + len(change.data)] = change.data

    def _fill(self, size: int) -> None:
        self.content.extend(bytes(max(0, size - len(self.content))))


def _cut(change: Write | Truncate, rng: random.Random) -> Write | Truncate | None:
    """What is left of one change. One that can't be torn, as it lies in one sector, is kept or dropped."""
    fate = rng.choices(["kept", "dropped", "head", "tail"], [4, 4, 1, 1])[0]
    if fate == "kept":
        return change
    if fate == "dropped":
        return None
    if isinstance(change, Truncate):
        return change if fate == "head" else None
    end = change.offset + len(change.data)
    boundaries = range((change.offset // SECTOR + 1) * SECTOR, end, SECTOR)
    if not boundaries:
        return change if fate == "head" else None
    size = rng.choice(boundaries) - change.offset
    if fate == "head":
        return Write(change.path, change.offset, change.data[:size])
    return Write(change.path, change.offset + size, change.data[size:])


class _Disk:
    """The files and directories, by name."""

    def __init__(self) -> None:
        self.files: dict[str, _File] = {}
        self.directories: set[str] = set()

    @classmethod
    def after(cls, operations: Sequence[Operation]) -> _Disk:
        disk = cls()
        for operation in operations:
            disk._apply(operation)
        return disk

    def _apply(self, operation: Operation) -> None:
        match operation:
            case Write(path) | Truncate(path):
                self._file(path).pending.append(operation)
            case Sync(path):
                self._file(path).sync()
            case Create(path):
                self.files[path] = _File()
            case Unlink(path):
                self.files.pop(path, None)
                self.directories.discard(path)
            case Mkdir(path):
                self.directories.add(path)
            case Rename(old, new):
                self._rename(old, new)

    def _file(self, path: str) -> _File:
        if path not in self.files:
            raise ValueError(f"{path}: written, yet never created: the root must be empty when the recording starts")
        return self.files[path]

    def _rename(self, old: str, new: str) -> None:
        if old in self.files:
            self.files[new] = self.files.pop(old)
            return
        if old not in self.directories:
            raise ValueError(f"{old}: renamed, yet never created: the root must be empty when the recording starts")

        def moved(path: str) -> str:
            return new + path[len(old) :] if path == old or path.startswith(f"{old}/") else path

        self.files = {moved(path): file for path, file in self.files.items()}
        self.directories = {moved(path) for path in self.directories}

    def save(self, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        if any(target.iterdir()):
            raise ValueError(f"the target is not empty: {target}")
        for path in sorted(self.directories):
            (target / path).mkdir(parents=True, exist_ok=True)
        for path, file in self.files.items():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_bytes(file.content)
