"""A report as a person reads it: what was found, what was done, how it was checked.

Everything is returned as text, so that nothing is half printed. Without colour it is plain ASCII but for names that
come from the file. No name is ever shortened: where the terminal is narrow, it goes on in the next line.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from wnconvert.report import text
from wnconvert.report.model import Action, OutputCheck, Report
from wnconvert.report.weights import by_kind, by_weight

WALKERS = {
    "fx": "the torch.fx graph",
    "export": "the torch.export graph",
    "modules": "the tree of modules",
    "keys": "the names and shapes of its tensors",
    "onnx": "the ONNX graph",
}
NARROWEST = 60
"""Columns that are used at least; a terminal with fewer breaks the lines itself."""

_DONE: dict[str, Action] = {"apply": "split", "fold": "folded", "rename": "renamed"}


def report_text(
    report: Report, *, width: int, color: bool = False, verbose: bool = False, dry_run: bool = False
) -> str:
    """Draw the report of `inspect`, `apply`, `fold` or `rename`.

    Args:
        report: what happened.
        width: columns to fit into.
        color: use colours, unless NO_COLOR is set.
        verbose: one line for each weight, with what tells its kind.
        dry_run: nothing was written.
    """
    parts: list[RenderableType] = [*_heading(report, dry_run)]
    if report.rows:
        listed = report.command == "inspect"
        parts.append("")
        parts += (
            by_weight(report.rows, max(width, NARROWEST), verbose, listed)
            if listed or verbose
            else [by_kind(report.rows)]
        )
    facts = _facts(report)
    if facts:
        parts += ["", fact_list(facts)]
    return draw(parts, width, color)


def draw(parts: Iterable[RenderableType], width: int, color: bool) -> str:
    """Render to text, without trailing blanks."""
    file = io.StringIO()
    console = Console(
        file=file,
        width=max(width, NARROWEST),
        force_terminal=color,
        no_color=not color or bool(os.environ.get("NO_COLOR")),
        color_system="standard" if color else None,
        legacy_windows=False,
        highlight=False,
        markup=False,
        emoji=False,
    )
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())


def fact_list(facts: Iterable[tuple[str, Text]]) -> Table:
    """Label and text, one below the other."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, fact in facts:
        grid.add_row(Text(label, "bold"), fact)
    return grid


def output_fact(check: OutputCheck) -> Text:
    """What running both on the same inputs showed."""
    if check.equal is None:
        return Text(f"not compared: {text.safe(check.note or 'this format cannot be run')}", "yellow")
    if check.note and check.largest is not None and math.isinf(check.largest):
        return Text(text.safe(check.note), "red")
    largest = "unknown" if check.largest is None else text.number(check.largest)
    allowed = "none" if check.tolerance is None else text.number(check.tolerance)
    words = f"largest relative difference {largest}, tolerance {allowed}"
    note = f"; {text.safe(check.note)}" if check.note else ""
    return Text(words + note, "green" if check.equal else "red")


def _heading(report: Report, dry_run: bool) -> list[RenderableType]:
    found = WALKERS.get(report.walker, report.walker)
    why = f" ({text.safe(report.walker_note)})" if report.walker_note else ""
    where = [text.safe(part) for part in (report.input, report.format) if part]
    lines: list[RenderableType] = [Text(": ".join(where), "bold")] if where else []
    lines.append(Text(f"{text.plural(len(report.rows), 'weight')} found in {found}{why}"))
    if report.command == "inspect":
        states = [row.site.state for row in report.rows]
        skipped = report.count("skipped")
        left = f", {skipped} of them left alone by apply" if skipped else ""
        lines.append(Text(f"{states.count('split')} split, {states.count('plain')} plain{left}"))
        return lines
    done = _DONE[report.command]
    would = "would be " if dry_run else ""
    after = "; nothing is written in a dry run" if dry_run else ""
    lines.append(Text(f"{report.count(done)} of {len(report.rows)} {would}{done}{after}"))
    return lines


def _facts(report: Report) -> list[tuple[str, Text]]:
    facts = []
    if report.weights_verified is not None:
        tensors = text.plural(report.tensors_verified, "tensor")
        words = f"identical bits in {tensors}, read back" if report.weights_verified else "differ"
        facts.append(("weights", Text(words, "green" if report.weights_verified else "red")))
    if report.outputs is not None:
        facts.append(("outputs", output_fact(report.outputs)))
    facts += [("note", Text(text.safe(note))) for note in report.notes]
    if report.files:
        facts.append(("wrote", Text(_written(report))))
    return facts


def _written(report: Report) -> str:
    size = text.size(sum(report.files.values()))
    files = f", {len(report.files)} files" if len(report.files) > 1 else ""
    return f"{text.safe(report.output or '')}{files}, {size}"
