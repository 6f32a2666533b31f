"""Print what was measured as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from processes import Summary
from rich.console import Console
from rich.table import Table

console = Console(width=None if Console().is_terminal else 150)


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One command.

    Attributes:
        start: the process that imports torch, or another package, and does nothing. The ratios leave it out.
    """

    name: str
    summary: Summary
    start: Summary

    @property
    def work(self) -> float:
        """Seconds without the start of the process."""
        return self.summary.seconds - self.start.seconds


def print_table(title: str, lines: Sequence[Line], peers: Mapping[str, Line]) -> None:
    """One row for each command, with a column for its ratio to each peer."""
    table = Table(title=title, title_justify="left", box=None, header_style="bold", padding=(0, 1))
    table.add_column("", no_wrap=True)
    numbers = ["seconds", "min-max", "start", *(f"/ {peer}" for peer in peers), "CPU s", "peak MB", "above start MB"]
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        ratios = [ratio(line, peer) for peer in peers.values()]
        table.add_row(line.name, *_times(line), *ratios, *_resources(line))
    console.print(table)
    console.print()


def ratio(line: Line, peer: Line) -> str:
    """How many times the work of a peer, or a dash where that is nothing that can be measured."""
    if peer.work < 0.01 or line.work < 0.01:
        return "-"
    return f"{line.work / peer.work:.2f}"


def _times(line: Line) -> Iterator[str]:
    yield f"{line.summary.seconds:.2f}"
    yield f"{line.summary.fastest:.2f}-{line.summary.slowest:.2f}"
    yield f"{line.start.seconds:.2f}"


def _resources(line: Line) -> Iterator[str]:
    yield f"{line.summary.cpu:.2f}"
    yield f"{line.summary.peak:,.0f}"
    yield f"{line.summary.peak - line.start.peak:,.0f}"
