"""Weights in nested graphs, shared weights, and what must be left alone or told apart."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.onnx_models import (
    CASES,
    applied,
    carrier,
    constant,
    copy,
    folded,
    initializer,
    is_valid,
    layer,
    model,
    run,
    serialized,
    tensor,
    value,
)
from wnconvert import compare, convert
from wnconvert.errors import InputError, NothingToDo, UsageError
from wnconvert.sites import Selection

RNG = np.random.default_rng(7)
W = RNG.standard_normal((5, 4)).astype(np.float32)
W2 = RNG.standard_normal((5, 4)).astype(np.float32)
X = value("x", "float32", [3, 5])
Y = value("y", "float32", [None, None])


def matmul(weight, output="y", x="x"):
    return helper.make_node("MatMul", [x, weight], [output], name=f"make {output}")


def simple(nodes, initializers, inputs=(X,), outputs=(Y,), opset=17, ir=None):
    return model(helper.make_graph(nodes, "g", list(inputs), list(outputs), list(initializers)), opset, ir)


def body(nodes, output, initializers=()):
    return helper.make_graph(
        nodes, f"body of {output}", [], [value(output, "float32", [None, None])], list(initializers)
    )


def check_round_trip(original, **given):
    split = applied(original)
    assert is_valid(original) is True
    assert is_valid(split) is True
    assert serialized(folded(split)) == serialized(original)
    assert compare.compare_weights(carrier(original), carrier(split)).identical
    for optimize in (True, False):
        before, after = run(original, optimize, **given), run(split, optimize, **given)
        for a, b in zip(before, after, strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=2e-6 * np.abs(a).max())
    return split


def conditional(opset, held):
    """An If whose branches use a weight of their own, captured, or in a Constant node, under the same names."""
    outer, then_nodes, else_nodes, then_init, else_init = [], [], [], [], []
    if held == "captured":
        outer = [tensor("w", W)]
    elif held == "own":
        then_init, else_init = [tensor("w", W)], [tensor("w", W2)]
    else:
        then_nodes, else_nodes = [constant(tensor("w", W))], [constant(tensor("w", W2))]
    then_branch = body([*then_nodes, matmul("w", "a"), helper.make_node("Neg", ["a"], ["t"])], "t", then_init)
    else_branch = body([*else_nodes, matmul("w", "e")], "e", else_init)
    node = helper.make_node("If", ["cond"], ["y"], name="choose", then_branch=then_branch, else_branch=else_branch)
    cond = helper.make_tensor_value_info("cond", TensorProto.BOOL, [])
    return simple([helper.make_node("Relu", ["x"], ["unused"]), node], outer, [X, cond], opset=opset)


@pytest.mark.parametrize("opset", [13, 17, 18, 21, 26])
@pytest.mark.parametrize("held", ["own", "captured", "Constant"])
def test_branches_of_an_if(opset, held):
    original = conditional(opset, held)
    for cond in (True, False):
        split = check_round_trip(original, cond=np.array(cond))
    sites = carrier(split).sites("torch")
    names = ["w"] if held == "captured" else ["choose.then_branch/w", "choose.else_branch/w"]
    assert sorted(site.name for site in sites) == sorted(names)
    assert all(site.state == "split" for site in sites)
    top = [node.op_type for node in split.graph.node]
    # A captured weight is composed once, before the If; a branch composes its own.
    assert top == (["Relu", "ReduceL2", "Div", "Mul", "If"] if held == "captured" else ["Relu", "If"])


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("held", ["own", "captured"])
def test_body_of_a_loop(opset, held):
    square = RNG.standard_normal((5, 5)).astype(np.float32)
    inner = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["again"]), matmul("w", "next", "state")],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            value("state", "float32", [3, 5]),
        ],
        [helper.make_tensor_value_info("again", TensorProto.BOOL, []), value("next", "float32", [3, 5])],
        [tensor("w", square)] if held == "own" else [],
    )
    count = constant(helper.make_tensor("count", TensorProto.INT64, [], [3]))
    loop = helper.make_node("Loop", ["count", "", "x"], ["y"], name="loop", body=inner)
    check_round_trip(simple([count, loop], [] if held == "own" else [tensor("w", square)], opset=opset))


def test_one_tensor_with_many_readers_gets_one_magnitude():
    nodes = [
        helper.make_node("Gather", ["w", "ids"], ["e"], name="look up"),
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["e", "wt"], ["l"], name="head"),
        helper.make_node("Gemm", ["e", "w"], ["m"], name="gemm", transB=1),
        helper.make_node("ReduceMax", ["w"], ["top"], keepdims=0),
        helper.make_node("Sum", ["l", "m", "top"], ["y"]),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [3])
    original = simple(nodes, [tensor("w", W)], [ids])
    (site,) = carrier(original).sites("torch")
    assert (site.kind, site.axis, site.uses) == ("MatMul", 0, ("head", "gemm"))
    split = check_round_trip(original, ids=np.array([0, 4, 2]))
    assert sum(node.op_type == "ReduceL2" for node in split.graph.node) == 1
    readers = [node.op_type for node in split.graph.node if "w" in node.input]
    assert readers == ["ReduceL2", "Mul"]


def test_uses_that_disagree_are_left_alone():
    nodes = [matmul("w", "h"), helper.make_node("MatMul", ["w", "h2"], ["z"]), helper.make_node("Relu", ["h"], ["y"])]
    nodes.insert(1, constant(tensor("h2", np.ones((4, 2), np.float32))))
    original = simple(nodes, [tensor("w", W)])
    site = next(site for site in carrier(original).sites("torch") if site.name == "w")
    assert site.skip.startswith("its uses disagree on the axis")


def test_an_embedding_is_only_split_on_request():
    nodes = [helper.make_node("Gather", ["w", "ids"], ["y"], name="look up")]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [3])
    original = simple(nodes, [tensor("w", W)], [ids])
    with pytest.raises(NothingToDo, match="--kind Embedding"):
        applied(original)
    split = applied(original, selection=Selection(kinds=("Embedding",)))
    assert initializer(split, "w_g").shape == (5, 1)
    assert serialized(folded(split)) == serialized(original)


def overridable():
    made = layer(next(case for case in CASES if case.name == "matmul"))
    made.graph.input.append(value("w", "float32", [5, 4]))
    return made


def returned():
    made = layer(next(case for case in CASES if case.name == "matmul"))
    made.graph.output.append(value("w", "float32", [5, 4]))
    return made


def vector():
    return simple([matmul("w")], [tensor("w", W[:, 0])])


def quantized():
    w = helper.make_tensor("w", TensorProto.INT8, [5, 4], list(range(20)))
    scale = helper.make_tensor("s", TensorProto.FLOAT, [], [0.1])
    return simple([helper.make_node("DequantizeLinear", ["w", "s"], ["d"]), matmul("d")], [w, scale])


def integer_matmul():
    w = helper.make_tensor("w", TensorProto.INT8, [5, 4], list(range(20)))
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [3, 5])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, [3, 4])
    return simple([helper.make_node("MatMulInteger", ["x", "w"], ["y"])], [w], [x], [y])


def cast_from_integers():
    w = helper.make_tensor("w", TensorProto.INT8, [5, 4], list(range(20)))
    return simple([helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT), matmul("f")], [w])


def recurrent():
    w, r = (tensor(n, RNG.standard_normal((1, 8, 5 if n == "w" else 2)).astype(np.float32)) for n in "wr")
    return simple(
        [helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=2)], [w, r], [value("x", "float32", [1, 3, 5])]
    )


def old():
    return layer(next(case for case in CASES if case.name == "matmul"), opset=6)


def reshaped():
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [5, 4])
    return simple(
        [helper.make_node("Reshape", ["w", "shape"], ["v"]), matmul("v")], [tensor("w", W.reshape(4, 5)), shape]
    )


def nan():
    return layer(next(case for case in CASES if case.name == "matmul"), values=np.full((5, 4), np.nan, np.float32))


def empty():
    return simple([matmul("w")], [tensor("w", np.zeros((5, 0), np.float32))])


def in_training():
    made = layer(next(case for case in CASES if case.name == "matmul"))
    made.training_info.add().update_binding.add(key="w", value="new w")
    return made


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (overridable, "overridden from outside"),
        (returned, "output of the graph"),
        (vector, "1 axes"),
        (quantized, "quantized|no weight normalization"),
        (integer_matmul, "quantized|no weight normalization"),
        (cast_from_integers, "int8 has no weight normalization"),
        (recurrent, "LSTM weights"),
        (old, "operator set 6"),
        (reshaped, "computed from it .Reshape"),
        (nan, "NaN"),
        (empty, "empty"),
        (in_training, "training_info"),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_left_alone_with_a_reason(make, reason):
    original = make()
    held = carrier(original)
    with pytest.raises(NothingToDo, match=reason) as nothing:
        convert.apply(held)
    assert nothing.value.report.rows
    assert serialized(held.model) == serialized(original)


def test_a_model_without_weights_has_no_sites():
    original = simple([helper.make_node("MatMul", ["x", "z"], ["y"])], [], [X, value("z", "float32", [5, 4])])
    assert carrier(original).sites("torch") == []
    with pytest.raises(NothingToDo):
        convert.fold(carrier(original))


def test_before_ir_4_an_initializer_is_always_an_input():
    original = layer(next(case for case in CASES if case.name == "matmul"), opset=7)
    assert original.ir_version < 4
    split = check_round_trip(original)
    assert [info.name for info in split.graph.input] == ["x", "w"]
    assert [t.name for t in split.graph.initializer] == ["w"]


def test_names_never_collide():
    nodes = [
        matmul("w", "w_wn"),
        helper.make_node("Relu", ["w_wn"], ["w_norm"]),
        helper.make_node("Neg", ["w_norm"], ["y"]),
    ]
    original = simple([*nodes, constant(tensor("w_g", W))], [tensor("w", W)], opset=18)
    split = check_round_trip(original)
    names = [name for node in split.graph.node for name in node.output] + [t.name for t in split.graph.initializer]
    assert len(names) == len(set(names))
    assert serialized(applied(original)) == serialized(split)


def test_everything_else_stays():
    original = layer(CASES[0], opset=18)
    original.graph.node[0].doc_string = "a note"
    original.graph.value_info.append(value("unseen", "float32", [1]))
    original.graph.quantization_annotation.add(tensor_name="x")
    sparse = helper.make_sparse_tensor(
        tensor("sparse", np.ones(1, np.float32)), helper.make_tensor("i", TensorProto.INT64, [1], [2]), [4]
    )
    original.graph.sparse_initializer.append(sparse)
    original.training_info.add().algorithm.name = "none"
    split = applied(original)
    assert serialized(folded(split)) == serialized(original)
    held = copy(split)
    del held.graph.node[:-1]
    del held.graph.initializer[1:]
    held.graph.node[0].input[1] = "w"
    assert serialized(held) == serialized(original)


def test_a_part_that_something_else_reads_is_not_folded():
    split = applied(layer(CASES[0]))
    for part in ("w", "w_ratio", "w_norm"):
        seen = copy(split)
        seen.graph.node.append(helper.make_node("Identity", [part], ["seen"], name="spy"))
        with pytest.raises(NothingToDo, match=f"{part}, a part of its weight norm, is also read by spy"):
            folded(seen)


def test_an_overridable_magnitude_is_not_folded():
    split = applied(layer(CASES[0]))
    split.graph.input.append(value("w_g", "float32", [4, 1, 1]))
    with pytest.raises(NothingToDo, match="w_g can be overridden"):
        folded(split)


def test_only_our_structure_is_a_pair():
    for change in ("keepdims", "axes", "operand", "op", "swap"):
        split = applied(layer(CASES[0]))
        norm, ratio, product = split.graph.node[:3]
        attributes = {a.name: a for a in norm.attribute}
        if change == "keepdims":
            attributes["keepdims"].i = 0
        elif change == "axes":
            attributes["axes"].ints[:] = [0]
        elif change == "operand":
            split.graph.initializer.append(tensor("other", np.ones((4, 3, 3), np.float32)))
            norm.input[0] = "other"
        elif change == "op":
            norm.op_type = "ReduceL1"
        else:
            product.input[:] = list(reversed(product.input))
            ratio.input[:] = list(reversed(ratio.input))
        with pytest.raises(NothingToDo):
            folded(split)
        (site,) = (site for site in carrier(split).sites("torch") if site.uses == ("layer",))
        assert site.skip, change


def test_structure_counts_not_names():
    split = applied(layer(CASES[0], opset=18, dtype="float16"))
    names = {name for node in split.graph.node for name in node.output} - {"y"} | {"w_g"}
    new = {name: f"n{i}" for i, name in enumerate(sorted(names))}
    for node in split.graph.node:
        node.name = ""
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    for t in split.graph.initializer:
        t.name = new.get(t.name, t.name)
    plain = folded(split)
    assert [node.op_type for node in plain.graph.node] == ["Conv"]
    assert [t.name for t in plain.graph.initializer] == ["w"]


def test_a_shared_magnitude_is_removed_with_its_last_reader():
    nodes = [matmul("w", "a"), matmul("v", "b"), helper.make_node("Add", ["a", "b"], ["y"])]
    original = simple(nodes, [tensor("w", W), tensor("v", W)])
    split = applied(original)
    ratio = next(node for node in split.graph.node if node.output[0] == "v_ratio")
    ratio.input[0] = "w_g"
    del split.graph.initializer[[t.name for t in split.graph.initializer].index("v_g")]
    assert serialized(folded(split)) == serialized(original)


def test_rename_says_that_there_is_nothing_to_rename():
    with pytest.raises(UsageError, match="no keys to rename"):
        convert.rename(carrier(applied(layer(CASES[0]))), "parametrized")


def test_tensors_of_every_type_are_read():
    """Among them types that torch does not have, packed ones, and those that are kept in typed fields."""
    original = layer(CASES[0])
    kinds = [k for k in TensorProto.DataType.values() if k not in (TensorProto.UNDEFINED, TensorProto.STRING)]
    for kind in kinds:
        original.graph.initializer.append(helper.make_tensor(f"t{kind}", kind, [3, 1], [0, 1, 1]))
    original.graph.initializer.append(helper.make_tensor("text", TensorProto.STRING, [1], [b"a"]))
    split = applied(original)
    comparison = compare.compare_weights(carrier(original), carrier(split))
    assert comparison.identical
    assert comparison.compared == len(kinds) + 1
    assert serialized(folded(split)) == serialized(original)


def test_every_tensor_is_compared():
    original = conditional(17, "own")
    other = copy(original)
    branch = next(a.g for a in other.graph.node[1].attribute if a.name == "else_branch")
    branch.initializer[0].raw_data = W.tobytes()
    comparison = compare.compare_weights(carrier(original), carrier(other))
    assert [difference.name for difference in comparison.differing] == ["choose.else_branch/w"]


def test_the_names_of_layers_are_kept():
    split = applied(layer(CASES[0]))
    assert split.graph.node[-1].name == "layer"
    assert "layer" in onnx.printer.to_text(split.graph)


def test_a_name_of_two_tensors_is_refused():
    twice = model(helper.make_graph([matmul("w")], "g", [X], [Y], [tensor("w", W), tensor("w", W2)]), 17)
    body = helper.make_graph([matmul("w", "then")], "then", [], [value("then", "float32", None)], [tensor("w", W2)])
    other = helper.make_graph([matmul("w", "else")], "else", [], [value("else", "float32", None)])
    node = helper.make_node("If", ["on"], ["y"], then_branch=body, else_branch=other)
    on = helper.make_tensor("on", TensorProto.BOOL, [], [True])
    shadowed = model(helper.make_graph([node], "g", [X], [Y], [on, tensor("w", W)]), 17)
    for bad in (twice, shadowed):
        with pytest.raises(InputError, match="two tensors of the name 'w'"):
            carrier(bad)
