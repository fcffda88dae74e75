"""Sinks made of the user's own functions."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from statbuffer._errors import DeliveryError, PartlyApplied

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from statbuffer._batch import Batch


class CallbackFailed(DeliveryError):
    """The callback returned `False`, which means the same as raising."""


class CallbackSink:
    """Calls `handle(key, count)` for each key, in a pool of `workers` threads; each key is settled on its own.

    At-least-once: a call that raises (or returns `False`) counts as not stored and is made again later, with what came
    in since added to its count. Only the callback's author can tell a call that failed from one that did its work first.
    """

    exact = False

    def __init__(self, handle: Callable[[Any, int], object], *, workers: int = 8) -> None:
        self._handle = handle
        self._workers = workers
        self.target = _name_of(handle)

    def apply(self, batch: Batch) -> None:
        """Call the callback for every key; raises `PartlyApplied` with the keys whose calls failed."""
        todo = deque(batch.counts.items())
        failed: dict[Hashable, BaseException] = {}
        workers = min(self._workers, len(todo))
        if workers > 1:
            self._work_in_threads(todo, failed, workers)
        self._work(todo, failed)
        if failed:
            raise PartlyApplied(failed)

    def _work_in_threads(
        self, todo: deque[tuple[Hashable, int]], failed: dict[Hashable, BaseException], workers: int
    ) -> None:
        """Threads for this batch only: an idle sink keeps none, and a fork can't inherit half of a pool."""
        with ThreadPoolExecutor(workers, thread_name_prefix="statbuffer-worker") as pool:
            try:
                for _ in range(workers):
                    pool.submit(self._work, todo, failed)
            except RuntimeError:  # no new threads while the interpreter exits: the caller does the work
                return

    def _work(self, todo: deque[tuple[Hashable, int]], failed: dict[Hashable, BaseException]) -> None:
        while todo:
            try:
                key, count = todo.popleft()
            except IndexError:
                return
            try:
                if self._handle(key, count) is False:
                    failed[key] = CallbackFailed(f"the callback returned False for {key!r:.200}")
            except BaseException as error:  # noqa: BLE001  # whatever it is, this key's count is not stored
                failed[key] = error

    def __repr__(self) -> str:
        return f"<CallbackSink {getattr(self._handle, '__qualname__', self._handle)}>"


class BatchCallbackSink:
    """Calls `handle(batch)` once for each batch, in the flusher's thread.

    At-least-once: unless it raises `NotApplied` or `Rejected`, a call that fails is made again with the same batch, so a
    callback that remembers `batch.id` together with the counts is exact.
    """

    exact = False

    def __init__(self, handle: Callable[[Batch], object]) -> None:
        self._handle = handle
        self.target = _name_of(handle)

    def apply(self, batch: Batch) -> None:
        """Call the callback; an exception of it, or `False`, leaves the batch in flight."""
        if self._handle(batch) is False:
            raise CallbackFailed(f"the callback returned False for batch {batch.id}")

    def __repr__(self) -> str:
        return f"<BatchCallbackSink {getattr(self._handle, '__qualname__', self._handle)}>"


def _name_of(handle: Callable[..., object]) -> str:
    """Return what a journal's counts are for, when this function gets them."""
    kind = type(getattr(handle, "__self__", handle))  # a bound method's class: a subclass inherits its handler's name
    name = kind.__qualname__ if hasattr(handle, "__self__") else getattr(handle, "__qualname__", kind.__qualname__)
    return f"function {name}"
