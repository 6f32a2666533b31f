"""Every file format of the soak test: how a checkpoint is written, and read back without wnconvert."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.distributed.checkpoint as dcp
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from soak import made, parts

Contents = Mapping[str, Tensor]


def safetensors(folder: Path, rng: random.Random) -> Path:
    """One file, with metadata or without."""
    path = folder / "model.safetensors"
    save_file(made.state(rng), path, rng.choice([None, {"format": "pt", "step": "3"}]))
    return path


def safetensors_sharded(folder: Path, rng: random.Random) -> Path:
    """A folder of shards with an index."""
    return _sharded(folder, rng, "model", ".safetensors", lambda held, path: save_file(held, path, {"format": "pt"}))


def torch_sharded(folder: Path, rng: random.Random) -> Path:
    """A folder of `.bin` shards with an index."""
    return _sharded(folder, rng, "pytorch_model", ".bin", torch.save)


def _sharded(
    folder: Path, rng: random.Random, stem: str, suffix: str, save: Callable[[made.State, Path], object]
) -> Path:
    whole = folder / "model"
    whole.mkdir()
    state, count = made.state(rng), rng.randint(1, 3)
    weight_map = {name: f"{stem}-{rng.randint(1, count):05}-of-{count:05}{suffix}" for name in state}
    for shard in set(weight_map.values()):
        save({name: state[name] for name in state if weight_map[name] == shard}, whole / shard)
    size = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (whole / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    (whole / "config.json").write_text("{}")
    return whole


def torch_zip(folder: Path, rng: random.Random) -> Path:
    """A file of torch.save: bare or nested, with ties, in both of its formats."""
    path = folder / f"model{rng.choice(['.pt', '.pth', '.ckpt'])}"
    state = made.state(rng, ties=True)
    value = state if rng.random() < 0.5 else {"model": state, "epoch": 3, "history": [1.5, None]}
    torch.save(value, path, _use_new_zipfile_serialization=rng.random() < 0.8)
    return path


def distributed(folder: Path, rng: random.Random) -> Path:
    """A folder of torch.distributed.checkpoint."""
    path = folder / "dcp"
    with warnings.catch_warnings():
        # It says that it runs in one process.
        warnings.simplefilter("ignore")
        dcp.save({"model": made.state(rng), "step": 7}, checkpoint_id=path)
    return path


def distributed_parts(folder: Path, rng: random.Random) -> Path:
    """The same, with each tensor in several parts, cut along one axis or two, or anyhow."""
    path = folder / "dcp"
    path.mkdir()
    state = {name: tensor for name, tensor in made.state(rng).items() if tensor.dim()}
    parts.write(path, state, lambda tensor: rng.choice([_in_grid, parts.at_random])(tensor, rng))
    return path


def _in_grid(tensor: Tensor, rng: random.Random) -> list[parts.Part]:
    axis = rng.randrange(tensor.dim())
    found = parts.along(tensor, rng.randint(1, 4), axis)
    if axis and rng.random() < 0.5:
        rows = parts.along(tensor, rng.randint(1, 3), 0)
        found = [
            ([row[0], *offsets[1:]], [rows_of[0], *sizes[1:]]) for row, rows_of in rows for offsets, sizes in found
        ]
    return parts.one_at_each_place(found)


def onnx_external(folder: Path, rng: random.Random) -> Path:
    """A chain of layers with external data, some of it inline."""
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    dtype = rng.choice([torch.float32, torch.float16, torch.float64])
    kind = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.float64: TensorProto.DOUBLE}
    width = first = rng.randint(1, 40)
    nodes, held = [], []
    for i in range(rng.randint(1, 6)):
        gemm, transposed, out = rng.random() < 0.5, rng.random() < 0.5, rng.randint(1, 80)
        transposed &= gemm
        values = made.values(rng, generator, [out, width] if transposed else [width, out], dtype)
        held.append(numpy_helper.from_array(values.numpy(), f"w{i}"))
        ends = [f"h{i}", f"w{i}"], [f"h{i + 1}"]
        if gemm:
            nodes.append(helper.make_node("Gemm", *ends, transB=int(transposed)))
        else:
            nodes.append(helper.make_node("MatMul", *ends))
        width = out
    inputs = [helper.make_tensor_value_info("h0", kind[dtype], ["n", first])]
    outputs = [helper.make_tensor_value_info(f"h{len(nodes)}", kind[dtype], ["n", width])]
    graph = helper.make_graph(nodes, "chain", inputs, outputs, held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path = folder / "model.onnx"
    threshold = rng.choice([0, 1024])
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=threshold)
    return path


MAKERS = (
    safetensors,
    safetensors_sharded,
    torch_zip,
    torch_sharded,
    distributed,
    distributed_parts,
    onnx_external,
)
REAL = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar", ".onnx")


def contents(path: Path) -> Contents:
    """Every tensor of a checkpoint by its name, read by the library that the format belongs to."""
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".onnx":
        return _onnx(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    return _tensors(torch.load(path, weights_only=True, map_location="cpu"))


def _folder(path: Path) -> Contents:
    if (path / ".metadata").is_file():
        held = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        state = {
            name: torch.empty(tuple(item.size), dtype=item.properties.dtype)
            for name, item in held.items()
            if isinstance(item, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, checkpoint_id=path)
        return state
    index = json.loads(next(path.glob("*.index.json")).read_text())
    shards = {shard: contents(path / shard) for shard in set(index["weight_map"].values())}
    return {name: shards[shard][name] for name, shard in index["weight_map"].items()}


def _onnx(path: Path) -> Contents:
    """Initializers by name; the rest of the model as one tensor of its bytes."""
    model = onnx.load(path)
    state = {}
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        state[tensor.name] = torch.frombuffer(bytearray(array.tobytes() or b"\0"), dtype=torch.uint8)
    del model.graph.initializer[:]
    rest = np.frombuffer(model.SerializeToString(deterministic=True), np.uint8).copy()
    return state | {"the rest of the model": torch.from_numpy(rest)}


def _tensors(value: Any, prefix: str = "") -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {prefix: value}
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    else:
        return {}
    paths = [(f"{prefix}/{key}" if prefix else str(key), item) for key, item in items]
    return {path: leaf for start, item in paths for path, leaf in _tensors(item, start).items()}
