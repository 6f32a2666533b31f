"""safetensors files and folders of shards, against the safetensors library."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import reference
from tests.checkpoints import FORMATS, document, read_safetensors, read_sharded, state
from wnconvert import convert, jobs, weightnorm
from wnconvert.files.mapped import MappedFile
from wnconvert.inspection import inspect_file
from wnconvert.sites import Selection

pytestmark = pytest.mark.filterwarnings("error")


def _save(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path, {"format": "pt"})
    return path


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_library_reads_what_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    source = _save(tmp_path / "in.safetensors", {"conv.weight": weight, "conv.bias": torch.zeros(4, dtype=dtype)})

    jobs.convert_file(source, tmp_path / "out.safetensors", jobs.Job("apply"))

    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == {"conv.weight_g", "conv.weight_v", "conv.bias"}
    assert torch.equal(found["conv.weight_v"], weight)
    norm = reference.norm(weight, (0,)).to(dtype)
    # The reference adds in another order, which only float64 can tell.
    assert reference.ulp(found["conv.weight_g"], norm) <= (dtype == torch.float64)
    (row,) = inspect_file(tmp_path / "out.safetensors").rows
    assert row.magnitude is not None
    assert row.magnitude.maximum == found["conv.weight_g"].max().item()


def test_every_dtype_is_copied_byte_for_byte(tmp_path: Path) -> None:
    odd = [torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.uint8, torch.int16, torch.int64, torch.complex64]
    tensors = {f"{dtype}.x".removeprefix("torch."): torch.rand(3, 5).to(dtype) for dtype in odd}
    tensors["quantized.weight"] = torch.rand(4, 4).to(torch.float8_e4m3fn)
    tensors["fc.weight"], tensors["fc.bias"] = torch.rand(3, 4), torch.rand(3)
    source = _save(tmp_path / "in.safetensors", tensors)

    report = jobs.convert_file(source, tmp_path / "split.safetensors", jobs.Job("apply"))
    jobs.convert_file(tmp_path / "split.safetensors", tmp_path / "back.safetensors", jobs.Job("fold"))

    assert {row.site.name: row.reason for row in report.rows}["quantized.weight"] == (
        "dtype float8_e4m3fn has no weight normalization"
    )
    assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()


def test_dtypes_newer_than_this_table_are_copied(tmp_path: Path) -> None:
    raw = np.arange(16, dtype=np.uint8)
    weight = np.ones((2, 4), np.float32)
    rows = {
        "x": {"dtype": "F4", "shape": [8, 4], "data_offsets": [0, 16]},
        "y": {"dtype": "NEW_1", "shape": [3], "data_offsets": [16, 32]},
        "fc.weight": {"dtype": "F32", "shape": [2, 4], "data_offsets": [32, 64]},
    }
    text = json.dumps(rows).encode()
    source = tmp_path / "in.safetensors"
    source.write_bytes(len(text).to_bytes(8, "little") + text + raw.tobytes() * 2 + weight.tobytes())

    report = jobs.convert_file(source, tmp_path / "out.safetensors", jobs.Job("apply"))

    data = (tmp_path / "out.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    assert report.weights_verified
    assert {name: row["dtype"] for name, row in header.items()} == {
        "x": "F4",
        "y": "NEW_1",
        "fc.weight_g": "F32",
        "fc.weight_v": "F32",
    }
    assert data[start : start + 32] == raw.tobytes() * 2


def test_misaligned_data_is_read(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    rows = {
        "flag": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]},
        "fc.weight": {"dtype": "F32", "shape": [3, 4], "data_offsets": [1, 49]},
    }
    text = json.dumps(rows).encode()
    source = tmp_path / "in.safetensors"
    source.write_bytes(len(text).to_bytes(8, "little") + text + b"\1" + weight.tobytes())

    jobs.convert_file(source, tmp_path / "split.safetensors", jobs.Job("apply"))
    jobs.convert_file(tmp_path / "split.safetensors", tmp_path / "back.safetensors", jobs.Job("fold"))

    assert load_file(tmp_path / "back.safetensors")["fc.weight"].numpy().tobytes() == weight.tobytes()


def test_order_is_that_of_the_data_and_offsets_are_aligned(tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    FORMATS[4].write(source, state())
    opened = document(source)
    with safetensors.safe_open(source, "pt") as file:
        order = file.offset_keys()

    convert.apply(opened.carrier)
    opened.save(tmp_path, "out.safetensors")

    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as file:
        new = file.offset_keys()
    plain = [key.removesuffix("_v") for key in new if not key.endswith("_g")]
    assert plain == order
    assert int.from_bytes((tmp_path / "out.safetensors").read_bytes()[:8], "little") % 8 == 0


def test_zero_rows_scalars_and_empty_tensors(tmp_path: Path) -> None:
    tensors = {
        "fc.weight": torch.zeros(3, 4),
        "fc.bias": torch.zeros(3),
        "none.weight": torch.zeros(0, 4, 3),
        "x.scale": torch.tensor(2.0),
        "top": torch.tensor(True),
    }
    source = _save(tmp_path / "in.safetensors", tensors)

    report = jobs.convert_file(source, tmp_path / "split.safetensors", jobs.Job("apply"))
    jobs.convert_file(tmp_path / "split.safetensors", tmp_path / "back.safetensors", jobs.Job("fold"))

    assert sum(row.zero_rows for row in report.rows) == 3
    assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()


def test_suffix_does_not_matter(tmp_path: Path) -> None:
    source = _save(tmp_path / "in.pt", {"fc.weight": torch.rand(3, 4)})

    report = jobs.convert_file(source, None, jobs.Job("apply"))

    assert report.format == "safetensors"
    assert load_file(tmp_path / "in.wn.pt").keys() == {"fc.weight_g", "fc.weight_v"}


def test_listing_does_not_import_torch(tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    FORMATS[4].write(source, state())
    jobs.convert_file(source, tmp_path / "split.safetensors", jobs.Job("apply"))
    FORMATS[-1].write(tmp_path / "shards", state())
    code = """
        import sys
        from pathlib import Path
        from wnconvert.inspection import inspect_file
        for name in sys.argv[1:]:
            assert inspect_file(Path(name)).rows
        print("torch" in sys.modules)
    """
    paths = [str(tmp_path / name) for name in ("in.safetensors", "split.safetensors", "shards")]
    command = [sys.executable, "-c", textwrap.dedent(code), *paths]
    result = subprocess.run(command, capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("command", ["apply", "fold"])
def test_no_tensor_is_taken_into_memory_whole(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Views of a mapped file are copies where they are misaligned.
    _save(tmp_path / "in", {"fc.weight": torch.rand(64, 4096), "fc.bias": torch.rand(64)})
    if command == "fold":
        jobs.convert_file(tmp_path / "in", tmp_path / "split", jobs.Job("apply"))
        (tmp_path / "split").rename(tmp_path / "in")

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(MappedFile, "tensor", refuse)
    jobs.convert_file(tmp_path / "in", tmp_path / "out", jobs.Job(command))
    weights = {"fc.weight"} if command == "fold" else {"fc.weight_g", "fc.weight_v"}
    assert load_file(tmp_path / "out").keys() == {*weights, "fc.bias"}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        source = tmp_path / f"{count}.safetensors"
        _save(source, {f"fc.{i}.weight": torch.rand(4, 1 << 20) for i in range(count)})
        code = """
            import resource, sys
            from pathlib import Path
            from wnconvert import files, convert
            import torch
            for command, source, target in (("apply", "in", "wn"), ("fold", "wn", "back")):
                source, target = Path(sys.argv[1], source), Path(sys.argv[1], target)
                document = files.read(source)
                getattr(convert, command)(document.carrier, **{"selection": convert.Selection(kinds=("*",))})
                document.save(Path(sys.argv[1]), target.name)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        """
        folder = tmp_path / str(count)
        folder.mkdir()
        source.rename(folder / "in")
        command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert (folder / "back").read_bytes() == (folder / "in").read_bytes()
        return int(result.stdout) << 10

    # 16 MB and 320 MB of weights: what the larger one takes more is what is handed out before it is given back.
    assert peak(20) - peak(1) < 120 << 20


class TestShards:
    """Folders with an index."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        FORMATS[-1].write(tmp_path / "model", state())
        return tmp_path / "model"

    def test_output_is_a_folder_of_the_same_shape(self, folder: Path, tmp_path: Path) -> None:
        report = jobs.convert_file(folder, None, jobs.Job("apply"))

        target = tmp_path / "model.wn"
        assert report.output == str(target)
        assert report.format == "safetensors-sharded"
        assert {str(path.relative_to(target)) for path in target.rglob("*")} == {
            str(path.relative_to(folder)) for path in folder.rglob("*")
        }
        index = json.loads((target / "model.safetensors.index.json").read_text())
        stored = {
            name: (shard.name, tensor.nbytes)
            for shard in target.glob("*.safetensors")
            for name, tensor in load_file(shard).items()
        }
        assert index["weight_map"] == {name: shard for name, (shard, _) in stored.items()}
        assert index["metadata"]["total_size"] == sum(size for _, size in stored.values())
        assert list(index["metadata"]) == ["total_size"]

    def test_index_file_as_the_input(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder)

        report = jobs.convert_file(Path("model.safetensors.index.json"), None, jobs.Job("apply"))

        assert report.output == str(tmp_path / "model.wn")

    def test_pair_in_two_shards(self, tmp_path: Path) -> None:
        weight = torch.rand(4, 3, 5)
        folder = tmp_path / "in"
        folder.mkdir()
        norm = weight.double().pow(2).sum((1, 2), keepdim=True).sqrt().float()
        save_file({"conv.weight_g": norm, "a.bias": torch.rand(3)}, folder / "x1.safetensors")
        save_file({"b.bias": torch.rand(4), "conv.weight_v": weight}, folder / "x2.safetensors")
        names = {"conv.weight_g": 1, "a.bias": 1, "b.bias": 2, "conv.weight_v": 2}
        index = {"weight_map": {name: f"x{i}.safetensors" for name, i in names.items()}, "extra": [1]}
        (folder / "x.safetensors.index.json").write_text(json.dumps(index))

        jobs.convert_file(folder, tmp_path / "out", jobs.Job("fold"))

        assert load_file(tmp_path / "out" / "x1.safetensors").keys() == {"a.bias"}
        folded = load_file(tmp_path / "out" / "x2.safetensors")
        assert torch.equal(folded["conv.weight"], weight)
        new = json.loads((tmp_path / "out" / "x.safetensors.index.json").read_text())
        assert new["weight_map"] == {
            "a.bias": "x1.safetensors",
            "b.bias": "x2.safetensors",
            "conv.weight": "x2.safetensors",
        }
        assert new["extra"] == [1]
        assert "metadata" not in new

    def test_links_are_followed(self, folder: Path, tmp_path: Path) -> None:
        linked = tmp_path / "linked"
        linked.mkdir()
        for path in folder.iterdir():
            (linked / path.name).symlink_to(path, target_is_directory=path.is_dir())
        (linked / "loop").symlink_to(linked, target_is_directory=True)
        (linked / "dangling").symlink_to(tmp_path / "nowhere")

        jobs.convert_file(linked, tmp_path / "out", jobs.Job("apply"))

        assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
        assert (tmp_path / "out" / "config.json").read_text() == "{}"
        assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "[]"

    def test_overwrite_replaces_the_whole_folder(self, folder: Path, tmp_path: Path) -> None:
        jobs.convert_file(folder, None, jobs.Job("apply"))
        (tmp_path / "model.wn" / "stale").write_text("")

        jobs.convert_file(folder, None, jobs.Job("apply", overwrite=True))

        assert not (tmp_path / "model.wn" / "stale").exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.wn"]
        jobs.convert_file(tmp_path / "model.wn", tmp_path / "back", jobs.Job("fold"))
        assert str(read_sharded(tmp_path / "back")) == str(read_sharded(folder))

    def test_weights_outside_the_index_are_noted(self, folder: Path) -> None:
        (folder / "pytorch_model.bin").write_bytes(b"old")

        assert document(folder).notes == ["pytorch_model.bin is no shard of this index and is copied as it is"]


def test_magnitudes_of_half_types_need_no_torch(tmp_path: Path) -> None:
    values = np.array([[-1.5], [0.0], [2.0]]).astype(ml_dtypes.bfloat16)
    tensors = {
        "a.weight_g": torch.tensor(values.astype(np.float32)).bfloat16(),
        "a.weight_v": torch.rand(3, 2).bfloat16(),
    }
    source = _save(tmp_path / "in.safetensors", tensors)

    (statistics,) = document(source).magnitudes().values()

    assert (statistics.minimum, statistics.median, statistics.maximum) == (-1.5, 0.0, 2.0)
    assert (statistics.negative, statistics.zero) == (1, 1)
    assert read_safetensors(source)["metadata"] == {"format": "pt"}


@pytest.mark.parametrize("trained", [False, True])
def test_verbs_after_one_another_on_one_open_file(trained: bool, tmp_path: Path) -> None:
    w = torch.randn(64, 48)
    g, v = weightnorm.split(w, 0)
    g = g * 3 if trained else g
    save_file({"fc.weight_g": g, "fc.weight_v": v, "fc.bias": torch.ones(64)}, tmp_path / "in.safetensors")
    opened = document(tmp_path / "in.safetensors")

    convert.fold(opened.carrier)
    convert.apply(opened.carrier, selection=Selection(kinds=("*",)))
    opened.save(tmp_path, "out.safetensors")

    expected_g, expected_v = weightnorm.split(weightnorm.fold(g, v), 0)
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == {"fc.weight_g", "fc.weight_v", "fc.bias"}
    assert torch.equal(found["fc.weight_g"], expected_g)
    assert torch.equal(found["fc.weight_v"], expected_v)
