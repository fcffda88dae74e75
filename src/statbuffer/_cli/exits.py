"""Exit codes, in one place. Several may hold at once: the first in this order is what the shell gets."""

from __future__ import annotations

import signal
from enum import IntEnum


class Exit(IntEnum):
    """What the exit code says; the meanings are printed by `--help`."""

    OK = 0
    UNDELIVERED = 1
    USAGE = 2
    INPUT = 3
    STORE = 4
    SIGINT = 128 + signal.SIGINT
    SIGTERM = 128 + signal.SIGTERM


MEANINGS = {
    Exit.OK: "all was read, and all that was counted is stored (bad lines are counted and shown)",
    Exit.UNDELIVERED: "something that was read is not stored; the message says what and why",
    Exit.USAGE: "wrong options; nothing was read",
    Exit.INPUT: "some input could not be read to its end; the rest is stored",
    Exit.STORE: "the store can't be used as it is configured, or can't be read; nothing was counted",
    Exit.SIGINT: "stopped by Ctrl-C; all that was read until then is stored",
    Exit.SIGTERM: "stopped by SIGTERM; all that was read until then is stored",
}


def choose(*, undelivered: bool, input_failed: bool, stopped_by: int | None) -> Exit:
    """Return the code that says the most important of these."""
    if undelivered:
        return Exit.UNDELIVERED
    if input_failed:
        return Exit.INPUT
    return Exit.OK if stopped_by is None else Exit(128 + stopped_by)
