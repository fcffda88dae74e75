"""SIGKILL at random moments and at each named step, with sums compared; see `kills.py`."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest


def campaign(runs: int) -> str:
    seed = random.SystemRandom().randrange(10**6)
    command = [sys.executable, "-m", "tests.journal.kills", "--runs", str(runs), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_was_synced_survives_sigkill_and_nothing_is_counted_twice():
    assert "60 runs" in campaign(60)


@pytest.mark.torture
def test_what_was_synced_survives_a_thousand_kills_and_nothing_is_counted_twice():
    """`KILL_RUNS=10000 make torture` for a release."""
    campaign(int(os.environ.get("KILL_RUNS", "1000")))
