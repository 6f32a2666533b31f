"""State dicts exchanged with torch's own weight norm, both ways, and checkpoints loaded into plain modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import wnconvert
from tests import reference
from tests.test_traps import FORMS, trained
from wnconvert.errors import InputError

LAYERS = {
    "Linear": lambda: nn.Linear(4, 3),
    "Conv2d": lambda: nn.Conv2d(4, 6, 3),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(4, 6, 3),
}
layers = pytest.mark.parametrize("layer", LAYERS)
dims = pytest.mark.parametrize("dim", [0, 1, None])
torch_forms = pytest.mark.parametrize("form", ["legacy", "parametrized"])


class Vocoder(nn.Module):
    """A little network with layers that are split and layers that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.Conv1d(3, 8, 5, padding=2)
        self.ups = nn.ModuleList([nn.ConvTranspose1d(8, 4, 4, 2), nn.ConvTranspose1d(4, 2, 4, 2)])
        self.norm = nn.BatchNorm1d(2)
        self.post = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pre(x)
        for up in self.ups:
            x = up(torch.relu(x))
        return self.post(self.norm(x).transpose(1, 2))


def split_by(form: str, module: nn.Module) -> nn.Module:
    for layer in (module.pre, *module.ups):
        FORMS[form](layer)
    return module


@layers
@dims
@torch_forms
def test_our_keys_load_into_torch(layer: str, dim: int | None, form: str) -> None:
    ours = trained(FORMS["wnconvert"](LAYERS[layer](), dim=dim))
    theirs = FORMS[form](LAYERS[layer](), dim=dim)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    wnconvert.fold(ours), wnconvert.fold(theirs)
    assert reference.same_bits(ours.weight, theirs.weight)


@layers
@dims
@torch_forms
def test_torch_keys_load_into_ours(layer: str, dim: int | None, form: str) -> None:
    theirs = trained(FORMS[form](LAYERS[layer](), dim=dim))
    ours = FORMS["wnconvert"](LAYERS[layer](), dim=dim)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    names = [name for name, _ in theirs.named_parameters()]
    for part, key in enumerate(("weight_g", "weight_v")):
        names = [name.replace(f"parametrizations.weight.original{part}", key) for name in names]
    assert names == [name for name, _ in ours.named_parameters()]
    wnconvert.fold(ours)
    wnconvert.fold(theirs)
    assert reference.same_bits(ours.weight, theirs.weight)


@torch_forms
def test_optimizer_state_counts_parameters_in_the_same_order(form: str) -> None:
    ours, theirs = wnconvert.apply(Vocoder(), include=["pre.*", "ups.*"]).model, split_by(form, Vocoder())
    assert [tuple(p.shape) for p in ours.parameters()] == [tuple(p.shape) for p in theirs.parameters()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", ["plain", *FORMS])
def test_load_into_splits_exactly_what_the_checkpoint_holds_split(form: str, target: str) -> None:
    source = trained(split_by(form, Vocoder())).eval()
    module = Vocoder().eval()
    if target != "plain":
        split_by(target, module)
    x = torch.randn(1, 3, 9)

    assert wnconvert.load_into(module, source.state_dict()) is module

    assert torch.allclose(module(x), source(x), atol=1e-6)
    split = {site.name for site in wnconvert.find(module) if site.state == "split"}
    assert split == {"pre.weight", "ups.0.weight", "ups.1.weight"}
    assert type(module.post) is nn.Linear
    wnconvert.fold(source), wnconvert.fold(module)
    assert all(
        reference.same_bits(a, b)
        for a, b in zip(source.state_dict().values(), module.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("target", FORMS)
def test_load_into_splits_a_plain_checkpoint_for_a_split_module(target: str) -> None:
    source, module = Vocoder().eval(), split_by(target, Vocoder()).eval()
    wnconvert.load_into(module, source.state_dict())
    wnconvert.fold(module)
    assert all(
        reference.same_bits(a, b)
        for a, b in zip(source.state_dict().values(), module.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    "nest",
    [
        lambda s: {"generator": s, "step": 3},
        lambda s: {"model": {"state_dict": {f"module.{k}": v for k, v in s.items()}}, "optim": {"state": {}}},
        lambda s: {"generator": s, "discriminator": {"pre.weight": torch.zeros(2, 2)}},
    ],
)
def test_load_into_finds_the_state_dict_in_a_training_checkpoint(nest: object) -> None:
    source = trained(split_by("legacy", Vocoder()))
    module = wnconvert.load_into(Vocoder(), nest(source.state_dict()))  # type: ignore[operator]
    assert torch.equal(module.pre.weight_g, source.pre.weight_g)


def test_load_into_refuses_what_does_not_fit_and_changes_nothing() -> None:
    module = Vocoder()
    before = copy.deepcopy(module.state_dict())
    state = split_by("legacy", Vocoder()).state_dict()
    state["extra.weight"] = torch.zeros(2)
    del state["post.bias"]
    state["pre.bias"] = torch.zeros(3)
    with pytest.raises(InputError) as error:
        wnconvert.load_into(module, state)
    assert "post.bias is missing" in str(error.value)
    assert "extra.weight is not in the module" in str(error.value)
    assert "pre.bias has shape [3], the module needs [8]" in str(error.value)
    assert list(module.state_dict()) == list(before)
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), before.values(), strict=True))


def test_load_into_refuses_a_magnitude_of_another_axis() -> None:
    module = FORMS["wnconvert"](nn.Linear(4, 3), dim=1)
    state = FORMS["legacy"](nn.Linear(4, 3), dim=0).state_dict()
    with pytest.raises(InputError, match=r"magnitude of weight has shape \[3, 1\], the module's \[1, 4\]"):
        wnconvert.load_into(module, state)
