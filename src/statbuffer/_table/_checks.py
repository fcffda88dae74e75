"""What both tables say to a wrong increment, and of an error that they can raise to nobody."""

from __future__ import annotations

import sys
from typing import NoReturn

from statbuffer._errors import Stopped, shown

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
OVERFLOW = "pending {} and {} more do not fit into 64 bits; nothing was counted"


def whole(count: object) -> int:
    """Return a count that is an int of 64 bits; `TypeError` or `OverflowError` if it is none."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"count={shown(count)}: expected an int; nothing was counted")
    if not INT64_MIN <= count <= INT64_MAX:
        raise OverflowError(f"count={shown(count)}: expected an int of 64 bits; nothing was counted")
    return int(count)


def refuse() -> NoReturn:
    """Raise `Stopped`."""
    raise Stopped("the buffer is stopped; nothing was counted")


def report(_culprit: object) -> None:
    """Hand the current exception to `sys.unraisablehook`, as C code does with one that it can raise to nobody. Never raises."""
    error = sys.exc_info()[1]
    if error is not None:
        _Unraisable(error)


class _Unraisable:
    """A finalizer that raises is the one way from Python code to the hook: the type that it takes can't be made."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __del__(self) -> None:
        raise self._error
