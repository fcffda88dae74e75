"""What both tables say to a wrong increment, and of an error that they can raise to nobody."""

from __future__ import annotations

import sys
from typing import NoReturn

from statbuffer._errors import Stopped

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
OVERFLOW = "pending {} and {} more do not fit into 64 bits; nothing was counted"


def whole(count: object) -> int:
    """Return a count that is an int of 64 bits; `TypeError` or `OverflowError` if it is none."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"count={shown(count)}: expected an int; nothing was counted")
    if not INT64_MIN <= count <= INT64_MAX:
        raise OverflowError(f"count={shown(count)}: expected an int of 64 bits; nothing was counted")
    return int(count)


def shown(value: object) -> str:
    """Return a short `repr` that never raises: a message must not hide its own error."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  # the repr is the user's code
        return f"<{type(value).__name__} whose repr raises>"
    return text if len(text) <= 80 else text[:77] + "..."  # noqa: PLR2004  # as long as a line of a log


def refuse() -> NoReturn:
    """Raise `Stopped`."""
    raise Stopped("the buffer is stopped; nothing was counted")


def report(culprit: object) -> None:
    """Do with the current exception what C code does with one that it can raise to nobody."""
    kind, error, trace = sys.exc_info()
    sys.unraisablehook(_Unraisable(kind, error, trace, culprit))  # type: ignore[arg-type]


class _Unraisable:
    """What `sys.unraisablehook` takes; its own type can't be made outside of C."""

    def __init__(self, kind: object, error: object, trace: object, culprit: object) -> None:
        self.exc_type, self.exc_value, self.exc_traceback = kind, error, trace
        self.err_msg = None
        self.object = culprit
