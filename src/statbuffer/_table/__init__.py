"""The choice of the counter table: the native one, or plain Python where that could not be built.

The environment variable STATBUFFER_TABLE makes it explicit: "native" (missing is an ImportError) or "reference".
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from statbuffer._table._native import CounterTable
else:
    wanted = os.environ.get("STATBUFFER_TABLE", "")
    if wanted not in {"", "native", "reference"}:
        raise ImportError(f"STATBUFFER_TABLE={wanted!r}: expected 'native' or 'reference', or no such variable")
    if wanted != "reference":
        try:
            from statbuffer._table._native import CounterTable
        except ImportError as error:
            if "subinterpreter" in str(error):
                raise ImportError(
                    "statbuffer can't be used in a sub-interpreter with a GIL of its own: its table serves one interpreter, "
                    "and no thread there could deliver; count in the main interpreter"
                ) from error
            how = (
                "statbuffer was installed without its compiled counter table, for want of a C compiler; install one, then: "
                "pip install --force-reinstall --no-binary statbuffer statbuffer"
            )
            if wanted == "native":
                raise ImportError(f"STATBUFFER_TABLE=native: {how}") from error
            warnings.warn(f"{how}. Until then an increment costs about ten times more", RuntimeWarning, stacklevel=2)
            from statbuffer._table._reference import CounterTable
    else:
        from statbuffer._table._reference import CounterTable

__all__ = ["CounterTable"]
