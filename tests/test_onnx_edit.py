"""Formulas that another tool wrote, edits of large graphs, and damaged models."""

from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
import pytest
from onnx import helper, numpy_helper

from tests.onnx_models import applied, folded, model, run, serialized, tensor, value
from wnconvert.carriers.onnx import edit
from wnconvert.errors import InputError, NothingToDo

W = np.random.default_rng(7).standard_normal((5, 4)).astype(np.float32)


def matmul(weight, output="y"):
    return helper.make_node("MatMul", ["x", weight], [output])


def simple(nodes, initializers):
    x, y = value("x", "float32", [3, 5]), value("y", "float32", [None, None])
    return model(helper.make_graph(nodes, "g", [x], [y], initializers), 17)


def test_weight_norm_in_another_form_is_left_alone_and_told():
    """`Mul(Div(v, ReduceL2(v)), g)`, as torch's TorchScript exporter writes it."""
    nodes = [
        helper.make_node("ReduceL2", ["w"], ["norm"], axes=[0], keepdims=1),
        helper.make_node("Div", ["w", "norm"], ["direction"]),
        helper.make_node("Mul", ["direction", "g"], ["product"]),
        matmul("product", "y"),
    ]
    original = simple(nodes, [tensor("w", W), tensor("g", W[:1])])
    with pytest.raises(NothingToDo, match=r"^nothing to fold \(the weight is computed with a norm") as nothing:
        folded(original)
    (row,) = nothing.value.report.rows
    assert (row.site.name, row.site.state, row.action) == ("w", "split", "skipped")
    with pytest.raises(NothingToDo, match="computed with a norm"):
        applied(original)


def pair_nodes(axes=(0,)):
    return [
        helper.make_node("ReduceL2", ["w"], ["norm"], axes=list(axes), keepdims=1),
        helper.make_node("Div", ["g", "norm"], ["ratio"]),
        helper.make_node("Mul", ["w", "ratio"], ["product"]),
    ]


def test_a_formula_that_is_spread_over_graphs_is_folded():
    norm, ratio, product = pair_nodes()
    branch = helper.make_graph([product, matmul("product", "a")], "then", [], [value("a", "float32", None)])
    other = helper.make_graph([helper.make_node("Relu", ["x"], ["b"])], "else", [], [value("b", "float32", None)])
    choose = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=other)
    held = [tensor("w", W), tensor("g", W[:1]), numpy_helper.from_array(np.array(True), "yes")]
    original = simple([norm, ratio, choose], held)
    plain = folded(original)
    assert [node.op_type for node in plain.graph.node] == ["If"]
    assert [t.name for t in plain.graph.initializer] == ["w", "yes"]
    np.testing.assert_allclose(run(plain)[0], run(original)[0], rtol=1e-5)


def test_a_pair_is_not_folded_where_its_name_is_hidden():
    hiding = [helper.make_node("Identity", ["x"], ["w"]), matmul("product", "a")]
    branches = {
        name: helper.make_graph(copies, name, [], [value("a", "float32", None)])
        for name, copies in (("then_branch", hiding), ("else_branch", [matmul("product", "a")]))
    }
    choose = helper.make_node("If", ["yes"], ["y"], **branches)
    held = [tensor("w", W), tensor("g", W[:1]), numpy_helper.from_array(np.array(True), "yes")]
    with pytest.raises(NothingToDo, match="where w is the name of something else"):
        folded(simple([*pair_nodes(), choose], held))


def test_what_is_known_of_a_removed_value_goes_with_it():
    original = simple([*pair_nodes(), matmul("product", "y")], [tensor("w", W), tensor("g", W[:1])])
    for name in ("norm", "other", "product", "ratio", "g", "w"):
        original.graph.value_info.append(value(name, "float32", None))
    assert [info.name for info in folded(original).graph.value_info] == ["other", "w"]


def test_a_large_graph_is_edited_at_once():
    """Moving all nodes behind each edit would take hours in a graph of a hundred thousand layers."""
    names = [f"y{i}" for i in range(1001)]
    nodes = [helper.make_node("Conv", [a, f"w{a}"], [b]) for a, b in itertools.pairwise(names)]
    held = [tensor(f"w{a}", np.ones((2, 2, 1), np.float32)) for a in names[:-1]]
    x, y = value(names[0], "float32", [1, 2, 4]), value(names[-1], "float32", [1, 2, 4])
    original = model(helper.make_graph(nodes, "g", [x], [y], held), 18)
    with mock.patch.object(edit._Draft, "write", autospec=True, side_effect=edit._Draft.write) as write:
        split = applied(original)
        assert write.call_count == 1
        assert [node.op_type for node in split.graph.node] == ["ReduceL2", "Div", "Mul", "Conv"] * len(nodes)
        assert serialized(folded(split)) == serialized(original)
    assert write.call_count == 2


@pytest.mark.parametrize("broken", ["shape", "dtype", "name", "operands"])
def test_a_damaged_model_is_one_clear_line(broken):
    original = simple([matmul("w", "y")], [tensor("w", W)])
    data = original.SerializeToString()
    if broken == "shape":
        original.graph.initializer[0].dims[0] = -4
    elif broken == "dtype":
        original.graph.initializer[0].data_type = 99
    elif broken == "operands":
        original.graph.node.insert(0, helper.make_node("Cast", [], ["seen"], to=1))
        original.graph.node[1].input[1] = "seen"
    else:
        original.ParseFromString(data.replace(b"MatMul", b"Mat\xfful"))
    with pytest.raises((InputError, NothingToDo)) as error:
        applied(original)
    assert "\n" not in str(error.value)
