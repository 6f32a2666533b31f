"""TorchScript archives: `torch.jit.save` of a scripted or traced module.

Reading, listing and editing one runs nothing of it: the code is parsed, and no class or function that its pickle names
is imported. Only a result is loaded with torch.jit.load, to see that torch takes it, and a traced network is run on
random inputs of the shapes it was traced with, to compare outputs. That runs its TorchScript code, which cannot call
Python, but has operators that write files and may call operators of other libraries: an archive that names any of those
is neither loaded nor run.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from wnconvert.carriers.torchscript import TorchScriptCarrier
from wnconvert.carriers.torchscript.archive import Archive
from wnconvert.carriers.torchscript.carrier import NO_MOBILE_FOLD
from wnconvert.errors import UsageError, VerificationError
from wnconvert.files import torchscript_run
from wnconvert.files.magnitudes import of_tensors
from wnconvert.report.model import MagnitudeStatistics, OutputCheck

if TYPE_CHECKING:
    from wnconvert.files import Document, ReadOptions


def recognise(path: Path) -> bool:
    """Whether a file is a zip archive with code in it."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [name.split("/", 1)[-1] for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False
    return "archive_format" not in entries and any(entry.startswith("code/") for entry in entries)


def read(path: Path, options: ReadOptions) -> TorchScriptDocument:
    """Open an archive.

    Raises:
        InputError: it is damaged, too old, or its code cannot be parsed.
        UsageError: a module is named that says what the layers are.
    """
    if options.arch is not None:
        raise UsageError(f"{path}: --arch is for checkpoints; the code in a TorchScript archive says what it holds")
    return TorchScriptDocument(path)


class TorchScriptDocument:
    """One open archive. See `Document`."""

    format = "torchscript"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.carrier = TorchScriptCarrier(Archive(path, str(path)))
        self.notes = [NO_MOBILE_FOLD] if self.carrier.is_mobile else []

    def magnitudes(self) -> Mapping[str, MagnitudeStatistics]:
        """See `Document.magnitudes`."""
        split = (site for site in self.carrier.sites("torch") if site.state == "split")
        return of_tensors((site.name, self.carrier.read_pair(site)[0]) for site in split)

    def tensors(self) -> dict[str, Tensor]:
        """Its state dict."""
        return self.carrier.state()

    def save(self, folder: Path, name: str) -> None:
        """See `Document.save`. After a split, this is the state dict, since an archive cannot hold a pair.

        Raises:
            VerificationError: torch cannot load the result, although it can load the input.
        """
        target = folder / name
        if self.carrier.is_split:
            _save_state(self.carrier.state(), target)
            return
        with target.open("wb") as file:
            self.carrier.write(file)
        problem = torchscript_run.cannot_load(target)
        if problem is not None and torchscript_run.cannot_load(self.path) is None:
            raise VerificationError(f"{self.path}: torch cannot load the result: {problem}")

    def compare_outputs(self, other: Document) -> OutputCheck | None:
        """Run both on random inputs like those with which they were traced."""
        if not isinstance(other, TorchScriptDocument):
            return None
        differing = _attributes(self.carrier, other.carrier)
        if differing is not None:
            return OutputCheck(False, note=f"{differing}, which is no parameter or buffer, differs")
        outputs = torchscript_run.compare(self.path, other.path)
        if outputs.equal is None and _constants(self.carrier) != _constants(other.carrier):
            # The code may use other ones and still compute the same.
            return OutputCheck(None, note=f"the constants of the code differ; {outputs.note}")
        return outputs


def _save_state(state: dict[str, Tensor], target: Path) -> None:
    if target.suffix != ".safetensors":
        torch.save(state, target)
        return
    # safetensors refuses tensors that share memory or have holes.
    apart = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    save_file(apart, target, metadata={"format": "pt"})


def _attributes(a: TorchScriptCarrier, b: TorchScriptCarrier) -> str | None:
    """A plain attribute that differs: no state dict holds it, but two networks with other ones are not the same."""
    left, right = a.fixed("attribute"), b.fixed("attribute")
    shared = (name for name in left if name in right)
    return next((name for name in shared if _fingerprint(left[name]()) != _fingerprint(right[name]())), None)


def _constants(carrier: TorchScriptCarrier) -> Counter[object]:
    """The constants of the code without their names, which only count them in the order of the code."""
    return Counter(_fingerprint(load()) for load in carrier.fixed("constant").values())


def _fingerprint(tensor: Tensor) -> object:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return tensor.dtype, tensor.shape, hashlib.sha256(data).digest()
