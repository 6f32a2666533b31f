"""Splitting in place: layers that resist, errors half-way, writes through containers, inference mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import wnconvert
from tests import reference
from tests.test_traps import legacy
from wnconvert import layers
from wnconvert.errors import InputError

# --- TorchScript inside ordinary modules -----------------------------------------------------------------------------


@pytest.mark.parametrize("script", [torch.jit.script, lambda layer: torch.jit.trace(layer, torch.ones(1, 4))])
def test_a_scripted_child_is_left_alone_with_a_reason(script: Callable[[nn.Module], nn.Module]) -> None:
    module, x = nn.Sequential(nn.Linear(4, 4), script(nn.Linear(4, 3))), torch.randn(2, 4)
    expected = module(x)
    assert [site.skip is None for site in wnconvert.find(module)] == [True, False]
    rows = wnconvert.apply(module).report.rows
    assert [(row.site.name, row.action) for row in rows] == [("0.weight", "split"), ("1.weight", "skipped")]
    assert "TorchScript" in str(rows[1].reason)
    assert torch.equal(module(x), expected)
    assert [row.action for row in wnconvert.fold(module).report.rows] == ["folded"]
    assert torch.equal(module(x), expected)


# --- errors half-way -------------------------------------------------------------------------------------------------


class Registered(nn.Linear):
    """A layer whose subclasses all need a name, and are listed by it."""

    listed: ClassVar[list[str]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "NAME" not in vars(cls):
            raise TypeError("needs a NAME")
        cls.listed.append(vars(cls)["NAME"])


def test_a_base_class_that_refuses_unnamed_subclasses_is_split() -> None:
    module, x = Registered(4, 3), torch.randn(2, 4)
    expected = module(x)
    wnconvert.apply(module)
    assert layers.split_names(module) == ("weight",)
    assert torch.equal(module(x), expected)
    assert Registered.listed == []


def test_a_subclass_of_ours_is_registered_as_ever() -> None:
    ours = type(wnconvert.apply(Registered(4, 3)).model)
    with pytest.raises(TypeError, match="needs a NAME"):
        type("Unnamed", (ours,), {})


class Final(type):
    """Makes classes that nobody can derive from."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        if any(isinstance(base, Final) for base in bases):
            raise TypeError("this class is final")
        return super().__new__(cls, name, bases, namespace)


class Sealed(nn.Linear, metaclass=Final):
    pass


def look(module: nn.Module) -> list[tuple[type, list[str], dict[str, int], set[str]]]:
    """Everything about the modules of a network that a conversion changes."""
    return [
        (type(m), list(m._modules), {key: id(p) for key, p in m._parameters.items()}, set(vars(m)))
        for m in module.modules()
    ]


def test_a_class_that_cannot_be_derived_from_leaves_the_layer_as_it_was() -> None:
    module = Sealed(4, 3)
    before, weight = look(module), module.weight
    spec = layers.Spec.of("Linear", 0, 1, 2)
    with pytest.raises(TypeError, match="final"):
        layers.attach(module, "weight", spec, nn.Parameter(torch.ones(3, 1)), nn.Parameter(torch.ones(3, 4)))
    assert look(module) == before
    assert module.weight is weight


def test_an_error_half_way_undoes_what_was_split() -> None:
    module, x = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4), Sealed(4, 3)), torch.randn(2, 4)
    before, expected = look(module), module[2](module[1](module[0](x))[0])
    with pytest.raises(TypeError, match="final"):
        wnconvert.apply(module)
    assert look(module) == before
    assert torch.equal(module[2](module[1](module[0](x))[0]), expected)


def test_an_error_half_way_undoes_what_was_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(
        nn.Linear(4, 4), legacy(nn.Linear(4, 4)), parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 3)
    )
    wnconvert.apply(module)
    before, x = look(module), torch.randn(2, 4)
    expected = module(x)
    real, calls = wnconvert.weightnorm.fold, []

    def interrupted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(wnconvert.weightnorm, "fold", interrupted)
        with pytest.raises(KeyboardInterrupt):
            wnconvert.fold(module)
    assert look(module) == before
    assert torch.equal(module(x), expected)
    assert [row.action for row in wnconvert.fold(module).report.rows] == ["folded"] * 4


# --- inference mode --------------------------------------------------------------------------------------------------


def transposed(batch: int) -> Tensor:
    return torch.randn(3, batch, 8).transpose(0, 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [
    lambda: nn.Linear(8, 24),
    lambda: nn.LSTM(8, 12, 2, bidirectional=True),
    lambda: nn.GRU(8, 12),
    lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0),
    lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    lambda: nn.Conv1d(8, 6, 1, groups=2),
])  # fmt: skip
def test_bits_are_the_same_in_inference_mode(make: Callable[[], nn.Module], training: bool) -> None:
    torch.manual_seed(0)
    module = make().train(training)
    split = wnconvert.apply(copy.deepcopy(module)).model
    for batch in (2, 5, 7):
        x = transposed(batch)
        x = x.transpose(1, 2) if isinstance(module, nn.Conv1d) else x
        with torch.inference_mode():
            expected, found = module(x), split(x)
        assert torch.equal(found[0], expected[0])


def test_a_layer_made_in_inference_mode() -> None:
    with torch.inference_mode():
        module = nn.Linear(8, 24)
        split, x = wnconvert.apply(copy.deepcopy(module)).model, transposed(5)
        assert layers.split_names(split) == ("weight",)
        assert torch.equal(split(x), module(x))
    rows = wnconvert.apply(module).report.rows
    assert [row.action for row in rows] == ["skipped"]
    assert "inference mode" in str(rows[0].reason)


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 3), lambda: nn.Linear(4, 3).state_dict()])
def test_what_is_converted_in_inference_mode_can_train(make: Callable[[], Any]) -> None:
    module, halves = make(), wnconvert.apply(make()).model
    with torch.inference_mode():
        split, plain = wnconvert.apply(module).model, wnconvert.fold(halves).model
        assert torch.is_inference_mode_enabled()
    for model in (split, plain):
        tensors = model.values() if isinstance(model, dict) else model.parameters()
        assert not any(tensor.is_inference() for tensor in tensors)
    if isinstance(split, nn.Module):
        split(torch.randn(2, 4)).sum().backward()
        assert split.weight_g.grad is not None


def test_a_lazy_layer_in_inference_mode_is_a_clear_error() -> None:
    with torch.inference_mode(), pytest.raises(InputError, match="has no shape yet"):
        wnconvert.apply(nn.LazyLinear(3))


# --- writes ----------------------------------------------------------------------------------------------------------


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ws = nn.ParameterList([torch.randn(3, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.ws[0])


class Keyed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ws = nn.ParameterDict({"a": torch.randn(3, 4)})

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.ws["a"])


@pytest.mark.parametrize(("cls", "read"), [
    (Listed, lambda m: m.ws[0]),
    (Listed, lambda m: next(iter(m.ws))),
    (Keyed, lambda m: m.ws["a"]),
    (Keyed, lambda m: next(iter(m.ws.values()))),
])  # fmt: skip
def test_a_write_through_a_container_is_kept(cls: type[nn.Module], read: Callable[[nn.Module], Tensor]) -> None:
    module, x = cls(), torch.randn(2, 4)
    expected = module(x)
    assert wnconvert.apply(module).report.rows[0].action == "split"
    assert torch.equal(module(x), expected)
    nn.init.ones_(read(module))
    assert torch.equal(read(module), torch.ones(3, 4))
    assert torch.allclose(module(x), x.sum(1, keepdim=True).expand(2, 3))
    wnconvert.fold(module)
    assert reference.same_bits(read(module), torch.ones(3, 4))
