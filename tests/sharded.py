"""Checkpoints of several files in every format that has them, and processes that work on one as threads of this one."""

from __future__ import annotations

import dataclasses
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from scripts.soak import parts
from wnconvert.errors import WnconvertError
from wnconvert.ranks import Ranks

SHARDS = 4


@dataclasses.dataclass(frozen=True)
class Sharded:
    """One way to write a checkpoint.

    Attributes:
        name: of the way.
        format: its name in `wnconvert.files.FORMATS`.
        write: makes a folder of as many files as it is given shards of tensors.
        shard: a glob for its files.
        rows: of each weight, so that it is large enough to be streamed.
        whole: each weight lies in one file.
    """

    name: str
    format: str
    write: Callable[[Path, list[dict[str, Tensor]]], None]
    shard: str
    rows: int = 16
    whole: bool = True

    def make(self, folder: Path, rows: int | None = None) -> Path:
        """A folder with a zero row, and a weight with NaN."""
        generator = torch.Generator().manual_seed(0)
        folder.mkdir()
        shards = [
            {f"layers.{i}.{j}.proj.weight": torch.randn(rows or self.rows, 64, generator=generator) for j in range(3)}
            for i in range(SHARDS)
        ]
        shards[1]["layers.1.0.proj.weight"][2] = 0
        shards[1]["layers.1.2.proj.weight"][3, 4] = float("nan")
        self.write(folder, shards)
        (folder / "config.json").write_text("{}")
        return folder

    def files(self, folder: Path) -> list[Path]:
        """Its files, without what describes them."""
        return sorted(folder.glob(self.shard))


def _with_index(
    folder: Path, shards: list[dict[str, Tensor]], stem: str, suffix: str, save: Callable[..., Any]
) -> None:
    weight_map = {}
    for i, tensors in enumerate(shards):
        name = f"{stem}-{i + 1:05}-of-{len(shards):05}{suffix}"
        save(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _safetensors(folder: Path, shards: list[dict[str, Tensor]]) -> None:
    _with_index(folder, shards, "model", ".safetensors", lambda *given: save_file(*given, {"format": "pt"}))


def _torch(folder: Path, shards: list[dict[str, Tensor]]) -> None:
    _with_index(folder, shards, "pytorch_model", ".bin", torch.save)


def _dcp(folder: Path, shards: list[dict[str, Tensor]]) -> None:
    model = {name: tensor for tensors in shards for name, tensor in tensors.items()}
    writer = dcp.FileSystemWriter(folder, thread_count=len(shards))
    dcp.save({"model": model, "step": 3}, storage_writer=writer, no_dist=True)


def save_in_parts(folder: Path, tensors: dict[str, Tensor], count: int, axis: int) -> None:
    """A folder as so many processes write it that have a part of each tensor, and a file each."""
    parts.write(folder, tensors, lambda tensor: parts.along(tensor, count, axis))


def _dcp_in_parts(folder: Path, shards: list[dict[str, Tensor]]) -> None:
    save_in_parts(folder, {name: tensor for tensors in shards for name, tensor in tensors.items()}, len(shards), 0)


FORMATS = (
    Sharded("safetensors", "safetensors-sharded", _safetensors, "*.safetensors"),
    Sharded("torch", "torch-sharded", _torch, "*.bin"),
    # Smaller tensors of this format are read as a whole.
    Sharded("dcp", "dcp", _dcp, "*.distcp", rows=4200),
    Sharded("dcp-parts", "dcp", _dcp_in_parts, "*.distcp", rows=4200, whole=False),
)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class _Thread(Ranks):
    def __init__(self, rank: int, everyone: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.count = rank, len(everyone)
        self._everyone, self._barrier = everyone, barrier

    def together(self, work: Callable[[], Any]) -> list[Any]:
        try:
            # As between processes: the others get copies.
            mine = (None, pickle.loads(pickle.dumps(work())))
        except (WnconvertError, OSError) as error:
            mine = (error, None)
        self._everyone[self.rank] = mine
        self._barrier.wait(60)
        everyone = list(self._everyone)
        self._barrier.wait(60)
        failed = next((error for error, _ in everyone if error is not None), None)
        if failed is not None:
            raise failed
        return [value for _, value in everyone]


def on_ranks(count: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What something that several ranks do came to on each: a value or an error."""
    everyone: list[Any] = [None] * count
    barrier = threading.Barrier(count)
    found: list[Any] = [None] * count

    def run(rank: int) -> None:
        try:
            found[rank] = work(_Thread(rank, everyone, barrier))
        except BaseException as error:  # noqa: BLE001 - handed to whoever asked
            found[rank] = error
            if not isinstance(error, WnconvertError):
                barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
