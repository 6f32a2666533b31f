"""Time `apply` and `fold` on ONNX models with external data against what loads and saves the same model unchanged."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import processes
from processes import HERE, IMPORT_TORCH, PYTHON, WNCONVERT, Summary
from results import Line, console, print_table

PEERS = ("onnx", "onnx_ir", "onnxsim", "onnxslim")
_WRITER = (PYTHON, HERE / "onnx_model_files.py")
_WIDTH = 2048
_LAYER = 4 * _WIDTH * _WIDTH
_TIMES_IN_MEMORY = 3.2
"""What a library holds that loads a model, serialises it and saves it, as a multiple of the model."""


@click.command()
@click.option("--gb", "sizes", multiple=True, type=float, default=(0.1, 1.0, 2.4), show_default=True)
@click.option("--runs", default=5, show_default=True, help="Rounds that count; one before them does not.")
@click.option("--checked/--unchecked", default=True, help="Also time with the result read back and run.")
@click.option("--peer", "peers", multiple=True, type=click.Choice(PEERS), default=PEERS, help="Only these.")
@click.option("--folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(sizes: Sequence[float], peers: Sequence[str], **options: Any) -> None:
    """Convert ONNX models with external data; options that choose may be repeated (--gb 1 --gb 2.4).

    Seconds are medians of whole processes, in turns. The ratios leave out the start of a process, `import torch` for
    wnconvert and an empty Python with the package imported for the others, and compare the rest with `cp` of the model
    and its data, and with each peer. A peer loads the model and saves it with its data, and changes nothing.

    \b
    beside     into the folder of the input, whose data file is referred to
    elsewhere  into another folder, which gets all data
    checked    the same with the result read back and run in ONNX Runtime
    """
    folder = options["folder"] or processes.default_folder()
    console.print(processes.describe_machine(folder))
    done = 0
    with processes.scratch(folder) as place:
        usable = [name for name in peers if _works(name, place)]
        for size in sizes:
            missing = processes.shortage(place, 3.1 * size * 1e9, _TIMES_IN_MEMORY * size * 1e9)
            if missing:
                console.print(f"{size:g} GB: skipped, {missing}\n")
                continue
            _measure(place, size, usable, options)
            done += 1
    sys.exit(0 if done else 1)


def _works(peer: str, place: Path) -> bool:
    """Whether a peer is here and takes a small model."""
    if not importlib.util.find_spec(peer):
        console.print(f"without {peer}: not installed")
        return False
    source, target = place / "in.onnx", place / "out.onnx"
    processes.run([*_WRITER, source, "--nodes", "2", "--width", "64"])
    try:
        processes.run([PYTHON, HERE / "peers.py", peer, source, target])
    except processes.Failed as error:
        console.print(f"without {peer}: {str(error).splitlines()[-1]}", markup=False)
        return False
    finally:
        for path in place.iterdir():
            path.unlink()
    return True


def _measure(place: Path, size: float, peers: Sequence[str], options: dict[str, Any]) -> None:
    source, split, target = place / "in" / "model.onnx", place / "split" / "model.onnx", place / "out" / "model.onnx"
    for path in (source, split, target):
        path.parent.mkdir(exist_ok=True)
    layers = max(1, round(size * 1e9 / _LAYER))
    processes.run([*_WRITER, source, "--nodes", str(layers), "--width", str(_WIDTH)])
    processes.run([*WNCONVERT, "apply", source, "-o", split, "--no-verify"])
    commands = _wnconvert("apply", source, target, options) | _wnconvert("fold", split, target, options)
    starts: dict[str, Sequence[str | Path]] = {"start wnconvert": IMPORT_TORCH}
    for name in peers:
        commands[name] = [PYTHON, HERE / "peers.py", name, source, target]
        starts[f"start {name}"] = [PYTHON, "-c", f"import {name}"]
    data = source.with_name(f"{source.name}.data")
    copy = processes.copy_after_import([source, data], target.parent)

    def clean() -> None:
        for path in [*target.parent.iterdir(), *place.glob("*/beside*")]:
            path.unlink()

    found = processes.compare({"cp": copy, **starts, **commands}, options["runs"], clean, memory=data.stat().st_size)
    clean()
    _print(f"{size:g} GB in {layers} layers", found, peers)
    for path in place.glob("*/*"):
        path.unlink()


def _wnconvert(verb: str, source: Path, target: Path, options: dict[str, Any]) -> dict[str, Sequence[str | Path]]:
    command = [*WNCONVERT, verb, source, "--quiet", "-o"]
    found: dict[str, Sequence[str | Path]] = {
        f"{verb} beside": [*command, source.with_name("beside.onnx"), "--no-verify"],
        f"{verb} elsewhere": [*command, target, "--no-verify"],
    }
    if options["checked"]:
        found[f"{verb} elsewhere, checked"] = [*command, target]
    return found


def _print(title: str, found: dict[str, Summary], peers: Sequence[str]) -> None:
    lines = {}
    for name, summary in found.items():
        if not name.startswith("start "):
            start = found.get(f"start {name}", found["start wnconvert"])
            lines[name] = Line(name, summary, start)
    print_table(title, list(lines.values()), {name: lines[name] for name in ("cp", *peers)})


if __name__ == "__main__":
    main()
