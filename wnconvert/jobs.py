"""A conversion from file to file: read, convert, stage the result, check it, and only then give it its name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from wnconvert import compare, convert, files
from wnconvert.errors import InputError, NothingToDo, PairError, UsageError, VerificationError
from wnconvert.files import Document, ReadOptions
from wnconvert.files.staging import Staging
from wnconvert.ranks import ALONE, Ranks
from wnconvert.report.model import Report
from wnconvert.sites import Dim, Scheme, Selection
from wnconvert.watch import SILENT, Watcher

if TYPE_CHECKING:
    from wnconvert.stream.receipts import Receipts

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
        resume: go on from the shards that an interrupted run of the same job has finished.
    """

    command: str
    selection: Selection = Selection()
    dim: Dim = "torch"
    names: Scheme = "legacy"
    reading: ReadOptions = ReadOptions()
    dry_run: bool = False
    overwrite: bool = False
    check: bool = True
    resume: bool = False


def default_output(path: Path, command: str) -> Path:
    """`model.pt` -> `model.wn.pt`, `generator.pth.tar` -> `generator.folded.pth.tar`, beside the input.

    Shards go from folder to folder: `llama/` or its index -> `llama.wn`.
    """
    folder = _folder_of(path)
    if folder is not None:
        return folder.with_name(f"{folder.name}.{SUFFIX[command]}")
    name = path.name
    known = [suffix for row in files.FORMATS for suffix in row.suffixes]
    tail = next((s for s in sorted([".pth.tar", *known], key=len, reverse=True) if name.endswith(s)), path.suffix)
    return path.with_name(f"{name.removesuffix(tail)}.{SUFFIX[command]}{tail}")


def convert_file(path: Path, output: Path | None, job: Job, watcher: Watcher = SILENT, crew: Ranks = ALONE) -> Report:
    """Convert a file. The output appears complete and checked, or not at all; the input is never written to.

    Args:
        path: the input.
        output: the result, or a folder to put it in under its default name. None for that name beside the input.
        job: what to do.
        watcher: is told how far it is.
        crew: the processes that all call this, and divide the work.

    Raises:
        InputError: the input cannot be read, or the output cannot be written.
        UsageError: the output is the input, or exists and may not be replaced; a pattern matches nothing; several
            processes are to convert what cannot be divided.
        NothingToDo: nothing was converted.
        VerificationError: the result differs from what it must be. Nothing was written.
        RankDied: another process is gone.
    """
    if job.command not in SUFFIX:
        raise UsageError(f"no such command: {job.command}; there are {', '.join(SUFFIX)}")
    if job.dry_run:
        return crew.first(lambda: _convert_file(path, output, job, watcher, ALONE))
    return _convert_file(path, output, job, watcher, crew)


def _convert_file(path: Path, output: Path | None, job: Job, watcher: Watcher, crew: Ranks) -> Report:
    target, document = crew.agreed(lambda: _open(path, output, job, watcher, crew))
    try:
        report = crew.agreed(lambda: _run(document, job, watcher))
        _describe(report, path, document)
        if not job.dry_run:
            report.output = str(target)
            _write(path, target, document, job, watcher=watcher, report=report, crew=crew)
    except NothingToDo as nothing:
        if nothing.report is not None:
            _describe(nothing.report, path, document)
        raise NothingToDo(f"{path}: {nothing}", nothing.report) from nothing
    except PairError as error:
        # What multiplies pairs knows the tensor, not the file.
        raise PairError(f"{path}: {error}") from error
    return report


def _open(path: Path, output: Path | None, job: Job, watcher: Watcher, crew: Ranks) -> tuple[Path, Document]:
    target = _target(path, output, job.command)
    if crew.count > 1 and not files.recognise(path).folders:
        raise UsageError(f"{path}: one file is not divided among {crew.count} processes; run it without torchrun")
    if job.command == "apply":
        _require_carriable(path, output, target)
    if not job.dry_run:
        _require_free(path, target, job.command, overwrite=job.overwrite)
    watcher.stage("reading")
    return target, files.read(path, job.reading)


def _write(
    path: Path, target: Path, document: Document, job: Job, *, watcher: Watcher, report: Report, crew: Ranks
) -> None:
    shared = isinstance(document, files.Shared)
    if job.resume and not shared:
        raise UsageError(f"{path}: --resume is for folders of several files")
    with Staging(target, partial=shared, resume=job.resume, crew=crew) as staging:
        watcher.stage("writing")
        if isinstance(document, files.Watched):
            document.watch(watcher)
        if isinstance(document, files.Shared):
            document.join(crew)
        receipts = document.save(staging.folder, target.name)
        convert.settle(report, document.carrier)
        report.files = staging.sizes()
        _require_companions_free(staging, job.overwrite)
        if job.check:
            result = staging.folder / target.name
            _check(path, result, job, receipts=receipts, watcher=watcher, report=report, crew=crew)
        staging.commit()


def _run(document: Document, job: Job, watcher: Watcher) -> Report:
    carrier, selection = document.carrier, job.selection
    if job.command == "rename":
        return convert.rename(carrier, job.names, selection=selection, dry_run=job.dry_run)
    if job.command == "fold":
        watcher.stage("folding")
        return convert.fold(carrier, selection=selection, dry_run=job.dry_run, progress=watcher.each)
    watcher.stage("splitting")
    return convert.apply(
        carrier, selection=selection, dim=job.dim, names=job.names, dry_run=job.dry_run, progress=watcher.each
    )


def _describe(report: Report, path: Path, document: Document) -> None:
    report.input, report.format = str(path), document.format
    report.notes += document.notes


def _check(
    path: Path,
    result: Path,
    job: Job,
    *,
    receipts: Receipts | None,
    watcher: Watcher,
    report: Report,
    crew: Ranks,
) -> None:
    watcher.stage("checking weights")
    # Both are read afresh: what was converted in memory proves nothing about what a reader of the file will see.
    # Receipts only save computing anew what a reader finds.
    if receipts is not None:
        receipts.forget_changed()
    before, after = crew.agreed(lambda: (files.read(path, job.reading), files.read(result, job.reading)))
    comparison = compare.compare_weights(before.carrier, after.carrier, receipts=receipts, watcher=watcher, crew=crew)
    report.weights_verified, report.tensors_verified = comparison.identical, comparison.compared
    if not comparison.identical:
        raise VerificationError(f"{path}: the result is not the same function: {comparison.first_difference}")
    watcher.stage("checking outputs")
    report.outputs = before.compare_outputs(after)
    if report.outputs is not None and report.outputs.equal is False:
        allowed = (
            f"outputs differ by {report.outputs.largest:.3g}, more than the {report.outputs.tolerance:.3g} allowed"
        )
        raise VerificationError(f"{path}: {report.outputs.note or allowed}; --no-verify writes the result all the same")


def _folder_of(path: Path) -> Path | None:
    """The folder that an input of several files is, or None for a single file."""
    if path.is_dir():
        return path if path.name not in ("", "..") else path.resolve()
    return path.absolute().parent if path.name.endswith(".index.json") else None


def _target(path: Path, output: Path | None, command: str) -> Path:
    default = default_output(path, command)
    if output is None:
        return default
    return output / default.name if output.is_dir() else output


def _require_carriable(path: Path, output: Path | None, target: Path) -> None:
    """Where the format of the input cannot carry a pair, the output must be named, in a format that can."""
    source = files.recognise(path)
    named = files.format_of_name(target.name)
    if source.splits_into and (output is None or named is None or named.name not in source.splits_into):
        suggested = path.with_name(f"{path.stem}.{SUFFIX['apply']}.safetensors")
        raise UsageError(
            f"{path}: a {source.name} archive cannot carry g and v; `wnconvert apply {path} -o {suggested}` writes its "
            "state dict, split, for wnconvert.load_into"
        )


def _require_free(path: Path, target: Path, command: str, *, overwrite: bool) -> None:
    folder = _folder_of(path)
    source = folder or path
    if target.exists() and source.exists() and target.samefile(source):
        raise UsageError(f"{target}: the output would replace the input; choose another -o")
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists; --overwrite replaces it")
    if target.exists() and target.is_dir() != (folder is not None):
        is_, becomes = ("folder", "file") if target.is_dir() else ("file", "folder")
        raise UsageError(f"{target} is a {is_}, and the result a {becomes}, which cannot replace it; choose another -o")
    if target.is_dir() and _reaches_into(source, target):
        raise UsageError(f"{target}: the output would replace a folder that holds the input; choose another -o")
    if not target.parent.is_dir():
        raise InputError(f"{target.parent}: no such folder to write to")
    named = files.format_of_name(target.name)
    if named and path.exists() and command == "apply" and named.name in files.recognise(path).splits_into:
        return
    # A file under the wrong suffix keeps it: other programs know it by that.
    if named and path.exists() and named not in (files.recognise(path), files.format_of_name(path.name)):
        raise UsageError(f"{target}: the format stays {files.recognise(path).name}, so the suffix of -o must fit that")


def _reaches_into(source: Path, folder: Path) -> bool:
    """Whether an input, or what its links lead to, is inside a folder."""
    inside = folder.resolve()
    return any(path.resolve().is_relative_to(inside) for path in [source, *source.rglob("*")])


def _require_companions_free(staging: Staging, overwrite: bool) -> None:
    taken = [name for name in staging.sizes() if (staging.target.parent / name).exists()]
    if taken and not overwrite:
        raise UsageError(f"{staging.target.parent / taken[0]} exists; --overwrite replaces it")
