"""A signal handler that raises while `stop()` waits: the next `stop()`, which comes at exit at the latest, goes on with it."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.timeout(60)

INTERRUPT = """
class Interrupting:
    '''The clock, and a handler that raises in the n-th wait of the main thread; there are two to six.'''
    def __init__(self, clock, at):
        self.clock, self.left = clock, at
    def __getattr__(self, name):
        return getattr(self.clock, name)
    def wait(self, event, timeout):
        if threading.current_thread() is threading.main_thread():
            self.left -= 1
            if self.left == 0:
                raise SystemExit
        return self.clock.wait(event, timeout)
views = make(interval=0.2, shutdown=10.0).start()
count(views, "key", 5)
views._clock = clock = Interrupting(views._clock, {at})
if views._journaled:
    views._journaled._clock = clock
try:
    views.stop()
except SystemExit:
    pass
time.sleep(0.3)     # the threads that were told to end have ended
begun = time.monotonic()
report = views.stop()
took = time.monotonic() - begun
assert report.complete and not report.left, report
assert took < 5, f"the second stop() took {{took:.1f}} s"
"""


@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_a_stop_that_was_interrupted_in_any_wait_is_finished_by_the_next_one_at_once(ground, at):
    ground.run(INTERRUPT.format(at=at))
    ground.assert_exact()
