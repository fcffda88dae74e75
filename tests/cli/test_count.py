from __future__ import annotations

import gzip
import json
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from statbuffer import BufferFull, StatBuffer
from statbuffer._cli import counting
from statbuffer._cli.exits import Exit, choose
from statbuffer._cli.keys import field_picker
from statbuffer._cli.signals import Stop
from statbuffer.testing import FaultySink, MemorySink

from .conftest import log_line

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from statbuffer import StopReport

    from .conftest import Ran, Store

    Run = Callable[..., Ran]

COMBINED = ("--format", "combined", "--key", "path")


def test_the_real_log(run: Run, store: Store, real_log: Path) -> None:
    ran = run("count", real_log, *COMBINED, "--into", store.url, "--table", "hits")
    rows = store.rows("hits")
    assert ran.code == 0
    assert (len(rows), sum(rows.values())) == (1_498, 10_000)
    largest = sorted(rows.items(), key=lambda pair: -pair[1])[:5]
    assert largest == [
        ("/favicon.ico", 807),
        ("/style2.css", 546),
        ("/reset.css", 538),
        ("/images/jordan-80.png", 533),
        ("/images/web/2009/banner.png", 516),
    ]
    assert ran.out.splitlines()[0] == "807\t/favicon.ico"
    assert "10,000 lines, 0 bad, 10,000 increments, 1,498 keys in the table" in ran.out
    assert "10,000 accepted = 10,000 stored" in ran.out
    assert ran.err == ""


def test_a_pipe_gets_plain_text(run: Run, store: Store, tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("k\x1b[31mred one\nk two\n")
    ran = run("count", log, "--field", 1, "--into", store.url)
    assert ran.code == 0
    assert "\x1b" not in ran.out + ran.err
    assert "1\tk\\x1b[31mred" in ran.out


def test_bad_lines_are_counted_and_shown_and_never_fatal(run: Run, store: Store, tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_bytes(b"a 1\n\nb x\n\xff\xfe 2\nnul\0 3\na 4\n" + b"z\n" * 5)
    ran = run("count", log, "--field", 1, "--amount", 2, "--into", store.url)
    assert ran.code == 0
    assert store.rows() == {"a": 5}
    assert "11 lines, 9 bad, 2 increments" in ran.out
    assert "9 bad lines were not counted, 5 of them:" in ran.err
    assert f"{log}:2: no field 1: the line has 0" in ran.err
    assert f"{log}:3: amount 'x': expected a whole number" in ran.err


def test_a_key_that_the_store_cannot_hold_is_a_bad_line_of_its_own(run: Run, store: Store, tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_bytes(b"a\nb\n\xff\nc\na\n\xfe\xff\n")
    ran = run("count", log, "--field", 1, "--into", store.url)
    assert store.rows() == {"a": 2, "b": 1, "c": 1}
    assert "6 lines, 2 bad, 4 increments" in ran.out
    assert f"{log}:3: " in ran.err
    assert f"{log}:6: " in ran.err


def test_plain_and_gzip_together(run: Run, store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("x\ny\n")
    (tmp_path / "b.log.gz").write_bytes(gzip.compress(b"x\n"))
    assert run("count", tmp_path / "a.log", tmp_path / "b.log.gz", "--field", 1, "--into", store.url).code == 0
    assert store.rows() == {"x": 2, "y": 1}


def test_named_groups_become_columns(run: Run, store: Store, tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("shop/cart 3\nshop/cart 4\nblog/home 1\n")
    pattern = r"(?P<site>\w+)/(?P<page>\w+) (?P<n>\d+)"
    assert run("count", log, "--regex", pattern, "--amount", "n", "--into", store.url).code == 0
    assert store.rows() == {("shop", "cart"): 7, ("blog", "home"): 1}
    ran = run("top", store.url, "--json")
    assert json.loads(ran.out)[0] == {"site": "shop", "page": "cart", "count": 7}
    assert run("top", store.url, "-n", 1).out == "7\tshop\tcart\n"


def test_json_lines(run: Run, store: Store, tmp_path: Path) -> None:
    log = tmp_path / "a.jsonl"
    log.write_text('{"tenant": {"id": 7}, "tokens": 10}\n{"tenant": {"id": 7}, "tokens": 5}\nnonsense\n')
    ran = run("count", log, "--json", "tenant.id", "--amount", "tokens", "--into", store.url)
    assert store.rows() == {"7": 15}
    assert f"{log}:3: not JSON" in ran.err


def test_bytes_by_status(run: Run, store: Store, tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("\n".join([log_line(size=100), log_line(size="-"), log_line(status=404, size=7)]))
    run("count", log, "--format", "combined", "--key", "status", "--amount", "bytes", "--into", store.url)
    assert store.rows() == {"200": 100, "404": 7}


def test_update_only_reports_keys_without_a_row(run: Run, store: Store, tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("known\n")
    run("count", log, "--field", 1, "--into", store.url)
    log.write_text("known\nnew\nnew\n")
    ran = run("count", log, "--field", 1, "--into", store.url, "--update-only")
    assert ran.code == Exit.UNDELIVERED
    assert store.rows() == {"known": 2}
    assert "NOT STORED: 2: " in ran.err
    assert "dead letter: 2 for new" in ran.err
    assert "3 accepted = 1 stored + 2 dead" in ran.out


def test_missing_input_shows_in_the_exit_code_and_the_rest_is_counted(run: Run, store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("x\n")
    ran = run("count", tmp_path / "missing.log", tmp_path / "a.log", "--field", 1, "--into", store.url)
    assert ran.code == Exit.INPUT
    assert f"not read: {tmp_path / 'missing.log'}: No such file or directory" in ran.err
    assert store.rows() == {"x": 1}


@pytest.mark.parametrize("url", ["sqlite:////no/such/directory/x.db", "nonsense", "oracle://host/db"])
def test_a_store_that_cannot_be_used_is_said_before_anything_is_read(run: Run, url: str, tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("x\n")
    ran = run("count", tmp_path / "a.log", "--field", 1, "--into", url)
    assert ran.code == Exit.STORE
    assert ran.err.strip()
    assert "Traceback" not in ran.err
    assert "lines" not in ran.out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "exactly one of"),
        (("--field", 1, "--json", "a"), "exactly one of"),
        (("--format", "combined"), "--key"),
        (("--field", 1, "--key", "path"), "--format"),
        (("--field", 0), "numbered from 1"),
        (("--regex", "("), "no regular expression"),
        (("--format", "combined", "--key", "colour"), "expected one of"),
        (("--field", 1, "--interval", "nan"), "interval"),
    ],
)
def test_usage_errors(run: Run, store: Store, options: tuple[object, ...], says: str) -> None:
    ran = run("count", *options, "--into", store.url)
    assert ran.code == Exit.USAGE
    assert says in " ".join(ran.err.replace("\u2502", " ").split())
    assert not store.path.exists()


def test_help_tells_the_exit_codes(run: Run) -> None:
    ran = run("count", "--help")
    assert ran.code == 0
    for code in Exit:
        assert f"{code.value}: " in ran.out


def test_the_exit_code_says_the_worst() -> None:
    assert choose(undelivered=True, input_failed=True, stopped_by=2) == Exit.UNDELIVERED
    assert choose(undelivered=False, input_failed=True, stopped_by=2) == Exit.INPUT
    assert choose(undelivered=False, input_failed=False, stopped_by=2) == Exit.SIGINT
    assert choose(undelivered=False, input_failed=False, stopped_by=None) == Exit.OK


def test_version(run: Run) -> None:
    assert run("--version").out.startswith("statbuffer ")


def test_endless_distinct_keys_fit_a_small_buffer(run: Run, store: Store, tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("".join(f"k{number} {number}\n" for number in range(3_000)))
    for amount in ((), ("--amount", 2)):
        assert run("count", log, "--field", 1, *amount, "--into", store.url, "--max-keys", 100).code == 0
    assert len(store.rows()) == 3_000
    assert store.total() == 3_000 + 3_000 * 2_999 // 2


@pytest.mark.parametrize("amount", [None, "2"])
def test_a_full_buffer_whose_store_is_down_gives_up_once_it_is_asked_to_stop(
    tmp_path: Path, amount: str | None
) -> None:
    log = tmp_path / "a.log"
    log.write_text("".join(f"k{number} 1\n" for number in range(100)))
    sink = FaultySink(MemorySink(), seed=1, rate=1.0)
    with Stop() as stop:
        run = counting.Run(sink, field_picker(1, amount), stop, interval=60.0, shutdown=0.0, max_keys=10)
        looked = run.buffer.options.full_timeout
        assert looked == counting.LOOK_UP

        def full(key: object) -> object:
            stop.signal = stop.signal or 15
            stop.since = stop.since or -1.0
            raise BufferFull(key, 10)

        run.buffer._wait_for_room = full  # type: ignore[assignment, method-assign]
        outcome = run.count([str(log)])
    assert outcome.undelivered
    assert (outcome.tally.counted, outcome.tally.uncounted) == (10, 90)
    assert outcome.report.left == 10


def test_lines_that_overflow_a_count_are_bad(run: Run, store: Store, tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text(f"a {2**63 - 1}\na 1\nb 1\n")
    ran = run("count", log, "--field", 1, "--amount", 2, "--into", store.url)
    assert store.rows() == {"a": 2**63 - 1, "b": 1}
    assert f"{log}:2: " in ran.err


def test_top_finds_the_columns_of_any_table(run: Run, store: Store) -> None:
    with closing(sqlite3.connect(store.path)) as connection:
        connection.execute("CREATE TABLE views (site TEXT, page TEXT, seen BIGINT NOT NULL, PRIMARY KEY (site, page))")
        connection.executemany("INSERT INTO views VALUES (?, ?, ?)", [("a", "x", 1), ("a", "y", 5), ("b", "x", 3)])
        connection.execute("CREATE TABLE odd (name TEXT, a BIGINT, b BIGINT)")
        connection.execute("INSERT INTO odd VALUES ('n', 1, 2)")
        connection.commit()
    assert run("top", store.url, "--table", "views", "-n", 2).out == "5\ta\ty\n3\tb\tx\n"
    ran = run("top", store.url, "--table", "odd")
    assert ran.code == Exit.STORE
    assert "--key and --count" in ran.err
    assert run("top", store.url, "--table", "odd", "--key", "name", "--count", "b").out == "2\tn\n"


def test_top_says_what_is_missing_and_makes_nothing(run: Run, store: Store) -> None:
    ran = run("top", store.url)
    assert (ran.code, store.path.exists()) == (Exit.STORE, False)
    assert "does not exist" in ran.err
    store.path.write_bytes(b"")
    assert "table 'counters' does not exist" in run("top", store.url).err
    assert run("top", "nonsense").code == Exit.STORE


def test_prune_deletes_old_watermarks_only(run: Run, store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("x\n")
    for _ in range(2):
        run("count", tmp_path / "a.log", "--field", 1, "--into", store.url)
    with closing(sqlite3.connect(store.path)) as connection:
        old = "UPDATE statbuffer_writers SET updated = datetime('now', '-40 days') WHERE rowid = (SELECT MIN(rowid) FROM statbuffer_writers)"
        if (
            "WITHOUT ROWID"
            in connection.execute("SELECT sql FROM sqlite_master WHERE name = 'statbuffer_writers'").fetchone()[0]
        ):
            old = old.replace("rowid", "writer")
        connection.execute(old)
        connection.commit()
    assert run("prune", store.url, "--older-than", "30d").out.startswith("1 watermarks")
    assert run("prune", store.url, "--older-than", "30d").out.startswith("0 watermarks")
    assert run("prune", store.url, "--older-than", "soon").code == Exit.USAGE


def test_every_buffer_of_the_command_is_stopped(
    run: Run, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[str] = []
    stop = StatBuffer.stop

    def recorded(buffer: StatBuffer, *arguments: float) -> StopReport:
        stopped.append(repr(buffer))
        return stop(buffer, *arguments)

    monkeypatch.setattr(StatBuffer, "stop", recorded)
    (tmp_path / "a.log").write_text("x\n")
    run("count", tmp_path / "a.log", "--field", 1, "--into", store.url)
    assert stopped
