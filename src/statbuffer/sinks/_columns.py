"""Key columns: which Python values a column holds faithfully, and how they travel.

A key that a column would alter (an int into a text column, text with NUL through JSON functions) must be refused where
it appears, not merged with another one.
"""

from __future__ import annotations

import datetime as dt
import uuid
from typing import TYPE_CHECKING, Any

from sqlalchemy import types as sqltypes

from statbuffer._errors import SinkError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Column, Dialect

INTEGER_BITS = {"SMALLINT": 16, "INTEGER": 32, "INT": 32, "MEDIUMINT": 24, "TINYINT": 8}
SUPPORTED = "text, integer, uuid, date or timestamp"


class KeyColumn:
    """One column of the key: `check` raises `TypeError`; `encode` and `decode` are for the driver's side."""

    def __init__(self, column: Column[Any], dialect: Dialect, *, longest_bytes: int | None) -> None:
        self.name = column.name
        kind = column.type
        self._length = getattr(kind, "length", None)
        self._longest_bytes = longest_bytes
        self._low = self._high = 0
        self._aware = bool(getattr(kind, "timezone", False))
        self.check: Callable[[Any], None] = self._choose_check(kind, dialect)
        bound = kind.dialect_impl(dialect)
        self.encode = bound.bind_processor(dialect)
        """What makes the driver's value of a key's; None: they are the same."""
        self._decode = bound.result_processor(dialect, None)

    def restore(self, value: Any) -> Any:
        """Undo `encode`."""
        return value if self.encode is None or self._decode is None else self._decode(value)

    def _choose_check(self, kind: sqltypes.TypeEngine[Any], dialect: Dialect) -> Callable[[Any], None]:
        if isinstance(kind, (sqltypes.String, sqltypes.NullType)):
            return self._check_text
        if isinstance(kind, sqltypes.Integer):
            bits = (
                64
                if dialect.name == "sqlite"
                else INTEGER_BITS.get(str(kind.compile(dialect)).split("(")[0].split()[0], 64)
            )
            unsigned = bool(getattr(kind, "unsigned", False))
            self._low, self._high = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            return self._check_integer
        if isinstance(kind, sqltypes.Uuid):
            return self._check_uuid
        if isinstance(kind, sqltypes.DateTime):
            return self._check_datetime
        if isinstance(kind, sqltypes.Date):
            return self._check_date
        raise SinkError(f"key column {self.name!r} is of type {kind!r}; a key column can be {SUPPORTED}")

    def _refuse(self, value: object, expected: str) -> None:
        raise TypeError(f"key {value!r:.100} ({type(value).__name__}): column {self.name!r} holds {expected}")

    def _check_text(self, value: Any) -> None:
        if not isinstance(value, str):
            self._refuse(value, "text: pass a str")
        if "\0" in value:
            self._refuse(value, "text without NUL characters")
        try:
            size = len(value) if value.isascii() else len(value.encode())
        except UnicodeEncodeError:
            self._refuse(value, "Unicode text: no lone surrogates")
        if self._length is not None and len(value) > self._length:
            self._refuse(value, f"{self._length} characters at most, this has {len(value)}")
        if self._longest_bytes is not None and size > self._longest_bytes:
            self._refuse(value, f"{self._longest_bytes} bytes at most, this has {size}")

    def _check_integer(self, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            self._refuse(value, "integers: pass an int")
        if not self._low <= value <= self._high:
            self._refuse(value, f"integers from {self._low} to {self._high}")

    def _check_uuid(self, value: Any) -> None:
        if not isinstance(value, uuid.UUID):
            self._refuse(value, "UUIDs: pass a uuid.UUID")

    def _check_date(self, value: Any) -> None:
        if isinstance(value, dt.datetime) or not isinstance(value, dt.date):
            self._refuse(value, "dates: pass a datetime.date")

    def _check_datetime(self, value: Any) -> None:
        if not isinstance(value, dt.datetime):
            self._refuse(value, "timestamps: pass a datetime.datetime")
        if (value.tzinfo is not None) != self._aware:
            self._refuse(value, f"timestamps {'with' if self._aware else 'without'} a time zone")
