"""Weights in data files are converted a block at a time, with the bits of a conversion in memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.onnx_models import applied, folded, initializer, make_external, model, serialized, tensor, to_torch, value
from tests.reference import same_bits
from wnconvert import files
from wnconvert.compare import compare_files
from wnconvert.errors import InputError, NothingToDo, PairError, UsageError
from wnconvert.files import onnx as onnx_files
from wnconvert.files import onnx_stream
from wnconvert.jobs import Job, convert_file
from wnconvert.sites import Selection
from wnconvert.stream import pieces

UNCHECKED = {command: Job(command, check=False, overwrite=True) for command in ("apply", "fold")}


def network(dtype="float32"):
    """A layer of every form of the formula: plain, over columns, by groups. Some rows are zero, tiny or huge."""
    rng = np.random.default_rng(3)
    conv, deconv, matmul = (rng.standard_normal(shape) for shape in ((8, 3, 3), (8, 4, 3), (40, 40)))
    conv[2] = 0
    if dtype in ("float32", "bfloat16"):
        conv[3] *= 1e-30
        matmul[:, 7] *= 1e25
    held = [tensor("conv", conv, dtype), tensor("deconv", deconv, dtype), tensor("matmul", matmul, dtype)]
    held += [tensor("bias", rng.standard_normal(400), dtype), tensor("small", rng.standard_normal(4), dtype)]
    nodes = [
        helper.make_node("Conv", ["x", "conv"], ["a"], pads=[1, 1]),
        helper.make_node("ConvTranspose", ["a", "deconv"], ["b"], group=2, pads=[1, 1]),
        helper.make_node("MatMul", ["b", "matmul"], ["c"]),
        helper.make_node("Add", ["c", "small"], ["y"]),
    ]
    x, y = value("x", dtype, [1, 3, 40]), value("y", dtype, None)
    return model(helper.make_graph(nodes, "g", [x], [y], held), 18)


def tensors(path):
    return {t.name: to_torch(t) for t in onnx.load(path).graph.initializer}


def expected(m):
    return {t.name: initializer(m, t.name) for t in m.graph.initializer}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, held in wanted.items():
        assert same_bits(found[name], held), name


def scale_magnitudes(m, only="", factor=1.25):
    for t in m.graph.initializer:
        if t.name.endswith("_g") and t.name.startswith(only):
            t.raw_data = (
                (numpy_helper.to_array(t) * np.float32(factor)).astype(numpy_helper.to_array(t).dtype).tobytes()
            )
    return m


def loaded(path):
    return onnx.load(path, load_external_data=False)


def rewrite(path, change):
    m = loaded(path)
    change(m)
    path.write_bytes(serialized(m))


@pytest.fixture
def folders(tmp_path):
    made = [tmp_path / name for name in ("in", "out", "third")]
    for folder in made:
        folder.mkdir()
    return made


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("tiny", [False, True])
def test_the_bits_are_those_of_a_conversion_in_memory(folders, monkeypatch, dtype, elsewhere, split, tiny):
    if tiny:
        monkeypatch.setattr(pieces.cut, "__kwdefaults__", {"run": 8, "held": 16, "slab": 32})
    original = network(dtype)
    path = make_external(original, folders[0], split)
    wn, plain = (folders[1 if elsewhere else 0] / f"{name}.onnx" for name in ("wn", "plain"))

    report = convert_file(path, wn, Job("apply", dim="out", check=False))
    wanted = applied(original, dim="out")
    assert_same(tensors(wn), expected(wanted))
    counts = {row.site.name: (row.zero_rows, row.scaled_rows) for row in report.rows}
    assert counts["conv"] == (1, int(dtype in ("float32", "bfloat16")))
    assert [node.op_type for node in loaded(wn).graph.node] == [node.op_type for node in wanted.graph.node]

    rewrite(wn, scale_magnitudes)
    if elsewhere:
        plain = folders[2] / "plain.onnx"
    convert_file(wn, plain, UNCHECKED["fold"])
    assert_same(tensors(plain), expected(folded(scale_magnitudes(wanted))))


@pytest.mark.parametrize("split", [False, True])
def test_elsewhere_weights_keep_their_places(folders, split):
    source, target, third = folders
    path = make_external(network(), source, split)
    before = {p.relative_to(source): p.read_bytes() for p in source.rglob("*.bin")}
    convert_file(path, target / "wn.onnx", Job("apply"))
    places = {t.name: list(t.external_data) for t in loaded(path).graph.initializer}
    assert all(list(t.external_data) == places.get(t.name, []) for t in loaded(target / "wn.onnx").graph.initializer)
    assert {p.relative_to(target) for p in target.rglob("*.*")} == {Path("wn.onnx"), *before}
    convert_file(target / "wn.onnx", third / "model.onnx", Job("fold"))
    assert (third / "model.onnx").read_bytes() == path.read_bytes()
    for folder in (source, third):
        assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.bin")} == before


def test_what_was_not_trained_stays_where_it_is(tmp_path):
    path = make_external(network(), tmp_path)
    convert_file(path, tmp_path / "wn.onnx", UNCHECKED["apply"])
    rewrite(tmp_path / "wn.onnx", lambda m: scale_magnitudes(m, "matmul"))
    convert_file(tmp_path / "wn.onnx", tmp_path / "plain.onnx", UNCHECKED["fold"])
    held = {
        t.name: {e.key: e.value for e in t.external_data} for t in loaded(tmp_path / "plain.onnx").graph.initializer
    }
    assert {name: at["location"] for name, at in held.items()} == {
        "conv": "weights.bin",
        "deconv": "weights.bin",
        "matmul": "plain.onnx.data",
        "bias": "weights.bin",
        "small": "weights.bin",
    }
    assert (tmp_path / "plain.onnx.data").stat().st_size == 40 * 40 * 4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_cannot_be_split_is_as_it_was(folders, bad):
    original = network()
    held = next(t for t in original.graph.initializer if t.name == "deconv")
    values = numpy_helper.to_array(held).copy()
    values[1, 1, 1] = bad
    held.raw_data = values.tobytes()
    path = make_external(original, folders[0])
    report = convert_file(path, folders[1] / "wn.onnx", UNCHECKED["apply"])
    (row,) = [row for row in report.rows if row.site.name == "deconv"]
    assert (row.action, row.reason) == ("skipped", "row 1 holds NaN or infinity")
    convert_file(path, folders[2] / "wn.onnx", Job("apply", Selection(exclude=("deconv",)), check=False))
    assert (folders[1] / "wn.onnx").read_bytes() == (folders[2] / "wn.onnx").read_bytes()
    with pytest.raises(NothingToDo, match="holds NaN"):
        convert_file(path, folders[0] / "no.onnx", Job("apply", Selection(include=("deconv",))))
    assert sorted(p.name for p in folders[0].iterdir()) == ["model.onnx", "weights.bin"]


@pytest.mark.parametrize("dim", ["torch", "none"])
def test_a_pair_that_cannot_be_multiplied_is_named_and_leaves_nothing(folders, dim):
    path = make_external(network(), folders[0])
    convert_file(path, folders[1] / "wn.onnx", UNCHECKED["apply"] if dim == "torch" else Job("apply", dim=None))
    rewrite(folders[1] / "wn.onnx", lambda m: scale_magnitudes(m, "matmul", np.nan))
    before = sorted(folders[1].iterdir())
    for target in (folders[1] / "plain.onnx", folders[2] / "plain.onnx"):
        with pytest.raises(PairError, match=r"wn\.onnx: matmul: row 0 of g is NaN"):
            convert_file(folders[1] / "wn.onnx", target, UNCHECKED["fold"])
    assert sorted(folders[1].iterdir()) == before
    assert not list(folders[2].iterdir())


def overlapping(m):
    """Let the bias of a network refer to bytes in the middle of its matmul, as files with shared data do."""
    matmul, bias = (next(t for t in m.graph.initializer if t.name == name) for name in ("matmul", "bias"))
    start = next(int(e.value) for e in matmul.external_data if e.key == "offset")
    next(e for e in bias.external_data if e.key == "offset").value = str(start + 1600)


def test_bytes_that_another_tensor_needs_are_not_replaced(folders):
    path = make_external(network(), folders[0])
    rewrite(path, overlapping)
    convert_file(path, folders[1] / "wn.onnx", UNCHECKED["apply"])
    assert same_bits(tensors(folders[1] / "wn.onnx")["bias"], tensors(path)["bias"])
    assert (folders[1] / "wn.onnx.data").stat().st_size == 40 * 40 * 4
    rewrite(folders[1] / "wn.onnx", scale_magnitudes)
    convert_file(folders[1] / "wn.onnx", folders[2] / "plain.onnx", UNCHECKED["fold"])
    assert same_bits(tensors(folders[2] / "plain.onnx")["bias"], tensors(path)["bias"])


def test_magnitudes_that_are_too_many_go_into_the_data_file(folders, monkeypatch):
    monkeypatch.setattr(onnx_stream, "INLINE_MAGNITUDES", 100)
    rng = np.random.default_rng(0)
    w = tensor("w", rng.standard_normal((2, 500)))
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    ends = value("x", "float32", [1, 2]), value("y", "float32", None)
    original = model(helper.make_graph([node], "g", [ends[0]], [ends[1]], [w]), 18)
    path = make_external(original, folders[0])
    convert_file(path, folders[1] / "wn.onnx", Job("apply"))
    g = next(t for t in loaded(folders[1] / "wn.onnx").graph.initializer if t.name == "w_g")
    assert {e.key: e.value for e in g.external_data} == {"location": "wn.onnx.data", "offset": "0", "length": "2000"}
    assert_same(tensors(folders[1] / "wn.onnx"), expected(applied(original)))
    assert files.read(folders[1] / "wn.onnx").magnitudes()["w"].minimum > 0
    convert_file(folders[1] / "wn.onnx", folders[2] / "model.onnx", Job("fold"))
    assert (folders[2] / "model.onnx").read_bytes() == path.read_bytes()


def test_a_result_can_be_written_again(folders):
    source, target, _ = folders
    path = make_external(network(), source)
    convert_file(path, source / "wn.onnx", UNCHECKED["apply"])
    rewrite(source / "wn.onnx", scale_magnitudes)
    for _ in range(2):
        convert_file(source / "wn.onnx", target / "plain.onnx", UNCHECKED["fold"])
        assert {p.name for p in target.iterdir()} == {"plain.onnx", "weights.bin", "wn.onnx.data"}


def test_several_results_find_room_in_one_folder(folders):
    source, target, _ = folders
    path = make_external(network(), source)
    convert_file(path, source / "wn.onnx", UNCHECKED["apply"])
    for factor, name in ((1.5, "a.onnx"), (1.25, "b.onnx")):
        rewrite(source / "wn.onnx", lambda m, factor=factor: scale_magnitudes(m, factor=factor))
        report = convert_file(source / "wn.onnx", target / name, Job("fold"))
        assert report.weights_verified
    assert {p.name for p in target.iterdir()} == {"a.onnx", "b.onnx", "weights.bin", "wn.onnx.data", "b.onnx.data"} | {
        "b.onnx.2.data"
    }


def test_a_copy_does_not_replace_another_file_of_its_size(folders):
    source, target, _ = folders
    original = network()
    del original.graph.node[0]
    original.graph.node[0].input[0] = "x"
    path = make_external(original, source)
    (target / "weights.bin").write_bytes(bytes((source / "weights.bin").stat().st_size))
    with pytest.raises(InputError, match=r"weights\.bin: exists and is not the data of this model"):
        convert_file(path, target / "wn.onnx", Job("apply", Selection(include=("deconv",)), check=False))
    assert [p.name for p in target.iterdir()] == ["weights.bin"]
    assert not any((target / "weights.bin").read_bytes())


@pytest.mark.parametrize("location", ["./weights.bin", ".//./weights.bin"])
def test_one_file_may_be_spelled_in_several_ways(folders, location):
    path = make_external(network(), folders[0])

    def spell(m):
        m.graph.initializer[0].external_data[0].value = location

    rewrite(path, spell)
    convert_file(path, folders[0] / "wn.onnx", UNCHECKED["apply"])
    convert_file(path, folders[1] / "wn.onnx", UNCHECKED["apply"])
    assert_same(tensors(folders[1] / "wn.onnx"), tensors(folders[0] / "wn.onnx"))


def test_types_that_torch_lacks_are_copied_and_compared(folders):
    original = network()
    packed = TensorProto(name="packed", data_type=TensorProto.INT4, dims=[3, 5], raw_data=bytes(range(8)))
    original.graph.initializer.append(packed)
    path = make_external(original, folders[0])
    report = convert_file(path, folders[1] / "wn.onnx", Job("apply"))
    assert report.weights_verified
    shutil.copytree(folders[1], folders[2], dirs_exist_ok=True)
    at = next(t for t in loaded(path).graph.initializer if t.name == "packed").external_data
    with (folders[2] / "weights.bin").open("r+b") as file:
        file.seek(int(next(e.value for e in at if e.key == "offset")))
        file.write(b"\xff")
    verdict = compare_files(path, folders[2] / "wn.onnx")
    assert [difference.name for difference in verdict.weights.differing] == ["packed"]


def test_a_file_beyond_the_limit_of_the_format(tmp_path):
    path = tmp_path / "large.onnx"
    path.write_bytes(b"\x08\x08\x12\x00")
    os.truncate(path, onnx_files.LIMIT + 1)
    with pytest.raises(InputError, match="is over 2 GB"):
        convert_file(path, tmp_path / "out.onnx", UNCHECKED["apply"])


MEASURED = """
import resource, sys
from pathlib import Path
from wnconvert import compare
from wnconvert.files import onnx, safetensors
from wnconvert.jobs import Job, convert_file
from wnconvert.stream import engine
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
convert_file(Path(sys.argv[2]), Path(sys.argv[3]), Job(sys.argv[1], check=False))
print((peak() - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts in kilobytes on Linux only")
def test_memory_stays_bounded(folders):
    """One weight of 256 MB. What it takes is about the same for any size."""
    n = 8192
    rows = np.random.default_rng(0).standard_normal((16, n)).astype(np.float32)
    with (folders[0] / "w.bin").open("wb") as file:
        for _ in range(n // 16):
            file.write(rows.tobytes())
    w = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[n, n], data_location=TensorProto.EXTERNAL)
    w.external_data.add(key="location", value="w.bin")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    ends = value("x", "float32", [1, n]), value("y", "float32", None)
    m = model(helper.make_graph([node], "g", [ends[0]], [ends[1]], [w]), 18)
    (folders[0] / "m.onnx").write_bytes(serialized(m))

    def measured(command, source, target):
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, command, source, target], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert measured("apply", folders[0] / "m.onnx", folders[1] / "wn.onnx") < 128
    rewrite(folders[1] / "wn.onnx", scale_magnitudes)
    assert measured("fold", folders[1] / "wn.onnx", folders[2] / "plain.onnx") < 128
    assert measured("fold", folders[1] / "wn.onnx", folders[1] / "plain.onnx") < 128


ONE_FILE = {
    command: Job(command, dim="out", reading=files.ReadOptions(single_file=True)) for command in ("apply", "fold")
}


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_a_single_file_holds_everything(folders, split, elsewhere):
    original = network()
    path = make_external(original, folders[0], split)
    before = {p: p.read_bytes() for p in folders[0].rglob("*.*")}
    target = folders[1] if elsewhere else folders[0]

    convert_file(path, target / "wn.onnx", ONE_FILE["apply"])
    assert_same(tensors(target / "wn.onnx"), expected(applied(original, dim="out")))
    assert not any(t.external_data or t.data_location for t in loaded(target / "wn.onnx").graph.initializer)
    alone = shutil.move(target / "wn.onnx", folders[2] / "moved.onnx")
    convert_file(alone, folders[2] / "plain.onnx", ONE_FILE["fold"])
    assert_same(tensors(folders[2] / "plain.onnx"), expected(original))

    assert {p.name for p in folders[2].iterdir()} == {"moved.onnx", "plain.onnx"}
    assert {p: p.read_bytes() for p in folders[0].rglob("*.*")} == before
    assert not list(folders[1].iterdir())


def test_a_single_file_that_would_be_too_large_is_not_written(folders, monkeypatch):
    path = make_external(network(), folders[0])
    monkeypatch.setattr(onnx_files, "LIMIT", 6000)
    with pytest.raises(InputError, match=r"over 2 GB.*leave its weights in data files"):
        convert_file(path, folders[1] / "wn.onnx", ONE_FILE["apply"])
    assert not list(folders[1].iterdir())


def test_a_single_file_is_for_onnx(tmp_path):
    torch.save({"fc.weight": torch.ones(2, 2)}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match=r"a\.pt: --single-file is for ONNX"):
        files.read(tmp_path / "a.pt", files.ReadOptions(single_file=True))
