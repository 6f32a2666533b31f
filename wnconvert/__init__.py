"""Split and fold weight normalization in any trained network, bit for bit.

The public names load on first use, so that the command line can answer without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wnconvert import weightnorm as weightnorm
    from wnconvert.api import Result as Result
    from wnconvert.api import apply as apply
    from wnconvert.api import convert_file as convert_file
    from wnconvert.api import find as find
    from wnconvert.api import fold as fold
    from wnconvert.api import verify as verify
    from wnconvert.loading import load_into as load_into
    from wnconvert.report.model import Report as Report
    from wnconvert.sites import Site as Site

__version__ = "0.1.0"

_HOME = {
    "Report": "wnconvert.report.model",
    "Result": "wnconvert.api",
    "Site": "wnconvert.sites",
    "apply": "wnconvert.api",
    "convert_file": "wnconvert.api",
    "find": "wnconvert.api",
    "fold": "wnconvert.api",
    "load_into": "wnconvert.loading",
    "verify": "wnconvert.api",
    "weightnorm": "wnconvert",
}

__all__ = [
    "Report",
    "Result",
    "Site",
    "apply",
    "convert_file",
    "find",
    "fold",
    "load_into",
    "verify",
    "weightnorm",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'wnconvert' has no attribute {name!r}")
    if _HOME[name] == __name__:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
