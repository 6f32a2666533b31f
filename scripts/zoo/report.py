"""The table of a run: per library, what was built and what held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from zoo.results import Record

COLUMNS = (
    *("library", "names", "built", "fx", "export", "eager", "modules", "weights split", "outputs equal"),
    *("parity", "identical", "pickled", "deep-copied", "missed", "wrong"),
)


def summary(records: Iterable[Record]) -> list[dict[str, Any]]:
    """One row per library, and one for all of them. Shares are given as `held/tried`."""
    by_library: dict[str, list[Record]] = {}
    for record in records:
        by_library.setdefault(record["library"], []).append(record)
    rows = [_row(library, found) for library, found in sorted(by_library.items())]
    if len(rows) > 1:
        rows.append(_row("all", [record for found in by_library.values() for record in found]))
    return rows


def _row(library: str, records: list[Record]) -> dict[str, Any]:
    built = [record for record in records if record["built"]]
    walkers = Counter(record["walker"] for record in built)
    return {
        "library": library,
        "names": len(records),
        "built": len(built),
        **{walker: walkers[walker] for walker in ("fx", "export", "eager", "modules")},
        "weights split": sum(record["sites"] for record in built),
        "outputs equal": _share(built, "equal"),
        "parity": _share(built, "parity"),
        "identical": _share(built, "identical"),
        "pickled": _share(built, "pickled"),
        "deep-copied": _share(built, "copied"),
        "missed": sum(len(record["missed"]) for record in built),
        "wrong": sum(bool(record["wrong"]) for record in built),
    }


def _share(records: list[Record], key: str) -> str:
    """How many hold of those that were tried. What the plain network cannot do either was not."""
    tried = [record for record in records if isinstance(record[key], bool)]
    return f"{sum(record[key] for record in tried)}/{len(tried)}"


def reasons(records: Iterable[Record]) -> Counter[str]:
    """Why names were not built, with how many for each library and reason."""
    return Counter(f"{record['library']}: {record['reason']}" for record in records if not record["built"])


def wrong(records: Iterable[Record]) -> list[str]:
    """Everything that must not be, one line each."""
    found = []
    for record in records:
        found += [f"{record['library']} {record['name']}: {line}" for line in record["wrong"]]
        found += [f"{record['library']} {record['name']}: missed {line}" for line in record["missed"]]
    return found


def skipped(records: Iterable[Record]) -> Counter[str]:
    """Weights that were left alone, by kind and reason."""
    count: Counter[str] = Counter()
    for record in records:
        count.update(record["skipped"])
    return count


_EXPLAINED = """# The zoo

Every architecture that timm and torchvision know, and every model class of transformers in a small configuration, built
with random weights under which no layer is trivial, and taken through the whole conversion: run, apply, run, pickle,
copy, fold, apply, train g and v, run, fold, run.

- *built*: the library builds it here, in 8 GiB, and it runs.
- *fx, export, eager, modules*: what found the weights.
- *outputs equal*: bit for bit after apply.
- *parity*: the trained network and its folded form differ by at most 1e-4 of the largest output in float32 (float64
  where a network chooses by values, 1e-9), or 4 times what moving every weight by one ulp does.
- *identical*: every tensor has the bits of the original after apply and fold.
- *pickled, deep-copied*: of those that the plain network can.
- *missed*: parameters of two or more axes that the report says nothing of.
"""


def markdown(records: list[Record], command: str, minutes: float) -> str:
    """The report for the documentation."""
    lines = [_EXPLAINED, f"`{command}` ({minutes:.0f} minutes of computing on one core)", "", _markdown_row(COLUMNS)]
    lines.append(_markdown_row("---" if column == "library" else "---:" for column in COLUMNS))
    lines += [_markdown_row(row[column] for column in COLUMNS) for row in summary(records)]
    for title, counts in (("Not built", reasons(records)), ("Left alone", skipped(records))):
        if counts:
            lines += ["", f"{title}:", "", *(f"- {count:,} x {line}" for line, count in counts.most_common())]
    return "\n".join([*lines, ""])


def _markdown_row(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells) + " |"
