"""The command line of the zoo."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import wnconvert
from zoo import environment, pool, report, results
from zoo.sample import SAMPLE

FOLDER = Path(__file__).parent.parent.parent / ".models" / "zoo"


@click.command()
@click.argument("names", nargs=-1)
@click.option("--library", "libraries", multiple=True, type=click.Choice(list(pool.LIBRARIES)), help="Only this one.")
@click.option("--sample", is_flag=True, help="A fixed sample of all libraries, under 3 minutes.")
@click.option("--every", default=1, show_default=True, help="Only every so many names of each library.")
@click.option("--retry", is_flag=True, help="Only what failed or was never tried.")
@click.option("--workers", default=os.cpu_count() or 1, show_default=True, help="Processes of one thread each.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds for one network.")
@click.option("--memory", default=8, show_default=True, help="GiB for one process.")
@click.option("--folder", default=FOLDER, type=click.Path(path_type=Path), help="Where results are kept.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the page of the documentation there.")
def main(names: tuple[str, ...], libraries: tuple[str, ...], **options: Any) -> None:
    """Convert every architecture of timm, torchvision and transformers and back. NAMES choose some by name.

    Results are kept, and a run goes on where the last one stopped; `results.jsonl` has one line per network, and
    `zoo.json` the summary. Exits with 3 if anything is wrong.
    """
    tool = results.fingerprint(Path(wnconvert.__file__).parent)
    options["folder"].mkdir(parents=True, exist_ok=True)
    path = options["folder"] / ("sample.jsonl" if options["sample"] else "results.jsonl")
    tasks = _tasks(names, libraries or tuple(pool.LIBRARIES), options["sample"], options["every"])
    todo = results.left(tasks, results.load(path), tool, retry=options["retry"])
    start = time.monotonic()
    _run(todo, path, tool, options)
    done = results.load(path)
    records = [done[task] for task in tasks if task in done]
    _finish(records, time.monotonic() - start, options)
    sys.exit(3 if report.wrong(records) else 0)


def _tasks(names: tuple[str, ...], libraries: tuple[str, ...], sample: bool, every: int) -> list[pool.Task]:
    if sample:
        return [task for task in SAMPLE if task[0] in libraries]
    environment.prepare(memory=environment.MEMORY)
    found = []
    for library in libraries:
        known = importlib.import_module(pool.LIBRARIES[library]).names()
        found += [(library, name) for name in known[::every] if not names or name in names]
    if not found:
        raise click.UsageError("no such name")
    return found


def _run(todo: list[pool.Task], path: Path, tool: str, options: dict[str, Any]) -> None:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    console = Console(stderr=True)
    shown = Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )
    with shown as progress:
        bar = progress.add_task("zoo", total=len(todo))
        outcomes = pool.run(
            todo, workers=options["workers"], timeout=options["timeout"], memory=options["memory"] << 30
        )
        for outcome in outcomes:
            record = _record(outcome, tool)
            results.append(path, record)
            for line in report.wrong([record]):
                console.print(line, markup=False, soft_wrap=True)
            progress.update(bar, advance=1, description=record["name"][:30])


def _record(outcome: dict[str, Any], tool: str) -> results.Record:
    """An outcome to keep. A process that was killed leaves none: that counts as wrong until somebody has looked."""
    if "failure" in outcome:
        empty = {"built": False, "reason": outcome["failure"], "wrong": [], "missed": [], "skipped": {}, "unknown": []}
        outcome = {**empty, **{key: outcome[key] for key in ("library", "name", "seconds")}}
    return {**outcome, "tool": tool}


def _finish(records: list[results.Record], seconds: float, options: dict[str, Any]) -> None:
    rows = report.summary(records)
    minutes = sum(record["seconds"] for record in records) / 60
    whole = {"seconds": round(seconds), "computing_minutes": round(minutes, 1), "summary": rows}
    whole |= {
        "not_built": report.reasons(records),
        "left_alone": report.skipped(records),
        "wrong": report.wrong(records),
    }
    (options["folder"] / "zoo.json").write_text(json.dumps(whole, indent=2))
    if options["markdown"]:
        options["markdown"].write_text(report.markdown(records, "scripts/run_zoo --markdown docs/zoo.md", minutes))
    table = Table(*report.COLUMNS)
    for row in rows:
        table.add_row(*(str(row[column]) for column in report.COLUMNS))
    # A log has no width; the table needs this much.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)
    for line, count in report.reasons(records).most_common(40):
        console.print(f"not built: {count} x {line}", markup=False, soft_wrap=True)
    for line in report.wrong(records):
        console.print(f"WRONG {line}", markup=False, soft_wrap=True)
