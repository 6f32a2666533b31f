"""Time `apply` and `fold` against the number of layers, which are tiny, to see what each costs by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import processes
from processes import HERE, IMPORT_TORCH, PYTHON, WNCONVERT
from results import console
from rich.table import Table

FORMATS = {"safetensors": ".safetensors", "torch": ".pt", "onnx": ".onnx"}
LINEAR = 1.5
"""The most that a layer may cost in the largest file, in terms of what it costs in the one before."""

FEWEST = 1000


@click.command()
@click.option("--count", "counts", multiple=True, type=int, default=(10, 100, 1000, 10_000, 100_000), show_default=True)
@click.option("--format", "formats", multiple=True, type=click.Choice(list(FORMATS)), default=tuple(FORMATS))
@click.option("--verb", "verbs", multiple=True, type=click.Choice(["apply", "fold"]), default=("apply", "fold"))
@click.option("--runs", default=5, show_default=True, help="Rounds that count; one before them does not.")
@click.option("--unchecked", is_flag=True, help="With --no-verify.")
@click.option("--folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(counts: Sequence[int], formats: Sequence[str], verbs: Sequence[str], **options: Any) -> None:
    """Convert files of many tiny layers; options that choose may be repeated (--count 10 --count 1000).

    Seconds are medians of whole processes; the seconds for 1,000 layers leave out those of a file with one layer, which
    is measured in turns with the others.
    """
    folder = options["folder"] or processes.default_folder()
    console.print(processes.describe_machine(folder))
    with processes.scratch(folder) as place:
        for kind in formats:
            for verb in verbs:
                _measure(place, kind, verb, sorted({1, *counts}), options)


def _measure(place: Path, kind: str, verb: str, counts: Sequence[int], options: dict[str, Any]) -> None:
    commands: dict[str, Sequence[str | Path]] = {"import torch": IMPORT_TORCH}
    target = place / f"result{FORMATS[kind]}"
    for count in counts:
        source = place / f"{verb}-{count}{FORMATS[kind]}"
        _write(source, kind, count, verb == "fold")
        flags = ["--no-verify"] if options["unchecked"] else []
        commands[str(count)] = [*WNCONVERT, verb, source, "-o", target, "--quiet", *flags]
    found = processes.compare(commands, options["runs"], lambda: target.unlink(missing_ok=True))
    for path in place.iterdir():
        path.unlink()
    table = Table(title=f"{verb}, {kind}", title_justify="left", box=None, header_style="bold")
    for column in ("layers", "seconds", "min-max", "s for 1,000", "peak MB"):
        table.add_column(column, justify="right")
    each = {count: (found[str(count)].seconds - found["1"].seconds) / count * 1000 for count in counts[1:]}
    for name, summary in found.items():
        known = name.isdigit() and int(name) in each
        table.add_row(
            f"{int(name):,}" if name.isdigit() else name,
            f"{summary.seconds:.2f}",
            f"{summary.fastest:.2f}-{summary.slowest:.2f}",
            f"{each[int(name)]:.3f}" if known else "-",
            f"{summary.peak:,.0f}",
        )
    console.print(table)
    console.print(_verdict(each), end="\n\n")


def _verdict(each: dict[int, float]) -> str:
    largest = sorted(each)[-2:]
    # Fewer layers cost less than what one start of a process differs from the next.
    if len(largest) < 2 or largest[0] < FEWEST or each[largest[0]] <= 0:
        return f"too few layers to tell whether it is linear: needs two counts of {FEWEST:,} or more"
    ratio = each[largest[1]] / each[largest[0]]
    said = "linear" if ratio <= LINEAR else "NOT LINEAR"
    return f"{said}: a layer of {largest[1]:,} costs {ratio:.2f} times one of {largest[0]:,}"


def _write(path: Path, kind: str, count: int, split: bool) -> None:
    if kind != "onnx":
        flags = ["--layers", str(count), "--format", kind, *(["--split"] if split else [])]
        processes.run([PYTHON, HERE / "checkpoint_files.py", path, *flags])
        return
    plain = path.with_stem("plain") if split else path
    processes.run([PYTHON, HERE / "onnx_model_files.py", plain, "--nodes", str(count), "--width", "4", "--inline"])
    if split:
        processes.run([*WNCONVERT, "apply", plain, "-o", path, "--no-verify"])
        plain.unlink()


if __name__ == "__main__":
    main()
