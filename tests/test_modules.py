"""Contract of a live module, over one network per kind: apply keeps the function, fold gives every bit back."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import wnconvert
from tests import reference
from tests.networks import CASES, Case, tensors
from wnconvert.kinds import MODULES
from wnconvert.layers import WeightNormLayer
from wnconvert.sites import Dim

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
dims = pytest.mark.parametrize("dim", ["torch", "out", None, 1], ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


def run(module: nn.Module, case: Case) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors(module(*case.inputs()))


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(reference.same_bits(x, y) for x, y in zip(a, b, strict=True))


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_state(module: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(reference.same_bits(after[name], before[name]) for name in before)


def perturb(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("_g", "_v")):
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))


def test_every_row_of_the_table_has_a_network() -> None:
    built = {site.kind for case in CASES for site in wnconvert.find(case.make())}
    assert {kind.name for kind in MODULES} <= built | {"Embedding"}


@cases
@dims
def test_apply_keeps_outputs_and_fold_gives_every_bit_back(case: Case, dim: Dim) -> None:
    module = case.make()
    before, expected, classes = snapshot(module), run(module, case), [type(m) for m in module.modules()]

    result = wnconvert.apply(module, dim=dim)

    split = {row.site.name for row in result.report.rows if row.action == "split"}
    assert split == set(case.weights)
    assert result.model is module
    assert equal(run(module, case), expected)
    assert {name.rpartition(".")[2][-2:] for name, _ in module.named_parameters()} >= {"_g", "_v"}

    folded = wnconvert.fold(module)

    assert {row.site.name for row in folded.report.rows if row.action == "folded"} == set(case.weights)
    assert [type(m) for m in module.modules()] == classes
    assert_same_state(module, before)
    assert equal(run(module, case), expected)
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in case.make().named_parameters()]
    assert not any(key.startswith("_weight_norm") for m in module.modules() for key in vars(m))
    pickle.dumps(module)


@cases
def test_a_trained_module_folds_to_what_its_forward_used(case: Case) -> None:
    module = case.make()
    wnconvert.apply(module)
    perturb(module)
    used = {}
    for name in case.weights:
        path, _, leaf = name.rpartition(".")
        used[name] = getattr(module.get_submodule(path), leaf).detach().clone()
    trained = run(module, case)
    wnconvert.fold(module)
    folded = module.state_dict()
    for name, weight in used.items():
        assert reference.ulp(weight, folded[name]) <= 1
    for a, b in zip(trained, run(module, case), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@cases
def test_every_magnitude_and_direction_gets_a_gradient(case: Case) -> None:
    module = case.make().train()
    wnconvert.apply(module)
    sum(t.square().sum() for t in tensors(module(*case.inputs())) if t.requires_grad).backward()  # type: ignore[union-attr]
    missing = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert missing == []


@cases
def test_a_split_module_pickles_and_deep_copies(case: Case) -> None:
    module = case.make()
    before = snapshot(module)
    wnconvert.apply(module)
    perturb(module)
    expected, state = run(module, case), snapshot(module)
    for twin in (
        pickle.loads(pickle.dumps(module)),
        copy.deepcopy(module),
        torch.load(_saved(module), weights_only=False),
    ):
        assert equal(run(twin, case), expected)
        assert_same_state(twin, state)
        assert [type(m) for m in twin.modules()] == [type(m) for m in module.modules()]
        wnconvert.fold(twin)
        assert list(twin.state_dict()) == list(before)
    # Folding the copies has left the original whole.
    assert_same_state(module, state)
    assert equal(run(module, case), expected)


@cases
def test_a_split_module_loads_plain_and_split_state_strictly(case: Case) -> None:
    plain = case.make()
    source = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.01)
    target = copy.deepcopy(plain)
    wnconvert.apply(target)
    target.load_state_dict(source.state_dict(), strict=True)
    assert equal(run(target, case), run(source, case))
    wnconvert.apply(source)
    other = copy.deepcopy(plain)
    wnconvert.apply(other)
    other.load_state_dict(source.state_dict(), strict=True)
    assert_same_state(other, snapshot(source))


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_keep_every_bit(case: Case, dtype: torch.dtype) -> None:
    module = case.make().to(dtype)
    before = snapshot(module)
    wnconvert.apply(module)
    for name in case.weights:
        path, _, leaf = name.rpartition(".")
        assert reference.same_bits(getattr(module.get_submodule(path), leaf), before[name])
    wnconvert.fold(module)
    assert_same_state(module, before)


@cases
def test_moving_and_casting_a_split_module_takes_effect_at_once(case: Case) -> None:
    module = case.make()
    wnconvert.apply(module)
    for name, layer in module.named_modules():
        if isinstance(layer, WeightNormLayer):
            layer.to(torch.float64)
            for leaf in layer._weight_norm:
                assert getattr(layer, leaf).dtype == torch.float64, name


def test_one_subclass_serves_every_layer_of_a_class() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 3))
    wnconvert.apply(module)
    assert type(module[0]) is type(module[1])
    assert isinstance(module[0], nn.Linear)
    assert type(module[0]).__name__ == "WeightNormLinear"


def test_zero_rows_stay_exactly_zero_and_are_counted() -> None:
    module = nn.Linear(4, 3)
    with torch.no_grad():
        module.weight[1] = 0
    before = snapshot(module)
    report = wnconvert.apply(module).report
    assert report.rows[0].zero_rows == 1
    assert any("1 row of zeros" in note for note in report.notes)
    assert reference.same_bits(module.weight, before["weight"])
    wnconvert.fold(module)
    assert_same_state(module, before)


def test_weights_that_cannot_be_split_are_left_alone_with_the_reason() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    with torch.no_grad():
        module[0].weight[2, 1] = float("nan")
    report = wnconvert.apply(module).report
    assert [(row.site.name, row.action, row.reason) for row in report.rows] == [
        ("0.weight", "skipped", "row 2 holds NaN or infinity"),
        ("1.weight", "split", None),
    ]
    assert type(module[0]) is nn.Linear


def _saved(module: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return buffer
