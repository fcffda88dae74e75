"""`python -m bench [SECTION]...`: one table, measured in one run. Further sections go into `SECTIONS`."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

from bench.peers import peers
from bench.servers import mariadb, postgresql
from statbuffer._cli.bench import show_sections
from statbuffer._cli.bench_sections import SECTIONS, increment

if TYPE_CHECKING:
    from statbuffer._cli.bench import Section


def main() -> int:
    sections: dict[str, Section] = {
        **SECTIONS,
        "increment": partial(increment, peers=peers()),
        "postgresql": postgresql,
        "mariadb": mariadb,
    }
    wanted = sys.argv[1:] or list(sections)
    unknown = [name for name in wanted if name not in sections]
    if unknown:
        sys.stderr.write(f"{', '.join(unknown)}: no such section, expected {', '.join(sections)}\n")
        return 2
    show_sections({name: sections[name] for name in wanted}, scale=1.0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
