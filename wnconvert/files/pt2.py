"""What `torch.export.save` writes: one exported program with its weights and example inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.export import ExportedProgram

from wnconvert.carriers.program import ProgramCarrier
from wnconvert.errors import InputError, UsageError
from wnconvert.files import pt2_load, torch_load
from wnconvert.files.magnitudes import of_tensors
from wnconvert.files.pt2_outputs import compare

if TYPE_CHECKING:
    from wnconvert.files import Document, ReadOptions
    from wnconvert.report.model import MagnitudeStatistics, OutputCheck


def recognise(path: Path) -> bool:
    """Whether the file is a zip archive with an exported program or a compiled one in it."""
    return torch_load.is_zip(path) and pt2_load.is_program(path)


def read(path: Path, options: ReadOptions) -> Pt2Document:
    """Open a program.

    Raises:
        InputError: it is damaged, is compiled, or holds Python objects and `unsafe_load` is not set.
        UsageError: a module is named that says what the layers are.
    """
    if options.arch is not None:
        raise UsageError(f"{path}: --arch is for checkpoints; an exported program says itself what its layers are")
    program, extra = pt2_load.load(path, unsafe=options.unsafe_load)
    return Pt2Document(program, extra)


class Pt2Document:
    """One open file. See `Document`."""

    format = "pt2"

    def __init__(self, program: ExportedProgram, extra: dict[str, str]) -> None:
        self.carrier = ProgramCarrier(program)
        self.notes: list[str] = []
        self._extra = extra

    def magnitudes(self) -> Mapping[str, MagnitudeStatistics]:
        """See `Document.magnitudes`."""
        split = (site for site in self.carrier.sites("torch") if site.state == "split" and not site.skip)
        return of_tensors((site.name, self.carrier.read_pair(site)[0]) for site in split)

    def save(self, folder: Path, name: str) -> None:
        """See `Document.save`."""
        program, target = self.carrier.rebuild(), folder / name
        # A name, which has to end so: into an open file, torch writes by way of Python, and where Ctrl-C interrupts
        # that, its C++ ends the process.
        written = target if target.suffix == ".pt2" else folder / f"{name}.pt2"
        try:
            with pt2_load.told_by_torch():
                torch.export.save(program, written, extra_files=self._extra)
        except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{name}: cannot be written: {torch_load.first_line(error)}") from error
        written.replace(target)

    def compare_outputs(self, other: Document) -> OutputCheck | None:
        """See `Document.compare_outputs`."""
        if not isinstance(other, Pt2Document):
            return None
        return compare(self.carrier.rebuild(), other.carrier.rebuild())
