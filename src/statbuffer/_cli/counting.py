"""From blocks of lines to the buffer, and to the end of it.

What a line becomes is always known: it is counted (the buffer has accepted its increment, and its books say where that
is), bad, or, only when a full buffer can't be emptied before the time is up, uncounted.
"""

from __future__ import annotations

import operator
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from statbuffer import BufferFull, StatBuffer
from statbuffer._cli.keys import BadLine
from statbuffer._cli.reading import Block, Tally, blocks
from statbuffer._cli.signals import Stop, StopAtOnce

if TYPE_CHECKING:
    from collections.abc import Hashable

    from statbuffer import Stats, StopReport
    from statbuffer._cli.keys import Picker
    from statbuffer.sinks import Sink

LOOK_UP: Final = 0.2
"""Seconds between looks at the signals while a full buffer waits for its store."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run has ended."""

    tally: Tally
    stats: Stats
    report: StopReport
    seconds: float
    stopped_by: int | None
    at_once: bool
    """A second signal came: lines that were read last may be uncounted."""

    @property
    def undelivered(self) -> bool:
        """Whether something that was read is not in the store."""
        return not self.report.complete or self.tally.uncounted > 0 or self.at_once


class Run:
    """One count of some files into one sink. `buffer` and `tally` are there for a display to look at."""

    def __init__(
        self, sink: Sink, picker: Picker, stop: Stop, *, interval: float, shutdown: float, max_keys: int
    ) -> None:
        self.buffer = StatBuffer(
            sink, interval=interval, max_keys=max_keys, on_full="block", full_timeout=LOOK_UP, shutdown=shutdown
        )
        self.tally = Tally()
        self._picker = picker
        self._stop = stop

    def count(self, paths: list[str]) -> Outcome:
        """Count all files. Raises `SinkError` before anything is read if the store can't be used."""
        started = time.monotonic()
        at_once = False
        self.buffer.start()
        try:
            for block in blocks(paths, self.tally, self._stop):
                self._count_block(block)
            self.buffer.stop()
        except StopAtOnce:
            at_once = True
        finally:
            report = self.buffer.stop(0)  # delivers nothing more; tells what is left
        seconds = time.monotonic() - started
        return Outcome(self.tally, self.buffer.stats(), report, seconds, self._stop.signal, at_once)

    def _count_block(self, block: Block) -> None:
        pick, amount_of = self._picker.key, self._picker.amount
        keys: list[Hashable] = []
        amounts: list[int] = []
        indexes: list[int] = []
        for index, line in enumerate(block.lines):
            try:
                key = pick(line)
                if amount_of is not None:
                    amounts.append(amount_of(line))
            except BadLine as error:
                self.tally.note_bad(block.where(index), error)
                continue
            keys.append(key)
            indexes.append(index)
        self.tally.lines += len(block.lines)
        if amount_of is None:
            self._update(block, keys, indexes)
        else:
            self._increment(block, keys, amounts, indexes)

    def _update(self, block: Block, keys: list[Hashable], indexes: list[int]) -> None:
        """Count keys by `update`; where it raises, the iterator tells at which key, and the next round goes on there."""
        at = 0
        while at < len(keys):
            rest = iter(keys[at:] if at else keys)
            try:
                self.buffer.update(rest)
            except BufferFull:
                at = self._note_counted(keys, at, rest, tried=1)
                if self._must_give_up():
                    self.tally.uncounted += len(keys) - at
                    return
            except (TypeError, OverflowError) as error:
                at = self._note_counted(keys, at, rest, tried=1) + 1
                self.tally.note_bad(block.where(indexes[at - 1]), error)
            else:
                at = self._note_counted(keys, at, rest, tried=0)

    def _note_counted(self, keys: list[Hashable], at: int, rest: object, *, tried: int) -> int:
        reached = len(keys) - operator.length_hint(rest) - tried
        self.tally.counted += reached - at
        return reached

    def _increment(self, block: Block, keys: list[Hashable], amounts: list[int], indexes: list[int]) -> None:
        increment = self.buffer.increment
        at = 0
        while at < len(keys):
            try:
                increment(keys[at], amounts[at])
            except BufferFull:
                if self._must_give_up():
                    self.tally.uncounted += len(keys) - at
                    return
                continue
            except (TypeError, OverflowError) as error:
                self.tally.note_bad(block.where(indexes[at]), error)
            else:
                self.tally.counted += 1
            at += 1

    def _must_give_up(self) -> bool:
        """Whether a full buffer has had its time to empty since somebody asked to stop. Until then it has all the time."""
        shutdown = self.buffer.options.shutdown
        assert shutdown is not None
        return self._stop.since is not None and time.monotonic() > self._stop.since + shutdown
