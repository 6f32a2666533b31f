"""State dicts to convert, in every file format, and what must not change on the way."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wnconvert import convert, files
from wnconvert.files import Document, ReadOptions


class Network(nn.Module):
    """A layer of every kind that keys can tell, and some that they must leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3)
        self.norm = nn.BatchNorm1d(8)
        self.ups = nn.ModuleList([nn.ConvTranspose1d(8, 4, 4), nn.ConvTranspose1d(4, 4, 4)])
        self.image = nn.Conv2d(4, 5, 3, bias=False)
        self.lstm = nn.LSTM(5, 7, bidirectional=True, proj_size=3)
        self.attention = nn.MultiheadAttention(6, 2)
        self.head = nn.Linear(6, 3)
        self.register_buffer("steps", torch.tensor(3))


def state() -> OrderedDict[str, Tensor]:
    """The state dict of a small network, seeded."""
    torch.manual_seed(0)
    made: OrderedDict[str, Tensor] = Network().state_dict()
    return made


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a nested checkpoint by its path."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    else:
        return {prefix: value}
    return {path: leaf for key, item in items for path, leaf in flat(item, f"{prefix}/{key}").items()}


def same(a: Any, b: Any) -> bool:
    """Equal type, and equal bits for tensors."""
    if isinstance(a, Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and _bits(a) == _bits(b)
    return type(a) is type(b) and a == b


def _bits(t: Tensor) -> bytes:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_contents(before: Any, after: Any) -> None:
    """The same paths in the same order, with the same leaves."""
    left, right = flat(before), flat(after)
    assert list(left) == list(right)
    different = [path for path in left if not same(left[path], right[path])]
    assert not different


def write_zip(path: Path, value: Any) -> None:
    torch.save(value, path)


def write_legacy(path: Path, value: Any) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def write_nested(path: Path, value: Any) -> None:
    torch.save({"epoch": 3, "nets": [{"generator": value}, "text"], "ema": {"shadow": dict(value)}}, path)


def write_parameters(path: Path, value: Any) -> None:
    torch.save(OrderedDict((k, nn.Parameter(t) if t.is_floating_point() else t) for k, t in value.items()), path)


def read_torch(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def write_safetensors(path: Path, value: Any) -> None:
    save_file({key: tensor.contiguous() for key, tensor in value.items()}, path, {"format": "pt", "übrig": "ja"})


def read_safetensors(path: Path) -> Any:
    with safe_open(path, "pt") as file:
        # The library gives metadata in no particular order.
        metadata = dict(sorted(file.metadata().items()))
        return {"metadata": metadata, "tensors": {name: file.get_tensor(name) for name in file.offset_keys()}}


def write_sharded(path: Path, value: Any) -> None:
    path.mkdir()
    names = list(value)
    weight_map = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in dict.fromkeys(weight_map.values()):
        save_file({n: value[n].contiguous() for n in names if weight_map[n] == shard}, path / shard, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in value.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text("{}")
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("[]")


def read_sharded(path: Path) -> Any:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shards = {name: read_safetensors(path / name) for name in sorted(set(index["weight_map"].values()))}
    others = {str(p.relative_to(path)): p.read_text() for p in sorted(path.rglob("*.json")) if "index" not in p.name}
    return {"index": index, "shards": shards, "others": others}


@dataclasses.dataclass(frozen=True)
class Format:
    name: str
    file: str
    write: Callable[[Path, Any], None]
    read: Callable[[Path], Any]


FORMATS = (
    Format("zip", "model.pt", write_zip, read_torch),
    Format("legacy", "model.pth.tar", write_legacy, read_torch),
    Format("nested", "model.ckpt", write_nested, read_torch),
    Format("parameters", "model.bin", write_parameters, read_torch),
    Format("safetensors", "model.safetensors", write_safetensors, read_safetensors),
    Format("sharded", "model", write_sharded, read_sharded),
)


def document(path: Path, **options: Any) -> Document:
    """Open a file."""
    return files.read(path, ReadOptions(**options))


def converted(value: Any, folder: Path, command: str = "apply", **options: Any) -> Any:
    """Save a value with torch, convert it, and load the result."""
    folder.mkdir(exist_ok=True)
    source = folder / "in.pt"
    torch.save(value, source)
    opened = document(source, **options)
    getattr(convert, command)(opened.carrier)
    opened.save(folder, "out.pt")
    return torch.load(folder / "out.pt", weights_only=True)
