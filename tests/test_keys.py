"""A key that has gone through text equals the one that went in, and is of its type."""

from __future__ import annotations

import json
import sqlite3
from datetime import date, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import Enum, Flag, IntEnum
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statbuffer._keys import UnknownText, decode, encode, encode_counts


class Color(Enum):
    RED = 1
    CRIMSON = 1  # noqa: PIE796  # an alias is the same member


class Paint:
    class Inner(Enum):
        DEEP = "deep"


class Level(IntEnum):
    HIGH = 3


class Unnamed(Enum):
    """What its name leads to is another class."""

    A = 1


class Right(Flag):
    READ = 1
    WRITE = 2


Hidden, Unnamed = Unnamed, Color  # type: ignore[misc,assignment]

any_text = st.text(st.characters(exclude_categories=()))  # with NUL and lone surrogates
flat = (
    any_text
    | st.binary()
    | st.integers()
    | st.booleans()
    | st.none()
    | st.floats(allow_nan=False)
    | st.uuids()
    | st.dates()
    | st.datetimes()
    | st.datetimes(timezones=st.timezones() | st.just(timezone.utc))
    | st.datetimes(timezones=st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes))))
    | st.decimals(allow_nan=False)
    | st.sampled_from([Color.RED, Paint.Inner.DEEP, Level.HIGH, Right.READ])
)
keys = st.recursive(flat, lambda members: st.lists(members, max_size=4).map(tuple), max_leaves=8)


def types_of(key: object) -> object:
    return [types_of(member) for member in key] if isinstance(key, tuple) else type(key)


@given(keys)
def test_what_comes_back_equals_what_went_in(key):
    back = decode(encode(key))
    assert back == key
    assert types_of(back) == types_of(key)
    assert hash(back) == hash(key)


@given(st.lists(keys, max_size=6))
def test_the_text_goes_through_json_and_sqlite_as_it_is(several):
    texts = {encode(key): number for number, key in enumerate(several)}
    written = json.dumps(texts, ensure_ascii=False)
    assert "\\" not in written
    connection = sqlite3.connect(":memory:")
    rows = connection.execute("SELECT key, value FROM json_each(?)", (written,)).fetchall()
    assert dict(rows) == texts
    for text, number in texts.items():
        (found,) = connection.execute("SELECT json_extract(?, '$.\"' || ? || '\"')", (written, text)).fetchone()
        assert found == number
    connection.close()


@given(st.lists(keys), st.integers(-(2**63), 2**63 - 1))
def test_counts_are_encoded_together_as_they_are_one_by_one(several, count):
    counts = dict.fromkeys(several, count)
    assert json.loads(encode_counts(counts)) == {encode(key): count for key in counts}


def test_many_counts_are_encoded_in_pieces():
    counts: dict[object, int] = {f"k{number}": number for number in range(6_000)} | {7: 1, 'q"': 2}
    assert json.loads(encode_counts(counts)) == {encode(key): count for key, count in counts.items()}
    assert encode_counts({}) == "{}"


@given(keys, keys)
def test_keys_with_the_same_text_are_equal(one, other):
    assert encode(one) != encode(other) or (one == other and types_of(one) == types_of(other))


@given(any_text)
def test_text_that_stands_for_no_key_is_refused(text):
    try:
        encode(decode(text))
    except UnknownText as error:
        assert "no key" in str(error)


@pytest.mark.parametrize(
    "text",
    ["", "q", "ix", "(9:s", "(a", "(1", "Uzz", "E:", "Enowhere:X:Y", "Etests.test_keys:Color:BLUE", "tnever", "d1"],
)
def test_damaged_texts_are_refused(text):
    with pytest.raises(UnknownText, match="no key"):
        decode(text)


class Paris(tzinfo):
    """A zone of somebody's own: it has no name to come back by."""

    def utcoffset(self, moment):
        return ZoneInfo("Europe/Paris").utcoffset(moment)

    def dst(self, moment):
        return None

    def tzname(self, moment):
        return None


class Name(str):
    __slots__ = ()


class Local(tuple[int, ...]):
    __slots__ = ()


@pytest.mark.parametrize(
    "key",
    [
        float("nan"),
        Decimal("NaN"),
        object(),
        frozenset({1}),
        1j,
        (1, (object(),)),
        Right.READ | Right.WRITE,
        Name("x"),
        Local((1, 2)),
        Hidden.A,
        datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=Paris()),
    ],
    ids=repr,
)
def test_a_key_without_a_text_is_a_type_error_that_says_what_is_expected(key):
    with pytest.raises(TypeError, match=r"expected|never equals itself"):
        encode(key)


def test_the_format_stays():
    examples = {
        "/home": "s/home",
        'a"b\\c%\x00': "sa%000022b%00005cc%000025%000000",
        b"\x00\xff": "b00ff",
        -7: "i-7",
        True: "T",
        None: "N",
        0.5: "f0x1.0000000000000p-1",
        ("a", 7, ()): "(2:sa2:i71:(",
        UUID(int=1): "U00000000000000000000000000000001",
        date(2026, 11, 23): "d2026-11-23",
        datetime(2026, 11, 23, 1, 2, 3, tzinfo=timezone.utc): "t2026-11-23T01:02:03+00:00",
        datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Paris")): "t2026-10-25T02:30:00+1Europe/Paris",
        Decimal("1.50"): "D1.50",
        Color.CRIMSON: "Etests.test_keys:Color:RED",
    }
    assert {key: encode(key) for key in examples} == examples
    assert [decode(text) for text in examples.values()] == list(examples)
