"""ONNX files as a user converts them: real models, damaged files, and the check of the outputs."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.models import model_file
from tests.onnx_models import CASES, applied, layer, make_external, model, serialized, tensor, value
from wnconvert import files
from wnconvert.errors import InputError, NothingToDo, UsageError, VerificationError
from wnconvert.files import onnx as onnx_files
from wnconvert.files import onnx_inputs, onnx_outputs, outputs
from wnconvert.jobs import Job, convert_file

RAPID = "rapidocr_onnxruntime/models"
REAL = [
    ("rapidocr-onnxruntime", f"{RAPID}/ch_PP-OCRv4_det_infer.onnx", 64),
    ("rapidocr-onnxruntime", f"{RAPID}/ch_PP-OCRv4_rec_infer.onnx", 47),
    ("rapidocr-onnxruntime", f"{RAPID}/ch_ppocr_mobile_v2.0_cls_infer.onnx", 54),
    ("silero-vad", "silero_vad/data/silero_vad.onnx", 12),
    ("silero-vad", "silero_vad/data/silero_vad_16k_op15.onnx", 6),
]


@pytest.mark.parametrize(("distribution", "name", "count"), REAL, ids=lambda given: str(given).rpartition("/")[2])
def test_real_models_keep_their_outputs_and_come_back(tmp_path, distribution, name, count):
    path = model_file(distribution, name)
    report = convert_file(path, tmp_path / "wn.onnx", Job("apply"))
    assert report.count("split") == count
    assert report.weights_verified
    assert report.outputs.equal is True
    onnx.checker.check_model(str(tmp_path / "wn.onnx"), full_check=True)
    with pytest.raises(NothingToDo, match="already split"):
        convert_file(tmp_path / "wn.onnx", tmp_path / "again.onnx", Job("apply"))
    assert len(files.read(tmp_path / "wn.onnx").magnitudes()) == count
    convert_file(tmp_path / "wn.onnx", tmp_path / "plain.onnx", Job("fold", check=False))
    assert (tmp_path / "plain.onnx").read_bytes() == serialized(onnx.load(path))


def test_silero_runs_in_both_of_its_branches(tmp_path):
    """The sampling rate chooses the branch: 16000 has to be tried, and something else."""
    path = model_file("silero-vad", "silero_vad/data/silero_vad.onnx")
    assert 16000 in onnx_outputs._compared_integers(files.read(path).carrier.index)
    m = onnx.load(path)
    for branch in ("then_branch", "else_branch"):
        wrong = onnx.ModelProto()
        wrong.CopyFrom(m)
        graph = next(a.g for n in wrong.graph.node for a in n.attribute if a.name == branch)
        weight = next(a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if len(a.t.dims) == 3)
        changed = (numpy_helper.to_array(weight) * 1.1).astype(np.float32)
        weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
        (tmp_path / "wrong.onnx").write_bytes(serialized(wrong))
        assert files.read(path).compare_outputs(files.read(tmp_path / "wrong.onnx")).equal is False


def put(folder, name, m):
    (folder / name).write_bytes(serialized(m))
    return files.read(folder / name)


def test_a_wrong_magnitude_is_seen_in_the_outputs(tmp_path):
    original = layer(CASES[0])
    split = applied(original)
    g = next(t for t in split.graph.initializer if t.name == "w_g")
    g.raw_data = (np.frombuffer(g.raw_data, np.float32) * np.float32(1.01)).tobytes()
    check = put(tmp_path, "a.onnx", original).compare_outputs(put(tmp_path, "b.onnx", split))
    assert check.equal is False
    assert 0.005 < check.largest < 0.02


def test_a_result_that_does_not_run_is_not_equal(tmp_path, monkeypatch):
    original = layer(CASES[0])
    broken = layer(CASES[0])
    broken.graph.node[0].input[0] = "nowhere"
    check = put(tmp_path, "a.onnx", original).compare_outputs(put(tmp_path, "b.onnx", broken))
    assert check.equal is False
    assert "b.onnx does not" in check.note
    path = tmp_path / "a.onnx"
    monkeypatch.setattr(onnx_files, "compare", lambda *_: check)
    with pytest.raises(VerificationError, match=r"b\.onnx does not"):
        convert_file(path, tmp_path / "c.onnx", Job("apply"))
    assert not (tmp_path / "c.onnx").exists()


def test_an_original_that_does_not_run_decides_nothing(tmp_path):
    m = layer(CASES[0], dtype="float64")
    check = put(tmp_path, "a.onnx", m).compare_outputs(put(tmp_path, "b.onnx", applied(m)))
    assert check.equal is None
    assert "a.onnx could not be run" in check.note


def test_a_model_of_too_many_nodes_is_not_run(tmp_path, monkeypatch):
    original = layer(CASES[0])
    split = applied(layer(CASES[0]))
    nodes = len(split.graph.node)
    sides = put(tmp_path, "a.onnx", original), put(tmp_path, "b.onnx", split)
    monkeypatch.setattr(onnx_outputs, "MOST_NODES", nodes)
    assert sides[0].compare_outputs(sides[1]).equal
    monkeypatch.setattr(onnx_outputs, "MOST_NODES", nodes - 1)
    check = sides[0].compare_outputs(sides[1])
    assert check.equal is None
    assert f"minutes to load {nodes} nodes" in check.note


def test_a_crash_of_the_runtime_is_a_note(tmp_path, monkeypatch):
    script = tmp_path / "crash"
    script.write_text("#!/bin/sh\nkill -SEGV $$\n")
    script.chmod(0o755)
    document = put(tmp_path, "a.onnx", layer(CASES[0]))
    monkeypatch.setattr(onnx_outputs.sys, "executable", str(script))
    check = document.compare_outputs(document)
    assert check.equal is None
    assert "crashed (signal 11)" in check.note


def test_judging_outputs():
    def judge(x, y):
        check = outputs.judge([{"y": np.asarray(x)}], [{"y": np.asarray(y)}], 1e-3)
        return check.equal

    assert judge([1.0, np.nan, np.inf], [1.0005, np.nan, np.inf]) is True
    assert judge([1.0, np.nan], [1.0, 2.0]) is False
    assert judge([1.0, np.inf], [1.0, -np.inf]) is False
    assert judge([1000.0, 1.0], [1000.5, 1.0]) is True
    assert judge([1.0], [1.01]) is False
    assert judge([3], [4]) is None
    assert judge([3], [3]) is True
    assert judge([1.0], [1.0, 2.0]) is None
    assert judge([1.0], np.float32([1.0])) is False
    assert judge([1e-12], [2e-12]) is True
    assert judge([1 + 1j], [1 - 1j]) is False
    assert outputs.distance(np.float32([1, 2]), np.float32([1, math.nan])) == math.inf


def test_open_dimensions_are_tried_one_by_one():
    names = onnx_inputs.open_dims([["n", 3, "?", "?"], [None, 2], ["n"], [4]])
    assert names == ["n", "0.2", "0.3", "1.0"]
    first = next(iter(onnx_inputs.assignments(names)))
    assert onnx_inputs.resolve(0, ["n", 3, "?", "?"], first) == (1, 3, 32, 32)
    assert list(onnx_inputs.assignments([])) == [{}]
    tried = list(onnx_inputs.assignments(["a", "b"]))
    assert {"a": 1, "b": 576} in tried
    assert {"a": 64, "b": 1} in tried


@pytest.mark.parametrize("declared", ["map(int64,tensor(float))", "tensor(bfloat16)", "optional(tensor(float))"])
def test_inputs_that_cannot_be_made(declared):
    with pytest.raises(onnx_inputs.Unsupported):
        onnx_inputs.element_type(declared)


@pytest.mark.parametrize(
    "content",
    [b"", b"not a model at all", b"\x08\x07\x12\xffxx", b"\x08\x07", b"version https://git-lfs.github.com/spec/v1\n"],
)
def test_damaged_files_are_one_clear_line(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        files.read(path)
    assert str(error.value).startswith(f"{path}: not an ONNX model")
    assert "\n" not in str(error.value)


def test_truncated_models_are_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(serialized(layer(CASES[0]))[:-30])
    with pytest.raises(InputError, match="damaged"):
        files.read(path)


def test_models_are_recognised_by_content(tmp_path):
    for name in ("model.onnx", "model.bin", "model"):
        path = tmp_path / name
        path.write_bytes(serialized(layer(CASES[0])))
        assert onnx_files.recognise(path)
    for head in (b"PK\x03\x04", b"\x80\x02}", b"\x08\x01\x00\x00\x00\x00\x00\x00{", b""):
        path = tmp_path / "other.bin"
        path.write_bytes(head)
        assert not onnx_files.recognise(path)


def test_a_model_over_the_limit_of_protobuf_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(serialized(layer(CASES[0])))
    monkeypatch.setattr(onnx_files, "LIMIT", 100)
    with pytest.raises(InputError, match="over 2 GB"):
        convert_file(path, tmp_path / "out.onnx", Job("apply"))
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_local_functions_are_mentioned(tmp_path):
    m = layer(CASES[0])
    m.functions.add(name="f", domain="d")
    m.opset_import.add(domain="d", version=1)
    assert put(tmp_path, "a.onnx", m).notes == ["weights inside its 1 local functions are not looked at"]


def test_magnitudes_are_described(tmp_path):
    split = applied(layer(CASES[0]))
    found = put(tmp_path, "a.onnx", split).magnitudes()
    g = np.frombuffer(next(t for t in split.graph.initializer if t.name == "w_g").raw_data, np.float32)
    assert found["w"].maximum == g.max()
    assert found["w"].negative == 0


def test_the_result_is_linked_only_while_it_is_checked(tmp_path):
    held = [tensor("w", np.random.default_rng(0).standard_normal((40, 40)))]
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    m = model(
        onnx.helper.make_graph([node], "g", [value("x", "float32", [1, 40])], [value("y", "float32", [1, 40])], held),
        17,
    )
    path = make_external(m, tmp_path)
    convert_file(path, tmp_path / "wn.onnx", Job("apply"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "weights.bin", "wn.onnx"]
    assert not any(p.is_symlink() for p in tmp_path.rglob("*"))


def test_a_module_to_tell_the_kinds_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(serialized(layer(CASES[0])))
    with pytest.raises(UsageError, match="--arch is for checkpoints"):
        files.read(tmp_path / "m.onnx", files.ReadOptions(arch="timm:resnet18"))
