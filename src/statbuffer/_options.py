"""The options of a buffer: one frozen value in which nothing wrong can be."""

from __future__ import annotations

import dataclasses
import difflib
import os
import random
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from statbuffer._errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Hashable

Restart = Literal["transient", "temporary", "permanent"]
OnFull = Literal["raise", "block", "fold"]

_SECONDS = ("interval", "jitter", "timeout", "backoff", "sync_interval")
_SECONDS_OR_NONE = ("shutdown", "full_timeout")
_WHOLE = {"max_attempts": 1, "batch_keys": 1, "workers": 1, "max_keys": 1, "journal_bytes_max": 2**20}
_CHOICES = {"restart": ("transient", "temporary", "permanent"), "on_full": ("raise", "block", "fold")}

_TICKS_PER_INTERVAL = 50
_LONGEST = 1e9  # seconds: thirty years, and what every clock and lock of Python can still wait for
_MOVE_KEYS = 50_000  # keys in one move to a journal: about a megabyte
_TICK_MIN, _TICK_MAX = 0.001, 0.1


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a buffer behaves. Times are seconds (float, int or `timedelta`); a wrong value raises `OptionError`."""

    interval: float = 5.0
    """Seconds from a key's first increment until it is due. Longer: fewer writes; shorter: fresher rows, less at stake."""

    jitter: float = 0.0
    """Up to this many seconds, drawn uniformly, are added to each key's interval, so that hosts don't write in step."""

    timeout: float = 10.0
    """Seconds without work after which the flusher thread ends and the table's memory is given back."""

    backoff: float = 1.0
    """Seconds before a failed delivery is tried again; doubled at each further failure, up to 60 s."""

    restart: Restart = "transient"
    """What becomes of a batch that fails. "transient": tried for ever, ever more slowly. "permanent": tried for ever,
    each `backoff` seconds. "temporary": one try, then dropped and counted in `stats().dropped`."""

    shutdown: float | None = 5.0
    """Seconds that `stop()` may take at exit. None: as long as it takes. 0: at once, delivering nothing."""

    max_attempts: int = 4
    """Failures in a row after which `stats().failing` is true and the log says ERROR. Nothing is dropped by it."""

    batch_keys: int = 10_000
    """Keys in one batch at most. More: fewer transactions for the same keys; a batch's rows are sorted and encoded in one
    go, in which no other Python thread runs (about 15 ms for 10,000 keys)."""

    workers: int = 8
    """Threads that call `handle_flush`, for a callback sink. 1: one call after the other."""

    max_keys: int = 1_000_000
    """Distinct pending keys (about 100 bytes each, beside the key). At the bound `on_full` decides on a new key."""

    on_full: OnFull = "raise"
    """What a new key meets in a full table. "raise": `BufferFull`. "block": the caller waits for room. "fold": its count
    goes to `overflow_key`. A key that is pending already is always accepted; a full buffer is flushed ahead of time."""

    full_timeout: float | None = None
    """With on_full="block": seconds to wait for room before `BufferFull` is raised. None: as long as it takes."""

    overflow_key: Hashable = "__overflow__"
    """With on_full="fold": the key that takes the counts of the keys that found no room. Your sink must hold it."""

    journal: str | os.PathLike[str] | None = None
    """A directory on a local disk where counts wait for the store, for all processes of this host that name it. With it,
    `kill -9` loses at most the last `sync_interval`, and the host makes one write a key and interval. None: no journal."""

    sync_interval: float = 0.1
    """With a journal: seconds from a key's first increment until it is moved there. `interval` counts from then on."""

    fsync: bool = True
    """With a journal: whether each move waits for the disk. False: a power cut may lose the last moves; `kill -9` does not."""

    journal_bytes_max: int = 2**30
    """With a journal: the most it may hold. At the bound counts stay in memory, up to `max_keys`."""

    def __post_init__(self) -> None:
        for name in _SECONDS:
            object.__setattr__(self, name, _seconds(name, getattr(self, name)))
        for name in _SECONDS_OR_NONE:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _seconds(name, getattr(self, name), or_none=True))
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionError(name, value, f"a whole number of at least {least}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise OptionError(name, getattr(self, name), " or ".join(map(repr, choices)))
        try:
            hash(self.overflow_key)
        except TypeError:
            raise OptionError("overflow_key", self.overflow_key, "a hashable key") from None
        _require_journal(self.journal, self.fsync)

    def replace(self, **changes: Any) -> Options:
        """Return a copy with these options changed. An unknown name raises `OptionError`, with the nearest known one."""
        known = [field.name for field in dataclasses.fields(self)]
        for name, value in changes.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"
                raise OptionError(name, value, f"a known option; {hint}")
        return dataclasses.replace(self, **changes)

    @property
    def until_journal(self) -> Options:
        """What holds between a buffer and its journal: fewer waits for the disk; one that fails is tried again soon."""
        return dataclasses.replace(
            self,
            interval=self.sync_interval,
            jitter=0.0,
            restart="transient",
            backoff=min(self.backoff, 1.0),
            batch_keys=max(self.batch_keys, _MOVE_KEYS),
        )

    @property
    def tick(self) -> float:
        """Seconds of one step of the schedule: interval/50, between 1 ms and 100 ms. Keys are late by one at most."""
        return min(max(self.interval / _TICKS_PER_INTERVAL, _TICK_MIN), _TICK_MAX)

    def next_interval(self) -> float:
        """Draw what a new key would wait: `interval` plus a uniform part of `jitter`, in seconds."""
        return self.interval + random.random() * self.jitter  # noqa: S311  # spreads writes, guards no secret


def _require_journal(journal: object, fsync: object) -> None:
    if journal is not None and not (isinstance(journal, (str, os.PathLike)) and str(journal)):
        raise OptionError("journal", journal, "the path of a directory, or None for no journal")
    if not isinstance(fsync, bool):
        raise OptionError("fsync", fsync, "True or False")


def _seconds(name: str, value: object, *, or_none: bool = False) -> float:
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LONGEST:
        expected = "seconds: a number from 0 to a thousand million, or a timedelta"
        raise OptionError(name, value, expected + (", or None for no limit" if or_none else ""))
    return float(value)
