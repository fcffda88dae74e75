"""Children of `multiprocessing` leave by `os._exit`, without atexit functions: what they counted is delivered all the same."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.timeout(60)

METHODS = ["fork", "spawn", "forkserver"]


@pytest.mark.parametrize("method", METHODS)
def test_processes_that_start_the_buffer_themselves_lose_nothing(method, ground):
    ground.run(f"""
    import multiprocessing
    views = make()
    def work(number):
        views.start()
        count(views, "child", number)
    if __name__ == "__main__":
        context = multiprocessing.get_context("{method}")
        children = [context.Process(target=work, args=(number,)) for number in range(1, 5)]
        for child in children: child.start()
        for child in children: child.join()
        assert [child.exitcode for child in children] == [0] * 4
    """)
    ground.assert_exact()


@pytest.mark.parametrize("method", METHODS)
def test_processes_of_a_parent_that_counts_too_lose_nothing(method, ground):
    ground.run(f"""
    import multiprocessing
    views = make().start()                  # spawned processes import this file, and start theirs
    def work(number):
        count(views, "child", number)
    if __name__ == "__main__":
        count(views, "parent", 3)
        context = multiprocessing.get_context("{method}")
        children = [context.Process(target=work, args=(number,)) for number in range(1, 5)]
        for child in children: child.start()
        for child in children: child.join()
        assert [child.exitcode for child in children] == [0] * 4
        count(views, "parent", 3)
    """)
    ground.assert_exact()


@pytest.mark.parametrize("method", METHODS)
def test_a_pool_of_executors_loses_nothing(method, ground):
    ground.run(f"""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    def begin():
        global views
        views = make().start()
    def work(number):
        count(views, "task", number)
    if __name__ == "__main__":
        context = multiprocessing.get_context("{method}")
        with ProcessPoolExecutor(3, mp_context=context, initializer=begin) as pool:
            list(pool.map(work, range(1, 11)))
    """)
    ground.assert_exact()


def test_a_pool_that_is_closed_and_joined_loses_nothing(ground):
    ground.run("""
    import multiprocessing
    def begin():
        global views
        views = make().start()
    def work(number):
        count(views, "task", number)
    if __name__ == "__main__":
        pool = multiprocessing.Pool(2, begin, maxtasksperchild=2)
        pool.map(work, range(1, 11), chunksize=1)
        pool.close()
        pool.join()
    """)
    ground.assert_exact()


def test_a_pool_that_is_terminated_loses_nothing_that_was_settled(ground):
    """`with Pool()` ends by `terminate()`: SIGTERM, at which Python dies at once unless the application has a handler."""
    ground.run("""
    import multiprocessing
    def begin():
        global views
        views = make().start()
    def work(number):
        count(views, "task", number)
        settle(views)
    if __name__ == "__main__":
        with multiprocessing.Pool(2, begin) as pool:
            pool.map(work, range(1, 11), chunksize=1)
    """)
    ground.assert_exact()


def test_a_terminated_process_whose_handler_exits_loses_nothing(ground):
    ground.run("""
    import multiprocessing
    def work(number):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        views = make().start()
        count(views, "child", number)
        touch(f"ready-{number}")
        time.sleep(60)
    if __name__ == "__main__":
        children = [multiprocessing.Process(target=work, args=(number,)) for number in range(1, 4)]
        for child in children: child.start()
        for number in range(1, 4): wait_for(lambda: seen(f"ready-{number}"))
        for child in children: child.terminate()
        for child in children: child.join()
        assert [child.exitcode for child in children] == [0] * 3
    """)
    ground.assert_exact()
