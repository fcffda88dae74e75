"""Keys as text, and back: what comes back equals what went in, and is of the same type.

Format: one letter that says the type, then the value. A text holds no quotation mark, no backslash, no control character
and no surrogate, so that it stands in JSON, in SQL's JSON paths and in UTF-8 as it is, whoever reads it. In strings those
characters, and `%`, are written as `%` and their number in six hexadecimal digits.

    s  str          s/home                 U  UUID        32 hexadecimal digits
    b  bytes        hexadecimal            d  date        ISO 8601
    i  int          decimal                t  datetime    ISO 8601, and +fold if that is 1
    T F N           True, False, None      D  Decimal     as Decimal prints it
    f  float        as float.hex prints    E  Enum        module:qualified name:member
    (  tuple        length and text of each member: (3:s/a2:i7

Text has no canonical form for equal keys of different types: 1, 1.0 and True are one key of a dict and three texts. Whoever
merges counts after decoding must add them up.
"""

from __future__ import annotations

import re
import sys
from enum import Enum
from functools import lru_cache
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from statbuffer._errors import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

_SPECIAL: Final = re.compile(r'[%"\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]')
_PIECE: Final = 2_500
_ESCAPE: Final = re.compile("%([0-9a-f]{6})")
_KINDS: Final = (
    "str, bytes, int, bool, None, float, a tuple of these, uuid.UUID, datetime.date or datetime, Decimal, or a member of "
    "an importable Enum"
)


class UnknownText(ValueError):
    """The text stands for no key: it was damaged, or written by a later version, or its Enum is gone."""


def encode(key: Hashable) -> str:
    """Return the text of a key. Raises `TypeError` for a key that has none."""
    if type(key) is str:
        return "s" + (key if key.isprintable() and not _SPECIAL.search(key) else _SPECIAL.sub(_escaped, key))
    encoder = _ENCODERS.get(type(key))
    if encoder is None:
        encoder = _late_encoder(key)
    return encoder(key)


def encode_counts(counts: Mapping[Any, int]) -> str:
    """Return counts as a JSON object from key text to count. In small pieces: other threads get their turns meanwhile.

    Most keys are plain strings, which one look at a whole piece can tell: half the time.
    """
    pieces = []
    items = iter(counts.items())
    while piece := list(islice(items, _PIECE)):
        try:
            together = "".join([key for key, _ in piece])
        except TypeError:  # not all are str
            together = "%"
        if together.isprintable() and not _SPECIAL.search(together):
            pieces.append(",".join([f'"s{key}":{count}' for key, count in piece]))
        else:
            pieces.append(",".join([f'"{encode(key)}":{count}' for key, count in piece]))
    return "{" + ",".join(pieces) + "}"


def decode(text: str) -> Any:
    """Return the key that `encode` made this text of. Raises `UnknownText`."""
    try:
        return _DECODERS[text[0]](text[1:])
    except (LookupError, ValueError, ArithmeticError, ImportError, AttributeError, TypeError) as error:
        raise UnknownText(f"{shown(text)} stands for no key: {error}") from error


def _escaped(match: re.Match[str]) -> str:
    return f"%{ord(match[0]):06x}"


def _decode_str(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 16)), text) if "%" in text else text


def _encode_float(key: float) -> str:
    if key != key:  # noqa: PLR0124  # NaN, which is not even the key of its own count
        raise TypeError("key nan: not a number never equals itself, so it can't come back from a store as the same key")
    return "f" + key.hex()


def _encode_tuple(key: tuple[Any, ...]) -> str:
    members = [encode(member) for member in key]
    return "(" + "".join([f"{len(text)}:{text}" for text in members])


def _decode_tuple(text: str) -> tuple[Any, ...]:
    members, at = [], 0
    while at < len(text):
        colon = text.index(":", at)
        end = colon + 1 + int(text[at:colon])
        if end > len(text):
            raise ValueError("the tuple is cut off")
        members.append(decode(text[colon + 1 : end]))
        at = end
    return tuple(members)


def _encode_enum(key: Enum) -> str:
    kind = type(key)
    text = f"{kind.__module__}:{kind.__qualname__}:{key.name}"
    try:
        found = _member(text)
    except (ImportError, AttributeError, LookupError):
        found = None
    if found is not key:
        raise TypeError(f"key {shown(key)}: expected a single member of an Enum that can be imported by its name")
    return "E" + str(_SPECIAL.sub(_escaped, text))


@lru_cache(maxsize=1024)
def _member(text: str) -> Any:
    module, qualname, name = text.split(":")
    found: Any = sys.modules.get(module) or import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found[name]


def _late_encoder(key: Hashable) -> Callable[[Any], str]:
    """Find the encoder of a type that was not asked for before, and keep it: most programs have no such keys."""
    if isinstance(key, Enum):
        return _encode_enum
    from datetime import date, datetime
    from decimal import Decimal
    from uuid import UUID

    rare: dict[type, Callable[[Any], str]] = {
        UUID: lambda key: "U" + key.hex,
        date: lambda key: "d" + key.isoformat(),
        datetime: _encode_datetime,
        Decimal: _encode_decimal,
    }
    encoder = rare.get(type(key))
    if encoder is None:
        raise TypeError(f"key {shown(key)} of type {type(key).__name__} can't be kept as text: expected {_KINDS}")
    _ENCODERS.update(rare)
    return encoder


def _encode_datetime(key: Any) -> str:
    zone = key.tzinfo
    name = getattr(zone, "key", None)  # zoneinfo.ZoneInfo: the zone, not just its offset of that moment
    if name is not None:
        return f"t{key.replace(tzinfo=None).isoformat()}+{key.fold}{_SPECIAL.sub(_escaped, name)}"
    text = f"t{key.isoformat()}" + ("+1" if key.fold else "")
    if decode(text) != key:  # PEP 495: in a fold, another zone's own rules make it equal to nothing
        raise TypeError(f"key {shown(key)}: expected a zoneinfo.ZoneInfo, a datetime.timezone or none as its tzinfo")
    return text


_DATETIME: Final = re.compile(r"(.{19}(?:\.\d{6})?)([+-]\d\d:\d\d(?::\d\d(?:\.\d+)?)?)?(?:\+(\d)(.*))?", re.DOTALL)


def _decode_datetime(text: str) -> Any:
    from datetime import datetime

    match = _DATETIME.fullmatch(text)
    if match is None:
        raise ValueError("expected a datetime in ISO 8601")
    moment, offset, fold, zone = match.groups()
    key = datetime.fromisoformat(moment + (offset or "")).replace(fold=int(fold or 0))
    if zone:
        from zoneinfo import ZoneInfo

        key = key.replace(tzinfo=ZoneInfo(_decode_str(zone)))
    return key


def _encode_decimal(key: Any) -> str:
    if key.is_nan():
        raise TypeError(
            f"key {key}: not a number never equals itself, so it can't come back from a store as the same key"
        )
    return f"D{key}"


def _decode_uuid(text: str) -> Any:
    from uuid import UUID

    return UUID(hex=text)


def _decode_date(text: str) -> Any:
    from datetime import date

    return date.fromisoformat(text)


def _decode_decimal(text: str) -> Any:
    from decimal import Decimal

    return Decimal(text)


_ENCODERS: Final[dict[type, Callable[[Any], str]]] = {
    bytes: lambda key: "b" + key.hex(),
    bool: lambda key: "T" if key else "F",
    int: lambda key: f"i{key}" if -_LONG < key < _LONG else f"x{key:x}",
    type(None): lambda _: "N",
    float: _encode_float,
    tuple: _encode_tuple,
}
_LONG: Final = 10**4000  # decimal takes quadratic time, and Python refuses it past 4300 digits
_DECODERS: Final[dict[str, Callable[[str], Any]]] = {
    "s": _decode_str,
    "b": bytes.fromhex,
    "i": int,
    "x": lambda text: int(text, 16),
    "T": lambda _: True,
    "F": lambda _: False,
    "N": lambda _: None,
    "f": float.fromhex,
    "(": _decode_tuple,
    "U": _decode_uuid,
    "d": _decode_date,
    "t": _decode_datetime,
    "D": _decode_decimal,
    "E": lambda text: _member(_decode_str(text)),
}
