"""A store that is down for long costs disk, not memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import gc, json, os, sys, threading, time
from statbuffer import NotApplied, StatBuffer
from statbuffer.testing import MemorySink

seconds, folder = float(sys.argv[1]), sys.argv[2]
down = True

class Store(MemorySink):
    def apply(self, batch):
        if down:
            raise NotApplied("down")
        super().apply(batch)
        self.batches.clear()

def rss():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

store = Store()
views = StatBuffer(store, journal=folder, interval=1.0, backoff=0.5).start()
keys = [f"/products/{number}" for number in range(10_000)]
store.counts.update(dict.fromkeys(keys, 0))
accepted, started, seen = 0, time.monotonic(), []
while time.monotonic() - started < seconds:
    views.update(keys)
    accepted += len(keys)
    pause = started + accepted / 200_000 - time.monotonic()
    if pause > 0:
        time.sleep(pause)
    seen.append(rss())
rate = accepted / (time.monotonic() - started)
assert views.stats().failing or seconds < 10
down = False
views.flush(timeout=60)
stats = views.stats()
assert stats.balanced
views.stop()
quarter = seen[len(seen) // 4]
print(json.dumps([accepted, sum(store.counts.values()), rate, quarter, max(seen[len(seen) // 4:])]))
"""


def outage(folder, seconds: float) -> tuple[int, int, float, int, int]:
    command = [sys.executable, "-c", PROGRAM, str(seconds), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    import json

    accepted, stored, rate, before, most = json.loads(done.stdout.splitlines()[-1])
    print(
        f"store down for {seconds:.0f} s at {rate:,.0f} increments/s: accepted {accepted:,}, stored {stored:,}; "
        f"RSS {before / 1e6:.1f} MB after a quarter of the time, {most / 1e6:.1f} MB at most from then on"
    )
    return accepted, stored, rate, before, most


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads its memory from /proc")  # noqa: PTH110
@pytest.mark.parametrize("seconds", [6, pytest.param(60, marks=pytest.mark.torture)])
def test_a_store_that_is_down_costs_no_memory_and_all_is_stored_after(directory, seconds):
    accepted, stored, _, before, most = outage(directory, seconds)
    assert stored == accepted
    assert most - before < 16e6
