"""The command `statbuffer`. The verbs are in `_cli.verbs`, one function each."""

from __future__ import annotations

import io
import sys

_EXTRA = {"typer", "rich"}


def main() -> None:
    """Run the command line and exit with its code (`_cli.exits`)."""
    try:
        from statbuffer._cli.verbs import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        sys.stderr.write(f"{error.name} is not installed; run: pip install 'statbuffer[cli]'\n")
        sys.exit(2)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a key may have letters that this terminal's encoding has not
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="statbuffer")


if __name__ == "__main__":
    main()
