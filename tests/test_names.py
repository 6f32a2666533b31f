"""How pairs are spelled and found."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from wnconvert.names import find_pairs, is_norm_shape, plain_name, spell
from wnconvert.sites import SCHEMES


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_torch_spellings_are_found(dim: int | None) -> None:
    legacy = nn.Sequential(weight_norm(nn.Conv1d(3, 4, 5), dim=dim))
    parametrized = nn.Sequential(parametrizations.weight_norm(nn.Conv1d(3, 4, 5), dim=dim))

    for module, scheme in ((legacy, "legacy"), (parametrized, "parametrized")):
        (pair,) = find_pairs(_shapes(module))
        assert (pair.name, pair.scheme, pair.problem) == ("0.weight", scheme, None)
        assert {pair.g, pair.v} == set(_shapes(module)) - {"0.bias"}


@pytest.mark.parametrize("name", ["weight", "a.weight", "a.0.weight_hh_l0", "x.parametrizations.y", "übung.w"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_spelling_is_read_back(name: str, scheme: str) -> None:
    g, v = spell(name, scheme)  # type: ignore[arg-type]

    assert plain_name(g) == (name, scheme, "g")
    assert plain_name(v) == (name, scheme, "v")


def test_any_parameter_of_the_root_may_be_a_pair() -> None:
    module = weight_norm(nn.LSTM(3, 4), "weight_hh_l0")

    assert [pair.name for pair in find_pairs(_shapes(module))] == ["weight_hh_l0"]


@pytest.mark.parametrize(
    ("shapes", "problem"),
    [
        ({"a.weight_g": (4, 1)}, "a.weight_v is missing"),
        ({"a.weight_v": (4, 3)}, "a.weight_g is missing"),
        ({"a.weight_g": (4, 1), "a.weight_v": (4, 3), "a.weight": (4, 3)}, "a.weight is there beside"),
        ({"a.weight_g": (3, 1), "a.weight_v": (4, 3)}, "is not the norm of"),
        ({"a.weight_g": (4, 3), "a.weight_v": (4, 3)}, "is not the norm of"),
        ({"a.weight_g": (4,), "a.weight_v": (4, 3)}, "is not the norm of"),
        (
            {
                "a.weight_g": (4, 1),
                "a.weight_v": (4, 3),
                "a.parametrizations.weight.original0": (4, 1),
                "a.parametrizations.weight.original1": (4, 3),
            },
            "a.parametrizations.weight.original0 is there beside",
        ),
    ],
)
def test_what_is_spelled_like_a_pair_and_is_none(shapes: dict[str, tuple[int, ...]], problem: str) -> None:
    (pair,) = find_pairs(shapes)

    assert pair.problem is not None
    assert problem in pair.problem


def test_two_tensors_that_only_end_alike_are_passed_over() -> None:
    assert find_pairs({"to_g": (4, 4), "to_v": (4, 3)}) == []
    assert find_pairs({"attn.to_v": (4, 3)}) == []
    assert find_pairs({"emb_g": (109, 256)}) == []


@pytest.mark.parametrize("wrap", [spectral_norm, parametrizations.spectral_norm, parametrizations.orthogonal])
def test_other_norms_are_no_pairs(wrap: object) -> None:
    module = nn.Sequential(wrap(nn.Linear(4, 4)))  # type: ignore[operator]

    assert [pair for pair in find_pairs(_shapes(module)) if pair.problem is None] == []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.data())
def test_norm_shapes_are_accepted(v: list[int], data: st.DataObject) -> None:
    kept = data.draw(st.sets(st.integers(0, len(v) - 1), max_size=len(v) - 1))
    g = tuple(n if i in kept else 1 for i, n in enumerate(v))

    assert is_norm_shape(g, tuple(v)) or g == tuple(v)
    assert is_norm_shape((), tuple(v))


def test_order_is_that_of_the_first_half() -> None:
    shapes = {"b.weight_v": (2, 3), "a.weight_g": (4, 1), "a.weight_v": (4, 3), "b.weight_g": (2, 1)}

    assert [pair.name for pair in find_pairs(shapes)] == ["b.weight", "a.weight"]
