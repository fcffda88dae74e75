"""Power cuts: what was not synced may be gone, in parts and out of order; what `sync()` promised is there."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from statbuffer import StatBuffer
from statbuffer.testing import FakeClock, MemorySink
from tests.powercut import recorder
from tests.powercut.victim import KEYS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(bool(recorder.missing()), reason=str(recorder.missing()))


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return recorder.build(tmp_path_factory.mktemp("recorder"))


@dataclass
class Tally:
    cuts: int = 0
    promised: int = 0
    lost: int = 0
    """Of what was synced; with fsync there must be none."""

    def __str__(self) -> str:
        return f"{self.cuts} cuts, {self.promised} counts promised by sync(), {self.lost} of them lost"


def record(folder: Path, library: Path, seed: int, *, fsync: bool) -> list[recorder.Operation]:
    folder.mkdir()
    root, log = folder / "root", folder / "log"
    root.mkdir()
    command = [sys.executable, "-m", "tests.powercut.victim", str(seed), "fsync" if fsync else "no"]
    environment = recorder.environment(library, root, log)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-2000:]}"
    return recorder.load(log)


def what_was_marked(marks: list[bytes]) -> tuple[MemorySink, Counter[int], Counter[int]]:
    """Return the store, what was counted at most, and what was promised."""
    store, counted, synced = MemorySink(), Counter[int](), defaultdict[int, dict[str, int]](dict)
    for text in marks:
        kind, *what = json.loads(text)
        if kind == "store":
            writer, seq, counts = what
            store.counts.update({KEYS[int(key)]: count for key, count in counts.items()})
            store._watermarks[writer] = seq
        elif kind == "counted":
            counted.update({int(key): count for key, count in what[1].items()})
        else:
            synced[what[0]] = what[1]
    promised = Counter[int]()
    for sums in synced.values():
        promised.update({int(key): count for key, count in sums.items()})
    return store, counted, promised


def check(image: Path, marks: list[bytes], *, fsync: bool, told: str) -> tuple[int, int]:
    """Let a new process find the disk as it is; return what was promised, and what of it is lost."""
    store, counted, promised = what_was_marked(marks)
    before = store.counts.copy()
    clock = FakeClock()
    views = StatBuffer(store, clock=clock, journal=image / "journal", fsync=False, interval=0.1).start()
    views.increment("after", 7)
    clock.advance(5.0)
    report = views.stop()
    assert report.complete, f"{told}: {report}"
    assert report.left == 0, f"{told}: {report}"
    assert views.stats().balanced, told
    assert store.counts.pop("after") == 7, f"{told}: what is counted after the cut is lost"
    lost = 0
    for number, key in enumerate(KEYS):
        stored = store.counts.pop(key, 0)
        assert stored <= counted[number], f"{told}: {key} was counted {counted[number]} times, stored {stored} times"
        assert stored >= before[key], f"{told}: {key} shrinks"
        lost += max(0, promised[number] - stored)
    assert not store.counts, f"{told}: nobody counted {store.counts}"
    assert not list((image / "journal").glob("damaged-*")), f"{told}: a power cut was taken for damage"
    assert not fsync or lost == 0, f"{told}: {lost} counts are lost that sync() had promised"
    return sum(promised.values()), lost


def campaign(folder: Path, library: Path, *, recordings: int, cuts: int, fsync: bool) -> Tally:
    tally = Tally()
    first = random.SystemRandom().randrange(10**6)
    for number in range(recordings):
        seed = first + number
        operations = record(folder / f"{fsync}-{number}", library, seed, fsync=fsync)
        rng = random.Random(seed)
        for cut in range(cuts // recordings):
            at = rng.randrange(len(operations) + 1)
            image = folder / f"{fsync}-{number}" / f"image-{cut}"
            recorder.crash_image(operations, at, rng, image)
            told = f"seed {seed}, cut {cut} before operation {at}"
            promised, lost = check(image, recorder.marks(operations, at), fsync=fsync, told=told)
            tally.cuts, tally.promised, tally.lost = tally.cuts + 1, tally.promised + promised, tally.lost + lost
    print(f"power cuts, seeds from {first}, {'with' if fsync else 'without'} fsync: {tally}")
    return tally


def test_what_sync_promised_survives_a_power_cut(tmp_path, library):
    assert campaign(tmp_path, library, recordings=3, cuts=45, fsync=True).promised > 0


def test_without_fsync_a_power_cut_doubles_nothing_and_the_journal_goes_on(tmp_path, library):
    campaign(tmp_path, library, recordings=2, cuts=20, fsync=False)


@pytest.mark.torture
def test_a_thousand_power_cuts(tmp_path, library):
    campaign(tmp_path, library, recordings=25, cuts=1000, fsync=True)


@pytest.mark.torture
def test_power_cuts_without_fsync_lose_what_was_not_synced_and_so_the_model_bites(tmp_path, library):
    assert campaign(tmp_path, library, recordings=10, cuts=300, fsync=False).lost > 0
