"""From the journal to the store: one process of the host at a time, the one that holds the relay's lock.

Every process that has the journal open would do it: its relay's thread tries for the lock whenever its own buffer has moved
counts, and, as long as anything waits in the journal, twice a second, so a holder that dies is replaced within that. A thread
that finds the lock taken and the journal empty ends; one that holds the lock ends, and lets go of it, when nothing has come in
for `timeout` seconds. An idle host wakes nothing.

Other processes have no way to ring this one's alarm, so the holder looks at the journal (one short read) every 50 ms while it
has work or waits for some.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

from statbuffer._delivery import Delivery
from statbuffer._errors import NotApplied
from statbuffer._journal._file import Damaged
from statbuffer._journal._seals import Seals
from statbuffer._journal._takeover import Takeover

if TYPE_CHECKING:
    from statbuffer._batch import Batch
    from statbuffer._clock import Clock
    from statbuffer._journal import Journal
    from statbuffer._options import Options
    from statbuffer.sinks import Sink

log = logging.getLogger("statbuffer")

LOOK: Final = 0.05
"""Seconds between looks at the journal."""
STANDBY: Final = 0.5
"""Seconds between tries for the lock while counts wait and another process delivers."""
_END: Final = -1.0


class _Checked:
    """The sink, which is asked whether it has a batch already before it is offered for the first time."""

    def __init__(self, sink: Sink, seals: Seals, takeover: Takeover) -> None:
        self._sink = sink
        self._seals = seals
        self._takeover = takeover
        self.exact = sink.exact
        self.renewed = False
        if hasattr(sink, "open"):
            self.open = sink.open

    def apply(self, batch: Batch) -> None:
        if self._seals.fresh and self._takeover.must_renew(batch):
            self.renewed = True
            raise NotApplied(f"the journal is a copy: what batch {batch.id} was to hold goes on under another id")
        self._seals.fresh = False
        self._sink.apply(batch)

    def __repr__(self) -> str:
        return repr(self._sink)


class Relay:
    """One thread that delivers what is in a journal, while this process is the one to do so."""

    def __init__(
        self, journal: Journal, sink: Sink, options: Options, clock: Clock, *, name: str, stays: bool = False
    ) -> None:
        self._journal = journal
        self._options = options
        self._clock = clock
        self._name = name
        self._stays = stays
        self.seals = Seals(journal, options, clock.monotonic)
        self._takeover = Takeover(journal, getattr(sink, "applied", None))
        self._sink = _Checked(sink, self.seals, self._takeover)
        self.delivery = Delivery(self._sink, self.seals, options, clock)
        self._lock = threading.RLock()
        self._alarm = clock.alarm()
        self._thread: int | None = None
        self._starting = False
        self._again = False
        self._halted = False
        self._closes = False
        self._flush_asked = False
        self._idle_since: float | None = None
        self._hurried_to = 0
        self._told: tuple[bool, str | None] | None = None
        self.error: str | None = None
        """What is wrong with the journal itself, as far as this process has tried to deliver from it."""
        self.tried = threading.Event()
        """Set once the thread has tried for the lock."""
        self.progress = threading.Event()
        """Set when something was settled here, and replaced by a new one."""
        self.ended = threading.Event()
        """Set while there is no thread."""
        self.ended.set()

    @property
    def delivers(self) -> bool:
        """Whether this process is the one that delivers."""
        return self._journal.directory.relay_lock.held

    # Any thread

    def wake(self) -> None:
        """See to it that what is in the journal is delivered by somebody."""
        with self._lock:
            self._again = True
            if self._thread is None and not self._starting and not self._halted:
                self._starting = True
                self.ended.clear()
                try:
                    self._clock.spawn(self._run, self._name)
                except RuntimeError:  # no more threads: the next move asks again, here or in another process
                    self._starting = False
                    self.ended.set()
                    log.exception("the relay's thread of %s can't be started; counts wait in the journal", self._name)
        self._alarm.ring()

    def is_current_thread(self) -> bool:
        """Whether the caller runs in the relay's own thread, where waiting for it would be for ever."""
        return self._thread == threading.get_ident()

    def ask_flush(self) -> None:
        """Have all that is in the journal delivered at once."""
        self._flush_asked = True
        self.wake()

    def halt(self, *, close: bool) -> None:
        """Have the thread end, and the lock freed, after the attempt that is under way; then close the journal, or not."""
        self._halted, self._closes = True, close
        self._alarm.ring()

    def resume(self) -> None:
        """Take up work again after `halt`."""
        self._halted = self._closes = False
        self.wake()

    # The relay's thread

    def _run(self) -> None:
        with self._lock:
            self._thread, self._starting = threading.get_ident(), False
        while True:
            self._again = False
            pause = self._safe_step()
            self.tried.set()
            if pause != _END:
                self._alarm.wait(pause)
            elif self._retire():
                return

    def _safe_step(self) -> float:
        try:
            pause = self._step()
        except Damaged as error:
            return self._replace_file(error)
        except Exception as error:  # noqa: BLE001  # whatever it is: without the thread nobody would deliver
            return self._note_trouble(error)
        else:
            self.error = None
            return pause

    def _step(self) -> float:
        """Do all that is due; return the seconds until the next look, or `_END`."""
        while not self._halted:
            if self._flush_asked:
                self._flush_asked = False
                self._journal.ask_flush()
            if not self._have_lock():
                return _END if self._journal.is_empty() and not self._stays else STANDBY
            self.tried.set()
            if self._journal.directory.suspect.exists():
                self._takeover.check()
            now = self._clock.monotonic()
            if self.delivery.resume_at > now and not self._is_hurried():
                self.seals.fold(now)
                return min(self.delivery.resume_at - now, LOOK)
            if self.delivery.batch is None and not self._take(now):
                return self._until_next(now)
            settled = self.delivery.attempt()
            if self._sink.renewed:
                self._sink.renewed = False
                self.delivery.forget()
            self._tell()
            if settled is not None:
                progress, self.progress = self.progress, threading.Event()
                progress.set()
        return _END

    def _have_lock(self) -> bool:
        lock = self._journal.directory.relay_lock
        if lock.held:
            return True
        if not lock.take():
            return False
        self.delivery.forget()
        self._idle_since = None
        try:
            self._takeover.adopt()
        except Damaged:
            raise  # to be mended under the lock
        except BaseException:
            lock.release()  # perhaps another process fares better
            raise
        self._told = None
        self._tell()
        return True

    def _is_hurried(self) -> bool:
        """Whether somebody waits for a flush since the store has failed: it is tried `backoff` after the latest attempt."""
        wish = self._journal.flush_wish()
        if wish > self._hurried_to:
            self._hurried_to = wish
            self.delivery.hurry(at_once=False)
        return self.delivery.resume_at <= self._clock.monotonic()

    def _take(self, now: float) -> bool:
        self._takeover.salvage()
        batch, moved = self.seals.take(now)
        if batch is None:
            return False
        self.delivery.load(batch, moved)
        return True

    def _until_next(self, now: float) -> float:
        due = self.seals.due_in(now)
        if due is not None:
            self._idle_since = None
            return min(due, LOOK)
        self.delivery.forget_failures()
        if self._idle_since is None:
            self._idle_since = now
        left = self._idle_since + self._options.timeout - now
        if left > 0 or self._stays:
            return LOOK
        self.seals.give_back_space()
        return _END

    def _tell(self) -> None:
        """Leave word in the journal when the state of delivery has changed."""
        told = (self.delivery.failing, self.delivery.last_error)
        if told != self._told:
            self.seals.note_pulse(failing=told[0], last_error=told[1])
            self._told = told

    def _replace_file(self, error: Damaged) -> float:
        if not self.delivers:
            return STANDBY  # whoever does has been told to look (JournalFile leaves `suspect`)
        try:
            self._takeover.set_aside()
        except Exception as trouble:  # noqa: BLE001  # as in _safe_step
            return self._note_trouble(trouble)
        log.error("%r: %s", self._journal, error)
        self.delivery.forget()
        return 0.0

    def _note_trouble(self, error: Exception) -> float:
        text = f"{type(error).__name__}: {error}"
        if text != self.error:
            log.error("%s can't read or write its journal, and tries again: %s", self._name, text)
        self.error = text
        return max(self._options.backoff, LOOK)

    def _retire(self) -> bool:
        """End this thread, unless work came in at the last moment."""
        with self._lock:
            if self._again and not self._halted:
                return False
            self._journal.directory.relay_lock.release()
            self._thread = None
            if self._closes:  # whoever has stopped the buffer may not have had the time to wait for this
                self._journal.close()
            self.ended.set()
        return True
