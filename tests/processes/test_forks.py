"""`os.fork` at every moment of a buffer's life: parent and children count once each, and nobody hangs."""

from __future__ import annotations

import signal

import pytest

from tests.processes.ground import eventually

pytestmark = pytest.mark.timeout(60)


def test_a_buffer_made_before_the_fork_and_started_after_it_counts_once_in_every_process(ground):
    ground.run("""
    views = make()
    for number in range(4):
        if os.fork() == 0:
            views.start()
            count(views, "child", number + 1)
            sys.exit()
        os.wait()
    views.start()
    count(views, "parent", 10)
    """)
    ground.assert_exact()


def test_a_buffer_that_was_stopped_before_the_fork_counts_once_in_every_process_that_starts_it_again(ground):
    ground.run("""
    views = make().start()
    count(views, "parent", 1)
    views.stop()
    for number in range(3):
        if os.fork() == 0:
            views.start()
            count(views, "child", number + 1)
            sys.exit()
        os.wait()
    views.start()
    count(views, "parent", 10)
    """)
    ground.assert_exact()


def test_counts_that_are_pending_at_the_fork_are_the_parents(ground):
    ground.run("""
    views = make().start()
    count(views, "parent", 7)
    for number in range(3):
        if os.fork() == 0:
            assert views.stats().accepted == 0
            count(views, "child", 5)
            if number == 0:
                settle(views)
                os._exit(0)
            if number == 1:
                sys.exit(0)
            break
    else:
        for _ in range(3):
            assert os.wait()[1] == 0
        count(views, "parent", 4)
    """)
    ground.assert_exact()


def test_a_child_that_counts_nothing_takes_nothing_with_it(ground):
    ground.run("""
    views = make().start()
    count(views, "parent", 7)
    for number in range(3):
        if os.fork() == 0:
            if number == 0:
                os._exit(0)
            break
    else:
        for _ in range(3):
            assert os.wait()[1] == 0
    """)
    ground.assert_exact()


def test_children_of_children_count_once_each(ground):
    ground.run("""
    views = make(interval=0.05, sync_interval=0.01).start()
    for generation in range(5):
        count(views, f"generation {generation}", 10)
        if os.fork():
            assert os.wait()[1] == 0
            break
    """)
    ground.assert_exact()


BUSY = """
views = {store}(interval=0.02, sync_interval=0.005).start()
done = threading.Event()
def work(name):
    counted, increment = 0, views.increment
    while not done.is_set():
        for _ in range(100):
            increment(name)
        counted += 100
    report(name, counted)
threads = [threading.Thread(target=work, args=(f"thread {{number}}",)) for number in range({threads})]
for thread in threads: thread.start()
"""


LOADS = [
    ("make", 1),
    pytest.param("Lines", 1, marks=pytest.mark.torture),
    pytest.param("make", 2, marks=pytest.mark.torture),  # each thread that never waits makes a fork 0.3 s longer
]


@pytest.mark.parametrize(("store", "threads"), LOADS)
def test_twenty_forks_under_full_load_from_one_thread(ground, store, threads):
    code = """
for number in range(20):
    if os.fork() == 0:
        count(views, "child", 50)
        if number % 3 == 0:
            settle(views)
            os._exit(0)
        if number % 3 == 1:
            sys.exit(0)
        break
    time.sleep(0.02)
else:
    codes = [os.wait()[1] for _ in range(20)]
    done.set()
    for thread in threads: thread.join()
    assert codes == [0] * 20, codes
"""
    ground.run(BUSY.format(store=store, threads=threads) + code)
    ground.assert_exact()


@pytest.mark.parametrize(("store", "threads"), LOADS)
def test_forks_under_full_load_from_three_threads_at_once(ground, store, threads):
    code = """
codes = []
def forks():
    for _ in range(5):
        pid = os.fork()
        if pid == 0:  # no atexit functions run where a forked thread ends
            count(views, "child", 50)
            settle(views)
            os._exit(0)
        codes.append(os.waitpid(pid, 0)[1])
forkers = [threading.Thread(target=forks) for _ in range(3)]
for thread in forkers: thread.start()
for thread in forkers: thread.join()
done.set()
for thread in threads: thread.join()
assert codes == [0] * 15, codes
"""
    ground.run(BUSY.format(store=store, threads=threads) + code)
    ground.assert_exact()


@pytest.mark.parametrize("imported_first", ["concurrent.futures.thread", "statbuffer"])
def test_threads_that_fork_while_a_move_is_under_way_get_all_their_children(journaled, imported_first):
    code = """
    views = make().start()
    count(views, "parent", 1)
    views.sync()
    codes = []
    def fork():
        pid = os.fork()
        if pid == 0:
            count(views, "child", 1)
            settle(views)
            os._exit(0)
        codes.append(os.waitpid(pid, 0)[1])
    forkers = [threading.Thread(target=fork) for _ in range(3)]
    with views._journal._mover.transaction():  # a slow disk
        for thread in forkers: thread.start()
        time.sleep(0.3)
    for thread in forkers: thread.join()
    count(views, "parent", 1)
    views.sync()
    assert codes == [0] * 3, codes
    """
    journaled.run(code, first=f"import {imported_first}")
    journaled.assert_exact()


def test_a_fork_in_the_middle_of_a_transaction_leaves_the_child_a_store_that_it_can_write(ground):
    ground.run("""
    from sqlalchemy import create_engine, event
    from statbuffer import SQLSink
    engine, inside, slow = create_engine(f"sqlite:///{FOLDER}/store.db"), threading.Event(), True
    @event.listens_for(engine, "after_cursor_execute")
    def pause(connection, cursor, statement, *_):
        if slow and statement.startswith("INSERT"):
            inside.set()
            time.sleep(0.5)
    views = StatBuffer(SQLSink(engine), **options(interval=0.05)).start()
    count(views, "parent", 3)
    assert inside.wait(20)
    pid = os.fork()
    slow = False
    count(views, "child" if pid == 0 else "parent", 4)
    settle(views)
    if pid == 0:
        os._exit(0)
    assert os.wait()[1] == 0
    """)
    ground.assert_exact()


def test_a_child_whose_parent_was_killed_in_a_transaction_goes_on_with_the_delivery(journaled):
    parent = journaled.start_script("""
    from sqlalchemy import create_engine, event
    from statbuffer import SQLSink
    engine, inside, slow = create_engine(f"sqlite:///{FOLDER}/store.db"), threading.Event(), True
    @event.listens_for(engine, "after_cursor_execute")
    def pause(connection, cursor, statement, *_):
        if slow and statement.startswith("INSERT"):
            inside.set()
            time.sleep(1.0)
    views = StatBuffer(SQLSink(engine), **options(interval=0.05)).start()
    count(views, "parent", 3)
    views.sync()
    assert inside.wait(20)
    if os.fork():
        os.kill(os.getpid(), signal.SIGKILL)
    slow = False
    count(views, "child", 4)
    views.flush(timeout=10)
    touch("flushed")
    """)
    assert parent.wait(20) == -signal.SIGKILL
    eventually((journaled.path / "flushed").exists, 15, "the child delivers")
    assert journaled.stored() == journaled.accepted()


def test_a_fork_in_the_middle_of_a_delivery_delivers_it_once(ground):
    ground.run("""
    entered = threading.Event()
    class Slow(Lines):
        def handle_batch(self, batch):
            entered.set()
            time.sleep(0.3)
            super().handle_batch(batch)
    views = Slow(interval=0.05).start()
    for number in range(3):
        entered.clear()
        count(views, "parent", 3)
        assert entered.wait(20)
        if os.fork() == 0:
            assert views.stats().accepted == 0
            count(views, "child", 5)
            if number == 0:
                settle(views)
                os._exit(0)
            if number == 1:
                sys.exit(0)
            break
    else:
        for _ in range(3):
            assert os.wait()[1] == 0
    """)
    ground.assert_exact()


def test_a_child_does_not_keep_its_dead_parent_from_being_replaced(journaled):
    """A flock belongs to what was opened, and a fork shares that: the child has to let go of the parent's share."""
    journaled.run("""
    views = make(interval=0.2).start()
    count(views, "grandparent", 1)
    views.flush(timeout=20)             # this process delivers
    if os.fork() == 0:
        if os.fork() == 0:
            time.sleep(60)              # holds whatever it inherited; ended by the test
        os._exit(0)
    os.wait()
    count(views, "grandparent", 5)
    views.sync()
    os._exit(0)
    """)
    journaled.assert_exact()
