from __future__ import annotations

import gzip
import os
import signal
from typing import TYPE_CHECKING

import pytest

from statbuffer._cli import reading
from statbuffer._cli.reading import MAX_LINE, Tally, blocks
from statbuffer._cli.signals import Stop, StopAtOnce

if TYPE_CHECKING:
    from pathlib import Path


def read(*paths: object) -> tuple[list[tuple[str, str]], Tally]:
    """All lines as (file:line, line)."""
    tally = Tally()
    with Stop() as stop:
        found = [
            (block.where(index), line)
            for block in blocks([str(path) for path in paths], tally, stop)
            for index, line in enumerate(block.lines)
        ]
    return found, tally


def lines_of(path: Path, data: bytes) -> list[str]:
    path.write_bytes(data)
    return [line for _, line in read(path)[0]]


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"a", ["a"]),
        (b"a\nb\n", ["a", "b"]),
        (b"a\n\nb", ["a", "", "b"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"a\x0bb\x85\xe2\x80\xa8c\n", ["a\x0bb\udc85\u2028c"]),
        (b"\xff\xfe\n", ["\udcff\udcfe"]),
    ],
)
def test_lines_end_at_newlines_only(tmp_path: Path, data: bytes, lines: list[str]) -> None:
    assert lines_of(tmp_path / "f", data) == lines


def test_gzip_is_known_by_its_content(tmp_path: Path) -> None:
    packed = gzip.compress(b"a\nb\n") + gzip.compress(b"c\n") + b"\0" * 100
    assert lines_of(tmp_path / "plain.log", packed) == ["a", "b", "c"]
    assert lines_of(tmp_path / "plain.gz", b"a\n") == ["a"]
    assert lines_of(tmp_path / "one", b"\x1f") == ["\x1f"]


def test_gzip_is_unpacked_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "READ_BYTES", 7)
    wanted = [f"line {number}" for number in range(500)]
    packed = gzip.compress("".join(f"{line}\n" for line in wanted).encode())
    assert lines_of(tmp_path / "f", packed * 2) == wanted * 2


def test_damaged_gzip_is_said_and_what_came_before_is_read(tmp_path: Path) -> None:
    data = gzip.compress(os.urandom(4096).hex().encode() + b"\nend\n")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"a\n") + data[: len(data) // 2])
    (tmp_path / "bad.gz").write_bytes(gzip.compress(b"a\n") + b"garbage")
    found, tally = read(tmp_path / "cut.gz", tmp_path / "bad.gz")
    assert [line for _, line in found] == ["a", "a"]
    assert len(tally.failed) == 2
    assert "cut.gz: damaged gzip data: it ends in the middle" in tally.failed[0]


def test_an_endless_line_is_bad_and_skipped(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"a\n" + b"x" * (3 * MAX_LINE) + b"\nb\n" + b"y" * (2 * MAX_LINE))
    found, tally = read(path)
    assert found == [(f"{path}:1", "a"), (f"{path}:3", "b")]
    assert (tally.bad, tally.lines) == (2, 2)
    assert tally.examples[0] == f"{path}:2: longer than 1,048,576 bytes"


def test_what_cannot_be_read_does_not_keep_others_from_being_read(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"a\n")
    found, tally = read(tmp_path / "missing", tmp_path, tmp_path / "there")
    assert [line for _, line in found] == ["a"]
    assert tally.failed == [f"{tmp_path / 'missing'}: No such file or directory", f"{tmp_path}: Is a directory"]
    assert tally.total_bytes is None or tally.total_bytes >= 2


def test_bytes_are_counted_as_they_are_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(gzip.compress(b"a\n" * 1000))
    _, tally = read(path)
    assert tally.read_bytes == tally.total_bytes == path.stat().st_size


def test_a_signal_ends_reading_before_the_next_block_and_a_second_one_at_once(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"a\n")
    tally = Tally()
    with Stop() as stop:
        before = signal.getsignal(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert list(blocks([str(tmp_path / "f")], tally, stop)) == []
        assert stop.signal == signal.SIGTERM
        with pytest.raises(StopAtOnce):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) != before
