"""Files that are not what they should be: one clear line each, and nothing written."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import FORMATS, Format, document, state
from wnconvert import convert, files, jobs
from wnconvert.compare import compare_files
from wnconvert.errors import InputError, PairError, UsageError, WnconvertError
from wnconvert.files import sharded
from wnconvert.sites import Selection

SINGLE = pytest.mark.parametrize("form", FORMATS[:-1], ids=lambda form: form.name)


def _use_everything(path: Path, folder: Path) -> None:
    opened = document(path)
    convert.apply(opened.carrier)
    for load in opened.carrier.effective().values():
        load().reshape(-1)[:1].tolist()
    opened.save(folder, "out")


@SINGLE
def test_cut_short_anywhere(form: Format, tmp_path: Path) -> None:
    source, damaged = tmp_path / form.file, tmp_path / f"damaged-{form.file}"
    form.write(source, state())
    data = source.read_bytes()
    step = max(1, len(data) // 60)

    for length in (*range(16), *range(16, len(data), step), len(data) - 1):
        damaged.write_bytes(data[:length])
        with pytest.raises(InputError) as caught:
            document(damaged)
        assert "\n" not in str(caught.value)
        assert str(damaged) in str(caught.value)


@SINGLE
def test_random_damage_is_an_error_or_harmless(form: Format, tmp_path: Path) -> None:
    source, damaged = tmp_path / form.file, tmp_path / f"damaged-{form.file}"
    form.write(source, state())
    data = source.read_bytes()
    choose = random.Random(form.name)
    refused = 0

    for _ in range(60):
        changed = bytearray(data)
        for _ in range(choose.choice((1, 4))):
            # The ends of a file hold its structure.
            near = choose.choice((choose.randrange(2000), len(data) - 1 - choose.randrange(4000)))
            changed[near % len(data)] = choose.randrange(256)
        damaged.write_bytes(changed)
        try:
            _use_everything(damaged, tmp_path)
        except WnconvertError as error:
            refused += 1
            assert "\n" not in str(error)

    assert refused


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>not found</html>", "is a web page"),
        (b"\n <html>", "is a web page"),
        (b"random bytes, no model", "not a model file of a known format"),
        (b"PK\x03\x04 but no archive", "damaged or cut short"),
        (b"\x80\x02 but no pickle", "damaged, cut short, or not written by torch.save"),
        (bytes(4096), "not a model file of a known format"),
    ],
)
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "model"])
def test_files_that_are_something_else(contents: bytes, said: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(contents)

    with pytest.raises(InputError, match=said):
        jobs.convert_file(tmp_path / name, None, jobs.Job("fold"))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.rand(3), "a single tensor without a name"),
        ({"epoch": 3}, "holds no tensors"),
        ([], "holds no tensors"),
        ("text", "holds no tensors"),
        ({"x": torch.eye(3).to_sparse()}, "holds no tensors"),
    ],
)
def test_torch_files_without_a_network(value: Any, said: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "in.pt")

    with pytest.raises(InputError, match=said):
        document(tmp_path / "in.pt")


def test_an_archive_that_claims_to_be_encrypted(tmp_path: Path) -> None:
    path = tmp_path / "in.pt"
    torch.save({"fc.weight": torch.rand(3, 4)}, path)
    data = bytearray(path.read_bytes())
    # The flags of the first record, here and in the directory at the end.
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    path.write_bytes(data)

    with pytest.raises(InputError):
        document(path)


def test_folders_say_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder without an index of shards"):
        files.read(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(InputError, match="has no weight_map from names to files"):
        files.read(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    (tmp_path / ".metadata").write_text("")
    with pytest.raises(InputError, match=r"\.metadata: damaged or cut short"):
        files.read(tmp_path)


def _safetensors(path: Path, table: object, data: bytes = bytes(32), length: int | None = None) -> Path:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def _row(shape: list[Any], start: Any, stop: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"a": _row([4], 0, 16), "b": _row([4], 8, 24)}, "'b' overlaps the tensor before it"),
        ({"a": _row([4], 0, 16), "b": _row([3], 20, 32)}, "'b' leaves a gap before it"),
        ({"a": _row([4], 0, 16)}, "where its header needs"),
        ({"a": _row([12], 0, 48)}, "where its header needs"),
        ({"a": _row([9], 0, 32)}, "does not fill its 32 bytes"),
        ({"a": _row([-8], 0, 32)}, "make no sense"),
        ({"a": _row([8], -4, 28)}, "make no sense"),
        ({"a": _row([8], 32, 0)}, "does not fill"),
        ({"a": _row([8.0], 0, 32)}, "make no sense"),
        ({"a": _row([True, 8], 0, 32)}, "make no sense"),
        ({"a": _row([8], 0, 32, "float32")}, "make no sense"),
        ({"a": _row([8], 0, 32, None)}, "make no sense"),
        ({"a": {"dtype": "F32", "shape": [8]}}, "has no dtype, shape and data_offsets"),
        ({"a": [1]}, "has no dtype, shape and data_offsets"),
        ({"a": _row([2**62, 2**62], 0, 32)}, "does not fill"),
        ({"__metadata__": {"x": 1}, "a": _row([8], 0, 32)}, "its metadata is no table of text"),
        (b'{"a": 1, "a": 2}', "a name is there twice"),
        (b'{"a": }', "its header is no JSON"),
        (b'{"\\ud800": 1}', "its header is no JSON"),
        (b'{"__metadata__": {"a": "\\ud800"}}', "its header is no JSON"),
        (b'{"a":' + b"[" * 100_000, "its header is no JSON"),
        (b'{"\xff": 1}', "its header is no JSON"),
    ],
)
def test_headers_that_lie(table: object, said: str, tmp_path: Path) -> None:
    path = _safetensors(tmp_path / "in.safetensors", table)

    with pytest.raises(InputError, match=said):
        document(path)


@pytest.mark.parametrize("length", [10**6, 99_999_999])
def test_header_longer_than_the_file(length: int, tmp_path: Path) -> None:
    path = _safetensors(tmp_path / "in.safetensors", {"a": _row([8], 0, 32)}, length=length)

    with pytest.raises(InputError, match=f"its header claims {length} bytes"):
        document(path)


def test_header_without_tensors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no tensors"):
        document(_safetensors(tmp_path / "in.safetensors", {}, b""))


_FLOATS = struct.pack("<32f", *range(1, 33))
_MAGNITUDES = struct.pack("<4f", *[1.0] * 4)


@pytest.mark.parametrize("code", ["F4", "I64", "F8_E4M3", "C64", "XYZ"])
@pytest.mark.parametrize("odd", ["g", "v"])
def test_a_pair_of_another_dtype_stays_as_it_is(code: str, odd: str, tmp_path: Path) -> None:
    # Bytes of an element; those of the smallest are packed, two in a byte.
    size = {"F4": 0.5, "I64": 8, "C64": 8}.get(code, 1)
    tensors = {
        "a.weight_g": (code if odd == "g" else "F32", [4, 1], bytes(int(4 * size)) if odd == "g" else _MAGNITUDES),
        "a.weight_v": (code if odd == "v" else "F32", [4, 8], bytes(int(32 * size)) if odd == "v" else _FLOATS),
        "b.weight_g": ("F32", [4, 1], _MAGNITUDES),
        "b.weight_v": ("F32", [4, 8], _FLOATS),
        "c.weight": ("F32", [4, 8], _FLOATS),
        "c.bias": ("F32", [4], _MAGNITUDES),
    }
    table, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        table[name] = _row(shape, len(data), len(data) + len(raw), dtype)
        data += raw
    source = _safetensors(tmp_path / "in.safetensors", table, data)

    for command in ("fold", "apply", "rename"):
        result = tmp_path / f"{command}.safetensors"
        report = jobs.convert_file(source, result, jobs.Job(command, names="parametrized"))
        assert report.weights_verified
        opened = document(result)
        found = [{e.name: e.load().tolist() for e in d.carrier.entries()} for d in (document(source), opened)]
        assert all(found[0][name] == found[1][name] for name in ("a.weight_g", "a.weight_v"))
    assert compare_files(source, source).weights.identical


def test_a_pair_that_is_left_alone_may_hold_anything(tmp_path: Path) -> None:
    nan = torch.full((4, 8), torch.nan)
    pairs = {"a.weight_g": torch.rand(4, 1), "a.weight_v": nan}
    pairs |= {"b.weight_g": torch.rand(4, 1), "b.weight_v": torch.rand(4, 8)}
    save_file(pairs, tmp_path / "in.safetensors")
    job = jobs.Job("fold", selection=Selection(exclude=("a.*",)))
    assert jobs.convert_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", job).weights_verified
    with pytest.raises(PairError, match=r"a\.weight: row 0 of v holds NaN"):
        jobs.convert_file(tmp_path / "in.safetensors", tmp_path / "all.safetensors", jobs.Job("fold"))


class TestShards:
    """Folders whose parts disagree."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        FORMATS[-1].write(tmp_path / "in", state())
        return tmp_path / "in"

    def _change(self, folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    def test_missing_shard(self, folder: Path) -> None:
        (folder / "model-00002-of-00002.safetensors").unlink()

        with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors: missing, but model"):
            document(folder)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda index: index.pop("weight_map"), "it has no weight_map"),
            (lambda index: index.update(note="\ud800"), "no JSON: .* surrogates not allowed"),
            (lambda index: index["weight_map"].update(extra="model-00001-of-00002.safetensors"), "'extra' is in"),
            (lambda index: index["weight_map"].pop("steps"), "'steps' is in .* but the index does not list it"),
            (lambda index: index["weight_map"].update(steps=3), "it has no weight_map"),
            (lambda index: index["weight_map"].update(steps="../outside"), "outside its folder"),
            (lambda index: index["weight_map"].update(steps="/etc/passwd"), "outside its folder"),
        ],
    )
    def test_index_that_disagrees(self, change: Callable[[dict[str, Any]], object], said: str, folder: Path) -> None:
        self._change(folder, change)

        with pytest.raises(InputError, match=said):
            document(folder)

    def test_index_that_is_no_json(self, folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text("{")

        with pytest.raises(InputError, match="damaged: no JSON"):
            document(folder)

    def test_tensor_in_two_shards(self, folder: Path) -> None:
        copy = (folder / "model-00001-of-00002.safetensors").read_bytes()
        (folder / "model-00002-of-00002.safetensors").write_bytes(copy)

        with pytest.raises(InputError, match="is in both"):
            document(folder)

    def test_two_indices(self, folder: Path) -> None:
        (folder / "other.safetensors.index.json").write_text("{}")

        with pytest.raises(InputError, match="holds 2 indices; name one of them"):
            document(folder)

    def test_output_inside_the_input(self, folder: Path) -> None:
        before = sorted(folder.rglob("*"))

        with pytest.raises(UsageError, match="the output would lie inside the input"):
            jobs.convert_file(folder, folder / "out", jobs.Job("apply"))
        assert sorted(folder.rglob("*")) == before

    def test_index_alone_is_enough(self, folder: Path) -> None:
        assert sharded.recognise(folder / "model.safetensors.index.json")
        assert sharded.recognise(folder)
        assert not sharded.recognise(folder / "config.json")
