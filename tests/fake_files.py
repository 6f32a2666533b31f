"""A file format with as little in it as can be, to test what stands above formats, and to break on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from wnconvert import names, weightnorm
from wnconvert.files import Document, Format, ReadOptions
from wnconvert.report.model import MagnitudeStatistics, OutputCheck
from wnconvert.sites import Dim, Scheme, Site, pair_axis

MAGIC = b"fake"
ROW = Format("fake", (".fake",), "tests.fake_files")
OTHER = Format("other", (".other",), "tests.other_fake_files")


class FakeCarrier:
    """A dict of tensors, in which every matrix is a Linear weight."""

    walker = "keys"
    walker_note = None

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def sites(self, dim: Dim) -> list[Site]:
        found = []
        pairs = {pair.v: pair for pair in names.find_pairs({k: tuple(t.shape) for k, t in self.tensors.items()})}
        for key, tensor in self.tensors.items():
            shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            if key in pairs:
                name, scheme = pairs[key].name, pairs[key].scheme
                groups, axis = pair_axis(self.tensors[pairs[key].g].shape, shape)
                found.append(Site(name, "Linear", shape, dtype, axis, groups, "split", scheme))
            elif tensor.dim() == 2 and not key.endswith("_g") and "original0" not in key:
                kind = "Embedding" if "embed" in key else "Linear"
                found.append(Site(key, kind, shape, dtype, None if dim is None else 0, evidence="it is a matrix"))
        return found

    def read_weight(self, site: Site) -> Tensor:
        return self.tensors[site.name]

    def read_pair(self, site: Site) -> tuple[Tensor, Tensor]:
        g, v = names.spell(site.name, site.scheme or "legacy")
        return self.tensors[g], self.tensors[v]

    def g_dtype(self, site: Site) -> None:
        return None

    def put_pair(self, site: Site, g: Tensor, v: Tensor, scheme: Scheme) -> None:
        del self.tensors[site.name]
        self.tensors |= dict(zip(names.spell(site.name, scheme), (g, v), strict=True))

    def put_weight(self, site: Site, weight: Callable[[], Tensor]) -> None:
        for key in names.spell(site.name, site.scheme or "legacy"):
            if key not in self.tensors:
                raise KeyError(key)
        self.tensors[site.name] = weight()
        for key in names.spell(site.name, site.scheme or "legacy"):
            del self.tensors[key]

    def rename(self, site: Site, scheme: Scheme) -> None:
        for old, new in zip(
            names.spell(site.name, site.scheme or "legacy"), names.spell(site.name, scheme), strict=True
        ):
            self.tensors[new] = self.tensors.pop(old)

    def effective(self) -> Mapping[str, Callable[[], Tensor]]:
        plain = dict(self.tensors)
        for site in self.sites("torch"):
            if site.state == "split":
                g, v = (plain.pop(key) for key in names.spell(site.name, site.scheme or "legacy"))
                plain[site.name] = weightnorm.fold(g, v)
        return {name: (lambda t=t: t) for name, t in plain.items()}


class FakeDocument:
    """What `read` gives. The class attributes make every document fail in one way."""

    format = "fake"
    damage: Callable[[dict[str, Tensor]], None] | None = None
    failure: BaseException | None = None
    outputs: OutputCheck | None = None
    companion: str | None = None

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.carrier = FakeCarrier(tensors)
        self.notes = ["a note about the file"]

    def magnitudes(self) -> Mapping[str, MagnitudeStatistics]:
        return {
            site.name: MagnitudeStatistics(-1.5, 0.25, float("inf"), 2, 1)
            for site in self.carrier.sites("torch")
            if site.state == "split"
        }

    def save(self, folder: Path, name: str) -> None:
        tensors = dict(self.carrier.tensors)
        if FakeDocument.damage:
            FakeDocument.damage(tensors)
        write(folder / name, tensors)
        if FakeDocument.companion:
            (folder / FakeDocument.companion).write_bytes(b"beside")
        if FakeDocument.failure:
            raise FakeDocument.failure

    def compare_outputs(self, other: Document) -> OutputCheck | None:
        return FakeDocument.outputs


def recognise(path: Path) -> bool:
    return path.is_file() and path.read_bytes().startswith(MAGIC)


def read(path: Path, options: ReadOptions) -> FakeDocument:
    with path.open("rb") as file:
        file.seek(len(MAGIC))
        return FakeDocument(torch.load(file, weights_only=True))


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    """Make a file of this format."""
    with path.open("wb") as file:
        file.write(MAGIC)
        torch.save(tensors, file)
    return path
