"""Absorb a firehose of increments in memory, write a trickle of batches to a store, lose and double nothing.

from statbuffer import StatBuffer

with StatBuffer("sqlite:///views.db", interval=1.0) as views:
    views.increment("/home")
"""

from typing import TYPE_CHECKING

from statbuffer._batch import Batch, DeadLetter
from statbuffer._buffer import StatBuffer
from statbuffer._errors import (
    BufferFull,
    DeliveryError,
    FlushFailed,
    FlushTimeout,
    MissingDriver,
    NotApplied,
    NotStarted,
    OptionError,
    PartlyApplied,
    Rejected,
    SinkError,
    StatBufferError,
    Stopped,
    Undelivered,
)
from statbuffer._options import Options
from statbuffer._report import StopReport
from statbuffer._stats import Stats
from statbuffer.sinks import Sink

if TYPE_CHECKING:
    from statbuffer.sinks.sql import SQLSink

__all__ = [
    "Batch",
    "BufferFull",
    "DeadLetter",
    "DeliveryError",
    "FlushFailed",
    "FlushTimeout",
    "MissingDriver",
    "NotApplied",
    "NotStarted",
    "OptionError",
    "Options",
    "PartlyApplied",
    "Rejected",
    "SQLSink",
    "Sink",
    "SinkError",
    "StatBuffer",
    "StatBufferError",
    "Stats",
    "StopReport",
    "Stopped",
    "Undelivered",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "SQLSink":  # imported when asked for: SQLAlchemy is slow to import and not every buffer needs it
        from statbuffer.sinks.sql import SQLSink

        return SQLSink
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
