"""Time the start of the command line, and show which imports it spends its time on."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import click
import processes
from processes import HERE, IMPORT_TORCH, PYTHON, WNCONVERT
from results import console
from rich.table import Table

_LINE = re.compile(r"import time:\s+(?P<own>\d+) \|\s+\d+ \|(?P<indent> +)(?P<name>\S+)")
_TORCH = re.compile(r"(torch|torchgen|functorch)\b")


@dataclasses.dataclass(frozen=True, slots=True)
class Import:
    """One line of `python -X importtime`."""

    name: str
    milliseconds: float
    by_torch: bool


@click.command()
@click.option("--runs", default=10, show_default=True, help="Rounds that count; one before them does not.")
@click.option("--top", default=10, show_default=True, help="Imports to list for each command.")
@click.option("--folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(runs: int, top: int, folder: Path | None) -> None:
    """Time commands that do little, in turns, and list the slowest imports that torch does not cause."""
    folder = folder or processes.default_folder()
    console.print(processes.describe_machine(folder))
    with processes.scratch(folder) as place:
        plain, split, target = (place / f"{name}.safetensors" for name in ("plain", "split", "result"))
        processes.run([PYTHON, HERE / "checkpoint_files.py", plain, "--layers", "4"])
        processes.run([PYTHON, HERE / "checkpoint_files.py", split, "--layers", "4", "--split"])
        commands: dict[str, Sequence[str | Path]] = {
            "python -c pass": [PYTHON, "-c", "pass"],
            "wnconvert --help": [*WNCONVERT, "--help"],
            "wnconvert inspect small.safetensors": [*WNCONVERT, "inspect", plain],
            "wnconvert fold small.safetensors": [*WNCONVERT, "fold", split, "-o", target],
            "python -c 'import torch'": IMPORT_TORCH,
        }
        _print_times(commands, runs, target)
        for name, command in commands.items():
            if command[:3] == [*WNCONVERT]:
                target.unlink(missing_ok=True)
                _print_imports(name, command, top)


def _print_times(commands: dict[str, Sequence[str | Path]], runs: int, target: Path) -> None:
    found = processes.compare(commands, runs, lambda: target.unlink(missing_ok=True))
    nothing, torch = found["python -c pass"].seconds, found["python -c 'import torch'"].seconds
    table = Table(box=None, header_style="bold")
    table.add_column("")
    for column in ("seconds", "min-max", "CPU s", "/ python", "/ import torch"):
        table.add_column(column, justify="right")
    for name, summary in found.items():
        spread = f"{summary.fastest:.3f}-{summary.slowest:.3f}"
        ratios = f"{summary.seconds / nothing:.1f}", f"{summary.seconds / torch:.2f}"
        table.add_row(name, f"{summary.seconds:.3f}", spread, f"{summary.cpu:.3f}", *ratios)
    console.print(table)
    console.print()


def _print_imports(name: str, command: Sequence[str | Path], top: int) -> None:
    words = [PYTHON, "-X", "importtime", *(str(word) for word in command[1:])]
    said = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True, text=True).stderr
    found = parse(said)
    table = Table(title=f"{name}: slowest of {len(found)} imports", title_justify="left", box=None)
    table.add_column("ms", justify="right")
    table.add_column("module")
    for item in sorted((item for item in found if not item.by_torch), key=lambda item: -item.milliseconds)[:top]:
        table.add_row(f"{item.milliseconds:.1f}", item.name)
    torch = sum(item.milliseconds for item in found if item.by_torch)
    rest = sum(item.milliseconds for item in found if not item.by_torch)
    table.add_row(f"{rest:.1f}", "all of these")
    table.add_row(f"{torch:.1f}", "torch, and what it imports")
    console.print(table)
    console.print()


def parse(text: str) -> list[Import]:
    """Read what `-X importtime` writes. A module comes after the ones that it imports, which are indented further."""
    found: list[Import] = []
    parents: list[tuple[int, bool]] = []
    for match in reversed(list(_LINE.finditer(text))):
        depth = len(match["indent"])
        while parents and parents[-1][0] >= depth:
            parents.pop()
        by_torch = bool(_TORCH.match(match["name"])) or any(flag for _, flag in parents)
        parents.append((depth, by_torch))
        found.append(Import(match["name"], int(match["own"]) / 1000, by_torch))
    return found


if __name__ == "__main__":
    main()
