# cython: language_level=3, binding=False, boundscheck=False, wraparound=False, always_allow_keywords=True
"""The counter table in Cython. `_reference.py` is the same in plain Python with a lock, and says what each method means.

Concurrency: every method runs under the GIL, and C code gives it up only where it runs Python code: a key's `__hash__`
and `__eq__` (inside dict operations), the hooks, and finalizers, when memory is allocated. Each step is written so that
whatever runs there, another thread's take included, finds each count in exactly one place. Two rules carry this. (1)
Nothing that can run Python code stands between a look-up's answer and the addition to the cell it found. (2) A cell
leaves the dict by a pop that returns it, and its count is read after the pop, when nobody else can reach it any more.
(A dict can come to hold a key twice, if its `__eq__` lets another thread insert it too: each cell is then taken by itself.)
A free-threaded interpreter takes the GIL back when it imports this module, which does not declare `Py_mod_gil`.

Loss: a key that raises in `__hash__` or `__eq__` while it is taken or put back waits in `_stuck`, to be tried again an
interval later; `sys.unraisablehook` hears of it.

Memory: for each key a dict entry, a cell of 32 bytes and one reference in the wheel, which maps a tick to the keys that
are due then. A key that is taken ahead of its tick, or put back, leaves an entry behind. That one is known by its tick,
which is no longer the cell's, and skipped; the wheel is sifted before such entries outnumber the others.
"""

cimport cython
from cpython.dict cimport PyDict_Clear, PyDict_SetDefault
from cpython.object cimport PyObject
from libc.math cimport ceil
from libc.stdint cimport int64_t

import random
import time
from collections import deque
from collections.abc import Mapping
from heapq import heappop, heappush

from statbuffer._errors import BufferFull
from statbuffer._table._checks import OVERFLOW, refuse, report, whole

cdef extern from "Python.h":
    PyObject* PyDict_GetItemWithError(dict d, object key) except? NULL

cdef extern from *:
    """
    #if defined(__GNUC__) || defined(__clang__)
    #define statbuffer_add(a, b, sum) __builtin_add_overflow(a, b, sum)
    #else
    static int statbuffer_add(int64_t a, int64_t b, int64_t *sum) {
        if ((b > 0 && a > INT64_MAX - b) || (b < 0 && a < INT64_MIN - b)) return 1;
        *sum = a + b;
        return 0;
    }
    #endif
    """
    bint statbuffer_add(int64_t a, int64_t b, int64_t* sum) nogil

cdef object _ONE = 1
cdef double _INFINITY = float("inf")
cdef Py_ssize_t _STALE_ALLOWED = 1024


@cython.final
@cython.freelist(64)
cdef class _Cell:
    cdef int64_t count
    cdef int64_t due


@cython.final
cdef class _Bucket:
    cdef int64_t tick
    cdef double born
    cdef list keys


@cython.final
cdef class CounterTable:
    """Pending counts by key, and when each is due. `statbuffer._table._reference.CounterTable` is the specification."""

    cdef readonly bint closed
    cdef readonly int64_t max_keys
    cdef double _interval, _jitter, _tick
    cdef object _clock, _check_key, _on_full, _wake, _random
    cdef bint _unwoken
    cdef dict _cells                            # key -> _Cell
    cdef dict _wheel                            # tick -> _Bucket
    cdef list _ticks                            # heap of the wheel's ticks
    cdef object _due                            # deque of buckets that are due already, whatever their tick
    cdef Py_ssize_t _entries                    # keys in all buckets, the stale ones too
    cdef int _inserting                         # calls that are inside an insertion
    cdef list _stuck                            # (key, count); count 0: it is in the cell yet
    cdef double _stuck_born, _stuck_until
    cdef int64_t _accepted_tail, _left_tail     # these sums may pass 64 bits: the tail is C, the rest a Python int
    cdef object _accepted, _left                # _left: taken, less put back

    def __init__(self, *, double interval, double jitter=0.0, double tick, int64_t max_keys, clock=time.monotonic,
                 check_key=None, on_full=None, wake=None):
        self._interval = interval
        self._jitter = jitter
        self._tick = tick
        self.max_keys = max_keys
        self._clock = clock
        self._check_key = check_key
        self._on_full = on_full
        self._wake = wake
        self._random = random.random
        self._cells = {}
        self.forget()

    @property
    def kind(self):
        return "native"

    # Counting: the caller's thread

    def increment(self, key, count=1):
        """Add `count` to what is pending for `key`."""
        cdef int64_t n = 1 if count is _ONE else whole(count)
        cdef PyObject* found
        if self.closed:
            refuse()
        found = PyDict_GetItemWithError(self._cells, key)
        if found is not NULL:
            self._count(<_Cell>found, n)
        elif n:
            self._insert(key, n)

    def update(self, counts):
        """Add a mapping of counts, or 1 for each key of an iterable; what stands before an item that raises is counted."""
        cdef PyObject* found
        if self.closed:
            refuse()
        if isinstance(counts, Mapping):
            for key, count in counts.items():
                self.increment(key, count)
            return
        for key in counts:
            found = PyDict_GetItemWithError(self._cells, key)
            if found is not NULL and not self.closed:
                self._count(<_Cell>found, 1)
            else:
                self.increment(key)

    cdef inline int _count(self, _Cell cell, int64_t n) except -1:
        cdef int64_t total
        if statbuffer_add(cell.count, n, &total):
            raise OverflowError(OVERFLOW.format(cell.count, n))
        cell.count = total
        if statbuffer_add(self._accepted_tail, n, &total):
            self._accepted += self._accepted_tail
            total = n
        self._accepted_tail = total
        return 0

    cdef inline int _note_left(self, int64_t n) except -1:
        cdef int64_t total
        if statbuffer_add(self._left_tail, n, &total):
            self._left += self._left_tail
            total = n
        self._left_tail = total
        return 0

    cdef int _insert(self, object key, int64_t n) except -1:
        """Count a key that is not in the table. The hooks may do anything: what they may have changed is asked after."""
        cdef double now
        cdef _Cell cell, present
        if self._check_key is not None:
            self._check_key(key)
        if len(self._cells) >= self.max_keys:
            if self._on_full is None:
                raise BufferFull(key, self.max_keys)
            key = self._on_full(key)
        now = self._clock()
        if self.closed:
            refuse()
        cell = _Cell.__new__(_Cell)
        cell.due = self._tick_of(now + self._interval + (<double>self._random() * self._jitter if self._jitter else 0.0))
        present = self._settle(key, cell)
        self._count(present, n)
        if present is cell:
            self._schedule(key, cell.due, now)
        return 0

    cdef _Cell _settle(self, object key, _Cell cell):
        """Return the key's cell, which is `cell` unless somebody was quicker."""
        self._inserting += 1
        try:
            return <_Cell>PyDict_SetDefault(self._cells, key, cell)
        finally:
            self._inserting -= 1

    cdef inline int64_t _tick_of(self, double moment):
        cdef double tick = ceil(moment / self._tick)
        return <int64_t>(tick if tick * self._tick >= moment else tick + 1.0)  # a quotient may be rounded down

    cdef int _schedule(self, object key, int64_t due, double born) except -1:
        """Enter a key in the wheel, and wake the flusher if it knows of nothing that early."""
        cdef bint earliest = False
        cdef _Bucket fresh
        cdef _Bucket bucket = self._wheel.get(due)
        if bucket is None:
            fresh = self._new_bucket(due, born)  # allocates: a finalizer may run, and somebody else be quicker
            bucket = self._wheel.setdefault(due, fresh)
            if bucket is fresh:
                earliest = len(self._cells) == 1 or not self._due and (not self._ticks or due < <int64_t>self._ticks[0])
                heappush(self._ticks, due)
        elif born < bucket.born:
            bucket.born = born
        bucket.keys.append(key)
        self._entries += 1
        if earliest or self._unwoken:
            self._ring()
        return 0

    cdef _Bucket _new_bucket(self, int64_t tick, double born):
        cdef _Bucket bucket = _Bucket.__new__(_Bucket)
        bucket.tick = tick
        bucket.born = born
        bucket.keys = []
        return bucket

    cdef int _ring(self) except -1:
        if self._wake is None:
            return 0
        self._unwoken = True
        try:
            self._unwoken = not self._wake()
        except BaseException:
            report(self._wake)
        return 0

    # Taking and putting back

    def take_due(self, double now, Py_ssize_t limit):
        """Move up to `limit` keys that are due by `now` out of the table; return their counts and the earliest birth."""
        cdef dict counts = {}
        cdef double born = _INFINITY
        cdef Py_ssize_t before
        cdef _Bucket bucket
        if self._entries > 2 * len(self._cells) + _STALE_ALLOWED:
            self._sift()
        while self._ticks and <int64_t>self._ticks[0] * self._tick <= now:
            self._due.append(self._wheel.pop(heappop(self._ticks)))
        if self._stuck and self._stuck_until <= now:
            born = self._stuck_born
            self._take_stuck(counts)
        while self._due and len(counts) < limit:
            bucket = self._due[0]
            before = len(counts)
            while bucket.keys and len(counts) < limit:
                self._entries -= 1
                self._take_key(bucket.keys.pop(), bucket.tick, counts)
            if len(counts) > before and bucket.born < born:
                born = bucket.born
            if not bucket.keys and self._due and self._due[0] is bucket:
                self._due.popleft()
        if self._cells and not self._entries and not self._stuck:
            born = 0.0
            self._rescue(counts, limit)
        return (counts, born) if counts else (counts, _INFINITY)

    cdef int _rescue(self, dict counts, Py_ssize_t limit) except -1:
        """Take cells that no entry leads to: of a key that its own `__eq__` had inserted twice, or whose hash has changed."""
        cdef _Cell cell
        while self._cells and len(counts) < limit:
            key, cell = self._cells.popitem()
            if cell.count:
                self._hand_over(key, cell.count, counts)
        return 0

    def take_all(self, Py_ssize_t limit):
        """`make_due()`, then `take_due`."""
        self.make_due()
        return self.take_due(-_INFINITY, limit)

    cdef int _take_key(self, object key, int64_t tick, dict counts) except -1:
        cdef PyObject* found
        cdef _Cell cell
        try:
            found = PyDict_GetItemWithError(self._cells, key)
            if found is NULL or (<_Cell>found).due != tick:
                return 0  # taken ahead of its tick, and maybe seen again: not this entry's business
            cell = self._cells.pop(key, None)
        except BaseException:
            self._keep(key, 0)
            return 0
        if cell is not None and cell.count:
            self._hand_over(key, cell.count, counts)
        return 0

    cdef int _hand_over(self, object key, int64_t n, dict counts) except -1:
        cdef Py_ssize_t before = len(counts)
        cdef object present
        cdef int64_t total
        try:
            present = <object>PyDict_SetDefault(counts, key, n)
            if len(counts) == before:  # one more count of a key that is in this take already
                if statbuffer_add(present, n, &total):
                    raise OverflowError(OVERFLOW.format(present, n))
                counts[key] = total
        except BaseException:
            self._keep(key, n)
            return 0
        return self._note_left(n)

    cdef int _keep(self, object key, int64_t n) except -1:
        """Set aside what an exception, the current one, has kept from moving on."""
        report(key)
        if not self._stuck:
            self._stuck_born = self._clock()
        self._stuck_until = self._clock() + self._interval
        pair = (key, n)  # allocated before the list is looked up, since a finalizer may take it
        self._stuck.append(pair)
        return 0

    cdef int _take_stuck(self, dict counts) except -1:
        cdef list fresh = []  # allocated first: a finalizer may take what is stuck
        cdef list stuck = self._stuck
        cdef PyObject* found
        cdef int64_t n
        self._stuck = fresh
        for key, count in stuck:
            n = count
            if n:
                self._hand_over(key, n, counts)
                continue
            try:
                found = PyDict_GetItemWithError(self._cells, key)
            except BaseException:
                self._keep(key, 0)
                continue
            if found is not NULL:
                self._take_key(key, (<_Cell>found).due, counts)
        return 0

    def put_back(self, counts, *, double delay, double born):
        """Add counts that were taken; their keys are due in `delay` seconds, whatever they were."""
        cdef int64_t due = self._tick_of(<double>self._clock() + delay)
        cdef int64_t n
        for key, count in counts.items():
            n = count
            if not n:
                continue
            self._note_left(-n)
            try:
                self._return(key, n, due)
            except BaseException:
                self._keep(key, n)
                self._stuck_born = min(self._stuck_born, born)
            else:
                self._schedule(key, due, born)

    cdef int _return(self, object key, int64_t n, int64_t due) except -1:
        cdef _Cell cell = _Cell.__new__(_Cell)
        cdef _Cell present = self._settle(key, cell)
        cdef int64_t total
        if statbuffer_add(present.count, n, &total):
            raise OverflowError(OVERFLOW.format(present.count, n))
        present.count = total
        present.due = due
        return 0

    def make_due(self):
        """Have all that is pending due at once; takes time by ticks, not by keys."""
        while self._ticks:
            self._due.append(self._wheel.pop(heappop(self._ticks)))
        self._stuck_until = -_INFINITY

    def make_key_due(self, key):
        """Have one key due at once; return whether it is pending."""
        cdef _Bucket bucket = self._new_bucket(self._tick_of(self._clock()), self.oldest())
        cdef PyObject* found
        bucket.keys.append(key)
        found = PyDict_GetItemWithError(self._cells, key)
        if found is NULL:
            return self._stuck_count(key) != 0
        (<_Cell>found).due = bucket.tick
        self._due.appendleft(bucket)
        self._entries += 1
        return True

    cdef int _sift(self) except -1:
        """Drop the entries whose keys have left, or are due at another tick."""
        cdef _Bucket bucket
        cdef PyObject* found
        cdef list keys, kept
        for bucket in [*self._due, *self._wheel.values()]:
            keys, bucket.keys = bucket.keys, []
            kept = []
            for key in keys:
                try:
                    found = PyDict_GetItemWithError(self._cells, key)
                except BaseException:
                    kept.append(key)
                    continue
                if found is not NULL and (<_Cell>found).due == bucket.tick:
                    kept.append(key)
            bucket.keys.extend(kept)
            self._entries -= len(keys) - len(kept)
        return 0

    # Reading: any thread

    def count(self, key):
        """Return what is pending for `key`, 0 if nothing is."""
        cdef PyObject* found = PyDict_GetItemWithError(self._cells, key)
        cdef int64_t n = (<_Cell>found).count if found is not NULL else 0
        return n + self._stuck_count(key) if self._stuck else n

    cdef object _stuck_count(self, object key):
        return sum([count for stuck, count in self._stuck if stuck is key or stuck == key])

    def __len__(self):
        return len(self._cells) + len(self._stuck)

    def items(self):
        """Return the pairs of key and pending count, as a list."""
        pairs = [(key, (<_Cell>cell).count) for key, cell in list(self._cells.items())]
        return [pair for pair in pairs + self._stuck if pair[1]]

    def totals(self):
        """Return the sums of what was accepted and of what is pending, at one instant."""
        accepted = self._accepted + self._accepted_tail
        return accepted, accepted - self._left - self._left_tail

    def next_due(self):
        """Return the clock time of the earliest tick that is due; -inf if something is due already, None if nothing is."""
        if not len(self):
            return None
        if self._due:
            return -_INFINITY
        if self._stuck:
            return min(self._stuck_until, self._ticks[0] * self._tick) if self._ticks else self._stuck_until
        return self._ticks[0] * self._tick if self._ticks else None

    def oldest(self):
        """Return the earliest clock time at which something pending was first counted; inf if nothing is pending."""
        cdef _Bucket bucket
        cdef double oldest = self._stuck_born if self._stuck else _INFINITY
        if not self._cells:
            return oldest
        for bucket in [*self._due, *self._wheel.values()]:
            if bucket.keys and bucket.born < oldest:
                oldest = bucket.born
        return oldest

    # Life

    def close(self):
        """Refuse increments from now on; all else goes on working."""
        self.closed = True

    def open(self):
        """Accept increments again."""
        self.closed = False

    def forget(self):
        """Be empty, as if nothing had ever been counted: in a forked child, the counts are the parent's."""
        PyDict_Clear(self._cells)
        self._wheel = {}
        self._ticks = []
        self._due = deque()
        self._entries = 0
        self._inserting = 0
        self._stuck = []
        self._stuck_born = self._stuck_until = _INFINITY
        self._accepted = self._left = 0
        self._accepted_tail = self._left_tail = 0
        self._unwoken = False

    def release(self):
        """Give memory back, if nothing is pending. A dict that is cleared inside an insertion can hide the new key (CPython 3.11)."""
        if not self._cells and not self._inserting:
            PyDict_Clear(self._cells)
            self._wheel.clear()
            self._ticks.clear()
            self._due.clear()
            self._entries = 0
