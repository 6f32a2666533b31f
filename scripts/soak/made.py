"""Random state dicts: layers of many shapes, and values that are hard to split."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

State = dict[str, Tensor]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LARGE = 0.03
"""Share of weights that take more than one block of the streamed arithmetic."""


def state(rng: random.Random, *, ties: bool = False) -> State:
    """A state dict. Two of its names may be one tensor if `ties`."""
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    made: State = {}
    # One layer that is sure to be split, so that no file is without work.
    made["first.linear.weight"] = torch.randn(7, 5, generator=generator)
    for i in range(rng.randint(0, 12)):
        made |= _layer(rng, generator, i)
    if ties and rng.random() < 0.5:
        made["lm_head.weight"] = made[rng.choice(list(made))]
    return made


def _layer(rng: random.Random, generator: torch.Generator, i: int) -> State:
    dtype = rng.choice(DTYPES)
    rows, columns = _size(rng), _size(rng)
    if rng.random() < _LARGE:
        rows, columns = rng.randint(1000, 3000), rng.randint(500, 1500)
    kernel = [rng.randint(1, 4) for _ in range(rng.choice([0, 0, 1, 2, 3]))]
    name = rng.choice(["linear", "q_proj", "conv", "ups", "embed_tokens", "norm", "gate", "lstm"])
    shape = [rows, columns, *kernel] if name != "norm" else [rows]
    if name == "lstm":
        hidden = rng.randint(1, 9)
        ih, hh = [4 * hidden, columns], [4 * hidden, hidden]
        leaves = {"weight_ih_l0": ih, "weight_hh_l0": hh, "bias_ih_l0": ih[:1], "bias_hh_l0": ih[:1]}
    else:
        leaves = {"weight": shape, **({"bias": shape[:1]} if rng.random() < 0.5 else {})}
    made = {f"blocks.{i}.{name}.{leaf}": values(rng, generator, size, dtype) for leaf, size in leaves.items()}
    if rng.random() < 0.1:
        made[f"blocks.{i}.steps"] = torch.tensor(rng.randint(-9, 9))
    if rng.random() < 0.1:
        made[f"blocks.{i}.mask"] = torch.rand(rng.randint(0, 20), generator=generator) > 0.5
    return made


def _size(rng: random.Random) -> int:
    return rng.choice([0, 1, 1, 2, 3, 8, 17, rng.randint(1, 300)])


def values(rng: random.Random, generator: torch.Generator, shape: list[int], dtype: torch.dtype) -> Tensor:
    """A tensor whose values are of one of several sorts."""
    made = torch.randn(shape, generator=generator, dtype=torch.float64)
    sort = rng.choice(_SORTS)
    return sort(made, torch.finfo(dtype), rng).to(dtype).contiguous()


def _ordinary(w: Tensor, _: torch.finfo, rng: random.Random) -> Tensor:
    return w * 10 ** rng.uniform(-3, 1)


def _zero_rows(w: Tensor, _: torch.finfo, rng: random.Random) -> Tensor:
    for row in range(len(w)):
        if rng.random() < 0.4:
            w[row] = rng.choice([0.0, -0.0])
    return w


def _signed_zeros(w: Tensor, _: torch.finfo, _rng: random.Random) -> Tensor:
    return torch.where(w.abs() < 1.5, torch.copysign(torch.zeros_like(w), w), w)


def _tiny(w: Tensor, info: torch.finfo, rng: random.Random) -> Tensor:
    return w * (info.smallest_normal * 2.0 ** rng.randint(-10, 3))


def _huge(w: Tensor, info: torch.finfo, rng: random.Random) -> Tensor:
    return (w / 8 * (info.max * 2.0 ** -rng.randint(0, 12))).clamp(info.min, info.max)


def _mixed(w: Tensor, info: torch.finfo, rng: random.Random) -> Tensor:
    exponents = torch.tensor([rng.uniform(-0.9, 0.9) for _ in range(len(w))], dtype=torch.float64)
    scale = torch.pow(torch.tensor(info.max, dtype=torch.float64).sqrt(), exponents)
    return w * scale.reshape(-1, *[1] * (w.dim() - 1))


def _constant(w: Tensor, _: torch.finfo, rng: random.Random) -> Tensor:
    return torch.full_like(w, rng.choice([0.0, -0.0, 1.0, -0.1, 3.0]))


def _broken(w: Tensor, _: torch.finfo, rng: random.Random) -> Tensor:
    if w.numel():
        w.view(-1)[rng.randrange(w.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
    return w


_SORTS: tuple[Callable[[Tensor, torch.finfo, random.Random], Tensor], ...] = (
    _ordinary,
    _ordinary,
    _zero_rows,
    _signed_zeros,
    _tiny,
    _huge,
    _mixed,
    _constant,
    _broken,
)
