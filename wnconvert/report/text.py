"""Small pieces of text that the tables are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

from wnconvert.sites import Axis


def safe(text: str) -> str:
    """Text from a file, made harmless for a terminal: one line, control characters and escapes spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def broken(name: str, width: int) -> str:
    """A name in lines of at most `width` columns, the later ones indented, broken at dots where there are any."""
    lines, rest = [], name
    while len(rest) > width:
        cut = rest.rfind(".", 3, width)
        cut = cut if cut > 0 else width
        lines.append(rest[:cut])
        rest = f"  {rest[cut:]}"
    return "\n".join([*lines, rest])


def shape(sizes: Sequence[int]) -> str:
    """`512x256x7`; `scalar` for no axes."""
    return "x".join(map(str, sizes)) or "scalar"


def axis(kept: Axis, groups: int = 1) -> str:
    """The kept axes: `0`, `0,2`, `all` for one magnitude in all; with the number of groups where there are any."""
    text = "all" if kept is None else ",".join(map(str, kept)) if isinstance(kept, tuple) else str(kept)
    return f"{text} of {groups} groups" if groups > 1 else text or "all"


def number(value: float) -> str:
    """Three digits, short."""
    return f"{value:.3g}" if math.isfinite(value) else str(value)


def size(count: int) -> str:
    """Bytes as a person reads them, in powers of ten: `55.8 MB`."""
    amount = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 999.5:
            return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def plural(count: int, noun: str) -> str:
    """`1 weight`, `2 weights`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
