"""Where batches go.

A sink is any object with `exact` and `apply(batch)`; it needs no base class. These further methods are used when it
has them:

| method | called | may raise |
|---|---|---|
| `open()` | by `start()`, before anything is accepted, and again before a try while it has not succeeded | `SinkError` when the configuration is wrong (start fails with it); `NotApplied` when the store can't be reached just now (start goes on, the try is repeated) |
| `check_key(key)` | by the caller of `increment`, once for each key that is new to the table | `TypeError`: the key can't be stored; the increment is not accepted |
| `totals(keys)` | by `total()` in the caller's thread; returns a mapping, keys without a row left out | anything; it reaches the caller |
| `applied(batch)` | by `total()`: is this batch, whose outcome is unknown, stored? And once by the process that delivers from a journal, before its first batch | anything |
| `before_fork()`, `after_fork_in_parent()` | around each fork, in the thread that forks | nothing |
| `after_fork()` | in the child, before its first use of the sink: drop inherited connections without closing them | nothing |
| `close()` | by `stop()`, in its thread, after the last batch | nothing |

A string `target` says what the counts are for (a table and its columns); a journal serves one. Without it, the class's name
does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from statbuffer._errors import SinkError

if TYPE_CHECKING:
    from collections.abc import Callable

    from statbuffer._batch import Batch

__all__ = ["Sink", "from_url"]

_SQL_SCHEMES = ("sqlite", "postgresql", "mysql", "mariadb")


@runtime_checkable
class Sink(Protocol):
    """Where batches go. `apply` is called by one thread at a time, in order of `batch.seq` (repeats have the same)."""

    exact: bool
    """Whether a batch id that was applied before is recognised and not counted again."""

    def apply(self, batch: Batch) -> None:
        """Store all counts of the batch, or none; returning means stored.

        Raise `NotApplied` if nothing was stored, `Rejected` if nothing was stored and some keys can never be,
        `PartlyApplied` if all but some keys were stored. Anything else means that the outcome is *unknown*: the same
        batch, with the same id and the same counts, is offered again until `apply` answers.
        """


def choose_sink(owner: object, sink: Sink | str | Callable[[Any, int], object] | None, *, workers: int) -> Sink:
    """Return the one sink that a buffer has: the one that was passed, or its handler. Raises `TypeError` for none or two."""
    name = type(owner).__name__
    handlers = [method for method in ("handle_flush", "handle_batch") if hasattr(owner, method)]
    given = ["a sink"] * (sink is not None) + handlers
    if not given:
        raise TypeError(
            f"{name} has nowhere to deliver to: pass a sink ({name}('sqlite:///counts.db'), a function of (key, count) or "
            "a Sink), or define handle_flush(self, key, count) or handle_batch(self, batch) in a subclass"
        )
    if len(given) > 1:
        raise TypeError(f"{name} has {' and '.join(given)}: counts go to one place only, keep one of them")
    if sink is not None:
        return make_sink(sink, workers=workers)
    from statbuffer.sinks.callback import BatchCallbackSink, CallbackSink

    handler = getattr(owner, handlers[0])
    return CallbackSink(handler, workers=workers) if handlers == ["handle_flush"] else BatchCallbackSink(handler)


def make_sink(sink: Sink | str | Callable[[Any, int], object], *, workers: int) -> Sink:
    """Return the sink that `sink` is or stands for; nothing is opened. Raises `TypeError` or `SinkError`."""
    if isinstance(sink, str):
        return from_url(sink)
    if isinstance(sink, type):
        raise TypeError(f"{sink.__name__} is a class: pass an instance of it")
    if isinstance(sink, Sink):
        return sink
    if callable(sink):
        from statbuffer.sinks.callback import CallbackSink

        return CallbackSink(sink, workers=workers)
    raise TypeError(
        f"{sink!r} is no sink: expected a URL, a function of (key, count), or an object with `exact` and `apply(batch)`"
    )


def from_url(url: str, **options: Any) -> Sink:
    """Return the sink for a URL, with that sink's own options. Raises `SinkError` for a scheme that no sink serves."""
    scheme = url.partition("://")[0].partition("+")[0].lower()
    if scheme in _SQL_SCHEMES:
        from statbuffer.sinks.sql import SQLSink

        return SQLSink(url, **options)
    known = ", ".join(f"{name}://" for name in _SQL_SCHEMES)
    raise SinkError(f"{url.partition('://')[0]!r:.80} is no scheme of a known sink: expected one of {known}")
