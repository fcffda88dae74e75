"""From a line to its key and its amount. Every function here is called once a line: it is short for that reason."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    Pick = Callable[[str], Any]


class BadLine(ValueError):
    """The line has no such field, or not of that kind; the message says which. It is counted as bad, never fatal."""


class BadPicker(ValueError):
    """The options can't pick anything: `option` names the wrong one."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


@dataclass(frozen=True, slots=True)
class Picker:
    """How a line is counted. Both functions raise `BadLine`."""

    key: Callable[[str], Hashable]
    amount: Callable[[str], int] | None = None
    """None: each line counts 1."""
    columns: str | tuple[str, ...] = "key"
    """The key columns of a table that is made for these keys; a tuple of names goes with tuple keys."""


_WHOLE = re.compile(r"[+-]?[0-9]{1,19}").fullmatch


def whole(text: str | None) -> int:
    """Return a decimal integer of up to 64 bits. `int()` alone would also take ' 1_000' and digits of other scripts."""
    if text is None or _WHOLE(text) is None:
        raise BadLine(f"amount {text!r:.60}: expected a whole number")
    return int(text)


# --field

_BLANKS = re.compile(r"[ \t]+")


def _field(option: str, number: int) -> Pick:
    if number < 1:
        raise BadPicker(option, f"{number}: fields are numbered from 1, as in awk")

    def pick(line: str) -> str:
        # str.split() knows blanks that awk does not, all but a few control characters of them outside ASCII
        fields = line.split(None, number) if line.isascii() else _BLANKS.split(line.strip(" \t"), number)
        try:
            return fields[number - 1]
        except IndexError:
            raise BadLine(f"no field {number}: the line has {len(fields)}") from None

    return pick


def field_picker(number: int, amount: str | None) -> Picker:
    """Key and amount are fields between blanks, numbered from 1 as in awk."""
    key = _field("--field", number)
    if amount is None:
        return Picker(key)
    if not amount.isdecimal():
        raise BadPicker("--amount", f"{amount!r}: with --field, expected the number of a field")
    text = _field("--amount", int(amount))
    return Picker(key, lambda line: whole(text(line)))


# --regex


def regex_picker(pattern: str, amount: str | None) -> Picker:
    """The key is what group 1 matches, or the tuple of all named groups but the amount's."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise BadPicker("--regex", f"{pattern!r} is no regular expression: {error}") from None
    if not compiled.groups:
        raise BadPicker("--regex", f"{pattern!r} has no group: put the key in parentheses, (...) or (?P<name>...)")
    amount_group = None if amount is None else _group(compiled, amount)
    by_number = {number: name for name, number in compiled.groupindex.items()}
    groups = [number for number in sorted(by_number) if number != amount_group] or [1]
    if groups == [amount_group]:
        raise BadPicker("--regex", f"{pattern!r}: the only group is the amount, put the key in parentheses too")
    columns = tuple(by_number.get(number, "key") for number in groups)
    key = _matcher(compiled, tuple(groups))
    count = None
    if amount_group is not None:
        text = _matcher(compiled, (amount_group,))
        count = lambda line: whole(text(line))  # noqa: E731  # three words
    return Picker(key, count, columns if len(columns) > 1 else columns[0])


def _group(compiled: re.Pattern[str], name: str) -> int:
    number = int(name) if name.isdecimal() else compiled.groupindex.get(name, 0)
    if not 1 <= number <= compiled.groups:
        known = ", ".join(compiled.groupindex) or f"1 to {compiled.groups}"
        raise BadPicker("--amount", f"{name!r} is no group of {compiled.pattern!r}: expected one of {known}")
    return number


def _matcher(compiled: re.Pattern[str], groups: tuple[int, ...]) -> Pick:
    search = compiled.search

    def pick(line: str) -> str | tuple[str, ...]:
        match = search(line)
        if match is None:
            raise BadLine("the pattern does not match")
        found: str | tuple[str, ...] | None = match.group(*groups)
        if found is None or (type(found) is tuple and None in found):
            raise BadLine("the pattern matches, but a group that is wanted does not take part")
        return found

    return pick


# --json


def json_picker(path: str, amount: str | None) -> Picker:
    """Key and amount are found by dotted paths in the JSON object that each line holds."""
    find = _json_path("--json", path)
    key = lambda line: _json_key(find(_parse(line)), path)  # noqa: E731  # three words
    if amount is None:
        return Picker(key)
    find_amount = _json_path("--amount", amount)
    return Picker(key, lambda line: _json_amount(find_amount(_parse(line))))


def _json_path(option: str, path: str) -> Pick:
    names = path.split(".")
    if not all(names):
        raise BadPicker(option, f"{path!r}: expected names between dots, such as user.id")

    def find(value: Any) -> Any:
        for name in names:
            try:
                value = value[name]
            except (KeyError, TypeError, IndexError):
                raise BadLine(f"no {path!r} in the JSON object") from None
        return value

    return find


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"not JSON: {error}") from None


def _json_key(value: Any, path: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return json.dumps(value)
    raise BadLine(f"{path} is {json.dumps(value):.60}: expected a string, a whole number, true or false")


def _json_amount(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise BadLine(f"amount {json.dumps(value):.60}: expected a whole number")


# --format combined

_COMBINED: Final = (
    ("host", r"(?P<host>\S+)"),
    ("ident", r" (?P<ident>\S+)"),
    ("user", r" (?P<user>[^\[]*)(?= \[)"),
    ("day", r" \[(?P<day>[0-9]{1,2}/[A-Z][a-z]{2}/[0-9]{4})"),
    ("hour", r":(?P<hour>[0-9]{2})"),
    ("zone", r":[0-9]{2}:[0-9]{2} (?P<zone>[^\]]*)\]"),
    ("method", r' "(?P<method>[^" ]+)'),
    ("path", r' +(?P<path>[^ "]+)'),
    ("protocol", r'(?: (?P<protocol>(?:[^"\\]|\\.)*))?"'),
    ("status", r" (?P<status>[0-9]{3}|-)"),
    ("bytes", r" (?P<bytes>[0-9]+|-)"),
    ("referer", r' "(?P<referer>(?:[^"\\]|\\.)*)"'),
    ("agent", r' "(?P<agent>(?:[^"\\]|\\.)*)"'),
)
"""The combined log format of Apache and nginx, left to right; the common format is the same up to `bytes`."""

COMBINED_KEYS: Final = tuple(name for name, _ in _COMBINED if name not in {"ident", "zone"})
_MONTHS: Final = {
    name: i
    for i, name in enumerate(["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"], 1)
}


def combined_picker(names: list[str], amount: str | None) -> Picker:
    """Keys are named parts of a combined log line, several names make a tuple."""
    for name in names:
        if name not in COMBINED_KEYS:
            raise BadPicker("--key", f"{name!r}: expected one of {', '.join(COMBINED_KEYS)}")
    if len(set(names)) < len(names):
        raise BadPicker("--key", f"{' '.join(names)}: each name once")
    if amount not in {None, "bytes", "status"}:
        raise BadPicker("--amount", f"{amount!r}: with --format combined, expected bytes or status")
    pick = _combined(names)
    columns = tuple(names) if len(names) > 1 else "key"
    if amount is None:
        return Picker(pick, columns=columns)
    text = _combined([amount])
    return Picker(pick, lambda line: 0 if (found := text(line)) == "-" else whole(found), columns)


def _combined(names: list[str]) -> Pick:
    wanted = {*names, "day"} if "hour" in names else set(names)
    pattern = ""
    for part, (name, piece) in enumerate(_COMBINED):
        pattern += piece if name in wanted else piece.replace(f"?P<{name}>", "?:")
        if wanted <= {before for before, _ in _COMBINED[: part + 1]}:
            break  # what follows may be cut off or unlike the format: it is not needed
    match = re.compile(pattern).match
    what = " or ".join(names)

    def pick(line: str) -> str:
        found = match(line)
        if found is None:
            raise BadLine(f"no {what}: not a line of the combined log format")
        return found[names[0]] or ""

    def pick_several(line: str) -> str | tuple[str, ...]:
        found = match(line)
        if found is None:
            raise BadLine(f"no {what}: not a line of the combined log format")
        parts = tuple(_part(found, name) for name in names)
        return parts if len(parts) > 1 else parts[0]

    return pick if len(names) == 1 and names[0] not in {"day", "hour"} else pick_several


def _part(found: re.Match[str], name: str) -> str:
    if name not in {"day", "hour"}:
        return found[name] or ""
    day = _iso_day(found["day"])
    return day if name == "day" else f"{day}T{found['hour']}"


@lru_cache(maxsize=64)
def _iso_day(text: str) -> str:
    day, month, year = text.split("/")
    if month not in _MONTHS:
        raise BadLine(f"month {month!r}: expected Jan to Dec")
    return f"{year}-{_MONTHS[month]:02}-{int(day):02}"
