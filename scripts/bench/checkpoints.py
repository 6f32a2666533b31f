"""Time `apply` and `fold` on large checkpoints against a copy of the file and against torch's own functions."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import processes
from processes import HERE, IMPORT_TORCH, PYTHON, WNCONVERT
from results import Line, console, print_table

FORMATS = {"safetensors": ".safetensors", "torch": ".pt"}
_WRITER = (PYTHON, HERE / "checkpoint_files.py")
_PEERS = (PYTHON, HERE / "peers.py")
_SLACK = 64 << 20
_IMPORTS = 400 << 20
"""What a process takes that has torch imported, with room for blocks of tensors."""
_TIMES_IN_MEMORY = 2.5
"""What torch's pipeline holds at its peak, as a multiple of the file: its weights, new ones, and what it writes."""


@click.command()
@click.option("--gb", "sizes", multiple=True, type=float, default=(0.1, 1.0, 4.0), show_default=True)
@click.option("--dtype", "dtypes", multiple=True, default=("float32", "bfloat16"), show_default=True)
@click.option("--format", "formats", multiple=True, type=click.Choice(list(FORMATS)), default=tuple(FORMATS))
@click.option("--case", "cases", multiple=True, type=click.Choice(["apply", "untouched", "trained"]))
@click.option("--runs", default=5, show_default=True, help="Rounds that count; one before them does not.")
@click.option("--unchecked", is_flag=True, help="Also time --no-verify: nothing is read back, as by torch and cp.")
@click.option("--peer/--no-peer", default=True, help="Time torch's own functions as well.")
@click.option("--folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(sizes: Sequence[float], dtypes: Sequence[str], formats: Sequence[str], **options: Any) -> None:
    """Convert synthetic checkpoints of realistic shapes; options that choose may be repeated (--gb 1 --gb 16).

    Seconds are medians of whole processes. The ratios leave out the start of the process, `import torch`, which the
    column `start` shows, and compare the rest with `cp` of the same input and with torch's own functions. All commands
    of a table run in turns, each after memory for its output was touched, and `cp` after such a start too. The input is
    in the page cache as far as it fits. Files go to --folder: memory where there is a file system in it. On a disk,
    wnconvert ends when its result is there; so does `cp, synced`, but not `cp`.

    \b
    apply      a plain checkpoint
    untouched  fold of what apply wrote
    trained    fold of a checkpoint whose g is not the norm of v
    """
    folder = options["folder"] or processes.default_folder()
    console.print(processes.describe_machine(folder))
    done = 0
    with processes.scratch(folder) as place:
        for size in sizes:
            for dtype in dtypes:
                for kind in formats:
                    done += _measure(place, size, dtype, kind, options)
    sys.exit(0 if done else 1)


def _measure(place: Path, size: float, dtype: str, kind: str, options: dict[str, Any]) -> int:
    """Print the tables of one checkpoint and return how many there are."""
    title = f"{size:g} GB, {dtype}, {kind}"
    # At worst the pair, its source while it is made, and the output of one command.
    missing = processes.shortage(place, 2.05 * size * 1e9 + _SLACK, _IMPORTS)
    if missing:
        console.print(f"{title}: skipped, {missing}\n")
        return 0
    missing = processes.shortage(place, 2.05 * size * 1e9 + _SLACK, _TIMES_IN_MEMORY * size * 1e9 + _IMPORTS)
    if missing and options["peer"]:
        console.print(f"{title}: without torch's functions, {missing}")
    peer = options["peer"] and not missing
    plain, split = place / f"plain{FORMATS[kind]}", place / f"split{FORMATS[kind]}"
    shape = ["--gb", str(size), "--dtype", dtype, "--format", kind]
    cases = options["cases"] or ("apply", "untouched", "trained")
    if "apply" in cases or "untouched" in cases:
        processes.run([*_WRITER, plain, *shape])
    if "apply" in cases:
        _table(f"apply, {title}", "apply", plain, peer, options)
    if "untouched" in cases:
        processes.run([*WNCONVERT, "apply", plain, "-o", split, "--no-verify"])
        plain.unlink()
        _table(f"fold of an untouched pair, {title}", "fold", split, peer, options)
    if "trained" in cases:
        plain.unlink(missing_ok=True)
        split.unlink(missing_ok=True)
        processes.run([*_WRITER, split, *shape, "--split"])
        _table(f"fold of a trained pair, {title}", "fold", split, peer, options)
    for path in (plain, split):
        path.unlink(missing_ok=True)
    return len(cases)


def _table(title: str, verb: str, source: Path, peer: bool, options: dict[str, Any]) -> None:
    target = source.with_stem("result")
    wnconvert = [*WNCONVERT, verb, source, "-o", target, "--quiet"]
    commands: dict[str, Sequence[str | Path]] = {
        "cp": processes.copy_after_import([source], target),
        "start": IMPORT_TORCH,
        "wnconvert": wnconvert,
    }
    if not processes.in_memory(source.parent):
        commands["cp, synced"] = processes.copy_after_import([source], target, synced=True)
    if options["unchecked"]:
        commands["wnconvert --no-verify"] = [*wnconvert, "--no-verify"]
    if peer:
        commands["torch"] = [*_PEERS, verb, source, target]
    memory = source.stat().st_size
    found = processes.compare(commands, options["runs"], lambda: target.unlink(missing_ok=True), memory=memory)
    target.unlink(missing_ok=True)
    start = found.pop("start")
    lines = {name: Line(name, summary, start) for name, summary in found.items()}
    print_table(
        title, list(lines.values()), {name: lines[name] for name in ("cp", "cp, synced", "torch") if name in lines}
    )


if __name__ == "__main__":
    if shutil.which("cp") is None:
        sys.exit("needs the command cp")
    main()
