"""Models whose tensors are in data files."""

from __future__ import annotations

import hashlib
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.onnx_models import make_external, model, serialized, tensor, value
from tests.reference import same_bits
from wnconvert import files, weightnorm
from wnconvert.carriers.onnx import external
from wnconvert.errors import InputError
from wnconvert.files import ReadOptions
from wnconvert.jobs import Job, convert_file

DTYPES = ("float32", "float16")


def network(dtype="float32", dead=False):
    """Two layers of 40 x 40 and a bias, some rows zero if `dead`."""
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal((40, 40)).astype(np.float32) for _ in range(2))
    if dead:
        a[:, 3] = 0
    held = [tensor("a", a, dtype), tensor("b", b, dtype), tensor("c", rng.standard_normal(40), dtype)]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Add", ["h", "c"], ["r"]),
        helper.make_node("Gemm", ["r", "b"], ["y"], transB=1),
    ]
    graph = helper.make_graph(nodes, "g", [value("x", dtype, ["n", 40])], [value("y", dtype, [None, 40])], held)
    return model(graph, 18)


def digests(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def loaded(path):
    return onnx.load(path, load_external_data=False)


def retrain(path):
    """Double g of `a` and change one element of v of `b` inside the data file of a copied model."""
    m = loaded(path)
    g = next(t for t in m.graph.initializer if t.name == "a_g")
    g.raw_data = (numpy_helper.to_array(g) * 2).tobytes()
    path.write_bytes(serialized(m))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dead", [False, True])
def test_beside_the_input_the_data_is_referenced_and_untouched(tmp_path, dtype, split, dead):
    original = make_external(network(dtype, dead), tmp_path, split)
    before = digests(tmp_path)
    report = convert_file(original, tmp_path / "wn.onnx", Job("apply"))
    assert report.outputs.equal is True
    convert_file(tmp_path / "wn.onnx", tmp_path / "plain.onnx", Job("fold"))
    after = digests(tmp_path)
    assert {path: after[path] for path in before} == before
    new = {str(path) for path in after} - {str(path) for path in before}
    assert new == {"wn.onnx", "plain.onnx"} | ({"wn.onnx.data"} if dead else set())
    assert (tmp_path / "plain.onnx").read_bytes() == serialized(loaded(original))
    onnx.checker.check_model(str(tmp_path / "wn.onnx"), full_check=True)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dead", [False, True])
def test_elsewhere_the_data_is_copied(tmp_path, split, dead):
    source, target, third = (tmp_path / name for name in ("in", "out", "third"))
    for folder in (source, target, third):
        folder.mkdir()
    original = make_external(network(dead=dead), source, split)
    before = digests(source)
    convert_file(original, target / "model.onnx", Job("apply"))
    convert_file(target / "model.onnx", third / "model.onnx", Job("fold"))
    assert digests(source) == before
    for folder in (target, third):
        onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    if not (dead and split):
        # The data of a dead layer that was alone in its file is not copied, so there is nothing to refer to.
        assert digests(third) == before
    for name in "abc":
        assert np.array_equal(values(third / "model.onnx", name), values(original, name))


def values(path, name):
    return numpy_helper.to_array(next(t for t in onnx.load(path).graph.initializer if t.name == name))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_trained_pair_folds_into_a_new_file(tmp_path, dtype):
    original = make_external(network(dtype), tmp_path)
    convert_file(original, tmp_path / "wn.onnx", Job("apply"))
    retrain(tmp_path / "wn.onnx")
    before = digests(tmp_path)
    report = convert_file(tmp_path / "wn.onnx", tmp_path / "plain.onnx", Job("fold"))
    assert report.weights_verified
    assert report.outputs.equal is True
    assert {path: digest for path, digest in digests(tmp_path).items() if path in before} == before
    g, v = (torch.from_numpy(values(tmp_path / "wn.onnx", name).copy()) for name in ("a_g", "a"))
    folded = torch.from_numpy(values(tmp_path / "plain.onnx", "a").copy())
    assert same_bits(folded, weightnorm.fold(g, v))
    assert np.array_equal(values(tmp_path / "plain.onnx", "b"), values(original, "b"))
    onnx.checker.check_model(str(tmp_path / "plain.onnx"), full_check=True)


def test_a_file_in_the_way_is_never_overwritten(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir(), target.mkdir()
    original = make_external(network(), source)
    (target / "weights.bin").write_bytes(b"another model")
    with pytest.raises(InputError, match=r"weights\.bin: exists and is not the data of this model"):
        convert_file(original, target / "model.onnx", Job("apply", overwrite=True))
    assert (target / "weights.bin").read_bytes() == b"another model"
    assert [path.name for path in target.iterdir()] == ["weights.bin"]


def test_the_data_itself_is_never_the_output(tmp_path):
    original = make_external(network(), tmp_path)
    (tmp_path / "weights.bin").rename(tmp_path / "weights.data")
    change_all(original, location="weights.data")
    before = digests(tmp_path)
    with pytest.raises(InputError, match="is a data file of the model"):
        convert_file(original, tmp_path / "weights.data", Job("apply", overwrite=True))
    change_all(original, location="./weights.data")
    before = digests(tmp_path)
    with pytest.raises(InputError, match="is a data file of the model"):
        convert_file(original, tmp_path / "weights.data", Job("apply", overwrite=True))
    assert digests(tmp_path) == before


def test_the_same_data_already_there_is_used(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir(), target.mkdir()
    original = make_external(network(), source)
    shutil.copy(source / "weights.bin", target)
    stamp = (target / "weights.bin").stat()
    convert_file(original, target / "model.onnx", Job("apply"))
    assert (target / "weights.bin").stat().st_ino == stamp.st_ino


def test_new_data_never_takes_a_name_in_use(tmp_path):
    original = make_external(network(dead=True), tmp_path)
    (tmp_path / "wn.onnx.data").write_bytes(b"mine")
    convert_file(original, tmp_path / "wn.onnx", Job("apply"))
    assert (tmp_path / "wn.onnx.data").read_bytes() == b"mine"
    assert (tmp_path / "wn.onnx.2.data").exists()


def change(path, count=1, **entries):
    m = loaded(path)
    for t in m.graph.initializer[:count]:
        for key, held in entries.items():
            next(e for e in t.external_data if e.key == key).value = str(held)
    path.write_bytes(serialized(m))


def change_all(path, **entries):
    change(path, None, **entries)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "../weights.bin"}, "outside the folder of the model"),
        ({"location": "/etc/hostname"}, "outside the folder of the model"),
        ({"location": "a/../../weights.bin"}, "outside the folder of the model"),
        ({"location": "..\\weights.bin"}, "outside the folder of the model"),
        ({"location": ""}, "outside the folder of the model"),
        ({"location": "gone.bin"}, "gone.bin: no such file"),
        ({"offset": 1 << 40}, "weights.bin: truncated"),
        ({"offset": "many"}, "is not a number"),
        ({"offset": -1}, "truncated"),
        ({"length": 12}, "has 6400 bytes but its entry says 12"),
    ],
)
def test_bad_references_are_one_clear_line(tmp_path, entries, message):
    path = make_external(network(), tmp_path)
    change(path, **entries)
    with pytest.raises(InputError) as error:
        convert_file(path, tmp_path / "out.onnx", Job("apply"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("dims", [[3], [1 << 62, 4], [1 << 33, 1 << 33]])
def test_integers_that_do_not_fill_their_shape_are_refused(tmp_path, dims):
    m = network()
    m.graph.initializer.add(name="n", data_type=TensorProto.INT64, raw_data=bytes(8)).dims[:] = [1]
    path = make_external(m, tmp_path)
    m = loaded(path)
    (n,) = (t for t in m.graph.initializer if t.name == "n")
    n.dims[:] = dims
    path.write_bytes(serialized(m))
    for job in (Job("apply"), Job("apply", reading=ReadOptions(single_file=True))):
        with pytest.raises(InputError, match="but its entry says 8"):
            convert_file(path, tmp_path / "out.onnx", job)


def test_a_truncated_file_is_named(tmp_path):
    path = make_external(network(), tmp_path)
    data = tmp_path / "weights.bin"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"weights\.bin: truncated"):
        files.read(path)


def test_a_length_and_an_offset_are_optional(tmp_path):
    path = make_external(network(), tmp_path, split=True)
    m = loaded(path)
    for t in m.graph.initializer:
        del t.external_data[1:]
    path.write_bytes(serialized(m))
    convert_file(path, tmp_path / "wn.onnx", Job("apply"))
    convert_file(tmp_path / "wn.onnx", tmp_path / "plain.onnx", Job("fold"))
    assert (tmp_path / "plain.onnx").read_bytes() == serialized(m)


def test_unaligned_data_is_read(tmp_path):
    held = np.random.default_rng(0).standard_normal(3000)
    t = tensor("t", held.reshape(3, 1000), "float64")
    (tmp_path / "d").write_bytes(b"x" * 4097 + t.raw_data)
    t.ClearField("raw_data")
    t.data_location = TensorProto.EXTERNAL
    t.external_data.add(key="location", value="d")
    t.external_data.add(key="offset", value="4097")
    assert np.array_equal(external.read(t, tmp_path).numpy(), held.reshape(3, 1000))
