"""Every row of the table of ONNX layers: dtype, opset, holder, what is between, axis."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.onnx_models import (
    CASES,
    OPSETS,
    TYPES,
    Case,
    applied,
    carrier,
    expected_g,
    folded,
    initializer,
    is_valid,
    layer,
    operand_order,
    run,
    serialized,
)
from tests.reference import same_bits
from wnconvert import weightnorm
from wnconvert.kinds import ONNX

CLOSE = {"float32": 2e-6, "float64": 1e-14, "float16": 1e-3, "bfloat16": 1e-2}


def by_name(case: Case) -> str:
    return case.name


def check(original, split, w, kept, dtype, groups=1):
    g = initializer(split, "w_g")
    torch.testing.assert_close(
        g, expected_g(w, kept, groups), rtol=1.2e-7 if g.dtype == torch.float32 else 3e-16, atol=0
    )
    assert same_bits(initializer(split, "w"), w)
    if is_valid(original):
        assert is_valid(split)
    assert split.ir_version == original.ir_version
    assert split.opset_import == original.opset_import
    assert split.graph.input == original.graph.input
    assert serialized(folded(split)) == serialized(original)
    for optimize in (True, False):
        before, after = run(original, optimize), run(split, optimize)
        assert (before is None) == (after is None)
        if before is not None:
            np.testing.assert_allclose(after[0], before[0], rtol=0, atol=CLOSE[dtype] * np.abs(before[0]).max())
    return before is not None


def test_every_kind_of_the_table_has_a_case():
    assert {kind.op_type for kind in ONNX} - {"Gather"} == {case.op_type for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=by_name)
@pytest.mark.parametrize("opset", OPSETS)
def test_every_dtype_and_holder(case, opset):
    ran = set()
    for dtype in TYPES:
        for holder in ("initializer", "Constant"):
            original = layer(case, dtype=dtype, opset=opset, holder=holder)
            split = applied(original)
            if check(original, split, initializer(original, "w"), case.kept, dtype):
                ran.add(dtype)
    assert {"float32", "float16"} <= ran
    assert "float64" in ran or case.op_type in ("Conv", "ConvTranspose")


@pytest.mark.parametrize("case", [case for case in CASES if case.groups == 1], ids=by_name)
@pytest.mark.parametrize("behind", ["Identity", "Transpose", "Cast"])
def test_behind_another_node(case, behind):
    for opset in (13, 18):
        for dtype in ("float32", "float16"):
            for holder in ("initializer", "Constant"):
                original = layer(case, dtype=dtype, opset=opset, holder=holder, behind=behind)
                order = operand_order(len(case.weight))
                kept = tuple(order[i] for i in case.kept) if behind == "Transpose" else case.kept
                check(
                    original,
                    applied(original),
                    initializer(original, "w"),
                    kept,
                    "float16" if behind == "Cast" else dtype,
                )


@pytest.mark.parametrize("case", [case for case in CASES if case.out], ids=by_name)
@pytest.mark.parametrize("opset", [9, 17, 18])
def test_output_units_of_transposed_convolutions(case, opset):
    for dtype in ("float32", "float16"):
        original = layer(case, dtype=dtype, opset=opset)
        split = applied(original, dim="out")
        assert check(original, split, initializer(original, "w"), case.out, dtype, case.groups)
        site = carrier(split).sites("torch")[0]
        assert (site.state, site.groups) == ("split", case.groups)


def test_a_grouped_split_needs_integer_constants():
    case = next(case for case in CASES if case.groups > 1)
    (site,) = carrier(layer(case, opset=7)).sites("out")
    assert site.skip.startswith("operator set 7 has no integer Constant")
    newer = layer(case, opset=7)
    newer.ir_version = 4
    del newer.graph.input[1]
    assert check(newer, applied(newer, dim="out"), initializer(newer, "w"), case.out, "float32", case.groups)


def test_a_grouped_transposed_convolution_behind_a_transpose_is_left_alone():
    case = next(case for case in CASES if case.groups > 1)
    (site,) = carrier(layer(case, behind="Transpose")).sites("torch")
    assert site.skip == "a grouped ConvTranspose behind a Transpose"


@pytest.mark.parametrize("case", CASES, ids=by_name)
@pytest.mark.parametrize("dim", [None, 0, 1, -1])
def test_a_chosen_axis(case, dim):
    for opset in (17, 18):
        original = layer(case, opset=opset)
        split = applied(original, dim=dim)
        kept = None if dim is None else (dim % len(case.weight),)
        check(original, split, initializer(original, "w"), kept, "float32")
        assert carrier(split).sites("torch")[0].axis == (None if kept is None else kept[0])


@pytest.mark.parametrize("dtype", list(TYPES))
def test_values_in_typed_fields(dtype):
    case = CASES[0]
    values = np.random.default_rng(3).standard_normal(case.weight).astype(np.float32)
    values[1] = 0
    values[2, 0] = -0.0
    original = layer(case, dtype=dtype, opset=13, values=values, typed=True)
    assert not original.graph.initializer[0].raw_data
    split = applied(original)
    assert not split.graph.initializer[0].raw_data
    assert initializer(split, "w_g").flatten()[1] == 0
    assert serialized(folded(split)) == serialized(original)


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("holder", ["initializer", "Constant"])
def test_rows_of_zeros_give_zero_outputs_and_come_back(dtype, holder):
    case = CASES[0]
    values = np.random.default_rng(3).standard_normal(case.weight).astype(np.float32)
    values[1] = 0
    values[3] = -0.0
    original = layer(case, dtype=dtype, holder=holder, values=values)
    split = applied(original)
    assert serialized(folded(split)) == serialized(original)
    outputs = run(split, optimize=False)
    if outputs is not None:
        assert (outputs[0][:, [1, 3]] == 0).all()
        assert np.isfinite(outputs[0]).all()


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_fold_of_a_trained_pair_is_the_arithmetic(case):
    for dtype in TYPES:
        for typed in (False, True):
            split = applied(layer(case, dtype=dtype, opset=18, typed=typed))
            held = {t.name: t for t in split.graph.initializer}
            g, v = initializer(split, "w_g"), initializer(split, "w")
            g = (g * (-1.5)).contiguous()
            v = (v.double() * torch.linspace(0.5, 2, v.numel()).reshape(v.shape)).to(v.dtype)
            held["w_g"].raw_data = g.numpy().tobytes()
            if not typed:
                held["w"].raw_data = v.flatten().view(torch.uint8).numpy().tobytes()
            else:
                v = initializer(split, "w")
            plain = folded(split)
            assert same_bits(initializer(plain, "w"), weightnorm.fold(g, v))
            assert bool(plain.graph.initializer[0].raw_data) != typed
            before, after = run(split), run(plain)
            if before is not None:
                np.testing.assert_allclose(after[0], before[0], rtol=0, atol=CLOSE[dtype] * np.abs(before[0]).max())


def test_applying_twice_finds_the_pair():
    original = layer(CASES[1])
    split = applied(original)
    (site,) = carrier(split).sites("torch")
    assert (site.name, site.kind, site.state, site.axis, site.uses) == ("w", "Conv", "split", 0, ("layer",))
    assert site.shape == (4, 3, 3, 2)
