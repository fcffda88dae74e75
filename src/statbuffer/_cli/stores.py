"""What all verbs share: a store that is opened and closed, and its errors as one line and an exit code."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from sqlalchemy import exc

from statbuffer import OptionError, StatBufferError
from statbuffer._cli import display
from statbuffer._cli.exits import MEANINGS, Exit
from statbuffer.sinks.sql import SQLSink

if TYPE_CHECKING:
    from collections.abc import Iterator

EXIT_CODES = "**Exit codes**\n\n" + "\n\n".join(f"{code.value}: {meaning}" for code, meaning in MEANINGS.items())


@contextlib.contextmanager
def opened(url: str, **options: Any) -> Iterator[SQLSink]:
    """A sink for one verb, closed at its end; what is wrong with it becomes one line."""
    with store_errors(), contextlib.closing(SQLSink(url, **options)) as sink:
        yield sink


@contextlib.contextmanager
def store_errors() -> Iterator[None]:
    """Turn a store that can't be used into one line and its exit code."""
    try:
        yield
    except OptionError as error:
        raise typer.BadParameter(str(error)) from None
    except (StatBufferError, exc.SQLAlchemyError) as error:
        fail(str(getattr(error, "orig", None) or error))


def fail(message: str) -> NoReturn:
    """End with one line and the exit code for a store that can't be used."""
    display.say(display.errors(), display.printable(message), "bold red")
    raise typer.Exit(Exit.STORE)
