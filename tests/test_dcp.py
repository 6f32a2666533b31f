"""Folders of torch.distributed.checkpoint, written and read back by that library itself."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import socket
import zipfile
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from scripts.soak import parts
from tests.checkpoints import assert_same_contents
from tests.sharded import contents, on_ranks, save_in_parts
from wnconvert import compare, convert, files, jobs, weightnorm
from wnconvert.bits import same
from wnconvert.errors import InputError
from wnconvert.files import ReadOptions, dcp_items, dcp_split
from wnconvert.jobs import Job
from wnconvert.sites import Selection

pytestmark = pytest.mark.filterwarnings("ignore")


def _module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(4, 6, 3), nn.Linear(8, 7), nn.Linear(7, 3))


def _save(folder: Path) -> dict[str, Any]:
    module = _module()
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 4, 10)).sum().backward()
    optimizer.step()
    model, state = get_state_dict(module, optimizer)
    nested = {
        "model": model,
        "optim": state,
        "step": 7,
        "list": [torch.ones(2), 3],
        "large.weight": torch.randn(600, 500),
    }
    nested["large.bias"] = torch.zeros(600)
    dcp.save(nested, checkpoint_id=folder)
    return nested


def _contents(folder: Path) -> Any:
    file = folder.with_suffix(".as.pt")
    dcp_to_torch_save(folder, file)
    return torch.load(file, weights_only=False)


def _run(command: str, source: Path, target: Path, **options: Any) -> Any:
    report = jobs.convert_file(source, target, Job(command, **options))
    assert report.format == "dcp"
    assert report.weights_verified
    _check_archives(target)
    return report


def _check_archives(folder: Path) -> None:
    for info in dcp.FileSystemReader(folder).read_metadata().storage_data.values():
        data = (folder / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        (folder / "item").write_bytes(data)
        with zipfile.ZipFile(folder / "item") as archive:
            assert archive.testzip() is None
    (folder / "item").unlink()


def test_there_and_back_through_every_verb(tmp_path: Path) -> None:
    nested = _save(tmp_path / "in")
    (tmp_path / "in" / "notes.txt").write_text("kept")

    report = _run("apply", tmp_path / "in", tmp_path / "split")
    assert any("optimizer state at 'optim'" in note for note in report.notes)
    _run("rename", tmp_path / "split", tmp_path / "renamed", names="parametrized")
    _run("fold", tmp_path / "renamed", tmp_path / "out")

    assert_same_contents(_contents(tmp_path / "in"), _contents(tmp_path / "out"))
    assert (tmp_path / "out" / "notes.txt").read_text() == "kept"
    split = _contents(tmp_path / "split")
    assert list(split["model"])[:3] == ["0.weight_g", "0.weight_v", "0.bias"]
    g, v = weightnorm.split(nested["large.weight"], 0, name="large.weight")
    assert torch.equal(split["large.weight_g"], g)
    assert torch.equal(split["large.weight_v"], v)
    assert compare.compare_files(tmp_path / "in", tmp_path / "split").weights.identical


def test_the_result_loads_into_a_module(tmp_path: Path) -> None:
    _save(tmp_path / "in")
    _run("apply", tmp_path / "in", tmp_path / "split")
    module = _module()
    for layer in module:
        torch.nn.utils.weight_norm(layer)
    state = {"model": {name: torch.zeros_like(value) for name, value in module.state_dict().items()}}

    dcp.load(state, checkpoint_id=tmp_path / "split")

    assert torch.equal(state["model"]["1.weight_v"], _contents(tmp_path / "in")["model"]["1.weight"])


def test_optimizer_state_can_be_dropped(tmp_path: Path) -> None:
    _save(tmp_path / "in")
    _run("apply", tmp_path / "in", tmp_path / "out", reading=ReadOptions(drop_optimizer=True))
    assert set(_contents(tmp_path / "out")) == {
        "model",
        "step",
        "list",
        "large.weight_g",
        "large.weight_v",
        "large.bias",
    }


def test_a_weight_that_cannot_be_split_stays(tmp_path: Path) -> None:
    bad = torch.full((600, 500), torch.nan)
    dcp.save(
        {"a.weight": bad, "a.bias": torch.zeros(600), "b.weight": torch.ones(2, 3, 1)}, checkpoint_id=tmp_path / "in"
    )

    report = _run("apply", tmp_path / "in", tmp_path / "out")

    assert {row.site.name: row.action for row in report.rows} == {"a.weight": "skipped", "b.weight": "split"}
    assert set(_contents(tmp_path / "out")) == {"a.weight", "a.bias", "b.weight_g", "b.weight_v"}


def _sharded(rank: int, folder: str, port: int, tensors: dict[str, Tensor], axis: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    state: dict[str, DTensor] = {}
    for name, tensor in tensors.items():
        cut = tensor.dim() > axis and tensor.shape[axis] > 1 and name != "whole.weight_g"
        state[name] = distribute_tensor(tensor, mesh, [Shard(axis) if cut else Replicate()])
    dcp.save({"model": state}, checkpoint_id=folder)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1])
def test_tensors_in_several_parts(axis: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = {"a.weight": torch.randn(5, 6), "a.bias": torch.randn(5), "b.weight": torch.randn(6, 4, 3)}
    pairs = {
        "c.weight_g": torch.rand(7, 1), "c.weight_v": torch.randn(7, 4),
        "d.weight_g": torch.rand(1, 1, 3), "d.weight_v": torch.randn(6, 4, 3),
        "e.weight_g": torch.rand(()), "e.weight_v": torch.randn(4, 4),
        "whole.weight_g": torch.rand(6, 1), "whole.weight_v": torch.randn(6, 4),
    }  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (str(tmp_path / "in"), port, plain | pairs, axis)
    torch.multiprocessing.spawn(_sharded, arguments, nprocs=2)

    _run("fold", tmp_path / "in", tmp_path / "folded")
    _run("apply", tmp_path / "in", tmp_path / "split")
    _run("fold", tmp_path / "split", tmp_path / "both")

    def together(command: str, source: str, alone: str) -> None:
        target = tmp_path / f"{alone}.together"
        on_ranks(2, lambda crew: jobs.convert_file(tmp_path / source, target, Job(command), crew=crew))
        assert contents(target) == contents(tmp_path / alone)

    together("fold", "in", "folded")
    together("apply", "in", "split")
    together("fold", "split", "both")

    folded, both = _contents(tmp_path / "folded")["model"], _contents(tmp_path / "both")["model"]
    expected = plain | {
        f"{n}.weight": weightnorm.fold(pairs[f"{n}.weight_g"], pairs[f"{n}.weight_v"]) for n in ("c", "d", "e", "whole")
    }
    assert folded.keys() == both.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(folded[name], value), name
        assert torch.equal(both[name], value), name
    files_of = {folder: sorted(path.name for path in (tmp_path / folder).glob("*.distcp")) for folder in ("in", "both")}
    assert files_of["in"] == files_of["both"] == ["__0_0.distcp", "__1_0.distcp"]
    old, new = (dcp.FileSystemReader(tmp_path / name).read_metadata() for name in ("in", "folded"))
    before, after = old.state_dict_metadata["model.c.weight_v"], new.state_dict_metadata["model.c.weight"]
    assert before.chunks == after.chunks


# Of 31 rows, the last of 7 processes has none.
@pytest.mark.parametrize(("axis", "count", "rows", "columns"), [(0, 3, 600, 512), (1, 3, 600, 512), (0, 7, 31, 9000)])
def test_what_is_stored_in_parts_is_never_held_whole(
    axis: int, count: int, rows: int, columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    plain = {f"{name}.proj.weight": torch.randn(rows, columns) for name in ("ordinary", "zero", "tiny", "bad")}
    plain["zero.proj.weight"][5] = 0
    plain["tiny.proj.weight"][7] *= 1e-38
    plain["bad.proj.weight"][8, 9] = torch.nan
    pairs = {"pair.weight_g": torch.rand(rows, 1), "pair.weight_v": torch.randn(rows, columns)}
    others = {"pair.bias": torch.randn(rows), "buffer": torch.randn(rows, columns)}
    (tmp_path / "in").mkdir()
    save_in_parts(tmp_path / "in", plain | pairs | others, count, axis)

    read = dcp_items.Items.read

    def refuse(items: dcp_items.Items, name: str) -> Tensor:
        assert name == "model.pair.bias"
        return read(items, name)

    monkeypatch.setattr(dcp_items.Items, "read", refuse)
    report = _run("apply", tmp_path / "in", tmp_path / "split")
    _run("fold", tmp_path / "split", tmp_path / "folded")
    monkeypatch.undo()

    assert {row.site.name: (row.action, row.zero_rows, row.scaled_rows) for row in report.rows} == {
        "model.ordinary.proj.weight": ("split", 0, 0),
        "model.zero.proj.weight": ("split", 1, 0),
        "model.tiny.proj.weight": ("split", 0, 1),
        "model.bad.proj.weight": ("skipped", 0, 0),
        "model.pair.weight": ("skipped", 0, 0),
    }
    split, folded = _contents(tmp_path / "split")["model"], _contents(tmp_path / "folded")["model"]
    for name in ("ordinary.proj", "zero.proj", "tiny.proj"):
        g, v = weightnorm.split(plain[f"{name}.weight"], 0, name=f"model.{name}.weight")
        assert same(split[f"{name}.weight_g"], g), name
        assert same(split[f"{name}.weight_v"], v), name
    pair = weightnorm.fold(pairs["pair.weight_g"], pairs["pair.weight_v"])
    expected = plain | {"pair.weight": pair} | others
    assert folded.keys() == expected.keys()
    assert all(same(folded[name], value) for name, value in expected.items())
    for name in ("split", "folded"):
        metadata = dcp.FileSystemReader(tmp_path / name).read_metadata()
        assert {
            len(of.chunks) for key, of in metadata.state_dict_metadata.items() if key.endswith(("weight", "_v"))
        } == {count}


@pytest.mark.parametrize("dim", ["out", 1, None])
@pytest.mark.parametrize("seed", range(5))
def test_parts_in_no_grid(seed: int, dim: Any, tmp_path: Path) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shapes = [(600, 512), (5, 4), (64, 32, 5, 31), (3, 100_000), (100_000, 3)]
    plain = {f"layers.{i}.proj.weight": torch.randn(shape) for i, shape in enumerate(shapes)}
    (tmp_path / "in").mkdir()
    parts.write(tmp_path / "in", plain, lambda tensor: parts.at_random(tensor, rng))

    _run("apply", tmp_path / "in", tmp_path / "split", dim=dim, selection=Selection(kinds=("*",)))
    _run("fold", tmp_path / "split", tmp_path / "folded")

    split, folded = _contents(tmp_path / "split")["model"], _contents(tmp_path / "folded")["model"]
    for name, weight in plain.items():
        g, v = weightnorm.split(weight, 0 if dim == "out" else dim)
        assert same(split[f"{name}_g"], g), name
        assert same(split[f"{name}_v"], v), name
        assert same(folded[name], weight), name


def test_one_part_is_the_whole_and_the_others_are_empty(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_in_parts(tmp_path / "in", {"a.proj.weight": torch.zeros(1, 300_000)}, 3, 0)

    report = _run("apply", tmp_path / "in", tmp_path / "split")
    _run("fold", tmp_path / "split", tmp_path / "folded")

    assert [row.zero_rows for row in report.rows] == [1]
    split = _contents(tmp_path / "split")["model"]
    g, v = weightnorm.split(torch.zeros(1, 300_000), 0, name="model.a.proj.weight")
    assert same(split["a.proj.weight_g"], g)
    assert same(split["a.proj.weight_v"], v)
    assert not _contents(tmp_path / "folded")["model"]["a.proj.weight"].any()


def test_a_weight_in_parts_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(600, 512)
    weight[599] = 0
    (tmp_path / "in").mkdir()
    save_in_parts(tmp_path / "in", {"a.proj.weight": weight}, 2, 0)
    split = dcp_split.split

    def then_spoil(carrier: Any, *given: Any) -> None:
        (g,) = [entry for entry in carrier.entries() if entry.name.endswith("_g")]
        split(carrier, *given)
        (_, raw), *_ = g.made.weight.raw.parts
        content = bytearray(raw.path.read_bytes())
        content[raw.start : raw.start + 4] = b"\xff\xff\xff\xff"
        raw.path.write_bytes(content)

    monkeypatch.setattr(dcp_split, "split", then_spoil)
    with pytest.raises(InputError, match="changed while"):
        jobs.convert_file(tmp_path / "in", tmp_path / "out", Job("apply"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_verbs_after_one_another_on_one_open_folder(count: int, tmp_path: Path) -> None:
    g, v = torch.rand(600, 1), torch.randn(600, 512)
    (tmp_path / "in").mkdir()
    save_in_parts(tmp_path / "in", {"a.proj.weight_g": g, "a.proj.weight_v": v}, count, 0)
    opened = files.read(tmp_path / "in")

    convert.fold(opened.carrier)
    convert.apply(opened.carrier)
    opened.save(tmp_path, "out")

    expected_g, expected_v = weightnorm.split(weightnorm.fold(g, v), 0)
    found = _contents(tmp_path / "out")["model"]
    assert same(found["a.proj.weight_g"], expected_g)
    assert same(found["a.proj.weight_v"], expected_v)


def _twice(folder: Path) -> None:
    _change_part(folder, 1, torch.Size([0, 0]))


def _before(folder: Path) -> None:
    _change_part(folder, 1, torch.Size([300, -512]))


def _change_part(folder: Path, number: int, offsets: torch.Size) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    chunk = metadata.state_dict_metadata["model.a.proj.weight"].chunks[number]
    metadata.storage_data[MetadataIndex("model.a.proj.weight", offsets, number)] = metadata.storage_data.pop(
        MetadataIndex("model.a.proj.weight", chunk.offsets, number)
    )
    chunk.offsets = offsets
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _as_many_elements(folder: Path) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    first, second = metadata.state_dict_metadata["model.a.proj.weight"].chunks
    first.sizes, second.sizes, second.offsets = torch.Size([400, 512]), torch.Size([200, 512]), torch.Size([300, 0])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _no_dtype(folder: Path) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    metadata.state_dict_metadata["model.a.proj.weight"].properties.dtype = "float32"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _no_properties(folder: Path) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    metadata.state_dict_metadata["model.a.proj.weight"].properties = None
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _fractions(folder: Path) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    metadata.state_dict_metadata["model.a.proj.weight"].chunks[0].sizes = (300.0, 512)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_twice, "overlap"),
        (_as_many_elements, "overlap"),
        (_before, "lies outside it"),
        (_no_dtype, "does not say the dtype"),
        (_no_properties, "does not say the dtype"),
        (_fractions, "not made of integers"),
    ],
)
def test_parts_that_are_not_a_tensor(change: Any, said: str, tmp_path: Path) -> None:
    save_in_parts(tmp_path, {"a.proj.weight": torch.randn(600, 512)}, 2, 0)
    change(tmp_path)
    with pytest.raises(InputError, match=said):
        files.read(tmp_path)


class _Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


class _Reach:
    """Asks for an attribute as an enumeration does, but not of one."""

    def __reduce__(self) -> Any:
        return getattr, (Path, "unlink")


def _reach(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(_Reach()))


class _OldPickler(pickle.Pickler):
    """Writes members of enumerations as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_metadata_as_the_first_pythons_3_11_write_it(tmp_path: Path) -> None:
    _save(tmp_path / "in")
    metadata = dcp.FileSystemReader(tmp_path / "in").read_metadata()
    with (tmp_path / "in" / ".metadata").open("wb") as file:
        _OldPickler(file).dump(metadata)
    assert b"getattr" in (tmp_path / "in" / ".metadata").read_bytes()

    jobs.convert_file(tmp_path / "in", tmp_path / "wn", Job("apply"))
    jobs.convert_file(tmp_path / "wn", tmp_path / "out", Job("fold"))

    assert_same_contents(_contents(tmp_path / "in"), _contents(tmp_path / "out"))


def _cut_data(folder: Path) -> None:
    os.truncate(folder / "__0_0.distcp", 2000)


def _remove_data(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()


def _cut_metadata(folder: Path) -> None:
    os.truncate(folder / ".metadata", 100)


def _run_code(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(_Evil()))


def _another_object(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))


def _overwrite_item(folder: Path) -> None:
    data = bytearray((folder / "__0_0.distcp").read_bytes())
    (folder / "__0_0.distcp").write_bytes(bytes(len(data)))


def _lead_outside(folder: Path) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = f"../{info.relative_path}"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_cut_data, r"__0_0\.distcp: cut short"),
        (_remove_data, r"__0_0\.distcp: missing, but \.metadata names it"),
        (_cut_metadata, r"\.metadata: damaged or cut short"),
        (_run_code, r"\.metadata: holds a pickled Python object \(posix\.mkdir\)"),
        (_reach, r"\.metadata: holds a pickled Python object \(builtins\.getattr\)"),
        (_another_object, r"\.metadata: damaged: it describes no checkpoint"),
        (_overwrite_item, r"__0_0\.distcp: damaged"),
        (_lead_outside, r"outside the folder"),
    ],
)
def test_damage_is_one_clear_line(damage: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _save(tmp_path / "in")
    damage(tmp_path / "in")

    with pytest.raises(InputError, match=said) as raised:
        jobs.convert_file(tmp_path / "in", tmp_path / "out", Job("apply"))

    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_one_file_of_a_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    _save(tmp_path / "in")
    for name in ("__0_0.distcp", ".metadata"):
        with pytest.raises(InputError, match="name the folder"):
            files.read(tmp_path / "in" / name)
    shutil.rmtree(tmp_path / "in")
