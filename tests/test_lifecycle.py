"""Forks and exits of real processes. Each child prints what it counted; the sums are compared with the store."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections import Counter

import pytest

SINK = """
import os, sys, threading, time, signal
from statbuffer import StatBuffer

class Lines(StatBuffer, interval=60.0):
    # one O_APPEND write a batch: the file is the store of all processes
    def handle_batch(self, batch):
        fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, "".join(f"{key} {count}\\n" for key, count in batch.counts.items()).encode())
        os.close(fd)
"""


def run(code: str, tmp_path, *, check: int = 0, says: str = "") -> Counter[str]:
    store = tmp_path / "store"
    script = tmp_path / "script.py"
    script.write_text(SINK + textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, str(script), str(store)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == check, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert says in done.stderr, done.stderr
    counts: Counter[str] = Counter()
    for line in store.read_text().splitlines() if store.exists() else []:
        key, count = line.rsplit(" ", 1)
        counts[key] += int(count)
    return counts


def test_the_interpreter_ends_and_what_is_left_is_delivered(tmp_path):
    counts = run("views = Lines().start(); views.update({'a': 3, 'b': 4})", tmp_path)
    assert counts == {"a": 3, "b": 4}


def test_threads_that_outlive_the_main_thread_count_until_their_end(tmp_path):
    code = """
    views = Lines().start()
    def work():
        for _ in range(20):
            views.increment("late")
            time.sleep(0.01)
    threading.Thread(target=work).start()
    """
    assert run(code, tmp_path) == {"late": 20}


def test_a_callback_pool_still_works_at_exit(tmp_path):
    code = """
    import threading
    lock = threading.Lock()
    class Each(StatBuffer, interval=60.0, workers=4):
        def handle_flush(self, key, count):
            with lock, open(sys.argv[1], "a") as file:
                file.write(f"{key} {count}\\n")
    views = Each().start()
    views.update(range(100))
    """
    assert sum(run(code, tmp_path).values()) == 100


def test_sys_exit_in_a_sigterm_handler_delivers(tmp_path):
    code = """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    views = Lines().start()
    views.increment("a", 5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
    """
    assert run(code, tmp_path) == {"a": 5}


def test_an_exit_while_the_store_is_down_ends_by_the_shutdown_time(tmp_path):
    code = """
    class Down(StatBuffer, shutdown=0.5):
        def handle_batch(self, batch):
            raise OSError("down")
    Down().start().increment("a", 5)
    """
    assert (
        run(code, tmp_path, says="the process ends with counts that are not stored: 0 pending in 0 keys; 5 in flight")
        == {}
    )


def test_a_fork_counts_once_in_each_process(tmp_path):
    code = """
    views = Lines().start()
    views.increment("parent", 3)          # pending at the fork: the parent's
    bound = views.increment
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            assert views.stats().accepted == 0
            bound("child", 2)
            views.increment("child", 5)
            views.flush(timeout=10)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    views.increment("parent", 4)
    """
    assert run(code, tmp_path) == {"parent": 7, "child": 21}


def test_a_fork_before_start_and_a_fork_of_a_fork(tmp_path):
    code = """
    views = Lines()
    if os.fork() == 0:
        views.start()
        views.increment("child", 1)
        if os.fork() == 0:
            views.increment("grandchild", 1)
            sys.exit(0)
        os.wait()
        sys.exit(0)
    os.wait()
    views.start()
    views.increment("parent", 1)
    """
    assert run(code, tmp_path) == {"parent": 1, "child": 1, "grandchild": 1}


def test_forks_in_the_middle_of_flushes_and_increments_of_other_threads(tmp_path):
    code = """
    class Busy(Lines, interval=0.002):
        pass
    views = Busy().start()
    done = threading.Event()
    counted = [0] * 3
    def work(number):
        while not done.is_set():
            views.increment(f"parent-{counted[number] % 100}")
            counted[number] += 1
    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads: thread.start()
    children = []
    for _ in range(30):
        time.sleep(0.005)
        pid = os.fork()
        if pid == 0:
            for number in range(100):
                views.increment("child")
            report = views.stop(10)
            os._exit(0 if report.complete else 1)
        children.append(pid)
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    done.set()
    for thread in threads: thread.join()
    assert views.stop(30).complete
    with open(sys.argv[1], "a") as file:
        file.write(f"counted {sum(counted)}\\n")
    os._exit(0)
    """
    counts = run(code, tmp_path)
    assert counts["child"] == 3_000
    assert sum(count for key, count in counts.items() if key.startswith("parent")) == counts["counted"] > 0


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_children_deliver_what_they_counted(method, tmp_path):
    code = f"""
    import multiprocessing
    views = Lines()
    def work(number):
        views.start()
        views.increment("child", number)
    if __name__ == "__main__":
        context = multiprocessing.get_context("{method}")
        if "{method}" == "fork":
            views.start()
            views.increment("parent", 1)
        children = [context.Process(target=work, args=(number,)) for number in range(1, 5)]
        for child in children: child.start()
        for child in children:
            child.join()
            assert child.exitcode == 0
    """
    assert run(code, tmp_path) == {"child": 10} | ({"parent": 1} if method == "fork" else {})


def test_os_exit_loses_at_most_what_came_since_the_last_delivery(tmp_path):
    code = """
    views = Lines().start()
    views.increment("flushed", 5)
    views.flush(timeout=10)
    views.increment("lost", 7)
    os._exit(0)
    """
    assert run(code, tmp_path) == {"flushed": 5}


def test_kill_9_loses_at_most_what_came_since_the_last_delivery(tmp_path):
    code = """
    class Quick(Lines, interval=0.01):
        pass
    views = Quick().start()
    for number in range(50):
        views.increment("a")
        time.sleep(0.001)
    views.flush(timeout=10)
    views.increment("a", 1000)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    counts = run(code, tmp_path, check=-9)
    assert counts["a"] in (50, 1_050)


def test_fork_in_a_process_with_a_stopped_buffer_is_harmless(tmp_path):
    code = """
    views = Lines().start()
    views.stop()
    if os.fork() == 0:
        os._exit(0)
    os.wait()
    """
    assert run(code, tmp_path) == {}


def test_children_of_gone_buffers_do_not_trip(tmp_path):
    code = """
    for _ in range(3):
        Lines().start().stop()
    import gc; gc.collect()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    """
    assert run(code, tmp_path) == {}
    assert os.getpid()
