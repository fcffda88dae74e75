"""The directory of a journal: what lies where, who may use it, and the two locks.

    live/journal.sqlite3   the file, with SQLite's -wal and -shm beside it; made and set aside by one rename of `live`
    relay.lock             held by the one process of the host that delivers
    users.lock             held, shared, by every process that has the journal open
    suspect                somebody met damage: whoever delivers is to check the file
    damaged-*              a file that was set aside, and `salvaged` in it once all that can be read is in the live one
    kept-*                 a copy of a file whose write-ahead log was cut short

The locks are flock's: the kernel frees them when their holder dies, whatever it dies of, and each open of the file has its
own, so two buffers of one process exclude each other as two processes do. A forked child shares its parent's: it must close
them (`forget`), not unlock them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from statbuffer._errors import NotApplied, SinkError

if TYPE_CHECKING:
    from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_REMOTE: Final = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "ceph",
    "glusterfs",
    "fuse.sshfs",
    "fuse.glusterfs",
    "afs",
}
"""File systems on which several hosts may write: SQLite's WAL needs memory that all writers share."""


class Lock:
    """One flock on one file. Any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None
        self._guard = threading.RLock()

    @property
    def held(self) -> bool:
        """Whether this object holds the lock, on the file that is there now."""
        with self._guard:
            if self._fd is None:
                return False
            try:
                if os.stat(self._path).st_ino == os.fstat(self._fd).st_ino:  # noqa: PTH116  # asked at every step
                    return True
            except FileNotFoundError:
                pass
            self.release()  # somebody has deleted the directory: others would lock another file
            return False

    def take(self, *, shared: bool = False, wait: bool = False) -> bool:
        """Take the lock, or change it to this kind; return whether that succeeded."""
        with self._guard:
            fd = self._fd if self.held else None
            if fd is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            except OSError as error:
                if self._fd is None:
                    os.close(fd)
                if isinstance(error, BlockingIOError):
                    return False
                raise
            self._fd = fd
            return True

    def release(self) -> None:
        """Let others have it."""
        with self._guard:
            fd, self._fd = self._fd, None
            if fd is not None:
                os.close(fd)

    def forget(self) -> None:
        """Let go of the parent's share, in a forked child: the lock stays the parent's."""
        self._guard = threading.RLock()
        self.release()


class Directory:
    """The paths of one journal. Nothing is touched before `prepare()`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(path))  # noqa: PTH100  # a later chdir must not move it; resolve() would follow links
        self.live = self.path / "live"
        self.file = self.live / "journal.sqlite3"
        self.suspect = self.path / "suspect"
        self.relay_lock = Lock(self.path / "relay.lock")
        self.users_lock = Lock(self.path / "users.lock")

    def __str__(self) -> str:
        return str(self.path)

    def prepare(self) -> None:
        """Make the directory if it is missing, and look whether it can hold a journal. Raises `SinkError`, `NotApplied`."""
        if fcntl is None:
            raise SinkError(
                f"journal {self}: this system has no flock, on which the journal relies; run without a journal"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise SinkError(
                f"journal {self}: expected a directory, found a file on the way; name another path"
            ) from None
        except PermissionError:
            raise SinkError(f"journal {self}: it can't be made, {_whose(self.path.parent)}") from None
        except OSError as error:
            raise NotApplied(f"journal {self}: it can't be made: {error}") from error
        for path in (self.path, self.live, self.file):
            if path.exists() and not os.access(path, os.R_OK | os.W_OK | (os.X_OK if path.is_dir() else 0)):
                raise SinkError(f"journal {self}: {path} can't be written, {_whose(path)}")
        kind = _file_system(self.path)
        if kind in _REMOTE:
            raise SinkError(
                f"journal {self}: it lies on {kind}, which hosts share; a journal needs a disk of its own host"
            )
        try:
            if not self.users_lock.held:
                self.users_lock.take(shared=True, wait=True)
        except OSError as error:
            raise SinkError(f"journal {self}: users.lock can't be locked: {error}") from error

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Keep everybody else from opening the journal meanwhile; False if somebody has it open."""
        alone = self.users_lock.take()
        try:
            yield alone
        finally:
            self.users_lock.take(shared=True, wait=True)

    def set_aside(self) -> Path:
        """Move the live file out of the way, with all that belongs to it, in one step. The relay's lock is held."""
        return self.live.rename(self.unused("damaged"))

    def keep_copy(self) -> Path:
        """Keep a copy of the live file, for whoever wants to look into it. No connection of this process is open.

        (POSIX locks: to close any descriptor of a file lets go of all locks that the process has on it, SQLite's too.)
        """
        copy = self.unused("kept")
        shutil.copytree(self.live, copy)
        return copy

    def unused(self, prefix: str) -> Path:
        """Return a path that begins with this and the time."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        names = (self.path / f"{prefix}-{stamp}{f'-{n}' if n else ''}" for n in range(10_000))
        return next(path for path in names if not path.exists())

    def to_salvage(self) -> list[Path]:
        """Return what was set aside and not yet read."""
        return sorted(path for path in self.path.glob("damaged-*") if not (path / "salvaged").exists())

    def bytes_on_disk(self) -> int:
        """Return the size of the live file and SQLite's own beside it."""
        sizes = (self.file, self.live / "journal.sqlite3-wal")
        return sum(path.stat().st_size for path in sizes if path.exists())

    def sync(self) -> None:
        """Have the directory's entries on the disk."""
        for path in (self.path, self.path.parent):
            with contextlib.suppress(OSError):  # not ours to sync, or a file system that can't
                fd = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)

    def forget(self) -> None:
        """Let go of both locks, in a forked child that inherited them."""
        self.relay_lock.forget()
        self.users_lock.forget()

    def close(self) -> None:
        """Let go of both locks."""
        self.relay_lock.release()
        self.users_lock.release()


def _whose(path: Path) -> str:
    """Say who may write there and who we are."""
    while not path.exists():
        path = path.parent
    found = path.stat()
    try:
        import pwd

        owner, own = pwd.getpwuid(found.st_uid).pw_name, pwd.getpwuid(os.geteuid()).pw_name
    except (ImportError, KeyError):
        owner, own = str(found.st_uid), str(os.geteuid())
    return (
        f"{path} belongs to {owner} with mode {found.st_mode & 0o777:o} and this process runs as {own}; "
        "give it a directory of its own, or mend the permissions"
    )


def _file_system(path: Path) -> str:
    """Return the type of the file system, as Linux tells it; an empty string elsewhere."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    real = os.path.realpath(path)
    best, kind = "", ""
    for line in mounts:
        fields, _, source = line.partition(" - ")
        point = fields.split()[4].encode().decode("unicode_escape", errors="replace")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, source.split()[0]
    return kind
