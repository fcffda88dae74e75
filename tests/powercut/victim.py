"""A process that counts into a journal under the recorder: `python -m tests.powercut.victim SEED FSYNC`.

The store is another machine: it survives the power cut. What it gets is marked in the recording, as is what is about to be
counted, and what `sync()` returned for.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from pathlib import Path

from statbuffer import Batch, StatBuffer
from statbuffer.testing import FaultySink, MemorySink

KEYS = [f"key-{number}" if number % 2 else ("t", number) for number in range(16)]
THREADS = 3
ROOT = os.environ.get("RECORDER_ROOT", "")
MARKS = os.open(ROOT + ".marks", os.O_WRONLY | os.O_APPEND | os.O_CREAT) if ROOT else -1


class MarkedSink(MemorySink):
    """An exact store that marks what it stores."""

    def apply(self, batch: Batch) -> None:
        if not self.applied(batch):
            mark("store", batch.writer, batch.seq, {str(KEYS.index(key)): count for key, count in batch.counts.items()})
        super().apply(batch)


def mark(*what: object) -> None:
    os.write(MARKS, json.dumps(what).encode())


def main(seed: int, *, fsync: bool) -> None:
    rng = random.Random(seed)
    sink = FaultySink(MarkedSink(), seed=seed, rate=rng.choice([0.0, 0.2, 0.6]))
    views = StatBuffer(
        sink,
        journal=Path(ROOT) / "journal",
        fsync=fsync,
        sync_interval=0.01,
        interval=rng.choice([0.03, 0.1]),
        batch_keys=rng.choice([5, 10_000]),
        backoff=0.01,
        restart="permanent",
    ).start()

    def work(thread: int, rng: random.Random) -> None:
        sums = [0] * len(KEYS)
        for _ in range(25):
            counts = {rng.randrange(len(KEYS)): rng.choice([1, 2, 100]) for _ in range(rng.randrange(1, 6))}
            mark("counted", thread, counts)
            for key, count in counts.items():
                views.increment(KEYS[key], count)
                sums[key] += count
            if rng.random() < 0.3:
                views.sync()
                mark("synced", thread, dict(enumerate(sums)))
            time.sleep(rng.random() * 0.02)

    threads = [threading.Thread(target=work, args=(thread, random.Random(rng.random()))) for thread in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), fsync=sys.argv[2] == "fsync")
