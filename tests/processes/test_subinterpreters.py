"""A sub-interpreter is refused, or gets a buffer that works: never one that accepts counts and delivers none."""

from __future__ import annotations

import sys

import pytest

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(
        sys.version_info < (3, 12), reason="sub-interpreters with a GIL of their own came with Python 3.12"
    ),
]

INSIDE = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path[:] = PATH
try:
    from statbuffer import SinkError, StatBuffer
except ImportError:
    told = "refused"
else:
    stored = {}
    views = StatBuffer(lambda key, count: stored.update({key: count}), interval=60.0)
    try:
        views.start()
    except (ImportError, RuntimeError, SinkError):
        told = "refused"
    else:
        views.increment("key", 3)
        report = views.stop(5)
        told = "right" if stored == {"key": 3} else f"accepted, and lost: {report}"
with open(TOLD, "w") as file:
    file.write(told)
"""


@pytest.mark.parametrize("kind", ["isolated", "legacy"])
def test_a_sub_interpreter_is_refused_or_right(journaled, kind):
    (journaled.path / "inside_one.txt").write_text(INSIDE)
    code = f"""
    try:
        import _interpreters as interpreters
    except ImportError:
        import _xxsubinterpreters as interpreters
    def create():
        try:
            return interpreters.create("{kind}")        # Python 3.13
        except TypeError:
            return interpreters.create(isolated={kind == "isolated"})
    code = open(FOLDER + "/inside_one.txt").read()
    head = f"PATH = {{sys.path!r}}; TOLD = {{FOLDER!r}} + '/told'\\n"
    interpreters.run_string(create(), head + code)
    views = make().start()                              # the main one is none the worse for it
    count(views, "main", 2)
    """
    journaled.run(code, traceback=True)
    assert (journaled.path / "told").read_text() in {"refused", "right"}
    journaled.assert_exact()
