"""A conversion from file to file: read, convert, stage the result, check it, and only then give it its name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from wnconvert import convert, files, verify
from wnconvert.errors import InputError, UsageError, VerificationError
from wnconvert.files import Document, ReadOptions
from wnconvert.files.staging import Staging
from wnconvert.report.model import Report
from wnconvert.sites import Dim, Scheme, Selection

SUFFIX = {"apply": "wn", "fold": "folded", "rename": "renamed"}
"""Goes before the file's own suffix in the default output name: `model.wn.pt`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """What to do to a file.

    Attributes:
        command: `apply`, `fold` or `rename`.
        selection: which sites.
        dim: which axis `apply` keeps.
        names: how `apply` and `rename` spell the keys.
        reading: how to open the file.
        dry_run: report what would be done, write nothing.
        overwrite: replace an existing output.
        check: read the result back and compare it before it appears under its name.
    """

    command: str
    selection: Selection = Selection()
    dim: Dim = "torch"
    names: Scheme = "legacy"
    reading: ReadOptions = ReadOptions()
    dry_run: bool = False
    overwrite: bool = False
    check: bool = True


def default_output(path: Path, command: str) -> Path:
    """`model.pt` -> `model.wn.pt`, `generator.pth.tar` -> `generator.folded.pth.tar`, beside the input."""
    name = path.name
    known = [suffix for row in files.FORMATS for suffix in row.suffixes]
    tail = next((s for s in sorted([".pth.tar", *known], key=len, reverse=True) if name.endswith(s)), path.suffix)
    return path.with_name(f"{name.removesuffix(tail)}.{SUFFIX[command]}{tail}")


def convert_file(path: Path, output: Path | None, job: Job, progress: convert.Progress = iter) -> Report:
    """Convert a file. The output appears complete and checked, or not at all; the input is never written to.

    Raises:
        InputError: the input cannot be read, or the output cannot be written.
        UsageError: the output is the input, or exists and may not be replaced; a pattern matches nothing.
        NothingToDo: nothing was converted.
        VerificationError: the result differs from what it must be. Nothing was written.
    """
    target = output or default_output(path, job.command)
    if not job.dry_run:
        _require_free(path, target, job.overwrite)
    document = files.read(path, job.reading)
    report = _run(document, job, progress)
    report.input, report.format = str(path), document.format
    report.notes += document.notes
    if job.dry_run:
        return report
    report.output = str(target)
    with Staging(target) as staging:
        document.save(staging.folder, target.name)
        if job.check:
            _check(path, staging.folder / target.name, job, report)
        staging.commit()
    return report


def _run(document: Document, job: Job, progress: convert.Progress) -> Report:
    common = {"selection": job.selection, "dry_run": job.dry_run}
    match job.command:
        case "apply":
            return convert.apply(document.carrier, dim=job.dim, names=job.names, progress=progress, **common)
        case "fold":
            return convert.fold(document.carrier, progress=progress, **common)
        case "rename":
            return convert.rename(document.carrier, job.names, **common)
        case other:
            raise UsageError(f"no such command: {other}")


def _check(path: Path, result: Path, job: Job, report: Report) -> None:
    # Both are read afresh: what was converted in memory proves nothing about what a reader of the file will see.
    before, after = files.read(path, job.reading), files.read(result, job.reading)
    comparison = verify.compare_weights(before.carrier, after.carrier)
    report.weights_verified = comparison.identical
    if not comparison.identical:
        raise VerificationError(f"{path}: the result is not the same function: {comparison.first_difference}")
    report.outputs = before.compare_outputs(after)
    if report.outputs is not None and report.outputs.equal is False:
        raise VerificationError(
            f"{path}: outputs differ by {report.outputs.largest:.3g}, more than the {report.outputs.tolerance:.3g} "
            "allowed; --no-verify writes the result all the same"
        )


def _require_free(path: Path, target: Path, overwrite: bool) -> None:
    if target.exists() and path.exists() and target.samefile(path):
        raise UsageError(f"{target}: the output would replace the input; choose another -o")
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists; --overwrite replaces it")
    if not target.parent.is_dir():
        raise InputError(f"{target.parent}: no such folder to write to")
