"""From files and pipes to blocks of whole lines, as they come.

A block is what one read gives: a pipe that trickles is read line by line, a file by the quarter megabyte. Memory is
bounded by one block and one line, and a line by `MAX_LINE`.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from statbuffer._cli.signals import Stop

READ_BYTES: Final = 256 * 1024
MAX_LINE: Final = 1024 * 1024
"""Bytes. What is longer is a bad line and skipped: no input can fill the memory."""

_EXAMPLES: Final = 5
_STDIN: Final = 0
_GZIP_MAGIC: Final = b"\x1f\x8b"
_GZIP_FORMAT: Final = 16 + zlib.MAX_WBITS


@dataclass
class Tally:
    """How far the reading is. The main thread writes, the display reads."""

    files: int = 1
    total_bytes: int | None = None
    """None: a pipe is among the input."""
    read_bytes: int = 0
    """As read, compressed or not."""
    name: str = ""
    lines: int = 0
    counted: int = 0
    """Lines whose increment the buffer accepted."""
    bad: int = 0
    uncounted: int = 0
    """Good lines that found no room in a full buffer before the time was up."""
    examples: list[str] = field(default_factory=list)
    """The first bad lines, as `file:line: why`."""
    failed: list[str] = field(default_factory=list)
    """Input that could not be read, and why."""

    def note_bad(self, where: str, why: object) -> None:
        """Count a bad line."""
        self.bad += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{where}: {why}")


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive lines of one file, without their ends."""

    name: str
    first: int
    """Number of the first line, from 1."""
    lines: list[str]

    def where(self, index: int) -> str:
        """Return `file:line` of a line of this block."""
        return f"{self.name}:{self.first + index}"


def blocks(paths: list[str], tally: Tally, stop: Stop) -> Iterator[Block]:
    """Yield all lines of all files; "-" is standard input. Ends early when a signal asks for it.

    What can't be read is noted in `tally.failed`, and the next file is read.
    """
    tally.files, tally.total_bytes = len(paths), _total_bytes(paths)
    for path in paths:
        if stop.asked:
            return
        tally.name = "standard input" if path == "-" else path
        try:
            yield from _file_blocks(path, tally, stop)
        except OSError as error:
            tally.failed.append(f"{tally.name}: {error.strerror or error}")
        except (zlib.error, EOFError) as error:
            if not stop.asked:
                tally.failed.append(f"{tally.name}: damaged gzip data: {error}; what came before is counted")


def _total_bytes(paths: list[str]) -> int | None:
    total = 0
    for path in paths:
        try:
            found = os.fstat(_STDIN) if path == "-" else Path(path).stat()
        except (OSError, ValueError):
            continue
        if not stat.S_ISREG(found.st_mode):
            return None
        total += found.st_size
    return total


def _file_blocks(path: str, tally: Tally, stop: Stop) -> Iterator[Block]:
    if path == "-" and sys.stdin is None:  # closed by our parent; the number may stand for another file by now
        raise OSError(errno.EBADF, "is closed")
    # O_NONBLOCK: to open a FIFO that nobody writes to would wait where no signal is heard
    fd = _STDIN if path == "-" else os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield from _line_blocks(_unpacked(_chunks(fd, tally, stop)), tally, stop)
    finally:
        if path != "-":
            os.close(fd)


def _chunks(fd: int, tally: Tally, stop: Stop) -> Iterator[bytes]:
    waits = not stat.S_ISREG(os.fstat(fd).st_mode)
    while not stop.asked:
        if waits and not stop.wait_for_input(fd):
            return
        try:
            chunk = os.read(fd, READ_BYTES)
        except BlockingIOError:  # another reader of the same pipe was faster
            continue
        if not chunk:
            return
        tally.read_bytes += len(chunk)
        yield chunk


def _unpacked(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Unpack gzip, which its first two bytes tell, whatever the name says; pass on anything else."""
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) < len(_GZIP_MAGIC):
            continue
        if head.startswith(_GZIP_MAGIC):
            yield from _gunzipped(head, chunks)
        else:
            yield head
            yield from chunks
        return
    if head:
        yield head


def _gunzipped(head: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Unpack one member after the other, as `gzip` does; a block of output is bounded, however well it was packed."""
    member = zlib.decompressobj(_GZIP_FORMAT)
    packed = head
    while True:
        unpacked = member.decompress(packed, READ_BYTES)
        if unpacked:
            yield unpacked
        packed = member.unused_data.lstrip(b"\0") if member.eof else member.unconsumed_tail
        if not packed and not unpacked:
            packed = next(chunks, b"")
            if member.eof:
                packed = packed.lstrip(b"\0")  # tapes and block devices are padded
            if not packed:
                break
        if member.eof and packed:
            member = zlib.decompressobj(_GZIP_FORMAT)
    if not member.eof:
        raise EOFError("it ends in the middle")


def _line_blocks(chunks: Iterator[bytes], tally: Tally, stop: Stop) -> Iterator[Block]:
    number, rest, skipping = 1, b"", False
    for chunk in chunks:
        data = rest + chunk
        end = data.rfind(b"\n") + 1
        whole, rest = data[:end], data[end:]
        if skipping and whole:
            whole, skipping = whole[whole.index(b"\n") + 1 :], False
        if whole:
            lines = _decoded(whole[:-1])
            yield Block(tally.name, number, lines)
            number += len(lines)
        if len(rest) > MAX_LINE or skipping:
            if not skipping:
                tally.lines += 1
                tally.note_bad(f"{tally.name}:{number}", f"longer than {MAX_LINE:,} bytes")
                number, skipping = number + 1, True
            rest = b""
    if rest and not skipping and not stop.asked:  # asked to stop: the rest of that line has not come yet
        yield Block(tally.name, number, _decoded(rest))


def _decoded(data: bytes) -> list[str]:
    text = data.decode("utf-8", "surrogateescape")
    if "\r" in text:
        text = text.replace("\r\n", "\n").removesuffix("\r")
    return text.split("\n")
