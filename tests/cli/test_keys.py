from __future__ import annotations

import pytest

from statbuffer._cli.keys import (
    BadLine,
    BadPicker,
    combined_picker,
    field_picker,
    json_picker,
    regex_picker,
)

from .conftest import log_line


def test_a_field_is_awks_field() -> None:
    pick = field_picker(2, None).key
    assert pick("one two three") == "two"
    assert pick("  one \t two") == "two"
    assert pick("one a\u00a0b\u2028c three") == "a\u00a0b\u2028c"  # awk knows blanks and tabs only


def test_a_missing_field_is_a_bad_line() -> None:
    with pytest.raises(BadLine, match="no field 3: the line has 2"):
        field_picker(3, None).key("one two")


def test_an_amount_is_a_whole_number() -> None:
    amount = field_picker(1, "2").amount
    assert amount is not None
    assert [amount("k 12"), amount("k -3"), amount("k +4")] == [12, -3, 4]
    for text in ("1.5", "1_000", "\u0664", "-", "0x10", "9" * 20):
        with pytest.raises(BadLine, match="expected a whole number"):
            amount(f"k {text}")


def test_a_regex_takes_group_1_or_all_named_groups() -> None:
    assert regex_picker(r"id=(\d+)", None).key("x id=17 y") == "17"
    named = regex_picker(r"(?P<site>\w+)/(?P<page>\w+) (?P<n>\d+)", "n")
    assert named.columns == ("site", "page")
    assert named.key("shop/cart 3") == ("shop", "cart")
    assert named.amount is not None
    assert named.amount("shop/cart 3") == 3
    single = regex_picker(r"(?P<page>\w+)=(\d+)", "2")
    assert single.columns == "page"
    assert single.key("cart=3") == "cart"


def test_a_group_that_takes_no_part_is_a_bad_line() -> None:
    with pytest.raises(BadLine, match="does not take part"):
        regex_picker(r"a(b)?", None).key("a")
    with pytest.raises(BadLine, match="does not match"):
        regex_picker(r"(b)", None).key("a")


@pytest.mark.parametrize(
    ("pattern", "amount", "option"),
    [("(", None, "--regex"), ("abc", None, "--regex"), ("(a)", "2", "--amount"), ("(?P<n>a)", "n", "--regex")],
)
def test_a_regex_that_picks_nothing_is_refused(pattern: str, amount: str | None, option: str) -> None:
    with pytest.raises(BadPicker) as refused:
        regex_picker(pattern, amount)
    assert refused.value.option == option


def test_json_paths() -> None:
    picker = json_picker("user.id", "usage.tokens")
    line = '{"user": {"id": "u\\u00e9"}, "usage": {"tokens": 42}}'
    assert picker.key(line) == "u\u00e9"
    assert picker.amount is not None
    assert picker.amount(line) == 42
    assert json_picker("id", None).key('{"id": 7}') == "7"
    assert json_picker("id", None).key('{"id": true}') == "true"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[1]",
        '"text"',
        "{}",
        '{"id": null}',
        '{"id": 1.5}',
        '{"id": {}}',
        "[" * 100_000,
        '{"id": ' + "9" * 5_000 + "}",
    ],
    ids=lambda line: line[:12],
)
def test_json_without_such_a_key_is_a_bad_line(line: str) -> None:
    with pytest.raises(BadLine):
        json_picker("id", None).key(line)


def test_a_json_amount_is_an_integer() -> None:
    amount = json_picker("id", "n").amount
    assert amount is not None
    for value in ("true", "1.0", '"1"', "null"):
        with pytest.raises(BadLine, match="expected a whole number"):
            amount(f'{{"n": {value}}}')


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host", "10.0.0.1"),
        ("user", "Anna Lena"),
        ("day", "2015-05-17"),
        ("hour", "2015-05-17T10"),
        ("method", "GET"),
        ("path", "/a?b=c"),
        ("protocol", "HTTP/1.1"),
        ("status", "404"),
        ("bytes", "512"),
        ("referer", "http://example.com/"),
        ("agent", 'Mozilla/5.0 \\"quoted\\" agent'),
    ],
)
def test_every_part_of_the_combined_format(name: str, value: str) -> None:
    line = log_line("/a?b=c", user="Anna Lena", status=404)
    assert combined_picker([name], None).key(line) == value


def test_a_combined_path_is_field_7_of_awk() -> None:
    line = log_line("/caf\u00e9/%20?q=[]")
    assert combined_picker(["path"], None).key(line) == line.split()[6]


def test_several_parts_make_a_tuple() -> None:
    picker = combined_picker(["host", "day"], "bytes")
    assert picker.columns == ("host", "day")
    assert picker.key(log_line()) == ("10.0.0.1", "2015-05-17")
    assert picker.amount is not None
    assert picker.amount(log_line()) == 512
    assert picker.amount(log_line(size="-")) == 0


def test_what_follows_the_wanted_part_may_be_cut_off() -> None:
    assert combined_picker(["path"], None).key(log_line("/x")[:70]) == "/x"


@pytest.mark.parametrize("line", ["", "GET /", '1.2.3.4 - - [17/May/2015:10:05:03 +0000] "-" 408 -'])
def test_other_lines_are_bad(line: str) -> None:
    with pytest.raises(BadLine, match="no path"):
        combined_picker(["path"], None).key(line)


def test_an_unknown_month_is_bad() -> None:
    with pytest.raises(BadLine, match="'Mai'"):
        combined_picker(["day"], None).key(log_line().replace("May", "Mai"))


@pytest.mark.parametrize(("names", "amount"), [(["colour"], None), (["path", "path"], None), (["path"], "host")])
def test_wrong_combined_options_are_refused(names: list[str], amount: str | None) -> None:
    with pytest.raises(BadPicker):
        combined_picker(names, amount)


@pytest.mark.parametrize(
    "make", [lambda: field_picker(0, None), lambda: field_picker(1, "x"), lambda: json_picker("a..b", None)]
)
def test_other_wrong_options_are_refused(make: object) -> None:
    with pytest.raises(BadPicker):
        make()  # type: ignore[operator]
