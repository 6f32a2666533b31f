"""Files of torch.save written as a stream: the same bytes as torch writes, whatever their size."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.checkpoints import assert_same_contents, document, flat, same
from wnconvert import crc, jobs, weightnorm
from wnconvert.files import ReadOptions, torch_map, torch_skeleton
from wnconvert.jobs import Job


def _state() -> OrderedDict[str, Any]:
    torch.manual_seed(0)
    flat_memory = torch.randn(40)
    state: OrderedDict[str, Any] = OrderedDict()
    state["conv.weight"] = torch.randn(6, 4, 3)
    state["conv.bias"] = nn.Parameter(torch.randn(6), requires_grad=False)
    state["tied.weight"] = state["conv.weight"]
    state["lstm.weight_ih_l0"], state["lstm.bias_ih_l0"] = flat_memory[:32].view(8, 4), flat_memory[32:]
    state["image.weight"] = torch.randn(5, 4, 3, 3).to(memory_format=torch.channels_last)
    state["large.weight"] = torch.randn(300, 700)
    state["half.weight"] = torch.randn(7, 9).bfloat16()
    state["zero.weight"] = torch.randn(4, 5).index_fill(0, torch.tensor([2]), 0)
    state["nan.weight"] = torch.full((3, 2), torch.nan)
    for name in ("large", "half", "zero", "nan"):
        state[f"{name}.bias"] = torch.randn(len(state[f"{name}.weight"])).to(state[f"{name}.weight"].dtype)
    state["empty"], state["steps"] = torch.zeros(0), torch.tensor(3)
    return state


def _run(command: str, source: Path, target: Path, **options: Any) -> None:
    report = jobs.convert_file(source, target, Job(command, **options))
    assert report.weights_verified


def _load(path: Path) -> Any:
    subprocess.run([sys.executable, "-m", "zipfile", "-t", str(path)], check=True, capture_output=True)
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert_same_contents(torch.load(path, weights_only=True), mapped)
    return mapped


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
def test_there_and_back_through_every_verb(archive: bool, tmp_path: Path) -> None:
    state = _state()
    torch.save(state, tmp_path / "in.pt", _use_new_zipfile_serialization=archive)

    _run("apply", tmp_path / "in.pt", tmp_path / "split.pt")
    _run("rename", tmp_path / "split.pt", tmp_path / "renamed.pt", names="parametrized")
    _run("fold", tmp_path / "renamed.pt", tmp_path / "out.pt")

    split, back = _load(tmp_path / "split.pt"), _load(tmp_path / "out.pt")
    g, v = weightnorm.split(state["large.weight"], 0, name="large.weight")
    assert torch.equal(split["large.weight_g"], g)
    assert torch.equal(split["large.weight_v"], v)
    assert "nan.weight" in split
    assert split["image.weight_v"].is_contiguous(memory_format=torch.channels_last)
    assert list(back) == list(state)
    for name, value in state.items():
        assert same(value, back[name]), name
        assert back[name].stride() == value.stride()
    assert back["tied.weight"].data_ptr() == back["conv.weight"].data_ptr()


def test_the_bytes_are_those_of_torch_save(tmp_path: Path) -> None:
    torch.save(_state(), tmp_path / "in.pt")
    _run("apply", tmp_path / "in.pt", tmp_path / "split.pt")

    # By path, torch would name the records after the file.
    with (tmp_path / "expected.pt").open("wb") as file:
        torch.save(torch.load(tmp_path / "split.pt"), file)
    assert (tmp_path / "split.pt").read_bytes() == (tmp_path / "expected.pt").read_bytes()


def test_trained_pairs_fold_as_in_memory(tmp_path: Path) -> None:
    pairs = {
        "a": (torch.rand(500, 1), torch.randn(500, 300)),
        "b": (torch.rand(1, 1, 5), torch.randn(4, 6, 5)),
        "c": (torch.rand(()), torch.randn(70, 800)),
    }
    state = {f"{n}.weight_{part}": t for n, pair in pairs.items() for part, t in zip("gv", pair, strict=True)}
    torch.save(state, tmp_path / "in.pt")

    _run("fold", tmp_path / "in.pt", tmp_path / "out.pt")

    folded = _load(tmp_path / "out.pt")
    assert folded.keys() == {"a.weight", "b.weight", "c.weight"}
    for name, (g, v) in pairs.items():
        assert torch.equal(folded[f"{name}.weight"], weightnorm.fold(g, v))


def test_training_checkpoints_keep_what_is_no_weight(tmp_path: Path) -> None:
    module = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    value = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "rng": torch.arange(5)}
    torch.save(value, tmp_path / "in.pt")

    _run("apply", tmp_path / "in.pt", tmp_path / "split.pt")
    _run("fold", tmp_path / "split.pt", tmp_path / "out.pt")

    assert_same_contents(value, _load(tmp_path / "out.pt"))
    _run("apply", tmp_path / "in.pt", tmp_path / "dropped.pt", reading=ReadOptions(drop_optimizer=True))
    assert "optimizer" not in _load(tmp_path / "dropped.pt")


def test_the_checksum_of_an_input_is_carried_over(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.rand(3, 4), "other": torch.rand(50, 50)}, tmp_path / "in.pt")
    data = bytearray((tmp_path / "in.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "in.pt") as archive, (tmp_path / "in.pt").open("rb") as file:
        start = torch_map.data_start(file, archive.getinfo("in/data/1"))
    data[start] ^= 1
    (tmp_path / "in.pt").write_bytes(data)

    _run("apply", tmp_path / "in.pt", tmp_path / "out.pt")

    # What was damaged on the way to us still shows.
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert archive.testzip() == "archive/data/2"


def test_holes_lie_beyond_four_gigabytes_as_torch_puts_them(tmp_path: Path) -> None:
    large = torch.empty(5 << 30, dtype=torch.uint8)
    root = {"large": large, "small": torch.ones(3)}
    with (tmp_path / "out.pt").open("w+b") as file:
        skeleton = torch_skeleton.write(file, root)
        file.seek(skeleton.holes[1].start)
        file.write(root["small"].numpy().tobytes())
        zeros = _crc_of_zeros(5 << 30)
        torch_skeleton.settle(file, skeleton, [zeros, zlib.crc32(root["small"].numpy().tobytes())])

    loaded = torch.load(tmp_path / "out.pt", weights_only=True, mmap=True)
    assert torch.equal(loaded["small"], root["small"])
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert zeros == archive.getinfo("archive/data/0").CRC
        assert archive.read("archive/data/1") == root["small"].numpy().tobytes()


def _crc_of_zeros(size: int) -> int:
    """CRC-32 of so many zeros, by doubling."""
    result, power, length = 0, zlib.crc32(b"\0"), 1
    while size:
        if size & 1:
            result = crc.combine(result, power, length)
        power, length, size = crc.combine(power, power, length), 2 * length, size >> 1
    return result


def test_checksums_combine() -> None:
    chosen = random.Random(0)
    for _ in range(200):
        a, b = (chosen.randbytes(chosen.choice((0, 1, 7, 300, 70_000))) for _ in range(2))
        assert crc.combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)
        assert crc.crc32(a + b) == crc.crc32(b, crc.crc32(a)) == zlib.crc32(a + b)


_MEASURE = """
import resource, sys
from pathlib import Path
import torch
from wnconvert import jobs
from wnconvert.files import dcp, torch_file
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
jobs.convert_file(Path(sys.argv[2]), Path(sys.argv[3]), jobs.Job(sys.argv[1]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "preadv"), reason="memory is measured on Linux")
@pytest.mark.parametrize("axis", ["rows", "whole"])
def test_memory_does_not_grow_with_the_largest_tensor(axis: str, tmp_path: Path) -> None:
    v = torch.randn(160_000, 1024)
    g = torch.rand(160_000, 1) if axis == "rows" else torch.rand(1, 1024)
    torch.save({"fc.weight_g": g, "fc.weight_v": v, "state": torch.randn(100 << 20)}, tmp_path / "in.pt")

    def peak(command: str, source: str, target: str) -> int:
        arguments = [command, str(tmp_path / source), str(tmp_path / target)]
        done = subprocess.run([sys.executable, "-c", _MEASURE, *arguments], check=True, capture_output=True, text=True)
        return int(done.stdout)

    assert peak("fold", "in.pt", "folded.pt") < 256
    (tmp_path / "in.pt").unlink()
    assert peak("apply", "folded.pt", "split.pt") < 256


def test_values_that_are_handed_out_can_be_written_to(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.rand(3, 4)}, tmp_path / "in.pt")
    tensors: dict[str, Tensor] = document(tmp_path / "in.pt").tensors()
    tensors["fc.weight"].zero_()
    assert set(flat(tensors)) == {"/fc.weight"}
