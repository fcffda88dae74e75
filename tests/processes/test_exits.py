"""How a process can end, and what that costs."""

from __future__ import annotations

import signal

import pytest

from tests.processes.ground import eventually

pytestmark = pytest.mark.timeout(60)


def test_os_exit_loses_at_most_what_came_in_within_the_last_sync_interval(journaled):
    journaled.run("""
    views = make(sync_interval=0.1).start()
    count(views, "old", 1000)
    time.sleep(2.0)
    views.increment("new", 7)
    os._exit(0)
    """)
    journaled.adopt()
    stored = journaled.stored()
    assert stored["old"] == 1000
    assert stored["new"] in (0, 7)


def test_a_kill_loses_at_most_what_came_in_within_the_last_sync_interval(journaled):
    journaled.run(
        """
        views = make(sync_interval=0.1).start()
        count(views, "old", 1000)
        time.sleep(2.0)
        views.increment("new", 7)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        check=-signal.SIGKILL,
    )
    journaled.adopt()
    stored = journaled.stored()
    assert stored["old"] == 1000
    assert stored["new"] in (0, 7)


def test_what_was_synced_survives_any_end(journaled):
    for number, end in enumerate(["os._exit(1)", "os.kill(os.getpid(), signal.SIGKILL)", "os.abort()"]):
        journaled.finish(
            journaled.start_script(f"""
            views = make().start()
            count(views, "key", {10**number})
            views.sync()
            {end}
            """),
            check=[1, -signal.SIGKILL, -signal.SIGABRT][number],
            traceback=True,
        )
    journaled.assert_exact()


LATE = """
import atexit, threading
counted = 0
ended = threading.Event()
def last_of_all():  # registered before statbuffer's: runs after it
    from inside import report
    assert ended.wait(10)
    report("daemon", counted)
atexit.register(last_of_all)
"""


def test_daemon_threads_that_still_count_at_exit_are_told_when_it_is_over(ground):
    """Each increment is accepted, and stored, or raises `Stopped`."""
    ground.run(
        """
        import __main__
        from statbuffer import Stopped
        views = make(interval=0.05, sync_interval=0.01).start()
        def work():
            try:
                while True:
                    views.increment("daemon")
                    __main__.counted += 1
            except Stopped:
                ended.set()
        threading.Thread(target=work, daemon=True).start()
        wait_for(lambda: counted > 10_000)
        """,
        first=LATE,
    )
    ground.assert_exact()


def test_threads_that_outlive_the_main_thread_lose_nothing(ground):
    ground.run("""
    views = make().start()
    def work():
        time.sleep(0.3)
        count(views, "late", 20)
    for _ in range(3): threading.Thread(target=work).start()
    """)
    ground.assert_exact()


def test_a_second_sigterm_while_the_first_one_is_heeded_loses_nothing(ground):
    process = ground.start_script("""
    class Slow(Lines):
        def handle_batch(self, batch):
            touch("delivering")
            time.sleep(1.0)
            super().handle_batch(batch)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    views = Slow().start()
    count(views, "key", 5)
    touch("ready")
    time.sleep(60)
    """)
    eventually((ground.path / "ready").exists, 20)
    process.send_signal(signal.SIGTERM)
    eventually((ground.path / "delivering").exists, 20)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    ground.adopt("Lines()")
    assert ground.stored()["key"] >= 5, ground.log()  # a file is an at-least-once store
    if ground.journal is None:
        ground.assert_exact()


def test_sigterm_to_a_script_whose_handler_exits_loses_nothing(ground):
    process = ground.start_script("""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    views = make().start()
    count(views, "key", 5)
    touch("ready")
    time.sleep(60)
    """)
    eventually((ground.path / "ready").exists, 20)
    process.send_signal(signal.SIGTERM)
    ground.finish(process)
    ground.assert_exact()


def test_finalizers_that_count_at_exit_are_heard_or_told_that_it_is_over(ground):
    ground.run(
        """
        import weakref
        from statbuffer import Stopped
        views = make().start()
        class Thing:
            def __init__(self, name):
                self.name = name
            def __del__(self, views=views, report=report, Stopped=Stopped):
                try:
                    views.increment(self.name)
                except Stopped:
                    return
                report(self.name, 1)
        early, late, cycle = Thing("early"), Thing("late"), Thing("cycle")
        cycle.itself = cycle
        def last_word():
            views.increment("finalize")
            report("finalize", 1)
        weakref.finalize(late, last_word)
        import atexit
        atexit.register(count, views, "atexit", 3)
        del early
        """
    )
    ground.assert_exact()
    assert set(ground.stored()) >= {"early", "atexit"}


def test_what_a_finalizer_leaves_in_the_inbox_is_stored_too(ground):
    ground.run("""
    views = make().start()
    class Thing:
        def __del__(self):
            views.async_increment("gone")
            report("gone", 1)
    for _ in range(10): Thing()
    import atexit
    things = [Thing()]
    atexit.register(things.clear)
    """)
    ground.assert_exact()
    assert ground.stored() == {"gone": 11}


def test_a_process_that_ends_while_another_one_delivers_leaves_its_counts_to_that_one(journaled):
    other = journaled.start_script("""
    views = make(interval=0.3).start()
    count(views, "other", 1)
    wait_for(lambda: views._journaled.relay.delivers)
    touch("delivers")
    wait_for(lambda: seen("enough"))
    """)
    eventually((journaled.path / "delivers").exists, 20)
    journaled.run("""
    views = make(interval=0.3).start()
    count(views, "ends", 5)
    """)
    eventually(lambda: journaled.stored()["ends"] == 5, 5, "the other process delivers")
    (journaled.path / "enough").touch()
    journaled.finish(other)
    assert journaled.waiting() == 0
    journaled.assert_exact()
