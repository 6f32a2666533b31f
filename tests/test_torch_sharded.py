"""Folders of `.bin` shards with an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wnconvert import jobs, weightnorm
from wnconvert.errors import InputError
from wnconvert.jobs import Job

_SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
_INDEX = "pytorch_model.bin.index.json"


def _state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    state: dict[str, Tensor] = {}
    for i in range(3):
        state |= {f"l{i}.weight": torch.randn(5, 4), f"l{i}.bias": torch.randn(5)}
    return state | {"pair.weight_g": torch.rand(6, 1), "pair.weight_v": torch.randn(6, 3)}


def _save(folder: Path, state: dict[str, Tensor], at: int = 7) -> None:
    folder.mkdir()
    names = list(state)
    for i, (shard, held) in enumerate(zip(_SHARDS, (names[:at], names[at:]), strict=True)):
        torch.save({name: state[name] for name in held}, folder / shard, _use_new_zipfile_serialization=i == 0)
    weight_map = {name: _SHARDS[i >= at] for i, name in enumerate(names)}
    size = sum(tensor.nbytes for tensor in state.values())
    text = json.dumps({"metadata": {"total_size": size, "made by": "x"}, "weight_map": weight_map})
    (folder / _INDEX).write_text(text)
    (folder / "config.json").write_text("{}")


def _load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    index = json.loads((folder / _INDEX).read_text())
    shards = {name: torch.load(folder / name, weights_only=True, mmap=True) for name in _SHARDS}
    assert {key: shard for shard, held in shards.items() for key in held} == index["weight_map"]
    return {key: shards[shard][key] for key, shard in index["weight_map"].items()}, index


def test_there_and_back(tmp_path: Path) -> None:
    state = _state()
    _save(tmp_path / "in", state)

    report = jobs.convert_file(tmp_path / "in", None, Job("apply"))
    assert report.format == "torch-sharded"
    assert report.weights_verified
    assert jobs.convert_file(tmp_path / "in.wn" / _INDEX, tmp_path / "out", Job("fold")).weights_verified

    split, _ = _load(tmp_path / "in.wn")
    assert torch.equal(split["l0.weight_g"], weightnorm.split(state["l0.weight"], 0)[0])
    back, index = _load(tmp_path / "out")
    expected = {name: value for name, value in state.items() if not name.startswith("pair")}
    expected["pair.weight"] = weightnorm.fold(state["pair.weight_g"], state["pair.weight_v"])
    assert list(back) == list(expected)
    assert all(torch.equal(back[name], expected[name]) for name in expected)
    # g was in the other shard: the bulk of the data stays where it was.
    assert index["weight_map"]["pair.weight"] == _SHARDS[1]
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in expected.values()), "made by": "x"}
    assert (tmp_path / "out" / "config.json").is_file()


def test_default_output_of_an_index_is_a_folder(tmp_path: Path) -> None:
    _save(tmp_path / "in", _state())
    assert jobs.default_output(tmp_path / "in" / _INDEX, "apply") == tmp_path / "in.wn"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / _SHARDS[1]).unlink(), f"{_SHARDS[1]}: missing"),
        (lambda folder: (folder / _SHARDS[0]).write_bytes(b"PK\x03\x04"), f"{_SHARDS[0]} is damaged"),
        (lambda folder: torch.save([1], folder / _SHARDS[0]), "not the dict of tensors that a shard is"),
        (lambda folder: torch.save({"x": torch.ones(2)}, folder / _SHARDS[0]), "says that 'l0.weight' is in"),
        (lambda folder: torch.save({"n": {"x": torch.ones(2)}}, folder / _SHARDS[0]), "is no shard"),
        (lambda folder: (folder / _INDEX).write_text("{"), "no JSON"),
    ],
)
def test_damage_is_one_clear_line(damage: Any, said: str, tmp_path: Path) -> None:
    _save(tmp_path / "in", _state())
    damage(tmp_path / "in")

    with pytest.raises(InputError, match=said):
        jobs.convert_file(tmp_path / "in", tmp_path / "out", Job("apply"))

    assert not (tmp_path / "out").exists()
