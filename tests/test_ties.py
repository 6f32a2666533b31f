"""Shared weights, one contract for every carrier: split once, read by all users, still shared after the fold.

A carrier is one row of `CARRIERS`: it takes a network, and says after each step what every user of the weight reads.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import wnconvert
from wnconvert.errors import NothingToDo
from wnconvert.report.model import Row

NAMES = ("embed.weight", "head.weight")


class Tied(nn.Module):
    """An embedding and a head with one table: both keep axis 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 6)
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


class Opposed(Tied):
    """A table that one user reads as [out, in] and another as [in, out]: no one axis serves both."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(functional.one_hot(ids, 6).float() @ self.embed.weight)


@dataclasses.dataclass
class Outcome:
    """What a carrier did. Users are told apart by name, and what they read by anything that compares equal."""

    rows: list[Row]
    split: Mapping[str, object] = dataclasses.field(default_factory=dict)
    folded: Mapping[str, object] = dataclasses.field(default_factory=dict)
    values: list[Tensor] = dataclasses.field(default_factory=list)


def _address(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)


def _readers(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """For each user the memory of its weight, or of both halves of it."""
    found: dict[str, object] = {}
    for name in NAMES:
        if f"{name}_g" in tensors:
            found[name] = _address(tensors[f"{name}_g"]), _address(tensors[f"{name}_v"])
        elif name in tensors:
            found[name] = _address(tensors[name])
    return found


def _grow(tensors: Mapping[str, Tensor]) -> None:
    """Train the one magnitude: twice as long."""
    with torch.no_grad():
        for tensor in {_address(t): t for name, t in tensors.items() if name.endswith("weight_g")}.values():
            tensor.mul_(2)


def in_memory(network: nn.Module, folder: Path) -> Outcome:
    result = wnconvert.apply(network)
    named = dict(network.named_parameters(remove_duplicate=False))
    _grow(named)
    outcome = Outcome(result.report.rows, _readers(named))
    wnconvert.fold(network)
    named = dict(network.named_parameters(remove_duplicate=False))
    return dataclasses.replace(outcome, folded=_readers(named), values=[named[name].detach() for name in NAMES])


def state_dict(network: nn.Module, folder: Path) -> Outcome:
    result = wnconvert.apply(network.state_dict())
    _grow(result.model)
    folded = wnconvert.fold(result.model).model
    return Outcome(result.report.rows, _readers(result.model), _readers(folded), [folded[name] for name in NAMES])


def _file(
    path: Path,
    *,
    write: Callable[[Any, Path], None],
    read: Callable[[Path], tuple[Any, Mapping[str, Tensor]]],
    **options: Any,
) -> Outcome:
    split, folded = path.with_name(f"split{path.suffix}"), path.with_name(f"folded{path.suffix}")
    report = wnconvert.convert_file(path, split, "apply", **options)
    made, tensors = read(split)
    outcome = Outcome(report.rows, _readers(tensors))
    _grow(tensors)
    write(made, split)
    options.pop("arch", None)
    wnconvert.convert_file(split, folded, "fold", **options)
    tensors = read(folded)[1]
    return dataclasses.replace(
        outcome, folded=_readers(tensors), values=[tensors[name] for name in NAMES if name in tensors]
    )


def _arch(network: nn.Module) -> str:
    return f"{type(network).__module__}:{type(network).__name__}"


def torch_file(network: nn.Module, folder: Path) -> Outcome:
    def read(path: Path) -> tuple[Any, Mapping[str, Tensor]]:
        state = torch.load(path)
        return state, state

    torch.save(network.state_dict(), folder / "net.pt")
    outcome = _file(folder / "net.pt", write=torch.save, read=read, arch=_arch(network))
    # An alias that was written twice would show in the size.
    assert (folder / "folded.pt").stat().st_size < (folder / "net.pt").stat().st_size + 100
    return outcome


def pickled_module(network: nn.Module, folder: Path) -> Outcome:
    def read(path: Path) -> tuple[Any, Mapping[str, Tensor]]:
        module = torch.load(path, weights_only=False)
        return module, dict(module.named_parameters(remove_duplicate=False))

    torch.save(network, folder / "net.pt")
    return _file(folder / "net.pt", write=torch.save, read=read, unsafe_load=True)


def pickled_beside_its_state(network: nn.Module, folder: Path) -> Outcome:
    """The module and its state dict in one file: the head is read from one, the table from the other."""

    def read(path: Path) -> tuple[Any, Mapping[str, Tensor]]:
        made = torch.load(path, weights_only=False)
        named = dict(made["net"].named_parameters(remove_duplicate=False))
        return made, {key: (named if key.startswith("head") else made["state"])[key] for key in named}

    torch.save({"net": network, "state": network.state_dict()}, folder / "net.pt")
    return _file(folder / "net.pt", write=torch.save, read=read, unsafe_load=True)


def safetensors(network: nn.Module, folder: Path) -> Outcome:
    """The format has no aliases: a tied weight is stored under one of its names."""

    def read(path: Path) -> tuple[Any, Mapping[str, Tensor]]:
        state = load_file(path)
        return state, state

    save_file({NAMES[0]: network.state_dict()[NAMES[0]]}, folder / "net.safetensors")
    return _file(folder / "net.safetensors", write=save_file, read=read, arch=_arch(network))


def sharded(network: nn.Module, folder: Path) -> Outcome:
    shard = "model-00001-of-00001.safetensors"

    def read(path: Path) -> tuple[Any, Mapping[str, Tensor]]:
        state = load_file(path / shard)
        return state, state

    source = folder / "net"
    source.mkdir()
    save_file({NAMES[0]: network.state_dict()[NAMES[0]]}, source / shard)
    index = {"metadata": {}, "weight_map": {NAMES[0]: shard}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return _file(source, write=lambda state, path: save_file(state, path / shard), read=read, arch=_arch(network))


def onnx_file(network: nn.Module, folder: Path) -> Outcome:
    weight = network.get_parameter(NAMES[0]).detach()
    read_as_rows = [helper.make_node("Gather", ["embed.weight", "ids"], ["hidden"], name="embed")]
    if isinstance(network, Opposed):
        read_as_rows = [
            helper.make_node("Cast", ["ids"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["wide", "embed.weight"], ["hidden"], name="embed"),
        ]
    shape = [6] if not isinstance(network, Opposed) else [6, 6]
    graph = helper.make_graph(
        [*read_as_rows, helper.make_node("Gemm", ["hidden", "embed.weight"], ["y"], transB=1, name="head")],
        "net",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [6, 6])],
        [numpy_helper.from_array(weight.numpy(), "embed.weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "net.onnx")

    def readers(path: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
        model = onnx.load(path)
        made = {name: node for node in model.graph.node for name in node.output}
        read = {node.name: node.input[0 if node.op_type == "Gather" else 1] for node in model.graph.node}
        for name in ("embed", "head"):
            assert read[name] in made or read[name] in {tensor.name for tensor in model.graph.initializer}
        found: dict[str, object] = {name: read[name.removesuffix(".weight")] for name in NAMES}
        values = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
        return found, values

    report = wnconvert.convert_file(folder / "net.onnx", folder / "split.onnx", "apply")
    model = onnx.load(folder / "split.onnx")
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_g"):
            tensor.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(tensor), tensor.name))
    outcome = Outcome(report.rows, readers(folder / "split.onnx")[0])
    onnx.save(model, folder / "grown.onnx")
    wnconvert.convert_file(folder / "grown.onnx", folder / "folded.onnx", "fold")
    folded, values = readers(folder / "folded.onnx")
    return dataclasses.replace(outcome, folded=folded, values=[values[str(folded[name])] for name in NAMES])


CARRIERS = [
    in_memory,
    state_dict,
    torch_file,
    pickled_module,
    pickled_beside_its_state,
    safetensors,
    sharded,
    onnx_file,
]
"""A carrier is one row: a function of a network and a folder to work in."""

KEYS_ONLY = [state_dict]
"""These cannot know that a user transposes the weight."""


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_shared_weight_is_one_pair_and_then_one_weight(
    carrier: Callable[[nn.Module, Path], Outcome], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = Tied()
    expected = 2 * network.head.weight.detach().clone()

    outcome = carrier(network, tmp_path)

    assert [row.action for row in outcome.rows] == ["split"]
    assert len(set(outcome.split.values())) == len(set(outcome.folded.values())) == 1
    assert outcome.split.keys() == outcome.folded.keys()
    assert outcome.values
    for value in outcome.values:
        assert torch.equal(value, outcome.values[0])
        assert torch.allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize("carrier", [carrier for carrier in CARRIERS if carrier not in KEYS_ONLY])
def test_users_that_need_different_axes(carrier: Callable[[nn.Module, Path], Outcome], tmp_path: Path) -> None:
    with pytest.raises(NothingToDo, match=r"its uses disagree on the axis: .* needs axis"):
        _fail_if_nothing_is_split(carrier(Opposed(), tmp_path))


def _fail_if_nothing_is_split(outcome: Outcome) -> None:
    """What the library returns as a report, the command line treats as an error."""
    reasons = [str(row.reason) for row in outcome.rows if row.action == "skipped"]
    if len(reasons) == len(outcome.rows):
        raise NothingToDo("; ".join(reasons))


def _views(kind: str) -> dict[str, Tensor]:
    base = torch.rand(6, 6)
    return {
        "transposed": {"fc1.weight": base, "fc2.weight": base.t()},
        "slice": {"fc1.weight": base, "fc2.weight": base[:3]},
        "columns": {"fc1.weight": base[:, :4], "fc2.weight": base[:, 3:]},
        "reshaped": {"fc1.weight": base, "fc2.weight": base.view(4, 9)},
    }[kind]


class Pair(nn.Module):
    """Two layers around tensors that are given."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2 = (nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights.values())
        self.fc1.weight, self.fc2.weight = (nn.Parameter(w) for w in weights.values())


def _converted(form: str, weights: Mapping[str, Tensor], folder: Path) -> list[Row]:
    if form == "module":
        return wnconvert.apply(Pair(weights)).report.rows
    if form == "dict":
        return wnconvert.apply(dict(weights)).report.rows
    torch.save(dict(weights) if form == "file" else Pair(weights), folder / "net.pt")
    return wnconvert.convert_file(folder / "net.pt", command="apply", unsafe_load=True, dry_run=True).rows


@pytest.mark.parametrize("form", ["module", "dict", "file", "pickle"])
@pytest.mark.parametrize("kind", ["transposed", "slice", "columns", "reshaped"])
def test_weights_that_overlap_in_memory_are_left_tied(form: str, kind: str, tmp_path: Path) -> None:
    weights = _views(kind)
    try:
        rows = _converted(form, weights, tmp_path)
    except NothingToDo as nothing:
        assert nothing.report is not None
        rows = nothing.report.rows

    assert {row.site.name: row.action for row in rows} == dict.fromkeys(weights, "skipped")
    for row in rows:
        other = next(name for name in weights if name != row.site.name)
        assert str(row.reason).startswith(f"shares memory with {other} (")


@pytest.mark.parametrize("form", ["module", "dict", "file", "pickle"])
def test_neighbours_in_one_storage_do_not_overlap(form: str, tmp_path: Path) -> None:
    base = torch.rand(6, 6)
    for weights in (
        {"fc1.weight": base[:3], "fc2.weight": base[3:]},
        {"fc1.weight": base[:, :3], "fc2.weight": base[:, 3:]},
        {"fc1.weight": base[::2], "fc2.weight": base[1::2]},
    ):
        rows = _converted(form, weights, tmp_path)
        assert [(row.action, row.site.tied) for row in rows] == [("split", ()), ("split", ())]


def test_a_buffer_that_reads_a_weight() -> None:
    module = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 3))
    module[1].register_buffer("twin", module[0].weight.detach())

    rows = {row.site.name: row for row in wnconvert.apply(module).report.rows}

    assert rows["1.weight"].action == "split"
    assert str(rows["0.weight"].reason).startswith("shares memory with 1.twin (")


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.parametrize("plain", [0, 1])
def test_magnitudes_that_trained_apart_are_two_weights(norm: Callable[[nn.Module], nn.Module], plain: int) -> None:
    torch.manual_seed(0)
    module = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2 + plain))
    for layer in module:
        layer.weight = module[0].weight
    norm(module[0])
    norm(module[1])
    assert next((site.name, site.tied[:1]) for site in wnconvert.find(module)) == ("0.weight", ("1.weight",))
    with torch.no_grad():
        next(p for n, p in module[1].named_parameters() if n.endswith(("_g", "original0"))).mul_(3)
    x = torch.rand(2, 4)
    expected = [layer(x) for layer in module]

    wnconvert.fold(module)

    for layer, y in zip(module, expected, strict=True):
        assert torch.allclose(layer(x), y, rtol=1e-5)


def test_a_parameter_and_a_tensor_of_one_memory() -> None:
    weight = nn.Parameter(torch.rand(4, 4))
    state = {"fc1.weight": weight, "fc2.weight": weight.data}

    split = wnconvert.apply(state).model
    split["fc1.weight_g"].data.mul_(2)
    folded = wnconvert.fold(split).model

    assert split["fc1.weight_g"].data_ptr() == split["fc2.weight_g"].data_ptr()
    assert folded["fc1.weight"].data_ptr() == folded["fc2.weight"].data_ptr()
    assert (type(folded["fc1.weight"]), type(folded["fc2.weight"])) == (nn.Parameter, Tensor)


def test_networks_in_one_file_that_share_a_layer(tmp_path: Path) -> None:
    shared = nn.Linear(4, 4)
    parts = {"g": nn.Sequential(shared, nn.Linear(4, 2)), "d": nn.Sequential(shared), "wrapped": nn.Linear(4, 4)}
    parts["wrapped"].weight = shared.weight
    torch.save(parts, tmp_path / "nets.pt")

    report = wnconvert.convert_file(tmp_path / "nets.pt", command="apply", unsafe_load=True)
    split = torch.load(tmp_path / "nets.wn.pt", weights_only=False)
    wnconvert.convert_file(tmp_path / "nets.wn.pt", tmp_path / "back.pt", "fold", unsafe_load=True)
    back = torch.load(tmp_path / "back.pt", weights_only=False)

    assert next((row.site.name, row.site.tied) for row in report.rows) == (
        "g.0.weight",
        ("d.0.weight", "wrapped.weight"),
    )
    assert split["g"][0] is split["d"][0]
    for key in ("weight_g", "weight_v"):
        assert getattr(split["wrapped"], key).data_ptr() == getattr(split["g"][0], key).data_ptr()
    assert back["wrapped"].weight.data_ptr() == back["g"][0].weight.data_ptr()
    assert torch.equal(back["wrapped"].weight, shared.weight)
