"""Everything that statbuffer raises.

    StatBufferError
    |-- OptionError(ValueError)          a wrong option; nothing was started
    |-- SinkError                        a store that can't be used as it is configured; raised by start()
    |   `-- MissingDriver(ImportError)   an optional package is not installed; names the extra
    |-- NotStarted, Stopped              an increment outside start() ... stop(); it was not accepted
    |-- BufferFull                       `max_keys` reached; the increment was not accepted
    |-- FlushTimeout(TimeoutError)       not stored in time; the counts stay in the buffer
    |-- FlushFailed                      what was to be flushed became dead letters, or was dropped
    |-- Undelivered                      a `with` block ended with counts that no store has; carries them
    `-- DeliveryError                    what a sink says of one batch:
        |-- NotApplied                   nothing of it was stored, and nothing will be
        |-- Rejected                     nothing was stored, and these keys never will be
        `-- PartlyApplied                all was stored but these keys

`TypeError` (a key or a count of the wrong type) and `OverflowError` (a count past 64 bits) are Python's own; they are
raised at the caller of `increment`, and the increment that raised them was not accepted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping


def shown(value: object) -> str:
    """Return a short `repr` that never raises: a message must not hide its own error."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  # the repr is the user's code
        return f"<{type(value).__name__} whose repr raises>"
    return text if len(text) <= 80 else text[:77] + "..."  # noqa: PLR2004  # as long as a line of a log


class StatBufferError(Exception):
    """Base of all errors of this package."""


class OptionError(StatBufferError, ValueError):
    """An option has a value that can't work. Nothing was started, nothing was accepted."""

    def __init__(self, option: str, value: object, expected: str) -> None:
        super().__init__(f"{option}={value!r}: expected {expected}")
        self.option = option
        self.value = value
        self.expected = expected


class SinkError(StatBufferError):
    """The sink can't be used as it is configured. Raised by `start()`, before anything is accepted."""


class MissingDriver(SinkError, ImportError):
    """A driver that this sink needs is not installed; `extra` names the extra that brings it."""

    def __init__(self, driver: str, extra: str) -> None:
        super().__init__(f"{driver} is not installed; run: pip install 'statbuffer[{extra}]'")
        self.driver = driver
        self.extra = extra


class NotStarted(StatBufferError, RuntimeError):
    """The buffer is not started, so nobody would deliver the count; it was not accepted."""


class Stopped(StatBufferError, RuntimeError):
    """The buffer is stopped, so nobody would deliver the count; it was not accepted."""


class BufferFull(StatBufferError, RuntimeError):
    """A new key came while `max_keys` keys were pending; its increment was not accepted. Known keys still are."""

    def __init__(self, key: Hashable, max_keys: int) -> None:
        super().__init__(
            f"{max_keys} keys are pending (max_keys): the increment of new key {shown(key)} was not accepted. "
            "Raise max_keys, shorten interval, or choose on_full='block' or 'fold'; stats().failing says whether the store is down"
        )
        self.key = key
        self.max_keys = max_keys


class FlushTimeout(StatBufferError, TimeoutError):
    """`flush(timeout)` ran out of time. The counts stay in the buffer and are still delivered as soon as it works."""

    def __init__(self, timeout: float, left: int, last_error: str | None) -> None:
        cause = f"; the store last said: {last_error}" if last_error else ""
        super().__init__(f"not stored within {timeout:g} s; {left} still on the way, nothing lost{cause}")
        self.timeout = timeout
        self.left = left
        self.last_error = last_error


class FlushFailed(StatBufferError):
    """Some of what was to be flushed will not be stored: it became dead letters (`dead`) or was dropped (`dropped`)."""

    def __init__(self, dead: int, dropped: int) -> None:
        fates = [f"{dead} went to dead_letters()"] * bool(dead) + [f"{dropped} dropped"] * bool(dropped)
        super().__init__(f"not all was stored: {', '.join(fates)}; see stats().last_error")
        self.dead = dead
        self.dropped = dropped


class Undelivered(StatBufferError):
    """A `with` block ended, the shutdown time ran out, and some counts are in no store; `report` lists them."""

    def __init__(self, report: Any) -> None:
        super().__init__(f"the buffer stopped with counts that are not stored: {report}")
        self.report = report


class DeliveryError(StatBufferError):
    """Base of what a sink's `apply(batch)` may raise to say what became of the batch. Any other exception: unknown."""


class NotApplied(DeliveryError):
    """The sink knows: nothing of this try was stored or will be. The counts go back to the table and are tried later."""


class Rejected(DeliveryError):
    """The sink knows: nothing of this batch is stored, and the store can never take these keys.

    `reasons` maps each offending key to what the store said. Those become dead letters; the rest is delivered at once,
    as a new batch. An exact sink looks at its watermark first: a batch that was stored before is never rejected.
    """

    def __init__(self, key: Hashable, reason: str) -> None:
        super().__init__(f"{shown(key)}: {reason}")
        self.reasons: Mapping[Hashable, str] = {key: reason}

    @classmethod
    def many(cls, reasons: Mapping[Hashable, str]) -> Rejected:
        """Return one error for several keys at once, so that one more try stores the rest."""
        key, reason = next(iter(reasons.items()))
        error = cls(key, reason if len(reasons) == 1 else f"{reason} (and {len(reasons) - 1} more keys)")
        error.reasons = dict(reasons)
        return error


class PartlyApplied(DeliveryError):
    """The sink settles keys on their own: all of the batch is stored but `failed`, of which nothing is.

    `failed` maps a key to the exception that it met. A `Rejected` there makes a dead letter; any other exception puts
    that key's count back, to be tried later in another batch.
    """

    def __init__(self, failed: Mapping[Hashable, BaseException]) -> None:
        key, error = next(iter(failed.items()))
        super().__init__(f"{len(failed)} keys failed; {shown(key)}: {shown(error)}")
        self.failed = failed
