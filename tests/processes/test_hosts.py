"""Several processes of one host with one journal."""

from __future__ import annotations

import signal
from collections import defaultdict

import pytest

from tests.processes.ground import eventually


def test_a_process_that_dies_while_it_delivers_is_replaced_within_a_second(journaled):
    holder = journaled.start_script("""
    views = make(interval=1.0).start()
    count(views, "holder", 3)
    views.sync()
    touch("synced")
    wait_for(lambda: views._journaled.relay.delivers)
    touch("delivers")
    time.sleep(60)
    """)
    eventually((journaled.path / "delivers").exists, 20)
    journaled.start_script("""
    views = make(interval=1.0).start()
    count(views, "other", 4)
    views.sync()
    touch("standing-by")
    wait_for(lambda: views._journaled.relay.delivers)
    touch("took-over")
    time.sleep(60)
    """)
    eventually((journaled.path / "standing-by").exists, 20)
    holder.send_signal(signal.SIGKILL)
    eventually((journaled.path / "took-over").exists, 5, "the other one takes over")
    eventually(lambda: journaled.stored() == {"holder": 3, "other": 4}, 10, "and delivers")


@pytest.mark.parametrize("seconds", [4.0, pytest.param(60.0, marks=pytest.mark.torture)])
def test_eight_processes_make_one_write_a_key_and_interval(journaled, seconds):
    keys = 200 if seconds < 10 else 1000
    code = f"""
    import json
    signal.alarm({seconds + 50:.0f})
    class Lines(Lines):
        def handle_batch(self, batch):
            super().handle_batch(batch)
            append("writes", json.dumps([time.monotonic(), list(batch.counts)]) + "\\n")
    views = Lines(interval=1.0).start()
    end, done = time.monotonic() + {seconds}, 0
    keys = [f"key-{{number}}" for number in range({keys})]
    while time.monotonic() < end:
        views.update(keys)
        done += 1
        time.sleep(0.02)
    for key in keys: report(key, done)
    views.stop()
    """
    processes = [journaled.start_script(code) for _ in range(8)]
    for process in processes:
        assert process.wait(seconds + 50) == 0, journaled.log()[-3000:]
    journaled.adopt("Lines()")
    assert journaled.stored() == journaled.accepted()
    import json

    writes = defaultdict(list)
    for line in (journaled.path / "writes").read_text().splitlines():
        at, batch = json.loads(line)
        for key in batch:
            writes[key].append(at)
    assert len(writes) == keys
    most = max(map(len, writes.values()))
    span = max(max(times) for times in writes.values()) - min(min(times) for times in writes.values())
    print(f"8 processes, {keys} keys, {span:.1f} s: at most {most} writes a key")
    # the ends are flushed: each process that stops while it delivers writes once more
    assert most <= span + 2 + 8, f"{most} writes of one key in {span:.1f} s"
    middle = [times for times in writes.values() if len(times) > 3]
    gaps = [times[2] - times[1] for times in middle]
    assert min(gaps) > 0.9, "two writes of a key within an interval"
